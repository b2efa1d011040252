"""Full-size crops as we recommend them: the official geometry with less jitter, and a paste-back that spares the rest.

The full-size networks expect faces framed as `faces.official` frames them: 420 x 560 crop px, squeezed to 512 x 512.
The framing can be had without the defects:

* **Steady.** The reference hangs the crop on three points in whole pixels, two of which are brows that move. Here some
  dozen landmarks that speech does not move carry the crop from frame to frame; the three anchors, at sub-pixel
  precision and averaged over a second, only say where in the crop this face belongs.
* **Sharp.** One reading of the frame with an antialiasing filter where it shrinks, not three in 8 bit.
* **Local.** Only the mouth mask goes back, softly; every pixel outside is the source's, bit for bit.

    aligner, compositor = CropAligner(FaceCanvas()), CropCompositor(mask)
    alignment = aligner.step(landmarks)
    crop = read_crop(frame, alignment)                       # [512, 512, 3] uint8
    patch = compositor(frame, alignment, generated)          # a Patch, as from the canvas
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import CANVAS_PX, Alignment, FaceCanvas, Float, shrunk_for_reading
from lipstream.faces.composite import Patch, clipped_box
from lipstream.faces.mouth_mask import MouthMask
from lipstream.faces.official import ALIGNED_PX, CROP_HEIGHT, CROP_WIDTH, FILL, anchor_similarity, mesh_anchors

FRAMING_PIXEL_FRAMES = 25  # the framing is a mean over one second
FEATHER_PX = 28.0  # of the 512 px crop
_COVER_CELL_PX = 8  # of the 512 px crop: finer than what covers a face is known
_SQUEEZE_X, _SQUEEZE_Y = ALIGNED_PX / CROP_WIDTH, ALIGNED_PX / CROP_HEIGHT


@dataclass(frozen=True)
class Framing:
    """Where this face belongs in the crop: a mean similarity on complex numbers and how many frames are in it."""

    turn: complex = 1.0
    shift: complex = 0.0
    pixel_frames: int = 0


class CropAligner:
    """The stage ``step(landmarks) -> Alignment`` (source px -> 420 x 560 crop px); its state is the framing."""

    def __init__(self, canvas: FaceCanvas) -> None:
        self._canvas = canvas
        self._framing = Framing()

    def step(self, landmarks: NDArray[Any]) -> Alignment:
        """Alignment of one face from mesh landmarks [468, >=2], source px; frames come in order of time."""
        rigid_turn, rigid_shift = _complex(self._canvas.align(landmarks).matrix)
        whole, bias = anchor_similarity(mesh_anchors(landmarks))
        whole[:, 2] -= bias  # a quirk of the reference, no part of the geometry
        turn, shift = _complex(whole)
        # The anchors' similarity seen from the rigid landmarks' crop: constant but for noise, brows and slow turns.
        turn /= rigid_turn
        shift -= turn * rigid_shift
        count = min(self._framing.pixel_frames + 1, FRAMING_PIXEL_FRAMES)
        kept = self._framing
        mean_turn = kept.turn + (turn - kept.turn) / count
        mean_shift = kept.shift + (shift - kept.shift) / count
        self._framing = Framing(mean_turn, mean_shift, count)
        z, t = mean_turn * rigid_turn, mean_turn * rigid_shift + mean_shift
        return Alignment(np.array([[z.real, -z.imag, t.real], [z.imag, z.real, t.imag]]))

    def snapshot(self) -> Framing:
        """The state now (immutable)."""
        return self._framing

    def restore(self, state: Framing) -> None:
        """Continue from a snapshot."""
        self._framing = state

    def reset(self) -> None:
        """The next frame shows another face."""
        self._framing = Framing()


def _complex(matrix: NDArray[np.float64]) -> tuple[complex, complex]:
    """A similarity [2, 3] as z -> turn * z + shift."""
    return complex(matrix[0, 0], matrix[1, 0]), complex(matrix[0, 2], matrix[1, 2])


def squeezed_matrix(alignment: Alignment) -> NDArray[np.float64]:
    """Source px -> px of the 512 x 512 crop, [2, 3] (pixel centres are whole numbers on both sides)."""
    squeeze = np.array([[_SQUEEZE_X, 0.0], [0.0, _SQUEEZE_Y]])
    offset = np.array([_SQUEEZE_X, _SQUEEZE_Y]) / 2 - 0.5
    matrix = squeeze @ alignment.matrix
    matrix[:, 2] += offset
    return matrix


def read_crop(frame: NDArray[np.uint8], alignment: Alignment) -> NDArray[np.uint8]:
    """The aligned face, [512, 512, 3] uint8, from a frame [H, W, 3] uint8; outside of the frame is 127."""
    inverse = cv2.invertAffineTransform(squeezed_matrix(alignment)).astype(np.float32)
    x, y = np.meshgrid(np.arange(ALIGNED_PX, dtype=np.float32), np.arange(ALIGNED_PX, dtype=np.float32))
    source = np.stack([inverse[i, 0] * x + inverse[i, 1] * y + inverse[i, 2] for i in (0, 1)], -1)
    frame, source = shrunk_for_reading(frame, source, 1.0 / (alignment.scale * _SQUEEZE_X))
    crop = cv2.remap(
        frame, source[..., 0], source[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT, borderValue=(FILL,) * 3
    )
    return np.asarray(crop, np.uint8)


def covered_on_crop(covered: Float, places: Float, alignment: Alignment) -> Float:
    """Where something stands before the face, [512, 512] of the crop in 0..1.

    Beyond the canvas, which ends sooner than the mouth mask, it goes on as at the canvas' rim.

    Args:
        covered: the same on the face canvas, [CANVAS_PX, CANVAS_PX], see `faces.occlusion`.
        places: [CANVAS_PX, CANVAS_PX, 2] source px of the canvas' pixels.
    """
    matrix, cells = squeezed_matrix(alignment), ALIGNED_PX // _COVER_CELL_PX
    on_crop = (places.reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2] + 0.5) / _COVER_CELL_PX
    inside = ((on_crop >= 0) & (on_crop < cells)).all(1)
    x, y = on_crop[inside].astype(np.int64).T
    count = np.bincount(y * cells + x, minlength=cells * cells)
    total = np.bincount(y * cells + x, covered.ravel()[inside], cells * cells)
    mean = (total / np.maximum(count, 1)).reshape(cells, cells).astype(np.float32)
    # The canvas as a plane: which of its pixels is nearest to a cell that none of them falls into.
    some = np.c_[on_crop, np.ones(len(on_crop))][:: CANVAS_PX + 7]
    rows, columns = np.divmod(np.arange(len(on_crop))[:: CANVAS_PX + 7], CANVAS_PX)
    plane = np.linalg.lstsq(some, np.c_[columns, rows], rcond=None)[0]
    grid = np.stack(np.meshgrid(np.arange(cells) + 0.5, np.arange(cells) + 0.5), -1)
    near = np.clip(np.round(grid @ plane[:2] + plane[2]), 0, CANVAS_PX - 1).astype(np.int64)
    mean = np.where(count.reshape(cells, cells) > 0, mean, covered[near[..., 1], near[..., 0]])
    return np.asarray(cv2.resize(mean, (ALIGNED_PX, ALIGNED_PX), interpolation=cv2.INTER_LINEAR), np.float32)


class CropCompositor:
    """Puts the mouth of generated crops back into their frames.

    Args:
        feather_px: width of the soft rim inside of the mask, px of the 512 px crop.
    """

    def __init__(self, mask: MouthMask, feather_px: float = FEATHER_PX) -> None:
        self._weight = mask.feather(feather_px, ALIGNED_PX)
        rows, columns = np.nonzero(self._weight)
        left, right, top, bottom = columns.min() - 1, columns.max() + 1, rows.min() - 1, rows.max() + 1
        self._corners = np.array([(left, top), (right, top), (left, bottom), (right, bottom)], np.float64)

    def __call__(
        self,
        frame: NDArray[np.uint8],
        alignment: Alignment,
        generated: NDArray[np.uint8],
        strength: float = 1.0,
        covered: Float | None = None,
    ) -> Patch | None:
        """Render one frame's new mouth.

        Args:
            frame: [H, W, 3] uint8 source frame.
            alignment: the frame's own, also where the crop was generated for a neighbour frame.
            generated: [512, 512, 3] uint8.
            strength: how much of it shows, 0..1: less in a fade.
            covered: [512, 512] in 0..1, where something stands before the face and has to stay in front.

        Returns:
            The patch, or None where the mouth lies outside the picture.
        """
        matrix = squeezed_matrix(alignment)
        box = self._box(matrix, frame.shape[:2])
        if box is None:
            return None
        x0, y0, x1, y1 = box
        m = matrix.astype(np.float32)
        px, py = np.meshgrid(np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32))
        on_crop = np.stack([m[i, 0] * px + m[i, 1] * py + m[i, 2] for i in (0, 1)], -1)
        shown = self._weight if covered is None else self._weight * (1 - covered)
        weight = cv2.remap(shown, on_crop[..., 0], on_crop[..., 1], cv2.INTER_LINEAR)[..., None]
        picture, on_picture = shrunk_for_reading(generated, on_crop, alignment.scale * _SQUEEZE_X)
        mouth = cv2.remap(
            picture, on_picture[..., 0], on_picture[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        source = frame[y0:y1, x0:x1]
        blended = source + np.float32(strength) * weight * (mouth.astype(np.float32) - source)
        alpha = np.where(weight[..., 0] > 0.004, np.uint8(255), np.uint8(0))
        rgb = np.where(alpha[..., None] > 0, np.clip(blended + 0.5, 0, 255).astype(np.uint8), source)
        return Patch(box, np.asarray(rgb, np.uint8), alpha)

    def _box(self, matrix: NDArray[np.float64], size: tuple[int, ...]) -> tuple[int, int, int, int] | None:
        """Even-aligned source rectangle that holds the mask, clipped to the picture."""
        back = cv2.invertAffineTransform(matrix)
        source = self._corners @ back[:, :2].T + back[:, 2]
        return clipped_box(source, 1, (size[0], size[1]))
