"""The network against the reference's numbers, its released shapes, and its options."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from golden_model import (
    assert_close,
    golden_conditions,
    golden_model,
    random_conditions,
    random_model,
    vectors,
)
from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES, DIFFUSERS
from lipstream.models.attention import attention
from lipstream.models.dit import FLAVOURS, Conditions, DiT, DiTConfig, chunk_causal_frame_mask, window_frame_positions
from lipstream.models.rope import split_axes

TEST = FLAVOURS["test"]


@pytest.mark.parametrize("run", [0, 1, 2])
def test_bidirectional_golden(run: int) -> None:
    model, data = golden_model(), vectors("dit_bidirectional")
    got = model.predict(data["in.x_t"], data[f"in.run{run}.t"], golden_conditions(data, model))
    assert_close(got.velocity, data[f"out.run{run}.velocity"], 2e-5)
    assert_close(got.x0, data[f"out.run{run}.x0"], 2e-5)


def test_parity_with_diffusers_on_random_weights() -> None:
    """The bidirectional network without its audio, against `WanTransformer3DModel`: goal 1e-4 in float32."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=65, out_channels=16, text_dim=64, freq_dim=256,
        ffn_dim=128, num_layers=2,
    ).eval().requires_grad_(False)  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    config = DiTConfig(dim=256, ffn_dim=128, num_heads=2, num_layers=2, text_dim=64, audio_dim=8, audio_blocks=(0, 0))
    ours = random_model(config)
    state = {str(DIFFUSERS.to_ours(key)): value for key, value in theirs.state_dict().items()}
    state |= {name: torch.zeros_like(x) for name, x in ours.state_dict().items() if name.startswith(AUDIO_PREFIXES)}
    ours.load_state_dict(state, strict=True)
    x, conditions = torch.randn(1, 16, 3, 8, 12), random_conditions(config, 1, 3, 8, 12)
    parts = (x, conditions.reference, conditions.mask, conditions.masked_video, conditions.ref_sequence)
    joined = torch.cat([part.expand(-1, -1, 3, -1, -1) for part in parts], dim=1)  # type: ignore[union-attr]
    expected = theirs(joined, torch.tensor([250.0]), conditions.text, return_dict=False)[0]
    got = ours.predict(x, torch.tensor([0.25], dtype=torch.float64), conditions).velocity
    assert expected.std() > 0.1 and (got - expected).abs().max() <= 1e-4


def test_null_audio_golden_and_none_is_silence() -> None:
    model, data = golden_model(), vectors("dit_bidirectional")
    conditions = golden_conditions(data, model)
    t = data["in.run0.t"]
    zero = dataclasses.replace(conditions, audio=model.pack_audio(torch.zeros_like(data["in.audio_emb"])))
    got = model.predict(data["in.x_t"], t, zero).velocity
    assert_close(got, data["out.zero_audio.velocity"], 2e-5)
    none = dataclasses.replace(conditions, audio=None)
    assert torch.equal(model.predict(data["in.x_t"], t, none).velocity, got)


def test_teachers_rounded_timestep_golden() -> None:
    model, data = golden_model(), vectors("dit_bidirectional")
    t = data["in.teacher_sampler.timestep_rounded_to_bf16"].double() / 1000
    got = model.predict(data["in.x_t"], t, golden_conditions(data, model)).velocity
    assert_close(got, data["out.teacher_sampler_rounded_timestep.velocity"], 2e-5)


