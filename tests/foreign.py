"""Foreign checkpoints of a tiny transformer for tests: every container and naming that the loaders take."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES, DIFFUSERS
from lipstream.models.dit import DiT, DiTConfig

TINY = DiTConfig(
    dim=128, ffn_dim=96, num_heads=1, num_layers=4, freq_dim=16, text_dim=12, audio_dim=5, audio_hidden=8,
    audio_blocks=(2, 3),
)  # fmt: skip
RANK = 4


def tiny_model(seed: int = 0) -> DiT:
    """A network of which no tensor is zero or constant."""
    torch.manual_seed(seed)
    model = DiT(TINY).requires_grad_(False)
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.1)
    return model.to(torch.bfloat16)


def tiny_state(seed: int = 0) -> dict[str, Tensor]:
    """Official names."""
    return dict(tiny_model(seed).state_dict())


def base_state(seed: int = 0) -> dict[str, Tensor]:
    """A base Wan: no audio, 16 input channels."""
    state = {name: t for name, t in tiny_state(seed).items() if not name.startswith(AUDIO_PREFIXES)}
    return state | {"patch_embedding.weight": state["patch_embedding.weight"][:, :16].clone()}


def adapter_state(seed: int = 1, channels: int = 65) -> dict[str, Tensor]:
    """An OmniAvatar adapter for it."""
    state = tiny_state(seed)
    whole = {n: t for n, t in state.items() if n.startswith((*AUDIO_PREFIXES, "patch_embedding."))}
    whole["patch_embedding.weight"] = whole["patch_embedding.weight"][:, :channels].clone()
    targets = (*(f"{a}_attn.{letter}" for a in ("self", "cross") for letter in "qkvo"), "ffn.0", "ffn.2")
    for block in range(TINY.num_layers):
        for target in targets:
            out, into = state[f"blocks.{block}.{target}.weight"].shape
            whole[f"blocks.{block}.{target}.lora_A.weight"] = torch.randn(RANK, into).bfloat16()
            whole[f"blocks.{block}.{target}.lora_B.weight"] = torch.randn(out, RANK).bfloat16()
    return whole


def save_dcp(content: dict[str, Any], folder: Path) -> None:
    """What training with sharded weights leaves behind."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=folder)


def save_shards(state: dict[str, Tensor], folder: Path, parts: int = 3) -> None:
    """Shards with an index, as on the Hub."""
    folder.mkdir()
    names = list(state)
    weight_map = {}
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = names[part::parts]
        save_file({name: state[name].contiguous() for name in chosen}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def in_diffusers_naming(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under diffusers' names."""
    return {str(DIFFUSERS.to_foreign(name)): tensor for name, tensor in state.items()}


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def _stub(state: dict[str, Tensor], folder: Path) -> Path:
    save_dcp(_prefixed("_core.", state), folder / "0000600.net_model")
    torch.save({"step": 600}, folder / "0000600.pth")
    return folder / "0000600.pth"


def _torch_file(make: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Tensor], Path], Path]:
    def write(state: dict[str, Tensor], folder: Path) -> Path:
        torch.save(make(state), folder / "model.pth")
        return folder / "model.pth"

    return write


def _dcp_folder(make: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Tensor], Path], Path]:
    def write(state: dict[str, Tensor], folder: Path) -> Path:
        save_dcp(make(state), folder / "dcp")
        return folder / "dcp"

    return write


def _index_folder(state: dict[str, Tensor], folder: Path) -> Path:
    save_shards(state, folder / "shards")
    return folder / "shards"


def _safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


# container -> (writer, the wrapper that is found, the kind that is found)
CONTAINERS: dict[str, tuple[Callable[[dict[str, Tensor], Path], Path], str, str]] = {
    "bare": (_torch_file(lambda s: s), "", "student"),
    "_core": (_torch_file(lambda s: _prefixed("_core.", s)), "_core.", "student"),
    "teacher": (_torch_file(lambda s: _prefixed("model.", s)), "model.", "teacher"),
    "model.net": (_torch_file(lambda s: {"model": {"net": s, "other": {}}, "step": 1}), "", "student"),
    "model.net _core": (_torch_file(lambda s: {"model": {"net": _prefixed("_core.", s)}}), "_core.", "student"),
    "net": (_torch_file(lambda s: {"net": s}), "", "student"),
    "safetensors": (_safetensors, "", "student"),
    "shards": (_index_folder, "", "student"),
    "dcp": (_dcp_folder(lambda s: _prefixed("_core.", s)), "_core.", "student"),
    "dcp model.net": (
        _dcp_folder(lambda s: {"model": {"net": s}, "optimizer": {"a": torch.ones(3)}, "step": 1}),
        "model.net.",
        "student",
    ),
    "dcp stub": (_stub, "_core.", "student"),
}
