"""Recipes: the numbers of the paper and the specification that matter most, and where they disagree."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from lipstream.diffusion.schedule import shifted_grid
from lipstream.models.dit import FLAVOURS
from lipstream.training import distill as distilling
from lipstream.training import forcing as stage_one
from lipstream.training import teacher as teaching
from lipstream.training.coded import CHUNK
from lipstream.training.loop import LoopConfig
from lipstream.training.recipes import distill, forcing, teacher


def test_every_stage_has_every_flavour() -> None:
    for stage in (teacher, forcing, distill):
        for flavour in ("test", "pocket", "1.3b", "14b"):
            recipe = stage(flavour)
            assert recipe.flavour == flavour and flavour in FLAVOURS
            assert recipe.batch <= recipe.global_batch and recipe.loop.warmup < recipe.loop.steps
        with pytest.raises(ValueError, match="no recipe for '2b': use test"):
            stage("2b")


def test_global_batches_are_the_papers() -> None:
    sizes = {name: [stage(name).global_batch for stage in (teacher, forcing, distill)] for name in ("1.3b", "14b")}
    assert sizes == {"1.3b": [8, 16, 64], "14b": [8, 16, 16]}


def test_learning_rates_are_constant_after_the_papers_warm_up() -> None:
    loop = forcing("14b").loop
    assert [loop.lr_at(step) for step in (999, 2500, 4999)] == [1e-5] * 3
    assert loop.lr_at(499) == pytest.approx(5e-6)
    loop = distill("14b").loop
    assert [loop.lr_at(step) for step in (0, 599)] == [2e-6] * 2


def test_student_and_critic_have_the_same_capacity() -> None:
    for flavour in ("1.3b", "14b"):
        recipe = distill(flavour)
        assert (recipe.critic_flavour, recipe.critic_lora, recipe.critic_lr) == (flavour, recipe.lora, recipe.loop.lr)
        assert recipe.teacher_flavour == "14b"


def test_guidance_window_and_landing_are_steps_of_the_teachers_grid() -> None:
    grid = shifted_grid()
    recipe = distill("14b")
    assert recipe.times[1] == pytest.approx(grid[30].item(), abs=5e-4)
    assert recipe.guidance_window == pytest.approx((grid[40].item(), grid[20].item()), abs=1e-3)


# ---------------------------------------------------------------------------------------------- the small model


def asked_of(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[LoopConfig, Any]:
    """Loop and windows that a command of the small model trains with, without training."""
    got: list[tuple[LoopConfig, Any]] = []
    monkeypatch.setattr(module, "read_material", lambda *_: None)
    monkeypatch.setattr(module, "load_dit", lambda *_: (None, 1.0), raising=False)
    monkeypatch.setattr(module, "train", lambda run, material, loop, config, *_, **__: got.append((loop, config)))
    given = ["stage", "run", "--samples", "a", "--codec", "b", "--speech", "c", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    module.main()
    return got[0]


STAGES: list[tuple[Any, Any, tuple[str, ...]]] = [
    (teaching, teacher, ()), (stage_one, forcing, ()), (distilling, distill, ("--student", "s", "--teacher", "t")),
]  # fmt: skip


@pytest.mark.parametrize(("module", "recipe_of", "needed"), STAGES)
def test_commands_of_the_small_model_do_what_the_pocket_recipe_says(
    module: Any, recipe_of: Any, needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the recipe says: another number there is another default here, and options go before both."""
    recipe = recipe_of("pocket")
    loop, config = asked_of(module, monkeypatch, *needed)
    assert loop == recipe.loop and config.batch == recipe.batch
    other = replace(
        recipe, batch=5, latent_frames=CHUNK, drop_audio=0.3, loop=replace(recipe.loop, steps=77, lr=3e-5)
    ) if module is not distilling else replace(
        recipe, batch=5, guidance_scale=1.5, student_every=3, loop=replace(recipe.loop, steps=77, lr=3e-5)
    )  # fmt: skip
    monkeypatch.setattr(module.recipes, recipe_of.__name__, lambda flavour: {"pocket": other}[flavour])
    loop, config = asked_of(module, monkeypatch, *needed)
    assert loop == other.loop
    expected = other if module is not distilling else replace(other, beta=0.0)  # no --syncnet, no reward
    assert config == module.pocket_config(expected) and config.batch == 5
    loop, config = asked_of(module, monkeypatch, *needed, "--steps", "9", "--batch", "2")
    assert loop == replace(other.loop, steps=9) and config.batch == 2


def test_the_pocket_recipes_are_what_the_commands_always_did() -> None:
    """Numbers of runs that were made; and the classes' own defaults, which tests and ablations begin with, agree."""
    assert teacher("pocket").loop == LoopConfig(steps=2000, lr=4e-4)
    assert teaching.pocket_config(teacher("pocket")) == teaching.TeacherConfig(batch=12)
    assert forcing("pocket").loop == LoopConfig(steps=6000, lr=8e-4)
    assert stage_one.pocket_config(forcing("pocket")) == stage_one.ForcingConfig(batch=16)
    own = LoopConfig(steps=1000, lr=1e-4, betas=(0.0, 0.999), ema=0.95, warmup=20, final_lr=0.1, save_every=100)
    assert distill("pocket").loop == own and distilling.loop_config(44) == replace(own, steps=44)
    assert distilling.pocket_config(distill("pocket")) == distilling.DistillConfig()
    assert distill("pocket").critic_clip == own.clip  # which the loop gives both networks
