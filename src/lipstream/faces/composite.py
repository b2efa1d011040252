"""Put a generated mouth back into its source frame: move the frame's own pixels, paint only what it never showed.

Where open lips are to meet, what lies between them becomes lips first.

Replaces the official paste-back (spec section 4.4), which resamples the whole crop. Here the *difference* between the
generated and the source shape field moves source pixels directly, once, at the frame's own resolution, and a gate says
where the painted texture (inside of the mouth, lip line) takes over. Both fade to exactly nothing at the rim of the
mouth mask, so there is no seam to hide and every pixel outside is the source's, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import CANVAS_PX, Alignment, FaceCanvas, Float

_SPLAT = 2  # canvas samples per canvas px and axis when the map is inverted
_MARGIN_PX = 6  # crop px kept around the mask when the map is inverted
_SQUEEZED = (2.2, 4.0)  # source px per px from which, and up to which, samples give way to averages
_SQUEEZED_SAMPLES = 12
_SQUEEZED_REACH = (5, 3)  # px, rows and columns
# A mouth that shuts from further open than this (crop px) would show its teeth as a line: its inside becomes lips ...
_SHUTS = (1.5, 4.0)
_SHUT = (1.8, 4.0)  # ... where less than this is left open (crop px).
_LIP_PX = 5.0  # from the edge of the lips, canvas px: there a lip has its own colour
_SEAM_SHADE = 0.3  # closed lips are darker where they meet
_PALE = 12.0  # levels above the colour of the lips from which on something is teeth


def _ramp(position: Float, start: float, end: float) -> Float:
    """Smooth 0 -> 1 between ``start`` and ``end``."""
    u = np.clip((position - start) / (end - start), 0.0, 1.0)
    return np.asarray(u * u * (3.0 - 2.0 * u), np.float32)


def canvas_mask() -> Float:
    """The feathered mouth mask on the canvas, [CANVAS_PX, CANVAS_PX] in 0..1; zero at the whole border.

    Full on lips and chin, gone before the sides of the jaw: their outline is the head's, not the mouth's.
    """
    x = np.arange(CANVAS_PX, dtype=np.float32) + 0.5
    sides = _ramp(x, 8, 44) * _ramp(CANVAS_PX - x, 8, 44)
    rows = _ramp(x, 26, 48) * _ramp(CANVAS_PX - x, 2, 26)
    return np.asarray(rows[:, None] * sides[None, :], np.float32)


@dataclass(frozen=True)
class Patch:
    """A rectangle of new pixels. ``alpha`` is 0 exactly where the source pixel must stay as it is.

    Attributes:
        box: (left, top, right, bottom) source px.
        rgb: [h, w, 3] uint8.
        alpha: [h, w] uint8, 0 or 255.
    """

    box: tuple[int, int, int, int]
    rgb: NDArray[np.uint8]
    alpha: NDArray[np.uint8]

    def on(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image [H, W, 3] with the patch in it, a copy."""
        left, top, right, bottom = self.box
        changed = image.copy()
        changed[top:bottom, left:right][self.alpha > 0] = self.rgb[self.alpha > 0]
        return changed


def joined(one: Patch, two: Patch, image: NDArray[np.uint8]) -> Patch:
    """One patch of an image [H, W, 3] that holds two.

    What neither changes has alpha 0, what both change is the second's.
    """
    left, top = (min(one.box[i], two.box[i]) for i in (0, 1))
    right, bottom = (max(one.box[i], two.box[i]) for i in (2, 3))
    rgb = image[top:bottom, left:right].copy()
    alpha = np.zeros(rgb.shape[:2], np.uint8)
    for patch in (one, two):
        x0, y0, x1, y1 = patch.box
        part = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        rgb[part] = np.where(patch.alpha[..., None] > 0, patch.rgb, rgb[part])
        alpha[part] = np.maximum(alpha[part], patch.alpha)
    return Patch((left, top, right, bottom), rgb, alpha)


