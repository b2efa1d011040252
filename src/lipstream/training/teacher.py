"""The teacher: a bidirectional network that denoises whole segments at any noise level (paper, "Teacher").

Rectified-flow matching in the x0 view: x_t = (1 - t) x_0 + t e, loss (x0 - x_0)^2 weighted by what the velocity's error
counts, 1 / t^2. Two ways to draw times: `InverseSquare` (pocket: shifted schedule, spec 3, the weight bounded) and
`Bell` (the official teacher, spec 5.3). Where speech is missing (a tenth of the windows) it learns the null branch of
guidance. A segment of the pocket model is 15 latent frames, five chunks of the student.

    python -m lipstream.training.teacher RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors \
        --start-from dit.safetensors
    torchrun ... -m lipstream.training.teacher RUN --recipe 14b --clips LIST ...       # see docs/training-at-scale.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.checkpoints.networks import load_dit
from lipstream.diffusion.schedule import (
    T_MAX,
    TrainingTimes,
    add_noise,
    shift_time,
    teacher_training_times,
    x0_from_velocity,
)
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.training.agreement import Agreement, add_agreement, read_agreement
from lipstream.training.coded import CHUNK, Coded, Windows
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.material import Material, add_material, read_material
from lipstream.training.mouths import Batch, MouthConfig, MouthTask
from lipstream.training.task import BatchT, Task, predict

SEGMENT = 5 * CHUNK  # latent frames


class TeacherTerms(Protocol):
    """What the loss needs to know."""

    @property
    def latent_frames(self) -> int:
        """Of a segment."""

    def draw(self, rng: np.random.Generator, rows: int) -> TrainingTimes:
        """Times and weights of a batch."""


@dataclass(frozen=True, kw_only=True)
class InverseSquare:
    """Times of the shifted schedule; the velocity's weight is t² / max(t, least_t)², that of x0 1 / max(t, least_t)².

    Attributes:
        noisy_odds: share of windows at t = 0.999, from which every sample starts.
        least_t: times below weigh as this one.
    """

    latent_frames: int = SEGMENT
    noisy_odds: float = 0.2
    least_t: float = 0.4

    def draw(self, rng: np.random.Generator, rows: int) -> TrainingTimes:
        """Times and weights of a batch."""
        t = shift_time(torch.from_numpy(rng.uniform(0.001, T_MAX, rows)))
        t = torch.where(torch.from_numpy(rng.random(rows) < self.noisy_odds), T_MAX, t)
        return TrainingTimes(t, t, (t / t.clamp(self.least_t)).square().float())


@dataclass(frozen=True, kw_only=True)
class Bell:
    """The official teacher's times: rows of its grid with bell-shaped weights and rounded timesteps."""

    latent_frames: int

    def draw(self, rng: np.random.Generator, rows: int) -> TrainingTimes:
        """Times and weights of a batch."""
        return teacher_training_times(torch.from_numpy(rng.integers(1000, size=rows)))


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(MouthConfig, InverseSquare):
    """What the pocket teacher trains on.

    Attributes:
        averaged_odds: always 1: with attention over all frames, a reference sequence that moves would give the
            target's mouth away, shifted in time.
    """

    averaged_odds: float = 1.0


class TeacherLoss(Generic[BatchT]):
    """Flow matching on random segments.

    Args:
        beside: (x0, batch, latent frames) -> a loss to add.
    """

    def __init__(
        self,
        model: DiT,
        task: Task[BatchT],
        config: TeacherTerms,
        beside: Callable[[Tensor, BatchT, slice], Tensor] | None = None,
    ) -> None:
        self.model, self.task, self.config, self.beside = model, task, config, beside

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.task.batch(self.config.latent_frames)
        target = batch.target
        t, level, weight = (part.to(target.device) for part in self.config.draw(self.task.rng, len(target)))
        noise = torch.randn_like(target)
        noisy = add_noise(target, noise, level)
        # What the right velocity leads to. Where the network is told another time than the noise has (`Bell`), that is
        # not quite the clean latents; its error is the velocity's times t.
        aim = target if torch.equal(t, level) else x0_from_velocity(noisy, noise - target, t)
        x0 = predict(self.task, self.model, noisy, t, batch)
        errors = self.task.errors(x0, aim)
        loss = (errors.loss.mean(1) * (weight / t.square()).float()).mean()
        metrics = errors.figures(level >= T_MAX, "from_noise")
        if self.beside is not None:
            added = self.beside(x0, batch, slice(None))
            loss, metrics["beside"] = loss + added, added.item()
        return loss, metrics


