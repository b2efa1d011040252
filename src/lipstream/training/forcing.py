"""Stage 1, diffusion forcing: the causal student learns to denoise every chunk at its own noise level (paper, 3).

Loss: squared error of the x0 prediction at t drawn per chunk from the student's own times {0.999, 0.769, 0}. What one
forward shows is a `Layout`. Pocket (`RollingWindows`): what the rolling cache shows at inference (spec 2.1), the sink,
the previous chunk and the current chunk at rotary positions 0..6, or the first chunk alone, or the first two; the
reference sequence begins at another time of the same clip (it may overlap the target, never frame on frame). Official
sizes (`WholeClips`, spec 5.1): all chunks of a clip, with a window and a sink drawn from a list.

    python -m lipstream.training.forcing RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors
    torchrun ... -m lipstream.training.forcing RUN --recipe 14b --clips LIST ...       # see docs/training-at-scale.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.checkpoints.networks import load_dit
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise
from lipstream.models.codec import FRAMES_PER_LATENT
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.streaming.windows import chunk_causal_frame_mask, chunk_ranges
from lipstream.training.agreement import Agreement, add_agreement, read_agreement
from lipstream.training.coded import CHUNK, STEADY, Coded, Windows
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.material import Material, add_material, read_material
from lipstream.training.mouths import Batch, MouthConfig, MouthTask, Seen
from lipstream.training.task import BatchT, Errors, Task, predict


class Layout(NamedTuple):
    """What one forward shows.

    Attributes:
        chunk_of: [T] number of each latent frame's chunk; -1: clean context, whose error does not count.
        options: of `DiT.predict`: who sees whom.
        sink_apart: the first latent frame lies anywhere before the others.
    """

    chunk_of: Tensor
    options: dict[str, Any]
    sink_apart: bool = False


def window_layout(kind: int) -> tuple[int, Tensor]:
    """Latent frames n of a window kind and which may see which ([n, n] bool).

    0: the first chunk alone; 1: the first two chunks; 2: sink, previous and current chunk.
    """
    group = _chunk_of(kind)
    return len(group), group[:, None] >= group[None]


def _chunk_of(kind: int) -> Tensor:
    return torch.tensor({0: [0] * CHUNK, 1: [0] * CHUNK + [1] * CHUNK, 2: [-1] + [0] * CHUNK + [1] * CHUNK}[kind])


class ForcingTerms(Protocol):
    """What the loss needs to know; `RollingWindows` and `WholeClips` say what."""

    @property
    def times(self) -> tuple[float, ...]: ...

    @property
    def time_odds(self) -> tuple[float, ...]: ...

    @property
    def loss_scale(self) -> float: ...

    def layout(self, rng: np.random.Generator) -> Layout:
        """Of one forward: static shapes, no padding."""


@dataclass(frozen=True, kw_only=True)
class RollingWindows:
    """Windows as the rolling cache shows them.

    Attributes:
        times, time_odds: of which each chunk draws one, and their odds.
        solo_odds, second_odds: share of windows that are a stream's first chunk alone, and its first two chunks.
        loss_scale: of the squared error.
    """

    times: tuple[float, ...] = STUDENT_TIMES
    time_odds: tuple[float, ...] = (0.5, 0.35, 0.15)
    solo_odds: float = 0.15
    second_odds: float = 0.1
    loss_scale: float = 1.0

    def layout(self, rng: np.random.Generator) -> Layout:
        """One of the three kinds of `window_layout`."""
        kind = int(rng.choice(3, p=[self.solo_odds, self.second_odds, 1 - self.solo_odds - self.second_odds]))
        return Layout(_chunk_of(kind), {"frame_mask": window_layout(kind)[1]}, sink_apart=kind == 2)


@dataclass(frozen=True, kw_only=True)
class WholeClips:
    """All chunks of a clip at once.

    Attributes:
        times, time_odds, loss_scale: as in `RollingWindows`.
        windows: (window, sink) in latent frames, of which each forward draws one.
        window_positions: rotary positions counted within the network's own window, as in a rollout, else over the clip.
    """

    latent_frames: int
    times: tuple[float, ...]
    time_odds: tuple[float, ...]
    windows: tuple[tuple[int, int], ...]
    window_positions: bool
    loss_scale: float
    chunk: int = CHUNK

    def layout(self, rng: np.random.Generator) -> Layout:
        """All latent frames, with a window from the list."""
        window, sink = self.windows[int(rng.integers(len(self.windows)))]
        ranges = chunk_ranges(self.latent_frames, self.chunk)
        chunk_of = torch.tensor([number for number, (start, end) in enumerate(ranges) for _ in range(start, end)])
        if self.window_positions:
            return Layout(chunk_of, {"chunk_windows": True})
        return Layout(chunk_of, {"frame_mask": chunk_causal_frame_mask(self.latent_frames, self.chunk, window, sink)})


@dataclass(frozen=True, kw_only=True)
class ForcingConfig(MouthConfig, RollingWindows):
    """What stage 1 of the pocket model trains on."""


class ForcingLoss(Generic[BatchT]):
    """Stage-1 loss on random windows.

    Args:
        beside: (x0, batch, latent frames that are not context) -> a loss to add.
    """

    def __init__(
        self,
        model: DiT,
        task: Task[BatchT],
        config: ForcingTerms,
        beside: Callable[[Tensor, BatchT, slice], Tensor] | None = None,
    ) -> None:
        self.model, self.task, self.config, self.beside = model, task, config, beside

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        layout = self.config.layout(self.task.rng)
        batch = self.task.batch(len(layout.chunk_of), sink_apart=layout.sink_apart)
        target = batch.target
        t = self._times(layout.chunk_of, len(target)).to(target.device)
        noisy = add_noise(target, torch.randn_like(target), t)
        x0 = predict(self.task, self.model, noisy, t, batch, **layout.options)
        counted = (layout.chunk_of >= 0).to(target.device).expand(len(target), -1)
        errors = self.task.errors(x0, target)
        loss = self.config.loss_scale * (errors.loss * counted).sum() / counted.sum()
        metrics = self._metrics(errors, self.task.errors(batch.reference, target), (t > 0.9) & counted)
        if self.beside is not None:
            added = self.beside(x0, batch, slice(int((layout.chunk_of < 0).sum()), None))
            loss, metrics["beside"] = loss + added, added.item()
        return loss, metrics

    def _times(self, chunk_of: Tensor, batch: int) -> Tensor:
        """[B, T]; context is clean."""
        chunks = int(chunk_of.max()) + 1
        drawn = torch.multinomial(torch.tensor(self.config.time_odds), batch * chunks, True).view(batch, chunks)
        times = torch.tensor(self.config.times, dtype=torch.float64)[drawn]
        return torch.where(chunk_of >= 0, times[:, chunk_of.clamp(0)], 0.0)

    @staticmethod
    def _metrics(errors: Errors, copied: Errors, noisy: Tensor) -> dict[str, float]:
        """Errors of predictions from pure noise beside those of copying the reference."""
        if not noisy.any():
            return {}
        return errors.figures(noisy, "first_call") | {"copying": copied.latent[noisy].mean().item()}


class Listening:
    """How far the lips of clips that were never trained on follow their speech: correlation of the lip gap, by speaker.

    One prediction from noise per chunk, behind the clip's own past (so it is an upper bound of what a rollout gives);
    the reference sequence is the mean of the clip's other half.
    """

    def __init__(self, task: MouthTask, coded: Sequence[Coded]) -> None:
        self.task, self.coded = task, coded

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for item in self.coded:
            got, wanted = self._gaps(model, item)
            r = np.corrcoef(got.numpy(), wanted.numpy())[0, 1]
            found.setdefault(item.speaker, []).append(float(r))
        return {f"r_{speaker}": round(float(np.mean(values)), 4) for speaker, values in found.items()}

    def _gaps(self, model: nn.Module, item: Coded) -> tuple[Tensor, Tensor]:
        """Lip gap [frames] of the predictions and of the clip."""
        size, codec = FRAMES_PER_LATENT, self.task.codec
        chunk_frames = CHUNK * size
        starts = torch.arange(chunk_frames, item.frames - chunk_frames, chunk_frames)
        moving = starts[:, None] - chunk_frames + size * torch.arange(2 * CHUNK)  # previous and current chunk
        target = torch.cat([item.still[:1].expand(len(starts), -1, -1, -1)[:, None], item.moving[moving]], 1).float()
        first = item.speech[0, :1].expand(len(starts), size, -1)[:, None]
        speech = torch.cat([first, item.speech[0][moving[..., None] + torch.arange(size)]], 1).float()
        half = len(item.moving) // 2
        halves = [codec.pose_free(h.float()).mean(0) for h in (item.moving[half:], item.moving[:half])]
        reference = torch.stack([halves[int(s >= half)] for s in starts])[:, :, None].expand(-1, -1, STEADY, -1, -1)
        shots = item.moving[::FRAMES_PER_LATENT].float()
        order = item.opening[::FRAMES_PER_LATENT].argsort()
        shut, wide = (codec.pose_free(shots[order[end]][None])[:, :, None] for end in (0, -1))
        z = self.task.pose_free(target)
        t = torch.zeros(len(starts), STEADY, dtype=torch.float64)
        t[:, -CHUNK:] = STUDENT_TIMES[0]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        assert isinstance(model, DiT)
        seen = Seen(shut.expand(len(z), -1, -1, -1, -1), wide, reference)
        batch = Batch(z, speech, speech, seen)
        x0 = predict(self.task, model, add_noise(z, noise, t), t, batch, frame_mask=window_layout(2)[1])
        gaps = (self.task.lip_gap(q[:, :, -CHUNK:]).flatten() for q in (x0, z))
        return next(gaps), next(gaps)


def train(
    run: Path,
    material: Material,
    loop: LoopConfig,
    config: ForcingConfig,
    flavour: str = "pocket",
    start_from: Path | None = None,
    agreement: Callable[[MouthTask], Agreement] | None = None,
) -> DiT:
    """Stage 1; resumes from ``run``, else goes on from a weights file. Returns the averaged model.

    Every time the run is saved, ``metrics.jsonl`` tells how well lips of held-out clips follow (:class:`Listening`).
    """
    model = DiT(FLAVOURS[flavour])
    if start_from is not None:
        model.load_state_dict(load_dit(start_from)[0].state_dict())
    windows = Windows(material.coded, material.weights, seed=10)
    task = MouthTask(material.codec, windows, config)
    beside = None if agreement is None else agreement(task)
    trainer = Loop([Trainee(model=model, loss=ForcingLoss(model, task, config, beside))], loop, run)
    task.rng = np.random.default_rng(trainer.seed(10))  # a resumed run goes on to new draws
    evaluate = None
    if material.held:
        listening = Listening(task, material.held)

        def evaluate(models: dict[str, nn.Module]) -> dict[str, float]:
            return listening(models["model"])

    trained = trainer.run(evaluate)["model"]
    assert isinstance(trained, DiT)
    return trained


def main() -> None:
    """Command line; see the module docstring."""
    from lipstream.training import scale  # it stands on this module

    if scale.asks_for_recipe():
        return scale.main("forcing")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--start-from", type=Path, metavar="DIT", help="weights to go on from where RUN is new")
    add_agreement(parser)
    arguments = parser.parse_args()
    config = ForcingConfig(batch=arguments.batch)
    material = read_material(arguments, config.versions)
    loop = LoopConfig(steps=arguments.steps, lr=arguments.lr)
    agreement = read_agreement(arguments)
    train(arguments.run, material, loop, config, start_from=arguments.start_from, agreement=agreement)


if __name__ == "__main__":
    main()
