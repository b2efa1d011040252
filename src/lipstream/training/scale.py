"""The three stages at the official sizes: a recipe, networks and clips to losses in the one loop; the torchrun entry.

    torchrun --standalone --nproc-per-node 4 -m lipstream.training.forcing RUN --recipe 14b --clips train.txt \\
        --model Wan2.1-T2V-14B/ omniavatar_ls_14b.pt --mask mask.png --device cuda

`lipstream.training.teacher`, `forcing` and `distill` come here when they are given ``--recipe``. Losses are theirs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lipstream.checkpoints.convert import assemble
from lipstream.checkpoints.encoders import load_syncnet
from lipstream.faces.mouth_mask import MouthMask, mouth_mask
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.models.tae import TAE
from lipstream.training import parallel, recipes
from lipstream.training.adapters import LoraRecipe, add_lora, trainable_state
from lipstream.training.clips import (
    ClipConfig,
    Clips,
    ClipShape,
    ClipTask,
    cells_of,
    load_empty_prompt,
    read_list,
    sync_reward,
)
from lipstream.training.distill import Distillation, DistillTerms, Reward
from lipstream.training.forcing import ForcingLoss, WholeClips
from lipstream.training.loop import Loop, Trainee
from lipstream.training.recipes import DistillRecipe, ForcingRecipe, Recipe, TeacherRecipe
from lipstream.training.teacher import Bell, InverseSquare, TeacherLoss

log = logging.getLogger(__name__)

StageName = Literal["teacher", "forcing", "distill"]
_AUXILIARY = ("sync_weight", "perceptual_weight", "motion_weight")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a stage works on beside its networks."""

    clips: Clips
    mask: MouthMask
    empty_prompt: Tensor | None = None
    device: torch.device | str = "cpu"

    def task(self, config: ClipConfig) -> ClipTask:
        """Batches of these clips."""
        return ClipTask(self.clips, self.mask, config, empty_prompt=self.empty_prompt, device=self.device)


class Stage(NamedTuple):
    """A stage that is ready to run."""

    recipe: Recipe
    trainees: list[Trainee]
    task: ClipTask


def teacher_stage(recipe: TeacherRecipe, site: Site, model: DiT) -> Stage:
    """Flow matching of a bidirectional network.

    The recipe's auxiliary losses on pixels (StableSyncNet, LPIPS, TREPA) are not there; the log says so.
    """
    left_out = [f"{name} {getattr(recipe, name):g}" for name in _AUXILIARY if getattr(recipe, name)]
    if left_out and parallel.speaks():
        log.warning("the recipe's auxiliary losses are not built, training goes without: %s", ", ".join(left_out))
    task = site.task(
        ClipConfig(
            batch=recipe.batch, drop_text=recipe.drop_text, drop_audio=recipe.drop_audio,
            mouth_weight=recipe.mouth_weight,
        )
    )  # fmt: skip
    times = Bell if recipe.time_weight == "bell" else InverseSquare
    loss = TeacherLoss(model, task, times(latent_frames=recipe.latent_frames))
    return Stage(recipe, [Trainee(model=_learner(model, recipe.lora, site), loss=loss)], task)


def forcing_stage(recipe: ForcingRecipe, site: Site, model: DiT) -> Stage:
    """Stage 1.

    Raises:
        ValueError: windows other than the network's own, with positions that are counted within them.
    """
    own = (model.config.window_latent_frames, model.config.sink_latent_frames)
    if recipe.window_positions and recipe.windows != (own,):
        raise ValueError(f"positions within the window go with the network's own window {own}, not {recipe.windows}")
    task = site.task(ClipConfig(batch=recipe.batch, drop_audio=recipe.drop_audio))
    terms = WholeClips(
        latent_frames=recipe.latent_frames, times=recipe.times, time_odds=recipe.time_odds, windows=recipe.windows,
        window_positions=recipe.window_positions, loss_scale=recipe.loss_scale, chunk=model.config.chunk_latent_frames,
    )  # fmt: skip
    loss = ForcingLoss(model, task, terms)
    return Stage(recipe, [Trainee(model=_learner(model, recipe.lora, site), loss=loss)], task)


