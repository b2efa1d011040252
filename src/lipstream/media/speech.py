"""Speech for the models: float32 mono at 16 kHz from any audio or video file, streamed.

Encoder delay and padding are trimmed, so that two seconds of speech are 32000 samples and sample 0 is time 0. In a
video file, time 0 is the first picture; sound before it is dropped, and missing sound is silence. Of several sounds
the one marked as default is heard, else the first; `track` chooses another (1 is the first).

    >>> samples = load_speech("speech.m4a")  # float32 [samples], -1..1
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from lipstream.media.opening import MediaError, open_media, picture_stream, seconds, sound_stream
from lipstream.media.timeline import SPEECH_RATE

BLOCK_SAMPLES = 16_000
SAMPLES_PER_MS = SPEECH_RATE // 1000


def audio_origin(container: av.container.InputContainer) -> Fraction | None:
    """Time 0 of a file's sound in seconds: its first picture if it has one, else None (its first audible sample)."""
    stream = picture_stream(container)
    if stream is None or stream.start_time is None:
        return None
    return seconds(stream.start_time, stream.time_base)


def layout_name(layout: av.AudioLayout) -> str:
    """The channel layout; files that only count their channels mean the usual one."""
    usual = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
    count = len(layout.channels) or layout.nb_channels
    return usual.get(count, layout.name) if layout.name.endswith(" channels") else layout.name


def decode_audio(
    path: str | os.PathLike[str], track: int | None = None
) -> Iterator[tuple[av.AudioFrame, Fraction, int]]:
    """Frames of one audio stream with the time of their first sample and how many samples count.

    Time is in seconds from time 0 (see the module); negative times are before it.
    """
    with open_media(path, need="audio") as container:
        stream = sound_stream(path, container, track)
        origin = audio_origin(container)
        end: Fraction | None = None
        if container.format.name.startswith("mov") and stream.duration is not None:
            # Only this container tells where the encoder's padding at the end begins.
            end = seconds((stream.start_time or 0) + stream.duration, stream.time_base)
        clock: Fraction | None = None
        for frame in _frames(path, container, stream):
            rate = Fraction(frame.sample_rate)
            stamp = None if frame.pts is None else seconds(frame.pts, frame.time_base)
            # Timestamps in coarse units jitter; follow them only where sound is really missing or repeated.
            if clock is None or (stamp is not None and abs(stamp - clock) > Fraction(1, 20)):
                clock = stamp if stamp is not None else clock or Fraction(0)
            if origin is None:
                origin = clock
            count = frame.samples
            if end is not None:
                count = min(count, max(round((end - clock) * rate), 0))
            if count:
                yield frame, clock - origin, count
            clock += frame.samples / rate


def _frames(
    path: str | os.PathLike[str], container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame]:
    try:
        yield from container.decode(stream)
    except av.EOFError:
        return
    except (av.FFmpegError, OSError) as error:
        raise MediaError(path, f"its sound is damaged ({error})", "copy or convert it again") from error


def speech_blocks(
    path: str | os.PathLike[str], track: int | None = None, delay_ms: int = 0
) -> Iterator[NDArray[np.float32]]:
    """The speech in blocks of any length, float32 [samples] at 16 kHz; silence before it, or its start dropped."""
    late = delay_ms * SAMPLES_PER_MS
    for _ in range(0, late, BLOCK_SAMPLES):
        yield np.zeros(min(late, BLOCK_SAMPLES), np.float32)
        late -= BLOCK_SAMPLES
    early = max(-delay_ms * SAMPLES_PER_MS, 0)
    for block in _blocks(path, track):
        dropped, early = block[:early], max(early - block.size, 0)
        if dropped.size < block.size:
            yield block[dropped.size :]


def _blocks(path: str | os.PathLike[str], track: int | None) -> Iterator[NDArray[np.float32]]:
    """The speech as the file has it."""
    resampler: av.AudioResampler | None = None
    shape: tuple[int, str, str] | None = None
    taken = Fraction(0)  # seconds of input handed to the resampler, from time 0
    given = 0  # samples given out

    def converted(frame: av.AudioFrame | None) -> Iterator[NDArray[np.float32]]:
        nonlocal given
        assert resampler is not None
        for part in resampler.resample(frame):
            # The mean of the channels: FFmpeg's own mono mix would be 3 dB louder and clip.
            block = np.asarray(part.to_ndarray().mean(axis=0), np.float32)
            # The resampler's own start-up adds or drops a sample or two; the count follows the input's time.
            room = round(taken * SPEECH_RATE) - given
            block = block[: max(room, 0)]
            given += block.size
            if block.size:
                yield block

    for frame, start, count in decode_audio(path, track):
        rate = frame.sample_rate
        skip = min(max(round((taken - start) * rate), 0), count)
        if skip == count:
            continue
        kind = (rate, frame.format.name, frame.layout.name)
        if resampler is None or kind != shape:
            if resampler is not None:
                yield from converted(None)
            layout = "mono" if len(frame.layout.channels) == 1 else "stereo"
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=SPEECH_RATE)
            shape = kind
        gap = round((start - taken) * rate)
        if gap > rate // 50:  # missing sound is silence
            taken += Fraction(gap, rate)
            silence = _silence(frame, gap)
            for part in silence:
                yield from converted(part)
        cut = cut_samples(frame, skip, count)
        taken += Fraction(count - skip, rate)
        yield from converted(cut)
    if resampler is not None:
        yield from converted(None)
        missing = round(taken * SPEECH_RATE) - given
        if missing > 0:
            yield np.zeros(missing, np.float32)


