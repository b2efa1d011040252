"""Hyper-parameters of the three training stages as functions of a flavour: `teacher("14b")`, `forcing`, `distill`.

`1.3b` and `14b` hold what the paper and the released code say, each value with where it stands ("paper": its digest's
training section and appendix values; "spec": the engineering specification of the released system). Where the two
disagree, the comment says so. A value that no source states is marked "ours". `pocket` is the small model on a CPU,
`test` takes seconds; their values are ours throughout.

    recipe = distill("14b")
    Loop([...], recipe.loop, folder)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lipstream.diffusion.schedule import STUDENT_TIMES, SYNC_WINDOW
from lipstream.training.adapters import LoraRecipe
from lipstream.training.loop import LoopConfig

CLIP_LATENT_FRAMES = 21  # 81 pixel frames at 25 per second (paper; spec 1.1)
UNCLIPPED = float("inf")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all stages have.

    Attributes:
        flavour: of the network that is trained.
        loop: optimiser and schedule; ``loop.accumulate`` is per process.
        batch: clips of a micro batch, per process.
        processes: GPUs that the global batch is meant for.
        latent_frames: of a training clip.
        lora: factors instead of a full fine-tune; None trains all.
    """

    flavour: str
    loop: LoopConfig
    batch: int
    processes: int = 1
    latent_frames: int = CLIP_LATENT_FRAMES
    lora: LoraRecipe | None = None

    @property
    def global_batch(self) -> int:
        """Clips of one optimiser step."""
        return self.batch * self.processes * self.loop.accumulate


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(Recipe):
    """Flow matching of the bidirectional teacher.

    Attributes:
        drop_text, drop_audio: share of clips without (the null branches of guidance).
        mouth_weight: of the error inside the mouth region, 1 elsewhere.
        time_weight: bell: as Wan is trained; inverse_square: 1 / t² of the x0 error, bounded.
        sync_weight, perceptual_weight, motion_weight: of the auxiliary losses (StableSyncNet, LPIPS-VGG, TREPA).
    """

    drop_text: float = 0.1  # spec 5.3
    drop_audio: float = 0.1  # spec 5.3
    mouth_weight: float = 2.0  # spec 5.3
    time_weight: Literal["bell", "inverse_square"] = "bell"  # spec 5.3
    sync_weight: float = 0.05  # spec 5.3; windows of 16 frames, stride 8, over 80 frames
    perceptual_weight: float = 0.15  # spec 5.3
    motion_weight: float = 10.0  # spec 5.3


