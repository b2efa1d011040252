"""Scene cuts, frame by frame: does this picture continue the one before?

A cut changes most of the picture at once, and much more than the frames around it did; moves, pans and flicker change
it all the time. What is compared is a thumbnail, so that noise and grain count for nothing.

    >>> CutDetector().step(rgb)  # True on the first frame of a new shot
"""

from __future__ import annotations

from collections import deque

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL = (32, 18)  # columns, rows
# Mean difference of two thumbnails, of 255. Within shots of the test clips at most 10; between unlike pictures 30-90.
LEAST_CHANGE = 20.0
OVER_RECENT = 4.0  # a cut changes so many times more than the largest recent change
RECENT_PIXEL_FRAMES = 8


class CutDetector:
    """The stage ``step(rgb) -> bool``; causal, one thumbnail of memory."""

    def __init__(self) -> None:
        self._before: NDArray[np.float32] | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_PIXEL_FRAMES)

    def step(self, rgb: NDArray[np.uint8]) -> bool:
        """Whether rgb uint8 [H, W, 3] begins a new shot; frames come in order of time."""
        # Every fourth row and column at most: an area filter over a whole 4K picture would cost more than the face.
        step = max(1, min(rgb.shape[0] // (4 * THUMBNAIL[1]), rgb.shape[1] // (4 * THUMBNAIL[0])))
        small = cv2.resize(rgb[::step, ::step], THUMBNAIL, interpolation=cv2.INTER_AREA).astype(np.float32)
        before, self._before = self._before, small
        if before is None:
            return False
        change = float(np.abs(small - before).mean())
        cut = change > LEAST_CHANGE and change > OVER_RECENT * max(self._recent, default=1.0)
        if cut:
            self._recent.clear()
        else:
            self._recent.append(change)
        return cut
