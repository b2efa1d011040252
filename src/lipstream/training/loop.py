"""The optimiser loop shared by all training stages: AdamW, warm-up, cosine, EMA, resumable checkpoints, metrics.

A stage owns its data and its losses; it hands :class:`Loop` one :class:`Trainee` per network that learns (distillation
has two, the critic and the student) and gets back the averaged networks. What the run needs to go on after a kill
(weights, EMA, optimisers, step, torch's random state) is in one file that is replaced atomically; a stage that draws
with a generator of its own seeds it from the step, so a resumed run sees new draws, not the same ones.
``metrics.jsonl`` beside it grows by one line per report.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

LossFunction = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Optimisation settings.

    Attributes:
        steps: total optimiser steps, the end of the cosine.
        ema: decay of the averaged weights that are evaluated and shipped.
        accumulate: loss evaluations per optimiser step.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    final_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    accumulate: int = 1
    report_every: int = 50
    save_every: int = 200

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine to ``final_lr * lr``."""
        progress = min(1.0, step / max(1, self.steps))
        cosine = self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * cosine


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """One network that a run trains.

    Attributes:
        model: trained in place; only parameters with ``requires_grad`` move.
        loss: step of the run and part of the accumulation -> loss and metrics; evaluated right before the update.
        every: updated on every such step of the run (the student of stage 2: 5, its critic: 1).
        lr: replaces the run's.
    """

    model: nn.Module
    loss: LossFunction
    name: str = "model"
    every: int = 1
    lr: float | None = None


class _Learner:
    """A trainee with its optimiser and its running average."""

    def __init__(self, trainee: Trainee, config: LoopConfig) -> None:
        self.trainee = trainee
        self.config = config if trainee.lr is None else replace(config, lr=trainee.lr)
        model = trainee.model
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self._averages: list[Tensor] = [
            a for a, p in zip(self.averaged.parameters(), model.parameters(), strict=True) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.lr, betas=config.betas, weight_decay=config.weight_decay
        )

    def update(self, step: int) -> dict[str, float]:
        """One optimiser step at a step of the run."""
        config, trainee = self.config, self.trainee
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        trainee.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        for part in range(config.accumulate):
            value, extra = trainee.loss(step * config.accumulate + part)
            (value / config.accumulate).backward()  # type: ignore[no-untyped-call]
            metrics = {"loss": value.item(), **extra}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{trainee.name}: gradient norm is {norm.item()} at step {step}")
        self.optimizer.step()
        # A young run averages over few updates, or its start would linger in the average.
        updates = step // trainee.every + 1
        decay = min(config.ema, (updates + 1) / (updates + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self.parameters, 1 - decay)
        return {**metrics, "grad_norm": norm.item()}

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs."""
        return {
            "model": self.trainee.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.trainee.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])


class Loop:
    """One training run in one folder.

    Args:
        trainees: what is trained, in the order of their updates within a step.
        folder: receives ``checkpoint.pt`` and ``metrics.jsonl``; an existing checkpoint is resumed.
    """

    def __init__(self, trainees: Sequence[Trainee], config: LoopConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._learners = {trainee.name: _Learner(trainee, config) for trainee in trainees}
        self.step = 0
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    @property
    def averaged(self) -> dict[str, nn.Module]:
        """The averaged networks, by the trainees' names, in eval mode."""
        return {name: learner.averaged.eval() for name, learner in self._learners.items()}

    def run(
        self, evaluate: Callable[[dict[str, nn.Module]], dict[str, float]] | None = None, until: int | None = None
    ) -> dict[str, nn.Module]:
        """Train to the last step (or to step ``until``); returns the averaged networks.

        ``evaluate`` is given them whenever the run is saved.
        """
        seen: dict[str, list[float]] = {}
        started = time.monotonic()
        last = self.config.steps if until is None else min(until, self.config.steps)
        while self.step < last:
            for key, value in self._one_step().items():
                seen.setdefault(key, []).append(value)
            if self.step % self.config.report_every == 0 or self.step == last:
                row: dict[str, Any] = {"step": self.step, "seconds": round(time.monotonic() - started, 1)}
                row |= {key: round(sum(values) / len(values), 6) for key, values in seen.items()}
                seen.clear()
                self._report(row)
            if self.step % self.config.save_every == 0 or self.step == last:
                if evaluate is not None:
                    self._report({"step": self.step, **evaluate(self.averaged)})
                self.save()
        return self.averaged

    def _one_step(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, learner in self._learners.items():
            if self.step % learner.trainee.every == 0:
                prefix = "" if len(self._learners) == 1 else f"{name}."
                metrics |= {prefix + key: value for key, value in learner.update(self.step).items()}
        self.step += 1
        return metrics

    def _report(self, row: dict[str, Any]) -> None:
        log.info("%s", row)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state: dict[str, Any] = {name: learner.state() for name, learner in self._learners.items()}
        state |= {"step": self.step, "rng": torch.get_rng_state()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if set(state) != {*self._learners, "step", "rng"}:
            raise ValueError(f"{self.checkpoint}: holds {sorted(state)}, of another kind of run; use a new run folder")
        for name, learner in self._learners.items():
            learner.load(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        log.info("resumed %s at step %d", self.checkpoint, self.step)
