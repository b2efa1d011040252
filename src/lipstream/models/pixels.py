"""Crops as the official networks read them: levels of 8 bits to -1..1, and the mouth taken out.

video = normalised(crops, device)
hidden = masked(video, kept_pixels)          # of `faces.mouth_mask.MouthMask.pixel_keep`
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor


def normalised(crops: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], device: torch.device) -> Tensor:
    """Crops [F, H, W, 3] uint8 -> [1, 3, F, H, W] float32 in -1..1, by the official rule v / 255 * 2 - 1."""
    pixels = torch.from_numpy(np.stack(list(crops))).to(device)
    return rearrange(pixels, "f h w c -> 1 c f h w").float() / 255 * 2 - 1


def masked(frames: Tensor, kept_pixels: Tensor) -> Tensor:
    """Zero the mouth of *normalised* frames [1, 3, F, H, W]: mid grey, not black."""
    return frames * kept_pixels
