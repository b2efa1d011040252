"""Hair and beards as strands that follow the scalp.

Every strand starts on the skin, is combed along the tangent plane (away from a whorl, a parting or towards a bun),
bends under gravity and is pushed out of the head again. Combing in the tangent plane is what keeps hair lying down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from lipstream.data.synthetic.basis import SKIN, HeadBasis

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Style:
    """One hair cut. Lengths in dm."""

    length: float
    strands: int
    knots: int
    gravity: float
    mess: float
    lift: float
    curl: float = 0.0
    comb: str = "whorl"


STYLES: dict[str, Style] = {
    "bald": Style(length=0.06, strands=800, knots=2, gravity=0.1, mess=0.1, lift=0.2),
    "buzz": Style(length=0.08, strands=6000, knots=2, gravity=0.1, mess=0.15, lift=0.35),
    "short": Style(length=0.34, strands=6000, knots=5, gravity=0.5, mess=0.10, lift=0.10),
    "side": Style(length=0.46, strands=6000, knots=5, gravity=0.7, mess=0.06, lift=0.08, comb="part"),
    "curly": Style(length=0.36, strands=5500, knots=7, gravity=0.15, mess=0.40, lift=0.55, curl=0.045),
    "medium": Style(length=1.25, strands=7000, knots=8, gravity=2.0, mess=0.06, lift=0.04, comb="part"),
    "long": Style(length=2.3, strands=7000, knots=10, gravity=2.2, mess=0.05, lift=0.04, comb="part"),
    "bun": Style(length=0.7, strands=5500, knots=6, gravity=0.0, mess=0.03, lift=0.02, comb="bun"),
}
_FEMALE = {"buzz": 0.03, "short": 0.13, "side": 0.12, "curly": 0.14, "medium": 0.28, "long": 0.20, "bun": 0.10}
_MALE = {"bald": 0.10, "buzz": 0.18, "short": 0.36, "side": 0.20, "curly": 0.12, "medium": 0.04}


@dataclass(frozen=True, kw_only=True)
class Hair:
    """S strands of K knots, attached to the skin by barycentric roots."""

    corners: npt.NDArray[np.int32]  # (S, 3) vertices of the root triangle
    weights: Floats  # (S, 3)
    offsets: Floats  # (S, K, 3) from the root, dm
    normals: Floats  # (S, 3) scalp normal at the root
    radius: Floats  # (S,) dm
    colour: Floats  # (S, 3) linear RGB
    style: str


def _hairline(basis: HeadBasis, recede: float) -> Floats:
    """Strength 0..1 of scalp hair at each vertex."""
    x, y, z = np.abs(basis.vertices[:, 0]), basis.vertices[:, 1], basis.vertices[:, 2]
    front = 7.93 + recede - 0.12 * (x / 0.5) ** 2
    temple = 7.25 + (z - 0.55) / 0.45 * (0.6 + recede)
    level = np.where(z > 1.0, front, np.where(z > 0.55, temple, np.where(z > 0.25, 7.35, 6.75)))
    allowed = (basis.ears < 0.3) & (basis.vertex_materials == SKIN) & (y > 6.6)
    return np.asarray(np.clip((y - level) / 0.08, 0, 1) * allowed, np.float32)


def _comb(kind: str, root: Floats, parting: float) -> npt.NDArray[np.floating]:
    """Direction field before it is projected onto the scalp."""
    if kind == "bun":
        return np.asarray(np.array([0.0, 7.75, -0.65]) - root)
    if kind == "part":
        side = np.tanh((root[:, 0] - parting) / 0.08)
        over = np.clip((root[:, 1] - 7.6) / 0.4, 0, 1)
        return np.stack([side * (0.35 + over), -0.55 - 0.2 * (1 - over), np.where(root[:, 2] > 0.7, -0.25, -0.35)], 1)
    away = root - np.array([parting * 0.4, 8.6, -0.25])  # the whorl on the crown
    return np.asarray(away + np.array([0.0, -0.2, 0.25]))


def _scatter(
    rng: Rng, vertices: Floats, triangles: npt.NDArray[np.int32], strength: Floats, count: int
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Random roots: corners (S, 3) and barycentric weights (S, 3), density proportional to area x strength."""
    corners = vertices[triangles]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    density = area * strength[triangles].mean(axis=1)
    if count <= 0 or density.sum() <= 0:
        return np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32)
    chosen = triangles[rng.choice(len(triangles), count, p=density / density.sum())]
    pair = np.sort(rng.random((count, 2)), axis=1)
    weights = np.stack([pair[:, 0], pair[:, 1] - pair[:, 0], 1 - pair[:, 1]], axis=1)
    return chosen, weights.astype(np.float32)


