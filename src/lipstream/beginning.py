"""A bounded look at a video before it is worked on: who shows in its first seconds, who of them speaks, and frames from
all of it.

>>> seen = watch_beginning(reader); speaking(reader, seen)    # id of the person whose lips move with the sound
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.mesh import region_from_landmarks
from lipstream.faces.people import PeopleTracker, Person
from lipstream.faces.pose import mouth_opening
from lipstream.media.cuts import CutDetector
from lipstream.media.opening import MediaError, open_media, sounds
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.silence import levels_db
from lipstream.media.speech import SpeechReader
from lipstream.media.timeline import MODEL_FPS, SAMPLES_PER_MODEL_FRAME

log = logging.getLogger(__name__)

LOOK_SECONDS = 4.0  # of the beginning
AFTER_TWO_PIXEL_FRAMES = 12  # left and right are known with the first frame that shows two; so many more to learn looks
PLACES = 16  # of a video, where something is searched in all of it
LEAST_HEARD = 0.3  # a score of lips and sound; below it, nobody is taken to speak


@dataclass
class Beginning:
    """What the first seconds showed.

    Attributes:
        people: everybody, with their looks; places are those of the first frame.
        centres: horizontal centres by id, of the first frame with two faces (else with one).
        openings: by id, (seconds, mouth opening) of every frame.
        sizes: by id, side of the face's square when first seen, px.
    """

    people: list[Person] = field(default_factory=list)
    centres: dict[int, float] = field(default_factory=dict)
    openings: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)


def watch_beginning(reader: VideoReader, *, until_two: bool = False, seconds: float = LOOK_SECONDS) -> Beginning:
    """Follow everybody through the first seconds.

    Args:
        until_two: stop soon after two faces show at once.
    """
    tracker, cuts, seen = PeopleTracker(), CutDetector(), Beginning()
    first, places, left = None, {}, None
    for frame in reader:
        first = frame.seconds if first is None else first
        now = frame.seconds - first
        if now > seconds or left == 0:
            break
        tracks = tracker.step(frame.image, cut=cuts.step(frame.image))
        if frame.index == 0:
            places = {id: region_from_landmarks(track.landmarks) for id, track in tracks.items()}
        for id, track in tracks.items():
            region = region_from_landmarks(track.landmarks)
            seen.openings.setdefault(id, []).append((now, mouth_opening(track.landmarks)))
            seen.sizes.setdefault(id, region.side)
        if len(tracks) > min(len(seen.centres), 1):
            seen.centres = {id: region_from_landmarks(track.landmarks).x for id, track in tracks.items()}
        if until_two and len(tracks) > 1 and left is None:
            left = AFTER_TWO_PIXEL_FRAMES
        left = None if left is None else left - 1
    seen.people = [replace(p, last=places.get(p.id)) for p in tracker.people.values() if p.gallery]
    known = {p.id for p in seen.people}
    seen.centres = {id: x for id, x in seen.centres.items() if id in known}
    return seen


def speaking(reader: VideoReader, seen: Beginning) -> int | None:
    """Whose lips move with the sound of the video itself; None where nobody's do, or where it has no sound
    that can be heard."""
    with open_media(reader.path, need="video") as container:
        if not sounds(container):
            return None
    try:
        samples = SpeechReader(reader.path).read(round((LOOK_SECONDS + 0.5) * MODEL_FPS) * SAMPLES_PER_MODEL_FRAME)
    except MediaError as error:  # a sound that the result replaces: it must not cost the run
        log.warning("%s, so who speaks is not known: the largest face is taken", error)
        return None
    whole = len(samples) // SAMPLES_PER_MODEL_FRAME
    if whole < MODEL_FPS:
        return None
    loud = np.maximum(levels_db(samples[: whole * SAMPLES_PER_MODEL_FRAME]), -60.0)
    scores = {}
    for person in seen.people:
        curve = seen.openings.get(person.id, [])
        if len(curve) >= MODEL_FPS:
            scores[person.id] = _heard(np.array(curve), loud)
    log.info("lips with the sound of %s: %s", reader.path, {id: round(score, 2) for id, score in scores.items()})
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best] >= LEAST_HEARD else None


def _heard(curve: NDArray[Any], loud: NDArray[Any]) -> float:
    """Correlation of how much lips move and how loud it is, both over a fifth of a second, weighted by the movement."""
    seconds, opening = curve[:, 0], curve[:, 1]
    grid = np.arange(seconds[0], min(seconds[-1], (len(loud) - 1) / MODEL_FPS), 1 / MODEL_FPS)
    if len(grid) < MODEL_FPS:
        return 0.0
    lips = np.interp(grid, seconds, opening)
    level = np.interp(grid, np.arange(len(loud)) / MODEL_FPS, loud)
    kernel = np.ones(5) / 5
    moves = np.convolve(np.abs(np.gradient(lips)) + 0.5 * np.abs(lips - np.median(lips)), kernel, "same")
    level = np.convolve(level, kernel, "same")
    if moves.std() < 1e-6 or level.std() < 1e-6:
        return 0.0
    # The sound of a continuous speech is loud throughout: moving lips count for themselves too.
    together = float(np.corrcoef(moves, level)[0, 1])
    return (0.3 + max(together, 0.0)) * min(1.0, float(lips.std()) / 0.03)


def sampled(reader: VideoReader, places: int = PLACES) -> Iterator[SourceFrame]:
    """A frame at each of so many places of a video, evenly spread; none where its length is unknown."""
    if reader.duration_seconds is None:
        return
    origin = next(iter(reader)).pts
    for place in range(places):
        target = origin + int((place + 0.5) / places * reader.duration_seconds / reader.time_base)
        frame = next(iter(reader.read(target)), None)
        if frame is not None:
            yield frame
