"""The reversed protocol without pictures: a face's own speech onto its reversed canvases, lips read off the shape.

`lipstream.evaluation.reversed` scores videos: it renders, encodes and tracks again. Here a take's shapes are measured
as they leave the network, with its guidance, history and limits: a fraction of the work, enough to compare two networks
on the same face.

>>> before, after = (rehearse(model, takes) for model in (general, personal))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.evaluation.correlation import compare, correlation
from lipstream.evaluation.opening import Series
from lipstream.mouth import CanvasFrame, MouthModel, Take

BLOCK_FRAMES = 12  # half a second: mouths an opening apart know nothing of each other


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """How the lips of one or several takes follow their speech.

    Attributes:
        r: correlation of the lip gap with the truth, mean over takes by length.
        amplitude: its size against the truth's, likewise.
        error_px: root mean square difference of the gap, crop px, over all frames.
        pixel_frames: how many frames were compared.
        left_out: r without each half second in turn; what it leaves open, see :func:`rise_error`.
    """

    r: float
    amplitude: float
    error_px: float
    pixel_frames: int
    left_out: tuple[float, ...] = ()


class Spoken(NamedTuple):
    """A stretch of video of one face that speaks.

    Attributes:
        fields: [F, 20, 20, 2] shape fields, crop px. textures: [F, 160, 160, 3].
        speech: [F, D] rows of the speech encoder.
    """

    fields: NDArray[np.floating]
    textures: NDArray[np.uint8]
    speech: Tensor


def rehearse(model: MouthModel, takes: Sequence[Spoken], seed: int = 0) -> Rehearsal:
    """Score a model on stretches that it was not trained on; errors as :func:`agreement`."""
    return agreement(
        [
            (
                rehearsed_opening(model, spoken, seed),
                _opening(model, torch.from_numpy(spoken.fields.astype(np.float32))),
            )
            for spoken in takes
        ]
    )


def rehearsed_opening(model: MouthModel, spoken: Spoken, seed: int = 0) -> Series:
    """Lip gap [F] in crop px of what the model makes of the reversed face and the speech as it was."""
    pictures = zip(spoken.fields[::-1].astype(np.float32), spoken.textures[::-1], strict=True)
    frames = [CanvasFrame(field, texture) for field, texture in pictures]
    take, shapes, start = Take(model, seed), [], 0
    while start < len(frames):
        need = take.next_pixel_frames
        part, rows = frames[start : start + need], spoken.speech[start : start + need]
        missing = need - len(part)
        mouths = take.step(part + part[-1:] * missing, torch.cat([rows, rows[-1:].expand(missing, -1)]))
        shapes += [torch.from_numpy(mouth.field) for mouth in mouths[: len(part)]]
        start += need
    return _opening(model, torch.stack(shapes))


def _opening(model: MouthModel, fields: Tensor) -> Series:
    opening: Series = model.ruler.opening(fields).double().numpy()
    return opening


def agreement(pairs: Sequence[tuple[Series, Series]]) -> Rehearsal:
    """Measured and true lip gaps of several takes as one figure.

    Raises:
        ValueError: no take, or none long enough to compare.
    """
    rows = [(compare(got, true), len(true)) for got, true in pairs]
    rows = [(row, count) for row, count in rows if not np.isnan(row.r)]
    if not rows:
        raise ValueError(f"takes of {[len(true) for _, true in pairs]} frames: too short or too still to compare")
    frames = sum(count for _, count in rows)
    squared = sum(float(np.square(got - true).sum()) for got, true in pairs)
    return Rehearsal(
        r=sum(row.r * count for row, count in rows) / frames,
        amplitude=sum(row.amplitude * count for row, count in rows) / frames,
        error_px=float(np.sqrt(squared / sum(len(true) for _, true in pairs))),
        pixel_frames=frames,
        left_out=_left_out(pairs),
    )


def _left_out(pairs: Sequence[tuple[Series, Series]]) -> tuple[float, ...]:
    """The r of :func:`agreement` without each half second in turn."""
    whole = [(correlation(got, true), len(true)) for got, true in pairs]
    found = []
    for take, (got, true) in enumerate(pairs):
        for start in range(0, len(true), BLOCK_FRAMES):
            gone = slice(start, start + BLOCK_FRAMES)
            part = (correlation(np.delete(got, gone), np.delete(true, gone)), len(true) - len(true[gone]))
            rows = [row for row in (*whole[:take], part, *whole[take + 1 :]) if not np.isnan(row[0])]
            if rows:
                found.append(sum(r * count for r, count in rows) / sum(count for _, count in rows))
    return tuple(found)


def rise_error(before: Rehearsal, after: Rehearsal) -> float:
    """Standard error of ``after.r - before.r``, both on the same takes: the jackknife over half seconds.

    The halves of a second that are hard for one network are hard for the other, so the error of the difference is far
    smaller than that of either figure. Infinite where there is not enough to tell.
    """
    if len(before.left_out) != len(after.left_out) or len(after.left_out) < 3:
        return float("inf")
    rises = np.array(after.left_out) - np.array(before.left_out)
    return float(np.sqrt((len(rises) - 1) * np.mean((rises - rises.mean()) ** 2)))
