"""The performance core: fast paths equal their slow twins, and what a chunk costs is counted, not timed.

No device waits, no shape or address that changes after the third chunk, no work that was done before: each is checked
by watching every operation that a rollout dispatches, so that the tests mean the same on any machine.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from golden_model import random_conditions, random_model
from lipstream.diffusion import Rollout
from lipstream.evaluation.costs import DiTCosts
from lipstream.models import attention as attention_module
from lipstream.models.attention import attention, available_backends, choose_backend
from lipstream.models.dit import FLAVOURS, CleanPass, Conditions, DiT
from lipstream.models.dit_text import repeated_key_bias
from lipstream.models.rope import grid_rotation, rotate, rotate_real

TEST = FLAVOURS["test"]
LONG_TEXT = dataclasses.replace(TEST, text_len=64)


def conditions_of(model: DiT, chunks: int, batch: int = 1, prompt_rows: int | None = None) -> Conditions:
    """Random conditions of a clip; rows of the text behind `prompt_rows` are zero."""
    conditions = random_conditions(model.config, batch, 3 * chunks, 4, 4)
    if prompt_rows is not None:
        assert isinstance(conditions.text, Tensor)
        conditions.text[:, prompt_rows:] = 0
    return conditions


def rollout_of(model: DiT, batch: int = 1, **options: Any) -> Rollout:
    return Rollout(model, batch=batch, height=4, width=4, seed=3, **options)


def part(conditions: Conditions, chunk: int) -> Conditions:
    return conditions.slice(slice(3 * chunk, 3 * chunk + 3))


def run(rollout: Rollout, conditions: Conditions, chunks: int) -> Tensor:
    return torch.cat([rollout.step(part(conditions, chunk)) for chunk in range(chunks)], dim=2)


# ------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masking", ["none", "boolean", "bias"])
def test_backends_agree(dtype: torch.dtype, masking: str) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = (torch.randn(2, 3, n, 16, device=device).to(dtype) for n in (700, 40, 40))
    masks = {"none": None, "boolean": torch.rand(2, 1, 700, 40) > 0.3, "bias": torch.randn(1, 1, 1, 40).to(dtype)}
    mask = masks[masking]
    mask = None if mask is None else mask.to(device)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), attn_mask=mask.double() if masking == "bias" and mask is not None else mask
    )
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    names = available_backends(device)
    assert {"sdpa", "tiled"} <= set(names)
    for name in (*names, "auto"):
        got = attention(q, k, v, mask, backend=name)
        assert got.dtype == dtype and got.shape == q.shape
        assert (got - exact).abs().max() < limit, name


def test_tiled_has_the_gradients_of_sdpa() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 600, 8, requires_grad=True) for _ in range(3)]
    grads = [
        torch.autograd.grad(attention(*inputs, backend=name).square().sum(), inputs)  # type: ignore[arg-type]
        for name in ("tiled", "sdpa")
    ]
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_flash_attention_3_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the kernel, which needs a GPU: a stand-in with its signature."""
    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
            1, 2
        ), None

    monkeypatch.setitem(
        sys.modules,
        "flash_attn_interface",
        types.SimpleNamespace(flash_attn_func=flash_attn_func),  # type: ignore[arg-type]
    )
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    torch.testing.assert_close(attention(q, k, k, backend="fa3"), attention(q, k, k, backend="sdpa"))
    assert calls == [(1, 5, 2, 8)]
    attention(q, k, k, torch.zeros(1, 1, 1, 7), backend="fa3")  # FlashAttention knows no masks: torch takes these
    assert len(calls) == 1
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # not installed
    with pytest.raises(ValueError, match="use auto"):
        attention(q, k, k, backend="fa3")


def test_auto_chooses_by_device_dtype_and_size() -> None:
    def chosen(dtype: torch.dtype, tokens: int) -> str:
        return choose_backend(torch.empty(1, 1, tokens, 8, dtype=dtype), torch.empty(1, 1, tokens, 8, dtype=dtype))

    assert chosen(torch.bfloat16, 512) == "tiled" and chosen(torch.bfloat16, 60) == "sdpa"
    assert chosen(torch.float32, 512) == "sdpa"
    assert not attention_module.has_flash3(0) or torch.cuda.is_available()


def test_complex_rotation_equals_the_real_one() -> None:
    torch.manual_seed(0)
    rotation = grid_rotation(torch.arange(3), 30, 40, 24)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0)):
        x = torch.randn(2, 3600, 4, 24).to(dtype).transpose(1, 2)
        for numbers in (x, x[:, :, :20]):  # by head and all at once
            table = rotation if numbers is x else rotation._replace(table=rotation.table[:20])
            ours, real = rotate(numbers, table), rotate_real(numbers, table)
            assert ours.dtype == dtype and (ours - real).abs().max() <= limit


