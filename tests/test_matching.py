"""Distribution matching and the reward against the reference's numbers."""

from __future__ import annotations

import pytest
import torch

from golden_model import assert_close, vectors
from lipstream.diffusion import matching


@pytest.fixture
def data() -> dict[str, torch.Tensor]:
    return vectors("schedule")


@pytest.fixture
def latents(data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(data[f"in.dmd.{name}"] for name in ("generated", "fake_x0", "teacher_x0"))  # type: ignore[return-value]


def test_gradient_and_loss(data: dict[str, torch.Tensor], latents: tuple[torch.Tensor, ...]) -> None:
    generated, fake, real = latents
    assert_close(matching.normaliser(generated, real), data["out.dmd.normaliser_w"], 1e-6)
    generated = generated.clone().requires_grad_(True)
    losses = matching.matching_loss(generated, matching.matching_gradient(generated, fake, real))
    assert_close(losses, data["out.dmd.loss_per_sample"], 1e-6)
    assert_close(losses.mean(), data["out.dmd.loss_mean"], 1e-6)
    (gradient,) = torch.autograd.grad(losses.mean(), generated, retain_graph=True)
    assert_close(gradient, data["out.dmd.grad_of_loss_mean"], 1e-6)
    (gradient,) = torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 0.5])).mean(), generated)
    assert_close(gradient, data["out.dmd.grad_of_mean_of_1_2_half_times_per_sample"], 1e-6)


def test_half_precision(data: dict[str, torch.Tensor], latents: tuple[torch.Tensor, ...]) -> None:
    generated, fake, real = (part.bfloat16() for part in latents)
    generated.requires_grad_(True)
    loss = matching.matching_loss(generated, matching.matching_gradient(generated, fake, real)).mean()
    (gradient,) = torch.autograd.grad(loss, generated)
    expected = data["out.dmd.grad_bf16"]
    assert gradient.dtype == expected.dtype
    torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=1e-7)  # one unit in the last place


def test_a_teacher_that_agrees_does_not_divide_by_zero(
    data: dict[str, torch.Tensor], latents: tuple[torch.Tensor, ...]
) -> None:
    generated, fake, _ = latents
    gradient = matching.matching_gradient(generated, generated + 1e-3, generated)
    expected = data["out.dmd.loss_when_teacher_equals_generated"]
    torch.testing.assert_close(matching.matching_loss(generated, gradient).mean(), expected, rtol=1e-3, atol=0)
    assert matching.matching_gradient(generated, fake, fake).abs().max() == 0


def test_critic(data: dict[str, torch.Tensor], latents: tuple[torch.Tensor, ...]) -> None:
    generated = latents[0]
    assert_close(matching.critic_loss(data["in.critic.pred_x0"], generated).mean(), data["out.critic.loss_x0"], 1e-6)


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_reward(data: dict[str, torch.Tensor], beta: float) -> None:
    reward, losses = data["in.reward.sync_c"], data["in.reward.per_sample_loss"]
    weights = matching.reward_weights(reward, beta)
    assert_close(weights, data[f"out.reward.weights_beta{beta}"], 1e-6)
    for mode, name in (
        ("per_sample", "per_sample"),
        ("self_normalized", "self_normalized"),
        ("batch_mean", "legacy_batch_mean"),
    ):
        assert_close(matching.rewarded(losses, weights, mode), data[f"out.reward.loss_{name}_beta{beta}"], 1e-6)  # type: ignore[arg-type]
    for limit in (3, 8):
        clamped = matching.rewarded(losses, matching.reward_weights(reward, 2.0, (0.0, float(limit))))
        assert_close(clamped, data[f"out.reward.loss_per_sample_beta2_clamped_0_{limit}"], 1e-6)


def test_weights_carry_no_gradient_and_modes_are_named() -> None:
    reward = torch.ones(2, requires_grad=True)
    assert not matching.reward_weights(reward, 1.0).requires_grad
    with pytest.raises(ValueError, match="'mean'"):
        matching.rewarded(torch.ones(2), torch.ones(2), "mean")  # type: ignore[arg-type]


def test_mouth_weight_scales_the_gradient() -> None:
    generated = torch.zeros(1, 1, 1, 1, 2, requires_grad=True)
    gradient = torch.ones(1, 1, 1, 1, 2)
    loss = matching.matching_loss(generated, gradient, torch.tensor([2.0, 0.0])).sum()
    (got,) = torch.autograd.grad(loss, generated)
    assert got.flatten().tolist() == [1.0, 0.0]  # 2 g / 2 elements; nothing outside of the mouth
