"""How much the mouth of a result trembles, against the mouth of its source: landmarks from frame to frame.

A clip is synced to its own speech, so that both mouths say the same. Seen from the head (the landmarks that speech does
not move), every landmark of lips and chin is compared with the middle of its neighbours in time; what is left is the
fastest movement that a video can hold. A ratio of 1 is the source's own; speech is part of it on both sides, so a mouth
that moves further than the source's has a higher one.

    lipstream evaluate jitter CLIP...          # videos with their own speech
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.evaluation.reversed import Synchroniser
from lipstream.faces.canvas import FaceCanvas
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader

Places = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Of one clip: crop px (the eyes are 108 apart), (sideways, vertical) each.

    Attributes:
        own, source: root mean square over frames and landmarks.
        typical_own, typical_source: median of the sizes, which a few sudden openings do not move.
    """

    name: str
    own: tuple[float, float]
    source: tuple[float, float]
    typical_own: tuple[float, float]
    typical_source: tuple[float, float]

    @property
    def ratio(self) -> tuple[float, float]:
        """Result over source; root mean square."""
        return _over(self.own, self.source)

    @property
    def typical_ratio(self) -> tuple[float, float]:
        """Result over source; medians."""
        return _over(self.typical_own, self.typical_source)


def _over(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] / max(other[0], 1e-9), one[1] / max(other[1], 1e-9)


def mouth_places(video: str | os.PathLike[str]) -> Places:
    """Landmarks of lips and chin, seen from the head: [frames, landmarks, 2] crop px, NaN where no face shows."""
    canvas, tracker = FaceCanvas(), FaceTracker()
    ids = sorted(canvas.mouth_ids)
    places = []
    for frame in VideoReader(video):
        track = tracker.step(frame.image)
        if track is None:
            places.append(np.full((len(ids), 2), np.nan))
            continue
        matrix = canvas.align(track.landmarks).matrix
        places.append(track.landmarks[ids, :2].astype(np.float64) @ matrix[:, :2].T + matrix[:, 2])
    return np.stack(places)


def trembling(places: Places) -> tuple[tuple[float, float], tuple[float, float]]:
    """(root mean square, median of the sizes) of how far places [frames, n, 2] lie off the middle of their neighbours.

    Raises:
        ValueError: no face in three frames on end.
    """
    off = places[1:-1] - (places[:-2] + places[2:]) / 2
    off = off[~np.isnan(off).any((1, 2))]
    if not len(off):
        raise ValueError("no face shows in three frames on end: nothing to measure")
    square, middle = np.sqrt((off**2).mean((0, 1))), np.median(np.abs(off), (0, 1))
    return (float(square[0]), float(square[1])), (float(middle[0]), float(middle[1]))


def measure_jitter(sync: Synchroniser, clip: Path) -> Jitter:
    """Sync a clip to its own speech and compare."""
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as folder:
        result = Path(folder) / "result.mp4"
        sync(clip, clip, result)
        own, source = (trembling(mouth_places(video)) for video in (result, clip))
    return Jitter(name=clip.stem, own=own[0], source=source[0], typical_own=own[1], typical_source=source[1])
