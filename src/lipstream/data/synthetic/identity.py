"""A person drawn from a seed: face shape, skin, eyes, clothes, hair; everything that stays fixed during a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic import raster
from lipstream.data.synthetic.basis import EYE, MOUTH, SKIN, TEETH, TONGUE, HeadBasis
from lipstream.data.synthetic.hair import Hair, grow_hair
from lipstream.data.synthetic.scene import linear_rgb, noise_texture
from lipstream.data.synthetic.shading import collar_height

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator

_OPPOSITES = {
    "incr": "decr", "up": "down", "out": "in", "forward": "backward", "convex": "concave", "uncompress": "compress",
}  # fmt: skip
# Spread of each shape axis by the first word that matches; 0 switches an axis off.
_SPREADS = (
    ("eyebrows", 0.0), ("forehead-nubian", 0.12), ("trans", 0.12), ("eye-height", 0.15), ("epicanthus", 0.15),
    ("eyefold", 0.10), ("mouth-angles", 0.15), ("mouth", 0.25), ("head-scale", 0.22), ("fat", 0.22), ("age", 0.2),
    ("neck", 0.15), ("cleft", 0.15), ("laugh", 0.15), ("", 0.30),
)  # fmt: skip
_SKIN_TONES = np.array(
    [
        (232, 198, 180),
        (222, 182, 158),
        (220, 175, 145),
        (198, 148, 115),
        (165, 115, 84),
        (122, 82, 58),
        (84, 56, 41),
        (61, 41, 31),
    ]
)
_HAIR_TONES = np.array(
    [
        (24, 20, 18),
        (38, 26, 20),
        (62, 42, 28),
        (95, 66, 40),
        (140, 100, 58),
        (176, 142, 96),
        (110, 60, 34),
        (130, 126, 122),
        (200, 197, 192),
    ]
)
_IRIS_TONES = np.array(
    [(60, 38, 22), (85, 55, 30), (110, 85, 45), (80, 105, 75), (95, 125, 150), (70, 95, 125), (120, 130, 130)]
)
_LIPSTICKS = np.array([(160, 50, 58), (180, 85, 85), (140, 45, 65), (195, 105, 100), (120, 55, 55)])
_MASCULINE = 0.55


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One person. V vertices of the basis; colours are linear RGB."""

    seed: int
    vertices: Floats  # (V, 3) neutral face, dm
    albedo: Floats  # (V, 3)
    occlusion: Floats  # (V,)
    iris: Floats  # (3,)
    eye: Floats  # iris and pupil radius, radians
    brow: Floats  # see shading._eyebrow
    brow_rgb: Floats
    surface: Floats  # gloss, grain, hair shine
    noise: Floats  # (N, N) skin texture
    cloth: Floats
    cloth_texture: Floats
    collar: Floats
    hair: Hair
    rest_units: dict[str, float]  # facial units of the relaxed face: keeps brows friendly
    centre: Floats  # (3,) middle of the head, dm
    traits: dict[str, float]


