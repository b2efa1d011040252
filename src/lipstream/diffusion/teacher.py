"""The bidirectional teacher's own sampler: deterministic Euler steps over the shifted 50-step grid, with guidance.

One network call per step gives the prediction without guidance, a second one (null branch) the prediction with it.
Every step's x0 prediction is handed out: the trajectory analysis (paper, "Teacher Trajectory Analysis") lives on them.

    teacher = Teacher(network=model, conditions=conditions, null=null_conditions(conditions, "audio"))
    for step in teacher_steps(teacher, noise, scale=4.5):
        ...                      # step.number, step.time, step.x0; the last step's x0 is the sample
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lipstream.diffusion.guidance import guided
from lipstream.diffusion.schedule import T_MAX, euler_step, shifted_grid, velocity_from_x0
from lipstream.models.dit_config import Conditions

TEACHER_STEPS = 50
#: x_t [B, C, T, H, W], t [B] float64, conditions -> x0 prediction; a `DiT` is one, whatever it predicts inside.
Network = Callable[[Tensor, Tensor, Conditions], Tensor]


def teacher_times(steps: int = TEACHER_STEPS) -> tuple[float, ...]:
    """τ_0 ... τ_steps; τ_0 is held to the largest time that the network knows (.999), the last is 0 (clean)."""
    return tuple(shifted_grid(steps).clamp(max=T_MAX).tolist())


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network on one clip, with its null branch."""

    network: Network
    conditions: Conditions
    null: Conditions

    def plain(self, x: Tensor, time: float) -> Tensor:
        """x0 prediction without guidance (s = 1)."""
        return self.network(x, self._time(x, time), self.conditions)

    def both(self, x: Tensor, time: float, scale: float) -> tuple[Tensor, Tensor]:
        """x0 predictions without guidance and with it, of the same x_t."""
        plain = self.plain(x, time)
        return plain, guided(plain, self.network(x, self._time(x, time), self.null), scale)

    def __call__(self, x: Tensor, time: float, scale: float) -> Tensor:
        """x0 prediction at a guidance scale; scale 1 costs one call of the network, any other two."""
        return self.plain(x, time) if scale == 1.0 else self.both(x, time, scale)[1]

    @staticmethod
    def _time(x: Tensor, time: float) -> Tensor:
        return torch.full((len(x),), time, dtype=torch.float64, device=x.device)


class TeacherStep(NamedTuple):
    """One step: its number j, its time τ_j, the noisy latents that went in and the x0 prediction that came out."""

    number: int
    time: float
    x: Tensor
    x0: Tensor


def step_to(x: Tensor, x0: Tensor, time: float, next_time: float) -> Tensor:
    """One Euler step along the velocity that an x0 prediction stands for, time > 0."""
    t = torch.full((len(x),), time, dtype=torch.float64, device=x.device)
    return euler_step(x, velocity_from_x0(x, x0, t), time, next_time)


@torch.no_grad()
def teacher_steps(
    teacher: Teacher, noise: Tensor, scale: float, times: Sequence[float] | None = None
) -> Iterator[TeacherStep]:
    """All steps of a sample from noise [B, C, T, H, W] (unit variance), in order.

    Args:
        scale: guidance of every step; 1 is none.
        times: replaces the 50-step grid; the last one (0) is where the sample ends, not a call.
    """
    times = teacher_times() if times is None else times
    x = noise
    for number, (time, following) in enumerate(pairwise(times)):
        x0 = teacher(x, time, scale)
        yield TeacherStep(number, time, x, x0)
        x = step_to(x, x0, time, following)
