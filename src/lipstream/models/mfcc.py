"""Mel-frequency cepstra as SyncNet was trained on them: 13 coefficients, 100 frames a second (spec section 7).

The recipe is that of the defaults of the `python_speech_features` package: pre-emphasis, frames of 25 ms every 10 ms
without a window, 26 triangular mel bands up to 8 kHz, logarithm, orthonormal cosine transform, liftering, and the log
energy of the frame in place of the first coefficient. Samples are counted in steps of 16-bit sound.

    mfcc(samples)      # float samples in -1..1: [n] -> [13, frames]

Everything is float64 inside: the logarithm of quiet frames would show the rounding of float32.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lipstream.models.audio import SAMPLE_RATE

FULL_SCALE = 32_768
HOP_SAMPLES = 160
FRAME_SAMPLES = 400
FFT_SIZE = 512
BANDS = 26
COEFFICIENTS = 13
PRE_EMPHASIS = 0.97
LIFTER = 22
LEAST = 2.0**-52  # stands for silence, whose logarithm does not exist


def mfcc_frames(samples: int) -> int:
    """Frames of so many samples; the last one is completed with zeros."""
    return 1 + max(0, math.ceil((samples - FRAME_SAMPLES) / HOP_SAMPLES))


def mfcc(samples: Tensor) -> Tensor:
    """Cepstra of speech at 16 kHz.

    Args:
        samples: [n], floating in -1..1 or int16.

    Returns:
        [13, frames] float32.

    Raises:
        ValueError: not one channel, or no samples.
    """
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"mfcc takes one channel of samples, got {list(samples.shape)}")
    steps = samples.double() * (FULL_SCALE if samples.is_floating_point() else 1)
    steps = torch.cat([steps[:1], steps[1:] - PRE_EMPHASIS * steps[:-1]])
    length = (mfcc_frames(len(samples)) - 1) * HOP_SAMPLES + FRAME_SAMPLES
    frames = F.pad(steps, (0, length - len(steps))).unfold(0, FRAME_SAMPLES, HOP_SAMPLES)
    power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square() / FFT_SIZE
    bands, cosines = (table.to(power.device) for table in (_mel_bands(), _cosines()))
    cepstra = _floored(power @ bands.T).log() @ cosines.T
    cepstra[:, 0] = _floored(power.sum(1)).log()
    return cepstra.T.float()


def _floored(power: Tensor) -> Tensor:
    return torch.where(power == 0, LEAST, power)


@cache
def _mel_bands() -> Tensor:
    """[26, 257] triangles of height 1 whose corners lie on whole bins."""
    top_mel = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners_hz = 700 * (10 ** (torch.linspace(0, top_mel, BANDS + 2, dtype=torch.float64) / 2595) - 1)
    corners = ((FFT_SIZE + 1) * corners_hz / SAMPLE_RATE).floor()
    low, middle, high = (part[:, None] for part in (corners[:-2], corners[1:-1], corners[2:]))
    bins = torch.arange(FFT_SIZE // 2 + 1, dtype=torch.float64)
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp_min(0)


@cache
def _cosines() -> Tensor:
    """[13, 26]: the first rows of the orthonormal cosine transform (type II), liftered."""
    k = torch.arange(COEFFICIENTS, dtype=torch.float64)[:, None]
    band = torch.arange(BANDS, dtype=torch.float64)
    transform = torch.cos(math.pi * k * (2 * band + 1) / (2 * BANDS)) * math.sqrt(2 / BANDS)
    transform[0] /= math.sqrt(2)
    return transform * (1 + LIFTER / 2 * torch.sin(math.pi * k / LIFTER))
