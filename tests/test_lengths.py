"""Length arithmetic against the golden table, and against the clock that cuts chunks."""

from __future__ import annotations

import pytest
import torch

from golden_model import vectors
from lipstream.diffusion.lengths import (
    audio_rows_of,
    latent_frames_covering,
    official_length,
    pixel_frames_of,
    whole_latent_frames,
)
from lipstream.diffusion.official_noise import OfficialNoise
from lipstream.media.timeline import bounce_index, chunk_plan, chunk_start
from lipstream.models.audio_pack import AudioPack


def test_golden_length_table() -> None:
    data = vectors("lengths_and_masks")
    differing = 0
    for samples, frames, exact, latents, pixels in data[
        "out.length_table_samples_framesFloat_framesExact_latents_videoframes"
    ].tolist():
        length = official_length(samples, float_seconds=True)
        assert (length.latent_frames, length.pixel_frames) == (latents, pixels)
        assert int(samples / 16_000 * 25) == frames and samples // 640 == exact
        differing += frames != exact
    assert differing == 1  # 18,560 samples: exactly 29 frames, 28 in floating point
    floor = official_length(16_000, min_latent_frames=20)
    assert list(floor) == data["out.length_min_latent_frames_20_for_1s"].tolist()[::-1]
    assert floor.chunks == 6


def test_float_quirk_matters_where_a_chunk_hangs_on_it() -> None:
    """21 frames are two chunks; 13,440 samples are 21 frames, whatever floating point says."""
    quirky = [n for n in range(1, 4000) if int(n * 640 / 16_000 * 25) != n]
    assert 29 in quirky
    for frames in quirky:
        assert (
            official_length(frames * 640).pixel_frames >= official_length(frames * 640, float_seconds=True).pixel_frames
        )
    assert any(official_length(n * 640) != official_length(n * 640, float_seconds=True) for n in quirky)


@pytest.mark.parametrize(("seconds", "latents", "pixels"), [(3.24, 21, 81), (4.0, 24, 93), (0.2, 3, 9)])
def test_anchor_8(seconds: float, latents: int, pixels: int) -> None:
    """Spec section 10."""
    assert official_length(round(seconds * 16_000)) == (pixels, latents)


def test_anchor_9_and_golden_ping_pong() -> None:
    assert [bounce_index(i, 4) for i in range(10)] == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    for key, expected in vectors("lengths_and_masks").items():
        if key.startswith("out.ping_pong_n"):
            frames = int(key.removeprefix("out.ping_pong_n").split("_")[0])
            assert [bounce_index(i, frames) for i in range(len(expected))] == expected.tolist()


def test_whole_chunks_agree_with_the_clock() -> None:
    for pixel_frames in range(1, 200):
        spans = chunk_plan(pixel_frames)
        assert latent_frames_covering(pixel_frames) == 3 * len(spans)
        assert pixel_frames_of(3 * len(spans)) == spans[-1].stop == chunk_start(len(spans))
        assert whole_latent_frames(pixel_frames) <= latent_frames_covering(pixel_frames)
    assert [pixel_frames_of(whole_latent_frames(f)) for f in (1, 4, 5, 81)] == [1, 1, 5, 81]


def test_audio_rows_are_those_of_the_audio_pack() -> None:
    """Anchor 5: the rows named here are the rows that the pack joins."""
    rows = torch.arange(81, dtype=torch.float32)[None, :, None]
    pack = AudioPack(1, 4)
    groups: list[torch.Tensor] = []
    pack.join = lambda grouped: groups.append(grouped) or grouped  # type: ignore[method-assign, func-returns-value]
    pack(rows)
    named = [list(audio_rows_of(k)) for k in range(21)]
    assert groups[0][0, :, :, 0].int().tolist() == named
    assert named[0] == [0] * 4 and named[1] == [1, 2, 3, 4] and named[20] == [77, 78, 79, 80]


def test_pixel_rule() -> None:
    table = torch.arange(256, dtype=torch.uint8).float() / 255 * 2 - 1
    torch.testing.assert_close(table, vectors("lengths_and_masks")["out.uint8_to_unit_range_table"], atol=1e-7, rtol=0)


def test_official_noise_is_one_draw_for_the_clip_then_one_per_chunk() -> None:
    shape = (1, 4, 6, 2, 2)
    generator = torch.Generator().manual_seed(42)
    clip = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    renoise = [torch.randn((1, 4, 3, 2, 2), generator=generator, dtype=torch.bfloat16) for _ in range(2)]
    noise = OfficialNoise(shape, dtype=torch.bfloat16, device="cpu")
    for chunk in range(2):
        draw = noise(chunk)
        assert torch.equal(draw(0), clip[:, :, 3 * chunk : 3 * chunk + 3])
        assert torch.equal(draw(1), renoise[chunk])
    with pytest.raises(ValueError, match="in order"):
        noise(0)(1)
    with pytest.raises(ValueError, match="beyond"):
        noise(2)


def test_impossible_lengths_are_refused() -> None:
    for wrong in (lambda: pixel_frames_of(0), lambda: whole_latent_frames(0), lambda: official_length(-1)):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError, match="from 0"):
        audio_rows_of(-1)
