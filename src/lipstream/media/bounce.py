"""Play a video to the length of a speech, forwards and backwards, without holding it in memory.

Backwards, segments are decoded again from the keyframe before them, last segment first; only one segment is kept.

    >>> for frame in BouncingReader(VideoReader("talk.mp4"), speech_samples=160_000): ...
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.timeline import (
    SLACK,
    SPEECH_RATE,
    bounce_pts,
    ends_together,
    is_within_speech,
    needs_bounce,
)

MAX_CACHED_FRAMES = 64
MAX_CACHED_BYTES = 256 * 1024 * 1024  # a backward segment of 64 frames at 1080p


class BouncingReader:
    """Frames of a video cut or bounced to a speech: index and pts go on, `source_index` says which frame it is.

    Args:
        frames: give exactly so many frames by their number, whatever their timestamps and the speech (parity runs).

    Attributes:
        source_frames: number of frames of the source, once it has been played to its end and bounces.
    """

    def __init__(
        self,
        reader: VideoReader,
        speech_samples: int,
        *,
        frames: int | None = None,
        cache_frames: int = MAX_CACHED_FRAMES,
    ) -> None:
        if speech_samples < 0 or cache_frames < 1:
            raise ValueError(f"speech_samples {speech_samples} and cache_frames {cache_frames} must be positive")
        self.reader = reader
        self.speech_samples = speech_samples
        self.frames = frames
        frame_bytes = reader.width * reader.height * 2
        self.cache_frames = max(min(cache_frames, MAX_CACHED_BYTES // frame_bytes), 4)
        self.source_frames: int | None = None
        self._pts: array[int] = array("q")

    def __iter__(self) -> Iterator[SourceFrame]:
        """Every output frame once, in order; the first pass reads the source straight through."""
        time_base = self.reader.time_base
        self._pts = array("q")
        last_duration = 1
        late: list[SourceFrame] = []
        speech_end = Fraction(self.speech_samples, SPEECH_RATE)
        for frame in self.reader:
            begin = frame.pts - (self._pts[0] if self._pts else frame.pts)
            if self._belongs(len(self._pts), begin):
                self._pts.append(frame.pts)
                last_duration = frame.duration_pts
                yield frame
            elif self.frames is not None or begin * time_base > speech_end + SLACK:
                return
            else:
                late.append(frame)  # a few frames at most: kept only if the source ends with them
        if late:
            end = late[-1].pts + late[-1].duration_pts - self._pts[0]
            if ends_together(end, time_base, self.speech_samples):
                yield from late
            return
        count = self.source_frames = len(self._pts)
        end = self._pts[-1] + last_duration - self._pts[0]
        if count == self.frames or (self.frames is None and not needs_bounce(end, time_base, self.speech_samples)):
            return
        position = count
        for frame in self._legs():
            pts = bounce_pts(position, self._pts, last_duration)
            if not self._belongs(position, pts - self._pts[0]):
                return
            yield replace(frame, index=position, pts=pts)
            position += 1

    def _belongs(self, position: int, begin: int) -> bool:
        """Whether the output has a frame of that number, which begins so many ticks after the first."""
        if self.frames is not None:
            return position < self.frames
        return is_within_speech(begin, self.reader.time_base, self.speech_samples)

    def _legs(self) -> Iterator[SourceFrame]:
        """Frames n-2 ... 0, 1 ... n-1, n-2 ... without end (a single frame repeats)."""
        count = len(self._pts)
        if count == 1:
            still = next(iter(self.reader))
            while True:
                yield still
        while True:
            for stop in range(count - 1, 0, -self.cache_frames):
                yield from reversed(self._segment(max(stop - self.cache_frames, 0), stop))
            forward = iter(self.reader)
            next(forward)
            yield from forward

    def _segment(self, start: int, stop: int) -> list[SourceFrame]:
        """Source frames [start, stop), decoded from the keyframe before them."""
        low, high = self._pts[start], self._pts[stop - 1]
        for seek in (low, None):
            kept: list[SourceFrame] = []
            for frame in self.reader.read(seek):
                if frame.pts > high:
                    break
                if frame.pts >= low:
                    kept.append(frame)
            # A container without a good index may land late or restart its clock: read from the start instead.
            if [f.pts for f in kept] == list(self._pts[start:stop]):
                return kept
        raise MediaError(
            self.reader.path, "cannot be read backwards (its timestamps change)", "re-encode it to MP4 first"
        )
