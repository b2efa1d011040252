"""Find cuts: a frame that differs from the one before it far more than its neighbours do from theirs.

The difference is the mean change of hue, saturation and value of a small picture. Comparing it with its surroundings
keeps a fast pan (all differences are large) from looking like a cut.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

THUMB_PX = 64
MIN_CHANGE = 15.0  # of 255
MIN_RATIO = 3.0  # over the mean of the neighbours
WINDOW_FRAMES = 2  # neighbours on each side


class ShotChanges:
    """The stage ``step(rgb) -> change``; the first frame of a video changes by 0."""

    def __init__(self) -> None:
        self._before: NDArray[np.int16] | None = None

    def step(self, rgb: NDArray[np.uint8]) -> float:
        """How much a frame [H, W, 3] differs from the one before, 0..255."""
        small = cv2.resize(rgb, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA)
        now = np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2HSV_FULL), np.int16)
        before, self._before = self._before, now
        if before is None:
            return 0.0
        change = np.abs(now - before)
        change[..., 0] = np.minimum(change[..., 0], 256 - change[..., 0])  # hue is a circle
        # Grey has no hue: what little colour noise there is must not count.
        change[..., 0] = change[..., 0] * np.minimum(now[..., 1], before[..., 1]) // 255
        return float(change.mean())


def find_cuts(changes: NDArray[np.float64]) -> list[int]:
    """Frames that begin a new shot, from the changes [frames] of all frames."""
    cuts = []
    for frame in np.flatnonzero(changes >= MIN_CHANGE):
        around = changes[max(1, frame - WINDOW_FRAMES) : frame + WINDOW_FRAMES + 1]
        others = (around.sum() - changes[frame]) / max(len(around) - 1, 1)
        if changes[frame] >= MIN_RATIO * others:
            cuts.append(int(frame))
    return cuts
