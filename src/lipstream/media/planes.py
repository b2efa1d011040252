"""Change a box of a decoded frame and leave every other sample of its planes as it was, bit for bit.

Converting a whole frame to RGB and back shifts every pixel by rounding and chroma filtering. Here only the box is
converted, with the stream's own matrix and range, and blended into a copy of the frame's YUV planes where alpha > 0.
Also the orientation of phone videos: they stay turned in the file, and only look upright to the models.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

# 8-bit formats whose planes are edited in place -> log2 of the chroma step (x, y).
CHROMA_SHIFT = {
    "yuv420p": (1, 1),
    "yuvj420p": (1, 1),
    "nv12": (1, 1),
    "yuv422p": (1, 0),
    "yuvj422p": (1, 0),
    "yuv444p": (0, 0),
    "yuvj444p": (0, 0),
}
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


def is_full_range(frame: av.VideoFrame) -> bool:
    """Whether 8-bit luma uses 0..255 instead of 16..235."""
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
    matrix = np.stack([np.array([kr, kg, kb]) * luma_gain, cb, cr], axis=1).astype(np.float32)
    return np.asarray(rgb.astype(np.float32) @ matrix + np.array([black, 128, 128], np.float32), np.float32)


def plane_arrays(frame: av.VideoFrame) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Writable views of Y [H, W], Cb and Cr [h, w] of a frame in one of the `CHROMA_SHIFT` formats."""

    def view(index: int, width: int) -> NDArray[np.uint8]:
        plane = frame.planes[index]
        rows: NDArray[np.uint8] = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        return rows[: plane.height, :width]

    if frame.format.name == "nv12":
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
    frame: av.VideoFrame, rgb: NDArray[np.generic], alpha: NDArray[np.float32], origin: tuple[int, int]
) -> None:
    """Blend rgb [h, w, 3] into the frame's own planes at origin (x, y), stored orientation, in place.

    alpha [h, w] in 0..1. A luma sample changes where alpha > 0, a chroma sample where all of its pixels have
    alpha > 0, so no pixel with alpha 0 changes in any plane.
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
        x0, y0 = x0 - left, y0 - top
    yuv = rgb_to_yuv(rgb, luma_space(frame), is_full_range(frame))
    luma, cb, cr = plane_arrays(frame)
    _blend(luma, yuv[..., 0], alpha, x0, y0)
    cells = (alpha.shape[0] // step_y, step_y, alpha.shape[1] // step_x, step_x)
    covered = alpha.reshape(cells)
    weight = np.where(covered.min(axis=(1, 3)) > 0, covered.mean(axis=(1, 3)), 0).astype(np.float32)
    for plane, values in ((cb, yuv[..., 1]), (cr, yuv[..., 2])):
        _blend(plane, values.reshape(cells).mean(axis=(1, 3)), weight, x0 >> shift_x, y0 >> shift_y)


def _blend(plane: NDArray[np.uint8], values: NDArray[np.float32], alpha: NDArray[np.float32], x: int, y: int) -> None:
    """plane[y:, x:] <- (1 - alpha) plane + alpha values, rounded; samples with alpha 0 are not touched."""
    part = plane[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    # A padded cell may reach one sample beyond a picture of odd size.
    values, alpha = values[: part.shape[0], : part.shape[1]], alpha[: part.shape[0], : part.shape[1]]
    mixed = part + alpha * (values - part)
    np.copyto(part, np.clip(np.rint(mixed), 0, 255).astype(np.uint8), where=alpha > 0)
