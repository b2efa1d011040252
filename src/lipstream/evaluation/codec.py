"""The codec gate: is decode(encode(x)) a better mouth than a small picture with as many numbers?

On the canvas (what the codec works on): a target group of four frames is encoded and painted with the *source* group
of another time of the same clip, so the mouth cannot be copied. Competitors are bicubic thumbnails of the target with
as many and with twice as many numbers per frame as the whole latent, the painter with its gate wide open, the linear
code without the painter, and the source itself. All are compared inside the box of the lips, every canvas pixel
counting the same. Where the painter keeps the source's skin, the light and grain of another time count against it, so
the figure is a lower bound.

On pictures: the source frame is rendered with the target's shape and paint by the compositor and compared with the
target frame in the mouth box of the aligned crop, so that what remains of head motion counts against the codec;
thumbnails are of the crop's canvas area, with the same numbers.

    lipstream evaluate codec SAMPLES... [--videos VIDEO...]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from lipstream.evaluation.pictures import Image, Quality, quality, thumbnail
from lipstream.evaluation.sharpness import mouth_box
from lipstream.faces.canvas import CANVAS_PX, Alignment, FaceCanvas, Float
from lipstream.faces.composite import Compositor
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """A method's mean quality over `groups` groups and its numbers per frame."""

    method: str
    numbers_per_frame: int
    groups: int
    quality: Quality


def numbers_per_frame(codec: PocketCodec) -> int:
    """Numbers of the whole latent (shape and texture, every cell) per pixel frame."""
    config = codec.config
    return config.grid**2 * config.latent_channels // FRAMES_PER_LATENT


def _uint8(picture: torch.Tensor) -> Image:
    """[N, 3, h, w] in 0..1 -> [N, h, w, 3] uint8."""
    scaled = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.asarray(rearrange(scaled, "n c h w -> n h w c").contiguous().numpy(), np.uint8)


class Painted:
    """One target group through the codec, with a source group of another time."""

    @torch.inference_mode()
    def __init__(self, codec: PocketCodec, target: GroupOfFrames, before: GroupOfFrames, source: GroupOfFrames) -> None:
        latents = [codec.encode_groups(*group.tensors()) for group in (target, before, source)]
        top, bottom, left, right = codec.config.paint_box_px
        known = source.tensors()[1][..., top:bottom, left:right]
        dtype = next(codec.painter.parameters()).dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            paint, gate = codec.paint(latents[0], latents[1], latents[2], known)
        paint = paint.float().clamp(0, 1)  # as PocketCodec.decode hands it to the compositor
        out = known + gate[:, :, None] * (paint - known)
        self.out = _uint8(out[0])  # [4, h, w, 3] the paint box as the compositor will show it
        self.linear = _uint8(codec.decode_texture(latents[0])[0])
        self.paint, self.gate = _uint8(paint[0]), gate[0].float().numpy()
        self.target_fields = codec.decode_fields(latents[0])[0].numpy()
        self.source_fields = codec.decode_fields(latents[2])[0].numpy()


