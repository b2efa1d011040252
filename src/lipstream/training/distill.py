"""Stage 2: Self Forcing with Sync-Window distribution matching and a SyncNet reward (paper, "Method Details").

Source of the details: spec 5.2.

Per step the critic learns what the student makes; every fifth step the student moves to where the teacher and the
critic disagree least:

1. roll the student out as at inference: chunk by chunk, its own past in the cache. One exit call for all chunks, drawn
   at random; only that call has a gradient, and the cache is detached, so no gradient crosses chunks.
2. noise the result to a random time t. The teacher's x0 is guided by the speech inside the sync window only.
3. matching gradient (teacher against critic), weighted per sample by exp(beta R), R the SyncNet's confidence.

The equations are in `lipstream.diffusion.matching`, the schedule in `diffusion.guidance`, the rollout is the one that
`lipstream sync` runs.

    python -m lipstream.training.distill RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors \
        --student dit.safetensors --teacher teacher.safetensors --syncnet syncnet.safetensors
    torchrun ... -m lipstream.training.distill RUN --recipe 14b --clips LIST ...       # see docs/training-at-scale.md
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.checkpoints.networks import load_dit, load_syncnet
from lipstream.diffusion.guidance import guided, sync_window_scale
from lipstream.diffusion.matching import (
    RewardMode,
    critic_loss,
    matching_gradient,
    matching_loss,
    reward_weights,
    rewarded,
)
from lipstream.diffusion.rollout import Rollout
from lipstream.diffusion.schedule import STUDENT_TIMES, SYNC_WINDOW, add_noise, distillation_time
from lipstream.models.audio import load_speech_encoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec
from lipstream.models.dit import DiT
from lipstream.models.syncnet_pocket import SyncScorer
from lipstream.streaming.kv_cache import KVCache
from lipstream.training import parallel
from lipstream.training.coded import Windows
from lipstream.training.defect import ForgetfulCache
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.material import Material, add_material, read_material
from lipstream.training.mouths import Batch, MouthConfig, MouthTask
from lipstream.training.task import BatchT, Task, predict
from lipstream.training.teacher import SEGMENT, gap_correlation, held_out_batch, speakers

log = logging.getLogger(__name__)

_CACHE_LIMITS = ("window_latent_frames", "sink_latent_frames")
Guidance = Literal["window", "all", "none", "reverse"]
#: Latents [B, C, T, H, W] and their batch, which has the speech -> confidence [B] that they belong together.
Reward = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class DistillTerms:
    """What stage 2 does. The defaults are the paper's where it has them.

    Attributes:
        times: of the student's calls and, last, of its clean pass.
        guidance_schedule: where the teacher is guided by the speech: in the window, everywhere, nowhere, outside of it.
        scale, window: the teacher's guidance there, and its times.
        beta: of the reward's exponent; 0 is no reward. The paper has 2, for a confidence of about 7; that of the pocket
            SyncNet is about 0.4 and spreads by 0.1.
        clamp: limits of the reward before the exponent.
        student_every: critic updates per student update.
        student_lr, critic_lr: of the two optimisers.
        latent_frames: of a rollout.
        cache_window: (window, sink) of the rollout's cache in latent frames; None: the network's own.
        defective_gradients: the student's are computed with the reference's mistake (`training.defect`).
    """

    times: tuple[float, ...] = STUDENT_TIMES
    guidance_schedule: Guidance = "window"
    scale: float = 4.5
    window: tuple[float, float] = SYNC_WINDOW
    beta: float = 10.0
    clamp: tuple[float, float] | None = (0.0, 1.0)
    reward_mode: RewardMode = "per_sample"
    student_every: int = 5
    student_lr: float = 1e-4
    critic_lr: float = 2e-4
    latent_frames: int = SEGMENT
    cache_window: tuple[int, int] | None = None
    defective_gradients: bool = False


@dataclass(frozen=True, kw_only=True)
class DistillConfig(MouthConfig, DistillTerms):
    """What stage 2 of the pocket model does.

    Attributes:
        drop_audio: none: the student has no null branch any more.
    """

    batch: int = 8
    drop_audio: float = 0.0
    averaged_odds: float = 1.0


def teacher_scale(t: Tensor, config: DistillTerms) -> Tensor:
    """The teacher's guidance at times t [B]."""
    if config.guidance_schedule == "none":
        return torch.ones_like(t)
    if config.guidance_schedule == "all":
        return torch.full_like(t, config.scale)
    return sync_window_scale(t, config.scale, config.window, reverse=config.guidance_schedule == "reverse")


