"""The official full-frame alignment, number for number (spec section 4.3; LatentSync's pipeline at 512 px).

Three anchors (brows and nose) fix a similarity to a 420 x 560 px crop, which is then squeezed to 512 x 512. The network
was trained on exactly these crops, with their rounded landmarks, half-precision matrices and truncated pixels: that is
what this ``parity`` mode reproduces. For our own pictures `faces.crop` keeps the geometry and drops the defects.

    aligner = OfficialAligner()
    aligned = aligner.step(frame, anchors_from_106(landmarks))      # InsightFace's 106 points, if the user has them
    aligned = aligner.step(frame, anchors_from_mesh(landmarks))     # our 468-point mesh
    aligned.picture                                                  # [512, 512, 3] uint8

The way back is `faces.official_paste`. The reference warps in half precision on a GPU; the same chain of roundings is
walked here on the CPU (golden case ``face_alignment``: equal in every pixel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CROP_WIDTH, CROP_HEIGHT = 420, 560
ALIGNED_PX = 512
FILL = 127  # level outside of the frame
KEPT_BIAS = 0.2  # share of the previous frame's nose correction
# Left brow, right brow (as seen in the picture), nose; crop px.
TEMPLATE: NDArray[np.float64] = np.array([(17.0, 20.0), (58.0, 20.0), (37.5, 40.0)]) * 5.6

# InsightFace's 106 points: upper edges of the brows; ridge, wings and tip of the nose.
ANCHORS_106 = ((43, 48, 49, 51, 50), (101, 102, 103, 104, 105), (74, 77, 83, 86))
# The mesh vertices at the same places, by way of the 68-point scheme that both are commonly mapped to. An
# approximation: InsightFace's model is non-commercial and was not run here, so how far they differ was not measured.
ANCHORS_MESH = ((70, 63, 105, 66, 107), (300, 336, 296, 334, 293), (195, 102, 331, 4))


def anchors_from_106(landmarks: NDArray[Any]) -> NDArray[np.float64]:
    """Anchors [3, 2] (left brow, right brow, nose) from InsightFace landmarks [106, 2], rounded as the reference does.

    Raises:
        ValueError: not 106 points.
    """
    if landmarks.shape != (106, 2):
        raise ValueError(f"anchors_from_106 takes InsightFace landmarks [106, 2], got {list(landmarks.shape)}")
    return _rounded_means(landmarks, ANCHORS_106)


def anchors_from_mesh(landmarks: NDArray[Any]) -> NDArray[np.float64]:
    """The same anchors from our mesh [468, >=2], source px.

    Raises:
        ValueError: not 468 points.
    """
    if landmarks.ndim != 2 or len(landmarks) != 468 or landmarks.shape[1] < 2:
        raise ValueError(f"anchors_from_mesh takes mesh landmarks [468, >=2], got {list(landmarks.shape)}")
    return _rounded_means(landmarks[:, :2], ANCHORS_MESH)


def mesh_anchors(landmarks: NDArray[Any]) -> NDArray[np.float64]:
    """Anchors [3, 2] of mesh landmarks at sub-pixel precision: not what the reference does, for `faces.crop`."""
    return np.stack([landmarks[list(ids), :2].mean(0, dtype=np.float64) for ids in ANCHORS_MESH])


def _rounded_means(landmarks: NDArray[Any], groups: tuple[tuple[int, ...], ...]) -> NDArray[np.float64]:
    """Whole pixels before and after the mean, half to even."""
    whole = np.round(landmarks.astype(np.float64))
    return np.stack([np.round(whole[list(ids)].mean(0)) for ids in groups])


def anchor_similarity(
    anchors: NDArray[Any], bias_before: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Source px -> crop px, [2, 3], and the bias [2] that the next frame keeps a share of.

    Both point sets are centred and divided by their standard deviation over all six coordinates (with Bessel's
    correction); the rotation aligns the two. The reference's "smoothing" adds the nose's remaining distance, in those
    *normalised* units, to the translation in *pixels*: a nudge of a fraction of a pixel, and part of the training data.
    Without ``bias_before`` nothing is kept from before (first frame).
    """
    centre, target = anchors.mean(0), TEMPLATE.mean(0)
    spread, target_spread = (np.std(points, ddof=1) for points in (anchors - centre, TEMPLATE - target))
    source, goal = (anchors - centre) / spread, (TEMPLATE - target) / target_spread
    u, _, vt = np.linalg.svd(source.T @ goal)
    if np.linalg.det(u @ vt) < 0:
        vt[-1] = -vt[-1]
    linear = (target_spread / spread) * (u @ vt).T
    bias = goal[2] - source[2]
    if bias_before is not None:
        bias = KEPT_BIAS * bias_before + (1 - KEPT_BIAS) * bias
    translation = target - linear @ centre
    return np.concatenate([linear, (translation + bias)[:, None]], 1), bias


