"""The teacher on one clip: its 50-step trajectories and the two-call factorial (paper, "Teacher Trajectory Analysis").

A trajectory file holds the x0 prediction of every step, float16, of three runs from the same noise:

* `plain`: no guidance (s = 1) on its own path;
* `guided`: guidance at every step on its own path (the paper's second curve);
* `local`: guidance applied once, at the states of the plain path. A guided path carries what earlier guidance did;
  this curve tells what guidance does *at* a noise level, which is what a gate in distillation switches.

    trajectory = load_or_run(path, settings, lambda: run_trajectory(teacher, noise, scale=4.5))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lipstream.diffusion.schedule import renoise
from lipstream.diffusion.teacher import Teacher, step_to, teacher_steps, teacher_times
from lipstream.models.dit_config import Conditions

#: Guidance of (call 1, call 2) of the factorial: the paper's (s0, s1) in {1, s}².
Cell = Literal["plain+plain", "plain+guided", "guided+plain", "guided+guided"]
CELLS: tuple[Cell, ...] = ("plain+plain", "plain+guided", "guided+plain", "guided+guided")
#: How call 2's input is made: the paper's Euler step, or fresh noise as the student does.
SAMPLINGS = ("euler", "renoise")


@dataclass(frozen=True, kw_only=True)
class AnalysisClip:
    """One clip that the teacher is analysed on.

    Attributes:
        target: [K, T, g, g] true latents, in the space that the network generates in.
        conditions: of batch 1.
        speech: [T, 4, D] feature rows, four a latent frame, for a sync scorer.
    """

    name: str
    target: Tensor
    conditions: Conditions
    speech: Tensor


class Trajectory(NamedTuple):
    """x0 predictions of steps 0 ... J-1, [J, K, T, g, g] each; see the module docstring."""

    plain: Tensor
    guided: Tensor
    local: Tensor


@torch.no_grad()
def run_trajectory(teacher: Teacher, noise: Tensor, scale: float, steps: int = 50) -> Trajectory:
    """Sample twice from noise [1, K, T, g, g]; 4 network calls a step."""
    times = teacher_times(steps)
    plain, local = [], []
    for step in _plain_path(teacher, noise, scale, times):
        plain.append(step[0])
        local.append(step[1])
    guided = [step.x0 for step in teacher_steps(teacher, noise, scale, times)]
    return Trajectory(*(torch.cat(parts) for parts in (plain, guided, local)))


def _plain_path(
    teacher: Teacher, noise: Tensor, scale: float, times: Sequence[float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(without, with) guidance at every state of the path without."""
    x = noise
    for time, following in pairwise(times):
        plain, guided = teacher.both(x, time, scale)
        yield plain, guided
        x = step_to(x, plain, time, following)


def load_or_run(path: Path, settings: Mapping[str, Any], run: Callable[[], Trajectory]) -> Trajectory:
    """The trajectory in a file, or a new one written to it (atomically, so that a stopped analysis goes on).

    Raises:
        ValueError: the file was made with other settings.
    """
    text = json.dumps(dict(settings), sort_keys=True)
    if path.exists():
        with safe_open(str(path), "pt") as file:
            found = (file.metadata() or {}).get("settings", "")
            if found != text:
                raise ValueError(f"{path}: made with other settings ({found}); choose another output folder")
            return Trajectory(*(file.get_tensor(name).float() for name in Trajectory._fields))
    trajectory = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.half().contiguous() for name, tensor in trajectory._asdict().items()}
    save_file(tensors, temporary, metadata={"settings": text})
    temporary.replace(path)
    return Trajectory(*(tensor.float() for tensor in tensors.values()))  # what the file holds, whether read or made


class Landing(NamedTuple):
    """Call 2 at one landing step: x0 [4, K, T, g, g] in the order of `CELLS`, for each sampling."""

    step: int
    x0: dict[str, Tensor]


@torch.no_grad()
def run_factorial(
    teacher: Teacher, noise: Tensor, fresh: Tensor, scale: float, landings: Sequence[int], steps: int = 50
) -> Iterator[Landing]:
    """The 2 x 2 factorial over (s0, s1) of two calls: call 1 at step 0, call 2 at each landing step j1.

    Args:
        noise: [1, K, T, g, g] of call 1.
        fresh: the same shape, for the renoised variant.

    Raises:
        ValueError: a landing outside of 1 ... steps - 1.
    """
    outside = [j for j in landings if not 1 <= j < steps]
    if outside:
        raise ValueError(f"a landing step lies in 1 ... {steps - 1}, got {outside[0]}")
    times = teacher_times(steps)
    firsts = teacher.both(noise, times[0], scale)
    for j in landings:
        t = torch.full((1,), times[j], dtype=torch.float64, device=noise.device)
        found = {}
        for sampling in SAMPLINGS:
            cells: list[Tensor] = []
            for first in firsts:
                x = step_to(noise, first, times[0], times[j]) if sampling == "euler" else renoise(first, fresh, t)
                cells.extend(teacher.both(x, times[j], scale))
            found[sampling] = torch.cat(cells)
        yield Landing(j, found)
