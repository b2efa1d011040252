"""Who gets which words: the faces of a video, frame by frame, one for each voice (`--speaker`, `--voice`).

A choice that needs more than the first frame is made before the run starts, from a bounded look: the first four seconds
(left, right, who speaks), the frames at the named time (a point), sixteen places of the video (a picture). What was
learned there of everybody's looks goes into the run's tracker, so that people are known from its first frame on.

    >>> cast = Cast(reader, [parse_speaker("left")])
    >>> for frame in reader: cut, (track,) = cast.step(frame)      # track is None where that person does not show
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.beginning import AFTER_TWO_PIXEL_FRAMES, LOOK_SECONDS, Beginning, sampled, speaking, watch_beginning
from lipstream.faces.likeness import Gallery, difference, looks_of
from lipstream.faces.mesh import region_from_landmarks
from lipstream.faces.people import PeopleTracker, Person
from lipstream.faces.track import FaceTrack, FaceTracker
from lipstream.media.cuts import CutDetector
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.options import SyncOptions
from lipstream.speaker import Speaker, parse_speaker

log = logging.getLogger(__name__)

FACELESS_SECONDS = 4.0  # without any face, before the rest of the video is sampled
CHOOSE_AGAIN_SECONDS = 10.0  # "auto" and "largest" take another face when theirs has been away for so long
HEARD = "its lips move with the video's own sound"
LIKE_PICTURE = 16.0  # a picture has its own light: more than what counts as the same person within a video


@dataclass(frozen=True)
class Choice:
    """Which face a voice was given, and why.

    Attributes:
        speaker: as it was asked for.
        why: what decided.
        person: number of the followed face.
        seconds: from the video's first frame, when this face first shows.
        place: centre (x, y) of the face there, px.
    """

    speaker: str
    why: str
    person: int
    seconds: float
    place: tuple[float, float]


class Cast:
    """The stage ``step(frame) -> (cut, [FaceTrack or None per speaker])``.

    Args:
        reader: of the video.
        speakers: one per voice, all different.

    Attributes:
        anybody: whether any face has shown so far.
        choices: the faces that were given a voice so far, in the order in which they showed.

    Raises:
        ValueError: a speaker is not to be found, or two are the same face.
    """

    def __init__(self, reader: VideoReader, speakers: Sequence[Speaker]) -> None:
        self._reader, self._speakers = reader, tuple(speakers)
        self._cuts = CutDetector()
        self._chosen: list[int | None] = [None] * len(speakers)
        self._why = [""] * len(speakers)
        self.choices: list[Choice] = []
        self._absent_since: list[float | None] = [None] * len(speakers)
        self._tracker = PeopleTracker()
        self._began: float | None = None
        self._looked = 0
        self.anybody = False
        self._sampled = False
        if any(s.kind not in ("auto", "largest") for s in speakers) or len(speakers) > 1:
            self._choose_before()

    @property
    def video(self) -> str:
        """Its name, for messages."""
        return str(self._reader.path)

    @property
    def best_score(self) -> float:
        """The most face-like thing that was seen; a face has at least 0.5."""
        return self._tracker.best_score

    def step(self, frame: SourceFrame) -> tuple[bool, list[FaceTrack | None]]:
        """Everybody who speaks, in one frame; frames come in order of time.

        Raises:
            MediaError: there is no face in the first seconds, and none at other places either.
        """
        cut = self._cuts.step(frame.image)
        tracks = self._tracker.step(frame.image, cut=cut)
        self._began = frame.seconds if self._began is None else self._began
        now = frame.seconds - self._began
        self._looked += 1
        self.anybody = self.anybody or bool(tracks)
        if not self.anybody and not self._sampled and now >= FACELESS_SECONDS:
            self._sampled = True
            self._search_everywhere(now)
        if tracks and self._chosen == [None] * len(self._chosen):
            self._choose_now(tracks)
        shown = [self._track(voice, now, tracks) for voice in range(len(self._speakers))]
        for voice, track in enumerate(shown):
            if track is not None:
                self._note(voice, track, now)
        return cut, shown

    def waiting(self) -> list[Speaker]:
        """Speakers whose face has not shown so far."""
        shown = {choice.speaker for choice in self.choices}
        return [speaker for speaker in self._speakers if speaker.text not in shown]

    def _note(self, voice: int, track: FaceTrack, now: float) -> None:
        """Remember who was given a voice, where that face first shows."""
        speaker = self._speakers[voice].text
        if any(choice.speaker == speaker and choice.person == track.id for choice in self.choices):
            return
        region = region_from_landmarks(track.landmarks)
        choice = Choice(speaker, self._why[voice], track.id, now, (region.x, region.y))
        log.info("speaker '%s' is person %d: %s", speaker, track.id, choice)
        self.choices.append(choice)

    def _track(self, voice: int, now: float, tracks: dict[int, FaceTrack]) -> FaceTrack | None:
        """A speaker's face; "auto" and "largest" choose again when theirs stays away, or was nobody's so far."""
        chosen = self._chosen[voice]
        if chosen is not None and chosen in tracks:
            self._absent_since[voice] = None
            return tracks[chosen]
        since = self._absent_since[voice]
        if since is None:
            self._absent_since[voice] = since = now
        free = {id: track for id, track in tracks.items() if id not in self._chosen}
        person = None if chosen is None else self._tracker.people.get(chosen)
        unknown = person is None or not person.gallery  # a glimpse: nobody could be known again by it
        if not free or self._speakers[voice].kind not in ("auto", "largest"):
            return None
        if now - since < CHOOSE_AGAIN_SECONDS and not unknown:
            return None
        self._chosen[voice] = largest(free)
        if chosen is None:
            self._why[voice] = "the first face without a voice"
        else:
            self._why[voice] = f"takes over, the one before was away for {now - since:.1f} s"
        self._absent_since[voice] = None
        return free[largest(free)]

    # ------------------------------------------------------------------ choosing

    def _choose_now(self, tracks: dict[int, FaceTrack]) -> None:
        """The only speaker, "auto" or "largest", from the first frame that shows a face."""
        if self._speakers[0].kind == "auto" and len(tracks) > 1:
            seen = watch_beginning(self._reader)
            spoken = speaking(self._reader, seen)
            if spoken is not None:
                person = next(p for p in seen.people if p.id == spoken)
                self._chosen[0] = _most_like(person.gallery, self._tracker, tracks)
                self._why[0] = HEARD
                return
        self._chosen[0], self._why[0] = largest(tracks), _of("the largest", len(tracks))

    def _choose_before(self) -> None:
        """All speakers, from a look at the video before the run."""
        sides = any(s.kind in ("left", "right") for s in self._speakers)
        only_sides = all(s.kind in ("left", "right", "largest") for s in self._speakers)
        seen = watch_beginning(self._reader, until_two=sides and only_sides)
        # "auto" comes last: it is whoever speaks of those that nobody named.
        for voice in sorted(range(len(self._speakers)), key=lambda i: self._speakers[i].kind == "auto"):
            self._chosen[voice], self._why[voice] = self._find(self._speakers[voice], seen)
        taken: dict[int, Speaker] = {}
        for id, speaker in zip(self._chosen, self._speakers, strict=True):
            if id in taken:
                raise ValueError(
                    f"{self._reader.path}: speakers '{taken[id].text}' and '{speaker.text}' are the same face; the "
                    f"first {LOOK_SECONDS:g} s show {len(seen.people)}; name them by place and time (X,Y@SECONDS)"
                )
            if id is not None:
                taken[id] = speaker
        self._tracker = PeopleTracker(known=seen.people)

    def _find(self, speaker: Speaker, seen: Beginning) -> tuple[int | None, str]:
        """The id of a speaker among the people of the beginning, who may grow by it, and why it is that one."""
        if speaker.kind == "point":
            return self._at_point(speaker, seen), "who is at that place"
        if speaker.kind == "picture":
            return self._like_picture(speaker, seen), "who looks like that picture"
        if speaker.kind in ("auto", "largest"):
            return self._free(speaker, seen)
        if not seen.centres:
            raise MediaError(
                self._reader.path,
                f"shows no face in its first {LOOK_SECONDS:g} s, so there is no speaker '{speaker.text}'",
                "name the speaker by place and time (X,Y@SECONDS)",
            )
        sign = 1 if speaker.kind == "left" else -1
        nearest = min(seen.centres, key=lambda id: sign * seen.centres[id])
        return nearest, _of(f"the {speaker.kind} one", len(seen.centres))

    def _free(self, speaker: Speaker, seen: Beginning) -> tuple[int | None, str]:
        """Of the people of the beginning whom nobody else named, who speaks, else the largest; None: nobody is left."""
        free = [id for id in seen.centres if id not in self._chosen]
        if not free:
            if len(self._speakers) > 1:
                log.warning(
                    "%s: speaker '%s' waits for a face that has no voice yet: the first %g s show %d",
                    self._reader.path, speaker.text, LOOK_SECONDS, len(seen.centres),
                )  # fmt: skip
            return None, ""
        if speaker.kind == "auto" and len(free) > 1:
            spoken = speaking(self._reader, seen)
            if spoken is not None and spoken not in self._chosen:
                return spoken, HEARD
        others = " without a voice" if len(free) < len(seen.centres) else ""
        return max(free, key=lambda id: seen.sizes[id]), _of("the largest", len(free), others)

    def _at_point(self, speaker: Speaker, seen: Beginning) -> int:
        """Who is at a place, at a time."""
        assert speaker.point is not None
        reader = self._reader
        origin = next(iter(reader)).pts
        target = origin + int(speaker.seconds / reader.time_base)
        if reader.duration_seconds is not None and speaker.seconds > reader.duration_seconds:
            raise ValueError(
                f"{reader.path}: speaker '{speaker.text}' is at {speaker.seconds:g} s, but the video ends at "
                f"{reader.duration_seconds:.2f} s"
            )
        x, y = speaker.point
        if x <= 1 and y <= 1:
            x, y = x * reader.width, y * reader.height
        tracker, found, landmarks = PeopleTracker(known=seen.people), None, {}
        at_time = (frame for frame in reader.read(target) if frame.pts + frame.duration_pts > target)
        for index, frame in enumerate(islice(at_time, AFTER_TWO_PIXEL_FRAMES)):
            tracks = tracker.step(frame.image)
            if found is None:
                landmarks = {id: t.landmarks for id, t in tracks.items()}
                found = next((id for id, points in landmarks.items() if _holds(points, x, y)), None)
            if found is None and index >= 4:
                break
        if found is None:
            where = ", ".join(f"{p[:, 0].mean():.0f},{p[:, 1].mean():.0f}" for p in landmarks.values())
            raise ValueError(
                f"{reader.path}: no face at {x:.0f},{y:.0f} at {speaker.seconds:g} s; "
                + (f"faces are there at {where} (pixels)" if where else "there is no face at all then")
            )
        places = {p.id: p.last for p in seen.people}
        seen.people = [replace(p, last=places.get(p.id)) for p in tracker.people.values() if p.gallery]
        return found

    def _like_picture(self, speaker: Speaker, seen: Beginning) -> int:
        """Who looks like the face of a picture."""
        assert speaker.path is not None
        try:
            data = np.frombuffer(speaker.path.read_bytes(), np.uint8)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise MediaError(speaker.path, problem, "check the name of the picture") from error
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if picture is None:
            raise MediaError(speaker.path, "cannot be decoded as a picture", "give a JPEG or PNG")
        rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
        face = FaceTracker().step(rgb)
        if face is None:
            raise MediaError(speaker.path, "shows no face", "give a picture of the speaker's face, from the front")
        wanted = looks_of(rgb, face.landmarks)
        people = {p.id: p for p in seen.people}
        best = min(people, key=lambda id: people[id].gallery.unlike(wanted), default=None)
        if best is not None and people[best].gallery.unlike(wanted) < LIKE_PICTURE:
            return best
        return self._anywhere(speaker, wanted, seen)

    def _anywhere(self, speaker: Speaker, wanted: NDArray[Any], seen: Beginning) -> int:
        """Search the whole video, at some places, for who looks like that."""
        nearest, found = float("inf"), None
        for frame in sampled(self._reader):
            for track in PeopleTracker().step(frame.image).values():
                looks = looks_of(frame.image, track.landmarks)
                if difference(looks, wanted) < nearest:
                    nearest, found = difference(looks, wanted), looks
        if found is None or nearest >= LIKE_PICTURE:
            raise ValueError(
                f"{self._reader.path}: nobody in it looks like {speaker.text} (nearest difference {nearest:.1f}, at "
                f"most {LIKE_PICTURE:g} would do); name the speaker by place and time (X,Y@SECONDS)"
            )
        gallery = Gallery()
        gallery.add(found)
        id = max((p.id for p in seen.people), default=-1) + 1
        seen.people.append(Person(id=id, gallery=gallery))
        return id

    def _search_everywhere(self, seconds: float) -> None:
        """Say early that a video has no face, but let one begin with a title."""
        count, best = 0, self.best_score
        for frame in sampled(self._reader):
            tracker = PeopleTracker()
            if tracker.step(frame.image):
                return
            count, best = count + 1, max(best, tracker.best_score)
        if count:
            where = f"in its first {seconds:.0f} s ({self._looked} frames) and at {count} places of the rest"
            raise no_face(self._reader.path, where, best)


def _of(which: str, count: int, kind: str = "") -> str:
    """In words, which of so many faces."""
    return f"{which} of {count} faces{kind}" if count > 1 else f"the only face{kind}"


def speakers_of(options: SyncOptions) -> list[Speaker]:
    """The speakers of a run, the main one first."""
    return [parse_speaker(text) for text in (options.speaker, *(name for name, _ in options.voices))]


def no_speaker(path: str | os.PathLike[str], frames: int, cast: Cast) -> MediaError:
    """The error for a run that found nobody to give a mouth to."""
    if not cast.anybody:
        return no_face(path, f"in any of its {frames} frames", cast.best_score)
    return MediaError(
        path,
        f"shows faces, but never the speaker from the front in any of its {frames} frames",
        "name the speaker by place and time (--speaker X,Y@SECONDS)",
    )


def no_face(path: str | os.PathLike[str], where: str, best_score: float) -> MediaError:
    """The error for a video without any face."""
    return MediaError(
        path,
        f"shows no face {where}; the most face-like thing scores {best_score:.2f} of 1 and has no face's features",
        "use a video of a talking person, seen from the front (drawn characters and animals are not supported)",
    )


def largest(tracks: dict[int, FaceTrack]) -> int:
    """Id of the largest face; of equal ones, the first."""
    return max(tracks, key=lambda id: region_from_landmarks(tracks[id].landmarks).side)


def _holds(landmarks: NDArray[Any], x: float, y: float) -> bool:
    """Whether a point lies on a face, or near beside it."""
    low, high = landmarks[:, :2].min(0), landmarks[:, :2].max(0)
    margin = 0.25 * (high - low)
    return bool((np.array([x, y]) >= low - margin).all() and (np.array([x, y]) <= high + margin).all())


def _most_like(gallery: Gallery, tracker: PeopleTracker, tracks: dict[int, FaceTrack]) -> int:
    """Which of the people in the picture another tracker's person is."""
    return min(tracks, key=lambda id: tracker.people[id].gallery.unlike_all(gallery))
