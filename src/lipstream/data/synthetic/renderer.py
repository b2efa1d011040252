"""Draw one frame of an identity: blend shapes, head pose, camera, shadow map, hair, shading, tone curve.

One frame of 256 px takes a few tens of milliseconds on one CPU thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic import raster
from lipstream.data.synthetic.basis import EYE, HeadBasis
from lipstream.data.synthetic.identity import Identity
from lipstream.data.synthetic.scene import Lights
from lipstream.data.synthetic.shading import shade

Floats = npt.NDArray[np.float32]

CAMERA_DISTANCE_DM = 12.0
_NECK = np.array([0.0, 6.25, 0.25], np.float32)
_WAIST = np.array([0.0, 4.5, 0.0], np.float32)
_SHADOW_SIZE, _SHADOW_SPAN_DM = 192, 4.4


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Head and camera of one frame. Angles in radians, shifts in dm, zoom in frame heights per dm."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    body_yaw: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.29
    gaze: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One drawn frame and its geometry."""

    image: npt.NDArray[np.uint8]  # (S, S, 3) RGB
    screen: Floats  # (V, 2) vertices, output pixels
    local: Floats  # (V, 3) vertices before the pose, dm


def rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """Rotation matrix roll * yaw * pitch."""
    (cy, cp, cr), (sy, sp, sr) = np.cos([yaw, pitch, roll]), np.sin([yaw, pitch, roll])
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return np.asarray(tilt @ turn @ nod, np.float32)


