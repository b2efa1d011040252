"""The chunk rollout: golden numbers, window arithmetic, cache protocol, gradients, guidance and snapshots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_model import (
    assert_close,
    golden_conditions,
    golden_model,
    random_conditions,
    random_model,
    vectors,
)
from lipstream.diffusion import Rollout
from lipstream.models.dit import FLAVOURS, Conditions, DiT, chunk_causal_frame_mask
from lipstream.models.rope import grid_rotation, rotate
from lipstream.streaming import KVCache
from lipstream.training.defect import ForgetfulCache
from lipstream.training.parallel import recompute_blocks

TEST = FLAVOURS["test"]


def stored_noise(data: dict[str, Tensor], scale: float = 1.0) -> Any:
    """The reference's noise: call 0 from one draw for the clip, call 1 from one draw per chunk."""

    def source(chunk: int) -> Any:
        first = data["in.noise"][:, :, 3 * chunk : 3 * chunk + 3] * scale
        return lambda call: first if call == 0 else data["in.renoise"][chunk]

    return source


def run(rollout: Rollout, conditions: Conditions, chunks: int, **options: Any) -> Tensor:
    """x0 of the first chunks."""
    parts = [rollout.step(conditions.slice(slice(start, start + 3)), **options) for start in range(0, 3 * chunks, 3)]
    return torch.cat(parts, dim=2)


def golden_rollout(scale: float = 1.0, **cache: Any) -> tuple[Rollout, Conditions]:
    model, data = golden_model(), vectors("dit_causal_rollout")
    rollout = Rollout(
        model, height=8, width=12, noise=stored_noise(data, scale), cache=model.make_cache(1, 8, 12, **cache)
    )
    return rollout, golden_conditions(data, model)


@torch.no_grad()
def test_golden_rollout_and_cache_contents() -> None:
    data = vectors("dit_causal_rollout")
    rollout, conditions = golden_rollout()
    frames = [(0, 1, 2), tuple(range(6)), (0, *range(3, 9)), (0, *range(6, 12)), (0, *range(9, 15))]
    for chunk in range(5):
        x0 = rollout.step(conditions.slice(slice(3 * chunk, 3 * chunk + 3)))
        assert_close(x0, data["out.sink1_window7.x0_all"][:, :, 3 * chunk : 3 * chunk + 3], 5e-5)
        rollout.commit()
        for layer in range(6):
            held, *pair = rollout.cache.held(layer)
            assert held == frames[chunk]
            expected = data[f"out.sink1_window7.chunk{chunk}.cache_fingerprint"][layer]
            for kind, tensor in enumerate(pair):
                slots = tensor.unflatten(2, (len(held), 24)).movedim(2, 0).flatten(1)
                got = torch.stack((slots.mean(1), slots.abs().mean(1)), dim=1)
                torch.testing.assert_close(got, expected[kind, : len(held)], rtol=1e-4, atol=2e-6)
        if chunk == 3:
            keys = rollout.cache.held(1)[1].transpose(1, 2)[:, ::6]
            assert_close(keys, data["out.sink1_window7.chunk3.cache_k_layer1"], 5e-5)


@torch.no_grad()
def test_golden_single_calls() -> None:
    data = vectors("dit_causal_rollout")
    rollout, conditions = golden_rollout()
    run(rollout, conditions, 2)
    rollout.commit()
    part, noise = conditions.slice(slice(6, 9)), data["in.noise"][:, :, 6:9]
    time = torch.tensor([0.999], dtype=torch.float64)
    first = rollout.model(noise, time, part, cache=rollout.cache)
    assert_close(first, data["out.sink1_window7.chunk2.call1.x0"], 5e-5)
    rollout.model(torch.randn_like(noise), time, part, cache=rollout.cache)  # scratch of a call is not history
    assert torch.equal(rollout.model(noise, time, part, cache=rollout.cache), first)
    with torch.enable_grad():  # the differentiable path reads the same window
        torch.testing.assert_close(rollout.model(noise, time, part, cache=rollout.cache), first, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "chunks", "settings"),
    [
        ("full_attention_absolute_rope", 3, {"window_latent_frames": None, "window_positions": False}),
        ("full_attention_absolute_rope", 3, {"window_latent_frames": None}),
        ("control.window6_sink1", 5, {"window_latent_frames": 6}),
        ("control.window7_sink0", 5, {"sink_latent_frames": 0}),
        ("control.window7_sink1_absolute_rope", 5, {"window_positions": False}),
    ],
)
def test_golden_variants(name: str, chunks: int, settings: dict[str, Any]) -> None:
    data = vectors("dit_causal_rollout")
    rollout, conditions = golden_rollout(**settings)
    x0 = run(rollout, conditions, chunks)
    assert_close(x0, data[f"out.{name}.x0_all"], 5e-5)
    if name.startswith("control"):
        right = data["out.sink1_window7.x0_all"]
        difference = (x0[:, ::4] - right).abs().mean(dim=(0, 1, 3, 4))
        assert difference[6:].min() > 3e-3 and (difference[:6].max() < 1e-5 or "window7_sink1" in name)


