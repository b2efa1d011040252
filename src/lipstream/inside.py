"""The inside of a mouth, from memory: what the source has shown of its teeth and tongue, by how far it was open.

A model that is unsure predicts the mean of open and closed, which has the colour of lips. What the source itself has
shown is real, so every frame whose lips part is remembered (one per degree of opening and of spreading), and where
generated lips part, the remembered inside nearest in shape is shown between them. Causal, frame by frame: a live
stream and a file show the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipstream.faces.canvas import FaceCanvas

# All distances are crop px beyond the lips at rest: a tracker reads 0.3 on some closed mouths and 4 on others.
PARTED_PX = (0.1, 1.0)  # from which, and up to which, the inside fades in
WORTH_PX = 0.8  # a source mouth this open is worth remembering
HIGHEST_REST_PX = 5.0
OPENING_STEPS_PX = (2.5, 4.0, 6.0, 9.0, 13.0)
SPREAD_STEPS_PX = (-2.5, 2.5)  # mouth width against its running mean
KEPT_FRAMES = 250  # a memory is replaced by a newer one after so long: light changes
WIDTH_RATE = 0.02
KEEP = 0.12  # how much nearer another memory has to be to take over, or teeth would flicker


class LipRuler:
    """Opening and width of the inner lips from shape fields, as the landmarks would measure them (crop px)."""

    def __init__(self, canvas: FaceCanvas) -> None:
        opening, width = canvas.lip_rulers()
        self._opening, self._opening_rest = torch.from_numpy(opening[0]), opening[1]
        self._width, self._width_rest = torch.from_numpy(width[0]), width[1]

    def opening(self, fields: Tensor) -> Tensor:
        """[..., 20, 20, 2] -> [...]; about 0.5 for closed lips."""
        return fields[..., 1].flatten(-2) @ self._opening + self._opening_rest

    def width(self, fields: Tensor) -> Tensor:
        """[..., 20, 20, 2] -> [...]."""
        return fields[..., 0].flatten(-2) @ self._width + self._width_rest


@dataclass
class _Memory:
    opening: float  # as measured: what counts as closed is learned on the way
    width: float
    texture: Tensor  # [3, h, w]
    frame: int


class MouthInside:
    """What one face has shown of the inside of its mouth; the state of a take."""

    def __init__(self, ruler: LipRuler) -> None:
        self._ruler = ruler
        self._memories: dict[tuple[int, int], _Memory] = {}
        self._width: float | None = None
        self._smooth: float | None = None
        self._rest = HIGHEST_REST_PX
        self._frame = 0
        self._shown: _Memory | None = None

    @property
    def shown_any(self) -> bool:
        """Whether the source has shown the inside of its mouth; once it has, that stays so."""
        return bool(self._memories)

    def see(self, field: Tensor, texture: Tensor) -> None:
        """Remember a source frame: shape field [20, 20, 2] and the paint box of its texture [3, h, w]."""
        opening, width = float(self._ruler.opening(field)), float(self._ruler.width(field))
        self._width = width if self._width is None else self._width + WIDTH_RATE * (width - self._width)
        self._frame += 1
        # The lowest of a short mean: one mistracked frame does not move it.
        self._smooth = opening if self._smooth is None else 0.5 * (self._smooth + opening)
        if self._smooth < self._rest:
            self._rest = self._smooth
            self._sort_again()
        if opening - self._rest < WORTH_PX:
            return
        cell = self._cell(opening, width)
        known = self._memories.get(cell)
        if known is None or self._frame - known.frame > KEPT_FRAMES:
            new = _Memory(opening, width, texture.clone(), self._frame)
            self._memories[cell] = new
            if self._shown is known is not None:
                self._shown = new

    def _cell(self, opening: float, width: float) -> tuple[int, int]:
        """Degree of opening and of spreading."""
        assert self._width is not None
        return (
            sum(opening - self._rest > step for step in OPENING_STEPS_PX),
            sum(width - self._width > step for step in SPREAD_STEPS_PX),
        )

    def _sort_again(self) -> None:
        """Lips turned out to close further: the memories' degrees change; of two in one cell the newer stays."""
        known = sorted(self._memories.values(), key=lambda memory: memory.frame)
        self._memories = {self._cell(memory.opening, memory.width): memory for memory in known}

    def show(self, field: Tensor) -> tuple[Tensor | None, float]:
        """The inside for a generated shape, and how much of it is to be seen (0 closed .. 1).

        None while the source has not shown any.
        """
        opening, width = float(self._ruler.opening(field)) - self._rest, float(self._ruler.width(field))
        u = min(max((opening - PARTED_PX[0]) / (PARTED_PX[1] - PARTED_PX[0]), 0.0), 1.0)
        share = u * u * (3 - 2 * u)
        if not self._memories:
            return None, share

        def distance(memory: _Memory) -> float:
            stretch = math.log((max(opening, 0.0) + 1) / (memory.opening - self._rest + 1))
            return abs(stretch) + (0.3 if stretch > 0.5 else 0) + abs(width - memory.width) / 12

        nearest = min(self._memories.values(), key=distance)
        if self._shown is None or distance(nearest) < distance(self._shown) - KEEP:
            self._shown = nearest
        return self._shown.texture, share
