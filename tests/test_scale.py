"""The stages on official clips at the `test` size: losses by hand, who has gradients, that they learn, the commands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from golden_model import random_model
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise, teacher_training_times
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.models.dit import DiT, chunk_causal_frame_mask
from lipstream.models.syncnet import FLAVOURS as SYNCNETS
from lipstream.models.syncnet import SyncNet
from lipstream.models.tae import TAE, TAE_FLAVOURS
from lipstream.training import distill, forcing, recipes, teacher
from lipstream.training.clips import ClipBatch, load_empty_prompt
from lipstream.training.distill import Distillation
from lipstream.training.forcing import WholeClips
from lipstream.training.loop import LoopConfig
from lipstream.training.scale import Site, Stage, distill_stage, forcing_stage, load_network, run_stage, teacher_stage
from lipstream.training.task import predict
from official_clips import CONFIG, LATENT_FRAMES, write_empty_prompt, write_list, written_clips

BRIEF = LoopConfig(steps=2, warmup=0, report_every=1, save_every=1, ema=None, recompute=True, bf16=True)


def site_of(folder: Path, count: int = 2, speech: bool = False) -> Site:
    empty = load_empty_prompt(write_empty_prompt(folder / "empty.pt"))
    return Site(clips=written_clips(folder, count, speech), mask=built_in_mask(), empty_prompt=empty)


def small(recipe: Any, **changes: Any) -> Any:
    """A recipe of a real size on the tiny network: everything but the sizes and the length of the run is kept."""
    return replace(recipe, flavour="test", latent_frames=LATENT_FRAMES, batch=2, **{"loop": BRIEF, **changes})


def fresh(seed: int = 0) -> DiT:
    return random_model(CONFIG, seed).requires_grad_(True)


def descend(loss: Callable[[int], tuple[Tensor, dict[str, float]]], model: DiT, steps: int, lr: float) -> list[float]:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for step in range(steps):
        value, _ = loss(step)
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(value.item())
    return losses


def test_teachers_loss_is_the_weighted_error_of_its_velocity(tmp_path: Path) -> None:
    stage = teacher_stage(small(recipes.teacher("14b"), lora=None), site_of(tmp_path), fresh())
    task, (trainee,) = stage.task, stage.trainees
    assert (task.config.drop_text, task.config.drop_audio, task.config.mouth_weight) == (0.1, 0.1, 2.0)

    def again() -> None:
        task.rng = np.random.default_rng(5)
        torch.manual_seed(5)

    again()
    got, _ = trainee.loss(0)
    again()
    batch = task.batch(LATENT_FRAMES)
    times = teacher_training_times(torch.from_numpy(task.rng.integers(1000, size=2)))
    noise = torch.randn_like(batch.target)
    model = trainee.model
    assert isinstance(model, DiT)
    with torch.autocast("cpu", torch.bfloat16):
        noisy = add_noise(batch.target, noise, times.level)
        velocity = model.predict(noisy, times.t, task.conditions(model, batch)).velocity.float()
    mouth = 1 + task.mask
    per_clip = ((velocity - (noise - batch.target)).square() * mouth).flatten(1).mean(1)
    torch.testing.assert_close(got, (per_clip * times.weight).mean(), rtol=1e-4, atol=1e-5)


def test_teacher_and_forcing_learn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    site = site_of(tmp_path, count=1)
    for stage in (
        teacher_stage(small(recipes.teacher("14b"), lora=None), site, fresh()),
        forcing_stage(small(recipes.forcing("1.3b")), site, fresh(1)),
    ):
        (trainee,) = stage.trainees
        assert isinstance(trainee.model, DiT)
        losses = descend(trainee.loss, trainee.model, 40, 5e-3)
        assert np.mean(losses[-12:]) < 0.7 * np.mean(losses[:10])


def test_stage_one_shows_whole_clips_with_drawn_windows() -> None:
    recipe = recipes.forcing("14b")
    terms = WholeClips(
        latent_frames=21, times=recipe.times, time_odds=recipe.time_odds, windows=recipe.windows,
        window_positions=recipe.window_positions, loss_scale=recipe.loss_scale,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    masks = {window: chunk_causal_frame_mask(21, 3, *window) for window in recipe.windows}
    assert len({tuple(mask.flatten().tolist()) for mask in masks.values()}) == 5
    seen = dict.fromkeys(recipe.windows, 0)
    for _ in range(400):
        layout = terms.layout(rng)
        assert layout.chunk_of.tolist() == [frame // 3 for frame in range(21)] and not layout.sink_apart
        (mask,) = layout.options.values()
        seen[next(window for window, known in masks.items() if torch.equal(known, mask))] += 1
    assert all(50 < count < 110 for count in seen.values())  # a fifth each


def test_stage_ones_loss_is_half_the_squared_error_at_a_time_per_chunk(tmp_path: Path) -> None:
    stage = forcing_stage(small(recipes.forcing("1.3b")), site_of(tmp_path), fresh())
    loss, (trainee,) = stage.trainees[0].loss, stage.trainees
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    unwatched = trainee.model.predict

    def watched(x: Tensor, t: Tensor, conditions: Any, **options: Any) -> Any:
        made = unwatched(x, t, conditions, **options)
        calls.append((t, made.x0.float(), options))
        return made

    trainee.model.predict = watched  # type: ignore[assignment]
    batches: list[ClipBatch] = []
    draw = stage.task.batch
    stage.task.batch = lambda *a, **k: batches.append(draw(*a, **k)) or batches[-1]  # type: ignore[func-returns-value, method-assign]
    times = set()
    for step in range(8):
        value, _ = loss(step)
        t, x0, options = calls[-1]
        assert t.shape == (2, LATENT_FRAMES) and torch.equal(t[:, :3], t[:, :1].expand(-1, 3))
        assert options["frame_mask"].shape == (LATENT_FRAMES, LATENT_FRAMES) and "frame_positions" not in options
        torch.testing.assert_close(value, 0.5 * (x0 - batches[-1].target).square().mean())
        clean = t == 0
        assert torch.equal(x0.movedim(1, 2)[clean], batches[-1].target.movedim(1, 2)[clean])
        times |= set(t.flatten().tolist())
    assert times == set(STUDENT_TIMES)


def test_positions_within_the_window_need_the_networks_own_window(tmp_path: Path) -> None:
    site, recipe = site_of(tmp_path), recipes.forcing("test")
    value, _ = forcing_stage(recipe, site, fresh()).trainees[0].loss(0)
    assert torch.isfinite(value)
    with pytest.raises(ValueError, match="the network's own window"):
        forcing_stage(replace(recipe, windows=((10, 1),)), site, fresh())


def networks() -> tuple[DiT, DiT, DiT]:
    return fresh(0), fresh(1), fresh(2)


def stage_two(folder: Path, **changes: Any) -> Stage:
    recipe = small(recipes.distill("14b"), **{"lora": None, "critic_lora": None, **changes})
    reward = (lambda z, batch: batch.samples.abs().mean(1)) if recipe.beta else None
    return distill_stage(recipe, site_of(folder, speech=bool(recipe.beta)), networks(), reward)


def test_stage_two_has_gradients_only_where_they_should_be(tmp_path: Path) -> None:
    stage = stage_two(tmp_path)
    losses = stage.trainees[0].loss.__self__  # type: ignore[attr-defined]
    assert isinstance(losses, Distillation)
    trained = {trainee.name: trainee.model for trainee in stage.trainees}
    for name, other in (("critic", "student"), ("student", "critic")):
        for model in trained.values():
            model.zero_grad(set_to_none=True)
        value, metrics = next(t for t in stage.trainees if t.name == name).loss(0)
        value.backward()  # type: ignore[no-untyped-call]
        touched = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained[name].parameters()]
        assert np.mean(touched) > 0.9 and torch.isfinite(value)
        assert all(p.grad is None for p in (*trained[other].parameters(), *losses.teacher.parameters()))
    assert not any(p.requires_grad for p in losses.teacher.parameters())
    assert metrics["reward"] > 0


@pytest.mark.parametrize(("t", "calls"), [(0.7, 2), (0.95, 1), (0.3, 1)])
def test_the_teacher_is_guided_inside_the_window_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, t: float, calls: int
) -> None:
    stage = stage_two(tmp_path, beta=0.0)
    losses = stage.trainees[0].loss.__self__  # type: ignore[attr-defined]
    asked: list[Any] = []
    unwatched = losses.teacher.predict

    def watched(x: Tensor, time: Tensor, conditions: Any, **options: Any) -> Any:
        asked.append(conditions)
        return unwatched(x, time, conditions, **options)

    losses.teacher.predict = watched
    losses._time = lambda generated: torch.full((len(generated),), t, dtype=torch.float64)
    losses.student_loss(0)
    assert [conditions.audio is None for conditions in asked] == [False, True][:calls]
    # Many processes share its blocks and have other times: all call it twice, always.
    monkeypatch.setattr(distill.parallel, "together", lambda: True)
    monkeypatch.setattr(distill.parallel, "share", lambda value: value)
    losses.student_loss(0)
    assert len(asked) == calls + 2
    if calls == 2:
        assert torch.equal(asked[1].text, stage.task.empty_prompt)
        assert all(torch.equal(getattr(asked[0], name), getattr(asked[1], name)) for name in ("masked_video", "mask"))


def test_stage_two_moves_the_student_to_the_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage = stage_two(tmp_path, beta=0.0)
    losses = stage.trainees[0].loss.__self__  # type: ignore[attr-defined]
    batch = stage.task.batch(LATENT_FRAMES)
    answer = batch.target[:1, :, :1].mean((3, 4), keepdim=True)
    losses.teacher.forward = lambda x, t, conditions, **options: answer.expand_as(x)

    def distance() -> float:
        with torch.no_grad():
            made = distill.roll_out(losses.student, stage.task, batch, generator=torch.Generator().manual_seed(0))
        return (made - answer).square().mean().item()

    before = distance()
    optimisers = {t.name: torch.optim.Adam(t.model.parameters(), 5e-3) for t in stage.trainees}
    for step in range(24):
        for trainee in stage.trainees if step % 2 else stage.trainees[:1]:
            optimisers[trainee.name].zero_grad()
            trainee.loss(step)[0].backward()  # type: ignore[no-untyped-call]
            optimisers[trainee.name].step()
    assert distance() < 0.7 * before


def test_lora_recipes_train_factors_and_write_the_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    site = site_of(tmp_path)
    stage = forcing_stage(small(recipes.forcing("14b")), site, fresh())
    frozen = {name: p.clone() for name, p in stage.trainees[0].model.named_parameters() if not p.requires_grad}
    assert "head.head.weight" in frozen and not any(".lora_" in name for name in frozen)
    run_stage(stage, tmp_path / "run")
    after = dict(stage.trainees[0].model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    adapter = load_file(tmp_path / "run" / "adapter.safetensors")
    assert {"blocks.0.self_attn.q.lora_B.weight", "patch_embedding.weight", "audio_proj.proj.weight"} <= set(adapter)
    assert adapter["blocks.0.self_attn.q.lora_B.weight"].abs().sum() > 0
    # Merged into what it was trained on, as the next stage takes it, it is the same network.
    torch.save(fresh().state_dict(), tmp_path / "base.pth")
    merged = load_network([tmp_path / "base.pth", tmp_path / "run" / "adapter.safetensors"], "test")
    batch = stage.task.batch(LATENT_FRAMES)
    t = torch.full((2,), 0.7, dtype=torch.float64)
    live = stage.trainees[0].model
    assert isinstance(live, DiT)
    x0 = [predict(stage.task, model.eval(), batch.reference, t, batch) for model in (live, merged)]
    torch.testing.assert_close(*x0, rtol=0.05, atol=0.05)


def command(name: str, folder: Path, *extra: str, recipe: str = "test") -> list[str]:
    """A stage's command line on files that are written here."""
    clips = write_list(folder)
    for seed, file in enumerate(("student.pth", "teacher.pth")):
        torch.save(random_model(CONFIG, seed).state_dict(), folder / file)
    given = [str(folder / f"run-{name}"), "--recipe", recipe, "--clips", str(clips), "--mask", "built-in"]
    given += ["--model", str(folder / "student.pth"), *extra]
    return given + (["--teacher", str(folder / "teacher.pth")] if name == "distill" else [])


