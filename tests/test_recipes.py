"""Recipes: the numbers of the paper and the specification that matter most, and where they disagree."""

from __future__ import annotations

import pytest

from lipstream.diffusion.schedule import shifted_grid
from lipstream.models.dit import FLAVOURS
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
