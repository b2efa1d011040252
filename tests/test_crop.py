"""Our full-size crops: the official geometry, steadier, and nothing outside of the mask touched."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lipstream.faces.canvas import Alignment, FaceCanvas
from lipstream.faces.crop import CropAligner, CropCompositor, read_crop, squeezed_matrix
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.faces.official import CROP_HEIGHT, CROP_WIDTH, anchor_similarity, mesh_anchors
from test_canvas import picture


@pytest.fixture(scope="module")
def canvas() -> FaceCanvas:
    return FaceCanvas()


def landmarks_of(canvas: FaceCanvas, scale: float = 1.3, angle: float = 0.1) -> np.ndarray:
    """A made-up face under a similarity: the rigid points where they belong, the others spread around them."""
    points = np.random.default_rng(1).normal(size=(468, 3)) * 30
    points[canvas.rigid_ids, :2] = canvas._rigid_points
    for ids, at in (
        ((70, 63, 105, 66, 107), (-44, -36)),
        ((300, 336, 296, 334, 293), (44, -36)),
        ((102, 331), (0, 30)),
    ):
        points[list(ids), :2] = at
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points[:, :2] = points[:, :2] @ rotation.T + (200, 150)
    return points


def framing(landmarks: np.ndarray) -> np.ndarray:
    """The official crop's matrix without its quirk."""
    matrix, bias = anchor_similarity(mesh_anchors(landmarks))
    matrix[:, 2] -= bias
    return matrix


def test_geometry_is_the_official_one(canvas: FaceCanvas) -> None:
    for scale, angle in ((0.5, 0.0), (1.3, 0.2), (4.0, -0.4)):
        landmarks = landmarks_of(canvas, scale, angle)
        np.testing.assert_allclose(CropAligner(canvas).step(landmarks).matrix, framing(landmarks), atol=1e-9)


def test_squeeze_matches_opencvs_resize() -> None:
    """A crop read directly is the 420 x 560 crop resized to 512 x 512."""
    frame = cv2.GaussianBlur(picture(560, 420), (0, 0), 3)[:CROP_HEIGHT, :CROP_WIDTH]
    direct = read_crop(frame, Alignment(np.eye(2, 3)))
    resized = cv2.resize(frame, (512, 512), interpolation=cv2.INTER_CUBIC)
    assert np.abs(direct[8:-8, 8:-8].astype(int) - resized[8:-8, 8:-8]).max() <= 2
    corner = squeezed_matrix(Alignment(np.eye(2, 3))) @ (CROP_WIDTH - 0.5, CROP_HEIGHT - 0.5, 1)
    np.testing.assert_allclose(corner, (511.5, 511.5))


def test_is_steadier_than_the_anchors(canvas: FaceCanvas) -> None:
    rng, aligner = np.random.default_rng(0), CropAligner(canvas)
    ours, theirs = [], []
    for _ in range(80):
        noisy = landmarks_of(canvas) + rng.normal(size=(468, 3)) * 0.8
        ours.append(aligner.step(noisy).matrix)
        theirs.append(framing(noisy))
    ours_px, theirs_px = (np.diff(np.array(m)[30:] @ (200, 150, 1), axis=0).std() for m in (ours, theirs))
    assert ours_px < 0.7 * theirs_px


def test_framing_snapshot_restore_reset(canvas: FaceCanvas) -> None:
    rng, aligner = np.random.default_rng(0), CropAligner(canvas)
    faces = [landmarks_of(canvas) + rng.normal(size=(468, 3)) for _ in range(4)]
    first = aligner.step(faces[0]).matrix
    aligner.step(faces[1])
    saved = aligner.snapshot()
    rest = [aligner.step(face).matrix for face in faces[2:]]
    other = CropAligner(canvas)
    other.restore(saved)
    np.testing.assert_array_equal([other.step(face).matrix for face in faces[2:]], rest)
    aligner.reset()
    np.testing.assert_array_equal(aligner.step(faces[0]).matrix, first)


@pytest.mark.parametrize("scale", [0.6, 1.4, 3.5])
def test_paste_back_changes_the_mask_only_and_meets_the_rim(canvas: FaceCanvas, scale: float) -> None:
    frame = picture()
    alignment = CropAligner(canvas).step(landmarks_of(canvas, scale, 0.1))
    mask = built_in_mask()
    generated = read_crop(frame, alignment)
    inverted = 255 - generated
    patch = CropCompositor(mask)(frame, alignment, inverted)
    assert patch is not None
    x0, y0, x1, y1 = patch.box
    source = frame[y0:y1, x0:x1]
    difference = np.abs(patch.rgb.astype(int) - source).max(-1)
    assert difference.max() > 60
    assert difference[patch.alpha == 0].max(initial=0) == 0
    px, py = np.meshgrid(np.arange(x0, x1), np.arange(y0, y1))
    on_crop = np.stack([px, py, np.ones_like(px)], -1) @ squeezed_matrix(alignment).T
    near = np.clip(np.round(on_crop).astype(int), 0, 511)
    kept = mask.pixel_keep(512)[near[..., 1], near[..., 0]] > 0
    assert (patch.alpha[kept] == 0).all() and kept.any()  # not one pixel that the mask keeps
    rim = (patch.alpha > 0) & (cv2.erode(patch.alpha, np.ones((3, 3), np.uint8)) == 0)
    assert difference[rim].mean() < 12  # soft


def test_same_crop_back_is_almost_the_source(canvas: FaceCanvas) -> None:
    frame = cv2.GaussianBlur(picture(), (0, 0), 2)
    alignment = CropAligner(canvas).step(landmarks_of(canvas))
    patch = CropCompositor(built_in_mask())(frame, alignment, read_crop(frame, alignment))
    assert patch is not None
    x0, y0, x1, y1 = patch.box
    difference = np.abs(patch.rgb.astype(int) - frame[y0:y1, x0:x1])[patch.alpha > 0]
    assert difference.mean() < 0.6 and difference.max() <= 4  # two interpolations of 8-bit pixels


def test_a_face_outside_the_picture_gives_no_patch() -> None:
    alignment = Alignment(np.array([[1.0, 0, 2000], [0, 1, 2000]]))
    compositor = CropCompositor(built_in_mask())
    assert compositor(picture(), alignment, np.zeros((512, 512, 3), np.uint8)) is None
    assert (read_crop(picture(), alignment) == 127).all()