@torch.no_grad()
def test_golden_training_style_start() -> None:
    rollout, conditions = golden_rollout(0.999)
    expected = vectors("dit_causal_rollout")["out.training_style_input_0999.x0_all"]
    assert_close(run(rollout, conditions, 5), expected, 5e-5)


@pytest.mark.parametrize("exit_call", [0, 1])
def test_golden_training_rollout_gradients(exit_call: int) -> None:
    data = vectors("dit_causal_rollout")
    rollout, _ = golden_rollout(0.999)
    model = rollout.model.requires_grad_(True)
    x0 = run(rollout, golden_conditions(data, model), 5, exit_call=exit_call)
    prefix = f"out.train_rollout.exit{exit_call}"
    assert_close(x0, data[f"{prefix}.x0_all"], 5e-5)
    loss = (x0 * data["in.train_rollout.loss_weights"]).mean()
    torch.testing.assert_close(loss, data[f"{prefix}.loss"], rtol=1e-4, atol=1e-7)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([grads[name].norm() for name in sorted(grads)])
    torch.testing.assert_close(norms, data[f"{prefix}.grad_norm.sorted"], rtol=1e-3, atol=1e-8)
    for key in (key for key in data if key.startswith(f"{prefix}.grad.")):
        assert_close(grads[key.removeprefix(f"{prefix}.grad.")], data[key], 1e-3)


@pytest.mark.parametrize("exit_call", [0, 1])
def test_golden_gradients_with_the_references_defect(exit_call: int) -> None:
    data = vectors("dit_causal_rollout")
    model = golden_model().requires_grad_(True)
    recompute_blocks(model)
    cache = model.make_cache(1, 8, 12, kind=ForgetfulCache)
    assert isinstance(cache, ForgetfulCache)
    rollout = Rollout(model, height=8, width=12, noise=stored_noise(data, 0.999), cache=cache)
    x0 = run(rollout, golden_conditions(data, model), 5, exit_call=exit_call)
    cache.forget()
    prefix = f"out.train_rollout.exit{exit_call}"
    assert_close(x0, data[f"{prefix}.x0_all"], 5e-5)
    (x0 * data["in.train_rollout.loss_weights"]).mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for key in (key for key in data if key.startswith(f"{prefix}.defect_as_in_reference.grad.")):
        name = key.rpartition(".grad.")[2]
        assert_close(grads[name], data[key], 1e-3)
        right = data.get(f"{prefix}.grad.{name}")
        assert right is None or name == "head.head.bias" or (grads[name] - right).norm() > 0.05 * right.norm()


def test_window_table() -> None:
    """Spec 2.1 and 2.2: who is seen at which temporal position."""
    cache = KVCache(layers=1, batch=1, heads=1, head_dim=8, tokens_per_latent_frame=1)
    past = {0: (), 1: (0, 1, 2), 2: (0, 3, 4, 5), 3: (0, 6, 7, 8), 4: (0, 9, 10, 11), 5: (0, 12, 13, 14)}
    for chunk, frames in past.items():
        window = cache.window(3)
        assert window.start == 3 * chunk and window.past_frames == frames
        assert window.past_positions == tuple(range(len(frames)))
        assert window.own_positions == {0: (0, 1, 2), 1: (3, 4, 5)}.get(chunk, (4, 5, 6))
        assert len(set(window.past_slots + window.own_slots)) == len(frames) + 3
        assert sorted(window.past_slots + window.own_slots) == list(range(min(7, 3 * chunk + 3)))
        cache.advance(3)
    with pytest.raises(ValueError, match="window of 7"):
        cache.window(9)


