"""Landmarks lose their tremor, and nothing else: no lag, no mixing over cuts, gaps and people."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from lipstream.faces.canvas import FaceCanvas
from lipstream.faces.mesh import LEFT_EYE_CORNER, RIGHT_EYE_CORNER
from lipstream.faces.steady import LOOK_SECONDS, TREMOR, LiveSteady, Steady
from lipstream.faces.track import FaceTrack

EYES_PX = 108.0


@cache
def rest_face() -> np.ndarray:
    """The canvas' rest face; eyes 108 px apart."""
    canvas, points = FaceCanvas(), np.zeros((468, 3), np.float32)
    points[canvas.ids, :2] = canvas._rest_points
    points[canvas.rigid_ids, :2] = canvas._rigid_points
    points[RIGHT_EYE_CORNER, :2], points[LEFT_EYE_CORNER, :2] = (46, 40), (46 + EYES_PX, 40)
    return points


def landmarks() -> np.ndarray:
    return rest_face().copy()


def series(count: int, noise: float = 0.0, move: tuple[float, float] = (0.0, 0.0)) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shift = np.array([*move, 0.0])
    return [(landmarks() + i * shift + noise * rng.normal(size=(468, 3))).astype(np.float32) for i in range(count)]


def smooth(points: list[np.ndarray | None], ids: list[int] | None = None, cuts: tuple[int, ...] = (), fps: int = 25):
    """(landmarks per frame, frames that were waited for at most)."""
    steady, out, late = Steady[int](), [], 0
    for i, face in enumerate(points):
        track = None if face is None else FaceTrack(landmarks=face, score=1.0, id=ids[i] if ids else 0)
        out += list(steady.push(i, i / fps, [track], i in cuts))
        late = max(late, i + 1 - len(out))
    out += list(steady.finish())
    assert [item for item, _, _ in out] == list(range(len(points)))
    assert [cut for _, _, cut in out] == [i in cuts for i in range(len(points))]
    return [None if tracks[0] is None else tracks[0].landmarks for _, tracks, _ in out], late


def live(points: list[np.ndarray], fps: int = 25) -> list[np.ndarray]:
    steady = LiveSteady()
    tracks = [steady.step(FaceTrack(landmarks=p, score=1.0, id=0), i / fps) for i, p in enumerate(points)]
    return [track.landmarks for track in tracks if track is not None]


def tremor(points: list[np.ndarray]) -> float:
    """How far a frame lies off the middle of its neighbours, px."""
    p = np.stack(points)[2:-2, :, :2]
    return float(np.sqrt(np.mean((p[1:-1] - (p[:-2] + p[2:]) / 2) ** 2)))


def test_tremor_goes() -> None:
    shaken = series(40, noise=0.2)
    assert tremor(smooth(shaken)[0]) < 0.4 * tremor(shaken)
    assert tremor(live(shaken)) < 0.65 * tremor(shaken)


@pytest.mark.parametrize("speed", [1.0, 6.0, 30.0])
def test_a_moving_head_is_not_late(speed: float) -> None:
    """Px a frame; what is shown may trail by a part of the tremor, not by a part of the way."""
    moving = series(30, move=(speed, 0.5 * speed))
    for got, real in zip(smooth(moving)[0], moving, strict=True):
        np.testing.assert_allclose(got, real, atol=1e-3)
    behind = [float(np.abs(a - b).max()) for a, b in zip(live(moving)[5:], moving[5:], strict=True)]
    assert max(behind) < 0.8


def test_speaking_lips_keep_their_way() -> None:
    """Lips that open by 6 px five times a second, in frames of 25 a second."""
    lips = landmarks()
    speaking = []
    for i in range(40):
        frame = lips.copy()
        frame[14, 1] += 3 - 3 * np.cos(2 * np.pi * 5 * i / 25)
        speaking.append(frame)
    way = np.array([frame[14, 1] for frame in speaking])
    for got, least in ((smooth(speaking)[0], 0.93), (live(speaking), 0.9)):
        shown = np.array([frame[14, 1] for frame in got])
        assert np.abs(shown - way).max() < max(TREMOR * EYES_PX, 0.65)
        assert np.ptp(shown) > least * np.ptp(way)
        lags = [np.corrcoef(shown[3 + k : 37 + k], way[3:37])[0, 1] for k in (-1, 0, 1)]
        assert np.argmax(lags) == 1


def test_nothing_is_mixed_over_cuts_gaps_and_people() -> None:
    here, there = landmarks(), landmarks() + 0.3  # so near that it could be tremor
    both = [here] * 6 + [there] * 6
    for got in (
        smooth(both, cuts=(6,))[0],
        smooth(both, ids=[0] * 6 + [1] * 6)[0],
        [p for p in smooth([*both[:6], None, *both[6:]])[0] if p is not None],
    ):
        for shown, real in zip(got, both, strict=True):
            np.testing.assert_allclose(shown, real, atol=1e-4)
    mixed = smooth(both)[0]
    assert np.abs(mixed[5] - here).max() > 0.05  # without them it would be


def test_frames_wait_for_no_more_than_the_look_ahead() -> None:
    assert LOOK_SECONDS == 0.08
    for fps, frames in ((10, 1), (25, 2), (50, 4)):
        got, late = smooth(series(20, noise=0.2), fps=fps)
        assert late == frames and len(got) == 20
    slow = series(20, noise=0.2)
    for shown, real in zip(smooth(slow, fps=8)[0], slow, strict=True):
        np.testing.assert_array_equal(shown, real)  # frames so far apart know nothing of each other


def test_live_begins_anew_after_a_gap_and_with_another_person() -> None:
    steady, (first, second) = LiveSteady(), (landmarks(), landmarks() + 0.3)
    steady.step(FaceTrack(landmarks=first, score=1.0, id=0), 0.0)
    assert steady.step(None, 0.04) is None
    for track, seconds, cut in (
        (FaceTrack(landmarks=second, score=1.0, id=0), 0.08, False),
        (FaceTrack(landmarks=first, score=1.0, id=1), 0.12, False),
        (FaceTrack(landmarks=second, score=1.0, id=1), 0.16, True),
        (FaceTrack(landmarks=first, score=1.0, id=1), 2.0, False),
    ):
        got = steady.step(track, seconds, cut)
        assert got is not None and got.landmarks is track.landmarks
