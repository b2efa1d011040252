"""The sound of several voices in one file: their sum, each from time 0, as long as the longest.

>>> with mixed_sound(("a.wav", None), ["b.wav"]) as (path, track): VideoWriter("out.mp4", like=reader, audio=path)
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

import av
import numpy as np
from numpy.typing import NDArray

from lipstream.media.speech import cut_samples, decode_audio

MIX_RATE = 48_000
Sound: TypeAlias = tuple[str | os.PathLike[str], int | None]  # a file and which of its sounds, None: its own choice


@contextmanager
def mixed_sound(first: Sound, others: Sequence[str | os.PathLike[str]]) -> Iterator[Sound]:
    """A file with the sum of all sounds and its track, valid inside of the ``with``; a single sound is its own file.

    The mix is stereo, 48 kHz, 16 bit. A sum beyond full scale is limited smoothly, never wrapped.
    """
    if not others:
        yield first
        return
    with tempfile.TemporaryDirectory(prefix="lipstream-mix-") as folder:
        mix = Path(folder) / "mix.wav"
        _write(mix, [_Reader(*first), *(_Reader(path) for path in others)])
        yield mix, None


def _sound(path: str | os.PathLike[str], track: int | None) -> Iterator[NDArray[np.float32]]:
    """A file's sound from time 0 in blocks [2, n], stereo at MIX_RATE; missing sound is silence."""
    resampler, shape = _resampler(), None
    given = 0
    for frame, start, count in decode_audio(path, track):
        skip = min(max(-round(start * frame.sample_rate), 0), count)
        if skip == count:
            continue
        gap = round((start + Fraction(skip, frame.sample_rate)) * MIX_RATE) - given
        if gap > MIX_RATE // 50:
            given += gap
            for left in range(gap, 0, -MIX_RATE):
                yield np.zeros((2, min(left, MIX_RATE)), np.float32)
        kind = (frame.sample_rate, frame.format.name, frame.layout.name)
        if shape not in (None, kind):  # a file may change its rate or its channels: each stretch has its own
            for part in resampler.resample(None):
                given += part.samples
                yield part.to_ndarray().astype(np.float32)
            resampler = _resampler()
        shape = kind
        for part in resampler.resample(cut_samples(frame, skip, count)):
            given += part.samples
            yield part.to_ndarray().astype(np.float32)
    for part in resampler.resample(None):
        yield part.to_ndarray().astype(np.float32)


def _resampler() -> av.AudioResampler:
    return av.AudioResampler(format="fltp", layout="stereo", rate=MIX_RATE)


class _Reader:
    """Sound in pieces of equal size."""

    def __init__(self, path: str | os.PathLike[str], track: int | None = None) -> None:
        self._blocks = _sound(path, track)
        self._rest = np.zeros((2, 0), np.float32)

    def read(self, samples: int) -> NDArray[np.float32]:
        """The next samples [2, n]; fewer at the end."""
        parts = [self._rest]
        while sum(part.shape[1] for part in parts) < samples:
            block = next(self._blocks, None)
            if block is None:
                break
            parts.append(block)
        whole = np.concatenate(parts, axis=1)
        self._rest = whole[:, samples:].copy()
        return whole[:, :samples]


def _write(path: Path, readers: Sequence[_Reader]) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=MIX_RATE, layout="stereo")
        start = 0
        while True:
            parts = [reader.read(MIX_RATE) for reader in readers]
            count = max(part.shape[1] for part in parts)
            if not count:
                break
            total = np.sum([np.pad(part, ((0, 0), (0, count - part.shape[1]))) for part in parts], axis=0)
            block = (_limited(total) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(block.T.reshape(1, -1).copy(), format="s16", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = MIX_RATE, start, Fraction(1, MIX_RATE)
            container.mux(stream.encode(frame))
            start += count
        container.mux(stream.encode(None))


def _limited(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """As it is up to 0.8 of full scale, bent towards 1 above."""
    size = np.abs(samples)
    over = 0.8 + 0.2 * np.tanh((size - 0.8) / 0.2)
    return np.asarray(np.sign(samples) * np.where(size > 0.8, over, size), np.float32)