def cut_samples(frame: av.AudioFrame, start: int, stop: int) -> av.AudioFrame:
    """A copy of samples [start, stop) of a frame, without timestamp."""
    channels = 1 if frame.format.is_planar else len(frame.layout.channels)
    return _frame_of(frame.to_ndarray()[:, start * channels : stop * channels], frame)


def _frame_of(data: NDArray[Any], like: av.AudioFrame) -> av.AudioFrame:
    part = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(data), format=like.format.name, layout=layout_name(like.layout)
    )
    part.sample_rate = like.sample_rate
    return part


def _silence(frame: av.AudioFrame, samples: int) -> Iterator[av.AudioFrame]:
    """Silence of the same kind as a frame, at most one second at a time."""
    whole = frame.to_ndarray()
    channels = 1 if frame.format.is_planar else len(frame.layout.channels)
    middle = 128 if frame.format.name.startswith("u8") else 0
    while samples > 0:
        count = min(samples, frame.sample_rate)
        data = np.full((whole.shape[0], count * channels), middle, whole.dtype)
        yield _frame_of(data, frame)
        samples -= count


class SpeechReader:
    """Speech in pieces of the caller's size; memory holds one piece."""

    def __init__(self, path: str | os.PathLike[str], track: int | None = None, delay_ms: int = 0) -> None:
        self.path = os.fspath(path)
        self._blocks = speech_blocks(path, track, delay_ms)
        self._rest = np.zeros(0, np.float32)
        self.position_samples = 0

    def read(self, samples: int) -> NDArray[np.float32]:
        """The next samples; fewer at the end, none after it."""
        if samples < 0:
            raise ValueError(f"samples must not be negative, got {samples}")
        parts, count = [self._rest], self._rest.size
        while count < samples:
            block = next(self._blocks, None)
            if block is None:
                break
            parts.append(block)
            count += block.size
        joined = np.concatenate(parts)
        piece, self._rest = joined[:samples], joined[samples:].copy()
        self.position_samples += piece.size
        return piece

    def close(self) -> None:
        """Let go of the file early."""
        self._blocks.close()  # type: ignore[attr-defined]


class SpeechWindow:
    """Speech by place, read forwards; memory holds the last piece and what lies shortly before it.

    Args:
        back_samples: how far before the beginning of one piece the next one may begin.
    """

    def __init__(self, path: str | os.PathLike[str], back_samples: int) -> None:
        self._reader = SpeechReader(path)
        self._back = back_samples
        self._first = 0  # place of the first kept sample
        self._kept = np.zeros(0, np.float32)

    def read(self, first: int, last: int) -> NDArray[np.float32]:
        """Samples [first, last); fewer where the speech ends."""
        if not self._first <= first <= last:
            raise ValueError(f"samples from {first} to {last} are gone or none, the first kept one is {self._first}")
        self._forget(first - self._back)
        while (end := self._first + self._kept.size) < last:
            # What nobody asked for is passed over a block at a time.
            block = self._reader.read(min(last - end, 10 * BLOCK_SAMPLES))
            if not block.size:
                break
            self._kept = np.concatenate([self._kept, block])
            self._forget(first - self._back)
        return self._kept[first - self._first : last - self._first].copy()

    def _forget(self, before: int) -> None:
        drop = min(max(before - self._first, 0), self._kept.size)
        self._kept, self._first = self._kept[drop:], self._first + drop

    def close(self) -> None:
        """Let go of the file early."""
        self._reader.close()


def load_speech(path: str | os.PathLike[str], samples: int | None = None) -> NDArray[np.float32]:
    """All of a file's speech, float32 [samples] at 16 kHz; MediaError if it holds no sound at all.

    Args:
        samples: read so many at most.
    """
    if samples is None:
        blocks = list(speech_blocks(path))
        speech = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    else:
        reader = SpeechReader(path)
        speech = reader.read(samples)
        reader.close()
    if not speech.size:
        raise MediaError(path, "its audio stream holds no sound", "give a file with speech")
    return speech


def count_speech_samples(path: str | os.PathLike[str], track: int | None = None, delay_ms: int = 0) -> int:
    """Exact number of 16 kHz samples, by decoding once in constant memory."""
    return sum(block.size for block in speech_blocks(path, track, delay_ms))
