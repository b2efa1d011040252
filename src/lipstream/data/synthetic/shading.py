"""Deferred shading kernel (numba): skin, eyes, teeth, mouth, cloth and hair in linear light.

Eyebrows and the clothes' edge are painted per pixel in the head's rest coordinates, because the mesh is too coarse
to carry them per vertex.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

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
    return (top * (1 - fy) + (image[y2, x] * (1 - fx) + image[y2, x2] * fx) * fy) * 1.0


@njit(cache=True, fastmath=True)
def collar_height(x: float, z: float, collar: Any) -> float:
    """Height below which the body is clothed, dm; collar = (height, back rise, neckline depth, neckline width)."""
    back = min(1.0, max(-1.0, 0.4 - z))
    level = collar[0] + collar[1] * back
    if z > 0.3:
        level -= collar[2] * np.exp(-((x / collar[3]) ** 2))
    # Shoulders are covered whatever the neckline: bare patches there looked like holes.
    return level + 0.8 * min(1.0, max(0.0, (abs(x) - 0.55) / 0.35))


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
    return cover * brow[5] * min(1.0, max(0.25, (strand - 0.2) * 2.2))


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
    lights = light_dir.shape[0]
    map_size = shadow.shape[0]
    for py in range(height):
        for px in range(width):
            t, h = owner[py, px], strand[py, px]
            if t < 0 and h < 0:
                alpha[py, px] = 0.0
                continue
            alpha[py, px] = 1.0
            if h >= 0:
                knots = hair_points.shape[1]
                k = min(knots - 2, int(along[py, px]))
                tx = hair_points[h, k + 1, 0] - hair_points[h, k, 0]
                ty = hair_points[h, k + 1, 1] - hair_points[h, k, 1]
                tz = hair_points[h, k + 1, 2] - hair_points[h, k, 2]
                size = np.sqrt(tx * tx + ty * ty + tz * tz) + 1e-9
                tx, ty, tz = tx / size, ty / size, tz / size
                root = 0.45 + 0.55 * min(1.0, 1.8 * along[py, px] / (knots - 1))
                for c in range(3):
                    out[py, px, c] = hair_colour[h, c] * sky[c] * 0.8
                side_view = np.sqrt(max(0.0, 1 - tz * tz))
                for q in range(lights):
                    dot = tx * light_dir[q, 0] + ty * light_dir[q, 1] + tz * light_dir[q, 2]
                    side = np.sqrt(max(0.0, 1 - dot * dot))
                    shine = 0.25 * surface[2] * max(0.0, side * side_view - dot * tz) ** 20
                    for c in range(3):
                        out[py, px, c] += light_rgb[q, c] * (hair_colour[h, c] * side * 0.55 + shine)
                for c in range(3):
                    out[py, px, c] *= root
                continue
            i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            w1, w2 = weight1[py, px], weight2[py, px]
            w0 = 1.0 - w1 - w2
            nx = w0 * normals[i, 0] + w1 * normals[j, 0] + w2 * normals[k, 0]
            ny = w0 * normals[i, 1] + w1 * normals[j, 1] + w2 * normals[k, 1]
            nz = w0 * normals[i, 2] + w1 * normals[j, 2] + w2 * normals[k, 2]
            vx = w0 * vertices[i, 0] + w1 * vertices[j, 0] + w2 * vertices[k, 0]
            vy = w0 * vertices[i, 1] + w1 * vertices[j, 1] + w2 * vertices[k, 1]
            vz = w0 * vertices[i, 2] + w1 * vertices[j, 2] + w2 * vertices[k, 2]
            rx = w0 * rest[i, 0] + w1 * rest[j, 0] + w2 * rest[k, 0]
            ry = w0 * rest[i, 1] + w1 * rest[j, 1] + w2 * rest[k, 1]
            rz = w0 * rest[i, 2] + w1 * rest[j, 2] + w2 * rest[k, 2]
            r = w0 * albedo[i, 0] + w1 * albedo[j, 0] + w2 * albedo[k, 0]
            g = w0 * albedo[i, 1] + w1 * albedo[j, 1] + w2 * albedo[k, 1]
            b = w0 * albedo[i, 2] + w1 * albedo[j, 2] + w2 * albedo[k, 2]
            ao = w0 * occlusion[i] + w1 * occlusion[j] + w2 * occlusion[k]
            m = materials[t]
            specular, hardness, wrap = 0.25, 30.0, 0.3
            if m == _SKIN and ry < 6.6 and ry < collar_height(rx, rz, collar):
                m = _CLOTH
                weave = 0.6 + 0.8 * _texture(cloth_texture, rx * 0.35, ry * 0.35)
                r, g, b = cloth[0] * weave, cloth[1] * weave, cloth[2] * weave
                specular, wrap, ao = 0.0, 0.1, 1.0
            elif m == _SKIN:
                angle = np.arctan2(rx, rz - 0.1) * 0.9
                fine = _texture(noise, angle * 1.3, ry * 1.17) - 0.5
                coarse = _texture(noise, angle * 0.25 + 0.3, ry * 0.22 + 0.1) - 0.5
                grain = 1 + surface[1] * (fine + 0.5 * coarse)
                r, g, b = r * grain, g * grain * (1 + 0.2 * surface[1] * coarse), b * grain
                if rz > 0.8 and 7.3 < ry < 7.85 and abs(rx) < 0.75:
                    cover = _eyebrow(rx, ry, brow, noise)
                    r = r * (1 - cover) + brow_rgb[0] * cover
                    g = g * (1 - cover) + brow_rgb[1] * cover
                    b = b * (1 - cover) + brow_rgb[2] * cover
                lip = w0 * lips[i] + w1 * lips[j] + w2 * lips[k]
                specular, hardness, wrap = 0.18 * surface[0] * (1 + 1.5 * lip), 18.0 + 30.0 * lip, 0.25
            elif m == _EYE:
                e = 0 if rx > 0 else 1
                dx, dy, dz = vx - eye_centre[e, 0], vy - eye_centre[e, 1], vz - eye_centre[e, 2]
                size = np.sqrt(dx * dx + dy * dy + dz * dz) + 1e-9
                nx, ny, nz = dx / size, dy / size, dz / size
                cosine = nx * eye_axis[0] + ny * eye_axis[1] + nz * eye_axis[2]
                angle = np.arccos(min(1.0, max(-1.0, cosine)))
                if angle < eye[1]:
                    r, g, b = 0.01, 0.01, 0.01
                elif angle < eye[0]:
                    f = (angle - eye[1]) / (eye[0] - eye[1])
                    spoke = 0.75 + 0.5 * _texture(noise, np.arctan2(ny - eye_axis[1], nx - eye_axis[0]) * 0.8, f * 0.15)
                    if f > 0.8:
                        spoke *= 1.0 - 3.5 * (f - 0.8)
                    r, g, b = iris[0] * spoke, iris[1] * spoke, iris[2] * spoke
                else:
                    f = min(1.0, (angle - eye[0]) / 0.6)
                    r, g, b = 0.78 * (1 - 0.06 * f), 0.74 * (1 - 0.2 * f), 0.71 * (1 - 0.22 * f)
                specular, hardness, wrap = 0.9, 200.0, 0.2
            elif m == _TEETH:
                specular, hardness = 0.5, 60.0
            size = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
            nx, ny, nz = nx / size, ny / size, nz / size
            if nz < 0 and m != _SKIN and m != _CLOTH:
                nx, ny, nz = -nx, -ny, -nz
            up = 0.5 + 0.5 * ny
            red = (ground[0] + (sky[0] - ground[0]) * up) * r * ao
            green = (ground[1] + (sky[1] - ground[1]) * up) * g * ao
            blue = (ground[2] + (sky[2] - ground[2]) * up) * b * ao
            inside = m in (_MOUTH, _TEETH, _TONGUE)
            local = ao if inside else 0.35 + 0.65 * ao
            fresnel = 0.54 + 0.96 * (1 - max(0.0, nz)) ** 5
            for q in range(lights):
                dot = nx * light_dir[q, 0] + ny * light_dir[q, 1] + nz * light_dir[q, 2]
                lit = 1.0
                if q == 0 and dot > -wrap:
                    sx = (
                        shadow_matrix[0, 0] * vx
                        + shadow_matrix[0, 1] * vy
                        + shadow_matrix[0, 2] * vz
                        + shadow_matrix[0, 3]
                    )
                    sy = (
                        shadow_matrix[1, 0] * vx
                        + shadow_matrix[1, 1] * vy
                        + shadow_matrix[1, 2] * vz
                        + shadow_matrix[1, 3]
                    )
                    sz = (
                        shadow_matrix[2, 0] * vx
                        + shadow_matrix[2, 1] * vy
                        + shadow_matrix[2, 2] * vz
                        + shadow_matrix[2, 3]
                    )
                    seen, total = 0.0, 0.0
                    for oy in range(-1, 2):
                        for ox in range(-1, 2):
                            ix, iy = int(sx + ox * 1.5), int(sy + oy * 1.5)
                            if 0 <= ix < map_size and 0 <= iy < map_size:
                                total += 1.0
                                if shadow[iy, ix] >= sz - 0.05:
                                    seen += 1.0
                    if total > 0:
                        lit = seen / total
                soft = lit if wrap < 0.15 else lit + 0.12 * (1 - lit)
                # Red light scatters furthest in skin, so its terminator is the softest.
                red += light_rgb[q, 0] * r * max(0.0, (dot + wrap) / (1 + wrap)) * soft * local
                green += light_rgb[q, 1] * g * max(0.0, (dot + 0.5 * wrap) / (1 + 0.5 * wrap)) * lit * local
                blue += light_rgb[q, 2] * b * max(0.0, (dot + 0.35 * wrap) / (1 + 0.35 * wrap)) * lit * local
                if specular > 0 and lit > 0:
                    hx, hy, hz = light_dir[q, 0], light_dir[q, 1], light_dir[q, 2] + 1.0
                    size = np.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9
                    cosine = (nx * hx + ny * hy + nz * hz) / size
                    if cosine > 0.6:
                        gleam = specular * cosine**hardness * lit * local * fresnel
                        red += light_rgb[q, 0] * gleam
                        green += light_rgb[q, 1] * gleam
                        blue += light_rgb[q, 2] * gleam
            out[py, px, 0], out[py, px, 1], out[py, px, 2] = red, green, blue
