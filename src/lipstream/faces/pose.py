"""What landmarks say about a head: how far it is turned aside, whether that still is a face to put a mouth on, how far
the mouth is open.

The mesh guesses the hidden half of a profile, so that a mouth put there would hang beside the face. Two thresholds keep
a head that stays near the limit from flickering.

    >>> FrontalGate().step(landmarks)  # True: near enough to the front
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import INNER_LIP_PAIRS
from lipstream.faces.mesh import LEFT_EYE_CORNER, RIGHT_EYE_CORNER

PROFILE_DEGREES, FRONTAL_DEGREES = 52.0, 46.0


def yaw_degrees(landmarks: NDArray[Any]) -> float:
    """How far a head is turned aside, 0 = towards the camera, positive to the person's left.

    Args:
        landmarks: [468, 3] px, z as deep as x is wide.
    """
    dx, dy, dz = (landmarks[LEFT_EYE_CORNER] - landmarks[RIGHT_EYE_CORNER]).tolist()
    return math.degrees(math.atan2(dz, math.hypot(dx, dy)))


def inter_ocular(landmarks: NDArray[Any]) -> float:
    """Distance of the outer eye corners of landmarks [468, >=2], in their own unit (px)."""
    left, right = (landmarks[i, :2].astype(np.float64) for i in (RIGHT_EYE_CORNER, LEFT_EYE_CORNER))
    return float(np.linalg.norm(left - right))


def mouth_opening(landmarks: NDArray[Any]) -> float:
    """Mean gap of the inner lips over the inter-ocular distance; about 0.01 for a closed mouth, 0.2 for an "ah".

    Args:
        landmarks: [468, >=2] px.
    """
    gaps = [np.linalg.norm(landmarks[a, :2].astype(np.float64) - landmarks[b, :2]) for a, b in INNER_LIP_PAIRS]
    return float(np.mean(gaps)) / max(inter_ocular(landmarks), 1e-6)


class FrontalGate:
    """The stage ``step(landmarks) -> bool``: False beyond PROFILE_DEGREES, True again below FRONTAL_DEGREES."""

    def __init__(self) -> None:
        self._frontal = True

    def step(self, landmarks: NDArray[Any]) -> bool:
        """Whether a face with these landmarks [468, 3] px looks forward enough; frames come in order of time."""
        turned = abs(yaw_degrees(landmarks))
        self._frontal = turned <= (PROFILE_DEGREES if self._frontal else FRONTAL_DEGREES)
        return self._frontal

    def reset(self) -> None:
        """Another shot begins."""
        self._frontal = True
