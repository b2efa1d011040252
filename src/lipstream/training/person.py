"""One person: what of their videos is trained on and what is kept to judge by, and a short low-rank run of stage 1.

The material is a row of stretches (a face in every frame, no cut). Its end is held out; between the two lies a gap, so
that no training window, and no speech that it hears ahead, reaches into what is judged. The loss is stage 1's; general
ability is kept by what cannot move (`lipstream.training.low_rank`) and by few steps, for no other person's data is at
hand where this runs.

    split = split_by_time(stretches, PersonConfig())
    dit = train_person(run, dit, material, PersonConfig())

`lipstream.personal` makes the stretches of videos and judges the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipstream.models.dit import DiT
from lipstream.training.coded import APART_FRAMES, STEADY, Windows, span_frames
from lipstream.training.forcing import ForcingConfig, ForcingLoss
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.low_rank import add_low_rank, merge_low_rank
from lipstream.training.material import Material
from lipstream.training.mouths import MouthTask

LEAST_FRAMES = span_frames(STEADY) + 2 * APART_FRAMES  # of a piece that windows are drawn from
PIECE_FRAMES = 250  # longer stretches are cut, or coding a minute would take gigabytes


@dataclass(frozen=True, kw_only=True)
class PersonConfig(ForcingConfig):
    """How one person is learned.

    Attributes:
        held_share: of the frames, at the end, that are judged by and never trained on.
        gap_frames: pixel frames of the same video between what is trained on and what is held out.
        whole: modules that are trained as they are, beside the low-rank updates.
    """

    batch: int = 8
    versions: int = 3
    held_share: float = 0.25
    gap_frames: int = 30
    rank: int = 16
    whole: tuple[str, ...] = ("audio_cond_projs",)
    steps: int = 60
    lr: float = 3e-3


@dataclass(frozen=True)
class Span:
    """Pixel frames [start, stop) of a video in which one face shows without a break."""

    video: int
    start: int
    stop: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)


class Split(NamedTuple):
    """Disjoint spans: to train on, and to judge by."""

    train: tuple[Span, ...]
    held: tuple[Span, ...]


def split_by_time(stretches: Sequence[Span], config: PersonConfig) -> Split:
    """Hold out the end of the material, in blocks of time.

    A stretch that is too short for a part of either kind and a gap is held out as a whole; spans too short to use are
    left out.

    Raises:
        ValueError: there are no stretches, or nothing is left to train on or to judge by.
    """
    if not stretches:
        raise ValueError("no stretch to split")
    border, begin, index = round(sum(map(len, stretches)) * (1 - config.held_share)), 0, 0
    while index < len(stretches) - 1 and begin + len(stretches[index]) <= border:
        begin += len(stretches[index])
        index += 1
    divided = stretches[index]
    first = min(divided.start + border - begin, divided.stop - LEAST_FRAMES)  # the first frame that is held out
    if first - config.gap_frames - divided.start < LEAST_FRAMES:
        first = divided.start
    before = [*stretches[:index], replace(divided, stop=first)]
    ends = [min(s.stop, first - config.gap_frames) if s.video == divided.video else s.stop for s in before]
    cut = [replace(span, stop=end) for span, end in zip(before, ends, strict=True)]
    kept = [span for span in cut if len(span) >= LEAST_FRAMES]
    judged = [span for span in (replace(divided, start=first), *stretches[index + 1 :]) if len(span) >= LEAST_FRAMES]
    if not kept or not judged:
        raise ValueError(
            f"a face shows without a break for {[len(s) for s in stretches]} frames; too little to train on one part "
            f"and to judge by another (at least {2 * LEAST_FRAMES + config.gap_frames} frames in one go)"
        )
    return Split(tuple(kept), tuple(judged))


def pieces(span: Span, most_frames: int = PIECE_FRAMES) -> list[Span]:
    """A span in parts of nearly equal length, of no more than ``most_frames``."""
    count = -(-len(span) // most_frames)
    borders = [span.start + round(i * len(span) / count) for i in range(count + 1)]
    return [replace(span, start=a, stop=b) for a, b in pairwise(borders)]


def train_person(
    run: Path,
    model: DiT,
    material: Material,
    config: PersonConfig,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> DiT:
    """Train a network on one person's clips, or go on with ``run``; returns it averaged and merged to plain weights.

    Args:
        model: the general network; it is left with live factors, use what is returned.
        material: the clips to train on, coded; ``held`` is not used.
        progress: called before every step with the steps done.
    """
    torch.manual_seed(seed)
    add_low_rank(model, config.rank, config.whole)
    windows = Windows(material.coded, material.weights, seed=seed)
    task = MouthTask(material.codec, windows, config)
    loss = ForcingLoss(model, task, config)

    def told(step: int) -> tuple[Tensor, dict[str, float]]:
        if progress is not None:
            progress(step)
        return loss(step)

    settings = LoopConfig(steps=config.steps, lr=config.lr, warmup=10, ema=0.95, report_every=10, save_every=25)
    trainer = Loop([Trainee(model=model, loss=told)], settings, run)
    windows.rng = np.random.default_rng((seed, trainer.step))  # a resumed run goes on to new draws
    trained = trainer.run()["model"]
    assert isinstance(trained, DiT)
    merge_low_rank(trained)
    return trained
