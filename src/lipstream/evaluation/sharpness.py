"""How sharp a mouth is: the variance of the Laplacian inside the mouth box, and its ratio to the real mouth's.

A blurred mouth (the first fault of a small codec) lowers it, blocks and ringing raise it: read it beside a picture.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.evaluation.opening import Series, inter_ocular
from lipstream.faces.sharp import laplacian_variance

BOX_LANDMARKS = (61, 291, 0, 17, 13, 14)  # mouth corners, outer and inner middle of both lips
MARGIN = 0.15  # of the inter-ocular distance, on every side


def mouth_box(landmarks: NDArray[Any], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) px around the lips of landmarks [468, >=2] in a picture of `size` (height, width)."""
    lips = landmarks[list(BOX_LANDMARKS), :2]
    margin = MARGIN * inter_ocular(landmarks)
    left, top = np.floor(lips.min(0) - margin).astype(int)
    right, bottom = np.ceil(lips.max(0) + margin).astype(int)
    height, width = size
    return max(0, int(left)), max(0, int(top)), min(width, int(right)), min(height, int(bottom))


def mouth_sharpness(rgb: NDArray[np.uint8], landmarks: NDArray[Any]) -> float:
    """Laplacian variance of the mouth box of a frame [H, W, 3], NaN where it lies outside the picture."""
    left, top, right, bottom = mouth_box(landmarks, (rgb.shape[0], rgb.shape[1]))
    if right - left < 3 or bottom - top < 3:
        return float("nan")
    grey = cv2.cvtColor(np.ascontiguousarray(rgb[top:bottom, left:right]), cv2.COLOR_RGB2GRAY)
    return laplacian_variance(np.asarray(grey, np.uint8))


def sharpness_ratio(measured: Series, real: Series) -> float:
    """Median over frames of measured / real, both [frames]; frames without a value in one of them are left out."""
    count = min(len(measured), len(real))
    ratio = measured[:count] / np.maximum(real[:count], 1e-6)
    return float(np.nanmedian(ratio)) if count and not np.all(np.isnan(ratio)) else float("nan")
