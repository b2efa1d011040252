"""The optimiser loop shared by all training stages: AdamW, warm-up, cosine, EMA, resumable checkpoints, metrics.

A stage owns its data and its losses; it hands :class:`Loop` one :class:`Trainee` per network that learns (distillation
has two, the critic and the student) and gets back the averaged networks. What the run needs to go on after a kill
(weights, EMA, optimisers, step, torch's random state) is in one file that is replaced atomically; a stage that draws
with a generator of its own takes its seed from :meth:`Loop.seed`, so a resumed run sees new draws, not the same ones.
``metrics.jsonl`` beside it grows by one line per report.

The same loop runs in one process or, under torchrun, in many (`lipstream.training.parallel`): networks and checkpoints
are then in pieces (folder ``checkpoints``), and a loss is asked for other micro batches in each process.
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

from lipstream.training import parallel

log = logging.getLogger(__name__)

LossFunction = Callable[[int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Optimisation settings.

    Attributes:
        steps: total optimiser steps, the end of the cosine.
        final_lr: share of ``lr`` where the cosine ends; 1 keeps it constant.
        ema: decay of the averaged weights that are evaluated and shipped; None keeps no average.
        accumulate: loss evaluations per optimiser step and process.
        recompute: activation checkpointing of a network's blocks.
        bf16: with many processes, put blocks together in bfloat16 (see ``parallel.shard``).
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 100
    final_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float | None = 0.998
    accumulate: int = 1
    recompute: bool = False
    bf16: bool = False
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
        model: trained in place; only parameters with ``requires_grad`` move. Not sharded yet: the loop does that.
        loss: number of the micro batch -> loss and metrics; evaluated right before the update. Numbers count up over
            steps, accumulation and processes; draws that depend on nothing else are the same however a batch is split.
        every: updated on every such step of the run (the student of stage 2: 5, its critic: 1).
        lr, clip: replace the run's.
    """

    model: nn.Module
    loss: LossFunction
    name: str = "model"
    every: int = 1
    lr: float | None = None
    clip: float | None = None


class _Learner:
    """A trainee with its optimiser and its running average (if it has one)."""

    def __init__(self, trainee: Trainee, config: LoopConfig) -> None:
        self.trainee = trainee
        lr = config.lr if trainee.lr is None else trainee.lr
        clip = config.clip if trainee.clip is None else trainee.clip
        self.config = config = replace(config, lr=lr, clip=clip)
        model = trainee.model
        self.averaged = None if config.ema is None else copy.deepcopy(model).requires_grad_(False)
        if config.recompute:
            parallel.recompute_blocks(model)
        for network in (model, self.averaged):
            if network is not None:
                parallel.shard(network, bf16=config.bf16, dtype=torch.float32)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._averages: list[Tensor] = []
        if self.averaged is not None:
            pairs = zip(self.averaged.parameters(), model.parameters(), strict=True)
            self._averages = [a for a, p in pairs if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parallel.optimizer_groups(self.parameters),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def update(self, step: int) -> dict[str, float]:
        """One optimiser step at a step of the run."""
        config, trainee = self.config, self.trainee
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        trainee.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        seen: dict[str, list[float]] = {}
        for part in range(config.accumulate):
            value, extra = trainee.loss(parallel.micro_batch(step * config.accumulate + part))
            (value / config.accumulate).backward()  # type: ignore[no-untyped-call]
            for key, number in {"loss": value.item(), **extra}.items():
                seen.setdefault(key, []).append(number)
        norm = parallel.clip_gradients(self.parameters, config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{trainee.name}: gradient norm is {norm.item()} at step {step}")
        self.optimizer.step()
        self._average(step // trainee.every + 1)
        metrics = {key: sum(values) / len(values) for key, values in seen.items()}
        return {**metrics, "grad_norm": norm.item()}

    @torch.no_grad()
    def _average(self, updates: int) -> None:
        if self.config.ema is None:
            return
        # A young run averages over few updates, or its start would linger in the average.
        decay = min(self.config.ema, (updates + 1) / (updates + 20))
        averages, parameters = ([parallel.local(t) for t in tensors] for tensors in (self._averages, self.parameters))
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    def state(self) -> dict[str, Any]:
        """All that :meth:`load` needs; no "averaged" if there is no average."""
        averaged = {} if self.averaged is None else {"averaged": self.averaged.state_dict()}
        model, optimizer = self.trainee.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, **averaged, "optimizer": optimizer}

    def tensors(self) -> dict[str, Any]:
        """The same for a checkpoint in pieces."""
        return parallel.tensors_of(self.trainee.model, self.averaged, self.optimizer)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.trainee.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])


