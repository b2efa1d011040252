"""Play a video to the length of a speech without holding it in memory: forwards and backwards, in a loop, or frozen.

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
    Fit,
    Length,
    ends_together,
    fill_pts,
    filling_duration,
    is_within_speech,
    needs_bounce,
)

MAX_CACHED_FRAMES = 64
MAX_CACHED_BYTES = 256 * 1024 * 1024  # a backward segment of 64 frames at 1080p


class BouncingReader:
    """Frames of a video cut or filled to a speech: index and pts go on.

    Args:
        speech_samples: length of the speech, delay included.
        length, fit: how both are made to last as long; see `timeline.FILLS`.

    Attributes:
        source_frames: number of frames of the source, once it has been played to its end and pictures are repeated.
        pts: timestamps of the source as far as it has been read.
        given: how many frames have been given out.
    """

    def __init__(
        self,
        reader: VideoReader,
        speech_samples: int,
        *,
        length: Length = "bounce",
        fit: Fit = "audio",
        cache_frames: int = MAX_CACHED_FRAMES,
    ) -> None:
        if speech_samples < 0 or cache_frames < 1:
            raise ValueError(f"speech_samples {speech_samples} and cache_frames {cache_frames} must be positive")
        self.reader = reader
        self.speech_samples, self.length, self.fit = speech_samples, length, fit
        frame_bytes = reader.frame_bytes
        self.cache_frames = max(min(cache_frames, MAX_CACHED_BYTES // frame_bytes), 4)
        self.source_frames: int | None = None
        self.pts: array[int] = array("q")
        self.given = 0

    def __iter__(self) -> Iterator[SourceFrame]:
        """Every output frame once, in order; the first pass reads the source straight through."""
        self.pts, self.given = array("q"), 0
        for frame in self._play():
            self.given += 1
            yield frame

    def _play(self) -> Iterator[SourceFrame]:
        if self.fit == "video" and self.length == "silence":
            for frame in self.reader:
                self.pts.append(frame.pts)
                yield frame
            return
        time_base = self.reader.time_base
        last_duration = 1
        late: list[SourceFrame] = []
        speech_end = Fraction(self.speech_samples, SPEECH_RATE)
        for frame in self.reader:
            begin = frame.pts - (self.pts[0] if self.pts else frame.pts)
            if is_within_speech(begin, time_base, self.speech_samples):
                self.pts.append(frame.pts)
                last_duration = frame.duration_pts
                yield frame
            elif begin * time_base > speech_end + SLACK:
                return
            else:
                late.append(frame)  # a few frames at most: kept only if the source ends with them
        if late:
            end = late[-1].pts + late[-1].duration_pts - self.pts[0]
            if ends_together(end, time_base, self.speech_samples):
                self.pts.extend(frame.pts for frame in late)
                yield from late
            return
        count = self.source_frames = len(self.pts)
        end = self.pts[-1] + last_duration - self.pts[0]
        cut = self.fit == "video" or self.length == "cut"
        if cut or not needs_bounce(end, time_base, self.speech_samples):
            return
        last_duration = filling_duration(last_duration, time_base)
        position, after = count, fill_pts(count, self.pts, last_duration, self.length)
        for frame in self._repeats():
            pts, after = after, fill_pts(position + 1, self.pts, last_duration, self.length)
            if not is_within_speech(pts - self.pts[0], time_base, self.speech_samples):
                return
            yield replace(frame, index=position, pts=pts, duration_pts=after - pts)
            position += 1

    def _repeats(self) -> Iterator[SourceFrame]:
        """The frames after the source's end, without end: n-2 ... 0, 1 ... n-1, n-2 ... for a bounce."""
        count = len(self.pts)
        while self.length == "loop":
            yield from self.reader
        if count == 1 or self.length == "freeze":
            still = self._segment(count - 1, count)[0]
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
        low, high = self.pts[start], self.pts[stop - 1]
        for seek in (low, None):
            kept: list[SourceFrame] = []
            for frame in self.reader.read(seek):
                if frame.pts > high:
                    break
                if frame.pts >= low:
                    kept.append(frame)
            # A container without a good index may land late or restart its clock: read from the start instead.
            if [f.pts for f in kept] == list(self.pts[start:stop]):
                return kept
        raise MediaError(self.reader.path, "cannot be read again (its timestamps change)", "re-encode it to MP4 first")