@dataclass(frozen=True)
class Aligned:
    """One aligned frame.

    Attributes:
        picture: [512, 512, 3] uint8.
        matrix: [2, 3] float16, source px -> crop px; the way back must invert this rounded one.
    """

    picture: NDArray[np.uint8]
    matrix: NDArray[np.float16]


class OfficialAligner:
    """The stage ``step(frame, anchors) -> Aligned``; its state is the bias of the frame before."""

    def __init__(self) -> None:
        self._bias: NDArray[np.float64] | None = None

    def step(self, frame: NDArray[np.uint8], anchors: NDArray[Any]) -> Aligned:
        """Align one frame [H, W, 3] uint8 RGB by its anchors [3, 2]; frames come in order of time."""
        matrix, self._bias = anchor_similarity(anchors, self._bias)
        half = matrix.astype(np.float32).astype(np.float16)
        return Aligned(squeezed(official_crop(frame, half)), half)

    def snapshot(self) -> NDArray[np.float64] | None:
        """The state now."""
        return None if self._bias is None else self._bias.copy()

    def restore(self, state: NDArray[np.float64] | None) -> None:
        """Continue from a snapshot."""
        self._bias = None if state is None else state.copy()

    def reset(self) -> None:
        """The next frame begins a new video."""
        self._bias = None


def squeezed(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 420 x 560 crop as the network sees it, [512, 512, 3]: LANCZOS4, not keeping proportions."""
    return np.asarray(cv2.resize(crop, (ALIGNED_PX, ALIGNED_PX), interpolation=cv2.INTER_LANCZOS4), np.uint8)


# ------------------------------------------------------------------- the warp in half precision


def official_crop(frame: NDArray[np.uint8], matrix: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Warp a frame [H, W, 3] to [560, 420, 3] with every step of the reference rounded to half precision.

    Pictures and grid are half, the arithmetic inside an interpolation is float32; outside of the frame is 127; the
    result is truncated.
    """
    height, width = frame.shape[:2]
    grid = _half_grid(torch.from_numpy(matrix), height, width).float()[None]
    picture = torch.from_numpy(frame).permute(2, 0, 1)[None].half()
    sampled = _sample(picture.float(), grid).half()
    covered = _sample(torch.ones(1, 1, height, width), grid).half()
    filled = sampled + (1 - covered) * FILL
    return np.ascontiguousarray(filled[0].permute(1, 2, 0).to(torch.uint8).numpy())


def _sample(picture: Tensor, grid: Tensor) -> Tensor:
    """Bilinear, zero outside; grid in -1..1 from the first to the last pixel centre."""
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _half_grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """Where each crop pixel lies in the source, normalised, [560, 420, 2] half."""
    to_source = _inverse(_unit_matrix(height, width))
    similarity = torch.cat((matrix, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.half)))
    normalised = _product(_unit_matrix(CROP_HEIGHT, CROP_WIDTH), _product(similarity, to_source))
    back = _inverse(normalised).float()
    x, y = _half_axis(CROP_WIDTH).float(), _half_axis(CROP_HEIGHT).float()[:, None]
    return torch.stack([back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in (0, 1)], -1).half()


def _unit_matrix(height: int, width: int) -> Tensor:
    """Pixels -> -1..1, [3, 3] half."""
    return torch.tensor([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]]).half()


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()).half()


def _inverse(a: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.inv(a.float())
    return inverse.half()


def _half_axis(count: int) -> Tensor:
    """-1 ... 1 in half precision as torch's linspace counts it: from both ends to the middle."""
    way: Tensor = torch.arange(count).half() * torch.tensor(2 / (count - 1)).half()
    middle = count // 2
    axis: Tensor = torch.cat((way[:middle] - 1, 1 - way[: count - middle].flip(0)))
    return axis
