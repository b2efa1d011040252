"""Write the result: same size, timestamps, colours and rotation as the source, the speech at its own quality.

The file appears under its name only when it is complete; until then it has a temporary name in the same folder,
which is removed on any failure. Audio is copied as it is where the container can hold it, otherwise encoded as AAC
at its own sample rate, and ends with the video.

    >>> with VideoWriter("out.mp4", like=reader, audio="speech.wav") as writer:
    ...     for frame in reader:
    ...         writer.write(frame)
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import av

from lipstream.media.opening import MediaError, open_media, seconds
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.speech import audio_origin, cut_samples, decode_audio, layout_name

logger = logging.getLogger(__name__)

AudioPacket: TypeAlias = "av.Packet[av.AudioStream]"
VideoPacket: TypeAlias = "av.Packet[av.VideoStream]"

# suffix -> (muxer, audio codecs that it holds unchanged)
CONTAINERS = {
    ".mp4": ("mp4", {"aac", "mp3", "ac3", "eac3", "opus"}),
    ".m4v": ("mp4", {"aac", "mp3", "ac3", "eac3", "opus"}),
    ".mov": ("mov", {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le"}),
    ".mkv": ("matroska", {"aac", "mp3", "ac3", "eac3", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s24le"}),
}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_BIT_RATE = 192_000


class VideoWriter:
    """An output video. Use as a context manager: leaving it by an exception (or Ctrl-C) leaves no file behind.

    Args:
        path: the result; .mp4, .m4v, .mov or .mkv.
        like: the source, whose size, timestamps, colours and rotation are kept.
        audio: file with the sound of the result, or None for a silent one.
        crf: quality of libx264 (lower is better; 16 is visually lossless for most pictures).
        preset: speed of libx264.
        threads: encoder threads, 0 = one per core.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: VideoReader,
        audio: str | os.PathLike[str] | None = None,
        crf: int = 16,
        preset: str = "veryfast",
        threads: int = 0,
    ) -> None:
        if not 0 <= crf <= 51:
            raise ValueError(f"crf must lie in 0..51, got {crf}")
        self.path = Path(path)
        if self.path.suffix.lower() not in CONTAINERS:
            known = ", ".join(CONTAINERS)
            raise MediaError(path, f"has an unknown output type '{self.path.suffix}'", f"end the name in {known}")
        if self.path.is_dir():
            raise MediaError(path, "is a folder", "name an output file in it")
        self._muxer, self._copied = CONTAINERS[self.path.suffix.lower()]
        self._like = like
        self._end = Fraction(0)  # when the last written frame stops showing, from the first frame
        self._origin: int | None = None
        self._durations: dict[Fraction, Fraction] = {}  # of the frames inside the encoder, by time
        self._held: VideoPacket | None = None
        self._first_dts: int | None = None
        self._closed = False
        self._temporary = self._reserve()
        try:
            self._container = self._open()
            self._video = self._add_video(crf, preset, threads)
            self._audio = None if audio is None else self._add_audio(audio)
            self._pending: AudioPacket | None = None
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

    def write(self, frame: SourceFrame) -> None:
        """Encode one frame with its own timestamp; pts must increase."""
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        if self._origin is None:
            self._origin = frame.pts
        try:
            stored = frame.stored
            # The frame may be shown several times (bounce): its timestamp is the sequence's, not the decoder's.
            stored.pts, stored.time_base, stored.duration = frame.pts, frame.time_base, frame.duration_pts
            stored.pict_type = av.video.frame.PictureType.NONE
            self._durations[frame.pts * frame.time_base] = frame.duration_pts * frame.time_base
            self._mux_video(self._video.encode(stored))
            self._end = (frame.pts + frame.duration_pts - self._origin) * frame.time_base
            self._mux_audio(self._end)
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
            self._mux_video(self._video.encode(None), last=True)
            self._mux_audio(self._end, last=True)
            self._container.close()
            with open(self._temporary, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(self._temporary, self.path)
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
        audio = getattr(self, "_audio", None)
        if audio is not None:
            audio.close()
        with suppress(OSError):
            os.unlink(self._temporary)

    def _reserve(self) -> str:
        """An empty file with a temporary name beside the result."""
        folder = self.path.parent
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.stem}.", suffix=".part", dir=folder)
            os.close(handle)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
        except OSError as error:
            raise self._failure(error) from error
        return name

    def _open(self) -> av.container.OutputContainer:
        options = {} if self._muxer == "matroska" else {"movflags": "faststart"}
        return av.open(f"file:{os.path.abspath(self._temporary)}", "w", format=self._muxer, options=options)

    def _add_video(self, crf: int, preset: str, threads: int) -> av.VideoStream:
        like = self._like
        rate = like.fps.limit_denominator(100_000)
        stream = self._container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": preset})
        stream.width, stream.height = like.stored_size
        stream.pix_fmt = like.pix_fmt
        stream.time_base = like.time_base
        context = stream.codec_context
        context.time_base = like.time_base
        context.thread_count = threads
        if like.sample_aspect_ratio:
            context.sample_aspect_ratio = like.sample_aspect_ratio
        context.color_range, context.colorspace = like.colour.range, like.colour.space
        context.color_primaries, context.color_trc = like.colour.primaries, like.colour.transfer
        if like.display_matrix is not None:
            stream.set_display_matrix(like.display_matrix)
        if like.pix_fmt.startswith(("yuv444", "yuvj444", "yuv422", "yuvj422")):
            logger.info("%s: written as H.264 %s to keep size and chroma", self.path, like.pix_fmt)
        return stream

    def _add_audio(self, path: str | os.PathLike[str]) -> Iterator[tuple[AudioPacket, Fraction]]:
        """A stream of (packet, its start in seconds from time 0), in order; the output stream is added here."""
        container = open_media(path, need="audio")
        source = container.streams.audio[0]
        name = source.codec_context.codec.canonical_name
        # AAC without a header in its container (ADTS, MPEG-TS) has nothing to copy into MP4's own header.
        whole = name != "aac" or source.codec_context.extradata is not None
        if name in self._copied and whole and not container.format.name.startswith("aac"):
            target = self._container.add_stream_from_template(source)
            logger.info("%s: audio %s copied", self.path, name)
            return self._copy_packets(path, container, source, target)
        rate, layout = source.codec_context.sample_rate, layout_name(source.codec_context.layout)
        container.close()
        chosen = min(AAC_RATES, key=lambda r: (abs(r - rate), r))
        encoder = self._container.add_stream("aac", rate=chosen, layout=layout)
        encoder.bit_rate = AAC_BIT_RATE
        logger.info("%s: audio %s encoded as AAC, %d Hz, %s", self.path, name, chosen, layout)
        return self._encode_packets(path, encoder, rate)

    def _copy_packets(
        self,
        path: str | os.PathLike[str],
        container: av.container.InputContainer,
        source: av.AudioStream,
        target: av.AudioStream,
    ) -> Iterator[tuple[AudioPacket, Fraction]]:
        with container:
            unit = Fraction(source.time_base or Fraction(1, 90_000))
            origin = audio_origin(container)
            if origin is None:
                origin = (source.start_time or 0) * unit
            shift = round(self._start() / unit) - round(origin / unit)
            try:
                for packet in container.demux(source):
                    if packet.dts is None or packet.pts is None:
                        continue
                    start = packet.pts * unit - origin
                    # Before time 0 only the encoder's own delay is kept, which players skip.
                    if start + Fraction(packet.duration or 0) * unit <= Fraction(-1, 20):
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = target
                    yield packet, start
            except (av.FFmpegError, OSError) as error:
                raise MediaError(path, f"its sound is damaged ({error})", "copy or convert it again") from error

    def _encode_packets(
        self, path: str | os.PathLike[str], encoder: av.AudioStream, rate: int
    ) -> Iterator[tuple[AudioPacket, Fraction]]:
        unit = Fraction(1, rate)
        start = round(self._start() / unit)
        for frame, time, count in decode_audio(path):
            begin = max(round(-time * frame.sample_rate), 0)
            if begin >= count:
                continue
            part = cut_samples(frame, begin, count)
            part.pts = start + round((time + Fraction(begin, frame.sample_rate)) / unit)
            part.time_base = unit
            for packet in encoder.encode(part):
                yield packet, seconds(packet.pts, packet.time_base) - self._start()
        for packet in encoder.encode(None):
            yield packet, seconds(packet.pts, packet.time_base) - self._start()

    def _mux_video(self, packets: list[VideoPacket], *, last: bool = False) -> None:
        """Write encoded frames with their own durations (the encoder would guess them from the average rate)."""
        for packet in packets:
            duration = self._durations.pop(seconds(packet.pts, packet.time_base), None)
            if duration is not None:
                packet.duration = round(duration / packet.time_base)
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

    def _mux_audio(self, until: Fraction, *, last: bool = False) -> None:
        """Write the packets that start before a time, so that sound and picture lie side by side in the file."""
        if self._audio is None:
            return
        while True:
            if self._pending is None:
                item = next(self._audio, None)
                if item is None:
                    self._audio = None
                    return
                self._pending, self._pending_start = item
            if self._pending_start >= until:
                break
            self._container.mux(self._pending)
            self._pending = None
        if last:
            self._audio.close()  # type: ignore[attr-defined]
            self._audio = None

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
        return MediaError(self.path, f"cannot be written ({reason})", "check the disk and the folder")
