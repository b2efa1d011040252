"""The mouth mask: the official raster's three readings, our own drawing of it, and the check of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from golden_model import vectors
from lipstream.faces import mouth_mask as module
from lipstream.faces.mouth_mask import MouthMask, built_in_mask, mouth_mask, official_mask


def golden_raster() -> np.ndarray:
    bits = vectors("lengths_and_masks")["out.mask_png_256_1keep_packed_bits_big_endian"].numpy()
    return np.unpackbits(bits, axis=1) * np.uint8(255)


@pytest.fixture(scope="module")
def official() -> MouthMask:
    return MouthMask(golden_raster(), "official")


def test_readings_are_the_references(official: MouthMask) -> None:
    data = vectors("lengths_and_masks")
    for cells in (64, 32):
        np.testing.assert_array_equal(
            1 - official.latent_regenerate(cells, cells), data[f"out.latent_mask_{cells}_1keep"].numpy()
        )
    packed = data["out.pixel_mask_512_1keep_packed_bits_big_endian"].numpy()
    np.testing.assert_array_equal(official.pixel_keep(512), np.unpackbits(packed, axis=1))
    blend = vectors("face_alignment")["out.mask_512_uint8_value_over_255_every2"].numpy()
    np.testing.assert_array_equal(official.blend_keep(512)[::2, ::2], blend.astype(np.float32) / np.float32(255))
    assert len(np.unique(official.blend_keep(512))) == 136


def test_anchor_7_and_polarity(official: MouthMask) -> None:
    """Spec section 10: 1680 latent cells, 40.7 % of the pixels, rows 24-60, columns 2-61; 1 = regenerate."""
    cells = official.latent_regenerate(64, 64)
    assert cells.sum() == 1680
    rows, columns = np.nonzero(cells)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 60, 2, 61)
    assert (official.keep == 0).mean() == pytest.approx(0.407, abs=5e-4)
    assert cells[45, 32] == 1 and official.pixel_keep(512)[360, 256] == 0  # the mouth
    assert cells[5, 32] == 0 and official.pixel_keep(512)[40, 256] == 1  # the forehead


def test_built_in_mask_has_the_same_geometry(official: MouthMask) -> None:
    ours = built_in_mask()
    mine, theirs = ours.keep == 0, official.keep == 0
    assert ours.name == "built-in"
    assert (mine & theirs).sum() / (mine | theirs).sum() > 0.988
    assert (ours.latent_regenerate(64, 64) != official.latent_regenerate(64, 64)).sum() == 18
    rows, columns = np.nonzero(mine)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (95, 242, 9, 247)


def test_masked_pixels_are_zero_after_normalisation() -> None:
    data = vectors("lengths_and_masks")
    frames = data["in.frames_uint8"].numpy().astype(np.float32) / np.float32(255) * 2 - 1
    np.testing.assert_allclose(frames.transpose(3, 0, 1, 2)[None], data["out.frames_minus1_1"], atol=1e-7)
    masked = frames * data["in.small_mask_1keep"].numpy()[None, :, :, None]
    np.testing.assert_allclose(masked.transpose(3, 0, 1, 2)[None], data["out.masked_frames_minus1_1"], atol=1e-7)


def test_feather_never_leaves_the_mask(official: MouthMask) -> None:
    feather, keep = official.feather(28), official.pixel_keep(512)
    near = cv2.dilate(keep, np.ones((3, 3), np.uint8))  # a bilinear reading at a kept pixel reaches its neighbours
    assert feather[near > 0].max() == 0
    assert feather[360, 256] == 1 and 0.2 < (feather > 0.5).mean() < 0.4
    assert np.abs(np.diff(feather, axis=0)).max() < 0.1


def test_official_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"mask\.png.*built-in mask explicitly"):
        official_mask(tmp_path / "mask.png")
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(golden_raster(), cv2.COLOR_GRAY2RGB))
    assert ok
    path, data = tmp_path / "mask.png", encoded.tobytes()
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=r"not the official mask: \d+ bytes.*1871 bytes, aa233251b9ff5691"):
        mouth_mask(path)
    path.write_bytes(data)
    # OpenCV 5.0 writes the picture to the very bytes of the official file, so this is the real check. Another zlib may
    # pack it differently; then the same way is walked under that file's own size and hash.
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(module.OFFICIAL_SHA256_PREFIX):
        monkeypatch.setattr(module, "OFFICIAL_BYTES", len(data))
        monkeypatch.setattr(module, "OFFICIAL_SHA256_PREFIX", digest[:16])
    mask = mouth_mask(path)
    assert mask.name == "official"
    np.testing.assert_array_equal(mask.keep, golden_raster())
    assert mouth_mask("built-in").name == "built-in"


def test_a_mask_is_black_and_white() -> None:
    with pytest.raises(ValueError, match="256 x 256"):
        MouthMask(np.zeros((128, 128), np.uint8), "mine")
    with pytest.raises(ValueError, match="0 and 255"):
        MouthMask(np.full((256, 256), 7, np.uint8), "mine")
