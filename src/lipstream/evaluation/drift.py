"""Whether a long run wears out: colour, identity and sharpness of the mouth at the end against the beginning.

An autoregressive model feeds on what it made, so small errors can add up (the paper's minute-long rollouts). Source and
speech are repeated here with one period, and the last seconds are compared with the first ones *of the same period
phase*: picture and words are equal there, frame by frame, and what differs is the model's doing.

    lipstream evaluate drift CLIP --seconds 60
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.evaluation.fidelity import StreamingSynchroniser, SyncedLike
from lipstream.evaluation.opening import mouth_opening
from lipstream.evaluation.sharpness import mouth_box, mouth_sharpness
from lipstream.evaluation.speed import square, write_squares, write_wav
from lipstream.faces.likeness import SAME, difference, looks_of
from lipstream.faces.track import FaceTracker
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import MODEL_FPS, SPEECH_RATE
from lipstream.options import SyncOptions

COMPARED_SECONDS = 5
LONGEST_TURN_FRAMES = 125  # of the clip, one way; they are held in memory

Means = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Means over some seconds of a result.

    Attributes:
        colour: [3] mean red, green, blue of the mouth box, 0..255.
        sharpness: Laplacian variance of the mouth box.
        looks: [300] mean descriptor of the face (`faces.likeness`).
        opening: standard deviation of the mouth's opening, inter-ocular distances.
        frames: in which a face was found.
    """

    colour: Means
    sharpness: float
    looks: Means
    opening: float
    frames: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The last seconds against the first ones; 0 is none.

    Attributes:
        seconds: of the whole run.
        colour: largest relative change of a channel's mean in the mouth box.
        sharpness: relative change of the Laplacian variance.
        identity: difference of the mean faces, as a share of what lies between two pictures of one person at most.
        opening: relative change of the movement.
    """

    seconds: float
    colour: float
    sharpness: float
    identity: float
    opening: float

    @property
    def worst(self) -> float:
        """The largest of colour, identity and sharpness."""
        return max(self.colour, abs(self.sharpness), self.identity)


def write_periodic(clip: Path, audio: Path, folder: Path, seconds: int) -> tuple[Path, Path, int]:
    """(video, speech, period in frames): a 512 px 25 fps lossless video and speech that repeat with one period.

    Raises:
        MediaError: less than two frames, or no speech.
    """
    turn = [square(frame.image) for frame in islice(VideoReader(clip), LONGEST_TURN_FRAMES)]
    if len(turn) < 2:
        raise MediaError(clip, "has one frame", "give a clip of some seconds")
    there_and_back = [*range(len(turn)), *range(len(turn) - 2, 0, -1)]
    period = len(there_and_back)
    video, sound = folder / "periodic.mp4", folder / "periodic.wav"
    shown = (turn[there_and_back[index % period]] for index in range(seconds * MODEL_FPS))
    write_squares(shown, video, crf=0, preset="ultrafast")
    speech = load_speech(audio)
    wanted = period * SPEECH_RATE // MODEL_FPS
    once = np.tile(speech, -(-wanted // len(speech)))[:wanted]
    write_wav(np.tile(once, -(-seconds * MODEL_FPS // period))[: seconds * SPEECH_RATE], sound)
    return video, sound, period


def measure_drift(
    sync: StreamingSynchroniser, clip: Path, audio: Path, seconds: int = 60, compared_seconds: int = COMPARED_SECONDS
) -> Drift:
    """Run a clip's picture and a speech, both repeated, and compare the end with the beginning.

    Raises:
        ValueError: too short for two stretches of one phase.
        MediaError: see :func:`write_periodic`.
    """
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as name:
        video, sound, period = write_periodic(clip, audio, Path(name), seconds)
        compared = compared_seconds * MODEL_FPS
        later = (seconds * MODEL_FPS - compared) // period * period
        if later < compared:
            least = -(-compared // period) * period + compared
            raise ValueError(
                f"{seconds} s are too short: the clip repeats every {period / MODEL_FPS:g} s, and its last "
                f"{compared_seconds} s are compared with the first; take at least "
                f"{-(-least // MODEL_FPS)} s"
            )
        synced = sync.stream(video, sound, options=SyncOptions())
        first = stretch(islice(synced, compared))
        last = stretch(islice(synced, later - compared, later))
    return compare_stretches(first, last, seconds)


def stretch(frames: Iterable[SyncedLike]) -> Stretch:
    """Means over frames.

    Raises:
        ValueError: no face in any of them.
    """
    tracker = FaceTracker()
    colours, sharp, looks, opening = [], [], [], []
    for synced in frames:
        image = synced.frame.image
        face = tracker.step(image)
        if face is None:
            continue
        left, top, right, bottom = mouth_box(face.landmarks, (image.shape[0], image.shape[1]))
        colours.append(image[top:bottom, left:right].reshape(-1, 3).mean(0))
        sharp.append(mouth_sharpness(image, face.landmarks))
        looks.append(looks_of(image, face.landmarks))
        opening.append(mouth_opening(face.landmarks))
    if not colours:
        raise ValueError("no face in the result: give a clip of one talking head")
    return Stretch(
        colour=np.mean(colours, axis=0, dtype=np.float64),
        sharpness=float(np.nanmean(sharp)),
        looks=np.mean(looks, axis=0, dtype=np.float64),
        opening=float(np.std(opening)),
        frames=len(colours),
    )


def compare_stretches(first: Stretch, last: Stretch, seconds: float) -> Drift:
    """How ``last`` differs from ``first``."""
    return Drift(
        seconds=seconds,
        colour=float(np.abs(last.colour / first.colour - 1).max()),
        sharpness=last.sharpness / first.sharpness - 1,
        identity=difference(last.looks.astype(np.float32), first.looks.astype(np.float32)) / SAME,
        opening=last.opening / first.opening - 1,
    )
