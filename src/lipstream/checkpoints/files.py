"""One network, one safetensors file: its configuration travels as JSON in the file's metadata.

Loading is strict: a missing, extra or misshapen tensor is listed and refused, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lipstream.checkpoints.sources import open_safetensors
from lipstream.checkpoints.strict import require, specs_of


def save_module(module: nn.Module, config: Mapping[str, Any], path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write all tensors of ``module`` (floating ones as ``dtype``) and its configuration; atomic."""
    tensors = {
        name: (tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()).contiguous().clone()
        for name, tensor in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"config": json.dumps(dict(config))})
    temporary.chmod(0o644)  # safetensors writes for the owner only
    temporary.replace(path)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration stored by :func:`save_module`.

    Raises:
        ValueError: no such file, not safetensors, or no configuration in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if "config" not in metadata:
        raise ValueError(f"{path}: has no configuration in its metadata; was it written by lipstream?")
    config: dict[str, Any] = json.loads(metadata["config"])
    return config


def load_module(module: nn.Module, path: Path) -> None:
    """Fill ``module`` with the tensors of ``path``; every name and shape must match.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the differences are listed.
    """
    source = open_safetensors(path)
    require(source.specs, specs_of(module), str(path))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(source.read(name))