class Loop:
    """One training run in one folder.

    Args:
        trainees: what is trained, in the order of their updates within a step.
        folder: receives ``checkpoint.pt`` (many processes: ``checkpoints/``) and ``metrics.jsonl``; an existing
            checkpoint is resumed.

    Raises:
        ValueError: the folder holds another kind of run.
    """

    def __init__(self, trainees: Sequence[Trainee], config: LoopConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._learners = {trainee.name: _Learner(trainee, config) for trainee in trainees}
        self.step = 0
        self.checkpoint = folder / "checkpoint.pt"
        self._pieces = parallel.ShardedCheckpoints(folder / "checkpoints") if parallel.together() else None
        parallel.seed_apart()
        self._resume()

    @property
    def averaged(self) -> dict[str, nn.Module]:
        """The averaged networks (without an average: the trained ones), by the trainees' names, in eval mode."""
        return {name: (learner.averaged or learner.trainee.model).eval() for name, learner in self._learners.items()}

    def seed(self, base: int) -> int:
        """A seed for a stage's own generator: another one at each step (resume) and in each process."""
        return parallel.seed_for(base + self.step)

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
                row |= {key: round(value, 6) for key, value in parallel.means(seen).items()}
                seen.clear()
                self._report(row)
            if self.step % self.config.save_every == 0 or self.step == last:
                if evaluate is not None:
                    self._report({"step": self.step, **evaluate(self.averaged)})
                self.save()
        if self._pieces is not None:
            self._pieces.finish()
        return self.averaged

    def _one_step(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, learner in self._learners.items():
            if self.step % learner.trainee.every == 0:
                prefix = "" if len(self._learners) == 1 else f"{name}."
                metrics |= {prefix + key: value for key, value in learner.update(self.step).items()}
        self.step += 1
        if self._pieces is not None:
            self._pieces.poll()
        return metrics

    def _report(self, row: dict[str, Any]) -> None:
        if not parallel.speaks():
            return
        log.info("%s", row)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint atomically (many processes: begin to)."""
        if self._pieces is not None:
            for learner in self._learners.values():
                parallel.require_equal_replicas(learner.trainee.model)
            self._pieces.save(self.step, {name: learner.tensors() for name, learner in self._learners.items()})
            return
        state: dict[str, Any] = {name: learner.state() for name, learner in self._learners.items()}
        state |= {"step": self.step, "rng": torch.get_rng_state()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self) -> None:
        in_pieces = parallel.latest_checkpoint(self.folder / "checkpoints") is not None
        if self.checkpoint.exists() if self._pieces is not None else in_pieces:
            raise ValueError(
                f"{self.folder}: a run of {'many processes' if in_pieces else 'one process'} cannot go on as one of "
                f"{'one process' if in_pieces else 'many processes'}; use a new run folder"
            )
        if self._pieces is not None:
            step = self._pieces.load({name: learner.tensors() for name, learner in self._learners.items()})
            self.step = step or 0
        elif self.checkpoint.exists():
            self._load_file()
        if self.step:
            log.info("resumed %s at step %d", self.folder, self.step)

    def _load_file(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if set(state) != {*self._learners, "step", "rng"}:
            raise ValueError(f"{self.checkpoint}: holds {sorted(state)}, of another kind of run; use a new run folder")
        for name, learner in self._learners.items():
            if set(state[name]) != set(learner.state()):
                raise ValueError(f"{self.checkpoint}: begun with another choice of ema; use a new run folder")
            learner.load(state[name])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
