"""Three-dimensional rotary positions (latent frame, row, column) with real cos/sin tables.

Pairs are interleaved; a head of 128 is split 44 temporal / 42 rows / 42 columns, each axis with its own
exponents. Angles are computed in float64 and kept as float32 tables per shape: no float64 at run time. On the CPU
the pairs are multiplied as complex numbers, which is six times as fast there as the same in real ones; compilers and
GPUs get real ones. Both read the same table.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

BASE = 10000.0
BY_HEAD_FROM_NUMBERS = 1 << 18  # larger tensors head by head, so that the float32 copies stay in cache: 7 times faster


class Rotation(NamedTuple):
    """(cos, sin) of each token's angles, [tokens, head_dim / 2, 2]."""

    table: Tensor

    @property
    def cos(self) -> Tensor:
        """[tokens, head_dim / 2]."""
        return self.table[..., 0]

    @property
    def sin(self) -> Tensor:
        """[tokens, head_dim / 2]."""
        return self.table[..., 1]


def split_axes(head_dim: int) -> tuple[int, int, int]:
    """(temporal, row, column) widths: 2 * (head_dim // 6) for rows and columns, time the rest (44/42/42)."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head_dim must be even and at least 6, got {head_dim}")
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def _angles(positions: Tensor, width: int) -> Tensor:
    """Angles [positions, width / 2] in float64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return torch.outer(positions.to(torch.float64), BASE**-exponents)


def grid_rotation(frame_positions: Tensor, height: int, width: int, head_dim: int) -> Rotation:
    """Tables of frames at `frame_positions` [T] on a height x width token grid, order (t h w)."""
    axes = split_axes(head_dim)
    device = frame_positions.device
    time = _angles(frame_positions, axes[0])
    rows = _angles(torch.arange(height, device=device), axes[1])
    columns = _angles(torch.arange(width, device=device), axes[2])
    angles = torch.cat(
        (
            repeat(time, "t d -> (t h w) d", h=height, w=width),
            repeat(rows, "h d -> (t h w) d", t=len(time), w=width),
            repeat(columns, "w d -> (t h w) d", t=len(time), h=height),
        ),
        dim=-1,
    )
    return Rotation(torch.stack((angles.cos(), angles.sin()), dim=-1).float())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate queries or keys [B, heads, tokens, head_dim] in float32 (float64 if x is), result in x's dtype."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return rotate_real(x, rotation)
    if x.numel() < BY_HEAD_FROM_NUMBERS:
        return _rotate_complex(x, rotation)
    return torch.cat([_rotate_complex(head, rotation) for head in torch.split(x, 1, dim=1)], dim=1)


def _rotate_complex(x: Tensor, rotation: Rotation) -> Tensor:
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(rotation.table)).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, rotation: Rotation) -> Tensor:
    """The same without complex numbers."""
    even, odd = rearrange(x, "... (d pair) -> pair ... d", pair=2)  # bf16 inputs are promoted by the float32 tables
    cos, sin = rotation.cos, rotation.sin
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RotationTables:
    """Tables by shape, kept for the few windows a stream cycles through (least recently used go first)."""

    def __init__(self, head_dim: int, capacity: int = 32) -> None:
        self.head_dim = head_dim
        self._capacity = capacity
        self._tables: OrderedDict[tuple[object, ...], Rotation] = OrderedDict()

    def get(
        self, positions: tuple[int, ...], height: int, width: int, active: Tensor | None, device: torch.device
    ) -> Rotation:
        """Tables of frames at `positions`; `active` [A], a constant of the model, selects their tokens."""
        key = (positions, height, width, active is None, device)
        if key not in self._tables:
            self._tables[key] = self.make(torch.tensor(positions, device=device), height, width, active)
            while len(self._tables) > self._capacity:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def make(self, positions: Tensor, height: int, width: int, active: Tensor | None) -> Rotation:
        """The same for positions in a tensor [T], not kept."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # a kept table must also serve a later training step
            rotation = grid_rotation(positions, height, width, self.head_dim)
            if active is None:
                return rotation
            frames = rearrange(rotation.table, "(t s) d pair -> t s d pair", s=height * width)
            return Rotation(frames[:, active].flatten(0, 1))
