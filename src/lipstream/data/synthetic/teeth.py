"""Teeth and gums as four parametric strips on a dental arch.

The MakeHuman helper teeth sit behind the upper lip and would never be seen, so each jaw gets one continuous strip:
scalloped biting edges and dark seams suggest single teeth, and a second strip behind it makes the gum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

_TEETH, _MOUTH = 3, 1
_COLUMNS_PER_TOOTH, _ROWS = 6, 6
# Crown widths from the centre outwards, dm: central incisor, lateral, canine, two premolars, molar.
_UPPER_WIDTHS = (0.086, 0.068, 0.076, 0.070, 0.068, 0.072)
_LOWER_WIDTHS = (0.056, 0.062, 0.070, 0.072, 0.070, 0.072)


@dataclass(frozen=True, kw_only=True)
class Teeth:
    """A triangle mesh of both dental arches in the basis' rest pose."""

    vertices: Floats  # (N, 3) dm
    triangles: Ints  # (K, 3)
    materials: Ints  # (K,)
    tint: Floats  # (N, 3)
    upper: npt.NDArray[np.bool_]  # (N,)


def _arch(distance: Floats) -> tuple[Array, Array]:
    """Points (x, z) of the arch at a signed arc length from the midline, dm."""
    t = np.linspace(0.0, 1.25, 200)
    x, z = 0.30 * np.sin(t), 1.488 - 0.43 * (1 - np.cos(t)) ** 1.12
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(z)))])
    size = np.abs(distance)
    return np.sign(distance) * np.interp(size, arc, x), np.interp(size, arc, z)


def _strip(widths: tuple[float, ...], edge: float, root: float, depth: float) -> tuple[Floats, Floats]:
    """Vertices and colours of one row of teeth, edge -> root; both (rows, columns, 3)."""
    side_s, side_a = [], []
    start = 0.0
    for width in widths:
        a = np.linspace(-1.0, 1.0, _COLUMNS_PER_TOOTH)
        side_s.append(start + (a + 1) / 2 * width)
        side_a.append(a)
        start += width
    s, a = np.concatenate(side_s), np.concatenate(side_a)
    s, a = np.concatenate([-s[::-1], s]), np.concatenate([-a[::-1], a])
    rows = np.linspace(0.0, 1.0, _ROWS)[:, None]  # 0 at the biting edge
    inset = depth + 0.014 * np.abs(a) ** 6 + 0.010 * (1 - rows) ** 2
    x, z = _arch(np.broadcast_to(s, (_ROWS, len(s))).astype(np.float32))
    scallop = (root - edge) * 0.10 * np.abs(a) ** 4 * (1 - rows)
    shrink = (root - edge) * 0.25 * np.abs(s) / start
    y = edge + scallop + (root - edge - shrink * 0.5) * rows + shrink * (1 - rows) * 0.5
    seam = 0.42 * np.abs(a) ** 8
    base = np.stack(np.broadcast_arrays(1.0 - 0.08 * rows, 0.98 - 0.14 * rows, 0.93 - 0.22 * rows), -1)
    return np.stack([x, y, z - inset], -1).astype(np.float32), (base - seam[None, :, None]).astype(np.float32)


def _gum(y: tuple[float, float, float], depth: float) -> tuple[Floats, Floats]:
    s = np.broadcast_to(np.linspace(-0.40, 0.40, 25, dtype=np.float32), (3, 25))
    x, z = _arch(s)
    rows = np.asarray(y, np.float32)[:, None] * np.ones_like(s)
    inset = depth + np.asarray([0.012, 0.03, 0.05], np.float32)[:, None]
    tint = np.zeros((3, 25, 3), np.float32)
    tint[..., 0] = -1.0
    return np.stack([x, rows, z - inset], -1).astype(np.float32), tint


def _grid_triangles(rows: int, columns: int, offset: int) -> Ints:
    index = np.arange(rows * columns).reshape(rows, columns) + offset
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    return np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])


def build_teeth() -> Teeth:
    """Both arches, about 350 vertices."""
    parts = [
        (*_strip(_UPPER_WIDTHS, 6.578, 6.695, 0.0), _TEETH, True),
        (*_strip(_LOWER_WIDTHS, 6.556, 6.460, 0.03), _TEETH, False),
        (*_gum((6.685, 6.735, 6.785), 0.0), _MOUTH, True),
        (*_gum((6.480, 6.440, 6.400), 0.028), _MOUTH, False),
    ]
    vertices, triangles, materials, tint, upper = [], [], [], [], []
    offset = 0
    for points, colour, material, is_upper in parts:
        rows, columns = points.shape[:2]
        mesh = _grid_triangles(rows, columns, offset)
        vertices.append(points.reshape(-1, 3))
        tint.append(colour.reshape(-1, 3))
        triangles.append(mesh)
        materials.append(np.full(len(mesh), material))
        upper.append(np.full(rows * columns, is_upper))
        offset += rows * columns
    return Teeth(
        vertices=np.concatenate(vertices),
        triangles=np.concatenate(triangles).astype(np.int32),
        materials=np.concatenate(materials).astype(np.int32),
        tint=np.concatenate(tint),
        upper=np.concatenate(upper),
    )


def skin_to(teeth: Teeth, helpers: Floats, deltas: Floats) -> Floats:
    """Let the teeth follow the basis' helper strips: (M, N, 3) from helper displacements (M, H, 3)."""
    moved = np.zeros((len(deltas), len(teeth.vertices), 3), np.float32)
    helper_upper = helpers[:, 1] > 6.628
    for is_upper in (True, False):
        mine, theirs = teeth.upper == is_upper, helper_upper == is_upper
        gap = np.linalg.norm(teeth.vertices[mine][:, None] - helpers[theirs][None], axis=-1)
        weight = 1.0 / (gap + 0.03) ** 3
        weight /= weight.sum(axis=1, keepdims=True)
        moved[:, mine] = np.einsum("nh,mhc->mnc", weight.astype(np.float32), deltas[:, theirs])
    return moved
