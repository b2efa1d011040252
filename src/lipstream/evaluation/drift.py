"""Whether a long run wanders: colour, sharpness and looks of the mouth against the source, minute by minute.

A model that is fed its own past can drift: mouths get paler, softer, or somebody else's, more with every chunk.
Here a clip is played back and forth for minutes, and each finished frame is held against its own source frame. What
counts is not how far the two are apart (other words are spoken), but whether that changes with time.

    lipstream evaluate drift CLIP --minutes 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.evaluation.fidelity import StreamingSynchroniser, SyncedLike
from lipstream.faces.likeness import SAME, difference, looks_of
from lipstream.faces.sharp import laplacian_variance
from lipstream.faces.track import FaceTracker
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.options import SyncOptions

LOOKS_EVERY = 10  # frames between two looks at the whole face


@dataclass(frozen=True, kw_only=True)
class DriftWindow:
    """Means over one stretch of time.

    Attributes:
        colour: result minus source inside the mask, R, G, B, levels of 255.
        sharpness: variance of the Laplacian around the mouth, result over source.
        unlike: how differently the whole face looks from the source's; `faces.likeness.SAME` is another person.
        frames: with a new mouth.
    """

    start_seconds: float
    colour: tuple[float, float, float]
    sharpness: float
    unlike: float
    frames: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the last third of the windows differs from the first third; the very first window is the warm-up.

    Attributes:
        colour_levels: the largest change of the three colours.
        sharpness: ratio of the sharpness ratios; 1 is none.
        unlike: change of the looks' difference, in units of `SAME`.
        spread_levels: standard deviation of a window's colour: what changes anyway.
    """

    windows: tuple[DriftWindow, ...]
    colour_levels: float
    sharpness: float
    unlike: float
    spread_levels: float


def measure_drift(sync: StreamingSynchroniser, video: Path, audio: Path, window_seconds: float = 10.0) -> Drift:
    """Run a model over a long video and compare each frame with its source.

    Args:
        video: as long as the speech, so that frames pair off; `evaluation.speed.write_input` makes both.

    Raises:
        ValueError: fewer than four windows with a new mouth.
    """
    windows: list[DriftWindow] = []
    rows: list[tuple[NDArray[np.float64], float]] = []
    looks: list[float] = []
    tracker, begun = FaceTracker(), 0.0

    def close(start_seconds: float) -> None:
        if rows and looks:
            colour = np.mean([row[0] for row in rows], 0)
            windows.append(
                DriftWindow(
                    start_seconds=start_seconds,
                    colour=(float(colour[0]), float(colour[1]), float(colour[2])),
                    sharpness=float(np.mean([row[1] for row in rows])),
                    unlike=float(np.mean(looks)),
                    frames=len(rows),
                )
            )
        rows.clear()
        looks.clear()

    for source, done in zip(VideoReader(video), sync.stream(video, audio, options=SyncOptions()), strict=True):
        if source.seconds >= begun + window_seconds:
            close(begun)
            begun += window_seconds
        row = _compare(source, done)
        if row is not None:
            rows.append(row)
        if source.index % LOOKS_EVERY == 0:
            face = tracker.step(source.image)
            if face is not None and row is not None:
                pair = [looks_of(image, face.landmarks) for image in (source.image, done.frame.image)]
                looks.append(difference(*pair))
    close(begun)
    if len(windows) < 4:
        raise MediaError(video, f"gives {len(windows)} windows of {window_seconds:g} s with a face", "use a longer one")
    return _summarise(windows)


def _compare(source: SourceFrame, done: SyncedLike) -> tuple[NDArray[np.float64], float] | None:
    """(colour change [3], sharpness ratio) of a frame with a new mouth."""
    patch = done.patch
    if patch is None or not (patch.alpha > 0).any():
        return None
    left, top, right, bottom = patch.box
    before, after = (frame.image[top:bottom, left:right] for frame in (source, done.frame))
    inside = patch.alpha > 0
    colour = after[inside].mean(0, dtype=np.float64) - before[inside].mean(0, dtype=np.float64)
    sharp = [laplacian_variance(np.asarray(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), np.uint8)) for p in (after, before)]
    return colour, sharp[0] / max(sharp[1], 1e-9)


def _summarise(windows: Sequence[DriftWindow]) -> Drift:
    counted = windows[1:]
    third = max(1, len(counted) // 3)
    first, last = counted[:third], counted[-third:]

    def mean(rows: Sequence[DriftWindow], name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    colours = np.array([row.colour for row in counted])
    change = colours[-third:].mean(0) - colours[:third].mean(0)
    return Drift(
        windows=tuple(windows),
        colour_levels=float(np.abs(change).max()),
        sharpness=mean(last, "sharpness") / mean(first, "sharpness"),
        unlike=(mean(last, "unlike") - mean(first, "unlike")) / SAME,
        spread_levels=float(colours.std(0).max()),
    )
