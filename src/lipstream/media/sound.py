"""The sound of a result: one speech track, copied as it is where the container can hold it, else encoded as AAC.

Both ways give (packet, its start in seconds from the first picture), in order; the writer lays them beside the picture.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, TypeAlias

import av

from lipstream.media.opening import MediaError, open_media, seconds, sound_stream
from lipstream.media.speech import audio_origin, cut_samples, decode_audio, layout_name

logger = logging.getLogger(__name__)

AnyPacket: TypeAlias = "av.Packet[Any]"
Feed: TypeAlias = Iterator[tuple[AnyPacket, Fraction]]

# muxer -> audio codecs that it holds unchanged
COPIED_AUDIO = {
    "mp4": {"aac", "mp3", "ac3", "eac3", "opus"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac", "pcm_s16le", "pcm_s24le"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "opus", "vorbis", "flac", "pcm_s16le", "pcm_s24le"},
}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
AAC_BIT_RATE = 192_000


def is_copied(source: av.AudioStream, container: av.container.InputContainer, muxer: str) -> bool:
    """Whether a sound goes into a container as it is."""
    name = source.codec_context.codec.canonical_name
    # AAC without a header in its container (ADTS, MPEG-TS) has nothing to copy into MP4's own header.
    whole = name != "aac" or source.codec_context.extradata is not None
    return name in COPIED_AUDIO[muxer] and whole and not container.format.name.startswith("aac")


class SoundTrack:
    """One sound on its way into an output.

    Args:
        output: gets the stream now; packets come from `feed`.
        track: which sound of the file, from 1; None as in `opening.sound_stream`.
        delay_ms: starts so much later; a negative delay drops the beginning.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        output: av.container.OutputContainer,
        muxer: str,
        *,
        track: int | None = None,
        delay_ms: int = 0,
    ) -> None:
        self._path, self._track, self._delay = path, track, Fraction(delay_ms, 1000)
        container = open_media(path, need="audio")
        try:
            source = sound_stream(path, container, track)
            name = source.codec_context.codec.canonical_name
            self._rate = source.codec_context.sample_rate
            self._copied = is_copied(source, container, muxer)
            if self._copied:
                self._stream: av.AudioStream = output.add_stream_from_template(source)
                logger.info("%s: audio %s copied", path, name)
            else:
                layout = layout_name(source.codec_context.layout)
                chosen = min(AAC_RATES, key=lambda r: (abs(r - self._rate), r))
                self._stream = output.add_stream("aac", rate=chosen, layout=layout)
                self._stream.bit_rate = AAC_BIT_RATE
                logger.info("%s: audio %s encoded as AAC, %d Hz, %s", path, name, chosen, layout)
            for key in ("language", "title"):
                if key in source.metadata:
                    self._stream.metadata[key] = source.metadata[key]
        finally:
            container.close()

    def feed(self, start: Fraction) -> Feed:
        """Packets in order; `start` is the timestamp of the first picture, where the sound's time 0 goes."""
        return self._copies(start) if self._copied else self._encoded(start)

    def _copies(self, start: Fraction) -> Feed:
        with open_media(self._path, need="audio") as container:
            source = sound_stream(self._path, container, self._track)
            unit = Fraction(source.time_base or Fraction(1, 90_000))
            origin = audio_origin(container)
            if origin is None:
                origin = (source.start_time or 0) * unit
            origin -= self._delay
            shift = round(start / unit) - round(origin / unit)
            try:
                for packet in container.demux(source):
                    if packet.dts is None or packet.pts is None:
                        continue
                    begin = packet.pts * unit - origin
                    # Before time 0 only the encoder's own delay is kept, which players skip.
                    if begin + Fraction(packet.duration or 0) * unit <= Fraction(-1, 20):
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = self._stream
                    yield packet, begin
            except (av.FFmpegError, OSError) as error:
                raise MediaError(self._path, f"its sound is damaged ({error})", "copy or convert it again") from error

    def _encoded(self, start: Fraction) -> Feed:
        unit = Fraction(1, self._rate)
        first = round(start / unit)
        encoder = self._stream
        for frame, time, count in decode_audio(self._path, self._track):
            time += self._delay
            begin = max(round(-time * frame.sample_rate), 0)
            if begin >= count:
                continue
            part = cut_samples(frame, begin, count)
            part.pts = first + round((time + Fraction(begin, frame.sample_rate)) / unit)
            part.time_base = unit
            for packet in encoder.encode(part):
                yield packet, seconds(packet.pts, packet.time_base) - start
        for packet in encoder.encode(None):
            yield packet, seconds(packet.pts, packet.time_base) - start
