"""Distribution matching with a reward, as pure functions: the equations of stage 2 (paper, "Sync-Window DMD").

The student's x0 is noised to a time t; a frozen teacher and a critic that knows only the student's samples both say
what they take for clean. Where they differ, the student's samples differ from the teacher's:

    g = (x̂_fake - x̂_real) / (mean |x0 - x̂_real| + 1e-6)            normalised gradient, per sample
    L = 0.5 mean (x0 - stop(x0 - g))^2                               whose gradient is g / number of elements
    w = exp(beta R(D(x0), a))                                        the reward's weight: no gradient through R and D

Latents are [B, C, T, H, W]; losses per sample [B]. Source of the normaliser and of the reward's modes: spec 5.2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-6

RewardMode = Literal["per_sample", "self_normalized", "batch_mean"]


def normaliser(generated: Tensor, real: Tensor) -> Tensor:
    """1 / (mean |generated - real| + 1e-6) per sample, float32 [B]."""
    distance = (generated.float() - real.float()).abs().flatten(1).mean(1)
    return (distance + EPS).reciprocal()


def matching_gradient(generated: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(fake - real) times the normaliser, in the dtype of ``fake``; no gradient."""
    with torch.no_grad():
        weight = normaliser(generated, real).to(fake.dtype)
        return (fake - real) * weight.reshape(-1, *([1] * (fake.ndim - 1)))


def matching_loss(generated: Tensor, gradient: Tensor, weight: Tensor | None = None) -> Tensor:
    """0.5 mean (generated - stop(generated - gradient))^2 per sample [B].

    Args:
        weight: of the elements, broadcastable to a sample, mean 1 over it (the mouth counts more than the rest).
    """
    squared = (generated - (generated - gradient).detach()).square()
    if weight is not None:
        squared = squared * weight
    return 0.5 * squared.flatten(1).mean(1)


def critic_loss(predicted: Tensor, generated: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far the critic is from the student's clean sample: mean squared x0 error, per sample [B]."""
    squared = (predicted - generated.detach()).square()
    if weight is not None:
        squared = squared * weight
    return squared.flatten(1).mean(1)


def reward_weights(reward: Tensor, beta: float, clamp: tuple[float, float] | None = None) -> Tensor:
    """exp(beta r) of rewards [B], clamped before; no gradient.

    The exponent is unbounded: a single r of 10 at beta 2 weighs 5e8. The authors advise to clamp to [0, 8].
    """
    reward = reward.detach()
    if clamp is not None:
        reward = reward.clamp(*clamp)
    return (beta * reward).exp()


def rewarded(losses: Tensor, weights: Tensor, mode: RewardMode = "per_sample") -> Tensor:
    """The batch's loss of per-sample losses and weights, both [B].

    per_sample: mean(w L), the paper's. self_normalized: sum(w L) / sum(w). batch_mean: mean(w) mean(L).
    """
    if mode == "per_sample":
        return (weights * losses).mean()
    if mode == "self_normalized":
        return (weights * losses).sum() / weights.sum()
    if mode == "batch_mean":
        return weights.mean() * losses.mean()
    raise ValueError(f"unknown reward mode {mode!r}")
