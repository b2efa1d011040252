"""Software rasteriser kernels (numba): triangles, hair strands and vertex normals.

All kernels are single-threaded and write into buffers of the caller. Screen points are (x px, y px, depth dm away).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FAR = np.float32(1e9)


@njit(cache=True, fastmath=True)
def draw_triangles(points: Any, triangles: Any, depth: Any, owner: Any, weight1: Any, weight2: Any) -> None:
    """Depth-tested fill: triangle number and the barycentric weights of its 2nd and 3rd corner per pixel."""
    height, width = depth.shape
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ax, ay, bx, by, cx, cy = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-9:
            continue
        y0 = max(0, int(np.ceil(min(ay, by, cy) - 0.5)))
        y1 = min(height - 1, int(np.floor(max(ay, by, cy) - 0.5)))
        x0 = max(0, int(np.ceil(min(ax, bx, cx) - 0.5)))
        x1 = min(width - 1, int(np.floor(max(ax, bx, cx) - 0.5)))
        if y1 < y0 or x1 < x0:
            continue
        inverse = 1.0 / area
        az, bz, cz = points[a, 2], points[b, 2], points[c, 2]
        for y in range(y0, y1 + 1):
            qy = y + 0.5 - ay
            for x in range(x0, x1 + 1):
                qx = x + 0.5 - ax
                w1 = (qx * (cy - ay) - qy * (cx - ax)) * inverse
                w2 = ((bx - ax) * qy - (by - ay) * qx) * inverse
                if w1 < 0.0 or w2 < 0.0 or w1 + w2 > 1.0:
                    continue
                z = az + w1 * (bz - az) + w2 * (cz - az)
                if z < depth[y, x]:
                    depth[y, x] = z
                    owner[y, x] = t
                    weight1[y, x] = w1
                    weight2[y, x] = w2


@njit(cache=True, fastmath=True)
def draw_depth(points: Any, triangles: Any, depth: Any) -> None:
    """Depth only, for the shadow map."""
    height, width = depth.shape
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ax, ay, bx, by, cx, cy = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-9:
            continue
        inverse = 1.0 / area
        for y in range(max(0, int(min(ay, by, cy))), min(height - 1, int(max(ay, by, cy))) + 1):
            for x in range(max(0, int(min(ax, bx, cx))), min(width - 1, int(max(ax, bx, cx))) + 1):
                qx, qy = x + 0.5 - ax, y + 0.5 - ay
                w1 = (qx * (cy - ay) - qy * (cx - ax)) * inverse
                w2 = ((bx - ax) * qy - (by - ay) * qx) * inverse
                if w1 < 0.0 or w2 < 0.0 or w1 + w2 > 1.0:
                    continue
                z = points[a, 2] + w1 * (points[b, 2] - points[a, 2]) + w2 * (points[c, 2] - points[a, 2])
                if z < depth[y, x]:
                    depth[y, x] = z


@njit(cache=True, fastmath=True)
def draw_strands(points: Any, radius: Any, depth: Any, owner: Any, along: Any) -> None:
    """Hair: points (S, K, 3) as tapering capsules; `owner` gets the strand, `along` its segment position 0..K-1."""
    height, width = depth.shape
    strands, knots, _ = points.shape
    for s in range(strands):
        for k in range(knots - 1):
            ax, ay, az = points[s, k, 0], points[s, k, 1], points[s, k, 2]
            bx, by, bz = points[s, k + 1, 0], points[s, k + 1, 1], points[s, k + 1, 2]
            r = radius[s] * (1.0 - 0.5 * k / (knots - 1))
            ux, uy = bx - ax, by - ay
            length2 = ux * ux + uy * uy
            if length2 < 1e-8:
                continue
            inverse = 1.0 / length2
            nearest = min(az, bz)
            left, right = min(ax, bx) - r, max(ax, bx) + r
            # Rows of a steep segment touch a narrow band only: its half width and centre per row.
            steep = abs(uy) > 0.5
            slope = ux / uy if steep else 0.0
            band = r * np.sqrt(length2) / abs(uy) if steep else 0.0
            for y in range(max(0, int(min(ay, by) - r)), min(height - 1, int(max(ay, by) + r)) + 1):
                x0, x1 = left, right
                if steep:
                    centre = ax + (y + 0.5 - ay) * slope
                    x0, x1 = max(x0, centre - band - 1.0), min(x1, centre + band + 1.0)
                for x in range(max(0, int(x0)), min(width - 1, int(x1)) + 1):
                    if nearest >= depth[y, x]:
                        continue
                    qx, qy = x + 0.5 - ax, y + 0.5 - ay
                    u = min(1.0, max(0.0, (qx * ux + qy * uy) * inverse))
                    ex, ey = qx - u * ux, qy - u * uy
                    if ex * ex + ey * ey > r * r:
                        continue
                    z = az + u * (bz - az)
                    if z < depth[y, x]:
                        depth[y, x] = z
                        owner[y, x] = s
                        along[y, x] = k + u


@njit(cache=True, fastmath=True)
def vertex_normals(vertices: Any, triangles: Any, normals: Any) -> None:
    """Area-weighted unit normals of a mesh, written into `normals` (V, 3)."""
    normals[:] = 0.0
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        wx, wy, wz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = uy * wz - uz * wy, uz * wx - ux * wz, ux * wy - uy * wx
        for corner in (a, b, c):
            normals[corner, 0] += nx
            normals[corner, 1] += ny
            normals[corner, 2] += nz
    for i in range(vertices.shape[0]):
        size = np.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        normals[i, 0] /= size
        normals[i, 1] /= size
        normals[i, 2] /= size