class SegmentListening:
    """How far lips of held-out clips follow: correlation of the lip gap of one prediction from noise, by speaker."""

    def __init__(self, task: MouthTask, held: Sequence[Coded], config: TeacherConfig) -> None:
        self.task = task
        self.batches = {
            speaker: held_out_batch(task, [c for c in held if c.speaker == speaker]) for speaker in speakers(held)
        }

    @torch.no_grad()
    def __call__(self, models: dict[str, nn.Module]) -> dict[str, float]:
        model = models["model"]
        assert isinstance(model, DiT)
        found = {}
        for speaker, batch in self.batches.items():
            target = batch.target
            noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
            t = torch.full((len(target),), T_MAX, dtype=torch.float64)
            x0 = predict(self.task, model, add_noise(target, noise, t), t, batch)
            found[f"r_{speaker}"] = round(float(gap_correlation(self.task, x0, target).mean()), 4)
        return found


def speakers(coded: Sequence[Coded]) -> list[str]:
    """Names of the speakers, sorted."""
    return sorted({item.speaker for item in coded})


def held_out_batch(task: MouthTask, coded: Sequence[Coded]) -> Batch:
    """One fixed segment of each clip, as training sees it, but with whole speech."""
    rows = [held_out_windows([item]).draw() for item in coded]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return task.whole(*stacked)


def held_out_windows(coded: Sequence[Coded]) -> Windows:
    """Segments of held-out clips; the same ones every time."""
    return Windows(coded, np.ones(len(coded)), seed=5, latent_frames=SEGMENT)


def gap_correlation(task: MouthTask, x0: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation of the lip gap over the frames of each row, [B]."""
    gaps = torch.stack([task.lip_gap(z).flatten(1) for z in (x0, target)])
    centred = gaps - gaps.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(centred[0], centred[1], dim=-1)


def train(
    run: Path,
    material: Material,
    loop: LoopConfig,
    config: TeacherConfig,
    start_from: Path | None,
    agreement: Callable[[MouthTask], Agreement] | None = None,
) -> DiT:
    """Train or resume the pocket teacher; returns the averaged model.

    Args:
        start_from: weights of the same shape to begin with; the student's after stage 1 know most of the task.
    """
    model = DiT(FLAVOURS["pocket"])
    if start_from is not None:
        model.load_state_dict(load_dit(start_from)[0].state_dict())
    windows = Windows(material.coded, material.weights, seed=20, latent_frames=SEGMENT)
    task = MouthTask(material.codec, windows, config)
    beside = None if agreement is None else agreement(task)
    trainer = Loop([Trainee(model=model, loss=TeacherLoss(model, task, config, beside))], loop, run)
    task.rng = np.random.default_rng(trainer.seed(20))  # a resumed run goes on to new draws
    trained = trainer.run(SegmentListening(task, material.held, config) if material.held else None)["model"]
    assert isinstance(trained, DiT)
    return trained


def main() -> None:
    """Command line; see the module docstring."""
    from lipstream.training import scale  # it stands on this module

    if scale.asks_for_recipe():
        return scale.main("teacher")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--start-from", type=Path, metavar="DIT")
    add_agreement(parser)
    arguments = parser.parse_args()
    config = TeacherConfig(batch=arguments.batch)
    material = read_material(arguments, config.versions)
    loop = LoopConfig(steps=arguments.steps, lr=arguments.lr)
    train(arguments.run, material, loop, config, arguments.start_from, read_agreement(arguments))


if __name__ == "__main__":
    main()
