"""How sharp a picture is: the variance of its Laplacian."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def laplacian_variance(grey: NDArray[np.uint8]) -> float:
    """Variance of the 3 x 3 Laplacian of a grey picture [H, W] uint8, in squared grey levels; NaN if it is empty."""
    if min(grey.shape[:2]) < 3:
        return float("nan")
    return float(np.var(cv2.Laplacian(grey, cv2.CV_64F)))
