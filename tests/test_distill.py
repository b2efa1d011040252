"""Teacher and stage 2 on tiny networks: what has a gradient, what the schedules do, and that the student moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lipstream.diffusion.schedule import SYNC_WINDOW
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import DiT
from lipstream.training.coded import Windows
from lipstream.training.distill import Audition, Distillation, DistillConfig, roll_out, teacher_scale, train
from lipstream.training.loop import LoopConfig
from lipstream.training.material import Material
from lipstream.training.mouths import MouthTask
from lipstream.training.teacher import SEGMENT, SegmentListening, TeacherConfig, TeacherLoss
from tiny import assert_learns, coded_clips, tiny_codec, tiny_dit

FRAMES = 72  # room for a segment of 57 frames and another start


@pytest.fixture(scope="module")
def codec() -> PocketCodec:
    return tiny_codec()


@pytest.fixture(scope="module")
def material(codec: PocketCodec) -> Material:
    coded = coded_clips(2, FRAMES)
    return Material(codec, coded, np.ones(2), coded[:1])


def task_of(material: Material, config: DistillConfig | TeacherConfig) -> MouthTask:
    windows = Windows(material.coded, material.weights, seed=0, latent_frames=SEGMENT)
    return MouthTask(material.codec, windows, config)


def test_teacher_learns(material: Material) -> None:
    torch.manual_seed(0)
    config = TeacherConfig(batch=4)
    task, model = task_of(material, config), tiny_dit(material.codec)
    loss = TeacherLoss(model, task, config)
    before = SegmentListening(task, material.held, config)({"model": model})
    assert_learns(model, loss)
    after = SegmentListening(task, material.held, config)({"model": model})
    assert after["r_synth"] > max(0.3, before["r_synth"])


def test_teacher_never_sees_a_moving_reference(material: Material) -> None:
    batch = task_of(material, TeacherConfig(batch=4)).batch(SEGMENT)
    assert (batch.seen.reference - batch.seen.reference[:, :, :1]).abs().max() == 0


def test_guidance_schedules() -> None:
    t = torch.tensor([0.3, 0.556, 0.7, 0.882, 0.95], dtype=torch.float64)
    expected = {
        "window": [1.0, 4.5, 4.5, 4.5, 1.0],
        "reverse": [4.5, 1.0, 1.0, 1.0, 4.5],
        "all": [4.5] * 5,
        "none": [1.0] * 5,
    }
    assert SYNC_WINDOW == (0.556, 0.882)
    for guidance, scales in expected.items():
        assert teacher_scale(t, DistillConfig(guidance_schedule=guidance)).tolist() == scales  # type: ignore[arg-type]


@pytest.mark.parametrize("exit_call", [0, 1])
def test_only_the_exit_call_has_a_gradient(material: Material, exit_call: int) -> None:
    """Through the same noise, the gradient equals that of the last call alone, its input and its past held fixed."""
    task, student = task_of(material, DistillConfig(batch=2)), tiny_dit(material.codec)
    batch = task.batch(SEGMENT)
    calls: list[bool] = []
    predict = student.predict

    def watched(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled() and not x.requires_grad)
        return predict(x, t, *args, **kwargs)

    student.predict = watched  # type: ignore[method-assign]
    x0 = roll_out(student, task, batch, exit_call=exit_call)
    assert x0.shape == batch.target.shape and x0.requires_grad
    assert calls == ([True] if exit_call == 0 else [False, True]) * (SEGMENT // 3)
    with torch.no_grad():
        same = [roll_out(student, task, batch, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*same)


def test_defective_gradients_are_an_option_of_the_rollout(material: Material) -> None:
    """Same samples, other gradients of the blocks."""
    task = task_of(material, DistillConfig(batch=2))
    batch = task.batch(SEGMENT)
    made: dict[bool, tuple[Tensor, Tensor]] = {}
    for defective in (False, True):
        student = tiny_dit(material.codec)
        generator = torch.Generator().manual_seed(0)
        x0 = roll_out(student, task, batch, exit_call=1, generator=generator, defective_gradients=defective)
        x0.square().mean().backward()
        gradient = student.blocks[0].self_attn.v.weight.grad
        assert gradient is not None
        made[defective] = x0.detach(), gradient
    assert torch.equal(made[False][0], made[True][0])
    assert (made[True][1] - made[False][1]).norm() > 0.05 * made[False][1].norm()


class Answers(DiT):
    """A teacher that says the same whatever it is asked."""

    answer: Tensor

    def forward(self, x: Tensor, t: Tensor, conditions: Any, **options: Any) -> Tensor:
        return self.answer.expand_as(x)


def test_student_moves_to_the_teacher(material: Material) -> None:
    torch.manual_seed(0)
    config = DistillConfig(batch=4, beta=0.0, speech_dropout=0.0)
    task = task_of(material, config)
    student, critic = tiny_dit(material.codec), tiny_dit(material.codec, seed=1)
    teacher = Answers(student.config)
    batch = task.batch(SEGMENT)
    teacher.answer = batch.target[:1, :, :1].clone()
    parts = Distillation(student, critic, teacher, task, config)

    def distance() -> float:
        with torch.no_grad():
            made = roll_out(student, task, batch, generator=torch.Generator().manual_seed(0))
        return task.errors(made, teacher.answer.expand_as(made)).latent.mean().item()

    before = distance()
    optimisers = {
        name: torch.optim.Adam(getattr(parts, name).parameters(), lr)
        for name, lr in (("critic", 3e-3), ("student", 2e-3))
    }
    for step in range(60):
        for name in ("critic", "student") if step % 2 else ("critic",):
            optimisers[name].zero_grad()
            getattr(parts, f"{name}_loss")(step)[0].backward()
            optimisers[name].step()
    assert all(p.grad is None for p in teacher.parameters())
    assert distance() < 0.7 * before


def test_reward_weighs_samples(material: Material) -> None:
    def gradients(reward: Any, beta: float) -> tuple[Tensor, float]:
        torch.manual_seed(0)
        config = DistillConfig(batch=2, beta=beta, speech_dropout=0.0)
        task = task_of(material, config)
        student = tiny_dit(material.codec)
        parts = Distillation(student, tiny_dit(material.codec, 1), tiny_dit(material.codec, 2), task, config, reward)
        loss, metrics = parts.student_loss(0)
        loss.backward()
        return student.head.head.weight.grad, metrics.get("reward", 0.0)  # type: ignore[return-value]

    plain, _ = gradients(None, 0.0)
    equal, reward = gradients(lambda z, speech: torch.full((2,), 0.5), 2.0)
    assert reward == 0.5
    tolerance = 0.02 * float(plain.abs().max())  # of the products in bfloat16
    torch.testing.assert_close(equal, plain * np.exp(1.0), rtol=0.05, atol=3 * tolerance)
    clamped, _ = gradients(lambda z, speech: torch.full((2,), -3.0), 2.0)
    torch.testing.assert_close(clamped, plain)
    first, second = (gradients(lambda z, s, w=w: torch.tensor(w), 2.0)[0] for w in ([8.0, 0.0], [0.0, 8.0]))
    assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0) < 0.99
    with pytest.raises(ValueError, match="no reward"):
        gradients(None, 2.0)


def test_stage_two_runs_and_resumes(material: Material, tmp_path: Path) -> None:
    config = DistillConfig(batch=2, student_every=2)

    def networks() -> tuple[DiT, DiT, DiT]:
        return tiny_dit(material.codec), tiny_dit(material.codec, 1), tiny_dit(material.codec, 1)

    def reward(z: Tensor, speech: Tensor) -> Tensor:
        return torch.zeros(len(z))

    loop = LoopConfig(steps=2, report_every=1, save_every=1, warmup=1)
    train(tmp_path, material, loop, config, networks(), reward)
    student = train(tmp_path, material, LoopConfig(steps=4, warmup=1), config, networks(), reward)
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), networks()[0].parameters(), strict=True)]
    assert np.mean(changed) > 0.9
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "student.reward" in rows[0] and '"r_synth"' in rows[-1] and '"sync_synth"' in rows[-1]


def test_audition_knows_the_truth(material: Material) -> None:
    task = task_of(material, DistillConfig())
    audition = Audition(task, material, DistillConfig(), None)
    truth = audition.judge(lambda batch: batch.target)
    assert truth == {"r_synth": 1.0, "size_synth": 1.0, "error_synth": 0.0, "sharp_synth": 1.0}
    still = audition.judge(lambda batch: batch.seen.reference)
    assert still["size_synth"] < 0.95 and still["error_synth"] > 0
    student = tiny_dit(material.codec)
    assert audition(student) == audition(student)