@torch.no_grad()
def test_chunked_full_attention_equals_block_causal() -> None:
    """Anchor 4, with clean passes replaced by storing each chunk's own call."""
    model = random_model(TEST)
    conditions = random_conditions(TEST, 2, 9, 4, 6)
    x = torch.randn(2, 4, 9, 4, 6)
    t = torch.tensor([[0.9], [0.4]], dtype=torch.float64).expand(2, 9)
    whole = model(x, t, conditions, frame_mask=chunk_causal_frame_mask(9, 3, None, 0))
    cache = model.make_cache(2, 4, 6, window_latent_frames=None, window_positions=False)
    parts = [
        model(x[:, :, s : s + 3], t[:, s : s + 3], conditions.slice(slice(s, s + 3)), cache=cache, store=True)
        for s in (0, 3, 6)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_chunk_windows_equal_the_cache() -> None:
    """A whole clip in one call sees exactly what the ring cache shows chunk by chunk, positions included."""
    model = random_model(TEST)
    conditions = random_conditions(TEST, 2, 15, 4, 6)
    x, t = torch.randn(2, 4, 15, 4, 6), torch.rand(2, 5, dtype=torch.float64).repeat_interleave(3, dim=1)
    whole = model(x, t, conditions, chunk_windows=True)
    cache = model.make_cache(2, 4, 6)
    parts = []
    for s in range(0, 15, 3):
        part = conditions.slice(slice(s, s + 3))
        parts.append(model(x[:, :, s : s + 3], t[:, s : s + 3], part, cache=cache, store=True))
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-5)
    masked = model(x, t, conditions, frame_mask=chunk_causal_frame_mask(15, 3, 7, 1))
    torch.testing.assert_close(masked[:, :, :6], whole[:, :, :6], rtol=1e-4, atol=1e-5)
    assert (masked[:, :, 9:] - whole[:, :, 9:]).abs().max() > 1e-4  # the distance to the sink differs


@torch.no_grad()
def test_unlimited_cache_grows() -> None:
    model = random_model(TEST)
    conditions = random_conditions(TEST, 1, 30, 2, 2)
    rollout = Rollout(
        model, height=2, width=2, cache=model.make_cache(1, 2, 2, window_latent_frames=None, window_positions=False)
    )
    run(rollout, conditions, 10)
    rollout.commit()
    assert rollout.cache.held(2)[0] == tuple(range(30))
    assert torch.isfinite(rollout.cache.held(2)[1]).all() and (rollout.cache.held(2)[1].abs().sum((1, 3)) > 0).all()


