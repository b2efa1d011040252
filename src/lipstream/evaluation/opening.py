"""How far a mouth is open, frame by frame, as the product's own tracker sees it.

Stands in for the paper's landmark metrics (LMD): one number per frame that speech drives directly, free of head
motion and of the size of the face.

    >>> opening_series(clip)  # [frames] in inter-ocular distances, NaN where no face shows
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import INNER_LIP_PAIRS
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader

Series = NDArray[np.float64]

# MediaPipe mesh indices of the outer corners of the eyes.
EYE_CORNERS = (33, 263)


def inter_ocular(landmarks: NDArray[Any]) -> float:
    """Distance of the outer eye corners of landmarks [468, >=2], in their own unit (px)."""
    left, right = (landmarks[i, :2].astype(np.float64) for i in EYE_CORNERS)
    return float(np.linalg.norm(left - right))


def mouth_opening(landmarks: NDArray[Any]) -> float:
    """Mean gap of the inner lips over the inter-ocular distance; about 0.01 for a closed mouth, 0.2 for an "ah".

    Args:
        landmarks: [468, >=2] px.
    """
    gaps = [np.linalg.norm(landmarks[a, :2].astype(np.float64) - landmarks[b, :2]) for a, b in INNER_LIP_PAIRS]
    return float(np.mean(gaps)) / max(inter_ocular(landmarks), 1e-6)


def opening_series(video: str | os.PathLike[str]) -> Series:
    """Mouth opening of every frame of a video, [frames] in inter-ocular distances, NaN where no face shows."""
    tracker = FaceTracker()
    faces = (tracker.step(frame.image) for frame in VideoReader(video))
    return np.array([np.nan if face is None else mouth_opening(face.landmarks) for face in faces], np.float64)