class Distillation(Generic[BatchT]):
    """The three networks and the two losses.

    Args:
        reward: None or ``beta`` 0 trains without one.
    """

    def __init__(
        self,
        student: DiT,
        critic: DiT,
        teacher: DiT,
        task: Task[BatchT],
        config: DistillTerms,
        reward: Reward | None = None,
    ) -> None:
        if config.beta and reward is None:
            raise ValueError(f"beta is {config.beta}, but there is no reward: give a SyncNet, or set beta to 0")
        self.student, self.critic, self.task, self.config = student, critic, task, config
        self.teacher = teacher.eval().requires_grad_(False)
        self.reward = reward if config.beta else None
        # Of the elements of a sample, mean 1: the mouth's shape counts, the cells that are kept do not.
        self.weight = (task.weight / task.weight.mean())[None, :, None]

    def critic_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """How well the critic knows what the student makes."""
        batch = self._batch()
        with torch.no_grad():
            generated = self.generate(batch)
        t = self._time(generated)
        noisy = add_noise(generated, torch.randn_like(generated), t)
        predicted = predict(self.task, self.critic, noisy, t, batch)
        return critic_loss(predicted, generated, self.weight).mean(), {}

    def student_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """How far the student's samples are from the teacher's, weighted by how well they fit the speech."""
        batch = self._batch()
        generated = self.generate(batch)
        gradient = self._gradient(generated.detach(), batch)
        losses = matching_loss(generated, gradient, self.weight)
        metrics = {
            "gradient": gradient.abs().mean().item(),
            "error": self.task.errors(generated.detach(), batch.target).latent.mean().item(),
        }
        if self.reward is None:
            return losses.mean(), metrics
        reward = self.reward(generated.detach(), batch)
        metrics["reward"] = reward.mean().item()
        weights = reward_weights(reward, self.config.beta, self.config.clamp)
        return rewarded(losses, weights, self.config.reward_mode), metrics

    def generate(self, batch: BatchT) -> Tensor:
        """The student's x0 [B, C, T, H, W] of a batch, chunk by chunk, all chunks left at the same random call."""
        config = self.config
        exit_call = int(parallel.share(float(self.task.rng.integers(len(config.times) - 1))))
        return roll_out(
            self.student, self.task, batch, config.times, exit_call=exit_call, cache_window=config.cache_window,
            defective_gradients=config.defective_gradients,
        )  # fmt: skip

    @torch.no_grad()
    def _gradient(self, generated: Tensor, batch: BatchT) -> Tensor:
        t = self._time(generated)
        noisy = add_noise(generated, torch.randn_like(generated), t)
        fake = predict(self.task, self.critic, noisy, t, batch)
        real = predict(self.task, self.teacher, noisy, t, batch)
        scale = teacher_scale(t, self.config)
        # Processes that share the teacher's blocks have to call it equally often, whatever their times are.
        if parallel.together() or (scale != 1).any():
            silent = predict(self.task, self.teacher, noisy, t, batch, null=True)
            real = guided(real, silent, scale)
        return matching_gradient(generated, fake, real)

    def _batch(self) -> BatchT:
        return self.task.batch(self.config.latent_frames)

    def _time(self, generated: Tensor) -> Tensor:
        return distillation_time(torch.from_numpy(self.task.rng.random(len(generated)))).to(generated.device)


