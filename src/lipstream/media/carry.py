"""What a source has besides its picture and its speech, carried over: other sounds, subtitles, chapters, metadata.

Everything is copied as it is, where the output's container can hold it; plain text subtitles change their wrapping.
What it cannot hold is named in one warning. Where pictures are repeated, this plays with the first pass only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.stream import Disposition

from lipstream.media.opening import open_media, picture_stream, seconds, sound_stream, sounds
from lipstream.media.sound import AnyPacket, Feed, is_copied

logger = logging.getLogger(__name__)

COPIED_SUBTITLES = {
    "mp4": {"mov_text"},
    "mov": {"mov_text"},
    "matroska": {"subrip", "ass", "webvtt", "dvd_subtitle", "hdmv_pgs_subtitle", "dvb_subtitle"},
}
# Plain text that another container wraps differently: (codec here, muxer) -> codec there.
WRAPPED_SUBTITLES = {
    ("subrip", "mp4"): "mov_text",
    ("subrip", "mov"): "mov_text",
    ("mov_text", "matroska"): "subrip",
}
MARKUP = re.compile(rb"<[^>]*>|\{\\[^}]*\}")
# What the muxers write themselves.
OWN_METADATA = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration", "creation_time"}


class Carried:
    """The other streams of a source on their way into an output.

    Args:
        path: the source.
        output: gets the streams and metadata now; packets come from `feed`.

    Attributes:
        kinds: what there is to play, "audio (aac)" and the like.
    """

    def __init__(self, path: str, output: av.container.OutputContainer, muxer: str) -> None:
        self._path = path
        self._targets: dict[int, Any] = {}  # stream index in the source -> stream of the output
        self._wrapped: dict[int, str] = {}
        self.kinds: list[str] = []
        left: list[str] = []
        with open_media(path, need="video") as container:
            picture = picture_stream(container)
            replaced = sound_stream(path, container) if sounds(container) else None
            for stream in container.streams:
                # MP4 keeps chapters in a stream of their own too.
                if stream is picture or stream is replaced or (stream.type == "data" and container.chapters()):
                    continue
                wrapped = WRAPPED_SUBTITLES.get((_codec(stream), muxer))
                if wrapped is not None or self._holds(stream, container, muxer):
                    if wrapped is not None:
                        target = output.add_mux_stream(wrapped)
                        self._wrapped[stream.index] = wrapped
                    else:
                        target = output.add_stream_from_template(stream)
                    target.metadata.update(_told(stream.metadata))
                    target.disposition = Disposition(stream.disposition & ~Disposition.default)
                    self._targets[stream.index] = target
                    self.kinds.append(f"{stream.type} ({_codec(stream)})")
                else:
                    left.append(f"{stream.type} ({_codec(stream)})")
            output.metadata.update(_told(container.metadata))
            self._chapters = container.chapters()
        if left:
            logger.warning("%s: left out, %s cannot hold it: %s", path, muxer, ", ".join(left))

    def chapters(self, end: Fraction) -> list[Any]:
        """The chapters that begin before `end` seconds of the source's clock, the last one cut."""
        kept = []
        for chapter in self._chapters:
            base = Fraction(chapter["time_base"] or 1)
            if chapter["start"] * base < end:
                kept.append({**chapter, "end": min(chapter["end"], round(end / base))})
        return kept

    def feed(self, start: Fraction) -> Feed:
        """Packets in file order with their time from `start`, the timestamp of the first picture."""
        if not self._targets:
            return
        with open_media(self._path, need="video") as container:
            streams = [container.streams[index] for index in self._targets]
            for packet in _readable(container.demux(streams)):
                if packet.pts is None or packet.dts is None:
                    continue
                time = seconds(packet.pts, packet.time_base) - start
                index = packet.stream_index
                if index in self._wrapped:
                    wrapped = _wrap(packet, self._wrapped[index])
                    if wrapped is None:
                        continue
                    packet = wrapped
                packet.stream = self._targets[index]
                yield packet, time

    @staticmethod
    def _holds(stream: Any, container: av.container.InputContainer, muxer: str) -> bool:
        if stream.type == "audio":
            return stream in sounds(container) and is_copied(stream, container, muxer)
        return stream.type == "subtitle" and _codec(stream) in COPIED_SUBTITLES[muxer]


def _wrap(packet: AnyPacket, codec: str) -> AnyPacket | None:
    """The same text in the other container's wrapping, without markup; None where it is empty."""
    data = bytes(packet)
    if codec == "mov_text":
        text = MARKUP.sub(b"", data)[:65_535]
        data = len(text).to_bytes(2, "big") + text
    else:
        text = data = data[2 : 2 + int.from_bytes(data[:2], "big")]
    if not text:
        return None
    wrapped = av.Packet(data)
    wrapped.time_base, wrapped.duration = packet.time_base, packet.duration or 0
    wrapped.pts, wrapped.dts = packet.pts, packet.dts
    return wrapped


def _codec(stream: Any) -> str:
    context = stream.codec_context
    return "unknown" if context is None else str(context.codec.canonical_name)


def _told(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.lower() not in OWN_METADATA}


def _readable(packets: Iterator[AnyPacket]) -> Iterator[AnyPacket]:
    """Packets up to the first place that cannot be read: the picture's reader says what is damaged."""
    try:
        yield from packets
    except (av.FFmpegError, OSError):
        return
