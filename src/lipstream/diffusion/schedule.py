"""The noise schedule: rectified flow with a shifted time grid, as pure functions.

t runs from 0 (clean) to 1 (noise); the network sees 1000 t. Times are float64, arithmetic is float64 and
results have the dtype of the latents, so that half precision latents are rounded once. Latents are [B, C, T,
H, W]; times are [B] or, for diffusion forcing, one per latent frame [B, T].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipstream.streaming.windows import chunk_ranges

SHIFT = 5.0
T_MAX = 0.999
#: Call 1, call 2 (grid step 30 of the teacher's 50), clean pass.
STUDENT_TIMES: tuple[float, ...] = (0.999, 0.769, 0.0)
#: Times at which the synchronisation of the teacher profits from audio guidance (sync window, closed interval).
SYNC_WINDOW = (0.556, 0.882)


def shift_time(u: Tensor, shift: float = SHIFT) -> Tensor:
    """t = s u / (1 + (s - 1) u): moves uniform times towards noise."""
    return shift * u / (1 + (shift - 1) * u)


def shifted_grid(steps: int = 50, u_max: float = T_MAX, shift: float = SHIFT) -> Tensor:
    """Teacher grid τ_j = s u_j / (1 + (s-1) u_j), u_j = u_max (1 - j / steps), j = 0 ... steps; float64."""
    return shift_time(u_max * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps), shift)


def sampling_sigmas(steps: int = 50, shift: float = SHIFT) -> Tensor:
    """Noise levels of the teacher's own sampler (u_max = 1, final 0 left out), float32 [steps]."""
    return shifted_grid(steps, 1.0, shift)[:-1].float()


def distillation_time(uniform: Tensor) -> Tensor:
    """Distribution matching, draws r in [0, 1): u = .001 + .998 r, shifted, limited to [.001, .999]."""
    return shift_time(0.001 + 0.998 * uniform.to(torch.float64)).clamp(0.001, T_MAX)


class TrainingTimes(NamedTuple):
    """Draws of flow matching, each [B].

    Attributes:
        t: what the network is told; float64.
        level: of the noise that is added; float64.
        weight: of the squared error of the velocity; float32.
    """

    t: Tensor
    level: Tensor
    weight: Tensor


def teacher_training_times(index: Tensor, steps: int = 1000, shift: float = SHIFT) -> TrainingTimes:
    """Rows of the grid that the official teacher learns on (spec 5.3, 11.2); index [B] int64, 0 is the noisiest.

    The weight is a bell over the network's timestep, exp(-2 ((1000 σ - 500) / 1000)²), less its least value, mean 1.
    The timestep is rounded to bfloat16 before it is used (999 -> 1000), as it also is in that teacher's sampler; noise
    level and weight come from the row nearest to what the rounding gave.
    """
    timesteps = 1000 * shift_time(torch.linspace(1, 0, steps + 1)[:-1], shift)
    bell = torch.exp(-2 * ((timesteps - 500) / 1000).square())
    bell = bell - bell.min()
    bell = bell * (steps / bell.sum())
    told = timesteps.to(torch.bfloat16).float()[index.cpu()]
    nearest = (timesteps - told[:, None]).abs().argmin(1)
    times = TrainingTimes(told.double() / 1000, timesteps[nearest].double() / 1000, bell[nearest])
    return TrainingTimes(*(part.to(index.device) for part in times))


def times_per_latent_frame(chunk_steps: Tensor, latent_frames: int, chunk: int, times: tuple[float, ...]) -> Tensor:
    """Diffusion forcing: each chunk has one of `times`. chunk_steps [B, chunks] -> t [B, T], float64."""
    ranges = chunk_ranges(latent_frames, chunk)
    if chunk_steps.shape[1] != len(ranges):
        raise ValueError(f"{latent_frames} latent frames are {len(ranges)} chunks, got {chunk_steps.shape[1]} steps")
    lengths = torch.tensor([end - start for start, end in ranges], device=chunk_steps.device)
    drawn = torch.tensor(times, dtype=torch.float64, device=chunk_steps.device)[chunk_steps]
    return drawn.repeat_interleave(lengths, dim=1)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, T] -> float64 that broadcasts over [B, C, T, H, W]."""
    return t.to(torch.float64).reshape(t.shape[0], 1, -1, *([1] * (like.ndim - 3)))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t ε."""
    time = _spread(t, x0)
    return ((1 - time) * x0 + time * noise).to(x0.dtype)


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x̂_0 = x_t - t v."""
    return (x_t - _spread(t, x_t) * velocity).to(x_t.dtype)


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x̂_0) / t; undefined at t = 0, the caller sees to t > 0."""
    return ((x_t - x0.to(torch.float64)) / _spread(t, x_t)).to(x_t.dtype)


def implied_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """ε̂ = (x_t - (1 - t) x̂_0) / t, the noise of the deterministic variant."""
    time = _spread(t, x_t)
    return ((x_t - (1 - time) * x0) / time).to(x_t.dtype)


def renoise(x0: Tensor, noise: Tensor, t_next: Tensor) -> Tensor:
    """Stochastic step between the two calls: x_{t'} = (1 - t') x̂_0 + t' ε' with fresh ε'."""
    return add_noise(x0, noise, t_next)


def euler_step(x: Tensor, velocity: Tensor, t: Tensor | float, t_next: Tensor | float) -> Tensor:
    """x ← x + v (t' - t): one step of the teacher's sampler."""
    return x + velocity * (t_next - t)
