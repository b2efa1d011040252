"""How far a mouth is open, frame by frame, as the product's own tracker sees it.

Stands in for the paper's landmark metrics (LMD): one number per frame that speech drives directly, free of head
motion and of the size of the face.

    >>> opening_series(clip)  # [frames] in inter-ocular distances, NaN where no face shows
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.pose import inter_ocular, mouth_opening
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader

Series = NDArray[np.float64]

__all__ = ["Series", "inter_ocular", "mouth_opening", "opening_series"]


def opening_series(video: str | os.PathLike[str]) -> Series:
    """Mouth opening of every frame of a video, [frames] in inter-ocular distances, NaN where no face shows."""
    tracker = FaceTracker()
    faces = (tracker.step(frame.image) for frame in VideoReader(video))
    return np.array([np.nan if face is None else mouth_opening(face.landmarks) for face in faces], np.float64)
