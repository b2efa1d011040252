"""What must not change: frames, timestamps, size, rotation, and every pixel outside the mouth mask.

Pixels are compared before encoding, in the source's own YUV planes, sample by sample. The result is also written
with quality lossless and read back, which shows that `stream()` and the file hold the same pictures.

    lipstream evaluate fidelity VIDEO AUDIO
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.composite import Patch
from lipstream.media.bounce import BouncingReader
from lipstream.media.planes import CHROMA_SHIFT, plane_arrays
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.speech import count_speech_samples
from lipstream.options import SyncOptions


class SyncedLike(Protocol):
    """A finished frame and what was changed in it."""

    @property
    def frame(self) -> SourceFrame:
        """The frame to show."""
        ...

    @property
    def synced(self) -> bool:
        """Whether a mouth was put in."""
        ...

    @property
    def patch(self) -> Patch | None:
        """Where, and what; None where nothing changed."""
        ...


class StreamingSynchroniser(Protocol):
    """What is measured: `LipSync`."""

    def __call__(self, video: Path, audio: Path, output: Path, *, options: SyncOptions) -> object:
        """Write a file."""
        ...

    def stream(self, video: Path, audio: Path, *, options: SyncOptions) -> Iterator[SyncedLike]:
        """The same frames one by one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Findings of one run; `ok` says whether all is as promised.

    Attributes:
        expected_frames, frames, file_frames: by the timeline, from `stream()`, in the written file.
        synced_frames: frames with a new mouth.
        pts_differ: frames whose timestamp (from the first frame, seconds) is not the source's, stream and file.
        size_differs: whether size, rotation or pixel format of the file differ from the source's.
        samples_outside: YUV samples outside the mask that differ from the source (must be 0).
        passed_changed: samples that differ in frames reported as untouched (must be 0).
        mask_share: mean share of the picture that the mask covers in synced frames.
        stream_file_max_difference: largest difference of a sample between `stream()` and the lossless file.
    """

    expected_frames: int
    frames: int
    file_frames: int
    synced_frames: int
    pts_differ: int
    size_differs: bool
    samples_outside: int
    passed_changed: int
    mask_share: float
    stream_file_max_difference: int

    @property
    def ok(self) -> bool:
        """Whether every promise is kept."""
        wrong = self.pts_differ + self.samples_outside + self.passed_changed + self.stream_file_max_difference
        same_count = self.expected_frames == self.frames == self.file_frames
        return same_count and not wrong and not self.size_differs


def full_mask(frame: SourceFrame, patch: Patch | None) -> NDArray[np.bool_]:
    """Pixels that a patch may change, [H, W] as stored (not turned upright)."""
    width, height = frame.size
    mask = np.zeros((height, width), np.bool_)
    if patch is not None:
        left, top, right, bottom = patch.box
        mask[top:bottom, left:right] = patch.alpha > 0
    return np.asarray(frame.orientation.stored(mask), np.bool_)


def samples_changed_outside(source: SourceFrame, result: SourceFrame, mask: NDArray[np.bool_]) -> int:
    """Number of Y, Cb and Cr samples that differ although a pixel of theirs lies outside the mask [H, W] (stored)."""
    shift_x, shift_y = CHROMA_SHIFT[source.stored.format.name]
    height, width = mask.shape
    padded = np.pad(mask, ((0, height % (1 << shift_y)), (0, width % (1 << shift_x))), mode="edge")
    cells = padded.reshape(padded.shape[0] >> shift_y, 1 << shift_y, padded.shape[1] >> shift_x, 1 << shift_x)
    # A chroma sample colours every pixel of its cell, so it may change only where all of them may.
    chroma: NDArray[np.bool_] = np.min(cells, axis=(1, 3)).astype(np.bool_)
    total = 0
    planes = zip(plane_arrays(source.stored), plane_arrays(result.stored), (mask, chroma, chroma), strict=True)
    for before, after, allowed in planes:
        total += int(np.count_nonzero((before != after) & ~allowed[: before.shape[0], : before.shape[1]]))
    return total


def max_difference(a: SourceFrame, b: SourceFrame) -> int:
    """Largest difference of a YUV sample between two frames of one format."""
    pairs = zip(plane_arrays(a.stored), plane_arrays(b.stored), strict=True)
    return max(int(np.abs(x.astype(np.int16) - y.astype(np.int16)).max()) for x, y in pairs)


def check_fidelity(
    sync: StreamingSynchroniser, video: Path, audio: Path, options: SyncOptions | None = None, suffix: str = ".mp4"
) -> Fidelity:
    """Run a video once as a stream and once as a file, and compare both with the source.

    Args:
        options: of the run; its quality is taken as lossless.
        suffix: type of the file.
    """
    options = replace(options or SyncOptions(), quality="lossless", crf=None, copy_unchanged=False)
    reader = VideoReader(video)
    samples = count_speech_samples(audio, options.audio_track, options.audio_delay_ms)
    expected = BouncingReader(reader, samples, length=options.resolved_length, fit=options.resolved_fit)
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as folder:
        output = Path(folder) / f"lossless{suffix}"
        sync(video, audio, output, options=options)
        written = VideoReader(output)
        size_differs = (written.stored_size, written.display_matrix, _kept(written.pix_fmt)) != (
            reader.stored_size,
            reader.display_matrix,
            _kept(reader.pix_fmt),
        )
        return _compare(iter(expected), sync.stream(video, audio, options=options), iter(written), size_differs)


def _kept(pix_fmt: str) -> str:
    """The format that a decoder names after encoding: interleaved chroma comes back in planes of its own."""
    return "yuv420p" if pix_fmt == "nv12" else pix_fmt


def _compare(
    source: Iterator[SourceFrame], stream: Iterator[SyncedLike], written: Iterator[SourceFrame], size_differs: bool
) -> Fidelity:
    """Walk the three sequences side by side, one frame of each in memory."""
    counts = [0, 0, 0]
    synced = pts_differ = outside = passed = difference = 0
    shares: list[float] = []
    starts: list[SourceFrame] | None = None
    for real, done, read in zip_longest(source, stream, written):
        for i, item in enumerate((real, done, read)):
            counts[i] += item is not None
        if real is None or done is None or read is None:
            continue
        frames = [real, done.frame, read]
        starts = starts or frames
        times = [f.pts * f.time_base - s.pts * s.time_base for f, s in zip(frames, starts, strict=True)]
        pts_differ += times[1] != times[0] or times[2] != times[0]
        mask = full_mask(real, done.patch)
        outside += samples_changed_outside(real, done.frame, mask)
        if done.synced:
            synced += 1
            shares.append(float(mask.mean()))
        else:
            passed += samples_changed_outside(real, done.frame, np.zeros_like(mask))
        if not size_differs:
            difference = max(difference, max_difference(done.frame, read))
    return Fidelity(
        expected_frames=counts[0],
        frames=counts[1],
        file_frames=counts[2],
        synced_frames=synced,
        pts_differ=pts_differ,
        size_differs=size_differs,
        samples_outside=outside,
        passed_changed=passed,
        mask_share=float(np.mean(shares)) if shares else 0.0,
        stream_file_max_difference=difference,
    )
