"""Change a box of a decoded frame and leave every other sample of its planes as it was, bit for bit.

Converting a whole frame to RGB and back shifts every pixel by rounding and chroma filtering. Here only the box is
converted, with the stream's own matrix and range, and blended into a copy of the frame's YUV planes where alpha > 0.
Also the orientation of phone videos: they stay turned in the file, and only look upright to the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

# Formats whose planes are edited in place -> log2 of the chroma step (x, y).
_EIGHT_BIT = {
    "yuv420p": (1, 1),
    "yuvj420p": (1, 1),
    "nv12": (1, 1),
    "yuv422p": (1, 0),
    "yuvj422p": (1, 0),
    "yuv444p": (0, 0),
    "yuvj444p": (0, 0),
}
_DEEP = {
    f"yuv{name}p{bits}le": shift
    for name, shift in (("420", (1, 1)), ("422", (1, 0)), ("444", (0, 0)))
    for bits in (10, 12)
}
CHROMA_SHIFT = _EIGHT_BIT | _DEEP
# AVColorSpace -> (Kr, Kb); 2 (unspecified) is decided by the picture's size as players do.
LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}
HD_HEIGHT = 720


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How stored pixels become upright ones: first transpose, then mirror left-right, then top-bottom."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @classmethod
    def from_matrix(cls, matrix: tuple[int, ...] | None) -> Orientation:
        """From a display matrix (9 integers, row by row); angles between quarter turns go to the nearest one."""
        if matrix is None:
            return cls()
        a, b, _, c, d = matrix[:5]
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(mirror_x=a < 0, mirror_y=d < 0)
        return cls(transpose=True, mirror_x=c < 0, mirror_y=b < 0)

    def upright(self, stored: NDArray[np.generic]) -> NDArray[np.generic]:
        """Stored [H, W, ...] -> upright view."""
        image = stored.swapaxes(0, 1) if self.transpose else stored
        return image[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]

    def stored(self, upright: NDArray[np.generic]) -> NDArray[np.generic]:
        """The inverse of `upright`."""
        image = upright[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return image.swapaxes(0, 1) if self.transpose else image

    def stored_box(self, box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
        """An upright box (x0, y0, x1, y1) in an upright width x height picture -> the box in stored pixels."""
        x0, y0, x1, y1 = box
        if self.mirror_x:
            x0, x1 = width - x1, width - x0
        if self.mirror_y:
            y0, y1 = height - y1, height - y0
        return (y0, x0, y1, x1) if self.transpose else (x0, y0, x1, y1)


def bit_depth(pix_fmt: str) -> int:
    """Bits of a sample in one of the `CHROMA_SHIFT` formats."""
    return int(pix_fmt[-4:-2]) if pix_fmt in _DEEP else 8


def sample_bytes(pix_fmt: str) -> int:
    """Bytes of a sample in memory."""
    return 1 if bit_depth(pix_fmt) == 8 else 2


def is_full_range(frame: av.VideoFrame) -> bool:
    """Whether luma uses all codes (0..255 at 8 bits) instead of 16..235."""
    return frame.format.name.startswith("yuvj") or int(frame.color_range) == 2


def luma_space(frame: av.VideoFrame) -> int:
    """The AVColorSpace of a frame; an unspecified one is BT.709 for HD pictures and BT.601 below."""
    space = int(frame.colorspace)
    if space in LUMA_WEIGHTS:
        return space
    return 1 if min(frame.width, frame.height) >= HD_HEIGHT else 6


def to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] of a YUV frame by its own matrix and range, as stored (not turned upright)."""
    space = luma_space(frame)
    converted = frame.reformat(
        format="rgb24",
        src_colorspace=space,
        dst_colorspace=space,
        src_color_range=2 if is_full_range(frame) else 1,
        dst_color_range=2,
    )
    return np.asarray(converted.to_ndarray(), np.uint8)


def rgb_to_yuv(rgb: NDArray[np.generic], space: int, full_range: bool) -> NDArray[np.float32]:
    """RGB [H, W, 3] in 0..255 -> Y, Cb, Cr as 8-bit code values, float32 [H, W, 3], not rounded."""
    kr, kb = LUMA_WEIGHTS[space]
    kg = 1 - kr - kb
    luma_gain, chroma_gain, black = (1.0, 1.0, 0.0) if full_range else (219 / 255, 224 / 255, 16.0)
    cb = np.array([-kr, -kg, 1 - kb]) / (2 * (1 - kb)) * chroma_gain
    cr = np.array([1 - kr, -kg, -kb]) / (2 * (1 - kr)) * chroma_gain
    rows = np.stack([np.array([kr, kg, kb]) * luma_gain, cb, cr])
    affine = np.column_stack([rows, [black, 128, 128]]).astype(np.float32)
    return np.asarray(cv2.transform(rgb.astype(np.float32), affine), np.float32)


Plane = NDArray[np.uint8] | NDArray[np.uint16]


