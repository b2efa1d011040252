"""Landmarks without their tremor, and without lag: one smoother that may look ahead, one for live frames.

The mesh looks at every frame anew, so its landmarks tremble by a fraction of a pixel, and a mouth that hangs on them
trembles with them. What is larger than tremor is movement and stays: both smoothers let go of a landmark that moves,
so that neither a fast head nor a lip is late. Nothing is smoothed over a cut, a lost face or a change of person.

* :class:`Steady` knows the next frames (files): a mean over LOOK_SECONDS before and after, symmetric, hence no lag.
* :class:`LiveSteady` knows the past alone: the One Euro filter (Casiez, Roussel, Vogel, CHI 2012).

    >>> steady = Steady()
    >>> for frame in source:
    ...     for frame, tracks, cut in steady.push(frame, frame.seconds, tracks, cut): ...
    >>> for frame, tracks, cut in steady.finish(): ...
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.pose import inter_ocular
from lipstream.faces.track import FaceTrack

LOOK_SECONDS = 0.08  # two frames of 25 a second, either way
# Of the distance between the eyes: a correction of this size is halved, larger ones fade away. The mesh trembles by
# 0.0007 of it (GRID speakers at rest) to 0.004 (still pictures, strong noise); lips that speak move by 0.02 a frame.
TREMOR = 0.006
# One Euro: cut-off (Hz) of what rests, how much it grows with speed (Hz per distance between the eyes a second) beyond
# that of tremor, and of the speed itself. Its size is followed, not its direction: lips that turn back do not rest.
REST_HZ, HZ_PER_SPEED, TREMOR_SPEED, SPEED_HZ = 2.5, 100.0, 0.05, 4.0

ItemT = TypeVar("ItemT")
Points = NDArray[np.float32]


@dataclass(frozen=True)
class _Seen(Generic[ItemT]):
    """A frame that waits: its time, its face, and the number of the stretch that may be smoothed as one."""

    item: ItemT
    seconds: float
    tracks: tuple[FaceTrack | None, ...]
    cut: bool
    stretches: tuple[int, ...]


class Steady(Generic[ItemT]):
    """The stage ``push(item, seconds, tracks, cut) -> [(item, tracks, cut), ...]``, LOOK_SECONDS late.

    Every face of a frame is smoothed for itself; the landmarks of a track without neighbours stay as they are.
    """

    def __init__(self) -> None:
        self._seen: deque[_Seen[ItemT]] = deque()
        self._done = 0  # of these, frames that have been given out and are kept for their landmarks

    def push(
        self, item: ItemT, seconds: float, tracks: list[FaceTrack | None], cut: bool
    ) -> Iterator[tuple[ItemT, list[FaceTrack | None], bool]]:
        """Take the faces of the next frame, always as many; gives the frames that are known well enough now."""
        stretches = tuple(self._stretch(i, track, cut) for i, track in enumerate(tracks))
        self._seen.append(_Seen(item, seconds, tuple(tracks), cut, stretches))
        while self._done < len(self._seen) and seconds - self._seen[self._done].seconds >= LOOK_SECONDS - 1e-3:
            yield self._give()

    def finish(self) -> Iterator[tuple[ItemT, list[FaceTrack | None], bool]]:
        """No more frames: gives the rest."""
        while self._done < len(self._seen):
            yield self._give()
        self._seen.clear()
        self._done = 0

    def _stretch(self, voice: int, track: FaceTrack | None, cut: bool) -> int:
        """Goes on where the same face goes on."""
        if not self._seen:
            return 0
        before = self._seen[-1]
        known = before.tracks[voice]
        goes_on = not cut and track is not None and known is not None and known.id == track.id
        return before.stretches[voice] + (not goes_on)

    def _give(self) -> tuple[ItemT, list[FaceTrack | None], bool]:
        here = self._seen[self._done]
        smooth = [None if t is None else replace(t, landmarks=self._mean(here, i)) for i, t in enumerate(here.tracks)]
        self._done += 1
        oldest = here.seconds - LOOK_SECONDS - 1e-3
        while self._seen[0].seconds < oldest and self._done > 1:
            self._seen.popleft()
            self._done -= 1
        return here.item, smooth, here.cut

    def _mean(self, here: _Seen[ItemT], voice: int) -> Points:
        """Landmarks of one face, at rest the weighted line through their neighbours in time."""
        times, points = [], []
        for other in self._seen:
            track = other.tracks[voice]
            if track is not None and other.stretches[voice] == here.stretches[voice]:
                times.append(other.seconds - here.seconds)
                points.append(track.landmarks)
        own = here.tracks[voice]
        assert own is not None
        weights = line_weights(np.array(times))
        return own.landmarks if weights is None else settled(own.landmarks, weights, points)


def line_weights(times: NDArray[np.float64]) -> NDArray[np.float32] | None:
    """What each of some frames counts for in the value at time 0 of a line through them; None: 0 stands alone.

    Args:
        times: [n] seconds from the frame in question, 0 among them.
    """
    near = np.abs(times) < 1.5 * LOOK_SECONDS
    bell = np.where(near, (1 - (times / (1.5 * LOOK_SECONDS)) ** 2).clip(0) ** 2, 0.0)
    # One side alone would be a guess beyond the known; the same reach on both sides keeps the line from tilting.
    before, after = bell[times < 0].sum(), bell[times > 0].sum()
    if min(before, after) < 1e-6:
        return None
    total, first, second = (float((bell * times**k).sum()) for k in range(3))
    scale = total * second - first**2
    if scale <= 1e-12:
        return None
    return np.asarray(bell * (second - first * times) / scale, np.float32)


def settled(own: Points, weights: NDArray[np.float32], points: list[Points]) -> Points:
    """Landmarks [468, 3] moved towards the weighted sum of ``points`` where that is no further than they tremble."""
    change = np.tensordot(weights, np.stack(points), 1) - own
    far = np.linalg.norm(change[:, :2], axis=1, keepdims=True) / max(TREMOR * inter_ocular(own), 1e-6)
    return np.asarray(own + change / (1 + far**2), np.float32)


class LiveSteady:
    """The stage ``step(track, seconds, cut) -> track`` without look-ahead."""

    def __init__(self) -> None:
        # Smooth face, its time, the speed of each landmark [468, 1] in distances between the eyes a second.
        self._before: tuple[FaceTrack, float, Points] | None = None

    def step(self, track: FaceTrack | None, seconds: float, cut: bool = False) -> FaceTrack | None:
        """One face of one frame; frames come in order of time."""
        before = self._before
        if track is None:
            self._before = None
            return None
        gap = 0.0 if before is None else seconds - before[1]
        if before is None or cut or before[0].id != track.id or not 0 < gap <= 4 * LOOK_SECONDS:
            self._before = track, seconds, np.zeros((len(track.landmarks), 1), np.float32)
            return track
        last, _, speed = before
        way = np.linalg.norm((track.landmarks - last.landmarks)[:, :2], axis=1, keepdims=True)
        measured = way / np.float32(gap * max(inter_ocular(track.landmarks), 1e-6))
        speed = speed + np.float32(_share(SPEED_HZ, gap)) * (measured - speed)
        fast = np.maximum(np.maximum(speed, measured) - TREMOR_SPEED, 0)
        share = np.asarray(_share(REST_HZ + HZ_PER_SPEED * fast, gap), np.float32)
        smooth = replace(track, landmarks=last.landmarks + share * (track.landmarks - last.landmarks))
        self._before = smooth, seconds, speed
        return smooth


def _share(hertz: Any, gap_seconds: float) -> Any:
    """How far a low pass of that cut-off goes towards its input in one step."""
    return 1 / (1 + 1 / (2 * math.pi * hertz * gap_seconds))
