"""Find faces in one picture: the short-range SSD detector of the MediaPipe family, with our own glue.

The network (Apache-2.0, `assets/faces/face_detection_short_range.tflite`) looks at 128x128 pixels and so only
sees faces larger than roughly a fifth of the picture. When it finds nothing, the picture is searched again in
overlapping square tiles of decreasing size, so a small face in a portrait or 1080p frame is found too.

    >>> FaceDetector().detect(rgb)  # -> list of Detection, largest face first
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import cv2
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

INPUT_SIZE = 128
# (stride, anchors per cell): two anchors per cell at stride 8; the three stride-16 layers share one grid.
ANCHOR_LAYERS = ((8, 2), (16, 6))
MIN_SCORE = 0.5
NMS_IOU = 0.3
# Side of the search tiles over the short side of the picture, tried in this order after the whole picture.
TILE_SCALES = (1.0, 0.5)
TILE_OVERLAP = 0.4


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One face, in pixels: box (x0, y0, x1, y1), keypoints [6, 2] (right eye, left eye, nose, mouth, ears)."""

    box: tuple[float, float, float, float]
    keypoints: NDArray[np.float32]
    score: float

    @property
    def size(self) -> float:
        """Longer side of the box in pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def load_interpreter(name: str) -> Interpreter:
    """A one-thread TFLite interpreter for `assets/faces/<name>.tflite`, ready to run."""
    content = (files("lipstream") / "assets" / "faces" / f"{name}.tflite").read_bytes()
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def silence_tflite() -> None:
    """Load one network with standard error closed: TFLite announces itself there once per process, from C."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        load_interpreter("face_detection_short_range")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@lru_cache(maxsize=1)
def anchor_centres() -> NDArray[np.float32]:
    """Anchor centres [896, 2] as fractions of the network's input, in the order of its output rows."""
    rows = []
    for stride, per_cell in ANCHOR_LAYERS:
        cells = INPUT_SIZE // stride
        axis = (np.arange(cells, dtype=np.float32) + 0.5) / cells
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        rows.append(np.repeat(grid, per_cell, axis=0))
    return np.concatenate(rows)


