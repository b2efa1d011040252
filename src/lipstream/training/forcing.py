"""Stage 1, diffusion forcing: the causal student learns to denoise every chunk at its own noise level (paper, 3).

Loss: squared error of the x0 prediction at t drawn per chunk from the student's own times {0.999, 0.769, 0}. A training
window is what the rolling cache shows at inference (spec 2.1): the sink, the previous chunk and the current chunk at
rotary positions 0..6, or the first chunk alone, or the first two. The reference sequence begins at another time of the
same clip (it may overlap the target, never frame on frame).

    python -m lipstream.training.forcing RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.checkpoints.networks import load_dit
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise
from lipstream.models.codec import FRAMES_PER_LATENT
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.training.coded import CHUNK, STEADY, Coded, Windows
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.material import Material, add_material, read_material
from lipstream.training.mouths import GAP_PX, Errors, MouthConfig, MouthTask, Seen


@dataclass(frozen=True, kw_only=True)
class ForcingConfig(MouthConfig):
    """What stage 1 trains on.

    Attributes:
        time_odds: odds of the three student times for the current chunk.
        solo_odds, second_odds: share of windows that are a stream's first chunk alone, and its first two chunks.
    """

    time_odds: tuple[float, float, float] = (0.5, 0.35, 0.15)
    solo_odds: float = 0.15
    second_odds: float = 0.1


def window_layout(kind: int) -> tuple[int, Tensor]:
    """Latent frames n of a window kind and which may see which ([n, n] bool).

    0: the first chunk alone; 1: the first two chunks; 2: sink, previous and current chunk.
    """
    chunk_of = {0: [0] * CHUNK, 1: [0] * CHUNK + [1] * CHUNK, 2: [0] + [1] * CHUNK + [2] * CHUNK}[kind]
    group = torch.tensor(chunk_of)
    return len(chunk_of), group[:, None] >= group[None]


class ForcingLoss:
    """Stage-1 loss on random windows."""

    def __init__(self, model: DiT, task: MouthTask, config: ForcingConfig) -> None:
        self.model, self.task, self.config = model, task, config

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        solo, second = self.config.solo_odds, self.config.second_odds
        # One layout a step: static shapes, no padding.
        kind = int(self.task.windows.rng.choice(3, p=[solo, second, 1 - solo - second]))
        latent_frames, visible = window_layout(kind)
        target, speech, _, seen = self.task.batch(latent_frames, sink_apart=kind == 2)
        t = self._times(kind, len(target))
        noisy = add_noise(target, torch.randn_like(target), t)
        x0 = self.task.predict(self.model, noisy, t, speech, seen, frame_mask=visible)
        counted = torch.ones_like(t, dtype=torch.float32)
        if kind == 2:
            counted[:, 0] = 0  # the sink is context
        errors = self.task.errors(x0, target)
        loss = ((errors.latent + self.config.gap_weight * errors.gap) * counted).sum() / counted.sum()
        return loss, self._metrics(errors, self.task.errors(seen.reference, target), (t > 0.9) & (counted > 0))

    def _times(self, kind: int, batch: int) -> Tensor:
        odds = torch.tensor(self.config.time_odds)
        chunks = 1 if kind == 0 else 2
        drawn = torch.tensor(STUDENT_TIMES, dtype=torch.float64)[torch.multinomial(odds, batch * chunks, True)]
        t = drawn.view(batch, chunks).repeat_interleave(CHUNK, 1)
        if kind == 2:
            t = torch.cat([torch.zeros(batch, 1, dtype=torch.float64), t], 1)
        return t

    @staticmethod
    def _metrics(errors: Errors, copied: Errors, noisy: Tensor) -> dict[str, float]:
        """Errors of predictions from pure noise beside those of copying the reference."""
        if not noisy.any():
            return {}
        return {
            "first_call": errors.latent[noisy].mean().item(),
            "copying": copied.latent[noisy].mean().item(),
            "gap": errors.gap[noisy].mean().sqrt().item() * GAP_PX,
        }


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
        x0 = self.task.predict(model, add_noise(z, noise, t), t, speech, seen, frame_mask=window_layout(2)[1])
        gaps = (self.task.lip_gap(q[:, :, -CHUNK:]).flatten() for q in (x0, z))
        return next(gaps), next(gaps)


def train(
    run: Path,
    material: Material,
    loop: LoopConfig,
    config: ForcingConfig,
    flavour: str = "pocket",
    start_from: Path | None = None,
) -> DiT:
    """Stage 1; resumes from ``run``, else goes on from a weights file. Returns the averaged model.

    Every time the run is saved, ``metrics.jsonl`` tells how well lips of held-out clips follow (:class:`Listening`).
    """
    model = DiT(FLAVOURS[flavour])
    if start_from is not None:
        model.load_state_dict(load_dit(start_from)[0].state_dict())
    windows = Windows(material.coded, material.weights, seed=10)
    task = MouthTask(material.codec, windows, config)
    trainer = Loop([Trainee(model=model, loss=ForcingLoss(model, task, config))], loop, run)
    windows.rng = np.random.default_rng(trainer.step + 10)  # a resumed run goes on to new draws
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--start-from", type=Path, metavar="DIT", help="weights to go on from where RUN is new")
    arguments = parser.parse_args()
    config = ForcingConfig(batch=arguments.batch)
    material = read_material(arguments, config.versions)
    loop = LoopConfig(steps=arguments.steps, lr=arguments.lr)
    train(arguments.run, material, loop, config, start_from=arguments.start_from)


if __name__ == "__main__":
    main()