@dataclass(frozen=True)
class GroupOfFrames:
    """Four frames as the codec sees them: fields [4, 20, 20, 2] (crop px) and textures [4, 160, 160, 3] uint8."""

    fields: Float
    textures: Image

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fields [1, 4, 20, 20, 2] float32 and textures [1, 4, 3, 160, 160] in 0..1."""
        textures = torch.from_numpy(np.array(self.textures)).permute(0, 3, 1, 2).float() / 255
        return torch.from_numpy(self.fields.astype(np.float32))[None], textures[None]


def group_starts(tracked: NDArray[np.bool_], groups: int) -> list[tuple[int, int]]:
    """(target, source) starts of evenly spread groups whose four frames (and the four before) all show the face.

    The source lies half the clip away from its target, round the end if need be.
    """
    size = FRAMES_PER_LATENT
    good = [s for s in range(size, len(tracked) - size + 1) if tracked[s - size : s + size].all()]
    if len(good) < 2:
        return []
    targets = [good[int(i)] for i in np.linspace(0, len(good) - 1, min(groups, len(good)))]
    places = {start: place for place, start in enumerate(good)}
    return [(t, good[(places[t] + len(good) // 2) % len(good)]) for t in targets]


def _at(fields: NDArray[Any], textures: NDArray[Any], start: int) -> GroupOfFrames:
    span = slice(start, start + FRAMES_PER_LATENT)
    return GroupOfFrames(np.asarray(fields[span], np.float32), np.asarray(textures[span], np.uint8))


# (top, bottom, left, right) canvas px: the outer lips of canvas.npz and 3 px around them.
MOUTH_BOX_PX = (40, 104, 32, 128)

Tally = dict[str, list[Quality]]


def score_canvas(
    codec: PocketCodec, fields: NDArray[Any], textures: NDArray[Any], tracked: NDArray[np.bool_], groups: int = 6
) -> Tally:
    """Qualities of every method in the box of the lips, a row per frame.

    Args:
        fields: [F, 20, 20, 2] crop px; textures: [F, 160, 160, 3] uint8; tracked: [F]: a sample of training.samples.
        groups: target groups taken from the clip.
    """
    tally: Tally = defaultdict(list)
    numbers = numbers_per_frame(codec)
    top, bottom, left, right = MOUTH_BOX_PX
    box_top, _, box_left, _ = codec.config.paint_box_px
    inside = np.s_[top - box_top : bottom - box_top, left - box_left : right - box_left]
    for target_at, source_at in group_starts(tracked, groups):
        target, source = _at(fields, textures, target_at), _at(fields, textures, source_at)
        painted = Painted(codec, target, _at(fields, textures, target_at - FRAMES_PER_LATENT), source)
        for i in range(FRAMES_PER_LATENT):
            whole = target.textures[i]
            true = np.ascontiguousarray(whole[top:bottom, left:right])
            for name, picture in (
                ("codec", painted.out[i][inside]),
                ("paint alone", painted.paint[i][inside]),
                ("linear", painted.linear[i][inside]),
                ("thumbnail x1", thumbnail(whole, numbers)[top:bottom, left:right]),
                ("thumbnail x2", thumbnail(whole, 2 * numbers)[top:bottom, left:right]),
                ("source", source.textures[i][top:bottom, left:right]),
            ):
                tally[name].append(quality(np.ascontiguousarray(picture), true))
    return tally


# ------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class SeenFrame:
    """A frame of a video with its face: picture [H, W, 3], similarity, shape field and landmarks [468, 2]."""

    image: Image
    alignment: Alignment
    field: Float
    texture: Image
    landmarks: Float


def see_video(video: Path, canvas: FaceCanvas, limit: int = 100) -> list[SeenFrame | None]:
    """The first `limit` frames with their faces, None where there is none."""
    tracker, seen = FaceTracker(), list[SeenFrame | None]()
    for frame in VideoReader(video):
        face = tracker.step(frame.image)
        if face is None:
            seen.append(None)
        else:
            alignment = canvas.align(face.landmarks)
            field = canvas.field(face.landmarks, alignment)
            texture = canvas.texture(frame.image, field, alignment)
            seen.append(SeenFrame(frame.image, alignment, field, texture, face.landmarks[:, :2]))
        if len(seen) >= limit:
            break
    return seen


class CropView:
    """Pictures in crop px over the area that the canvas covers: where source and target heads lie alike."""

    def __init__(self, canvas: FaceCanvas) -> None:
        flat = canvas.rest_map.reshape(-1, 2)
        self.low = np.floor(flat.min(0)).astype(int)
        self.size = tuple(int(v) for v in np.ceil(flat.max(0)).astype(int) - self.low)

    def picture(self, image: Image, alignment: Alignment) -> Image:
        """[h, w, 3] crop of a frame [H, W, 3]."""
        matrix = alignment.matrix.copy()
        matrix[:, 2] -= self.low
        shrinks = cv2.INTER_AREA if alignment.scale < 1 else cv2.INTER_CUBIC
        warped = cv2.warpAffine(image, matrix, self.size, flags=shrinks, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(warped, np.uint8)

    def mouth(self, seen: SeenFrame) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a face's mouth in :meth:`picture`."""
        matrix = seen.alignment.matrix
        crop = seen.landmarks.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2] - self.low
        return mouth_box(crop, (self.size[1], self.size[0]))


