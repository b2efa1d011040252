"""Closeness of two pictures: PSNR, SSIM and sharpness, and the thumbnail that every codec has to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.sharp import laplacian_variance

Image = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Closeness of a picture to the true one: PSNR in dB, SSIM in -1..1, Laplacian variance over the true one's."""

    psnr: float
    ssim: float
    sharpness: float


def psnr(a: Image, b: Image) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures of one shape, dB; infinite for equal ones."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Image, b: Image) -> float:
    """Structural similarity of two grey pictures [H, W] uint8 (Wang 2004: Gaussian window 11 px, sigma 1.5)."""
    x, y = a.astype(np.float64), b.astype(np.float64)

    def blur(image: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(cv2.GaussianBlur(image, (11, 11), 1.5))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    inner = similarity[5:-5, 5:-5]  # windows that lie inside the picture
    return float((inner if inner.size else similarity).mean())


def quality(picture: Image, true: Image) -> Quality:
    """Compare RGB pictures [H, W, 3]; SSIM and sharpness on grey."""
    grey, true_grey = (np.asarray(cv2.cvtColor(q, cv2.COLOR_RGB2GRAY), np.uint8) for q in (picture, true))
    sharp = laplacian_variance(grey) / max(laplacian_variance(true_grey), 1e-6)
    return Quality(psnr=psnr(picture, true), ssim=ssim(grey, true_grey), sharpness=sharp)


def thumbnail(picture: Image, numbers: int) -> Image:
    """A picture [H, W, 3] shrunk to about that many numbers (area) and enlarged again (bicubic)."""
    height, width = picture.shape[:2]
    side = math.sqrt(numbers / (3 * height * width))
    small = (max(1, round(width * side)), max(1, round(height * side)))
    shrunk = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
