"""The pocket codec: linear codes invert, groups stream, the sliding encoder equals the plain one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipstream.checkpoints.networks import load_codec, save_codec
from lipstream.models.codec import LinearCode
from lipstream.training.samples import Clip
from tiny import tiny_codec


def frames(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(1, count, 20, 20, 2, generator=generator)
    return fields, torch.rand(1, count, 3, 160, 160, generator=generator)


def test_linear_code_inverts_what_lies_in_its_span() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3))[0]
    rows = torch.randn(200, 3) * torch.tensor([3.0, 2.0, 1.0]) @ basis.T + 5
    code = LinearCode(12, 3)
    kept = code.fit(rows)
    assert kept == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(code.decode(code.encode(rows)), rows, atol=1e-4, rtol=0)
    # Neither whitened nor raw: the codes' spread is the square root of the data's, with mean variance one.
    spread = code.encode(rows).std(0)
    assert spread[0] > spread[1] > spread[2]
    assert spread.square().mean() == pytest.approx(1.0, rel=0.02)


@given(cuts=st.lists(st.integers(1, 2), min_size=0, max_size=4))
def test_any_chunking_equals_one_shot(cuts: list[int]) -> None:
    codec = tiny_codec()
    total = 1 + 4 * sum(cuts)
    fields, textures = frames(max(total, 5))
    fields, textures = fields[:, :total], textures[:, :total]
    with torch.no_grad():
        whole_z = codec.encode(fields, textures)
        whole = codec.decode(whole_z, whole_z, textures)
        stream = codec.stream_view(1)
        parts, start = [], 0
        for size in [1, *(4 * c for c in cuts)]:
            piece = slice(start, start + size)
            z = stream.encode(fields[:, piece], textures[:, piece])
            parts.append((z, stream.decode(z, z, textures[:, piece])))
            start += size
    torch.testing.assert_close(torch.cat([z for z, _ in parts], 2), whole_z)
    for i, name in enumerate(("fields", "paint", "gate")):
        joined = torch.cat([decoded[i] for _, decoded in parts], 1)
        torch.testing.assert_close(joined, whole[i], msg=name)


def test_streams_do_not_share_state() -> None:
    codec = tiny_codec()
    fields, textures = frames(9)
    first, second = codec.stream_view(1), codec.stream_view(1)
    first.encode(fields[:, :1], textures[:, :1])
    torch.testing.assert_close(
        second.encode(fields[:, :5], textures[:, :5]), codec.encode(fields[:, :5], textures[:, :5])
    )
    assert codec.state is None
    assert first.painter.head.weight is codec.painter.head.weight  # weights are shared, not copied


@pytest.mark.parametrize("count", [0, 2, 4])
def test_refuses_frames_that_make_no_whole_latents(count: int) -> None:
    fields, textures = frames(5)
    with pytest.raises(ValueError, match="pixel frames"):
        tiny_codec().encode(fields[:, :count], textures[:, :count])


def test_sliding_encoder_equals_groups() -> None:
    codec = tiny_codec()
    fields, textures = frames(7)
    moving, still = codec.encode_sliding(fields[0], textures[0])
    assert moving.shape[0] == 4 and still.shape[0] == 7
    torch.testing.assert_close(moving[2:3], codec.encode_groups(fields[:, 2:6], textures[:, 2:6]), atol=1e-4, rtol=1e-4)
    same = (q[:, 3:4].expand(-1, 4, *q.shape[2:]) for q in (fields, textures))
    torch.testing.assert_close(still[3:4], codec.encode_groups(*same), atol=1e-4, rtol=1e-4)


def test_gate_is_closed_at_the_border_of_the_paint_box() -> None:
    codec = tiny_codec()
    fields, textures = frames(5)
    z = codec.encode(fields, textures)
    gate = codec.decode(z, z, textures).gate
    border = torch.cat([gate[..., 0, :], gate[..., -1, :], gate[..., :, 0], gate[..., :, -1]], -1)
    assert border.max() < 0.01 < gate.max()


def test_files_round_trip_and_refuse_another_shape(tmp_path: Path) -> None:
    codec = tiny_codec()
    save_codec(codec, tmp_path / "codec.safetensors")
    again = load_codec(tmp_path / "codec.safetensors")
    assert again.config == codec.config
    torch.testing.assert_close(
        again.texture.basis, codec.texture.basis, atol=1e-3, rtol=1e-2
    )  # stored in half precision
    with pytest.raises(ValueError, match="no such weights file"):
        load_codec(tmp_path / "missing.safetensors")


def test_movements_are_kept_to_the_manifold_and_texture_is_left_alone() -> None:
    codec = tiny_codec()
    codec.manifold.copy_(torch.linalg.qr(torch.randn(codec.manifold.shape[1], codec.manifold.shape[0]))[0].T)
    z, shape = torch.randn(3, codec.config.latent_channels, 10, 10), codec.config.shape_channels
    once = codec.as_mouths_move(z)
    torch.testing.assert_close(codec.as_mouths_move(once), once, atol=1e-4, rtol=1e-4)
    assert torch.equal(once[:, shape:], z[:, shape:])
    assert once[:, :shape].norm() < 0.8 * z[:, :shape].norm()


def test_the_manifold_is_found_in_clips() -> None:
    from lipstream.training.codec import fit_manifold

    codec, rng = tiny_codec(), np.random.default_rng(0)
    directions = rng.normal(size=(3, 20, 20, 2))
    clips = []
    for _ in range(4):
        weights = np.repeat(rng.normal(size=(10, 3)), 4, 0)
        fields = (rng.normal(size=(1, 20, 20, 2)) + np.einsum("fk,kyxd->fyxd", weights, directions)).astype(np.float16)
        empty = np.zeros((40, 1, 1, 3), np.uint8)
        clips.append(Clip("synth_0", fields, empty, np.ones(40, bool), np.zeros(1, np.int16)))
    assert fit_manifold(codec, clips) > 0.999
    identity = codec.manifold @ codec.manifold.T
    torch.testing.assert_close(identity, torch.eye(len(identity)), atol=1e-4, rtol=0)