def overlap(boxes: NDArray[np.float32], box: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of boxes [N, 4] with one box [4] -> [N]."""
    low = np.maximum(boxes[:, :2], box[:2])
    high = np.minimum(boxes[:, 2:], box[2:])
    inter = np.prod(np.clip(high - low, 0, None), axis=1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2]) - inter
    return np.asarray(inter / np.maximum(area, 1e-6), np.float32)


def weighted_nms(
    boxes: NDArray[np.float32], points: NDArray[np.float32], scores: NDArray[np.float32]
) -> list[Detection]:
    """Merge overlapping candidates into score-weighted means, which jitter less than picking the best one.

    boxes [N, 4] px, points [N, 6, 2] px, scores [N] -> one `Detection` per face.
    """
    found: list[Detection] = []
    left = np.argsort(-scores, kind="stable")
    while left.size:
        best = left[0]
        same = overlap(boxes[left], boxes[best]) > NMS_IOU
        same[0] = True
        group = left[same]
        weight = scores[group] / scores[group].sum()
        box = (weight[:, None] * boxes[group]).sum(axis=0)
        keypoints = (weight[:, None, None] * points[group]).sum(axis=0)
        found.append(
            Detection(
                box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                keypoints=keypoints.astype(np.float32),
                score=float(scores[best]),
            )
        )
        left = left[~same]
    return found


def search_tiles(height: int, width: int, scale: float) -> list[tuple[int, int, int]]:
    """Overlapping squares (x, y, side) that cover the picture; side = scale x the shorter side, in pixels."""
    side = max(round(min(height, width) * scale), 1)

    def starts(length: int) -> list[int]:
        count = 1 if length <= side else int(np.ceil((length - side) / (side * (1 - TILE_OVERLAP)))) + 1
        return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]

    return [(x, y, side) for y in starts(height) for x in starts(width)]


class FaceDetector:
    """Finds every face of a picture. Stateless between calls; one thread.

    Args:
        min_score: candidates below this probability are dropped.

    Attributes:
        best_score: the most face-like thing of all calls so far, 0..1, found or not.
    """

    def __init__(self, min_score: float = MIN_SCORE) -> None:
        if not 0 < min_score < 1:
            raise ValueError(f"min_score must lie between 0 and 1, got {min_score}")
        self.min_score = min_score
        self.best_score = 0.0
        self._net = load_interpreter("face_detection_short_range")
        self._input = self._net.get_input_details()[0]["index"]
        outputs = {tuple(d["shape"]): d["index"] for d in self._net.get_output_details()}
        self._regressors, self._scores = outputs[(1, 896, 16)], outputs[(1, 896, 1)]

    def detect(self, rgb: NDArray[np.uint8], *, tiles: bool = True) -> list[Detection]:
        """All faces in rgb [H, W, 3], largest first; tiles are searched only if the whole shows none."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
            raise ValueError(f"expected uint8 [H, W, 3], got {rgb.dtype} {list(rgb.shape)}")
        height, width = rgb.shape[:2]
        found = weighted_nms(*self._candidates(rgb))
        for scale in TILE_SCALES if tiles else ():
            if found:
                break
            # A square picture's only full-size tile is the picture itself, which was just searched.
            squares = [t for t in search_tiles(height, width, scale) if t[2] != max(height, width)]
            parts = [self._candidates(rgb[y : y + s, x : x + s], (x, y)) for x, y, s in squares]
            if parts:
                boxes, points, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
                found = weighted_nms(boxes, points, scores)
        return sorted(found, key=lambda d: -d.size)

    def _candidates(
        self, rgb: NDArray[np.uint8], origin: tuple[int, int] = (0, 0)
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Candidates of one letterboxed look: boxes [N, 4], points [N, 6, 2], scores [N], plus origin."""
        height, width = rgb.shape[:2]
        side = max(height, width)
        scale = INPUT_SIZE / side
        pad = np.array([(side - width) / 2, (side - height) / 2], np.float32)
        # Centres of pixels map to centres of pixels, hence the half-pixel terms.
        shift = scale * (pad + 0.5) - 0.5
        if scale < 0.5:  # bilinear warping skips rows at such a step: average first
            small = (max(round(width * scale * 2), 1), max(round(height * scale * 2), 1))
            source = cv2.resize(rgb, small, interpolation=cv2.INTER_AREA)
            sx, sy = small[0] / width, small[1] / height
        else:
            source, sx, sy = rgb, 1.0, 1.0
        shift = np.array([shift[0] + 0.5 * scale * (1 / sx - 1), shift[1] + 0.5 * scale * (1 / sy - 1)])
        matrix = np.array([[scale / sx, 0, shift[0]], [0, scale / sy, shift[1]]], np.float64)
        picture = cv2.warpAffine(source, matrix, (INPUT_SIZE, INPUT_SIZE), flags=cv2.INTER_LINEAR)
        self._net.set_tensor(self._input, picture[None].astype(np.float32) / 127.5 - 1)
        self._net.invoke()
        logits = self._net.get_tensor(self._scores)[0, :, 0]
        self.best_score = max(self.best_score, 1 / (1 + math.exp(-min(max(float(logits.max()), -80.0), 80.0))))
        keep = logits > np.log(self.min_score / (1 - self.min_score))
        raw = self._net.get_tensor(self._regressors)[0][keep]
        scores = 1 / (1 + np.exp(-np.clip(logits[keep], -80, 80)))
        offset = np.array(origin, np.float32) - pad
        centres = anchor_centres()[keep]
        middle = (raw[:, 0:2] / INPUT_SIZE + centres) * side + offset
        half = raw[:, 2:4] / INPUT_SIZE * side / 2
        points = (raw[:, 4:].reshape(-1, 6, 2) / INPUT_SIZE + centres[:, None]) * side + offset
        boxes = np.concatenate([middle - half, middle + half], axis=1)
        return boxes.astype(np.float32), points.astype(np.float32), scores.astype(np.float32)
