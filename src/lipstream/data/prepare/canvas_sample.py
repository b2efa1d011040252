"""The sample of the pocket model's training: canvases, shape fields and speech of one clip (see `training.samples`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import FaceCanvas, Float


class CanvasSample:
    """Frames in order of time, then `save`. A frame without a face repeats the one before."""

    def __init__(self, canvas: FaceCanvas) -> None:
        self._canvas = canvas
        self._fields: list[Float] = []
        self._textures: list[NDArray[np.uint8]] = []
        self.tracked: list[bool] = []

    def add(self, image: NDArray[np.uint8], landmarks: NDArray[np.float32] | None) -> None:
        """One frame [H, W, 3] and its face's landmarks [468, 3]."""
        self.tracked.append(landmarks is not None)
        if landmarks is None:
            self._fields.append(self._fields[-1] if self._fields else np.zeros((20, 20, 2), np.float32))
            self._textures.append(self._textures[-1] if self._textures else np.zeros((160, 160, 3), np.uint8))
            return
        alignment = self._canvas.align(landmarks)
        self._fields.append(self._canvas.field(landmarks, alignment))
        self._textures.append(self._canvas.texture(image, self._fields[-1], alignment))

    def save(self, target: Path, speech: NDArray[np.float32]) -> None:
        """Write ``target`` (.npz) and its .tex.npy; speech [samples] is 16 kHz and starts with the first frame."""
        target.parent.mkdir(parents=True, exist_ok=True)
        steps = np.clip(speech * 32768.0, -32768, 32767).astype(np.int16)
        np.save(target.with_suffix(".tex.npy"), np.stack(self._textures))
        temporary = target.with_suffix(".tmp.npz")
        np.savez(temporary, field=np.stack(self._fields).astype(np.float16), ok=np.array(self.tracked), wav=steps)
        temporary.replace(target)  # the .npz appears last, so a half-written sample is never read
