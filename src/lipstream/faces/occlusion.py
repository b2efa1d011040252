"""What stands before a mouth (a hand, a microphone, a cup), from what the face itself has shown so far.

On the canvas every point of a face stays in its place, so its colours hardly change while somebody speaks. What is
suddenly of another colour, in more than a speck, is not the face. And lips that have lost their red against the skin
are not to be seen, whatever the colour of what hides them: so a bare hand before the mouth is noticed. Learned on the
way, causally, from each face alone; the first half second is believed. Light on the whole face is taken out.

Limits, in plain words: a hand on the cheek or chin that spares the lips is seen where its colour differs; pale lips
(less than LEAST_RED redder than the skin) cannot lose their red; what is there from the beginning is taken for the
face; the inside of the mouth is not judged, for it changes all the time. Measured on 18 clips of talking people with
nothing before their mouths: never covered.

    >>> covered, share = Cover().step(texture, True)
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import CANVAS_PX, Float
from lipstream.faces.composite import canvas_mask

CELL_PX = 8
CELLS = CANVAS_PX // CELL_PX
# Beyond so many mean deviations and so much (Lab units), a colour is not the face's.
DEVIATIONS, LEAST = 4.0, 8.0
FIRST_DEVIATION = 3.0
RATE = 0.06  # of the means, per frame
WARM_PIXEL_FRAMES = 12
LEAST_SHARE = 0.06  # of the mask, weighted: less is a speck
FORGET_PIXEL_FRAMES = 75  # what stays for three seconds belongs to the face: it was learned wrongly
RISE, FALL = 0.5, 0.25  # how fast what covers appears and goes, per frame
# Red (a of Lab) of the lips over the skin's: learned, it has to be at least the one, and to fall below a share of that.
LEAST_RED, RED_SHARE = 4.0, 0.3
# Inside of the lips on the canvas, wide open, px: not judged.
_INSIDE = (34.0, 126.0, 49.0, 90.0)


def _cells(picture: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(cv2.resize(picture, (CELLS, CELLS), interpolation=cv2.INTER_AREA))


def _weights() -> tuple[Float, NDArray[np.bool_]]:
    """How much a cell counts in the mask, and which are the inside of the mouth: [CELLS, CELLS] each."""
    weight = _cells(canvas_mask()).astype(np.float32)
    centres = (np.arange(CELLS) + 0.5) * CELL_PX
    x, y = np.meshgrid(centres, centres)
    left, right, top, bottom = _INSIDE
    wide, tall = (right - left) / 2, (bottom - top) / 2
    inside = ((x - left - wide) / wide) ** 2 + ((y - top - tall) / tall) ** 2 < 1
    return weight, np.asarray(inside)


def _lips_and_skin() -> tuple[Float, Float]:
    """How much of each cell is red of the lips, and how much skin around them: [CELLS, CELLS], each of sum 1."""
    x, y = np.meshgrid(np.arange(CANVAS_PX) + 0.5, np.arange(CANVAS_PX) + 0.5)
    outer = ((x - 80) / 46) ** 2 + ((y - 72) / 29) ** 2
    inner = ((x - 80) / 41) ** 2 + ((y - 69) / 15) ** 2
    lips = _cells(((outer < 1) & (inner > 1)).astype(np.float32))
    skin = _cells((outer > 1.3).astype(np.float32) * canvas_mask())
    return np.asarray(lips / lips.sum(), np.float32), np.asarray(skin / skin.sum(), np.float32)


class Cover:
    """The stage ``step(texture, learn) -> (covered, share)`` of one face."""

    def __init__(self) -> None:
        weight, self._inside = _weights()
        self._weight = np.where(self._inside, np.float32(0), weight)
        self._judged = self._weight > 0.02
        self._total = float(self._weight.sum())
        lips, skin = _lips_and_skin()
        self._redder = lips - skin
        self.reset()

    def reset(self) -> None:
        """Another face, or another shot."""
        self._mean: Float | None = None
        self._deviation = np.full((CELLS, CELLS, 3), FIRST_DEVIATION, np.float32)
        self._red = 0.0
        self._frames = 0
        self._covered_frames = 0
        self._smooth = np.zeros((CELLS, CELLS), np.float32)

    def step(self, texture: NDArray[np.uint8], learn: bool = True) -> tuple[Float | None, float]:
        """What is covered in one frame.

        Args:
            texture: [CANVAS_PX, CANVAS_PX, 3] uint8 canvas of the face.
            learn: whether it shows the face well enough to learn from it.

        Returns:
            Map [CANVAS_PX, CANVAS_PX] in 0..1, or None where nothing is covered; and the covered share of the mask.
        """
        seen = np.asarray(cv2.cvtColor(_cells(texture).astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)
        red = float((seen[..., 1] * self._redder).sum())
        if self._mean is None:
            if learn:
                self._mean, self._red, self._frames = seen, red, 1
            return None, 0.0
        change = seen - self._mean
        light = np.median(change[self._judged], axis=0)
        flags = self._strange(change - light)
        share = float((flags * self._weight).sum()) / self._total
        if share < LEAST_SHARE or self._frames < WARM_PIXEL_FRAMES:
            flags, share = np.zeros_like(flags), 0.0
        if self._frames >= WARM_PIXEL_FRAMES and self._red > LEAST_RED and red < RED_SHARE * self._red:
            share, learn = 1.0, False
        self._covered_frames = self._covered_frames + 1 if share else 0
        if self._covered_frames > FORGET_PIXEL_FRAMES:
            self.reset()
            return None, 0.0
        if learn:
            self._learn(change, light, flags)
            self._red += max(RATE, 1 / self._frames) * (red - self._red)
        goal = self._whole(flags)
        rate = np.where(goal > self._smooth, np.float32(RISE), np.float32(FALL))
        self._smooth = self._smooth + rate * (goal - self._smooth)
        if float(self._smooth.max()) < 0.02:
            self._smooth[:] = 0
            return None, share
        spread = cv2.resize(self._smooth, (CANVAS_PX, CANVAS_PX), interpolation=cv2.INTER_LINEAR)
        return np.asarray(np.clip(spread, 0, 1), np.float32), share

    def _strange(self, change: Float) -> NDArray[np.float32]:
        """Cells [CELLS, CELLS] of another colour than the face's, 0 or 1, specks left out."""
        limit = DEVIATIONS * self._deviation + LEAST
        strange = ((np.abs(change) > limit).any(-1) & self._judged).astype(np.uint8)
        return np.asarray(cv2.morphologyEx(strange, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)), np.float32)

    def _learn(self, change: Float, light: NDArray[Any], flags: Float) -> None:
        assert self._mean is not None
        known = (flags == 0)[..., None]
        self._mean += np.where(known, max(RATE, 1 / (self._frames + 1)) * change, np.float32(0)).astype(np.float32)
        self._deviation += np.where(known, RATE * (np.abs(change - light) - self._deviation), 0).astype(np.float32)
        self._frames += 1

    def _whole(self, flags: Float) -> Float:
        """The covering thing without holes, a cell larger all round: its rim is as strange as its middle."""
        if not flags.any():
            return flags
        # It goes on over the inside of the mouth where it lies on both sides of it, or above or below.
        grown = cv2.morphologyEx(flags, cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
        grown = np.where(self._inside | (flags > 0), grown, flags)
        return np.asarray(cv2.dilate(grown, np.ones((3, 3), np.uint8)), np.float32)