def score_pictures(codec: PocketCodec, seen: Sequence[SeenFrame | None], canvas: FaceCanvas, groups: int = 4) -> Tally:
    """Qualities in the mouth box of the aligned crop: the source frame with the target's mouth against the target."""
    tally: Tally = defaultdict(list)
    compositor, view, numbers = Compositor(canvas), CropView(canvas), numbers_per_frame(codec)
    top, bottom, left, right = codec.config.paint_box_px
    tracked = np.array([face is not None for face in seen], np.bool_)
    for target_at, source_at in group_starts(tracked, groups):
        packs = []
        for start in (target_at, target_at - FRAMES_PER_LATENT, source_at):
            faces = [face for face in seen[start : start + FRAMES_PER_LATENT] if face is not None]
            packs.append(GroupOfFrames(np.stack([f.field for f in faces]), np.stack([f.texture for f in faces])))
        painted = Painted(codec, *packs)
        for i in range(FRAMES_PER_LATENT):
            target, source = seen[target_at + i], seen[source_at + i]
            assert target is not None and source is not None  # group_starts made sure
            paint, gate = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8), np.zeros((CANVAS_PX, CANVAS_PX), np.float32)
            paint[top:bottom, left:right], gate[top:bottom, left:right] = painted.paint[i], painted.gate[i]
            fields = painted.source_fields[i], painted.target_fields[i]
            patch = compositor(source.image, source.alignment, fields[0], fields[1], paint, gate)
            rendered = source.image.copy()
            if patch is not None:
                x0, y0, x1, y1 = patch.box
                rendered[y0:y1, x0:x1] = patch.rgb
            true = view.picture(target.image, target.alignment)
            x0, y0, x1, y1 = view.mouth(target)
            if x1 - x0 < 12 or y1 - y0 < 12:
                continue
            for name, picture in (
                ("codec", view.picture(rendered, source.alignment)),
                ("thumbnail x1", thumbnail(true, numbers)),
                ("thumbnail x2", thumbnail(true, 2 * numbers)),
                ("source", view.picture(source.image, source.alignment)),
            ):
                cut, wanted = (np.ascontiguousarray(q[y0:y1, x0:x1]) for q in (picture, true))
                tally[name].append(quality(cut, wanted))
    return tally


# -------------------------------------------------------------------- report


def merge(tallies: Iterable[Tally]) -> Tally:
    """All rows of several clips together."""
    whole: Tally = defaultdict(list)
    for tally in tallies:
        for name, rows in tally.items():
            whole[name].extend(rows)
    return whole


def gate_rows(tally: Tally, codec: PocketCodec) -> list[GateRow]:
    """Means per method: PSNR and SSIM as means, sharpness as the median (a few flat patches have huge ratios)."""
    numbers = numbers_per_frame(codec)
    counts = {"thumbnail x2": 2 * numbers, "source": 0}
    rows = []
    for name, found in tally.items():
        finite = [row.psnr for row in found if math.isfinite(row.psnr)]
        mean = Quality(
            psnr=float(np.mean(finite)) if finite else math.inf,
            ssim=float(np.mean([row.ssim for row in found])),
            sharpness=float(np.median([row.sharpness for row in found])),
        )
        groups = len(found) // FRAMES_PER_LATENT
        rows.append(GateRow(method=name, numbers_per_frame=counts.get(name, numbers), groups=groups, quality=mean))
    return rows


def gate_passed(rows: Sequence[GateRow], sharpness: float = 0.5) -> bool:
    """Whether the codec beats the thumbnail of twice its numbers in PSNR and SSIM and keeps that much sharpness."""
    found = {row.method: row.quality for row in rows}
    ours, small = found["codec"], found["thumbnail x2"]
    return ours.psnr > small.psnr and ours.ssim > small.ssim and ours.sharpness >= sharpness


def gate_markdown(rows: Sequence[GateRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| method | numbers/frame | groups | PSNR dB | SSIM | sharpness |", "|" + " --- |" * 6]
    for row in rows:
        q = row.quality
        figures = f"{q.psnr:.2f} | {q.ssim:.3f} | {q.sharpness:.2f}"
        lines.append(f"| {row.method} | {row.numbers_per_frame} | {row.groups} | {figures} |")
    return "\n".join(lines)