def test_rotation_is_relative() -> None:
    """Shifting all temporal positions leaves every score as it was."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8, 24), torch.randn(1, 1, 8, 24)
    scores = [
        rotate(q, grid_rotation(torch.arange(2) + s, 2, 2, 24))
        @ rotate(k, grid_rotation(torch.arange(2) + s, 2, 2, 24)).mT
        for s in (0, 5)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def seeded(model: DiT, **options: Any) -> Rollout:
    return Rollout(model, height=4, width=4, seed=7, **options)


@torch.no_grad()
def test_delayed_clean_pass_snapshot_and_reset() -> None:
    model, conditions = random_model(TEST), random_conditions(TEST, 1, 15, 4, 4)
    rollout = seeded(model)
    late = run(rollout, conditions, 5)
    eager = seeded(model)
    parts = []
    for start in range(0, 15, 3):
        parts.append(eager.step(conditions.slice(slice(start, start + 3))))
        assert eager.owes_clean_pass
        eager.commit()
        assert not eager.owes_clean_pass
    assert torch.equal(torch.cat(parts, 2), late)

    rollout.reset()
    assert torch.equal(run(rollout, conditions, 3), late[:, :, :9])  # a shorter clip has the same beginning
    saved = rollout.snapshot()
    tail = [rollout.step(conditions.slice(slice(s, s + 3))) for s in (9, 12)]
    assert torch.equal(torch.cat(tail, 2), late[:, :, 9:])
    other = seeded(model)
    other.restore(saved)
    assert torch.equal(other.step(conditions.slice(slice(9, 12))), tail[0])
    with pytest.raises(ValueError, match="snapshot"):
        Rollout(model, batch=2, height=4, width=4).restore(saved)


@torch.no_grad()
def test_guidance_uses_one_conditional_history() -> None:
    model, conditions = random_model(TEST), random_conditions(TEST, 1, 9, 4, 4)
    plain, strong = seeded(model), seeded(model, guidance=3.0)
    part = conditions.slice(slice(0, 3))
    cond, got = plain.step(part), strong.step(part)
    assert (got - cond).abs().max() > 1e-3
    # No audio at all: both branches are the null branch and guidance changes nothing.
    import dataclasses

    silent = dataclasses.replace(conditions, audio=None)
    a, b = run(seeded(model), silent, 3), run(seeded(model, guidance=3.0), silent, 3)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_call_can_have_its_own_guidance() -> None:
    model, conditions = random_model(TEST), random_conditions(TEST, 1, 9, 4, 4)
    for one, each in ((1.0, (1.0, 1.0)), (3.0, (3.0, 3.0))):
        assert torch.equal(
            run(seeded(model, guidance=one), conditions, 3), run(seeded(model, guidance=each), conditions, 3)
        )
    part = conditions.slice(slice(0, 3))
    last, plain = seeded(model, guidance=(1.0, 3.0)), seeded(model)
    assert torch.equal(last.step(part, exit_call=0), plain.step(part, exit_call=0))  # the first call has none
    last, strong = seeded(model, guidance=(1.0, 3.0)), seeded(model, guidance=3.0)
    got = last.step(part)
    assert (got - strong.step(part)).abs().max() > 1e-3 and (got - seeded(model).step(part)).abs().max() > 1e-3
    joined, apart = (seeded(model, guidance=(1.0, 3.0), join_clean_pass=join) for join in (True, False))
    torch.testing.assert_close(run(joined, conditions, 3), run(apart, conditions, 3), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="2 calls take one guidance or 2"):
        seeded(model, guidance=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="guidance 1"):
        seeded(model, guidance=(2.0, 1.0), join_clean_pass=True)


@torch.no_grad()
def test_rows_are_independent() -> None:
    model, both = random_model(TEST), random_conditions(TEST, 2, 9, 4, 4)
    noise = torch.randn(3, 2, 2, 4, 3, 4, 4)

    def rollout(rows: slice) -> Rollout:
        source = lambda chunk: lambda call: noise[chunk, call, rows]  # noqa: E731
        return Rollout(model, batch=len(range(2)[rows]), height=4, width=4, noise=source)

    together = run(rollout(slice(0, 2)), both, 3)
    one = Conditions(
        reference=both.reference[1:], mask=both.mask, masked_video=both.masked_video[1:],
        ref_sequence=both.ref_sequence[1:], audio=both.audio[1:], text=both.text[1:],
    )  # fmt: skip
    torch.testing.assert_close(run(rollout(slice(1, 2)), one, 3), together[1:], rtol=1e-4, atol=1e-5)


def test_pocket_options_in_a_rollout() -> None:
    import dataclasses

    config = dataclasses.replace(
        TEST, prediction="reference_residual", input_gate=True, text_dim=0,
        active_tokens=((False, False, False), (True, True, False), (True, True, True)),
    )  # fmt: skip
    model, conditions = random_model(config), random_conditions(config, 1, 9, 6, 6)
    with torch.inference_mode():
        x0 = run(Rollout(model, height=6, width=6), conditions, 3)
    assert torch.equal(x0[..., :2, :], conditions.ref_sequence[..., :2, :])
    model.requires_grad_(True)  # training after inference in one process: kept tables must not be inference tensors
    run(Rollout(model, height=6, width=6), conditions, 2).sum().backward()
    assert model.blocks[0].self_attn.q.weight.grad is not None