def _shape_weights(basis: HeadBasis, rng: Rng) -> tuple[dict[str, float], dict[str, float]]:
    """Displacement weights and the coarse traits they express."""
    ethnic = rng.dirichlet([0.6, 0.6, 0.6])
    male = float(np.clip(rng.choice([0.06, 0.92]) + rng.normal(0, 0.12), 0, 1))
    old = float(np.clip(rng.beta(1.2, 2.4), 0, 1))
    tone_parts = {"min": 0.0, "average": 1.0, "max": 0.0}
    muscle, weight = rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.75)

    def split(value: float) -> dict[str, float]:
        return {
            **tone_parts,
            "min": max(0, 1 - 2 * value),
            "average": 1 - abs(2 * value - 1),
            "max": max(0, 2 * value - 1),
        }

    known, weights = set(basis.names), {}
    for sex, by_sex in (("male", male), ("female", 1 - male)):
        for age, by_age in (("old", old), ("young", 1 - old)):
            for kind, share in zip(("african", "asian", "caucasian"), ethnic, strict=True):
                weights[f"ma:{kind}-{sex}-{age}"] = float(share) * by_sex * by_age
            for m_name, m_part in split(muscle).items():
                for w_name, w_part in split(weight).items():
                    name = f"ma:universal-{sex}-{age}-{m_name}muscle-{w_name}weight"
                    weights[name] = by_sex * by_age * m_part * w_part
    for name in basis.names:
        stem, _, ending = name.rpartition("-")
        other = f"{stem}-{_OPPOSITES.get(ending, '')}"
        if not name.startswith("id:") or other not in known or stem.startswith("id:r-"):
            continue
        spread = next(value for word, value in _SPREADS if word in stem)
        amount = float(np.clip(rng.normal(0, spread), -0.8, 0.8))
        weights[name if amount > 0 else other] = abs(amount)
        if stem.startswith("id:l-"):  # ears, eyes, cheeks: nearly symmetric
            twin = amount + float(rng.normal(0, 0.03))
            weights["id:r-" + (name if twin > 0 else other)[5:]] = abs(twin)
    for shape in ("oval", "rectangular", "round", "square", "triangular", "diamond"):
        if rng.random() < 0.25:
            weights[f"id:head-{shape}"] = float(rng.uniform(0, 0.5))
    traits = {"male": male, "old": old, "african": ethnic[0], "asian": ethnic[1], "caucasian": ethnic[2]}
    return {k: v for k, v in weights.items() if k in known and v}, {k: float(v) for k, v in traits.items()}


def _blob(points: Floats, centre: tuple[float, float, float], radius: tuple[float, float, float]) -> Floats:
    square = (((points - np.asarray(centre)) / np.asarray(radius)) ** 2).sum(axis=1)
    return np.asarray(np.exp(-square), np.float32)


def _tone(table: npt.NDArray[np.int_], position: float) -> Floats:
    low = int(min(position, len(table) - 2))
    f = position - low
    return linear_rgb(table[low]) * (1 - f) + linear_rgb(table[low + 1]) * f


def _paint(
    basis: HeadBasis, rng: Rng, traits: dict[str, float], tone: float, hair_rgb: Floats
) -> tuple[Floats, Floats]:
    """Vertex colours (V, 3) and ambient occlusion (V,)."""
    rest = basis.vertices
    mirrored = rest * np.array([1, 1, 1], np.float32)
    mirrored[:, 0] = np.abs(rest[:, 0])
    dark = tone / 7
    skin = _tone(_SKIN_TONES, tone) * rng.uniform(0.94, 1.06, 3)
    albedo = np.tile(skin, (len(rest), 1))
    blush = rng.uniform(0.2, 0.8) * (np.array([1.06, 0.82, 0.80]) * (1 - dark) + np.array([1.05, 0.9, 0.88]) * dark - 1)
    cheeks = _blob(mirrored, (0.45, 6.85, 1.35), (0.22, 0.2, 0.3))
    nose = _blob(rest, (0, 6.95, 1.65), (0.16, 0.14, 0.2))
    for cover in (cheeks, nose, basis.ears * 0.7):
        albedo *= 1 + cover[:, None] * blush
    albedo *= 1 - (basis.eyelids * rng.uniform(0, 0.3))[:, None] * np.array([0.25, 0.35, 0.3])
    lip = skin * (np.array([0.95, 0.55, 0.55]) * (1 - dark) + np.array([0.82, 0.60, 0.60]) * dark)
    feminine = traits["male"] < 1 - _MASCULINE
    if feminine and rng.random() < 0.5:
        mix = rng.uniform(0.25, 0.75)
        lip = lip * (1 - mix) + linear_rgb(_LIPSTICKS[rng.integers(len(_LIPSTICKS))]) * mix
    cover = np.clip(basis.lips * 1.1, 0, 1)[:, None]
    albedo = albedo * (1 - cover) + lip * cover
    if traits["male"] > _MASCULINE:
        stubble = rng.uniform(0, 0.5) * _beard_area(basis) * (1 - 0.5 * dark)
        albedo *= 1 - stubble[:, None] * np.array([0.55, 0.5, 0.42])
    kind = basis.vertex_materials
    albedo[kind == TONGUE] = np.array([0.42, 0.14, 0.13]) * rng.uniform(0.8, 1.2)
    albedo[kind == MOUTH] = np.array([0.28, 0.08, 0.075]) * rng.uniform(0.7, 1.2)
    enamel = linear_rgb(np.array([235, 226, 208])) * rng.uniform(0.75, 1.1) * np.array([1, 0.98, rng.uniform(0.85, 1)])
    teeth = kind == TEETH
    albedo[teeth] = np.clip(basis.tooth_tint[teeth], 0, 1) * enamel
    depth = rest[:, 2]
    occlusion = np.ones(len(rest))
    occlusion[kind == MOUTH] = np.clip((depth[kind == MOUTH] - 1.15) / 0.42, 0.03, 1) * 0.55
    occlusion[teeth] = np.clip((depth[teeth] - 1.18) / 0.26, 0.12, 1)
    occlusion[kind == TONGUE] = np.clip((depth[kind == TONGUE] - 1.05) / 0.35, 0.1, 1) * 0.75
    is_skin = kind == SKIN
    occlusion *= 1 - 0.22 * _blob(mirrored, (0.30, 7.28, 1.30), (0.16, 0.1, 0.14)) * is_skin
    occlusion *= 1 - 0.5 * _blob(rest, (0, 6.84, 1.60), (0.12, 0.04, 0.08)) * is_skin
    occlusion *= 1 - 0.45 * _blob(rest, (0, 6.0, 0.9), (0.7, 0.25, 0.6)) * is_skin
    ball = (kind == EYE) & (rest[:, 0] > 0)
    middle = rest[ball].mean(axis=0)
    rim = np.linalg.norm(mirrored - middle, axis=1) - np.linalg.norm(rest[ball] - middle, axis=1).max()
    lash = (
        np.exp(-((np.clip(rim, 0, 1) / 0.018) ** 2))
        * is_skin
        * (depth > 1.2)
        * np.where(rest[:, 1] > middle[1] - 0.02, 1, 0.3)
    )
    albedo *= 1 - (lash * rng.uniform(0.5, 0.9))[:, None]
    return albedo.astype(np.float32), occlusion.astype(np.float32)


