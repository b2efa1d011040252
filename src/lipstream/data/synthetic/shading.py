"""Deferred shading kernel (numba): skin, eyes, teeth, mouth, cloth and hair in linear light.

Eyebrows and the clothes' edge are painted per pixel in the head's rest coordinates, because the mesh is too coarse
to carry them per vertex.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import njit

Rgb: TypeAlias = tuple[float, float, float]

_SKIN, _MOUTH, _EYE, _TEETH, _TONGUE, _CLOTH = 0, 1, 2, 3, 4, 5


@njit(cache=True, fastmath=True, inline="always")
def _texture(image: Any, u: float, v: float) -> float:
    """Bilinear look-up in a tiling square texture."""
    n = image.shape[0]
    u, v = (u % 1.0) * n, (v % 1.0) * n
    x, y = int(u), int(v)
    fx, fy = u - x, v - y
    x, y = x % n, y % n
    x2, y2 = (x + 1) % n, (y + 1) % n
    top = image[y, x] * (1 - fx) + image[y, x2] * fx
    return float(top * (1 - fy) + (image[y2, x] * (1 - fx) + image[y2, x2] * fx) * fy)


@njit(cache=True, fastmath=True)
def collar_height(x: float, z: float, collar: Any) -> float:
    """Height below which the body is clothed, dm; collar = (height, back rise, neckline depth, neckline width)."""
    back = min(1.0, max(-1.0, 0.4 - z))
    level = collar[0] + collar[1] * back
    if z > 0.3:
        level -= collar[2] * np.exp(-((x / collar[3]) ** 2))
    # Shoulders are covered whatever the neckline: bare patches there looked like holes.
    return float(level + 0.8 * min(1.0, max(0.0, (abs(x) - 0.55) / 0.35)))


@njit(cache=True, fastmath=True, inline="always")
def _eyebrow(x: float, y: float, brow: Any, noise: Any) -> float:
    """Cover 0..1 of the painted eyebrow; brow = (height, thickness, inner x, outer x, arch, density)."""
    side = abs(x)
    f = (side - brow[2]) / (brow[3] - brow[2])
    g = min(1.0, max(0.0, f))
    ridge = brow[0] + brow[4] * np.sin(2.6 * g) - 0.02 * g * g
    half = brow[1] * (1.0 - 0.65 * g)
    cover = np.exp(-(((y - ridge) / half) ** 2))
    if f < 0:
        cover *= np.exp(-((f / 0.10) ** 2))
    elif f > 1:
        cover *= np.exp(-(((f - 1) / 0.12) ** 2))
    strand = _texture(noise, side * 5.0 + y * 2.7 * (1 - f), y * 0.7)
    return float(cover * brow[5] * min(1.0, max(0.25, (strand - 0.2) * 2.2)))


@njit(cache=True, fastmath=True, inline="always")
def _skin(rgb: Rgb, x: float, y: float, z: float, noise: Any, grain: float, brow: Any, brow_rgb: Any) -> Rgb:
    """Skin colour at a rest position: two scales of mottling and the eyebrows."""
    angle = np.arctan2(x, z - 0.1) * 0.9
    fine = _texture(noise, angle * 1.3, y * 1.17) - 0.5
    coarse = _texture(noise, angle * 0.25 + 0.3, y * 0.22 + 0.1) - 0.5
    factor = 1 + grain * (fine + 0.5 * coarse)
    r, g, b = rgb[0] * factor, rgb[1] * factor * (1 + 0.2 * grain * coarse), rgb[2] * factor
    if z > 0.8 and 7.3 < y < 7.85 and abs(x) < 0.75:
        cover = _eyebrow(x, y, brow, noise)
        r = r * (1 - cover) + brow_rgb[0] * cover
        g = g * (1 - cover) + brow_rgb[1] * cover
        b = b * (1 - cover) + brow_rgb[2] * cover
    return r, g, b


@njit(cache=True, fastmath=True, inline="always")
def _eyeball(nx: float, ny: float, nz: float, axis: Any, eye: Any, iris: Any, noise: Any) -> Rgb:
    """Pupil, iris or sclera by the angle to the eye's axis; eye = (iris, pupil) radius in radians."""
    angle = np.arccos(min(1.0, max(-1.0, nx * axis[0] + ny * axis[1] + nz * axis[2])))
    if angle < eye[1]:
        return 0.01, 0.01, 0.01
    if angle < eye[0]:
        f = (angle - eye[1]) / (eye[0] - eye[1])
        spoke = 0.75 + 0.5 * _texture(noise, np.arctan2(ny - axis[1], nx - axis[0]) * 0.8, f * 0.15)
        if f > 0.8:
            spoke *= 1.0 - 3.5 * (f - 0.8)
        return iris[0] * spoke, iris[1] * spoke, iris[2] * spoke
    f = min(1.0, (angle - eye[0]) / 0.6)
    return 0.78 * (1 - 0.06 * f), 0.74 * (1 - 0.2 * f), 0.71 * (1 - 0.22 * f)


