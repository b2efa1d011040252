"""Face detection and tracking: geometry on made-up pictures, agreement with MediaPipe on a real clip."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from lipstream.faces.detect import FaceDetector, anchor_centres, search_tiles, weighted_nms
from lipstream.faces.mesh import FaceMesh, Region, region_from_landmarks
from lipstream.faces.track import FaceTracker

CLIP = Path(__file__).parents[2] / "shared/clips/video/hdtf_katiehill.mp4"
needs_clip = pytest.mark.skipif(not CLIP.exists(), reason=f"{CLIP} is not on this machine")
# MediaPipe 0.10.21 FaceMesh(refine_landmarks=False) on frame 10 of that clip: landmark -> x, y in pixels.
MEDIAPIPE = {
    61: (216.45, 375.63),
    291: (321.37, 369.38),
    13: (267.36, 373.95),
    14: (269.02, 389.93),
    0: (265.60, 363.42),
    17: (270.92, 408.47),
    33: (177.21, 254.25),
    263: (340.62, 239.85),
}


def frames(count: int) -> list[np.ndarray]:
    with av.open(str(CLIP)) as container:
        return [f.to_ndarray(format="rgb24") for f, _ in zip(container.decode(video=0), range(count), strict=False)]


def test_anchors_cover_the_input() -> None:
    centres = anchor_centres()
    assert centres.shape == (896, 2)
    assert centres[0].tolist() == [0.03125, 0.03125]
    assert centres[-1].tolist() == [0.9375, 0.9375]


@pytest.mark.parametrize("height,width", [(1080, 1920), (1920, 1080), (512, 512), (97, 31)])
def test_tiles_cover_the_picture(height: int, width: int) -> None:
    for scale in (1.0, 0.5):
        seen = np.zeros((height, width), bool)
        for x, y, side in search_tiles(height, width, scale):
            assert x >= 0 and y >= 0 and x + side <= width and y + side <= height
            seen[y : y + side, x : x + side] = True
        assert seen.all()


def test_nms_merges_neighbours_only() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]], np.float32)
    found = weighted_nms(boxes, np.zeros((3, 6, 2), np.float32), np.array([0.5, 0.5, 0.9], np.float32))
    assert [round(d.box[0], 3) for d in found] == [50.0, 0.5]


def test_no_face_is_none_and_counts() -> None:
    tracker = FaceTracker()
    assert tracker.step(np.full((120, 160, 3), 127, np.uint8)) is None
    assert tracker.snapshot().lost_pixel_frames == 1
    tracker.reset()
    assert tracker.snapshot().lost_pixel_frames == 0


def test_bad_input_names_the_value() -> None:
    with pytest.raises(ValueError, match="float32"):
        FaceDetector().detect(np.zeros((8, 8, 3), np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0"):
        FaceMesh().landmarks(np.zeros((8, 8, 3), np.uint8), Region(x=0, y=0, side=0, angle=0))


@needs_clip
def test_landmarks_agree_with_mediapipe() -> None:
    tracker = FaceTracker()
    track = [tracker.step(rgb) for rgb in frames(11)][-1]
    assert track is not None and track.landmarks.shape == (468, 3) and track.landmarks.dtype == np.float32
    eyes = np.hypot(*(np.subtract(MEDIAPIPE[33], MEDIAPIPE[263])))
    error = np.mean([np.hypot(*(track.landmarks[i, :2] - xy)) for i, xy in MEDIAPIPE.items()])
    assert error <= 0.015 * eyes


@needs_clip
def test_snapshot_and_restore_continue_exactly() -> None:
    clip = frames(6)
    tracker = FaceTracker()
    for rgb in clip[:3]:
        tracker.step(rgb)
    state = tracker.snapshot()
    first = [tracker.step(rgb) for rgb in clip[3:]]
    other = FaceTracker()
    other.restore(state)
    for a, rgb in zip(first, clip[3:], strict=True):
        b = other.step(rgb)
        assert a is not None and b is not None
        assert np.array_equal(a.landmarks, b.landmarks) and a.id == b.id


@needs_clip
@pytest.mark.parametrize("height,width,share", [(1080, 1920, 0.2), (1920, 1080, 0.12), (1080, 1080, 0.15)])
def test_small_faces_are_found(height: int, width: int, share: float) -> None:
    """A face whose height is `share` of the frame's, anywhere in it."""
    rgb = frames(1)[0]
    tracker = FaceTracker()
    whole = tracker.step(rgb)
    assert whole is not None
    scale = share * height / np.ptp(whole.landmarks[:, 1])
    small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for fx, fy in ((0.1, 0.1), (0.5, 0.5), (0.95, 0.8)):
        picture = np.full((height, width, 3), 90, np.uint8)
        y, x = int(fy * (height - small.shape[0])), int(fx * (width - small.shape[1]))
        picture[y : y + small.shape[0], x : x + small.shape[1]] = small
        tracker.reset()
        track = tracker.step(picture)
        assert track is not None, (fx, fy)
        expected = whole.landmarks[:, :2] * scale + [x, y]
        assert np.abs(track.landmarks[:, :2] - expected).mean() < 0.05 * share * height


@needs_clip
def test_keeps_its_face_and_follows_a_cut() -> None:
    rgb = frames(1)[0]
    small = cv2.resize(rgb, (256, 256), interpolation=cv2.INTER_AREA)
    pair = np.zeros((512, 1024, 3), np.uint8)
    pair[128:384, 128:384] = small
    tracker = FaceTracker()
    first = tracker.step(pair)
    assert first is not None and first.landmarks[1, 0] < 512
    pair[:, 512:] = rgb  # a larger face appears: the followed one is kept
    second = tracker.step(pair)
    assert second is not None and second.landmarks[1, 0] < 512 and second.id == first.id
    pair[:, :512] = 0  # the followed face goes: the other one is another person
    third = tracker.step(pair)
    assert third is not None and third.landmarks[1, 0] > 512 and third.id == first.id + 1
    region = region_from_landmarks(third.landmarks)
    assert 100 < region.side < 700