def _beard_area(basis: HeadBasis) -> Floats:
    """Where a beard may grow, (V,) 0..1."""
    rest = basis.vertices
    mirrored = np.abs(rest[:, :1]) * np.array([[1, 0, 0]], np.float32) + rest * np.array([[0, 1, 1]], np.float32)
    area = _blob(rest, (0, 6.3, 1.3), (0.6, 0.35, 0.6)) + _blob(mirrored, (0.55, 6.6, 0.8), (0.25, 0.4, 0.5))
    area = np.clip(area + _blob(rest, (0, 6.75, 1.6), (0.3, 0.06, 0.2)), 0, 1) * (1 - np.clip(basis.lips * 1.5, 0, 1))
    inside = (rest[:, 1] < 6.85) & (rest[:, 1] > 6.0) & (basis.vertex_materials == SKIN)
    return np.asarray(area * inside, np.float32)


def _clothes(rng: Rng) -> tuple[Floats, Floats, Floats]:
    """Colour, tiling texture and collar shape."""
    texture = noise_texture(rng, 128, 0.6)
    if rng.random() < 0.4:
        waves = np.sin(2 * np.pi * np.arange(128) * rng.integers(4, 20) / 128) > rng.uniform(-0.3, 0.6)
        stripes = (
            np.broadcast_to(waves, (128, 128)) if rng.random() < 0.5 else np.broadcast_to(waves[:, None], (128, 128))
        )
        texture = (0.6 * texture + 0.4 * stripes * rng.uniform(0.2, 0.9)).astype(np.float32)
    grey = rng.uniform(15, 215)
    colour = linear_rgb(np.clip(grey + rng.normal(0, 30, 3), 8, 235))
    collar = [
        rng.uniform(5.6, 6.0),
        rng.uniform(0, 0.25),
        rng.uniform(0.2, 0.6) * rng.integers(0, 2),
        rng.uniform(0.25, 0.5),
    ]
    return colour.astype(np.float32), texture, np.asarray(collar, np.float32)


