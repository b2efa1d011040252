"""Speech for the full-size models, by model frame: of the whole file, of a window with a bounded look-ahead, official.

    rows = FileRows(features, SpeechReader("speech.wav").read)       # the whole file is heard first
    rows = WindowedRows(features, read, WindowConfig())              # live: only so far ahead, an approximation
    rows(9, 21)                                                      # [12, feature_dim]

Rows are kept in main memory (43 kB each at the official size), not on the device. Behind the end of the speech the last
row is repeated.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipstream.diffusion.lengths import OfficialLength, official_length
from lipstream.engines import ReadSpeech
from lipstream.models.audio import SAMPLES_PER_ROW
from lipstream.models.wav2vec_features import SpeechFeatures
from lipstream.models.wav2vec_windowed import WindowConfig, WindowedSpeechFeatures

_READ_SAMPLES = 60 * 16_000


class FileRows:
    """The official feature rows of a whole file, computed when the first ones are asked for."""

    def __init__(self, features: SpeechFeatures, read: ReadSpeech) -> None:
        self._features, self._read = features, read

    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, feature_dim] of model frames."""
        return self._rows[torch.arange(start, stop).clamp_max(len(self._rows) - 1)]

    def _count(self, samples: int) -> int:
        """How many rows so many samples have."""
        return math.ceil(samples / SAMPLES_PER_ROW)

    @cached_property
    def _samples(self) -> Tensor:
        """The whole speech [1, n]."""
        parts: list[np.ndarray[Any, Any]] = []
        while len(block := self._read(_READ_SAMPLES)):
            parts.append(block)
        return torch.from_numpy(np.concatenate(parts))[None]

    @cached_property
    def _rows(self) -> Tensor:
        samples = self._samples
        with torch.inference_mode():
            rows: Tensor = self._features(samples.to(_device_of(self._features)), self._count(samples.shape[1]))
        return rows[0].cpu()


class OfficialRows(FileRows):
    """The rows of the official scripts: of the whole file, for so many frames as they generate."""

    @cached_property
    def length(self) -> OfficialLength:
        """What the scripts generate for this speech."""
        return official_length(self._samples.shape[1], float_seconds=True)

    def _count(self, samples: int) -> int:
        return self.length.pixel_frames


class WindowedRows:
    """Rows of a stream (`models.wav2vec_windowed`): no more speech is read than the window looks ahead.

    Rows before the last ``start`` are forgotten. Where takes do not begin with the stream (after a cut), their chunks
    end within the window's, and up to ``hop_rows - 1`` rows more are waited for.
    """

    def __init__(self, features: SpeechFeatures, read: ReadSpeech, window: WindowConfig) -> None:
        self._live = WindowedSpeechFeatures(features, window).stream_view(1)
        self._read, self._window = read, window
        self._device = _device_of(features)
        self._kept = torch.zeros(0, features.config.feature_dim)
        self._start = 0  # model frame of the first kept row
        self._heard_samples = 0
        self._ended = False

    @torch.inference_mode()
    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, feature_dim] of model frames.

        Raises:
            ValueError: the speech is empty.
        """
        wanted = self._window.heard_rows(stop) * SAMPLES_PER_ROW
        while not self._ended and self._heard_samples < wanted:
            samples = self._read(wanted - self._heard_samples)
            self._heard_samples += len(samples)
            self._ended = not len(samples)
            rows = self._live.flush() if self._ended else self._live(torch.from_numpy(samples)[None].to(self._device))
            self._kept = torch.cat([self._kept, rows[0].cpu()])
        if not len(self._kept):
            raise ValueError("the speech is empty: it has no row")
        first = max(0, min(start - self._start, len(self._kept) - 1))  # the last row stays, to be repeated
        self._kept, self._start = self._kept[first:].clone(), self._start + first
        return self._kept[(torch.arange(start, stop) - self._start).clamp(0, len(self._kept) - 1)]


def _device_of(features: SpeechFeatures) -> torch.device:
    return next(features.parameters()).device