def _grow(
    rng: Rng,
    root: Floats,
    normal: Floats,
    direction: Floats,
    style: Style,
    length: float,
    tree: cKDTree,
    skin: Floats,
    skin_normals: Floats,
) -> Floats:
    """March strands from their roots; returns offsets (S, K, 3)."""
    count = len(root)
    step = length * rng.uniform(0.7, 1.12, (count, 1)) / (style.knots - 1)
    bias = rng.normal(size=(count, 3)) * style.mess
    phase = rng.uniform(0, 2 * np.pi, count)
    heading = direction - (direction * normal).sum(1, keepdims=True) * normal
    heading /= np.linalg.norm(heading, axis=1, keepdims=True) + 1e-9
    heading = heading + style.lift * normal + bias * 0.5
    points = [root]
    for knot in range(1, style.knots):
        heading = heading + np.array([0, -2.0 * style.gravity / (style.knots - 1), 0]) + bias * 0.3
        heading += rng.normal(size=(count, 3)) * style.mess * 0.4
        heading /= np.linalg.norm(heading, axis=1, keepdims=True) + 1e-9
        tip = points[-1] + heading * step
        if style.curl:
            turn = phase + 1.9 * knot
            tip = tip + style.curl * np.stack([np.cos(turn), 0.6 * np.sin(turn), np.sin(turn)], 1)
        _, near = tree.query(tip)
        height = ((tip - skin[near]) * skin_normals[near]).sum(1)
        ceiling = 0.05 + (0.9 * style.lift + 0.10) * knot * step[:, 0]  # lying hair may not rise far above the scalp
        floor = 0.025 + 0.025 * knot / style.knots
        correct = np.clip(floor - height, 0, 0.4)
        if style.comb != "bun" and length < 0.8:
            correct = correct - np.clip(height - np.maximum(ceiling, floor), 0, 0.4)
        tip = tip + correct[:, None] * skin_normals[near]
        heading = tip - points[-1]
        points.append(tip)
    return (np.stack(points, 1) - root[:, None]).astype(np.float32)


def _resample(offsets: Floats, knots: int) -> Floats:
    have = offsets.shape[1]
    if have == knots:
        return offsets
    at = np.linspace(0, have - 1, knots)
    low = np.minimum(at.astype(int), have - 2)
    f = (at - low)[None, :, None].astype(np.float32)
    return np.asarray(offsets[:, low] * (1 - f) + offsets[:, low + 1] * f, np.float32)


def grow_hair(
    basis: HeadBasis, vertices: Floats, normals: Floats, rng: Rng, *,
    traits: dict[str, float], colour: Floats, beard: Floats | None, amount: float,
) -> tuple[Hair, Floats]:  # fmt: skip
    """Grow the hair of one person; also returns how strongly the scalp is painted in hair colour, (V,) 0..1."""
    table = _MALE if traits["male"] > 0.5 else _FEMALE
    name = str(rng.choice(list(table), p=np.array(list(table.values())) / sum(table.values())))
    style = STYLES[name]
    recede = float(
        rng.uniform(-0.1, 0.1) + (rng.uniform(0, 0.22) if traits["male"] > 0.5 and traits["old"] > 0.4 else 0)
    )
    strength = _hairline(basis, recede)
    if name == "bald":
        strength = strength * np.clip((7.75 - basis.vertices[:, 1]) / 0.1, 0, 1)
    is_skin = basis.vertex_materials == SKIN
    triangles = basis.triangles[basis.materials == SKIN]
    tree = cKDTree(vertices[is_skin])
    parting = float(rng.uniform(-0.35, 0.35))
    parts = []
    jobs = [(style, strength, style.length * rng.uniform(0.8, 1.2), int(style.strands * amount), 0.022)]
    if beard is not None:
        whiskers = Style(
            length=float(rng.uniform(0.04, 0.12)),
            strands=int(rng.uniform(900, 2500)),
            knots=3,
            gravity=0.3,
            mess=0.25,
            lift=0.5,
        )
        jobs.append((whiskers, beard * (beard > 0.25), whiskers.length, int(whiskers.strands * amount), 0.010))
    for number, (cut, mask, length, count, radius) in enumerate(jobs):
        corners, weights = _scatter(rng, vertices, triangles, mask, count)
        root = np.einsum("skc,sk->sc", vertices[corners], weights)
        normal = np.einsum("skc,sk->sc", normals[corners], weights)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        direction = (
            _comb(cut.comb, root, parting) if number == 0 else np.tile(np.array([0.0, -1.0, 0.1]), (len(root), 1))
        )
        offsets = _grow(rng, root, normal, direction, cut, length, tree, vertices[is_skin], normals[is_skin])
        if number == 0:  # nothing may hang over the face
            at = np.einsum("skc,sk->sc", basis.vertices[corners], weights)[:, None] + offsets
            low = 7.84 + 0.5 * recede
            over = (np.abs(at[..., 0]) < 0.66) & (at[..., 1] < low) & (at[..., 1] > 5.6) & (at[..., 2] > 0.75)
            aside = np.clip(0.68 - np.abs(at[..., 0]), 0, None) * over
            if cut.comb == "part":  # long hair frames the face instead of vanishing
                aside = np.maximum.accumulate(aside, axis=1)
                offsets[..., 0] += np.where(aside <= 0.4, np.sign(at[..., 0]) * aside, 0)
                over &= aside > 0.4
            clear = ~over.any(axis=1)
            corners, weights, offsets, normal = corners[clear], weights[clear], offsets[clear], normal[clear]
        shade = rng.uniform(0.65, 1.35, (len(corners), 1)) * rng.uniform(0.96, 1.04, (len(corners), 3))
        parts.append((corners, weights, offsets, normal, np.full(len(corners), radius), colour * shade))
    knots = max(part[2].shape[1] for part in parts)
    hair = Hair(
        corners=np.concatenate([p[0] for p in parts]).astype(np.int32),
        weights=np.concatenate([p[1] for p in parts]).astype(np.float32),
        offsets=np.concatenate([_resample(p[2], knots) for p in parts]).astype(np.float32),
        normals=np.concatenate([p[3] for p in parts]).astype(np.float32),
        radius=np.concatenate([p[4] for p in parts]).astype(np.float32),
        colour=np.concatenate([p[5] for p in parts]).astype(np.float32),
        style=name,
    )
    return hair, (strength * (0.4 if name == "bald" else 0.92)).astype(np.float32)