@dataclass(frozen=True, kw_only=True)
class ForcingRecipe(Recipe):
    """Stage 1, diffusion forcing.

    Attributes:
        times: of which each chunk draws one, clean included (spec 5.1).
        time_odds: their probabilities.
        windows: (window, sink) in latent frames; each forward draws one (spec 5.1).
        window_positions: rotary positions counted within the window, else over the whole clip.
        loss_scale: of the mean squared error of x0, which is the code's; the paper says flow matching (spec 9.1).
        drop_audio: share of clips without speech.
    """

    times: tuple[float, ...] = STUDENT_TIMES
    time_odds: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)  # spec 5.1: uniform over all entries
    windows: tuple[tuple[int, int], ...] = ((7, 1), (10, 1), (13, 1), (9, 3), (12, 3))  # spec 5.1: weight 0.2 each
    window_positions: bool = False  # spec 5.1
    loss_scale: float = 0.5  # spec 5.1
    drop_audio: float = 0.0  # spec 5.1: no dropout in this stage


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(Recipe):
    """Stage 2, Self Forcing with Sync-Window DMD and the SyncNet reward.

    Attributes:
        critic_flavour, teacher_flavour: of the other two networks.
        critic_lora: of the critic. Give it what the student has: a critic with less capacity never closes the gap of
            synchronisation (spec 5.2).
        student_every: critic updates per student update.
        critic_lr, critic_clip: as ``loop.lr`` and ``loop.clip`` are the student's.
        times: of the student's calls and, last, of its clean pass.
        window, sink: latent frames that the rollout's cache shows, the current chunk included.
        guidance_window, guidance_scale: closed interval of t in which the teacher is guided, how strongly (1 outside).
        guidance_drop: what the null branch lacks.
        beta: reward weight exp(beta R).
        reward_clamp: limits of R.
    """

    critic_flavour: str
    teacher_flavour: str
    critic_lora: LoraRecipe | None = None
    student_every: int = 5  # spec 5.2; the paper's "student-to-fake-score 5:1" is meant the other way round (spec 9.1)
    critic_lr: float = 2e-6  # spec 5.2: the same for both
    critic_clip: float = UNCLIPPED  # spec 5.2: only the student is clipped
    times: tuple[float, ...] = STUDENT_TIMES  # paper: steps 0 and 30 of 50; spec 3
    window: int = 7  # paper: sink 1 and rolling 6; spec 2.1: the current chunk is among them
    sink: int = 1  # paper
    guidance_window: tuple[float, float] = SYNC_WINDOW  # paper: 20 <= j <= 40; spec 9.1: .556, not the paper's .555
    guidance_scale: float = 4.5  # paper
    guidance_drop: Literal["text+audio", "audio"] = "text+audio"  # spec 5.2; the paper's appendix also tests audio only
    beta: float = 2.0  # paper
    reward_clamp: tuple[float, float] | None = (0.0, 8.0)  # spec 5.2: the authors' advice; their own run had none


def teacher(flavour: str) -> TeacherRecipe:
    """The teacher's recipe.

    The paper says that only LoRA is trained; the code also trains the patch kernel and the audio modules (spec 9.1).

    Raises:
        ValueError: unknown flavour.
    """
    if flavour in ("1.3b", "14b"):
        loop = LoopConfig(
            steps=6000 if flavour == "14b" else 19_500,  # spec 5.3 (last run of a chain); spec 1.4 (step-19500)
            lr=5e-5,  # spec 5.3
            warmup=0,  # no source states one
            final_lr=1.0,  # no source states a decay
            betas=(0.9, 0.999),  # no source states them: AdamW's own
            weight_decay=0.01,  # spec 5.3
            clip=1.0,  # spec 5.3 (10 in the stages after it)
            ema=None,  # no source states one
            accumulate=2,  # ours: the source has only the global batch of 8 (spec 5.3)
            recompute=True,  # ours
            bf16=True,  # paper
        )
        return TeacherRecipe(flavour=flavour, loop=loop, batch=1, processes=4, lora=LoraRecipe())
    small = {
        # what `python -m lipstream.training.teacher` does; the small network has no text and no auxiliary losses
        "pocket": (LoopConfig(steps=2000, lr=4e-4), 12, 15),
        "test": (LoopConfig(steps=4, lr=1e-3, warmup=2, report_every=1, save_every=2), 2, 6),
    }
    loop, batch, latent_frames = _small(flavour, small)
    return TeacherRecipe(
        flavour=flavour, loop=loop, batch=batch, latent_frames=latent_frames, drop_text=0.0, mouth_weight=1.0,
        time_weight="inverse_square", sync_weight=0.0, perceptual_weight=0.0, motion_weight=0.0,
    )  # fmt: skip


