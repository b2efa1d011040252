"""Write the result: same size, timestamps, colours and rotation as the source, the speech at its own quality.

The file appears under its name only when it is complete (see `atomic`). Before, it is read back: frames and times must
be those written. Sound ends with the picture.

    >>> with VideoWriter("out.mp4", like=reader, audio="speech.wav") as writer:
    ...     for frame in reader:
    ...         writer.write(frame)
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from lipstream.media.atomic import AtomicFile
from lipstream.media.carry import Carried
from lipstream.media.encoder import Quality, encoder_for
from lipstream.media.opening import MediaError, open_media, picture_stream, seconds
from lipstream.media.planes import bit_depth
from lipstream.media.probe import frame_times
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.sound import AnyPacket, Feed, SoundTrack
from lipstream.media.unchanged import NotCopyable, Splice, VideoPacket, for_encoder

logger = logging.getLogger(__name__)

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
TICK = Fraction(1, 1000)  # Matroska's clock
SMALLEST_DEEP = 16  # pixels either way; x265 takes no smaller picture


class VideoWriter:
    """An output video. Use as a context manager: leaving it by an exception (or Ctrl-C) leaves no file behind.

    Args:
        path: the result; .mp4, .m4v, .mov or .mkv.
        like: the source, whose size, timestamps, colours and rotation are kept.
        audio: file with the sound of the result, or None for a silent one.
        track, delay_ms: which sound of that file, and how much later it starts; see `SoundTrack`.
        quality: preset of the encoder; see `encoder.PRESETS`.
        crf, preset: instead of the quality's own.
        carry: take over what the source has besides picture and speech; see `Carried`.
        repeats: the source's pictures are repeated; what is carried is not, and a warning says so.
        copy_unchanged: take stretches in which nothing changed over from the source, where it can be done; see
            `Splice`.
        threads: encoder threads, 0 = one per core.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: VideoReader,
        audio: str | os.PathLike[str] | None = None,
        track: int | None = None,
        delay_ms: int = 0,
        quality: Quality = "good",
        crf: int | None = None,
        preset: str | None = None,
        carry: bool = False,
        repeats: bool = False,
        copy_unchanged: bool = False,
        threads: int = 0,
    ) -> None:
        if crf is not None and not 0 <= crf <= 51:
            raise ValueError(f"crf must lie in 0..51, got {crf}")
        if copy_unchanged and quality == "lossless":
            raise ValueError("quality 'lossless' keeps every sample as it is: leave out copy_unchanged")
        self.path = Path(path)
        if self.path.suffix.lower() not in MUXERS:
            known = ", ".join(MUXERS)
            raise MediaError(path, f"has an unknown output type '{self.path.suffix}'", f"end the name in {known}")
        if self.path.is_dir():
            raise MediaError(path, "is a folder", "name an output file in it")
        _check_size(like)
        self._muxer = MUXERS[self.path.suffix.lower()]
        self._like = like
        self._end = Fraction(0)  # when the last written frame stops showing, from the first frame
        self._last_begin = 0  # when it began, in ticks
        self._origin: int | None = None
        self._durations: dict[Fraction, Fraction] = {}  # of the frames inside the encoder, by time
        self._held: VideoPacket | None = None
        self._first_dts: int | None = None
        self._closed = False
        self._splice: Splice | None = None
        try:
            self._file = AtomicFile(self.path)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._container = self._open()
            encoder = encoder_for(like.pix_fmt, quality, crf, preset, like.hdr)
            if copy_unchanged:
                self._splice = self._spliced(encoder, threads)
            if self._splice is None:
                self._video = self._add_video(encoder, threads)
            self._tracks: list[SoundTrack | Carried] = []
            if audio is not None:
                self._tracks.append(SoundTrack(audio, self._container, self._muxer, track=track, delay_ms=delay_ms))
            if carry:
                carried = Carried(like.path, self._container, self._muxer)
                self._tracks.append(carried)
                if repeats and carried.kinds:
                    kept = ", ".join(carried.kinds)
                    logger.warning("%s: its pictures are repeated; this plays once: %s", like.path, kept)
            self._feeds: list[_Side] = []
            self.frames_written = 0
        except BaseException as error:
            self.abort()
            if isinstance(error, (av.FFmpegError, OSError)):
                raise self._failure(error) from error
            raise

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or remove it if the block failed."""
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def copied_frames(self) -> int:
        """How many frames were taken over from the source as they lie in it."""
        return 0 if self._splice is None else self._splice.copied_frames

    def write(self, frame: SourceFrame, *, unchanged: bool = False) -> None:
        """Write one frame with its own timestamp; pts must increase. `unchanged`: it is the source's very frame."""
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        if self._origin is None:
            self._origin = frame.pts
            self._feeds = [_Side(track.feed(self._start())) for track in self._tracks]
        try:
            self._durations[frame.pts * frame.time_base] = frame.duration_pts * frame.time_base
            if self._splice is not None:
                self._mux_video(self._splice.write(frame, unchanged=unchanged))
            else:
                # The frame may be shown several times (bounce): its timestamp is the sequence's, not the decoder's.
                stored = for_encoder(frame.stored, frame.pts, frame.time_base, frame.duration_pts)
                self._mux_video(self._video.encode(stored))
            self._last_begin = frame.pts - self._origin
            self._end = (frame.pts + frame.duration_pts - self._origin) * frame.time_base
            if self._splice is None or not self._splice.waiting:
                self._mux_sides(self._end)
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise self._failure(error) from error
        except BaseException:
            self.abort()
            raise
        self.frames_written += 1

    def close(self) -> None:
        """Flush, put the index in front, sync to disk and give the file its name."""
        if self._closed:
            return
        try:
            if not self.frames_written:
                raise MediaError(self.path, "got no frames to write", "check that the source has a picture")
            rest = self._video.encode(None) if self._splice is None else self._splice.finish()
            if len(rest) == self.frames_written:
                _time(rest, max(round(1 / (self._like.fps * self._like.time_base)), 1))
            self._mux_video(rest, last=True)
            self._mux_sides(self._end, last=True)
            self._container.close()
            self._check()
            self._file.commit()
            if self._splice is not None and not self._splice.copied_frames:
                why = self._splice.problem or "no whole group of its pictures stayed as it was"
                logger.warning("%s: nothing of its picture could be copied: %s", self._like.path, why)
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise self._failure(error) from error
        except BaseException:
            self.abort()
            raise
        self._closed = True

    def abort(self) -> None:
        """Throw the unfinished file away; the file that had this name before stays."""
        if self._closed:
            return
        self._closed = True
        container = getattr(self, "_container", None)
        if container is not None:
            with suppress(av.FFmpegError, OSError, ValueError):
                container.close()
        for side in getattr(self, "_feeds", []):
            side.close()
        if self._splice is not None:
            self._splice.close()
        self._file.discard()

    def _open(self) -> av.container.OutputContainer:
        options = {} if self._muxer == "matroska" else {"movflags": "faststart"}
        return av.open(f"file:{os.path.abspath(self._file.name)}", "w", format=self._muxer, options=options)

    def _add_video(self, encoder: tuple[str, dict[str, str]], threads: int) -> VideoStream:
        like = self._like
        name, options = encoder
        stream = self._container.add_stream(name, rate=like.fps.limit_denominator(100_000), options=options)
        assert isinstance(stream, VideoStream)
        stream.time_base = like.time_base
        self._configure(stream.codec_context, threads)
        if name == "libx265" and self._muxer != "matroska":
            stream.codec_context.codec_tag = "hvc1"  # the name by which Apple's players know it
        if like.display_matrix is not None:
            stream.set_display_matrix(like.display_matrix)
        logger.info("%s: written by %s as %s", self.path, name, like.pix_fmt)
        return stream

    def _configure(self, context: VideoCodecContext, threads: int) -> None:
        """Tell an encoder about the source's pictures."""
        like = self._like
        context.width, context.height = like.stored_size
        context.pix_fmt = like.pix_fmt
        context.time_base = like.time_base
        context.framerate = like.fps.limit_denominator(100_000)
        context.thread_count = threads
        if like.sample_aspect_ratio:
            context.sample_aspect_ratio = like.sample_aspect_ratio
        context.color_range, context.colorspace = like.colour.range, like.colour.space
        context.color_primaries, context.color_trc = like.colour.primaries, like.colour.transfer

    def _spliced(self, encoder: tuple[str, dict[str, str]], threads: int) -> Splice | None:
        """Add a video stream of encoded and copied stretches; None, and a word, where the source does not allow it."""
        name, options = encoder
        used = False

        def new_encoder(beside: dict[str, str]) -> VideoCodecContext:
            nonlocal used
            told = beside | options
            if used:
                context = av.CodecContext.create(name, "w")
                assert isinstance(context, VideoCodecContext)
                context.options = told
                self._configure(context, threads)
            else:
                self._video, used = self._add_video((name, told), threads), True
                context = self._video.codec_context
            context.flags |= Flags.global_header
            context.open()
            return context

        try:
            splice = Splice(self._like, new_encoder)
        except NotCopyable as why:
            logger.warning("%s: its picture cannot be copied and is encoded: %s", self._like.path, why)
            return None
        # The encoder has no use for its header any more; the container writes this one.
        self._video.codec_context.extradata = splice.header
        return splice

    def _mux_video(self, packets: list[VideoPacket], *, last: bool = False) -> None:
        """Write encoded frames with their own durations (the encoder would guess them from the average rate)."""
        for packet in packets:
            duration = self._durations.pop(seconds(packet.pts, packet.time_base), None)
            if duration is not None:
                packet.duration = round(duration / packet.time_base)
            packet.stream = self._video  # the packets of other encoders, and of the source
            if self._first_dts is None:
                self._first_dts = packet.dts
            if self._held is not None:
                self._container.mux(self._held)
            self._held = packet
        if last and self._held is not None:
            # MP4 adds up decoding times: with reordered frames of varying length only the last packet can make the
            # sum equal to what is shown.
            shown = round(self._end / self._held.time_base)
            rest = shown - ((self._held.dts or 0) - (self._first_dts or 0))
            if self._muxer != "matroska" and rest > 0:
                self._held.duration = rest
            self._container.mux(self._held)
            self._held = None

    def _start(self) -> Fraction:
        """The timestamp of the first video frame in seconds: where the sound's time 0 goes."""
        return Fraction(0) if self._origin is None else self._origin * self._like.time_base

    def _mux_sides(self, until: Fraction, *, last: bool = False) -> None:
        """Write the packets that start before a time, so that sound and picture lie side by side in the file."""
        if last:
            for track in self._tracks:
                if isinstance(track, Carried):
                    self._container.set_chapters(track.chapters(self._start() + until))
        for side in self._feeds:
            for packet in side.before(until, last=last):
                self._container.mux(packet)
            if last:
                side.close()

    def _check(self) -> None:
        """Read the finished file's times back: they must be those written."""
        with open_media(self._file.name, need="video") as container:
            stream = picture_stream(container)
            assert stream is not None  # open_media made sure
            pts, _ = frame_times(container, stream)
            shown = (pts[-1] - pts[0]) * Fraction(stream.time_base or 1)
        begun = self._last_begin * self._like.time_base
        if len(pts) != self.frames_written or abs(shown - begun) > TICK:
            raise RuntimeError(
                f"{self.path}: {self.frames_written} frames over {float(begun):.3f} s were written, "
                f"{len(pts)} over {float(shown):.3f} s arrived; nothing is kept"
            )

    def _failure(self, error: BaseException) -> MediaError:
        number = getattr(error, "errno", None)
        folder = self.path.parent
        if number == errno.ENOSPC:
            return MediaError(self.path, "cannot be written (the disk is full)", "free some space and run again")
        if number in (errno.ENOENT, errno.ENOTDIR):
            return MediaError(self.path, f"cannot be written (no folder {folder})", "create the folder first")
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return MediaError(self.path, f"cannot be written (no permission in {folder})", "choose another folder")
        reason = getattr(error, "strerror", None) or str(error)
        if number == errno.EINVAL:
            return MediaError(
                self.path, f"cannot be written ({reason})", "a sound may be damaged: convert the speech to WAV first"
            )
        return MediaError(self.path, f"cannot be written ({reason})", "check the disk and the folder")


