"""Helpers of the Wan VAE and TAE tests: golden cases, weights without a generator, streams, counted work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lipstream.models.tae import TAE
from lipstream.models.wan_vae import WanVAE

ROOT = Path(__file__).parent.parent


@cache
def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def case(name: str) -> dict[str, Tensor]:
    """Tensors of a golden case that is too large for the repository; skips where `../shared` is absent."""
    path = ROOT.parent / "shared" / "golden" / name / "data.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return _load(path)


def weights(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network of a golden case, in float32."""
    return {key.removeprefix("weights."): x.float() for key, x in data.items() if key.startswith("weights.")}


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers between -1 and 1 that look random and are the same everywhere."""
    count = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
    return (torch.sin(12.9898 * count + 78.233 * phase) * 43.7585453).remainder(2).sub(1).reshape(shape).float()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Weights from `wave`: no part is neutral, activations keep their size, no generator is involved."""
    for at, (name, parameter) in enumerate(sorted(model.named_parameters())):
        values = wave(*parameter.shape, phase=at)
        if name.endswith("gamma"):
            parameter.copy_(1 + values / 2)
        elif name.endswith("bias"):
            parameter.copy_(values / 10)
        else:
            parameter.copy_(values * (3 / parameter[0].numel()) ** 0.5)
    model.requires_grad_(False)


def streamed(step: Callable[[Tensor], Tensor], x: Tensor, sizes: list[int]) -> Tensor:
    """`step` over pieces of [B, C, F, H, W] of the given numbers of frames, joined."""
    return torch.cat([step(piece) for piece in x.split(sizes, dim=2)], dim=2)


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of all convolutions and matrix products, as dispatched."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def check_rollback(codec: WanVAE | TAE, video: Tensor) -> None:
    """A stream taken back to a snapshot gives the same again, encoding and decoding; after a reset it is a new one."""
    latents = wave(1, 16, 3, 1, 1)
    stream = codec.stream_view(1)
    stream.encode(video[:, :, :5])
    stream.decode(latents[:, :, :2])
    saved = stream.snapshot()
    once = stream.encode(video[:, :, 5:]), stream.decode(latents[:, :, 2:])
    stream.restore(saved)
    assert torch.equal(stream.encode(video[:, :, 5:]), once[0])
    assert torch.equal(stream.decode(latents[:, :, 2:]), once[1])
    stream.reset(1)
    assert torch.equal(stream.encode(video), codec.encode(video))
