"""Watch a video once and note what every mouth metric needs: opening, sharpness, timestamps, size.

>>> watch("result.mp4").opening
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lipstream.evaluation.opening import Series, mouth_opening
from lipstream.evaluation.sharpness import mouth_sharpness
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import SourceFrame, VideoReader


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One row per frame of a video.

    Attributes:
        opening: [frames] inter-ocular distances, NaN where no face shows.
        sharpness: [frames] Laplacian variance of the mouth box, NaN likewise.
        seconds: timestamps, exact.
        size: (width, height), upright px.
    """

    opening: Series
    sharpness: Series
    seconds: tuple[Fraction, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def lost_frames(self) -> int:
        """Frames in which no face was found."""
        return int(np.isnan(self.opening).sum())


def watch_frames(frames: Iterable[SourceFrame]) -> Watched:
    """Track the face through frames and measure its mouth in each."""
    tracker = FaceTracker()
    opening: list[float] = []
    sharpness: list[float] = []
    seconds: list[Fraction] = []
    size = (0, 0)
    for frame in frames:
        face = tracker.step(frame.image)
        opening.append(float("nan") if face is None else mouth_opening(face.landmarks))
        sharpness.append(float("nan") if face is None else mouth_sharpness(frame.image, face.landmarks))
        seconds.append(frame.pts * frame.time_base)
        size = frame.size
    return Watched(opening=np.array(opening), sharpness=np.array(sharpness), seconds=tuple(seconds), size=size)


def watch(video: str | os.PathLike[str]) -> Watched:
    """Watch a video file."""
    return watch_frames(VideoReader(video))