def _time(packets: list[VideoPacket], step: int) -> None:
    """Give a whole stream its decoding times: x265's are arbitrary where it got fewer frames than it reorders."""
    shown = sorted(packet.pts or 0 for packet in packets)
    depth = max(place - shown.index(packet.pts or 0) for place, packet in enumerate(packets))
    for place, packet in enumerate(packets):
        packet.dts = shown[place - depth] if place >= depth else shown[0] - step * (depth - place)


def _check_size(like: VideoReader) -> None:
    """MediaError where the encoder of deep pictures would only say "invalid argument"."""
    bits, (width, height) = bit_depth(like.pix_fmt), like.stored_size
    if bits > 8 and min(width, height) < SMALLEST_DEEP:
        raise MediaError(
            like.path,
            f"has pictures of {width}x{height} pixels with {bits} bits, too small for H.265",
            f"scale it to at least {SMALLEST_DEEP}x{SMALLEST_DEEP} or convert it to 8 bits",
        )


class _Side:
    """A feed of packets read up to a time."""

    def __init__(self, feed: Feed) -> None:
        self._feed: Feed | None = feed
        self._held: tuple[AnyPacket, Fraction] | None = None

    def before(self, until: Fraction, *, last: bool) -> Iterator[AnyPacket]:
        """The next packets that start before a time; at the end, those behind a later one too."""
        while self._feed is not None:
            self._held = self._held or next(self._feed, None)
            if self._held is None:
                self.close()
                return
            packet, begin = self._held
            if begin >= until:
                if not last or begin > until + 10:
                    return
                self._held = None
                continue
            self._held = None
            yield packet

    def close(self) -> None:
        """Let go of the file."""
        if self._feed is not None:
            self._feed.close()  # type: ignore[attr-defined]
        self._feed = self._held = None