def plane_arrays(frame: av.VideoFrame) -> tuple[Plane, Plane, Plane]:
    """Writable views of Y [H, W], Cb and Cr [h, w] of a frame in one of the `CHROMA_SHIFT` formats.

    uint8, or uint16 with the sample in the low bits.
    """
    name = frame.format.name
    kind = np.dtype(np.uint8) if bit_depth(name) == 8 else np.dtype("<u2")

    def view(index: int, width: int) -> Plane:
        plane = frame.planes[index]
        rows: Any = np.frombuffer(memoryview(plane), kind).reshape(-1, plane.line_size // kind.itemsize)
        cut: Plane = rows[: plane.height, :width]
        return cut

    if name == "nv12":
        pairs = view(1, 2 * frame.planes[1].width)
        return view(0, frame.planes[0].width), pairs[:, 0::2], pairs[:, 1::2]
    y, cb, cr = (view(i, frame.planes[i].width) for i in range(3))
    return y, cb, cr


def copy_frame(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame with its own planes and the same timestamps and colour tags."""
    copy = av.VideoFrame(frame.width, frame.height, frame.format.name)
    for source, target in zip(plane_arrays(frame), plane_arrays(copy), strict=True):
        target[:] = source
    copy.pts, copy.time_base, copy.duration = frame.pts, frame.time_base, frame.duration
    copy.color_range, copy.colorspace = frame.color_range, frame.colorspace
    copy.color_primaries, copy.color_trc = frame.color_primaries, frame.color_trc
    return copy


def blend_box(
    frame: av.VideoFrame,
    rgb: NDArray[np.generic],
    reference: NDArray[np.uint8],
    alpha: NDArray[np.float32],
    origin: tuple[int, int],
) -> None:
    """Blend rgb [h, w, 3] into the frame's own planes at origin (x, y), stored orientation, in place.

    alpha [h, w] in 0..1; rgb in 0..255 at every bit depth. A luma sample changes where alpha > 0, a chroma sample
    where all of its pixels have alpha > 0, so no pixel with alpha 0 changes in any plane. `reference` [h, w, 3] is
    what the same box looks like in RGB now: the planes move by the difference, so the rounding of the conversion
    cancels and a patch equal to the reference changes nothing.
    """
    shift_x, shift_y = CHROMA_SHIFT[frame.format.name]
    step_x, step_y = 1 << shift_x, 1 << shift_y
    x0, y0 = origin
    height, width = alpha.shape
    # Pad to whole chroma cells; the padding has alpha 0 and stays what it is.
    left, top = x0 % step_x, y0 % step_y
    right, bottom = -(x0 + width) % step_x, -(y0 + height) % step_y
    if left or top or right or bottom:
        alpha = np.pad(alpha, ((top, bottom), (left, right)))
        rgb = np.pad(rgb, ((top, bottom), (left, right), (0, 0)), mode="edge")
        reference = np.pad(reference, ((top, bottom), (left, right), (0, 0)), mode="edge")
        x0, y0 = x0 - left, y0 - top
    space, full = luma_space(frame), is_full_range(frame)
    after, before = rgb_to_yuv(rgb, space, full), rgb_to_yuv(reference, space, full)
    # A clipped reference lost the colour that its samples hold: there the patch alone decides.
    faithful = reduce(np.logical_and, [(c > 0) & (c < 255) for c in (reference[..., i] for i in range(3))])
    luma, cb, cr = plane_arrays(frame)
    highest = (1 << bit_depth(frame.format.name)) - 1
    # Limited range keeps its codes and appends bits; full range stretches to the new highest code.
    gain = highest / 255 if full else (highest + 1) / 256
    _blend(luma, after[..., 0], before[..., 0], faithful, alpha, (x0, y0), gain, highest)

    def corners(values: NDArray[Any]) -> list[NDArray[Any]]:
        # The pixels of each chroma cell, one array per place in the cell (far faster than reducing tiny axes).
        return [values[dy::step_y, dx::step_x] for dy in range(step_y) for dx in range(step_x)]

    def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(reduce(np.add, corners(values)) / (step_x * step_y), np.float32)

    weight = np.where(reduce(np.minimum, corners(alpha)) > 0, mean(alpha), np.float32(0))
    faithful = reduce(np.logical_and, corners(faithful))
    for index, plane in ((1, cb), (2, cr)):
        new, old = mean(after[..., index]), mean(before[..., index])
        # Chroma's middle is half of all codes in both ranges.
        place = x0 >> shift_x, y0 >> shift_y
        _blend(plane, new, old, faithful, weight, place, gain, highest, middle=(highest + 1) / 2 - 128 * gain)


def _blend(
    plane: Plane,
    after: NDArray[np.float32],
    before: NDArray[np.float32],
    faithful: NDArray[np.bool_],
    alpha: NDArray[np.float32],
    place: tuple[int, int],
    gain: float,
    highest: int,
    middle: float = 0.0,
) -> None:
    """Move plane[y:, x:] by alpha of the way to `after`; samples with alpha 0 are not touched. All [h, w].

    after and before are 8-bit codes; a code c of the plane is c * gain + middle.
    """
    x, y = place
    part = plane[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    step = np.where(faithful, np.float32(gain) * (after - before), np.float32(gain) * after + np.float32(middle) - part)
    moved = part + alpha * step
    np.copyto(part, np.clip(np.rint(moved), 0, highest).astype(part.dtype), where=alpha > 0)
