"""The official alignment and compositing against the golden case ``face_alignment``."""

from __future__ import annotations

from functools import cache
from importlib import resources

import numpy as np
import pytest

from golden_model import vectors
from lipstream.faces.mouth_mask import MouthMask
from lipstream.faces.official import (
    CROP_HEIGHT,
    CROP_WIDTH,
    TEMPLATE,
    Aligned,
    OfficialAligner,
    anchor_similarity,
    anchors_from_106,
    anchors_from_mesh,
    mesh_anchors,
    official_crop,
    squeezed,
)
from lipstream.faces.official_paste import OfficialCompositor, inverse_matrix, resized_crop, soft_border


@cache
def golden() -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in vectors("face_alignment").items()}


def aligned_frame_3() -> Aligned:
    matrix = golden()["out.matrix_fp16"][3]
    return Aligned(squeezed(official_crop(golden()["in.frame3_uint8_HWC"], matrix)), matrix)


def official() -> MouthMask:
    bits = vectors("lengths_and_masks")["out.mask_png_256_1keep_packed_bits_big_endian"].numpy()
    return MouthMask(np.unpackbits(bits, axis=1) * np.uint8(255), "official")


def generated() -> np.ndarray:
    return golden()["in.generated_512_uint8_value_over_255"].transpose(1, 2, 0).astype(np.float32) / np.float32(255)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_anchor_10_template_and_identity() -> None:
    """Spec section 10: template, crop size, and landmarks on the template give the identity with no bias."""
    np.testing.assert_allclose(TEMPLATE, [(95.2, 112), (324.8, 112), (210, 224)])
    np.testing.assert_allclose(TEMPLATE, golden()["out.template"])
    assert golden()["out.box_x1y1x2y2"].tolist() == [0, 0, CROP_WIDTH, CROP_HEIGHT] == [0, 0, 420, 560]
    matrix, bias = anchor_similarity(TEMPLATE)
    np.testing.assert_allclose(matrix, np.eye(2, 3), atol=1e-12)
    np.testing.assert_allclose(bias, 0, atol=1e-12)


def test_anchors_matrices_and_smoothing() -> None:
    data, bias = golden(), None
    for index, landmarks in enumerate(data["in.landmarks_106"]):
        anchors = anchors_from_106(landmarks)
        np.testing.assert_array_equal(anchors, data["out.anchors_rounded"][index])
        alone, own_bias = anchor_similarity(anchors)
        alone[:, 2] -= own_bias
        assert relative(alone, data["out.matrix_fp32_without_smoothing"][index]) <= 1e-5
        matrix, bias = anchor_similarity(anchors, bias)
        assert relative(matrix, data["out.matrix_fp32"][index]) <= 1e-5
        np.testing.assert_allclose(bias, data["out.smoothing_state"][index], atol=1e-6)
        np.testing.assert_array_equal(matrix.astype(np.float16), data["out.matrix_fp16"][index])


def test_aligner_carries_its_state() -> None:
    data, aligner = golden(), OfficialAligner()
    frame = data["in.frame3_uint8_HWC"]
    anchors = [anchors_from_106(landmarks) for landmarks in data["in.landmarks_106"]]
    for index in range(3):
        saved = aligner.snapshot()
        np.testing.assert_array_equal(aligner.step(frame, anchors[index]).matrix, data["out.matrix_fp16"][index])
    other = OfficialAligner()
    other.restore(saved)
    np.testing.assert_array_equal(other.step(frame, anchors[2]).matrix, data["out.matrix_fp16"][2])
    aligner.reset()
    np.testing.assert_array_equal(aligner.step(frame, anchors[0]).matrix, data["out.matrix_fp16"][0])


def test_crop_is_exact() -> None:
    data = golden()
    crop = official_crop(data["in.frame3_uint8_HWC"], data["out.matrix_fp16"][3])
    assert crop.shape == (560, 420, 3)
    np.testing.assert_array_equal(crop[::2, ::2], data["out.frame3.crop_560x420_uint8_every2"])
    picture = aligned_frame_3().picture
    np.testing.assert_array_equal(picture[::4, ::4].transpose(2, 0, 1), data["out.frame3.aligned_512_uint8_every4"])


def test_paste_back_step_by_step() -> None:
    data = golden()
    inverse = inverse_matrix(data["out.matrix_fp16"][3])
    assert relative(inverse, data["out.composite.inverse_matrix_fp32"][0]) <= 1e-6
    border = soft_border(inverse, 232, 300)
    got = (border.area, border.edge_px, border.blur_px, border.sigma)
    np.testing.assert_allclose(got, data["out.composite.area_edge_blur_sigma"], rtol=1e-6)
    np.testing.assert_allclose(border.weight[::4, ::4], data["out.composite.soft_mask_every4"], atol=1e-5)
    np.testing.assert_allclose(border.cover[::4, ::4], data["out.composite.warped_ones_eroded_every4"], atol=2e-4)
    keep = official().blend_keep()[..., None]
    face = generated() * (1 - keep) + aligned_frame_3().picture.astype(np.float32) / np.float32(255) * keep
    crop = resized_crop(face)[0, :, ::16, ::16].numpy()
    np.testing.assert_allclose(crop, data["out.composite.resized_crop_minus1_1_every16"], atol=1e-5)


@pytest.mark.parametrize(("key", "step"), [("mouth_only_uint8", 1), ("full_face_uint8_every2", 2)])
def test_composite_is_within_one_level(key: str, step: int) -> None:
    data = golden()
    compositor = OfficialCompositor(official() if key.startswith("mouth") else None)
    out = compositor(data["in.frame3_uint8_HWC"], generated(), aligned_frame_3())
    difference = np.abs(out[::step, ::step].astype(int) - data[f"out.composite.{key}"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-4  # a truncated value that stood on the step


def test_mesh_anchors() -> None:
    """On the mean face: brows level and symmetric, nose in the middle below; rounded as the reference rounds."""
    with resources.files("lipstream").joinpath("assets/faces/canvas.npz").open("rb") as file:
        face = np.load(file)["crop_points"].astype(np.float64)
    left, right, nose = mesh_anchors(face)
    assert left[0] < nose[0] < right[0] and left[1] == pytest.approx(right[1], abs=0.5)
    assert nose[0] == pytest.approx((left[0] + right[0]) / 2, abs=0.5) and nose[1] > left[1] + 20
    points = np.random.default_rng(0).normal(size=(468, 3)) * 100
    rounded = anchors_from_mesh(points)
    assert np.abs(rounded - mesh_anchors(points)).max() <= 1.0
    np.testing.assert_array_equal(rounded, np.round(rounded))


def test_wrong_landmarks_are_named() -> None:
    with pytest.raises(ValueError, match="106"):
        anchors_from_106(np.zeros((68, 2)))
    with pytest.raises(ValueError, match="468"):
        anchors_from_mesh(np.zeros((106, 2)))
