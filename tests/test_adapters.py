"""LoRA fine-tuning: nothing changes at first, only the right tensors move, the export merges to the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")

from golden_model import random_conditions, random_model
from lipstream.checkpoints.lora import LoraConfig, is_adapter, merge_adapter, merge_pair
from lipstream.checkpoints.sources import from_tensors, open_safetensors
from lipstream.checkpoints.strict import CheckpointError
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.training.adapters import LoraRecipe, add_lora, load_trainable_state, trainable_state
from lipstream.training.loop import Loop, LoopConfig, Trainee
from parallel_worker import forcing_loss

RECIPE = LoraRecipe(rank=4, alpha=2)
SMALL = FLAVOURS["test"]


def output(model: DiT) -> torch.Tensor:
    conditions = random_conditions(SMALL, 1, 3, 4, 4)
    with torch.no_grad():
        x0: torch.Tensor = model(torch.ones(1, 4, 3, 4, 4), torch.full((1,), 0.7), conditions)
    return x0


def test_train_export_merge(tmp_path: Path) -> None:
    base = random_model(SMALL)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    untouched = output(base)
    model = add_lora(base, RECIPE)
    assert model is base and torch.equal(output(model), untouched)

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    Loop([Trainee(model=model, loss=forcing_loss(model))], LoopConfig(steps=4, lr=1e-2, ema=None), tmp_path).run()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    factors = {name for name in start if ".lora_" in name}
    fully = {name for name in start if name.startswith(("patch_embedding.", "audio_proj.", "audio_cond_projs."))}
    assert len(factors) == 2 * 10 * SMALL.num_layers
    assert moved == factors | fully
    live = output(model)
    assert (live - untouched).abs().max() > 1e-3

    save_file(trainable_state(model), tmp_path / "adapter.safetensors")
    adapter = open_safetensors(tmp_path / "adapter.safetensors")
    assert is_adapter(adapter) and "blocks.0.cross_attn.q.lora_A.weight" in adapter.specs
    merged = merge_adapter(from_tensors(before, "base"), adapter, "fp32", lora=RECIPE.merge)
    weights = {name: merged.read(name) for name in merged.specs}
    assert weights.keys() == before.keys()
    state = load_file(tmp_path / "adapter.safetensors")
    for name, tensor in weights.items():
        factor = name.removesuffix(".weight")
        if f"{factor}.lora_A.weight" in state:
            a, b = (state[f"{factor}.lora_{letter}.weight"] for letter in "AB")
            assert torch.equal(tensor, merge_pair(before[name], a, b, 0.5, "fp32"))
        else:
            assert torch.equal(tensor, state.get(name, before[name])), name
    fresh = DiT(SMALL)
    fresh.load_state_dict(weights)
    assert (output(fresh) - live).abs().max() <= 1e-5 * live.abs().max()


def test_an_adapter_is_taken_up_again() -> None:
    model, other = (add_lora(random_model(SMALL), RECIPE) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    state = trainable_state(model)
    load_trainable_state(other, {name.replace("lora_A.", "lora_A.default."): tensor for name, tensor in state.items()})
    assert torch.equal(output(other), output(model))
    del state["patch_embedding.bias"]
    with pytest.raises(CheckpointError, match=r"1 tensors differ: patch_embedding\.bias"):
        load_trainable_state(other, state)


def test_what_cannot_take_factors_is_refused() -> None:
    model = add_lora(random_model(SMALL), RECIPE)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, RECIPE)
    fused = random_model(SMALL)
    fused.fuse_projections()
    with pytest.raises(ValueError, match="fused"):
        add_lora(fused, RECIPE)


@pytest.mark.parametrize(("flavour", "pairs", "millions"), [("1.3b", 300, None), ("14b", 400, 613)])
def test_the_real_sizes_have_the_official_adapters_tensors(flavour: str, pairs: int, millions: int | None) -> None:
    """Names and shapes only. The 613 M of the 14B student (spec 5.1) are its factors; 6 M are trained beside them."""
    with torch.device("meta"):
        model = add_lora(DiT(FLAVOURS[flavour]), LoraRecipe())
    factors = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    assert len(factors) == 2 * pairs
    assert LoraRecipe().merge == LoraConfig()
    if millions is not None:
        assert round(sum(factors.values()) / 1e6) == millions
