"""The face canvas: the shape-free space in which the pocket codec sees a mouth.

The official system warps a face with one similarity transform to a 512 px crop (spec section 4.3). That leaves every
mouth movement as pixel change, which a small model trained on few people cannot draw sharply on a stranger. Here the
similarity is followed by a smooth landmark-driven warp onto a *canvas* on which everybody's lips, jaw and nose lie at
the same place and the mouth is always open, magnified around the lips. A frame then splits into

* a **shape field**: where each canvas point lies in the aligned crop (two numbers every 8 canvas px), and
* a **texture**: the colours on the canvas,

and giving a frame another mouth means changing the field: the frame's own pixels are moved at their own resolution,
so skin, beard and grain stay as sharp as they were. Only what the frame never showed (teeth, the inside) is painted.

Coordinates: *source px* (the video frame), *crop px* (after the similarity, inter-ocular distance 108), *canvas px*
(160 x 160). All maps between them are linear in the landmarks with operators that are fixed at load time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]

CANVAS_PX = 160
FIELD_STEP_PX = 8  # canvas px between two samples of the shape field
FIELD = CANVAS_PX // FIELD_STEP_PX  # the field is FIELD x FIELD x 2
DENSE_STEP_PX = 4
DENSE = CANVAS_PX // DENSE_STEP_PX
KNOWN_ROWS_PX = 48  # rows above: nose and cheeks, which tell the pose; below: the mouth mask, regenerated


# MediaPipe mesh: upper and lower inner lip at three places, and the inner corners of the mouth.
INNER_LIP_PAIRS = ((13, 14), (82, 87), (312, 317))
INNER_LIP_CORNERS = (78, 308)
# The edges of the lips around the inside of the mouth, from corner to corner.
_UPPER_EDGE = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
_LOWER_EDGE = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
# Red of the lips without the corners, and the tip of the chin.
_UPPER_LIP = frozenset((
    0, 11, 12, 13, 37, 38, 39, 40, 41, 42, 72, 73, 74, 80, 81, 82, 267, 268, 269, 270, 271, 272, 302, 303, 304, 310,
    311, 312,
))  # fmt: skip
_LOWER_LIP = frozenset((
    14, 15, 16, 17, 84, 85, 86, 87, 88, 89, 90, 91, 95, 178, 179, 180, 181, 314, 315, 316, 317, 318, 319, 320, 321, 324,
    402, 403, 404, 405,
))  # fmt: skip
_CHIN = frozenset((18, 83, 313, 200, 199, 175, 152, 201, 421, 208, 428, 171, 396, 148, 377))


@dataclass(frozen=True)
class Alignment:
    """Similarity from source px to crop px: ``crop = matrix @ (x, y, 1)``.

    Attributes:
        matrix: [2, 3] float64.
    """

    matrix: NDArray[np.float64]

    @property
    def scale(self) -> float:
        """Crop px per source px."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    @cached_property
    def inverse(self) -> NDArray[np.float64]:
        """[2, 3] similarity from crop px to source px."""
        return np.asarray(cv2.invertAffineTransform(self.matrix), np.float64)


def _grid(step: int) -> Float:
    """Centres of the ``step`` x ``step`` cells of the canvas, row-major: [n, 2] as (x, y) canvas px."""
    centres = np.arange(step / 2, CANVAS_PX, step, dtype=np.float32)
    return np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)


def outline_weight() -> Float:
    """How much a sample of the shape field belongs to chin and jaw (1) and not to the lips (0): [FIELD, FIELD]."""
    x, y = _grid(FIELD_STEP_PX).reshape(FIELD, FIELD, 2).transpose(2, 0, 1)
    distance = np.hypot((x - 80.0) / 50.0, (y - 72.0) / 34.0)  # 1 on an ellipse just outside of the lips
    u = np.clip((distance - 0.95) / 0.45, 0.0, 1.0)
    return np.asarray(u * u * (3.0 - 2.0 * u), np.float32)