def distill_stage(
    recipe: DistillRecipe, site: Site, networks: tuple[DiT, DiT, DiT], reward: Reward | None = None
) -> Stage:
    """Stage 2.

    Args:
        networks: student, critic and teacher.

    Raises:
        ValueError: no reward though the recipe has one, or no empty prompt though guidance drops the text.
    """
    student, critic, teacher = networks
    if recipe.guidance_drop == "text+audio" and site.empty_prompt is None:
        raise ValueError("the teacher's null branch is shown the empty prompt: give its encoding (--empty-prompt)")
    if recipe.beta and reward is None:
        raise ValueError(f"beta is {recipe.beta:g}, but there is no reward: give --tae and --syncnet, or --beta 0")
    task = site.task(ClipConfig(batch=recipe.batch, guidance_drop=recipe.guidance_drop))
    terms = DistillTerms(
        times=recipe.times, scale=recipe.guidance_scale, window=recipe.guidance_window, beta=recipe.beta,
        clamp=recipe.reward_clamp, latent_frames=recipe.latent_frames, cache_window=(recipe.window, recipe.sink),
    )  # fmt: skip
    if not parallel.together():
        teacher.to(site.device)
    losses = Distillation(student, critic, teacher, task, terms, reward)
    parallel.shard(teacher, bf16=recipe.loop.bf16)
    learners = _learner(critic, recipe.critic_lora, site), _learner(student, recipe.lora, site)
    trainees = [
        Trainee(
            name="critic", model=learners[0], loss=losses.critic_loss, lr=recipe.critic_lr, clip=recipe.critic_clip
        ),
        Trainee(name="student", model=learners[1], loss=losses.student_loss, every=recipe.student_every),
    ]
    return Stage(recipe, trainees, task)


def _learner(model: DiT, lora: LoraRecipe | None, site: Site) -> DiT:
    """In place: all of it learns, or factors do. Many processes: the loop brings it to its device."""
    model.train().requires_grad_(True)
    if lora is not None:
        add_lora(model, lora)
    return model if parallel.together() else model.to(site.device)


def run_stage(stage: Stage, folder: Path, seed: int = 0) -> Loop:
    """Train or resume; of a LoRA, ``adapter.safetensors`` (``student-adapter`` ...) is written at the end."""
    loop = Loop(stage.trainees, stage.recipe.loop, folder)
    stage.task.rng = np.random.default_rng(loop.seed(seed))  # a resumed run goes on to new draws
    loop.run()
    for trainee in stage.trainees:
        if any(".lora_" in name for name, _ in trainee.model.named_parameters()):
            state = trainable_state(trainee.model)  # of all processes
            name = "adapter" if len(stage.trainees) == 1 else f"{trainee.name}-adapter"
            if parallel.speaks():
                save_file(
                    {key: value.cpu().contiguous() for key, value in state.items()}, folder / f"{name}.safetensors"
                )
    return loop


def load_network(paths: Sequence[Path], flavour: str) -> DiT:
    """A network of a flavour from its file, or from a base and the adapter that is merged into it.

    Raises:
        CheckpointError: names the file and everything that is wrong.
    """
    model = assemble(paths, kind="student", config=FLAVOURS[flavour].to_dict()).load()
    assert isinstance(model, DiT)
    return model


def load_tae(path: Path, device: torch.device | str) -> TAE:
    """The reward's decoder.

    Raises:
        CheckpointError: names the file and everything that is wrong.
    """
    tae = assemble([path], kind="tae").load()
    assert isinstance(tae, TAE)
    return tae.to(device).requires_grad_(False)


def asks_for_recipe(argv: Sequence[str] | None = None) -> bool:
    """Whether a command line is for :func:`main`."""
    given = sys.argv[1:] if argv is None else argv
    return any(argument.split("=")[0] == "--recipe" for argument in given)