@njit(cache=True, fastmath=True)
def _shadow_light(x: float, y: float, z: float, shadow: Any, matrix: Any) -> float:
    """Share 0..1 of the key light that reaches a point: nine taps of the shadow map."""
    sx = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z + matrix[0, 3]
    sy = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z + matrix[1, 3]
    sz = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z + matrix[2, 3]
    seen, total = 0.0, 0.0
    for oy in range(-1, 2):
        for ox in range(-1, 2):
            ix, iy = int(sx + ox * 1.5), int(sy + oy * 1.5)
            if 0 <= ix < shadow.shape[0] and 0 <= iy < shadow.shape[0]:
                total += 1.0
                if shadow[iy, ix] >= sz - 0.05:
                    seen += 1.0
    return seen / total if total > 0 else 1.0


@njit(cache=True, fastmath=True)
def _hair(
    h: int, position: float, points: Any, colour: Any, light_dir: Any, light_rgb: Any, sky: Any, shine: float
) -> Rgb:
    """Strand colour after Kajiya and Kay (1989), darker near the root."""
    knots = points.shape[1]
    k = min(knots - 2, int(position))
    tx, ty = points[h, k + 1, 0] - points[h, k, 0], points[h, k + 1, 1] - points[h, k, 1]
    tz = points[h, k + 1, 2] - points[h, k, 2]
    size = np.sqrt(tx * tx + ty * ty + tz * tz) + 1e-9
    tx, ty, tz = tx / size, ty / size, tz / size
    r, g, b = colour[h, 0] * sky[0] * 0.8, colour[h, 1] * sky[1] * 0.8, colour[h, 2] * sky[2] * 0.8
    side_view = np.sqrt(max(0.0, 1 - tz * tz))
    for q in range(light_dir.shape[0]):
        dot = tx * light_dir[q, 0] + ty * light_dir[q, 1] + tz * light_dir[q, 2]
        side = np.sqrt(max(0.0, 1 - dot * dot))
        gleam = 0.25 * shine * max(0.0, side * side_view - dot * tz) ** 20
        r += light_rgb[q, 0] * (colour[h, 0] * side * 0.55 + gleam)
        g += light_rgb[q, 1] * (colour[h, 1] * side * 0.55 + gleam)
        b += light_rgb[q, 2] * (colour[h, 2] * side * 0.55 + gleam)
    root = 0.45 + 0.55 * min(1.0, 1.8 * position / (knots - 1))
    return r * root, g * root, b * root


@njit(cache=True, fastmath=True)
def _lit(
    rgb: Rgb, normal: Rgb, key: float, gloss: Rgb, ao: float, local: float,
    light_dir: Any, light_rgb: Any, sky: Any, ground: Any,
) -> Rgb:  # fmt: skip
    """Ambient, wrapped and specular light; `key` is the key light's share, gloss = (strength, hardness, wrap)."""
    nx, ny, nz = normal
    r, g, b = rgb
    specular, hardness, wrap = gloss
    up = 0.5 + 0.5 * ny
    red = (ground[0] + (sky[0] - ground[0]) * up) * r * ao
    green = (ground[1] + (sky[1] - ground[1]) * up) * g * ao
    blue = (ground[2] + (sky[2] - ground[2]) * up) * b * ao
    fresnel = 0.54 + 0.96 * (1 - max(0.0, nz)) ** 5
    for q in range(light_dir.shape[0]):
        dot = nx * light_dir[q, 0] + ny * light_dir[q, 1] + nz * light_dir[q, 2]
        lit = key if q == 0 else 1.0
        soft = lit if wrap < 0.15 else lit + 0.12 * (1 - lit)
        # Red light scatters furthest in skin, so its terminator is the softest.
        red += light_rgb[q, 0] * r * max(0.0, (dot + wrap) / (1 + wrap)) * soft * local
        green += light_rgb[q, 1] * g * max(0.0, (dot + 0.5 * wrap) / (1 + 0.5 * wrap)) * lit * local
        blue += light_rgb[q, 2] * b * max(0.0, (dot + 0.35 * wrap) / (1 + 0.35 * wrap)) * lit * local
        if specular > 0 and lit > 0:
            hx, hy, hz = light_dir[q, 0], light_dir[q, 1], light_dir[q, 2] + 1.0
            cosine = (nx * hx + ny * hy + nz * hz) / (np.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9)
            if cosine > 0.6:
                gleam = specular * cosine**hardness * lit * local * fresnel
                red += light_rgb[q, 0] * gleam
                green += light_rgb[q, 1] * gleam
                blue += light_rgb[q, 2] * gleam
    return red, green, blue


