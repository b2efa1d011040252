"""The face canvas and the compositor: what must not change does not, what must move moves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lipstream.faces.canvas import CANVAS_PX, FIELD, Alignment, FaceCanvas
from lipstream.faces.composite import Compositor, canvas_mask


@pytest.fixture(scope="module")
def canvas() -> FaceCanvas:
    return FaceCanvas()


def face(
    canvas: FaceCanvas, scale: float = 1.3, angle: float = 0.1, shift: tuple[float, float] = (150, 60)
) -> np.ndarray:
    """Landmarks of the rest face under a similarity, source px."""
    points = np.zeros((468, 3))
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points[canvas.ids, :2] = canvas._rest_points @ rotation.T + shift
    points[canvas.rigid_ids, :2] = canvas._rigid_points @ rotation.T + shift
    return points


def picture(height: int = 400, width: int = 420) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def test_alignment_undoes_a_similarity(canvas: FaceCanvas) -> None:
    alignment = canvas.align(face(canvas, scale=2.0))
    assert alignment.scale == pytest.approx(0.5, rel=1e-3)
    both = np.vstack([alignment.matrix, [0, 0, 1]]) @ np.vstack([alignment.inverse, [0, 0, 1]])
    np.testing.assert_allclose(both, np.eye(3), atol=1e-9)


def test_rest_face_has_zero_field_whatever_its_pose(canvas: FaceCanvas) -> None:
    for scale, angle in ((0.7, -0.3), (1.0, 0.0), (2.5, 0.5)):
        landmarks = face(canvas, scale, angle)
        field = canvas.field(landmarks, canvas.align(landmarks))
        assert np.abs(field).max() < 1e-3


def test_dense_map_follows_an_opening_mouth(canvas: FaceCanvas) -> None:
    landmarks = face(canvas, scale=1.0, angle=0.0)
    alignment = canvas.align(landmarks)
    below = canvas.ids[canvas._rest_points[:, 1] >= canvas._rest_points[canvas.ids == 14, 1] - 1]  # lip, chin and jaw
    landmarks[below, 1] += 6.0
    moved = canvas.dense(canvas.field(landmarks, alignment))
    assert moved[86, 80, 1] > 4.0  # the lower lip of the canvas
    assert abs(moved[52, 80, 1]) < 1.0  # the upper lip


def test_same_field_and_closed_gate_change_nothing(canvas: FaceCanvas) -> None:
    frame, landmarks = picture(), face(canvas)
    alignment = canvas.align(landmarks)
    field = canvas.field(landmarks, alignment)
    blank = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8)
    patch = Compositor(canvas)(frame, alignment, field, field, blank, np.zeros((CANVAS_PX, CANVAS_PX), np.float32))
    assert patch is not None
    x0, y0, x1, y1 = patch.box
    np.testing.assert_array_equal(patch.rgb, frame[y0:y1, x0:x1])


def test_motion_changes_only_the_mask_and_meets_the_rim(canvas: FaceCanvas) -> None:
    frame, landmarks = picture(), face(canvas)
    alignment = canvas.align(landmarks)
    field = canvas.field(landmarks, alignment)
    target = field.copy()
    target[9:14, 5:15, 1] += 8.0
    blank = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8)
    patch = Compositor(canvas)(frame, alignment, field, target, blank, np.zeros((CANVAS_PX, CANVAS_PX), np.float32))
    assert patch is not None
    x0, y0, x1, y1 = patch.box
    difference = np.abs(patch.rgb.astype(int) - frame[y0:y1, x0:x1]).max(-1)
    assert difference.max() > 20
    assert difference[patch.alpha == 0].max(initial=0) == 0
    inner = cv2.erode(patch.alpha, np.ones((5, 5), np.uint8))
    assert difference[(patch.alpha > 0) & (inner == 0)].max() <= 12  # no step at the rim


def test_a_face_that_moves_as_a_whole_leaves_no_seam(canvas: FaceCanvas) -> None:
    """Everything is 8 px lower in the generated face: what shows of it fades to nothing towards the rim."""
    frame, landmarks = picture(), face(canvas)
    alignment = canvas.align(landmarks)
    field = canvas.field(landmarks, alignment)
    blank = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8)
    gate = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    patch = Compositor(canvas)(frame, alignment, field, field + np.float32((0, 8)), blank, gate)
    assert patch is not None
    x0, y0, x1, y1 = patch.box
    difference = np.abs(patch.rgb.astype(int) - frame[y0:y1, x0:x1]).max(-1)
    rim = (patch.alpha > 0) & (cv2.erode(patch.alpha, np.ones((5, 5), np.uint8)) == 0)
    assert difference.max() > 200 and difference[rim].max() <= 25  # with a hard edge: 255


def laugh(canvas: FaceCanvas, landmarks: np.ndarray) -> np.ndarray:
    """Skin, lips and white teeth between them, where these landmarks have them."""
    frame = np.full((400, 420, 3), (190, 150, 130), np.uint8)
    centre = landmarks[[13, 14], :2].mean(0)
    cv2.ellipse(frame, (int(centre[0]), int(centre[1])), (62, 34), 6, 0, 360, (150, 70, 70), -1)
    edge = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
    cv2.fillPoly(frame, [np.round(landmarks[list(edge), :2]).astype(np.int32)], (245, 245, 240))
    return frame


def test_teeth_are_gone_where_the_lips_meet(canvas: FaceCanvas) -> None:
    landmarks = face(canvas)
    frame, alignment = laugh(canvas, landmarks), canvas.align(landmarks)
    field = canvas.field(landmarks, alignment)
    blank, gate = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8), np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    opening = canvas.lip_rulers()[0][1]
    shown = []
    for left_open in (opening, 8.0, 0.6):
        target = field - np.float32(opening - left_open) * canvas.gaping_field()
        patch = Compositor(canvas)(frame, alignment, field, target, blank, gate)
        assert patch is not None
        shown.append((patch.rgb.astype(int).min(-1) > 150).sum())  # of all colours here, only teeth are so pale
    assert shown[0] > 800 and shown[1] > 0.3 * shown[0]  # an open mouth keeps its teeth
    assert shown[2] == 0, shown


def test_the_dark_line_between_closed_lips_stays(canvas: FaceCanvas) -> None:
    """A mouth that is black inside closes to a dark line, not to one even lip."""
    landmarks = face(canvas)
    frame, alignment = laugh(canvas, landmarks), canvas.align(landmarks)
    frame[frame.min(-1) > 200] = (25, 15, 15)
    field = canvas.field(landmarks, alignment)
    blank, gate = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8), np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
    target = field - np.float32(canvas.lip_rulers()[0][1] - 0.6) * canvas.gaping_field()
    patch = Compositor(canvas)(frame, alignment, field, target, blank, gate)
    assert patch is not None
    assert (patch.rgb.astype(int).max(-1) < 70).sum() > 30  # lips here have 150


def test_mask_is_zero_at_the_border_and_one_at_the_mouth() -> None:
    mask = canvas_mask()
    assert max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) < 0.02
    assert mask[70, 80] == 1.0


def test_a_face_outside_the_picture_gives_no_patch(canvas: FaceCanvas) -> None:
    frame = picture()
    alignment = Alignment(np.array([[1.0, 0, 2000], [0, 1, 2000]]))
    field = np.zeros((FIELD, FIELD, 2), np.float32)
    blank = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8)
    gate = np.ones((CANVAS_PX, CANVAS_PX), np.float32)
    assert Compositor(canvas)(frame, alignment, field, field, blank, gate) is None


def test_large_faces_are_read_without_aliasing(canvas: FaceCanvas) -> None:
    stripes = np.zeros((1600, 1600, 3), np.uint8)
    stripes[:, ::2] = 255
    landmarks = face(canvas, scale=6.0, angle=0.0, shift=(700, 100))
    alignment = canvas.align(landmarks)
    texture = canvas.texture(stripes, canvas.field(landmarks, alignment), alignment)
    assert np.abs(texture.astype(int) - 127).mean() < 20
