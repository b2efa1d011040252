"""The leak-free lip-sync protocol: a clip's own speech onto the *time-reversed* picture of the same clip.

The truth at frame i is the mouth opening of the original frame i. The source shows another mouth there, so a system
that copies its source scores about 0 (the do-nothing row); only the audio can explain a positive correlation. The
oracle row is the real clip through the same encoder: the most that tracker and encoder allow.

    lipstream evaluate sync CLIP... --wrong-audio          # constant 25 fps, with their own speech
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from lipstream.evaluation.closure import Closure, closure, load_spoken
from lipstream.evaluation.correlation import Agreement, compare, correlation
from lipstream.evaluation.opening import Series
from lipstream.evaluation.sharpness import sharpness_ratio
from lipstream.evaluation.watch import Watched, watch
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.writer import VideoWriter

MAX_BYTES = 2 << 30  # decoded frames of one clip that are held to turn it round
SOURCE_CRF = 12


class Synchroniser(Protocol):
    """What is measured: `LipSync` or anything that writes a video whose lips follow the audio."""

    def __call__(self, video: Path, audio: Path, output: Path) -> object:
        """Write `output`: the picture of `video` speaking `audio`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReversedResult:
    """One clip under the protocol.

    Attributes:
        name: file stem.
        frames: frames of the original clip.
        frames_off: how many more (or fewer, negative) the result has.
        lost_frames: frames of the result in which the tracker found no face.
        own: the result against the truth.
        nothing: the reversed source, as it is, against the truth.
        oracle: the real clip, encoded as the result is, against the truth.
        wrong_audio_r: the result of another clip's speech against this clip's truth; None if it was not made.
        sharpness: mouth sharpness of the result over its source's, median over frames.
        closure: p, b, m where the clip has synthetic ground truth beside it, else None.
        nothing_closure: the same of the reversed source as it is: what chance closes.
        measured, truth: [frames] opening of the result and of the original.
    """

    name: str
    frames: int
    frames_off: int
    lost_frames: int
    own: Agreement
    nothing: Agreement
    oracle: Agreement
    wrong_audio_r: float | None
    sharpness: float
    closure: Closure | None
    nothing_closure: Closure | None
    measured: Series
    truth: Series


def write_reversed(video: str | os.PathLike[str], output: Path, *, crf: int = SOURCE_CRF) -> int:
    """Write the pictures of a video backwards, silent, with the same timestamps; returns the number of frames.

    Raises:
        ValueError: the decoded clip would not fit in memory.
    """
    reader = VideoReader(video)
    frames: list[SourceFrame] = []
    for frame in reader:
        frames.append(frame)
        if len(frames) * reader.width * reader.height * 1.5 > MAX_BYTES:
            raise ValueError(f"{video}: too long to turn round in memory; cut it to a few seconds")
    with VideoWriter(output, like=reader, crf=crf) as writer:
        for shown, place in zip(reversed(frames), frames, strict=True):
            turned = replace(shown, index=place.index, pts=place.pts, duration_pts=place.duration_pts)
            writer.write(turned)
    return len(frames)


def write_copy(video: str | os.PathLike[str], output: Path) -> None:
    """Encode a video once more exactly as results are encoded, silent."""
    reader = VideoReader(video)
    with VideoWriter(output, like=reader) as writer:
        for frame in reader:
            writer.write(frame)


def score_reversed(
    sync: Synchroniser, clip: str | os.PathLike[str], *, wrong_audio: str | os.PathLike[str] | None = None
) -> ReversedResult:
    """Run the protocol on one clip.

    Args:
        sync: what is measured.
        clip: 25 fps video with its own speech; `clip.npz` beside it (synthetic truth) adds closures.
        wrong_audio: another file with speech, for the null row.
    """
    path = Path(clip)
    real = watch(path)
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as folder:
        source, result = Path(folder) / "source.mp4", Path(folder) / "result.mp4"
        write_reversed(path, source)
        sync(source, path, result)
        got, before = watch(result), watch(source)
        again = Path(folder) / "again.mp4"
        write_copy(path, again)
        oracle = watch(again)
        null = None
        if wrong_audio is not None:
            other = Path(folder) / "wrong.mp4"
            sync(source, Path(wrong_audio), other)
            null = correlation(watch(other).opening, real.opening)
    return ReversedResult(
        name=path.stem,
        frames=len(real),
        frames_off=len(got) - len(real),
        lost_frames=got.lost_frames,
        own=compare(got.opening, real.opening),
        nothing=compare(before.opening, real.opening),
        oracle=compare(oracle.opening, real.opening),
        wrong_audio_r=null,
        sharpness=sharpness_ratio(got.sharpness, before.sharpness),
        closure=_closures(path, got, real),
        nothing_closure=_closures(path, before, real),
        measured=got.opening,
        truth=real.opening,
    )


def _closures(clip: Path, got: Watched, real: Watched) -> Closure | None:
    truth = clip.with_suffix(".npz")
    return closure(got.opening, real.opening, load_spoken(truth)) if truth.exists() else None


def wrong_partners(clips: Sequence[Path]) -> list[Path | None]:
    """For each clip another one whose speech serves as the wrong audio: the next, and for the last the first."""
    if len(clips) < 2:
        return [None] * len(clips)
    return [*clips[1:], clips[0]]


def mean(values: Sequence[float | None]) -> float:
    """Mean of the values that exist; NaN if none does."""
    known = np.array([value for value in values if value is not None], np.float64)
    return float(np.nanmean(known)) if len(known) and not np.all(np.isnan(known)) else float("nan")
