"""Low-rank adapters (LoRA, with `peft`) on a Wan or OmniAvatar transformer: how the real sizes are fine-tuned.

The q, k, v, o maps of both attentions and both maps of the feed-forward get factors; the patch kernel and the audio
modules, which a base Wan lacks or has smaller, are trained as they are; everything else stands still (spec 5.1, 5.3).
What was trained is written under the official adapters' names, so `lipstream.checkpoints.lora` merges it.

    model = add_lora(dit, LoraRecipe())             # changes dit in place; train it
    save_file(trainable_state(model), "adapter.safetensors")

Needs the extra `train` (`pip install '.[train]'`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipstream.checkpoints.lora import LoraConfig
from lipstream.checkpoints.strict import CheckpointError, listed
from lipstream.models.dit import DiT
from lipstream.training import parallel

_PEFT_NAME = ".default."  # peft's name of the one adapter


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """What is trained; the defaults are those of both OmniAvatar adapters and of the 14B student (spec 1.4, 5.1).

    Attributes:
        targets: ends of the names of the linear maps that get factors.
        whole: modules that are trained fully.
    """

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    whole: tuple[str, ...] = ("patch_embedding", "audio_proj", "audio_cond_projs")

    @property
    def merge(self) -> LoraConfig:
        """Rank and scale for `merge_adapter`."""
        return LoraConfig(self.rank, self.alpha)


def add_lora(dit: DiT, recipe: LoraRecipe) -> DiT:
    """Give a network factors, in place: A random, B zero, so that its output does not change yet.

    Returns:
        The same network; only the factors and ``recipe.whole`` have ``requires_grad``.

    Raises:
        ValueError: peft is not installed, the network has factors already, or its projections are fused.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ValueError("adapters need peft: pip install '.[train]'") from error
    if any(".lora_A." in name for name, _ in dit.named_parameters()):
        raise ValueError("this network has LoRA factors already")
    if any(".qkv." in name for name, _ in dit.named_parameters()):
        raise ValueError("the projections are fused: call fuse_projections(False) before add_lora")
    alpha: Any = recipe.alpha  # peft says int and divides it all the same
    settings = PeftConfig(r=recipe.rank, lora_alpha=alpha, target_modules=list(recipe.targets), lora_dropout=0.0)
    inject_adapter_in_model(settings, dit)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(tuple(f"{part}." for part in recipe.whole)))
    return dit


def trainable_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """What was trained, under the official adapters' names (`blocks.0.self_attn.q.lora_A.weight` [rank, in], ...).

    Of a sharded network every process has to call this, and gets all of it.
    """
    return {
        _official(name): parallel.whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trainable_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`trainable_state`, into a network that is not sharded yet; names with `.default` are read, too.

    Raises:
        CheckpointError: the tensors are not those that the network trains.
    """
    given = {_official(name): tensor for name, tensor in state.items()}
    wanted = {_official(name): p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(given.keys() ^ wanted.keys())
    odd += [name for name in given.keys() & wanted.keys() if given[name].shape != wanted[name].shape]
    if odd:
        raise CheckpointError(f"the adapter does not fit the network: {len(odd)} tensors differ: {listed(odd)}")
    for name, parameter in wanted.items():
        parameter.copy_(given[name])


def _official(name: str) -> str:
    return name.replace(_PEFT_NAME, ".")