def main(name: StageName, argv: Sequence[str] | None = None) -> None:
    """Command line of a stage; one line and exit status 2 for what cannot work."""
    parser = _parser(name)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        with parallel.started(arguments.device, arguments.seed) as device:
            stage = _prepare(name, arguments, device)
            run_stage(stage, arguments.run, arguments.seed)
    except ValueError as error:
        log.debug("", exc_info=True)
        parser.exit(2, f"{parser.prog}: {error}\n")


def _parser(name: StageName) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lipstream.training.{name}", description=f"Stage {name} at official sizes.")
    add = parser.add_argument
    add("run", type=Path, help="folder of the run; one that exists is resumed")
    add("--recipe", required=True, help="test, 1.3b or 14b")
    add("--clips", type=Path, required=True, metavar="LIST", help="file with a sample folder a line")
    add(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="what is trained: a file, or base + adapter",
    )
    add("--mask", required=True, help="mask.png, or built-in")
    add("--empty-prompt", type=Path, metavar="FILE", help="encoding of the empty prompt")
    add("--zero-reference", action="store_true", help="zeros for samples without ref_latents.pt")
    add("--skip-damaged", action="store_true", help="leave out sample folders that lack something")
    add("--steps", type=int, help="instead of the recipe's")
    add("--device", default="cpu")
    add("--seed", type=int, default=0)
    if name == "distill":
        add("--teacher", type=Path, nargs="+", required=True, metavar="FILE")
        add("--critic", type=Path, nargs="+", metavar="FILE", help="what it starts from; default: the teacher")
        add("--tae", type=Path, metavar="FILE", help="taew2_1.pth, decodes for the reward")
        add("--syncnet", type=Path, metavar="FILE", help="syncnet_v2.model, the reward")
        add("--beta", type=float, help="instead of the recipe's; 0: no reward")
    return parser


def _prepare(name: StageName, arguments: argparse.Namespace, device: torch.device) -> Stage:
    recipe: Any = getattr(recipes, name)(arguments.recipe)
    if not FLAVOURS[recipe.flavour].text_dim:
        raise ValueError(f"--recipe {recipe.flavour}: its data are not official clips; give --samples instead")
    if arguments.steps is not None:
        recipe = replace(recipe, loop=replace(recipe.loop, steps=arguments.steps))
    if name == "distill" and arguments.beta is not None:
        recipe = replace(recipe, beta=arguments.beta)
    folders = read_list(arguments.clips)
    cells = cells_of(folders[0]) if recipe.flavour == "test" else ClipShape.cells
    shape = ClipShape.of(FLAVOURS[recipe.flavour], recipe.latent_frames, cells)
    heard = name == "distill" and bool(recipe.beta)
    clips, left_out = Clips(folders, shape, zero_reference=arguments.zero_reference, speech=heard).usable(
        arguments.skip_damaged
    )
    for problem in left_out if parallel.speaks() else []:
        log.warning("left out: %s", problem)
    clips.load(0)  # a data set that gives its targets away does so everywhere
    empty = None if arguments.empty_prompt is None else load_empty_prompt(arguments.empty_prompt)
    site = Site(clips=clips, mask=mouth_mask(arguments.mask), empty_prompt=empty, device=device)
    model = load_network(arguments.model, recipe.flavour)
    if name == "teacher":
        return teacher_stage(recipe, site, model)
    if name == "forcing":
        return forcing_stage(recipe, site, model)
    if arguments.critic is None and recipe.critic_flavour != recipe.teacher_flavour:
        raise ValueError(
            f"the critic is a {recipe.critic_flavour}, the teacher a {recipe.teacher_flavour}: give --critic"
        )
    critic = load_network(arguments.critic or arguments.teacher, recipe.critic_flavour)
    teacher = load_network(arguments.teacher, recipe.teacher_flavour)
    reward = None
    if arguments.tae is not None and arguments.syncnet is not None:
        reward = sync_reward(load_tae(arguments.tae, device), load_syncnet(arguments.syncnet).to(device))
    return distill_stage(recipe, site, (model, critic, teacher), reward)