# ------------------------------------------------------------- fused projections


def test_fused_projections_keep_names_numbers_and_results() -> None:
    model, x = random_model(TEST), torch.randn(1, 4, 3, 4, 4)
    conditions, t = conditions_of(model, 1), torch.tensor([0.7], dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain = model(x, t, conditions)
    model.fuse_projections()
    torch.testing.assert_close(model(x, t, conditions), plain)
    cached = model(x, t, conditions, cache=model.make_cache(1, 4, 4))
    torch.testing.assert_close(cached, plain)
    for fused in (model, copy.deepcopy(model)):
        assert fused.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in fused.state_dict().items())
        assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in random_model(TEST).parameters())
    other = random_model(TEST, seed=5)
    model.load_state_dict(other.state_dict(), strict=True)  # loading after fusing
    torch.testing.assert_close(model(x, t, conditions), other(x, t, conditions))
    missing = {name: value for name, value in state.items() if name != "blocks.1.self_attn.k.weight"}
    with pytest.raises(RuntimeError, match=r"blocks.1.self_attn"):
        model.load_state_dict(missing, strict=True)
    model.to(torch.bfloat16).to(torch.float32)
    model.load_state_dict(state)
    model.fuse_projections(False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x, t, conditions), plain)


# --------------------------------------------------------------------- text memory


@torch.no_grad()
@pytest.mark.parametrize("prompt_rows", [0, 7, 63, 64])
def test_merged_padding_is_exact(prompt_rows: int) -> None:
    model = random_model(LONG_TEXT)
    for block in model.blocks:  # rows behind the prompt must not be the same as nothing
        torch.nn.init.normal_(block.cross_attn.k.bias)
        torch.nn.init.normal_(block.cross_attn.v.bias)
    torch.nn.init.normal_(model.text_embedding[2].bias)
    conditions = conditions_of(model, 1, batch=2, prompt_rows=prompt_rows)
    assert isinstance(conditions.text, Tensor)
    if prompt_rows > 1:
        conditions.text[0, prompt_rows - 2 :] = 0  # prompts of two lengths
    x, t = torch.randn(2, 4, 3, 4, 4), torch.tensor([0.9, 0.2], dtype=torch.float64)
    whole = model(x, t, conditions)  # no cache: all 64 rows
    memory = model.prepare_text(conditions.text)
    assert memory.layers[0][0].shape[2] == min(prompt_rows + 1, 64)
    assert (memory.bias is None) == (prompt_rows >= 63)
    for merged in (conditions, dataclasses.replace(conditions, text=memory)):
        got = model(x, t, merged, cache=model.make_cache(2, 4, 4))
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
    if prompt_rows == 7:  # the test would notice a forgotten weight
        wrong = dataclasses.replace(memory, bias=torch.zeros_like(memory.bias))
        other = model(x, t, dataclasses.replace(conditions, text=wrong))
        assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 30, 505, 512])
def test_repeated_key_bias(count: int) -> None:
    assert sum(map(math.exp, repeated_key_bias(count, torch.float32))) == pytest.approx(count)
    assert sum(map(math.exp, repeated_key_bias(count, torch.bfloat16))) == pytest.approx(count, rel=1e-3)


@torch.no_grad()
def test_merged_padding_in_bfloat16_is_as_good_as_unmerged() -> None:
    exact_model = random_model(LONG_TEXT)
    model = copy.deepcopy(exact_model).bfloat16()
    conditions = conditions_of(exact_model, 1, prompt_rows=7)
    x, t = torch.randn(1, 4, 3, 4, 4), torch.tensor([0.9], dtype=torch.float64)
    exact = exact_model(x, t, conditions)
    merged = model(x, t, conditions, cache=model.make_cache(1, 4, 4))
    assert (merged - exact).abs().mean() <= 1.2 * (model(x, t, conditions) - exact).abs().mean()


# ---------------------------------------------------------------------- clean pass


