"""What `lipstream ablate` calls for the pocket model: train a row with stage 2, and measure it on held-out clips.

The figures are those of :class:`~lipstream.training.distill.Audition`, means over the held-out speakers: ``sync`` (the
pocket SyncNet's confidence), ``opening_r`` (correlation of the lip gap with the truth), ``amplitude``, ``mouth_error``,
``roughness`` (fine detail against the truth's: 1 is right), and ``fps``, pixel frames a second of CPU time of the
network alone, in batches. The budget is a JSON file:

    {"samples": ["runs/samples/grid"], "codec": "codec.safetensors", "speech": "speech.safetensors",
     "student": "dit.safetensors", "teacher": "teacher.safetensors", "syncnet": "syncnet.safetensors",
     "cache": "runs/coded", "steps": 600, "batch": 8, "scale": 2.5, "changes": {"student_lr": 2e-4}}

``changes`` are fields of the stage's `DistillConfig` that all rows share; a row's own changes come after them.

    lipstream ablate guidance -o runs/ablations --seeds 0 1 --config budget.json
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipstream.checkpoints.networks import load_dit
from lipstream.diffusion.teacher import Teacher, teacher_steps, teacher_times
from lipstream.models.dit import DiT
from lipstream.training.ablations import Measure, Row, Train, apply
from lipstream.training.distill import Audition, DistillConfig, Reward, loop_config, roll_out, syncnet_reward, train
from lipstream.training.export import load_averaged
from lipstream.training.material import Material, load_material
from lipstream.training.mouths import Batch, MouthTask
from lipstream.training.teacher import held_out_windows

NAMES = {"sync": "sync", "r": "opening_r", "size": "amplitude", "error": "mouth_error", "sharp": "roughness"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a table is made from, and how long a row is trained; see the module docstring."""

    samples: tuple[Path, ...]
    codec: Path
    speech: Path
    student: Path
    teacher: Path
    syncnet: Path
    cache: Path | None = None
    steps: int = 600
    batch: int = 8
    scale: float = DistillConfig.scale
    threads: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path | None) -> Budget:
        """Of a JSON file.

        Raises:
            ValueError: no file, no JSON, a name that is missing or unknown, or a path that does not exist.
        """
        if file is None:
            raise ValueError("name the data, the weights and the budget: --config budget.json (see docs/recipe.md)")
        try:
            given: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
        fields = {field.name: field for field in dataclasses.fields(cls)}
        needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in needed if name not in given]
        if missing or set(given) - set(fields):
            unknown = sorted(set(given) - set(fields))
            raise ValueError(f"{file}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
        paths = {name: Path(given[name]) for name in ("codec", "speech", "student", "teacher", "syncnet")}
        paths_wanted = [*paths.values(), *map(Path, given["samples"])]
        absent = [str(path) for path in paths_wanted if not path.exists()]
        if absent:
            raise ValueError(f"{file}: {absent[0]} does not exist")
        cache = Path(given["cache"]) if given.get("cache") else None
        if not isinstance(given.get("changes", {}), Mapping):
            raise ValueError(f"{file}: changes must be an object of DistillConfig's fields, not {given['changes']!r}")
        no_field = sorted(set(given.get("changes", {})) - {field.name for field in dataclasses.fields(DistillConfig)})
        if no_field:
            raise ValueError(f"{file}: changes names {no_field[0]!r}, which is no field of DistillConfig")
        return cls(**{**given, **paths, "samples": tuple(map(Path, given["samples"])), "cache": cache})


class Workers:
    """Trains and measures rows; data and networks are read when the first one needs them."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.config = DistillConfig(**{"batch": budget.batch, "scale": budget.scale, **_tuples(budget.changes)})

    @cached_property
    def material(self) -> Material:
        b = self.budget
        torch.set_num_threads(b.threads)
        return load_material(b.samples, b.codec, b.speech, self.config.versions, b.cache)

    @cached_property
    def reward(self) -> Reward:
        return syncnet_reward(self.budget.syncnet, self.material.codec, self.budget.speech)

    def train(self, row: Row, seed: int, folder: Path) -> None:
        """Stage 2 with a row's changes; other roles have nothing to train."""
        if row.role != "student":
            return
        config = apply(self.config, row)
        student, critic, teacher = (load_dit(p)[0] for p in (self.budget.student, *[self.budget.teacher] * 2))
        loop = loop_config(self.budget.steps)
        reward = self.reward if config.beta else None
        train(folder, self.material, loop, config, (student, critic, teacher), reward, seed)

    def measure(self, row: Row, seed: int, folder: Path) -> dict[str, float]:
        """Figures of a row on the held-out clips."""
        config = apply(self.config, row) if row.role == "student" else self.config
        task = MouthTask(self.material.codec, held_out_windows(self.material.held), config)
        audition = Audition(task, self.material, config, self.reward)
        make = self._maker(row, config, task, folder, seed)
        frames, started = 0, time.process_time()
        made = {}
        for name, batch in audition.batches.items():
            made[name] = make(batch)
            frames += made[name].shape[0] * (1 + 4 * (made[name].shape[2] - 1))
        seconds = time.process_time() - started
        found = audition.judge(lambda batch: next(made[n] for n, b in audition.batches.items() if b is batch))
        figures = {ours: _mean(found, key) for key, ours in NAMES.items()}
        return figures if row.role == "truth" else figures | {"fps": frames / seconds}

    def _maker(
        self, row: Row, config: DistillConfig, task: MouthTask, folder: Path, seed: int
    ) -> Callable[[Batch], Tensor]:
        if row.role == "truth":
            return lambda batch: batch.target
        if row.role == "teacher":
            teacher = load_dit(self.budget.teacher)[0].eval().requires_grad_(False)
            return lambda batch: sample_teacher(teacher, task, batch, self.budget.scale, seed)
        student = load_dit(self.budget.student)[0].eval()
        if row.role == "student":
            load_averaged(student, folder, "student")

        @torch.no_grad()
        def rolled(batch: Batch) -> Tensor:
            return roll_out(student, task, batch, config.times, generator=torch.Generator().manual_seed(seed))

        return rolled


@torch.no_grad()
def sample_teacher(teacher: DiT, task: MouthTask, batch: Batch, scale: float, seed: int = 0, steps: int = 50) -> Tensor:
    """x0 [B, K, T, g, g] after so many guided Euler steps from noise."""
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(seed))
    conditions, silent = (task.conditions(teacher, batch, null=null) for null in (False, True))

    def network(x: Tensor, t: Tensor, conditions: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x0: Tensor = teacher(x, t, conditions)
        return x0.float()

    *_, last = teacher_steps(
        Teacher(network=network, conditions=conditions, null=silent), noise, scale, teacher_times(steps)
    )
    return last.x0


def _tuples(changes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists only; a recipe's fields are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}


def _mean(found: dict[str, float], key: str) -> float:
    values = [value for name, value in found.items() if name.startswith(f"{key}_")]
    return sum(values) / len(values)


def ablation_workers(config: Path | None) -> tuple[Train, Measure]:
    """The pair that `lipstream ablate` asks for; `config` is the budget's file."""
    workers = Workers(Budget.read(config))
    return workers.train, workers.measure