def clipped_box(points: NDArray[Any], margin_px: int, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Even-aligned rectangle (left, top, right, bottom) around points [n, 2], source px, clipped to the picture.

    Args:
        size: (height, width) of the picture.

    Returns:
        None where less than 8 px are in the picture.
    """
    left, top = (int(v) for v in np.floor(points.min(0)) - margin_px)
    right, bottom = (int(v) for v in np.ceil(points.max(0)) + margin_px + 1)
    height, width = size
    left, top = max(0, left) & ~1, max(0, top) & ~1
    right, bottom = min(width, right + (right & 1)), min(height, bottom + (bottom & 1))
    if right - left < 8 or bottom - top < 8:
        return None
    return left, top, right, bottom


def resample(image: NDArray[np.uint8], x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.uint8]:
    """The picture [H, W, 3] at places x, y [h, w], and its average where many of its rows fall into one.

    A laughing mouth that has to shut presses a row of teeth into two or three lines. Single samples of it would be saw
    teeth that flicker from frame to frame.
    """
    sampled = np.asarray(cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE), np.uint8)
    if max(np.abs(np.diff(a, axis=0)).max() for a in (x, y)) < _SQUEEZED[0]:
        return sampled  # most frames: nothing is pressed
    along_x, along_y = (np.asarray(np.gradient(a, axis=0), np.float32) for a in (x, y))
    length = np.hypot(along_x, along_y)
    # A press is a leap of the map between two rows: its neighbours show what lies at its ends.
    pressed = cv2.dilate(length, np.ones(_SQUEEZED_REACH, np.uint8))
    share = _ramp(np.asarray(pressed, np.float32), *_SQUEEZED)
    rows, columns = np.flatnonzero(share.any(1)), np.flatnonzero(share.any(0))
    if not len(rows):
        return sampled
    longer = np.asarray(pressed / np.maximum(length, 0.1), np.float32)
    along_x, along_y = along_x * longer, along_y * longer
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    total = np.zeros((*share[part].shape, 3), np.float32)
    for k in range(_SQUEEZED_SAMPLES):
        step = (k + 0.5) / _SQUEEZED_SAMPLES - 0.5
        at_x, at_y = (np.asarray(a[part] + step * b[part], np.float32) for a, b in ((x, along_x), (y, along_y)))
        total += cv2.remap(image, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    own, weight = sampled[part].astype(np.float32), share[part][..., None]
    sampled[part] = np.clip(own + weight * (total / _SQUEEZED_SAMPLES - own) + 0.5, 0, 255).astype(np.uint8)
    return sampled


def _pixels(box: tuple[int, int, int, int]) -> tuple[Float, Float]:
    """x and y of every pixel of a box (left, top, right, bottom), [h, w] each."""
    x, y = np.meshgrid(np.arange(box[0], box[2], dtype=np.float32), np.arange(box[1], box[3], dtype=np.float32))
    return x, y


def _row(values: Float, rows: Float) -> Float:
    """Of each column of values [n, n] the one at that (fractional) row: [n]."""
    columns = np.arange(len(rows), dtype=np.float32)
    found = cv2.remap(np.ascontiguousarray(values), columns[None], rows[None], cv2.INTER_LINEAR)
    return np.asarray(found[0], np.float32)


class Compositor:
    """Renders :class:`Patch` objects from shape fields and a painted canvas."""

    def __init__(self, canvas: FaceCanvas) -> None:
        self.canvas = canvas
        self._mask = canvas_mask()
        # Every fourth pixel is enough to bound the mask, grown by that step (on a large face many source px).
        self._support = np.zeros((CANVAS_PX, CANVAS_PX), np.bool_)
        self._support[::4, ::4] = cv2.dilate(self._mask, np.ones((9, 9), np.uint8))[::4, ::4] > 0.004
        fine = CANVAS_PX * _SPLAT
        xy = (np.arange(fine, dtype=np.float32) + 0.5) / _SPLAT - 0.5
        self._splat_x, self._splat_y = (a.ravel().astype(np.float64) for a in np.meshgrid(xy, xy))  # as bincount wants
        self._edges = canvas.inner_lips()

    def __call__(
        self,
        frame: NDArray[np.uint8],
        alignment: Alignment,
        source_field: Float,
        target_field: Float,
        paint: NDArray[np.uint8],
        gate: Float,
        covered: Float | None = None,
    ) -> Patch | None:
        """Render one frame's new mouth.

        Args:
            frame: [H, W, 3] uint8 source frame.
            alignment: the source face's similarity.
            source_field, target_field: [FIELD, FIELD, 2] shape fields of this frame and of the mouth that it gets. (A
                target through the codec is off by 0.1 crop px on average, which nobody sees.)
            paint: [CANVAS_PX, CANVAS_PX, 3] uint8 painted texture on the canvas.
            gate: [CANVAS_PX, CANVAS_PX] in 0..1, how much of the paint shows.
            covered: [CANVAS_PX, CANVAS_PX] in 0..1, where something stands before the face and has to stay in front.

        Returns:
            The patch, or None where the mouth lies outside the picture.
        """
        source_map = self.canvas.rest_map + self.canvas.dense(source_field)
        mask = self._mask if covered is None else self._mask * (1 - covered)
        motion = mask[..., None] * self.canvas.dense(target_field - source_field)
        target_map = source_map + motion
        box = self._box(target_map, alignment, frame.shape[:2])
        if box is None:
            return None
        on_canvas = self._on_canvas(target_map, alignment, box)
        px, py = _pixels(box)
        layers = np.concatenate([motion, (mask * gate)[..., None], mask[..., None]], -1)
        layers = cv2.remap(
            layers, on_canvas[..., 0], on_canvas[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
        )
        layers *= (on_canvas[..., 2:] > 0.999).astype(np.float32)  # half-valid map cells lie beyond the mask
        back = alignment.inverse.astype(np.float32)
        from_x = px - (back[0, 0] * layers[..., 0] + back[0, 1] * layers[..., 1])
        from_y = py - (back[1, 0] * layers[..., 0] + back[1, 1] * layers[..., 1])
        moved = resample(self._sealed(frame, alignment, source_map, target_map), from_x, from_y)
        painted = resample(paint, on_canvas[..., 0], on_canvas[..., 1])
        weight = layers[..., 2:3]
        blended = moved + weight * (painted.astype(np.float32) - moved)
        alpha = np.where(layers[..., 3] > 0.004, np.uint8(255), np.uint8(0))
        x0, y0, x1, y1 = box
        rgb = np.where(alpha[..., None] > 0, np.clip(blended + 0.5, 0, 255), frame[y0:y1, x0:x1])
        return Patch(box, rgb.astype(np.uint8), alpha)

    def _sealed(
        self, frame: NDArray[np.uint8], alignment: Alignment, source_map: Float, target_map: Float
    ) -> NDArray[np.uint8]:
        """The frame, with the inside of its mouth painted as lips where these meet in the target.

        However an open mouth is pressed shut, its teeth would stay between the lips as a bright line. What is darker
        than the lips stays.
        """
        upper, lower = self._edges
        columns = np.arange(CANVAS_PX, dtype=np.float32)
        ends = [_row(m[..., 1], edge) for m in (source_map, target_map) for edge in (upper, lower)]
        open_before, open_after = ends[1] - ends[0], ends[3] - ends[2]
        need = _ramp(open_before - open_after, *_SHUTS) * (1 - _ramp(open_after, *_SHUT)) * (lower > upper)
        if float(need.max()) < 0.02:
            return frame
        # Neighbouring columns shut together, or the rest of the teeth would stand there like pickets.
        spread = cv2.GaussianBlur(cv2.dilate(need.reshape(1, -1), np.ones((1, 5), np.uint8)), (9, 1), 2.0)
        need = np.asarray(spread[0], np.float32)
        back = alignment.inverse.astype(np.float32)
        colours = []
        for edge in (upper - _LIP_PX, lower + _LIP_PX):
            x, y = (_row(source_map[..., i], edge) for i in (0, 1))
            lip_x, lip_y = (back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in (0, 1))
            lips = cv2.remap(frame, lip_x[None], lip_y[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            # Widely averaged: where teeth stand out beyond the edge of a lip, its neighbours have the colour.
            colours.append(cv2.blur(lips.astype(np.float32), (31, 1))[0])
        rows = columns[:, None]
        u = np.clip((rows - upper) / np.maximum(lower - upper, 1), 0, 1)[..., None]
        shade = 1 - _SEAM_SHADE * np.sin(np.pi * u) ** 2
        paint = (colours[0] + u * (colours[1] - colours[0])) * shade
        weight = need * _ramp(rows - upper, -_LIP_PX, 0) * _ramp(lower - rows, -_LIP_PX, 0)
        inside = source_map[int(upper.min()) - 8 : int(lower.max()) + 9, 30:130].reshape(-1, 2)
        box = clipped_box(inside @ back[:, :2].T + back[:, 2], 2, (frame.shape[0], frame.shape[1]))
        if box is None:
            return frame
        on_canvas = self._on_canvas(source_map, alignment, box)
        layers: Float = np.concatenate([paint, weight[..., None]], -1).astype(np.float32)
        at_x, at_y = on_canvas[..., 0], on_canvas[..., 1]
        layers = np.asarray(cv2.remap(layers, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT), np.float32)
        sealed = frame.copy()
        part = sealed[box[1] : box[3], box[0] : box[2]]
        # Only what is paler than the lips: the dark line between closed lips belongs there.
        pale = _ramp(part.mean(-1, dtype=np.float32) - layers[..., :3].mean(-1), 0, _PALE)[..., None]
        part[:] = part + pale * layers[..., 3:] * (layers[..., :3] - part) + 0.5
        return sealed

    def _on_canvas(self, target_map: Float, alignment: Alignment, box: tuple[int, int, int, int]) -> Float:
        """Where each source px of a box lies on the canvas: [h, w, 3] as (x, y, 1), (.., .., < 1) beyond it."""
        inverse, origin = self._invert(target_map)
        px, py = _pixels(box)
        m = alignment.matrix.astype(np.float32)
        crop_x = m[0, 0] * px + m[0, 1] * py + (m[0, 2] - origin[0])
        crop_y = m[1, 0] * px + m[1, 1] * py + (m[1, 2] - origin[1])
        found = cv2.remap(
            inverse, crop_x, crop_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(-1, -1, 0)
        )
        return np.asarray(found, np.float32)

    def _box(self, target_map: Float, alignment: Alignment, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Even-aligned source rectangle that holds the mask, clipped to the picture."""
        inside = target_map[self._support]
        back = alignment.inverse
        source = inside @ back[:, :2].T + back[:, 2]
        return clipped_box(source, 2, size)

    def _invert(self, target_map: Float) -> tuple[Float, tuple[int, int]]:
        """Crop px -> canvas px by averaging the canvas points that land on each crop px.

        Averaging, not solving: a closed mouth presses the canvas' wide-open inside into a line, where no inverse
        exists, and the mean of all that lands there (the middle of the inside) is the colour a lip line should have.
        """
        size = CANVAS_PX * _SPLAT
        fine = cv2.resize(target_map, (size, size), interpolation=cv2.INTER_LINEAR)
        x, y = (np.ascontiguousarray(fine[..., i]).ravel() for i in range(2))  # reductions over axis 0 are slow
        left, top = int(x.min()) - _MARGIN_PX, int(y.min()) - _MARGIN_PX
        width, height = int(x.max()) + _MARGIN_PX + 2 - left, int(y.max()) + _MARGIN_PX + 2 - top
        cell = (y - (top - 0.5)).astype(np.int64) * width + (x - (left - 0.5)).astype(np.int64)
        count = np.bincount(cell, minlength=width * height).astype(np.float32)
        sum_x = np.bincount(cell, self._splat_x, width * height).astype(np.float32)
        sum_y = np.bincount(cell, self._splat_y, width * height).astype(np.float32)
        total = np.stack([sum_x, sum_y, count], -1).reshape(height, width, 3)
        spread = cv2.GaussianBlur(total, (5, 5), 0.7)  # joins samples over holes where the mouth is stretched
        inverse = spread / np.maximum(spread[..., 2:], 1e-3)
        inverse[..., 2] = spread[..., 2] > 1e-3
        return inverse.astype(np.float32, copy=False), (left, top)
