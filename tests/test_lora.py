"""Adapters: the merge against the reference in both precisions, kernel growth, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden_model import vectors
from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES
from lipstream.checkpoints.lora import LoraConfig, Precision, grow_patch_kernel, is_adapter, merge_adapter
from lipstream.checkpoints.sources import TensorSource, from_tensors
from lipstream.checkpoints.strict import CheckpointError, require
from lipstream.models.dit import FLAVOURS, DiT

FULL_CASE = Path(__file__).parents[2] / "shared" / "golden" / "lora_merge" / "data.safetensors"
GOLDEN_LORA = LoraConfig(rank=8, alpha=4)


def cases() -> list[dict[str, Tensor]]:
    """The block shipped with the tests and, where it lies beside the repository, the whole case."""
    return [vectors("lora_merge")] + ([load_file(FULL_CASE)] if FULL_CASE.is_file() else [])


def sources(data: dict[str, Tensor]) -> tuple[TensorSource, TensorSource]:
    base = {k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.") and ".lora" not in k}
    adapter = {k.removeprefix("weights.lora."): v for k, v in data.items() if k.startswith("weights.lora.")}
    return from_tensors(base, "base"), from_tensors(adapter, "adapter")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merge_is_the_references(precision: Precision) -> None:
    for data in cases():
        base, adapter = sources(data)
        assert is_adapter(adapter) and not is_adapter(base)
        merged = merge_adapter(base, adapter, precision, lora=GOLDEN_LORA)
        golden = {k.split(".", 2)[2]: v for k, v in data.items() if k.startswith(f"out.merged_{precision}.")}
        assert golden
        for name, value in golden.items():
            ours = merged.read(name)
            assert ours.dtype == value.dtype
            if precision == "bf16":
                assert torch.equal(ours, value), name
            else:
                assert (ours - value).abs().max() <= 1e-6, name
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for name in merged.specs.keys() - golden.keys():
            assert torch.equal(merged.read(name), base.read(name).to(dtype)), name
        assert merged.specs.keys() == base.specs.keys()


def test_the_two_precisions_differ() -> None:
    data = vectors("lora_merge")
    base, adapter = sources(data)
    name = "blocks.0.self_attn.q.weight"
    once = merge_adapter(base, adapter, "fp32", lora=GOLDEN_LORA, dtype=torch.bfloat16).read(name)
    assert once.dtype == torch.bfloat16
    thrice = merge_adapter(base, adapter, "bf16", lora=GOLDEN_LORA).read(name)
    assert 0.05 < (once != thrice).float().mean() < 0.5


def test_merged_weight_is_the_live_adapter() -> None:
    data = vectors("lora_merge")
    base, adapter = sources(data)
    weight = merge_adapter(base, adapter, "fp32", lora=GOLDEN_LORA).read("blocks.0.self_attn.q.weight")
    out = torch.nn.functional.linear(data["in.x"], weight, base.read("blocks.0.self_attn.q.bias"))
    assert (out - data["out.live_lora_q0"]).abs().max() <= 1e-6


def test_patch_kernel_growth() -> None:
    data = vectors("lora_merge")
    small = data["in.small_patch_kernel"]
    own = grow_patch_kernel(small, 6, data["weights.patch_embedding.weight"])
    assert torch.equal(own, data["out.patch_kernel_after_base_loader_growth"])
    zeros = grow_patch_kernel(small, 6)
    assert torch.equal(zeros[:, :3], small) and not zeros[:, 3:].any() and zeros.shape == own.shape
    assert grow_patch_kernel(own, 6) is own
    with pytest.raises(CheckpointError, match="has 6 input channels, the network takes 3"):
        grow_patch_kernel(own, 3)


def adapter_with_patch() -> dict[str, Tensor]:
    _, adapter = sources(vectors("lora_merge"))
    tensors = {name: adapter.read(name) for name in adapter.specs}
    patch = {"patch_embedding.weight": torch.ones(32, 5, 1, 2, 2), "patch_embedding.bias": torch.zeros(32)}
    return {**tensors, **patch, "audio_proj.proj.bias": torch.ones(3)}


def test_whole_tensors_replace_and_grow() -> None:
    base, _ = sources(vectors("lora_merge"))
    adapter = from_tensors(adapter_with_patch(), "adapter")
    merged = merge_adapter(base, adapter, "fp32", channels=6, lora=GOLDEN_LORA)
    kernel = merged.read("patch_embedding.weight")
    assert kernel.shape == merged.specs["patch_embedding.weight"].shape == (32, 6, 1, 2, 2)
    assert (kernel[:, :5] == 1).all() and not kernel[:, 5:].any()
    assert torch.equal(merged.read("audio_proj.proj.bias"), torch.ones(3))


def test_peft_names() -> None:
    base, adapter = sources(vectors("lora_merge"))
    peft = from_tensors({n.replace(".weight", ".default.weight"): adapter.read(n) for n in adapter.specs}, "peft")
    name = "blocks.0.ffn.2.weight"
    ours, plain = (merge_adapter(base, a, "bf16", lora=GOLDEN_LORA).read(name) for a in (peft, adapter))
    assert torch.equal(ours, plain)


Q = "blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "1 factors without their partner: blocks.0.self_attn.q.lora_B.weight"),
        (
            lambda t: [t.pop(f"{Q}.lora_{f}.weight") for f in "AB"],
            "1 weights without factors: blocks.0.self_attn.q.weight",
        ),
        (
            lambda t: t.update({f"blocks.9.ffn.0.lora_{f}.weight": torch.ones(8, 8) for f in "AB"}),
            "1 factors for no weight of base: blocks.9.ffn.0.weight",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(31, 8)}),
            r"1 factors of another shape: blocks.0.self_attn.q.lora_B.weight is \[31, 8\], not \[32, 8\]",
        ),
        (lambda t: t.update({"head.modulation": torch.ones(1)}), "1 tensors that an adapter does not bring: head.modu"),
        (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(8, 32)}), "are the same factor"),
    ],
)
def test_an_adapter_that_does_not_fit(change: Callable[[dict[str, Tensor]], object], said: str) -> None:
    base, _ = sources(vectors("lora_merge"))
    tensors = adapter_with_patch()
    change(tensors)
    with pytest.raises(CheckpointError, match=f"adapter.*{said}"):
        merge_adapter(base, from_tensors(tensors, "adapter"), "bf16", channels=6, lora=GOLDEN_LORA)


def test_another_rank_is_refused() -> None:
    base, adapter = sources(vectors("lora_merge"))
    with pytest.raises(CheckpointError, match=r"20 factors of another shape: .* and 12 more"):
        merge_adapter(base, adapter, "bf16")


@pytest.mark.parametrize(("flavour", "pairs"), [("1.3b", 300), ("14b", 400)])
def test_released_adapters_fit_the_released_sizes(flavour: str, pairs: int) -> None:
    """Names and shapes only: base Wan and OmniAvatar adapter together are exactly the network."""
    with torch.device("meta"):
        needed = dict(DiT(FLAVOURS[flavour]).to(torch.bfloat16).state_dict())
    base = {name: tensor for name, tensor in needed.items() if not name.startswith(AUDIO_PREFIXES)}
    base["patch_embedding.weight"] = base["patch_embedding.weight"][:, :16]
    adapter = {n: t for n, t in needed.items() if n.startswith((*AUDIO_PREFIXES, "patch_embedding."))}
    names = (*(f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"), "ffn.0", "ffn.2")
    for target in (f"blocks.{i}.{name}" for i in range(FLAVOURS[flavour].num_layers) for name in names):
        out, into = needed[f"{target}.weight"].shape
        adapter[f"{target}.lora_A.weight"] = torch.empty(128, into, device="meta")
        adapter[f"{target}.lora_B.weight"] = torch.empty(out, 128, device="meta")
    assert sum(".lora_A." in name for name in adapter) == pairs
    merged = merge_adapter(from_tensors(base, "wan"), from_tensors(adapter, "adapter"), "bf16", channels=65)
    require(merged.specs, from_tensors(needed, "needed").specs, "merged")