def run_command(module: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["stage", *argv])
    module.main()


@pytest.mark.parametrize(("name", "module"), [("teacher", teacher), ("forcing", forcing), ("distill", distill)])
def test_commands_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    extra: list[str] = []
    if name == "distill":
        torch.manual_seed(0)
        tae = TAE(replace(TAE_FLAVOURS["test"], latent_channels=CONFIG.latent_channels))
        torch.save(tae.state_dict(), tmp_path / "tae.pth")
        torch.save(SyncNet(SYNCNETS["test"]).state_dict(), tmp_path / "syncnet.pth")
        extra = ["--tae", str(tmp_path / "tae.pth"), "--syncnet", str(tmp_path / "syncnet.pth")]
    argv = command(name, tmp_path, *extra)
    run_command(module, monkeypatch, [*argv, "--steps", "2"])
    run_command(module, monkeypatch, [*argv, "--steps", "3"])
    rows = [json.loads(line) for line in (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert ("student.reward" in rows[0]) == (name == "distill")


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("distill", (), "give --tae and --syncnet, or --beta 0"),
        ("forcing", ("--mask", "no.png"), "no mask at 'no.png'"),
        ("forcing", ("--recipe", "2b"), "no recipe for '2b'"),
        ("forcing", ("--recipe", "pocket"), "give --samples instead"),
        ("forcing", ("--recipe", "1.3b"), r"input_latents is \[4, 6, 8, 8\], needed is \[16, at least 21, 64, 64\]"),
        ("teacher", ("--model", "nothing.pth"), "nothing.pth"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    extra: tuple[str, ...],
    message: str,
) -> None:
    module = {"teacher": teacher, "forcing": forcing, "distill": distill}[name]
    with pytest.raises(SystemExit) as left:
        run_command(module, monkeypatch, command(name, tmp_path, *extra))
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert re.search(message, said), said


def test_guidance_without_text_needs_the_empty_prompt(tmp_path: Path) -> None:
    site = replace(site_of(tmp_path), empty_prompt=None)
    with pytest.raises(ValueError, match="--empty-prompt"):
        distill_stage(small(recipes.distill("1.3b"), beta=0.0), site, networks())
    with pytest.raises(ValueError, match="--empty-prompt"):
        teacher_stage(small(recipes.teacher("1.3b")), site, fresh())
    distill_stage(small(recipes.distill("1.3b"), beta=0.0, guidance_drop="audio"), site, networks())