class Renderer:
    """Reusable buffers for one output size; `supersample` is the anti-aliasing factor per axis."""

    def __init__(self, basis: HeadBasis, size: int, supersample: float = 1.5) -> None:
        if size < 16:
            raise ValueError(f"size must be at least 16 pixels, got {size}")
        self.basis, self.size = basis, size
        self.width = round(size * supersample)
        shape = (self.width, self.width)
        self._depth, self._weight1, self._weight2, self._along, self._alpha = (
            np.zeros(shape, np.float32) for _ in range(5)
        )
        self._owner, self._strand = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        self._out = np.zeros((*shape, 3), np.float32)
        self._shadow = np.zeros((_SHADOW_SIZE, _SHADOW_SIZE), np.float32)
        self._units = basis.unit_deltas.reshape(len(basis.units), -1)
        left = basis.vertices[:, 0] > 0
        eyes = basis.vertex_materials == EYE
        self._eyes = (np.flatnonzero(eyes & left), np.flatnonzero(eyes & ~left))
        bend = np.clip(basis.vertices[:, 1] - 5.35, 0, 1)
        self._bend = (bend * bend * (3 - 2 * bend))[:, None].astype(np.float32)

    def deform(self, identity: Identity, expression: Floats) -> Floats:
        """Vertices (V, 3) of the face with facial units (U,), before the pose."""
        active = np.flatnonzero(expression)
        moved: Floats = identity.vertices + (expression[active] @ self._units[active]).reshape(-1, 3)
        return moved

    def _project(self, points: Floats, identity: Identity, pose: Pose) -> Floats:
        """Perspective into the supersampled buffer: (..., 3) x px, y px, depth dm."""
        away = CAMERA_DISTANCE_DM - points[..., 2]
        scale = pose.zoom * (CAMERA_DISTANCE_DM - 0.8) * self.width / away
        x = self.width / 2 + (points[..., 0] - identity.centre[0] - pose.shift[0]) * scale
        y = self.width / 2 - (points[..., 1] - identity.centre[1] - pose.shift[1]) * scale
        return np.stack([x, y, away], -1).astype(np.float32)

    def _cast_shadow(self, vertices: Floats, towards: Floats) -> Floats:
        """Fill the shadow map seen from the key light; returns its (3, 4) matrix."""
        side = np.cross(np.array([0.0, 1.0, 0.0]), towards)
        side /= np.linalg.norm(side)
        rise = np.cross(towards, side)
        zoom = _SHADOW_SIZE / _SHADOW_SPAN_DM
        matrix = np.zeros((3, 4), np.float32)
        matrix[:, :3] = np.stack([side * zoom, -rise * zoom, -towards])
        matrix[:, 3] = np.array([_SHADOW_SIZE / 2, _SHADOW_SIZE / 2, 0]) - matrix[:, :3] @ np.array(
            [0, 6.9, 0.8], np.float32
        )
        self._shadow.fill(raster.FAR)
        raster.draw_depth(
            (vertices @ matrix[:, :3].T + matrix[:, 3]).astype(np.float32), self.basis.triangles, self._shadow
        )
        return matrix

    def render(self, identity: Identity, expression: Floats, pose: Pose, lights: Lights, background: Floats) -> Frame:
        """Draw one frame; `background` is (size, size, 3) linear."""
        basis, hair = self.basis, identity.hair
        local = self.deform(identity, expression)
        head, body = rotation(pose.yaw, pose.pitch, pose.roll), rotation(pose.body_yaw, 0, 0)

        def place(points: Floats, bend: Floats | None = None) -> Floats:
            turned = (points - _NECK) @ head.T + _NECK
            if bend is not None:
                turned = points * (1 - bend) + turned * bend
            return ((turned - _WAIST) @ body.T + _WAIST).astype(np.float32)

        vertices = place(local, self._bend)
        roots = np.einsum("skc,sk->sc", local[hair.corners], hair.weights)
        strands = place((roots[:, None] + hair.offsets).reshape(-1, 3)).reshape(hair.offsets.shape)
        points = self._project(vertices, identity, pose)
        normals = np.empty_like(vertices)
        raster.vertex_normals(vertices, basis.triangles, normals)
        self._depth.fill(raster.FAR)
        self._owner.fill(-1)
        self._strand.fill(-1)
        raster.draw_triangles(points, basis.triangles, self._depth, self._owner, self._weight1, self._weight2)
        thick = np.maximum(hair.radius * pose.zoom * self.width * 0.5, 0.5).astype(np.float32)
        raster.draw_strands(self._project(strands, identity, pose), thick, self._depth, self._strand, self._along)
        matrix = self._cast_shadow(vertices, lights.directions[0])
        facing = np.clip(hair.normals @ head.T @ body.T @ lights.directions[0], -0.2, 1) * 0.6 + 0.45
        look = body @ head @ rotation(pose.gaze[0], pose.gaze[1], 0) @ np.array([0, 0, 1], np.float32)
        centres = np.stack([vertices[eye].mean(axis=0) for eye in self._eyes])
        shade(
            self._owner, self._weight1, self._weight2, self._strand, self._along, basis.triangles, basis.materials,
            vertices, normals, basis.vertices, identity.albedo, identity.occlusion, basis.lips, strands,
            (hair.colour * facing[:, None]).astype(np.float32), lights.directions, lights.colours, lights.sky,
            lights.ground, self._shadow, matrix, centres, look, identity.eye, identity.iris, identity.noise,
            identity.cloth, identity.cloth_texture, identity.collar, identity.brow, identity.brow_rgb,
            identity.surface, self._out, self._alpha,
        )  # fmt: skip
        image = self._develop(lights, background)
        scale = self.size / self.width
        return Frame(image=image, screen=points[:, :2] * np.float32(scale), local=local)

    def coverage(self) -> Floats:
        """How much of each pixel of the last frame is the person, (size, size) in 0..1."""
        return np.asarray(cv2.resize(self._alpha, (self.size, self.size), interpolation=cv2.INTER_AREA), np.float32)

    def _develop(self, lights: Lights, background: Floats) -> npt.NDArray[np.uint8]:
        """Down-sample, put onto the background and apply exposure, a soft shoulder and gamma."""
        self._out *= self._alpha[..., None]
        np.clip(self._out, 0, 4, out=self._out)
        target = (self.size, self.size)
        colour = cv2.resize(self._out, target, interpolation=cv2.INTER_AREA)
        cover = cv2.resize(self._alpha, target, interpolation=cv2.INTER_AREA)[..., None]
        light = (colour + background * (1 - cover) * 0.8) * np.float32(lights.exposure)
        bright = 1 - np.exp(-1.35 * light)
        return np.asarray(np.power(bright, 1 / 2.2) * 255 + 0.5, np.uint8)
