"""The mouth mask of the full-size models: which part of the aligned 512 px crop is generated anew (spec section 1.8).

Lip Forcing takes LatentSync's fixed picture (``mask.png``, 256 x 256, white = keep). One picture has three readings,
with three different resamplings, and the network was trained with exactly these:

    mask = official_mask("mask.png")            # the file itself, checked; or, said aloud:
    mask = built_in_mask()                      # ours, same geometry, when the file is not at hand
    mask.latent_regenerate(64, 64)              # DiT channel 32: 1 = regenerate, 0 = keep
    mask.pixel_keep(512)                        # what is zeroed before the second encode: 1 = keep
    mask.blend_keep(512)                        # how much of the source comes back when compositing: 1 = keep

Mind the polarity: the picture says *keep*, the DiT is told *regenerate*.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

MASK_PX = 256
OFFICIAL_BYTES = 1_871
OFFICIAL_SHA256_PREFIX = "aa233251b9ff5691"
WHERE_FROM = "LatentSync's repository has it: bytedance/LatentSync, latentsync/utils/mask.png at a229c394"


@dataclass(frozen=True)
class MouthMask:
    """A mask picture and where it comes from.

    Attributes:
        keep: [256, 256] uint8, 255 = keep, 0 = regenerate.
        name: "official" or "built-in"; goes into the run's log line and the result's metadata.
    """

    keep: NDArray[np.uint8] = field(repr=False)
    name: str

    def __post_init__(self) -> None:
        shape, kind = self.keep.shape, self.keep.dtype
        if shape != (MASK_PX, MASK_PX) or kind != np.uint8 or not np.isin(self.keep, (0, 255)).all():
            raise ValueError(f"a mouth mask is {MASK_PX} x {MASK_PX} uint8 of 0 and 255 only, got {shape} {kind}")

    def latent_regenerate(self, height: int, width: int) -> Float:
        """The mask channel of the DiT, [height, width] latent cells: 1 = regenerate, 0 = keep."""
        kept = cv2.resize(_unit(self.keep), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
        return (~kept).astype(np.float32)

    def pixel_keep(self, size: int = 512) -> Float:
        """What the masked source still shows, [size, size] of 0 and 1. Multiply *normalised* frames: masked is 0.0."""
        kept = cv2.resize(_unit(self.keep), (size, size), interpolation=cv2.INTER_LINEAR) > 0.5
        return kept.astype(np.float32)

    def blend_keep(self, size: int = 512) -> Float:
        """Share of the source in the composed crop, [size, size] in 0..1: LANCZOS4 on 8-bit data, so it saturates."""
        return _unit(np.asarray(cv2.resize(self.keep, (size, size), interpolation=cv2.INTER_LANCZOS4), np.uint8))

    def feather(self, width_px: float, size: int = 512) -> Float:
        """Our softer paste-back weight of the *generated* crop, [size, size].

        Exactly 0 where :meth:`pixel_keep` is 1, and so far beyond that a bilinear reading there gives 0 too; rising
        smoothly to 1 within ``width_px`` towards the inside.
        """
        inside = (self.pixel_keep(size) == 0).astype(np.uint8)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        u = np.clip((depth - 1.5) / width_px, 0.0, 1.0)
        return np.asarray(u * u * (3.0 - 2.0 * u), np.float32)


def official_mask(path: str | os.PathLike[str]) -> MouthMask:
    """LatentSync's own ``mask.png``; size and SHA-256 must be those of the file that the models were trained with.

    Raises:
        ValueError: no such file, or another file.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no mask at '{file}': fetch it ({WHERE_FROM}) or choose the built-in mask explicitly")
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != OFFICIAL_BYTES or not digest.startswith(OFFICIAL_SHA256_PREFIX):
        raise ValueError(
            f"'{file}' is not the official mask: {len(data)} bytes, SHA-256 {digest[:16]}..., expected "
            f"{OFFICIAL_BYTES} bytes, {OFFICIAL_SHA256_PREFIX}...; fetch it again ({WHERE_FROM})"
        )
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if picture is None:
        raise ValueError(f"'{file}' cannot be decoded as a picture; fetch it again ({WHERE_FROM})")
    return MouthMask(np.asarray(picture, np.uint8), "official")


def built_in_mask() -> MouthMask:
    """Our own drawing of the official mask's geometry, from seven numbers.

    Two bars beside the nose (rows 95-127, columns 9-77 and 178-246) over a bowl whose half width falls from 119.5 px at
    row 128 to nothing at row 243. Against the official picture: intersection over union 0.989, 18 of 4096 latent cells
    differ (tests/test_mouth_mask.py). Close enough to run with, not for bit parity.
    """
    row, column = np.mgrid[:MASK_PX, :MASK_PX].astype(np.float64)
    sideways = np.abs(column - 128.0)
    depth = np.clip((row - 128.0) / 115.0, 0.0, 1.0)
    half_width = 119.5 * (1.0 - depth**2.4) ** (1 / 1.8)
    nose = (row < 128) & (column > 77.5) & (column < 177.5)
    regenerate = (sideways <= half_width) & (row >= 95) & (row < 243) & ~nose
    return MouthMask(np.where(regenerate, np.uint8(0), np.uint8(255)), "built-in")


def mouth_mask(choice: str | os.PathLike[str]) -> MouthMask:
    """The mask for an option's value: "built-in", or the path of the official file. There is no default.

    Raises:
        ValueError: as `official_mask`.
    """
    return built_in_mask() if choice == "built-in" else official_mask(choice)


def _unit(picture: NDArray[np.uint8]) -> Float:
    return picture.astype(np.float32) / np.float32(255)
