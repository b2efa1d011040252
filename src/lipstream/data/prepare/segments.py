"""From a video to the stretches that can become samples: the 25 fps grid, one face, no cut, 5-10 s.

A first pass over the video watches every frame of the grid and keeps small things only (the landmarks go to a file);
the plan says which frames to take; a second pass takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.data.prepare.shots import MIN_CHANGE, ShotChanges, find_cuts
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.timeline import GridSampler
from lipstream.options import OptionError

LANDMARKS = 468


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """How long segments are, in pixel frames at 25 fps.

    Attributes:
        min_pixel_frames: 162 by default: a training clip of 81 and a reference of 81 others.
        max_pixel_frames: 250 by default, the paper's 10 s.
    """

    min_pixel_frames: int = 162
    max_pixel_frames: int = 250

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixel_frames <= self.max_pixel_frames:
            allowed = f"must be at least 1 and not exceed the longest, {self.max_pixel_frames} (--max-frames)"
            raise OptionError("min-frames", self.min_pixel_frames, allowed)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Grid frames [start, stop) of a video; dropped for `reason`, or kept where that is empty."""

    start: int
    stop: int
    reason: str = ""

    @property
    def pixel_frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The first pass: for every grid frame its change and the id of its face (-1 without one); landmarks in a file."""

    changes: NDArray[np.float64]
    faces: NDArray[np.int64]
    landmarks_file: Path

    @property
    def pixel_frames(self) -> int:
        return len(self.faces)

    def landmarks(self) -> NDArray[np.float32]:
        """[frames, 468, 3] source px, mapped from the file; zeros where no face shows."""
        return np.memmap(self.landmarks_file, np.float32, "r", shape=(self.pixel_frames, LANDMARKS, 3))


def on_grid(reader: VideoReader) -> Iterator[SourceFrame]:
    """The frame that a player shows at every 1/25 s, from the first frame on."""
    sampler: GridSampler[SourceFrame] = GridSampler(reader.time_base)
    for frame in reader:
        yield from sampler.push(frame.pts, frame)
    yield from sampler.finish()


def watch(reader: VideoReader, landmarks_file: Path) -> Watched:
    """The first pass over a video."""
    tracker, shots = FaceTracker(), ShotChanges()
    changes: list[float] = []
    faces: list[int] = []
    nothing = np.zeros((LANDMARKS, 3), np.float32).tobytes()
    seen = nothing
    before: SourceFrame | None = None
    with landmarks_file.open("wb") as stream:
        for frame in on_grid(reader):
            if frame is before:  # shown again: nothing to look at anew
                changes.append(0.0)
                faces.append(faces[-1])
                stream.write(seen)
                continue
            before = frame
            changes.append(shots.step(frame.image))
            if changes[-1] >= MIN_CHANGE:
                tracker.reset()
            face = tracker.step(frame.image)
            faces.append(-1 if face is None else face.id)
            seen = nothing if face is None else face.landmarks.astype(np.float32).tobytes()
            stream.write(seen)
    return Watched(changes=np.array(changes), faces=np.array(faces, np.int64), landmarks_file=landmarks_file)


def plan_segments(changes: NDArray[np.float64], faces: NDArray[np.int64], config: SegmentConfig) -> list[Stretch]:
    """Every grid frame in one stretch, in order: the segments, and what is dropped and why."""
    edges = set(find_cuts(changes))
    edges |= set((np.flatnonzero(faces[1:] != faces[:-1]) + 1).tolist())
    places = [0, *sorted(edges - {0}), len(faces)]
    stretches: list[Stretch] = []
    for start, stop in pairwise(places):
        if stop == start:
            continue
        if faces[start] < 0:
            stretches.append(Stretch(start=start, stop=stop, reason="no face"))
        else:
            stretches += _split(start, stop, config)
    return stretches


def _split(start: int, stop: int, config: SegmentConfig) -> list[Stretch]:
    """Pieces of one shot, as even as they can be; the rest that fits in none."""
    frames = stop - start
    if frames < config.min_pixel_frames:
        return [Stretch(start=start, stop=stop, reason="too short")]
    pieces = -(-frames // config.max_pixel_frames)
    if frames // pieces >= config.min_pixel_frames:
        edges = [start + frames * i // pieces for i in range(pieces + 1)]
        return [Stretch(start=a, stop=b) for a, b in pairwise(edges)]
    step = config.max_pixel_frames
    kept = [Stretch(start=start + i * step, stop=start + (i + 1) * step) for i in range(pieces - 1)]
    return [*kept, Stretch(start=kept[-1].stop, stop=stop, reason="rest of a shot")]