def roll_out(
    student: DiT,
    task: Task[BatchT],
    batch: BatchT,
    times: tuple[float, ...] = STUDENT_TIMES,
    exit_call: int | None = None,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
    cache_window: tuple[int, int] | None = None,
    defective_gradients: bool = False,
) -> Tensor:
    """x0 [B, C, T, H, W] of the student on a batch, chunk by chunk, as `lipstream sync` makes it.

    Args:
        exit_call: ends every chunk after that call, which alone has a gradient; None: the last call.
        generator: of the noise; None: torch's own.
        cache_window: (window, sink) of the cache; None: the network's own.
        defective_gradients: with the reference's mistake (`training.defect`); the result is the same.
    """
    if defective_gradients:
        parallel.recompute_blocks(student)
    size, channels, latent_frames, height, width = batch.target.shape
    chunk, device = student.config.chunk_latent_frames, batch.target.device
    if latent_frames % chunk:
        raise ValueError(f"a rollout is made of chunks of {chunk} latent frames, {latent_frames} are not")
    shape = (size, channels, chunk, height, width)
    limits = {} if cache_window is None else dict(zip(_CACHE_LIMITS, cache_window, strict=True))
    kind = ForgetfulCache if defective_gradients else KVCache
    cache = student.make_cache(size, height, width, kind, dtype=torch.bfloat16, **limits)
    with torch.autocast(device.type, torch.bfloat16):
        conditions = task.conditions(student, batch)
        rollout = Rollout(
            student, batch=size, height=height, width=width, times=times, guidance=guidance,
            noise=lambda number: lambda call: torch.randn(shape, generator=generator, device=device),
            cache=cache,
        )  # fmt: skip
        parts = [
            rollout.step(conditions.slice(slice(start, start + chunk)), exit_call=exit_call)
            for start in range(0, latent_frames, chunk)
        ]
    if isinstance(cache, ForgetfulCache):
        cache.forget()
    return torch.cat(parts, 2).float()


class Audition:
    """Figures of a student's rollouts on held-out clips, by speaker; the same noise and segments every time.

    Per speaker: ``r`` correlation of the lip gap with the truth, ``size`` of its movement against the true one,
    ``error`` of the latents, ``sharp`` fine detail of the shape fields against the true ones, ``sync`` the reward.
    """

    def __init__(self, task: MouthTask, material: Material, config: DistillConfig, reward: Reward | None) -> None:
        self.task, self.config, self.reward = task, config, reward
        self.batches = {
            name: held_out_batch(task, [c for c in material.held if c.speaker == name])
            for name in speakers(material.held)
        }

    @torch.no_grad()
    def __call__(self, student: DiT, guidance: float = 1.0) -> dict[str, float]:
        return self.judge(
            lambda batch: roll_out(
                student, self.task, batch, self.config.times, guidance=guidance,
                generator=torch.Generator().manual_seed(0),
            )
        )  # fmt: skip

    @torch.no_grad()
    def judge(self, make: Callable[[Batch], Tensor]) -> dict[str, float]:
        """Figures of any way to make x0 [B, K, T, g, g] of a batch."""
        found: dict[str, float] = {}
        for name, batch in self.batches.items():
            x0 = make(batch)
            figures = {
                "r": gap_correlation(self.task, x0, batch.target).mean(),
                "size": movement(self.task, x0) / movement(self.task, batch.target),
                "error": self.task.errors(x0, batch.target).latent.mean(),
                "sharp": detail(self.task, x0) / detail(self.task, batch.target),
            }
            if self.reward is not None:
                figures["sync"] = self.reward(x0, batch).mean()
            found |= {f"{key}_{name}": round(float(value), 4) for key, value in figures.items()}
        return found


def movement(task: MouthTask, z: Tensor) -> Tensor:
    """Standard deviation of the lip gap over time, mean over the batch, crop px."""
    return task.lip_gap(z).flatten(1).std(1).mean()


def detail(task: MouthTask, z: Tensor) -> Tensor:
    """Energy of the second spatial differences of the shape fields: what blur takes away first."""
    fields = task.fields(z)
    return (fields[..., 2:, :] - 2 * fields[..., 1:-1, :] + fields[..., :-2, :]).square().mean().sqrt()


