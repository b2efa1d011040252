"""Training runs for `test_parallel.py`, the same in one process and, as a script under torchrun, in several.

torchrun ... parallel_worker.py FOLDER SCENARIO...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from golden_model import random_conditions, random_model
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise, times_per_latent_frame
from lipstream.models.dit import FLAVOURS, CleanPass, Conditions, DiT
from lipstream.training import parallel
from lipstream.training.loop import Loop, LoopConfig, LossFunction, Trainee

SIZE = 4  # latent cells
FRAMES = 6
STEPS = 6


def new_model(seed: int) -> DiT:
    return random_model(FLAVOURS["test"], seed).requires_grad_(True)


def draw(model: DiT, seed: int) -> tuple[Tensor, Conditions, torch.Generator]:
    """A clip and its conditions; the speech goes through the network's own audio pack, outside of its forward."""
    config = model.config
    state = torch.get_rng_state()
    conditions = random_conditions(config, 2, FRAMES, SIZE, SIZE, seed=seed)
    torch.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, FRAMES, 4, config.audio_dim, generator=generator)
    target = torch.randn(2, config.latent_channels, FRAMES, SIZE, SIZE, generator=generator)
    return target, Conditions(**{**vars(conditions), "audio": model.audio_proj.join(rows)}), generator


def forcing_loss(model: DiT, bf16: bool = False, free: bool = False) -> LossFunction:
    """Like stage 1; with ``free`` the noise comes from torch's own generator."""

    def loss(number: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            target, conditions, generator = draw(model, number)
            steps = torch.randint(len(STUDENT_TIMES), (2, FRAMES // 3), generator=generator)
            t = times_per_latent_frame(steps, FRAMES, 3, STUDENT_TIMES)
            noise = torch.randn(target.shape, generator=None if free else generator)
            x0 = model(add_noise(target, noise, t), t, conditions, chunk_windows=True)
        value = (x0.float() - target).square().mean()
        return value, {"error": value.item()} if number % 2 else {}  # not every process has every metric

    return loss


def rollout_loss(model: DiT) -> LossFunction:
    """Like stage 2: chunks one after the other behind a cache, the exit step shared, clean passes without gradient."""

    def loss(number: int) -> tuple[Tensor, dict[str, float]]:
        target, conditions, generator = draw(model, number)
        cache = model.make_cache(2, SIZE, SIZE)
        exit_step = int(parallel.share((number // 2) % 2 if parallel.speaks() else 7))
        total = torch.zeros(())
        for start in (0, 3):
            own = slice(start, start + 3)
            x = torch.randn(target[:, :, own].shape, generator=generator)
            t = torch.full((2,), STUDENT_TIMES[0], dtype=torch.float64)
            if exit_step:
                with torch.no_grad():
                    x = model(x, t, conditions.slice(own), cache=cache)
            x0 = model(x, t, conditions.slice(own), cache=cache)
            model.remember(CleanPass(x0.detach(), 0 * t, conditions.slice(own)), cache)
            total = total + (x0 - target[:, :, own]).square().mean()
        return total, {}

    return loss


def config(**changes: Any) -> LoopConfig:
    total = changes.pop("parts", 2)  # micro batches of a global batch, over all processes
    settings = {"steps": STEPS, "lr": 2e-3, "warmup": 2, "ema": 0.9, "report_every": 1, "save_every": STEPS}
    return LoopConfig(**{**settings, **changes}, accumulate=total // parallel.processes())


def accumulated(folder: Path) -> Loop:
    model = new_model(1)
    return Loop(
        [Trainee(model=model, loss=forcing_loss(model))],
        config(parts=4, recompute=True, clip=0.3),
        folder,
    )


def two(folder: Path) -> Loop:
    critic, student = new_model(2), new_model(3)
    trainees = [
        Trainee(name="critic", model=critic, loss=forcing_loss(critic)),
        Trainee(name="student", model=student, loss=rollout_loss(student), every=3, lr=1e-3, clip=0.1),
    ]
    return Loop(trainees, config(ema=None), folder)


def bf16(folder: Path) -> Loop:
    model = new_model(4)
    return Loop([Trainee(model=model, loss=forcing_loss(model, bf16=True))], config(bf16=True, ema=None), folder)


def lora(folder: Path) -> Loop:
    from lipstream.training.adapters import LoraRecipe, add_lora  # peft takes seconds to import

    model = add_lora(new_model(5), LoraRecipe(rank=4, alpha=2))
    return Loop([Trainee(model=model, loss=forcing_loss(model))], config(), folder)


def free(folder: Path) -> Loop:
    """Draws from torch's generator, saves every second step."""
    model = new_model(6)
    return Loop([Trainee(model=model, loss=forcing_loss(model, free=True))], config(save_every=2), folder)


SCENARIOS: dict[str, Callable[[Path], Loop]] = {f.__name__: f for f in (accumulated, two, bf16, lora, free)}


def rows(folder: Path) -> list[dict[str, float]]:
    """What a run reported, without the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def run(name: str, folder: Path) -> dict[str, Tensor]:
    """Train to the end; returns the weights that learnt and their averages."""
    loop = SCENARIOS[name](folder)
    averaged = loop.run()
    weights = {}
    for key, learner in loop._learners.items():
        for role, network in (("model", learner.trainee.model), ("averaged", averaged[key])):
            for parameter_name, p in network.named_parameters():
                weights[f"{key}.{role}.{parameter_name}"] = parallel.whole(p.detach())
    return weights


def kill_second_process_while_it_saves(step: int) -> None:
    """In the first life of the run, kill -9 in the midst of writing a step's checkpoint."""
    write = filesystem.FileSystemWriter.write_data

    def deadly(self: filesystem.FileSystemWriter, *arguments: Any) -> Any:
        if parallel.rank() == 1 and str(self.path).endswith(f"{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *arguments)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        filesystem.FileSystemWriter.write_data = deadly  # type: ignore[method-assign]


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    with parallel.started():
        for name in names:
            if name == "killed":
                kill_second_process_while_it_saves(4)
                if parallel.speaks() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
                    checkpoints = folder / name / "checkpoints"
                    found = sorted(p.name for p in checkpoints.glob("step-*"))
                    (folder / "found.json").write_text(json.dumps([(checkpoints / "latest").read_text(), found]))
            weights = run("free" if name == "killed" else name, folder / name)
            if parallel.speaks():
                torch.save(weights, folder / f"{name}.pt")


if __name__ == "__main__":
    main()
