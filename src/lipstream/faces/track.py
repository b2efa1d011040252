"""Follow one face through a video: detect once, then landmark after landmark, detect again when it is lost.

A `FaceTracker` is a streaming stage: one frame in, one result out, all state inside, so that any chunking of
a video gives the same result. It starts with the largest face and stays with it.

    >>> tracker = FaceTracker(); tracks = [tracker.step(rgb) for rgb in frames]  # None where no face shows
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.detect import Detection, FaceDetector
from lipstream.faces.mesh import FaceMesh, Region, region_from_detection, region_from_landmarks


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """When to believe, and when to look again.

    Attributes:
        min_presence: below it the crop shows no face.
        max_move: largest believable move of the face between two frames, over its size.
        max_resize: largest believable change of size between two frames, as a factor.
        search_pixel_frames: while lost, tiles are searched on every n-th frame only.
        forget_pixel_frames: lost for longer than this, the next face counts as another person.
    """

    min_presence: float = 0.5
    max_move: float = 0.35
    max_resize: float = 1.35
    search_pixel_frames: int = 5
    forget_pixel_frames: int = 50


@dataclass(frozen=True, kw_only=True)
class FaceTrack:
    """One tracked face: landmarks [468, 3] float32 in source pixels, presence in 0..1, and whose it is."""

    landmarks: NDArray[np.float32]
    score: float
    id: int


@dataclass(frozen=True, kw_only=True)
class TrackerState:
    """Everything a tracker remembers between frames (immutable: a snapshot is the state itself)."""

    region: Region | None = None  # where to look in the next frame
    last: Region | None = None  # where the face was seen last, kept while it is lost
    lost_pixel_frames: int = 0
    id: int = -1


class FaceTracker:
    """The stage `step(rgb) -> FaceTrack | None`."""

    def __init__(self, config: TrackerConfig | None = None) -> None:
        self.config = config or TrackerConfig()
        self._detector = FaceDetector()
        self._mesh = FaceMesh()
        self._state = TrackerState()

    def snapshot(self) -> TrackerState:
        """The state now; `restore` brings it back."""
        return self._state

    def restore(self, state: TrackerState) -> None:
        """Continue from a snapshot, of this tracker or of another one."""
        self._state = state

    def reset(self) -> None:
        """Forget the face: the next frame starts a new video."""
        self._state = TrackerState()

    def step(self, rgb: NDArray[np.uint8]) -> FaceTrack | None:
        """Landmarks of the followed face in rgb uint8 [H, W, 3], or None where it does not show."""
        state = self._state
        if state.region is not None:
            landmarks, presence = self._mesh.landmarks(rgb, state.region)
            if presence >= self.config.min_presence and believable(state.region, landmarks, self.config):
                return self._seen(landmarks, presence, state.id)
        return self._search(rgb)

    def _search(self, rgb: NDArray[np.uint8]) -> FaceTrack | None:
        """Detect, prefer the face that was followed, and confirm the choice with the mesh."""
        state = self._state
        tiles = state.lost_pixel_frames % self.config.search_pixel_frames == 0
        for detection in self._ranked(self._detector.detect(rgb, tiles=tiles)):
            region = region_from_detection(detection)
            if region.side < 8:
                continue
            landmarks, presence = self._mesh.landmarks(rgb, region)
            if presence >= self.config.min_presence:
                # A detection places the square only roughly; a second look from its own landmarks settles it,
                # so that the first frame of a track is as exact as the rest.
                landmarks, presence = self._mesh.landmarks(rgb, region_from_landmarks(landmarks))
            if presence >= self.config.min_presence:
                same = state.last is not None and self._near(detection, state.last)
                return self._seen(landmarks, presence, state.id if same else state.id + 1)
        lost = state.lost_pixel_frames + 1
        last = state.last if lost <= self.config.forget_pixel_frames else None
        self._state = replace(state, region=None, last=last, lost_pixel_frames=lost)
        return None

    def _ranked(self, detections: list[Detection]) -> list[Detection]:
        """The followed face first, then by size."""
        last = self._state.last
        if last is None:
            return detections
        near = [d for d in detections if self._near(d, last)]
        near.sort(key=lambda d: math.hypot(d.centre[0] - last.x, d.centre[1] - last.y))
        return near + [d for d in detections if not self._near(d, last)]

    @staticmethod
    def _near(detection: Detection, last: Region) -> bool:
        """Whether a detection overlaps the place of the followed face enough to be the same person."""
        return math.hypot(detection.centre[0] - last.x, detection.centre[1] - last.y) < 0.5 * last.side

    def _seen(self, landmarks: NDArray[np.float32], presence: float, face_id: int) -> FaceTrack:
        region = region_from_landmarks(landmarks)
        self._state = TrackerState(region=region, last=region, id=face_id)
        return FaceTrack(landmarks=landmarks, score=presence, id=face_id)


def believable(before: Region, landmarks: NDArray[np.float32], config: TrackerConfig) -> bool:
    """Whether landmarks [468, 3] may be the face that was at `before` one frame ago."""
    after = region_from_landmarks(landmarks)
    move = math.hypot(after.x - before.x, after.y - before.y) / before.side
    resize = after.side / max(before.side, 1e-6)
    limit = config.max_resize
    return after.side >= 8 and move <= config.max_move and 1 / limit <= resize <= limit
