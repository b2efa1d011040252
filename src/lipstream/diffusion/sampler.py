"""The few-step sampler of one chunk: denoise, renoise with fresh noise, denoise again.

All noise of chunk k comes from a generator seeded by (seed, k) alone: cutting a clip differently, or making
it longer, never changes the noise of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipstream.diffusion.schedule import renoise

#: x_t [B, C, T, H, W] and t [B] float64 -> x0 prediction.
Denoise = Callable[[Tensor, Tensor], Tensor]
#: Number of the call in the chunk (0 = the initial noise) -> noise [B, C, T, H, W].
Noise = Callable[[int], Tensor]

_MIX = 0x9E3779B97F4A7C15  # odd 64-bit constant: neighbouring (seed, chunk) pairs get far apart generator seeds


def chunk_generator(seed: int, chunk: int) -> torch.Generator:
    """The CPU generator of one chunk; CPU, so that every device and dtype sees the same numbers."""
    mixed = ((seed + 1) * _MIX + chunk * (_MIX >> 7 | 1)) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.Generator(device="cpu").manual_seed(mixed)


def generated_noise(
    generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
) -> Noise:
    """Noise drawn in order of the calls from an injected generator, in float32 and then cast."""

    to_gpu = torch.device(device).type == "cuda"  # from pinned memory the copy does not wait for the device

    def draw(call: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, pin_memory=to_gpu)
        return drawn.to(device, non_blocking=to_gpu).to(dtype)

    return draw


def few_step(denoise: Denoise, noise: Noise, times: Sequence[float], *, exit_call: int | None = None) -> Tensor:
    """Denoise at each of `times` (paper: 0.999, 0.769) from pure noise; returns the last x0.

    exit_call stops after that call (self-forcing draws it at random): only this call keeps gradients.
    """
    last = len(times) - 1 if exit_call is None else exit_call
    if not 0 <= last < len(times):
        raise ValueError(f"exit_call {exit_call} is outside of the {len(times)} calls")
    x = noise(0)
    for call in range(last):
        with torch.no_grad():
            x0 = denoise(x, _time(times[call], x))
            x = renoise(x0, noise(call + 1), _time(times[call + 1], x))
    return denoise(x, _time(times[last], x))


def _time(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)