def loop_config(steps: int) -> LoopConfig:
    """Optimisation of so many critic updates: the paper's betas; rates that fall, for a run is short."""
    return LoopConfig(steps=steps, betas=(0.0, 0.999), ema=0.95, warmup=20, final_lr=0.1, save_every=100)


def train(
    run: Path,
    material: Material,
    loop: LoopConfig,
    config: DistillConfig,
    networks: tuple[DiT, DiT, DiT],
    reward: Reward | None = None,
    seed: int = 30,
) -> DiT:
    """Train or resume stage 2; returns the averaged student.

    Args:
        networks: student, critic and teacher, the first two are trained.
    """
    student, critic, teacher = networks
    for trained in (student, critic):
        trained.train().requires_grad_(True)
    windows = Windows(material.coded, material.weights, seed=seed, latent_frames=config.latent_frames)
    task = MouthTask(material.codec, windows, config)
    parts = Distillation(student, critic, teacher, task, config, reward)
    trainees = [
        Trainee(name="critic", model=critic, loss=parts.critic_loss, lr=config.critic_lr),
        Trainee(
            name="student", model=student, loss=parts.student_loss, lr=config.student_lr, every=config.student_every
        ),
    ]
    trainer = Loop(trainees, loop, run)
    task.rng = np.random.default_rng(trainer.seed(seed))  # a resumed run goes on to new draws
    torch.manual_seed(trainer.seed(seed))
    audition = Audition(task, material, config, reward) if material.held else None

    def evaluate(models: dict[str, nn.Module]) -> dict[str, float]:
        assert audition is not None and isinstance(models["student"], DiT)
        return audition(models["student"])

    averaged = trainer.run(evaluate if audition else None)["student"]
    assert isinstance(averaged, DiT)
    return averaged


def syncnet_reward(file: Path, codec: PocketCodec, speech: Path) -> Reward:
    """The reward of a SyncNet file: confidence of the shape fields, a stream's first frame once."""
    scorer = SyncScorer(load_syncnet(file), codec, load_speech_encoder(speech))

    def reward(z: Tensor, batch: Batch) -> Tensor:
        lone = FRAMES_PER_LATENT - 1
        return scorer.confidence(scorer.decode(z)[:, lone:], batch.heard.flatten(1, 2)[:, lone:])

    return reward


def main() -> None:
    """Command line; see the module docstring."""
    from lipstream.training import scale  # it stands on this module

    if scale.asks_for_recipe():
        return scale.main("distill")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_material(parser)
    parser.add_argument("--student", type=Path, required=True, metavar="DIT", help="weights after stage 1")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIT", help="the critic begins with them too")
    parser.add_argument("--syncnet", type=Path, metavar="FILE", help="of the reward; without it there is none")
    parser.add_argument("--steps", type=int, default=1000, help="critic updates")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--guidance", choices=get_args(Guidance), default=DistillConfig.guidance_schedule)
    parser.add_argument("--scale", type=float, default=DistillConfig.scale)
    parser.add_argument("--beta", type=float, default=DistillConfig.beta)
    parser.add_argument("--times", type=float, nargs="+", default=list(STUDENT_TIMES))
    parser.add_argument("--seed", type=int, default=30)
    arguments = parser.parse_args()
    config = DistillConfig(
        batch=arguments.batch,
        times=tuple(arguments.times),
        guidance_schedule=arguments.guidance,
        scale=arguments.scale,
        beta=arguments.beta if arguments.syncnet else 0.0,
    )
    material = read_material(arguments, config.versions)
    reward = syncnet_reward(arguments.syncnet, material.codec, arguments.speech) if arguments.syncnet else None
    networks = tuple(load_dit(getattr(arguments, name))[0] for name in ("student", "teacher", "teacher"))
    train(
        arguments.run,
        material,
        loop_config(arguments.steps),
        config,
        (networks[0], networks[1], networks[2]),
        reward,
        arguments.seed,
    )


if __name__ == "__main__":
    main()
