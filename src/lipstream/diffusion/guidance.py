"""Classifier-free guidance on the driving audio and its sync window.

The paper's observation: audio guidance of the teacher buys synchronisation at middle noise levels and costs
fidelity elsewhere, so it is switched on inside [0.556, 0.882] only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipstream.diffusion.schedule import SYNC_WINDOW


def guided(x_cond: Tensor, x_null: Tensor, scale: Tensor | float) -> Tensor:
    """x̂ = x̂_∅ + w (x̂_c - x̂_∅) on x0 predictions [B, C, T, H, W]; scale: one number or [B]."""
    if isinstance(scale, Tensor):
        scale = scale.to(x_cond.dtype).reshape(-1, *([1] * (x_cond.ndim - 1)))
    # Written from the conditional side: at w = 1 the conditional prediction comes back untouched.
    return x_cond + (scale - 1) * (x_cond - x_null)


def sync_window_scale(
    t: Tensor, scale: float, window: tuple[float, float] = SYNC_WINDOW, *, reverse: bool = False
) -> Tensor:
    """w(t) = scale inside the closed window, 1 outside, [B] float64; `reverse` swaps (an ablation)."""
    low, high = window
    inside = (t >= low) & (t <= high)
    gate = inside ^ reverse
    return torch.where(gate, scale, 1.0).to(torch.float64)
