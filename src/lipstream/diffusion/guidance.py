"""Classifier-free guidance on the driving audio and its sync window.

The paper's observation: audio guidance of the teacher buys synchronisation at middle noise levels and costs
fidelity elsewhere, so it is switched on inside [0.556, 0.882] only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor

from lipstream.diffusion.schedule import SYNC_WINDOW
from lipstream.models.dit_config import Conditions

#: What the null branch lacks: text and speech as in distillation, or the speech alone (paper, appendix).
DropMode = Literal["text+audio", "audio"]
DROP_MODES: tuple[DropMode, ...] = get_args(DropMode)


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


def null_conditions(
    conditions: Conditions, drop: DropMode = "text+audio", empty_prompt: Tensor | None = None
) -> Conditions:
    """The conditions of the null branch: silence, and with "text+audio" the empty prompt; what is seen stays.

    Args:
        empty_prompt: [1, L, text_dim], the encoding of the empty string (spec 5.2); a network without text needs none.

    Raises:
        ValueError: unknown mode, or a text to drop and nothing to put in its place.
    """
    if drop not in DROP_MODES:
        raise ValueError(f"drop is {' or '.join(DROP_MODES)}, got {drop!r}")
    if drop == "audio" or conditions.text is None:
        return dataclasses.replace(conditions, audio=None)
    if empty_prompt is None:
        raise ValueError("dropping the text takes the encoding of the empty prompt; zeros are not it")
    return dataclasses.replace(conditions, audio=None, text=empty_prompt)