@njit(cache=True, fastmath=True, inline="always")
def _mix(values: Any, i: int, j: int, k: int, w1: float, w2: float, column: int) -> float:
    """Interpolate one column of a vertex attribute inside a triangle."""
    return float((1.0 - w1 - w2) * values[i, column] + w1 * values[j, column] + w2 * values[k, column])


@njit(cache=True, fastmath=True)
def shade(
    owner: Any, weight1: Any, weight2: Any, strand: Any, along: Any, triangles: Any, materials: Any, vertices: Any,
    normals: Any, rest: Any, albedo: Any, occlusion: Any, lips: Any, hair_points: Any, hair_colour: Any,
    light_dir: Any, light_rgb: Any, sky: Any, ground: Any, shadow: Any, shadow_matrix: Any,
    eye_centre: Any, eye_axis: Any, eye: Any, iris: Any, noise: Any, cloth: Any, cloth_texture: Any, collar: Any,
    brow: Any, brow_rgb: Any, surface: Any, out: Any, alpha: Any,
) -> None:  # fmt: skip
    """Fill `out` (H, W, 3) linear RGB and `alpha` (H, W). surface = (gloss, skin grain, hair shine)."""
    height, width = owner.shape
    for py in range(height):
        for px in range(width):
            t, h = owner[py, px], strand[py, px]
            if t < 0 and h < 0:
                alpha[py, px] = 0.0
                continue
            alpha[py, px] = 1.0
            if h >= 0:
                rgb = _hair(h, along[py, px], hair_points, hair_colour, light_dir, light_rgb, sky, surface[2])
                out[py, px, 0], out[py, px, 1], out[py, px, 2] = rgb
                continue
            i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            w1, w2 = weight1[py, px], weight2[py, px]
            nx, ny = _mix(normals, i, j, k, w1, w2, 0), _mix(normals, i, j, k, w1, w2, 1)
            nz = _mix(normals, i, j, k, w1, w2, 2)
            vx, vy = _mix(vertices, i, j, k, w1, w2, 0), _mix(vertices, i, j, k, w1, w2, 1)
            vz = _mix(vertices, i, j, k, w1, w2, 2)
            rx, ry = _mix(rest, i, j, k, w1, w2, 0), _mix(rest, i, j, k, w1, w2, 1)
            rz = _mix(rest, i, j, k, w1, w2, 2)
            rgb = (
                _mix(albedo, i, j, k, w1, w2, 0),
                _mix(albedo, i, j, k, w1, w2, 1),
                _mix(albedo, i, j, k, w1, w2, 2),
            )
            ao = (1.0 - w1 - w2) * occlusion[i] + w1 * occlusion[j] + w2 * occlusion[k]
            m = materials[t]
            gloss = (0.25, 30.0, 0.3)
            if m == _SKIN and ry < 6.6 and ry < collar_height(rx, rz, collar):
                m = _CLOTH
                weave = 0.6 + 0.8 * _texture(cloth_texture, rx * 0.35, ry * 0.35)
                rgb = (cloth[0] * weave, cloth[1] * weave, cloth[2] * weave)
                gloss, ao = (0.0, 30.0, 0.1), 1.0
            elif m == _SKIN:
                rgb = _skin(rgb, rx, ry, rz, noise, surface[1], brow, brow_rgb)
                lip = (1.0 - w1 - w2) * lips[i] + w1 * lips[j] + w2 * lips[k]
                gloss = (0.18 * surface[0] * (1 + 1.5 * lip), 18.0 + 30.0 * lip, 0.25)
            elif m == _EYE:
                e = 0 if rx > 0 else 1
                nx, ny, nz = vx - eye_centre[e, 0], vy - eye_centre[e, 1], vz - eye_centre[e, 2]
                size = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
                rgb = _eyeball(nx / size, ny / size, nz / size, eye_axis, eye, iris, noise)
                gloss = (0.9, 200.0, 0.2)
            elif m == _TEETH:
                gloss = (0.5, 60.0, 0.3)
            size = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
            if nz < 0 and m != _SKIN and m != _CLOTH:
                size = -size
            normal = (nx / size, ny / size, nz / size)
            facing = normal[0] * light_dir[0, 0] + normal[1] * light_dir[0, 1] + normal[2] * light_dir[0, 2]
            key = _shadow_light(vx, vy, vz, shadow, shadow_matrix) if facing > -gloss[2] else 1.0
            local = ao if m in (_MOUTH, _TEETH, _TONGUE) else 0.35 + 0.65 * ao
            rgb = _lit(rgb, normal, key, gloss, ao, local, light_dir, light_rgb, sky, ground)
            out[py, px, 0], out[py, px, 1], out[py, px, 2] = rgb
