"""What a segment is judged by: interfaces, so that any scorer can stand in, and a sharpness filter that needs nothing.

`training.judging` opens the SyncNet scorers. HyperIQA, the paper's quality filter, needs a network and weights that
are not part of this package; anything with `name`, `minimum` and `score` takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.sharp import laplacian_variance

QUALITIES = ("sharpness", "none")


@dataclass(frozen=True, kw_only=True)
class SegmentView:
    """A segment as the judges see it: f pixel frames at 25 fps.

    Attributes:
        pictures: f aligned pictures [512, 512, 3] uint8.
        landmarks: [f, 468, 3] source px.
        samples: [640 f] float32, 16 kHz.
    """

    pictures: Sequence[NDArray[np.uint8]]
    landmarks: NDArray[np.float32]
    samples: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SyncMeasure:
    """Agreement of lips and speech; `late_frames` is by how many pixel frames the speech is late."""

    confidence: float
    distance: float
    late_frames: int


class SyncJudge(Protocol):
    """A scorer of sync. `minimum` is the confidence below which a segment is dropped, on the scorer's own scale."""

    @property
    def name(self) -> str: ...
    @property
    def minimum(self) -> float: ...
    @property
    def max_shift(self) -> int:
        """How many pixel frames it looks each way; an offset of that many may be further away."""

    def judge(self, segment: SegmentView) -> SyncMeasure:
        """Score one segment."""


class QualityFilter(Protocol):
    """A scorer of picture quality, higher is better; segments below `minimum` are dropped."""

    @property
    def name(self) -> str: ...
    @property
    def minimum(self) -> float: ...
    def score(self, pictures: Sequence[NDArray[np.uint8]]) -> float:
        """The score of aligned pictures [512, 512, 3]: the first, the middle and the last of a segment."""


@dataclass(frozen=True)
class Sharpness:
    """Variance of the Laplacian of the aligned face, in squared grey levels: catches small and blurred faces.

    It does not know noise and blocks from detail, as a trained judge would.
    """

    minimum: float = 10.0
    name: str = "sharpness"

    def score(self, pictures: Sequence[NDArray[np.uint8]]) -> float:
        """The mean over the pictures."""
        grey = [np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8) for picture in pictures]
        return float(np.mean([laplacian_variance(picture) for picture in grey]))


def open_quality(name: str, minimum: float | None = None) -> QualityFilter | None:
    """The filter of a name of `QUALITIES`; None for "none".

    Raises:
        ValueError: an unknown name, or one whose weights are missing.
    """
    if name == "none":
        return None
    if name == "hyperiqa":
        raise ValueError(
            "quality filter 'hyperiqa' is missing: its network and koniq_pretrained.pkl are not part of lipstream; "
            "use sharpness, none, or pass your own QualityFilter in Python"
        )
    if name != "sharpness":
        raise ValueError(f"unknown quality filter '{name}'; use one of {', '.join(QUALITIES)}")
    return Sharpness() if minimum is None else Sharpness(minimum)
