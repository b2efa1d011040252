"""The head basis: a CC0 MakeHuman head with identity targets and 52 facial units, plus our own teeth.

The vendored asset `assets/head_basis.npz` holds 6,051 vertices and 386 displacement targets: `ma:` ethnic, sex, age
and weight mixtures, `id:` local shape targets and `fu:` facial units that follow the ARKit names. Lengths are in
decimetres, +x is the person's left, +y is up, +z is forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic.teeth import build_teeth, skin_to

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

SKIN, MOUTH, EYE, TEETH, TONGUE = 0, 1, 2, 3, 4
_HELPER_LASHES, _HELPER_HAIR = 6, 7
_MIDLINE_SPLIT_DM = -0.17  # jawOpen moves lower-lip vertices further down than this, upper-lip ones less
_LIP_COLUMNS_DM = (-0.14, -0.07, 0.0, 0.07, 0.14)


@dataclass(frozen=True, kw_only=True)
class HeadBasis:
    """Everything that all identities share. V vertices, F triangles, M displacement targets."""

    vertices: Floats  # (V, 3) dm
    triangles: Ints  # (F, 3)
    materials: Ints  # (F,) SKIN, MOUTH, EYE, TEETH or TONGUE
    vertex_materials: Ints  # (V,)
    deltas: Floats  # (M, V, 3) dm
    names: tuple[str, ...]  # (M,)
    lips: Floats  # (V,) 0..1 painted masks
    eyelids: Floats
    ears: Floats
    face: Floats
    tooth_tint: Floats  # (V, 3) colour factor of the teeth, -1 in the first channel marks gums
    landmarks: dict[str, int]  # name -> vertex

    def index(self, name: str) -> int:
        """Position of a displacement target, e.g. `fu:jawOpen`."""
        return self.names.index(name)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the facial units without their prefix, in the order of `unit_deltas`."""
        return tuple(name[3:] for name in self.names if name.startswith("fu:"))

    @property
    def unit_deltas(self) -> Floats:
        """(U, V, 3) displacement of each facial unit at full strength, dm."""
        return self.deltas[[i for i, name in enumerate(self.names) if name.startswith("fu:")]]


def _nearest(vertices: Floats, candidates: npt.NDArray[np.bool_], target: tuple[float, float, float]) -> int:
    distance = np.linalg.norm(vertices - np.asarray(target, np.float32), axis=1)
    return int(np.argmin(np.where(candidates, distance, np.inf)))


def _find_landmarks(vertices: Floats, lips: Floats, jaw_drop: Floats, skin: npt.NDArray[np.bool_]) -> dict[str, int]:
    """Name useful vertices. Upper and lower lip are told apart by how far `jawOpen` lowers them."""
    x, y, z = vertices.T
    found: dict[str, int] = {}
    upper, lower = jaw_drop > _MIDLINE_SPLIT_DM, jaw_drop <= _MIDLINE_SPLIT_DM
    for i, column in enumerate(_LIP_COLUMNS_DM):
        near = (np.abs(x - column) < 0.022) & (lips > 0.6) & (z > 1.25) & skin
        found[f"lip_inner_upper_{i}"] = int(np.argmin(np.where(near & upper, y, np.inf)))
        found[f"lip_inner_lower_{i}"] = int(np.argmax(np.where(near & lower, y, -np.inf)))
        found[f"lip_outer_upper_{i}"] = int(np.argmax(np.where(near & upper, y, -np.inf)))
        found[f"lip_outer_lower_{i}"] = int(np.argmin(np.where(near & lower, y, np.inf)))
    front_lips = (lips > 0.6) & skin & (z > 1.1)
    for side, sign in (("right", -1.0), ("left", 1.0)):
        found[f"mouth_corner_{side}"] = int(np.argmax(np.where(front_lips, sign * x, -np.inf)))
        found[f"eye_outer_{side}"] = _nearest(vertices, skin, (sign * 0.46, 7.28, 1.2))
        found[f"eye_inner_{side}"] = _nearest(vertices, skin, (sign * 0.17, 7.25, 1.3))
        found[f"jaw_{side}"] = _nearest(vertices, skin, (sign * 0.62, 6.4, 0.75))
    found["nose_tip"] = _nearest(vertices, skin, (0.0, 6.91, 1.7))
    found["nose_base"] = _nearest(vertices, skin, (0.0, 6.81, 1.58))
    found["chin"] = _nearest(vertices, skin, (0.0, 6.2, 1.43))
    found["brow_centre"] = _nearest(vertices, skin, (0.0, 7.45, 1.45))
    return found


@lru_cache(maxsize=1)
def load_basis() -> HeadBasis:
    """Read the vendored asset and put our own teeth in place of the helper strips (about 0.2 s, cached)."""
    with as_file(files("lipstream.data.synthetic") / "assets" / "head_basis.npz") as path, np.load(path) as stored:
        raw = {key: stored[key] for key in stored.files}
    names = tuple(str(name) for name in raw["names"])
    head, materials, deltas = raw["V"], raw["mat"], raw["D"]
    teeth = build_teeth()
    helpers = np.unique(raw["tris"][materials == TEETH])
    tooth_deltas = skin_to(teeth, head[helpers], deltas[:, helpers])
    tooth_deltas[names.index("fu:mouthFunnel")] = 0.0  # lips only: teeth are bone
    keep = (materials != TEETH) & (materials != _HELPER_LASHES) & (materials != _HELPER_HAIR)
    triangles = np.concatenate([raw["tris"][keep], teeth.triangles + len(head)])
    triangle_materials = np.concatenate([materials[keep], teeth.materials])
    used, compact = np.unique(triangles, return_inverse=True)
    triangles = compact.reshape(triangles.shape).astype(np.int32)

    def pick(values: Floats, filler: float = 0.0) -> Floats:
        shape = (len(teeth.vertices), *values.shape[1:])
        return np.asarray(np.concatenate([values, np.full(shape, filler, np.float32)])[used], np.float32)

    vertices = np.concatenate([head, teeth.vertices])[used].astype(np.float32)
    all_deltas = np.ascontiguousarray(np.concatenate([deltas, tooth_deltas], axis=1)[:, used].astype(np.float32))
    vertex_materials = np.zeros(len(used), np.int32)
    skin = np.zeros(len(used), bool)
    skin[np.unique(triangles[triangle_materials == SKIN])] = True
    for material in (SKIN, MOUTH, EYE, TEETH, TONGUE):
        vertex_materials[np.unique(triangles[triangle_materials == material])] = material
    lips = np.where(vertex_materials == MOUTH, 0.0, pick(raw["m_lips"])).astype(np.float32)
    tint = np.concatenate([np.ones_like(head), teeth.tint])[used].astype(np.float32)
    jaw_drop = all_deltas[names.index("fu:jawOpen"), :, 1]
    return HeadBasis(
        vertices=vertices,
        triangles=triangles,
        materials=triangle_materials.astype(np.int32),
        vertex_materials=vertex_materials,
        deltas=all_deltas,
        names=names,
        lips=lips,
        eyelids=pick(raw["m_eyelids"]),
        ears=pick(raw["m_ears"]),
        face=pick(raw["m_face"]),
        tooth_tint=tint,
        landmarks=_find_landmarks(vertices, lips, jaw_drop, skin),
    )