def forcing(flavour: str) -> ForcingRecipe:
    """The recipe of stage 1.

    Raises:
        ValueError: unknown flavour.
    """
    if flavour in ("1.3b", "14b"):
        loop = LoopConfig(
            steps=5000,  # paper; spec 5.1
            lr=1e-5,  # paper; spec 5.1
            warmup=1000,  # paper; the released code has none (spec 9.1: either)
            final_lr=1.0,  # spec 5.1: constant
            betas=(0.9, 0.999),  # spec 5.1
            weight_decay=0.01,  # paper; spec 5.1
            clip=10.0,  # paper; spec 5.1
            ema=None,  # spec 5.2: off
            accumulate=2,  # spec 5.1: 2 x 4 GPUs x 2 = 16 (1.3B: only the 16 is stated)
            recompute=True,  # ours
            bf16=True,  # paper; spec 5.1: float32 masters
        )
        # spec 5.1: the 14B student is a LoRA, the 1.3B one is trained in full
        lora = LoraRecipe() if flavour == "14b" else None
        return ForcingRecipe(flavour=flavour, loop=loop, batch=2, processes=4, lora=lora)
    small = {
        # rates, odds and dropout of the shipped model
        "pocket": (LoopConfig(steps=6000, lr=8e-4), 16, 7),
        "test": (LoopConfig(steps=4, lr=1e-3, warmup=2, report_every=1, save_every=2), 2, 6),
    }
    loop, batch, latent_frames = _small(flavour, small)
    return ForcingRecipe(
        flavour=flavour, loop=loop, batch=batch, latent_frames=latent_frames, time_odds=(0.5, 0.35, 0.15),
        windows=((7, 1),), window_positions=True, loss_scale=1.0, drop_audio=0.1,
    )  # fmt: skip


def distill(flavour: str) -> DistillRecipe:
    """The recipe of stage 2.

    Raises:
        ValueError: unknown flavour.
    """
    if flavour in ("1.3b", "14b"):
        large = flavour == "14b"
        loop = LoopConfig(
            steps=600,  # paper; the code counts 1 to 599, with 119 student updates (spec 5.2), ours 0 to 599 with 120
            lr=2e-6,  # paper; spec 5.2
            warmup=0,  # spec 5.2: constant
            final_lr=1.0,  # spec 5.2: constant
            betas=(0.0, 0.999),  # spec 5.2
            weight_decay=0.01,  # paper; spec 5.2
            clip=10.0,  # paper; spec 5.2: of the student
            ema=None,  # spec 5.2: off
            accumulate=4 if large else 2,  # spec 5.2: 1 x 4 x 4 = 16 (14B), 8 x 4 x 2 = 64 (1.3B)
            recompute=True,  # spec 11.1: the reference recomputes blocks, too (and gets wrong gradients by it)
            bf16=True,  # paper; spec 5.2
            save_every=100,  # ours
        )
        # spec 5.2: student and critic are both LoRA at 14B, both trained in full at 1.3B; the teacher is the 14B one
        lora = LoraRecipe() if large else None
        return DistillRecipe(
            flavour=flavour, loop=loop, batch=1 if large else 8, processes=4, lora=lora,
            critic_flavour=flavour, teacher_flavour="14b", critic_lora=lora,
        )  # fmt: skip
    own = LoopConfig(steps=600, lr=1e-4, warmup=20, final_lr=0.1, betas=(0.0, 0.999), ema=0.95, save_every=100)
    small = {
        "pocket": (replace(own, steps=1000), 8, 15),
        "test": (replace(own, steps=6, lr=1e-3, warmup=2, report_every=1, save_every=3), 2, 6),
    }
    loop, batch, latent_frames = _small(flavour, small)
    recipe = DistillRecipe(
        flavour=flavour, loop=loop, batch=batch, latent_frames=latent_frames, critic_flavour=flavour,
        teacher_flavour=flavour, critic_lr=2 * loop.lr, critic_clip=loop.clip, guidance_drop="audio",
    )  # fmt: skip
    # The paper's beta is meant for confidences of about 7; the pocket SyncNet's are about .4 and spread by .1.
    return replace(recipe, beta=10.0, reward_clamp=(0.0, 1.0)) if flavour == "pocket" else recipe


def _small(flavour: str, small: dict[str, tuple[LoopConfig, int, int]]) -> tuple[LoopConfig, int, int]:
    if flavour not in small:
        raise ValueError(f"no recipe for {flavour!r}: use test, pocket, 1.3b or 14b")
    return small[flavour]