@torch.no_grad()
def test_clean_pass_that_computes_only_keys_leaves_the_same_cache() -> None:
    model = random_model(TEST)
    conditions, caches = conditions_of(model, 4), [model.make_cache(1, 4, 4) for _ in range(2)]
    for chunk in range(4):
        x0, t = torch.randn(1, 4, 3, 4, 4), torch.zeros(1, dtype=torch.float64)
        model.remember(CleanPass(x0, t, part(conditions, chunk)), caches[0])
        model.predict(x0, t, part(conditions, chunk), cache=caches[1], store=True)
        for ours, full in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
            assert torch.equal(ours, full)
        assert caches[0].latent_frames == caches[1].latent_frames
    with pytest.raises(ValueError, match="2 rows"):
        model.remember(CleanPass(torch.randn(2, 4, 3, 4, 4), torch.zeros(2), part(conditions, 0)), caches[0])


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_joined_clean_pass_gives_the_same_clip(fused: bool) -> None:
    model = random_model(TEST)
    model.fuse_projections(fused)
    conditions = conditions_of(model, 6, batch=2)
    separate, joined = rollout_of(model, 2), rollout_of(model, 2, join_clean_pass=True)
    torch.testing.assert_close(run(joined, conditions, 6), run(separate, conditions, 6), rtol=1e-4, atol=1e-5)
    assert joined.owes_clean_pass
    separate.commit()
    joined.commit()
    for ours, theirs in zip(joined.cache.buffers(), separate.cache.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_joined_clean_pass_refuses_what_it_cannot_do() -> None:
    model = random_model(TEST)
    with pytest.raises(ValueError, match="guidance 1"):
        rollout_of(model, guidance=2.0, join_clean_pass=True)
    x, t = torch.randn(1, 4, 3, 4, 4), torch.zeros(1, dtype=torch.float64)
    conditions = conditions_of(model, 1)
    owed = CleanPass(x, t, conditions)
    with pytest.raises(ValueError, match="cache"):
        model(x, t, conditions, owed=owed)
    with pytest.raises(ValueError, match="no_grad"):
        model(x, t, conditions, owed=owed, cache=model.make_cache(1, 4, 4))
    with torch.no_grad(), pytest.raises(ValueError, match="very same text"):
        other = dataclasses.replace(conditions, text=torch.zeros(1, 4, 8))
        model(x, t, other, owed=owed, cache=model.make_cache(1, 4, 4))
    model.requires_grad_(True)  # training a joined rollout pays the pass alone
    rollout = rollout_of(model, join_clean_pass=True)
    run(rollout, conditions_of(model, 2), 2).sum().backward()


# ----------------------------------------------------- nothing waits, nothing changes


class Watcher(TorchDispatchMode):
    """Records (operation, shapes of its tensors) of all that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.seen.append((str(func), tuple(tuple(tensor.shape) for tensor in tensors)))
        return func(*args, **(kwargs or {}))


#: Operations whose result the host has to read, and (lift_fresh) host data that would have to be sent to a device.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "masked_select", "unique", "lift_fresh")


def watched_chunk(rollout: Rollout, conditions: Conditions) -> list[tuple[str, tuple[tuple[int, ...], ...]]]:
    with Watcher() as watcher:
        rollout.step(conditions)
        rollout.commit()
    return watcher.seen


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["test", "pocket"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_chunk_loop_never_waits_and_repeats_itself_from_the_third_chunk_on(flavour: str, guidance: float) -> None:
    model = random_model(dataclasses.replace(FLAVOURS[flavour], num_layers=3, audio_blocks=(1, 2)))
    side = 4 if flavour == "test" else 10
    conditions = random_conditions(model.config, 1, 21, side, side)
    if isinstance(conditions.text, Tensor):
        conditions = dataclasses.replace(conditions, text=model.prepare_text(conditions.text))
    rollout = Rollout(model, height=side, width=side, guidance=guidance)
    chunks = [watched_chunk(rollout, part(conditions, chunk)) for chunk in range(7)]
    for chunk in chunks:
        assert not [name for name, _ in chunk if any(word in name for word in WAITING)]
    assert chunks[1] != chunks[2]
    if guidance == 1.0:
        assert chunks[2] == chunks[3] == chunks[4] == chunks[5] == chunks[6]
    else:  # two branches read a copy of the ring, which is cut in one or two places
        assert chunks[2] == chunks[4] == chunks[6] and chunks[3] == chunks[5]


@torch.no_grad()
def test_the_watcher_sees_a_wait() -> None:
    with Watcher() as watcher:
        float(torch.ones(1).sum())
    assert any("_local_scalar_dense" in name for name, _ in watcher.seen)


@torch.no_grad()
def test_the_chunk_loop_runs_without_any_data() -> None:
    """On the meta device there are no numbers: whatever would read one fails."""
    with torch.device("meta"):
        model = DiT(TEST)
    model.requires_grad_(False)
    conditions = Conditions(
        **{
            name: value.to("meta")
            for name, value in vars(conditions_of(random_model(TEST), 4)).items()
        }
    )  # fmt: skip
    assert run(rollout_of(model), conditions, 4).shape == (1, 4, 12, 4, 4)


@torch.no_grad()
def test_buffers_stay_where_they_are() -> None:
    """What a captured CUDA graph relies on."""
    model = random_model(TEST)
    conditions, rollout = conditions_of(model, 5), rollout_of(model)
    addresses = [buffer.data_ptr() for buffer in rollout.cache.buffers()]
    first = run(rollout, conditions, 2)
    saved = rollout.snapshot()
    third = rollout.step(part(conditions, 2))
    rollout.restore(saved)
    assert torch.equal(rollout.step(part(conditions, 2)), third)
    run(rollout, conditions, 5)
    rollout.reset()
    assert torch.equal(run(rollout, conditions, 2), first)
    assert [buffer.data_ptr() for buffer in rollout.cache.buffers()] == addresses
    # The tables and places that steer a call are the same tensors whenever an arrangement returns.
    window = rollout.cache.window(3, 9)
    assert rollout.cache._own_places(window.own_slots) is rollout.cache._own_places(
        rollout.cache.window(3, 15).own_slots
    )


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_block_compiles_whole_and_once(backend: str) -> None:
    torch._dynamo.reset()
    plain, model = random_model(TEST), random_model(TEST)
    graphs = []
    inner = torch._dynamo.lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(len(list(graph.graph.nodes)))
        return inner(graph, inputs)  # type: ignore[no-any-return]

    model.compile_blocks(backend=counting)  # fullgraph: a graph break is an error
    conditions, rollout, reference = conditions_of(model, 8), rollout_of(model), rollout_of(plain)
    for chunk in range(8):
        torch.testing.assert_close(
            rollout.step(part(conditions, chunk)), reference.step(part(conditions, chunk)), rtol=1e-4, atol=1e-5
        )
        if chunk == 2:
            compiled = len(graphs)
    assert compiled == 3, "one graph for the first, the second and all later chunks, shared by the three layers"
    assert len(graphs) == compiled
    assert model.state_dict().keys() == plain.state_dict().keys()


# ------------------------------------------------------------------------- counted


@torch.no_grad()
@pytest.mark.parametrize("flavour", ["1.3b", "pocket", "test"])
def test_flops_and_cache_bytes_of_a_steady_chunk(flavour: str) -> None:
    """Counted on the meta device, where attention is counted too and the 1.3B network costs nothing."""
    config = FLAVOURS[flavour]
    costs = DiTCosts(config, 1024)
    if flavour == "1.3b":  # the figures of performance.md, section 1; counted below with fewer equal layers
        assert costs.reference_chunk_flops() == pytest.approx(36.1e12, rel=0.01)
        assert costs.cache_bytes(2) == pytest.approx(1.32e9, rel=0.01)
        config = dataclasses.replace(config, num_layers=3, audio_blocks=(1, 1))
    side = {"1.3b": 64, "pocket": 10, "test": 4}[flavour]
    with torch.device("meta"):
        model = DiT(config)
    model.to("meta", torch.bfloat16).requires_grad_(False)  # the map of active tokens, too
    memory, prompt = None, 30
    if config.text_dim:
        prompt = min(prompt, config.text_len)
        memory = dataclasses.replace(
            model.prepare_text(torch.zeros(1, config.text_len, config.text_dim, device="meta")), bias=None
        )
        memory.layers = [(k[:, :, :prompt], v[:, :, :prompt]) for k, v in memory.layers]
    latents = torch.zeros(1, config.latent_channels, 3, side, side, device="meta", dtype=torch.bfloat16)
    conditions = Conditions(
        reference=latents[:, :, :1], mask=torch.zeros(1, 1, 1, side, side, device="meta"), masked_video=latents,
        ref_sequence=latents, audio=torch.zeros(1, 3, config.audio_hidden, device="meta"), text=memory,
    )  # fmt: skip
    rollout = Rollout(model, height=side, width=side)
    for _ in range(2):
        rollout.step(conditions)
    rollout.commit()
    with FlopCounterMode(display=False) as counter:
        rollout.step(conditions)
        rollout.commit()
    costs = DiTCosts(config, model.tokens_per_latent_frame(side, side))
    assert counter.get_total_flops() / costs.reference_chunk_flops() <= 1.02
    ours = 2 * costs.call_flops(3, 7, text_keys=prompt) + costs.clean_flops(3, 7, text_keys=prompt)
    assert counter.get_total_flops() == ours
    assert rollout.cache.buffer_bytes / costs.cache_bytes(2) == 1.0


@torch.no_grad()
def test_prepared_text_is_not_encoded_in_the_chunk_loop() -> None:
    model = random_model(TEST)
    conditions = conditions_of(model, 5)
    assert isinstance(conditions.text, Tensor)
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.startswith("text_embedding") or name.endswith(("cross_attn.k", "cross_attn.v", "audio_proj")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    prepared = dataclasses.replace(conditions, text=model.prepare_text(conditions.text))
    assert "text_embedding" in calls and "blocks.0.cross_attn.v" in calls
    calls.clear()
    run(rollout_of(model), prepared, 5)
    assert calls == []
    run(rollout_of(model), conditions, 5)  # unprepared: once a clip
    assert calls.count("text_embedding") == 1 and calls.count("blocks.0.cross_attn.k") == 1