def make_identity(basis: HeadBasis, seed: int, strands: float = 1.0) -> Identity:
    """Draw the person of a seed; `strands` scales the number of hairs (1 is about 6,000)."""
    rng = np.random.default_rng([seed, 11])
    weights, traits = _shape_weights(basis, rng)
    vertices = basis.vertices.copy()
    for name, amount in weights.items():
        vertices += basis.deltas[basis.index(name)] * np.float32(amount)
    tone = float(
        np.clip(5.6 * traits["african"] + 2.6 * traits["asian"] + 1.2 * traits["caucasian"] + rng.normal(0, 0.8), 0, 7)
    )
    choices = [0, 0, 1, 1, 2, 2, 3, 4, 5, 6] if traits["caucasian"] > 0.4 else [0, 0, 0, 1, 1, 2]
    if traits["old"] > 0.6 and rng.random() < 0.7:
        choices = [7, 8]
    hair_rgb = linear_rgb(_HAIR_TONES[int(rng.choice(choices))]).astype(np.float32)
    albedo, occlusion = _paint(basis, rng, traits, tone, hair_rgb)
    cloth, cloth_texture, collar = _clothes(rng)
    normals = np.zeros_like(vertices)
    raster.vertex_normals(vertices, basis.triangles, normals)
    skin = basis.vertex_materials == SKIN
    level = np.array([collar_height(x, z, collar) for x, _, z in basis.vertices])
    swell = np.clip((level - basis.vertices[:, 1]) / 0.06, 0, 1) * skin * (basis.vertices[:, 1] < 6.6)
    vertices = (vertices + normals * (swell * rng.uniform(0.05, 0.10))[:, None]).astype(np.float32)
    beard = _beard_area(basis) if traits["male"] > _MASCULINE and rng.random() < 0.22 else None
    hair, scalp = grow_hair(basis, vertices, normals, rng, traits=traits, colour=hair_rgb, beard=beard, amount=strands)
    albedo = (albedo * (1 - scalp[:, None]) + hair_rgb * 0.4 * scalp[:, None]).astype(np.float32)
    narrow = 0.35 if traits["male"] < 0.5 else 0.7
    brow = [
        7.50 + rng.uniform(-0.015, 0.03), 0.028 + 0.030 * narrow * rng.uniform(0.6, 1.2), rng.uniform(0.13, 0.17),
        rng.uniform(0.50, 0.58), rng.uniform(0.015, 0.05), rng.uniform(0.75, 1.1),
    ]  # fmt: skip
    iris = linear_rgb(
        _IRIS_TONES[rng.integers(0, 3) if tone > 3.2 or rng.random() < 0.3 else rng.integers(0, len(_IRIS_TONES))]
    )
    lift = float(rng.uniform(0.15, 0.45))
    rest_units = {"browInnerUp": lift, "browOuterUpLeft": 0.6 * lift, "browOuterUpRight": 0.6 * lift}
    rest_units["eyeWideLeft"] = rest_units["eyeWideRight"] = float(rng.uniform(0.0, 0.15))
    face = (basis.face > 0.5) & skin
    return Identity(
        seed=seed,
        vertices=vertices,
        albedo=albedo,
        occlusion=occlusion,
        iris=(iris * 1.3).astype(np.float32),
        eye=np.asarray([rng.uniform(0.40, 0.46), rng.uniform(0.12, 0.2)], np.float32),
        brow=np.asarray(brow, np.float32),
        brow_rgb=(hair_rgb * 0.7 + 0.002).astype(np.float32),
        surface=np.asarray([rng.uniform(0.3, 1.2), rng.uniform(0.1, 0.4), rng.uniform(0.04, 0.16)], np.float32),
        noise=noise_texture(rng, 256, float(rng.uniform(0.6, 1.4))),
        cloth=cloth,
        cloth_texture=cloth_texture,
        collar=collar,
        hair=hair,
        rest_units=rest_units,
        centre=np.asarray(
            [vertices[face, 0].mean(), 0.5 * (vertices[face, 1].min() + vertices[skin, 1].max()), 0.8], np.float32
        ),
        traits=traits,
    )