@pytest.mark.parametrize("name", ["full_causal", "window7_sink1", "window4_sink1"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_diffusion_forcing_golden(name: str, dynamic: bool) -> None:
    if dynamic and name == "full_causal":
        pytest.skip("an unlimited window has absolute positions")
    model, data = golden_model(), vectors("dit_causal_rollout")
    window = None if name == "full_causal" else int(name[6])
    conditions = golden_conditions(data, model).slice(slice(0, 9))
    got = model.predict(
        data["in.df.x_t"],
        data["in.df.t"],
        conditions,
        frame_mask=chunk_causal_frame_mask(9, 3, window, 0 if window is None else 1),
        frame_positions=window_frame_positions(9, 3, window, 1) if dynamic and window else None,
    )
    expected = data[f"out.df.{name}{'_dynamic_rope' if dynamic else ''}.velocity"]
    assert_close(got.velocity, expected, 5e-5)


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("1.3b", 857, 1421383840), ("14b", 1137, 14294081696)])
def test_released_sizes(name: str, tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = DiT(FLAVOURS[name])
    state = model.state_dict()
    assert len(state) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(key.startswith("blocks.7.") for key in state) == 27
    dim = FLAVOURS[name].dim
    assert state["patch_embedding.weight"].shape == (dim, 65, 1, 2, 2)
    assert state["audio_proj.proj.weight"].shape == (32, 43008)
    assert state["head.head.weight"].shape == (64, dim)
    assert split_axes(FLAVOURS[name].head_dim) == (44, 42, 42)


def test_pocket_has_no_text() -> None:
    with torch.device("meta"):
        model = DiT(FLAVOURS["pocket"])
    assert not [key for key in model.state_dict() if "text" in key or "cross_attn" in key or "norm3" in key]


def test_config_survives_json() -> None:
    config = dataclasses.replace(TEST, active_tokens=((True, False), (True, True)))
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("masked", [False, True])
def test_tiled_attention_equals_sdpa(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 700, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    mask = torch.rand(2, 1, 700, 40) > 0.3 if masked else None
    tiled = attention(q, k, v, mask, backend="tiled")
    torch.testing.assert_close(tiled, attention(q, k, v, mask, backend="sdpa"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="warp"):
        attention(q, k, v, backend="warp")  # type: ignore[arg-type]


def pocket_like(**changes: object) -> DiTConfig:
    """A tiny network with the pocket's options."""
    changes = {"prediction": "reference_residual", "text_dim": 0} | changes
    return dataclasses.replace(TEST, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", ["velocity", "x0", "reference_residual"])
def test_all_tokens_active_equals_full(prediction: str) -> None:
    config = pocket_like(prediction=prediction)
    conditions = random_conditions(config, 2, 3, 6, 8)
    x, t = torch.randn(2, 4, 3, 6, 8), torch.tensor([0.999, 0.3], dtype=torch.float64)
    full = random_model(config)
    sparse = random_model(dataclasses.replace(config, active_tokens=((True,) * 4,) * 3))
    ours, theirs = sparse.predict(x, t, conditions), full.predict(x, t, conditions)
    torch.testing.assert_close(ours.x0, theirs.x0)
    torch.testing.assert_close(ours.velocity, theirs.velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "reference_residual"])
def test_inactive_tokens_come_from_the_conditions(prediction: str) -> None:
    active = ((False,) * 4, (False, True, True, False), (True,) * 4)
    config = pocket_like(prediction=prediction, active_tokens=active)
    model, conditions = random_model(config), random_conditions(config, 1, 3, 6, 8)
    x, t = torch.randn(1, 4, 3, 6, 8), torch.tensor([0.7], dtype=torch.float64)
    x0 = model(x, t, conditions)
    kept = conditions.ref_sequence if prediction == "reference_residual" else conditions.masked_video
    inactive = ~torch.tensor(active).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(x0[..., inactive], kept[..., inactive])
    assert not torch.isclose(x0[..., ~inactive], kept[..., ~inactive]).any()
    # What inactive cells contain is not even read, and positions are the original ones.
    changed = x.clone()
    changed[..., inactive] = 9
    torch.testing.assert_close(model(changed, t, conditions)[..., ~inactive], x0[..., ~inactive])
    with pytest.raises(ValueError, match="active_tokens"):
        model(torch.randn(1, 4, 3, 8, 8), t, random_conditions(config, 1, 3, 8, 8))


def test_input_gate_scales_only_the_noise() -> None:
    gated, plain = random_model(pocket_like(input_gate=True)), random_model(pocket_like())
    conditions = random_conditions(plain.config, 1, 3, 4, 4)
    x = torch.randn(1, 4, 3, 4, 4)
    clean = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(gated(x, clean, conditions), plain(x, clean, conditions))
    t = torch.full((1,), 0.8, dtype=torch.float64)
    scaled = x * 0.2 / (0.2**2 + 0.8**2) ** 0.5
    torch.testing.assert_close(gated(x, t, conditions), plain(scaled, t, conditions))


def test_velocity_and_x0_views_agree() -> None:
    for prediction in ("velocity", "x0", "reference_residual"):
        config = pocket_like(prediction=prediction)
        model, conditions = random_model(config), random_conditions(config, 1, 3, 4, 4)
        x, t = torch.randn(1, 4, 3, 4, 4), torch.full((1, 3), 0.6, dtype=torch.float64)
        got = model.predict(x, t, conditions)
        torch.testing.assert_close(got.x0, x - 0.6 * got.velocity, rtol=1e-4, atol=1e-5)


def test_bad_calls_name_the_value() -> None:
    model = random_model(TEST)
    conditions = random_conditions(TEST, 1, 3, 4, 4)
    x, t = torch.randn(1, 4, 3, 4, 4), torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="text"):
        model(x, t, dataclasses.replace(conditions, text=None))
    with pytest.raises(ValueError, match="5 x 4"):
        model(torch.randn(1, 4, 3, 5, 4), t, random_conditions(TEST, 1, 3, 5, 4))
    with pytest.raises(ValueError, match="2 latent frames"):
        model(x[:, :, :2], t, conditions)
    with pytest.raises(ValueError, match="no_grad"):
        model(x, t, conditions, cache=model.make_cache(1, 4, 4), store=True)


def test_conditions_slice() -> None:
    conditions = random_conditions(TEST, 1, 7, 4, 4)
    part = conditions.slice(slice(3, 6))
    assert isinstance(part, Conditions) and part.latent_frames == 3
    assert part.audio is not None and conditions.audio is not None
    assert torch.equal(part.audio, conditions.audio[:, 3:6]) and part.text is conditions.text