def _thin_plate(points: NDArray[Any], queries: NDArray[Any], smoothing: float) -> NDArray[np.float64]:
    """Matrix [queries, points] of smoothed thin-plate interpolation from values at ``points``."""

    def kernel(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        r2 = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.asarray(0.5 * r2 * np.log(np.maximum(r2, 1e-12)))

    half = CANVAS_PX / 2
    p, q = points.astype(np.float64) / half, queries.astype(np.float64) / half
    n = len(p)
    affine = np.concatenate([np.ones((n, 1)), p], 1)
    system = np.block([[kernel(p, p) + smoothing * np.eye(n), affine], [affine.T, np.zeros((3, 3))]])
    basis = np.concatenate([kernel(q, p), np.ones((len(q), 1)), q], 1)
    return np.asarray(basis @ np.linalg.inv(system)[:, :n])


def _similarity(source: NDArray[Any], target: NDArray[Any]) -> NDArray[np.float64]:
    """Least-squares similarity [2, 3] with ``target = s R source + t`` (Umeyama, no reflection)."""
    ms, mt = source.mean(0), target.mean(0)
    a, b = source - ms, target - mt
    # In two dimensions the optimum has a closed form on complex numbers: no SVD, no reflection to repair.
    ca, cb = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
    z = np.vdot(ca, cb) / np.vdot(ca, ca).real
    rotation = np.array([[z.real, -z.imag], [z.imag, z.real]])
    return np.concatenate([rotation, (mt - rotation @ ms)[:, None]], 1)


class FaceCanvas:
    """All fixed operators between landmarks, shape field and canvas. Stateless and cheap to share.

    Args:
        smoothing: thin-plate smoothing; measured on GRID, 0.01 keeps lip landmarks within 0.2 canvas px.
        ridge: regularisation of field -> landmarks.
    """

    def __init__(self, smoothing: float = 1e-2, ridge: float = 1e-2) -> None:
        with resources.files("lipstream").joinpath("assets/faces/canvas.npz").open("rb") as file:
            data = np.load(file)
            canvas_points, crop_points = data["canvas_points"], data["crop_points"]
            self.ids: NDArray[np.int64] = data["landmark_ids"].astype(np.int64)
            self.rigid_ids: NDArray[np.int64] = data["rigid_ids"].astype(np.int64)
        self._rigid_points = crop_points[self.rigid_ids].astype(np.float64)
        self._rest_points = crop_points[self.ids].astype(np.float32)
        self._edges = [canvas_points[list(edge)].astype(np.float32) for edge in (_UPPER_EDGE, _LOWER_EDGE)]
        points = canvas_points[self.ids]
        to_field = _thin_plate(points, _grid(FIELD_STEP_PX), smoothing)
        to_dense = _thin_plate(points, _grid(DENSE_STEP_PX), smoothing)
        n = len(self.ids)
        to_landmarks = np.linalg.solve(to_field.T @ to_field + ridge * np.eye(n), to_field.T)
        self._to_landmarks: Float = to_landmarks.astype(np.float32)
        self._landmarks_to_field: Float = to_field.astype(np.float32)
        self._field_to_dense: Float = (to_dense @ to_landmarks).astype(np.float32)
        rest = (to_dense @ self._rest_points).astype(np.float32).reshape(DENSE, DENSE, 2)
        self._rest_coarse: Float = rest
        self.rest_map: Float = _enlarge(rest)

    #: Landmarks of the red of the lips and of the tip of the chin.
    mouth_ids = _UPPER_LIP | _LOWER_LIP | _CHIN

    # ------------------------------------------------------------------ shape

    def align(self, landmarks: NDArray[Any]) -> Alignment:
        """Similarity of one face from the landmarks that speech does not move.

        Args:
            landmarks: [468, >=2] source px.
        """
        return Alignment(_similarity(landmarks[self.rigid_ids, :2].astype(np.float64), self._rigid_points))

    def field(self, landmarks: NDArray[Any], alignment: Alignment) -> Float:
        """Shape field of a face: [FIELD, FIELD, 2] crop px away from the rest shape."""
        xy = landmarks[self.ids, :2].astype(np.float64)
        crop = xy @ alignment.matrix[:, :2].T + alignment.matrix[:, 2]
        moved = crop.astype(np.float32) - self._rest_points
        return np.asarray(self._landmarks_to_field @ moved, np.float32).reshape(FIELD, FIELD, 2)

    def dense(self, field: Float) -> Float:
        """Displacement [CANVAS_PX, CANVAS_PX, 2] (crop px) of every canvas pixel from a shape field."""
        coarse = (self._field_to_dense @ field.reshape(FIELD * FIELD, 2)).reshape(DENSE, DENSE, 2)
        return _enlarge(coarse)

    def coarse_operator(self) -> tuple[Float, Float]:
        """(operator [DENSE^2, FIELD^2], rest [DENSE, DENSE, 2]): a field's map every 4 px, for losses."""
        return self._field_to_dense, self._rest_coarse

    def lip_rulers(self) -> tuple[tuple[Float, float], tuple[Float, float]]:
        """Opening and width of the inner lips as linear functions of a shape field.

        Returns:
            (weights [FIELD^2] over the field's y, constant) of the mean distance of ``INNER_LIP_PAIRS``, and the same
            over the field's x of the distance of ``INNER_LIP_CORNERS``; crop px.
        """
        place = {int(landmark): i for i, landmark in enumerate(self.ids)}

        def ruler(pairs: tuple[tuple[int, int], ...], axis: int) -> tuple[Float, float]:
            weight = np.zeros(len(self.ids), np.float32)
            for low, high in pairs:
                weight[place[high]] += 1 / len(pairs)
                weight[place[low]] -= 1 / len(pairs)
            return np.asarray(weight @ self._to_landmarks, np.float32), float(weight @ self._rest_points[:, axis])

        return ruler(INNER_LIP_PAIRS, 1), ruler((INNER_LIP_CORNERS,), 0)

    def gaping_field(self) -> Float:
        """The shape field [FIELD, FIELD, 2] of lips that part by one crop px, mostly by the lower lip and the chin."""
        moved = np.zeros((len(self.ids), 2), np.float32)
        for landmarks, share in ((_UPPER_LIP, -0.3), (_LOWER_LIP, 0.7), (_CHIN, 0.5)):
            moved[[i for i, landmark in enumerate(self.ids) if int(landmark) in landmarks], 1] = share
        field = np.asarray(self._landmarks_to_field @ moved, np.float32).reshape(FIELD, FIELD, 2)
        weights = self.lip_rulers()[0][0]
        return np.asarray(field / float(field[..., 1].ravel() @ weights), np.float32)

    def inner_lips(self) -> tuple[Float, Float]:
        """Rows of the canvas at which the upper lip ends and the lower one begins, [CANVAS_PX] columns each; equal
        beyond the corners of the mouth."""
        columns = np.arange(CANVAS_PX, dtype=np.float32)
        upper, lower = (np.interp(columns, edge[:, 0], edge[:, 1]).astype(np.float32) for edge in self._edges)
        return upper, lower

    # ---------------------------------------------------------------- texture

    def places(self, field: Float, alignment: Alignment) -> Float:
        """Where the pixels of the canvas lie in the frame, [CANVAS_PX, CANVAS_PX, 2] source px."""
        crop, inverse = self.rest_map + self.dense(field), alignment.inverse
        return np.asarray(crop @ inverse[:, :2].T.astype(np.float32) + inverse[:, 2].astype(np.float32), np.float32)

    def texture(self, frame: NDArray[np.uint8], field: Float, alignment: Alignment) -> NDArray[np.uint8]:
        """Colours of the canvas, [CANVAS_PX, CANVAS_PX, 3] uint8, read from ``frame`` [H, W, 3] uint8."""
        source = self.places(field, alignment)
        frame, source = shrunk_for_reading(frame, source, 1.0 / alignment.scale)
        sampled = cv2.remap(frame, source[..., 0], source[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(sampled, np.uint8)


def _enlarge(coarse: Float) -> Float:
    """[DENSE, DENSE, 2] at cell centres -> [CANVAS_PX, CANVAS_PX, 2] at pixel centres."""
    fine = cv2.resize(coarse, (CANVAS_PX, CANVAS_PX), interpolation=cv2.INTER_LINEAR)
    return np.asarray(fine, np.float32)


def shrunk_for_reading(frame: NDArray[np.uint8], source: Float, step_px: float) -> tuple[NDArray[np.uint8], Float]:
    """Crop and area-shrink a large face first, so that reading every ``step_px`` pixels does not alias."""
    if step_px < 1.6:
        return frame, source
    lo = np.maximum(np.floor(source.reshape(-1, 2).min(0)).astype(int) - 4, 0)
    hi = np.minimum(np.ceil(source.reshape(-1, 2).max(0)).astype(int) + 5, frame.shape[1::-1])
    if (hi - lo).min() < 8:  # the face lies outside the picture: nothing worth an exact filter
        return frame, source
    region = frame[lo[1] : hi[1], lo[0] : hi[0]]
    size = np.maximum(((hi - lo) / step_px).astype(int), 2)
    small = cv2.resize(region, (int(size[0]), int(size[1])), interpolation=cv2.INTER_AREA)
    ratio = size / (hi - lo)
    moved = (source + 0.5 - lo) * ratio - 0.5
    return np.asarray(small, np.uint8), moved.astype(np.float32)
