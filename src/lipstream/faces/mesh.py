"""468 face landmarks inside a rotated square: the MediaPipe face mesh network, with our own cropping.

The network (Apache-2.0, `assets/faces/face_landmark.tflite`) takes a 192x192 crop whose eyes lie level. The
square comes from a detection (first frame) or from the landmarks of the previous frame (tracking).

    >>> mesh = FaceMesh(); landmarks, presence = mesh.landmarks(rgb, region_from_detection(detection))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.detect import Detection, load_interpreter

CROP_SIZE = 192
LANDMARKS = 468
REGION_SCALE = 1.5  # square side over the longer side of the face's box, as the network was trained
RIGHT_EYE_CORNER, LEFT_EYE_CORNER = 33, 263  # outer corners; right and left of the person


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rotated square in source pixels: centre, side, and angle in radians (0 = eyes level)."""

    x: float
    y: float
    side: float
    angle: float


def region_from_detection(detection: Detection) -> Region:
    """The square that the mesh expects around a detected face, level with its eyes."""
    (rx, ry), (lx, ly) = detection.keypoints[:2].tolist()
    x, y = detection.centre
    return Region(x=x, y=y, side=REGION_SCALE * detection.size, angle=math.atan2(ly - ry, lx - rx))


def region_from_landmarks(landmarks: NDArray[np.float32]) -> Region:
    """The square for the next frame from this frame's landmarks [468, 3] px."""
    low, high = landmarks[:, :2].min(axis=0), landmarks[:, :2].max(axis=0)
    x, y = ((low + high) / 2).tolist()
    dx, dy = (landmarks[LEFT_EYE_CORNER, :2] - landmarks[RIGHT_EYE_CORNER, :2]).tolist()
    return Region(x=x, y=y, side=REGION_SCALE * float((high - low).max()), angle=math.atan2(dy, dx))


class FaceMesh:
    """Landmarks of one face inside a `Region`. Stateless between calls; one thread."""

    def __init__(self) -> None:
        self._net = load_interpreter("face_landmark")
        self._input = self._net.get_input_details()[0]["index"]
        outputs = {int(np.prod(d["shape"])): d["index"] for d in self._net.get_output_details()}
        self._points, self._presence = outputs[LANDMARKS * 3], outputs[1]

    def landmarks(self, rgb: NDArray[np.uint8], region: Region) -> tuple[NDArray[np.float32], float]:
        """Landmarks [468, 3] and the probability that the region shows a face.

        x and y are pixels of rgb [H, W, 3]; z has the same unit, towards the camera is negative.
        """
        if not (region.side >= 1 and math.isfinite(region.side)):
            raise ValueError(f"region side must be at least one pixel, got {region.side}")
        unit = region.side / CROP_SIZE
        cos, sin = math.cos(region.angle) * unit, math.sin(region.angle) * unit
        turn = np.array([[cos, -sin], [sin, cos]])
        # Pixel indices stand for coordinates on both sides, without half-pixel terms: so the network's authors
        # crop, and landmarks agree with theirs to 0.1 % of the eye distance instead of 0.7 %.
        offset = np.array([region.x, region.y]) - turn @ np.full(2, CROP_SIZE / 2)
        crop = cv2.warpAffine(
            rgb,
            np.column_stack([turn, offset]),
            (CROP_SIZE, CROP_SIZE),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        self._net.set_tensor(self._input, crop[None].astype(np.float32) / 255)
        self._net.invoke()
        raw = self._net.get_tensor(self._points).reshape(LANDMARKS, 3)
        logit = float(self._net.get_tensor(self._presence).reshape(()))
        result = np.empty((LANDMARKS, 3), np.float32)
        result[:, :2] = raw[:, :2] @ turn.T + offset
        result[:, 2] = raw[:, 2] * unit
        return result, 1 / (1 + math.exp(-max(min(logit, 80.0), -80.0)))
