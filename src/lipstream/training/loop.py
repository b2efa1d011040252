"""The optimiser loop shared by all training stages: AdamW, warm-up, cosine, EMA, resumable checkpoints, metrics.

A stage owns its data and its loss; it hands :class:`Loop` a function ``loss(step) -> (loss, metrics)`` and gets back a
model. What the run needs to go on after a kill (weights, EMA, optimiser, step, torch's random state) is in one file
that is replaced atomically; a stage that draws with a generator of its own seeds it from the step, so a resumed run
sees new draws, not the same ones. ``metrics.jsonl`` beside it grows by one line per report.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
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


class Loop:
    """One training run in one folder.

    Args:
        model: trained in place; only parameters with ``requires_grad`` move.
        folder: receives ``checkpoint.pt`` and ``metrics.jsonl``; an existing checkpoint is resumed.
    """

    def __init__(self, model: nn.Module, config: LoopConfig, folder: Path) -> None:
        self.model, self.config, self.folder = model, config, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(model).requires_grad_(False)
        self._averages: list[Tensor] = [
            a for a, p in zip(self.averaged.parameters(), model.parameters(), strict=True) if p.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.step = 0
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()

    def run(self, loss: LossFunction, evaluate: Callable[[nn.Module], dict[str, float]] | None = None) -> nn.Module:
        """Train to the last step; returns the averaged model in eval mode."""
        seen: dict[str, list[float]] = {}
        started = time.monotonic()
        while self.step < self.config.steps:
            for key, value in self._one_step(loss).items():
                seen.setdefault(key, []).append(value)
            if self.step % self.config.report_every == 0 or self.step == self.config.steps:
                row: dict[str, Any] = {"step": self.step, "seconds": round(time.monotonic() - started, 1)}
                row |= {key: round(sum(values) / len(values), 6) for key, values in seen.items()}
                seen.clear()
                self._report(row)
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                if evaluate is not None:
                    self._report({"step": self.step, **evaluate(self.averaged.eval())})
                self.save()
        return self.averaged.eval()

    def _one_step(self, loss: LossFunction) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        for part in range(self.config.accumulate):
            value, extra = loss(self.step * self.config.accumulate + part)
            (value / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
            metrics = {"loss": value.item(), **extra}
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm.item()} at step {self.step}")
        self.optimizer.step()
        self.step += 1
        # A young run averages over few steps, or the random start would linger in the average.
        decay = min(self.config.ema, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self.parameters, 1 - decay)
        return {**metrics, "grad_norm": norm.item()}

    def _report(self, row: dict[str, Any]) -> None:
        log.info("%s", row)
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": torch.get_rng_state(),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        log.info("resumed %s at step %d", self.checkpoint, self.step)
