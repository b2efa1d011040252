"""Follow everybody in a video and know them again: several faces at once, identities kept over gaps and cuts.

Each face is followed from landmarks to landmarks, as `track.FaceTracker` does with one. Who a face is, is decided where
it is found (not in every frame): by its place after a short gap, else by its looks (`likeness`). Two faces that met are
looked at in every frame for a second, and change names if they look like each other.

    >>> tracker = PeopleTracker(); tracker.step(rgb)  # {person id: FaceTrack}; the same id, the same person
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.detect import Detection, FaceDetector
from lipstream.faces.likeness import SAME, Gallery, Looks, looks_of
from lipstream.faces.mesh import FaceMesh, Region, region_from_detection, region_from_landmarks
from lipstream.faces.track import FaceTrack, TrackerConfig, believable

Image = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PeopleConfig(TrackerConfig):
    """As for one face, and:

    Attributes:
        look_pixel_frames: while somebody is followed, further faces are looked for in every n-th frame.
        lost_look_pixel_frames: the same, in the second after somebody was lost.
        learn_pixel_frames: how often a person's looks are noted.
        most: faces followed at once.
        young_pixel_frames: so long somebody new may still turn out to be somebody known.
        met: two faces nearer than this, in sides of their squares, may be taken for each other.
        watch_pixel_frames: for how long their looks decide after that.
        margin: by how much the other name has to fit better, averaged over `agree_pixel_frames`.
    """

    look_pixel_frames: int = 12
    lost_look_pixel_frames: int = 3
    learn_pixel_frames: int = 5
    most: int = 6
    young_pixel_frames: int = 25
    met: float = 0.75
    watch_pixel_frames: int = 25
    margin: float = 0.1 * SAME
    agree_pixel_frames: int = 3


@dataclass
class Person:
    """Somebody who was seen.

    Attributes:
        region: where to look in the next frame; None while lost.
        last: where the face was seen last; None where a cut made that meaningless.
        gallery: what this person looked like.
        seen_pixel_frames: in how many frames, over all.
    """

    id: int
    region: Region | None = None
    last: Region | None = None
    lost_pixel_frames: int = 0
    gallery: Gallery = field(default_factory=Gallery)
    seen_pixel_frames: int = 0


class PeopleTracker:
    """The stage ``step(rgb) -> {id: FaceTrack}``.

    Args:
        known: people seen before, from `people` of another tracker: they are known again by their looks.
    """

    def __init__(self, config: PeopleConfig | None = None, known: Sequence[Person] = ()) -> None:
        self.config = config or PeopleConfig()
        enough = self.config.learn_pixel_frames
        self.people: dict[int, Person] = {}
        for p in known:
            seen = max(p.seen_pixel_frames, enough)
            gallery = p.gallery.copy()
            self.people[p.id] = replace(p, region=None, lost_pixel_frames=0, gallery=gallery, seen_pixel_frames=seen)
        self._detector = FaceDetector()
        self._mesh = FaceMesh()
        self._frame = 0
        self._alone = 0  # frames since anybody was followed
        self._met: dict[tuple[int, int], int] = {}  # pairs of ids -> frame of their last meeting
        self._evidence: dict[tuple[int, int], list[float]] = {}

    @property
    def best_score(self) -> float:
        """The most face-like thing so far, 0..1; a face from 0.5."""
        return self._detector.best_score

    def step(self, rgb: Image, *, cut: bool = False) -> dict[int, FaceTrack]:
        """Everybody whose face shows in rgb uint8 [H, W, 3].

        Args:
            cut: nothing of this picture continues the one before: people are known again by their looks only.
        """
        if cut:
            self._forget_places()
        tracks = self._follow(rgb)
        looks: dict[int, Looks] = {}
        self._part(rgb, tracks, looks)
        if self._should_search(tracks):
            self._search(rgb, tracks, looks)
        self._alone = 0 if tracks else self._alone + 1
        self._tell_apart(rgb, tracks, looks)
        self._learn(rgb, tracks, looks)
        self._recognise(rgb, tracks, looks)
        self._frame += 1
        return tracks

    # ------------------------------------------------------------------ following

    def _forget_places(self) -> None:
        for person in self.people.values():
            person.region, person.last = None, None
        self._alone = 0
        self._met.clear()
        self._evidence.clear()

    def _follow(self, rgb: Image) -> dict[int, FaceTrack]:
        tracks: dict[int, FaceTrack] = {}
        for person in list(self.people.values()):
            if person.region is None:
                self._stay_lost(person)
                continue
            landmarks, presence = self._mesh.landmarks(rgb, person.region)
            if presence >= self.config.min_presence and believable(person.region, landmarks, self.config):
                tracks[person.id] = self._seen(person, landmarks, presence)
            else:
                person.region = None
                self._stay_lost(person)
        return tracks

    def _stay_lost(self, person: Person) -> None:
        person.lost_pixel_frames += 1
        if person.lost_pixel_frames == 1 and person.seen_pixel_frames < self.config.learn_pixel_frames:
            person.gallery = Gallery()  # a glimpse, or no face at all: nobody to know again
        if person.lost_pixel_frames > self.config.forget_pixel_frames:
            person.last = None

    @staticmethod
    def _seen(person: Person, landmarks: NDArray[np.float32], presence: float) -> FaceTrack:
        person.region = person.last = region_from_landmarks(landmarks)
        person.lost_pixel_frames = 0
        person.seen_pixel_frames += 1
        return FaceTrack(landmarks=landmarks, score=presence, id=person.id)

    def _part(self, rgb: Image, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        """Where two people ended on one face, it belongs to the one whom it looks like; the other is hidden."""
        for a, b in itertools.combinations(list(tracks), 2):
            if a not in tracks or b not in tracks:
                continue
            if _apart(tracks[a].landmarks, tracks[b].landmarks) > 0.2:
                continue
            seen = self._look(rgb, a, tracks, looks)
            hidden = b if self._unlike(a, seen) <= self._unlike(b, seen) else a
            del tracks[hidden]
            looks.pop(hidden, None)
            self._met[(a, b)] = self._frame
            person = self.people[hidden]
            person.region = None
            person.lost_pixel_frames = 1
            # The place where it vanished is the other one's: nearness would prove nothing.
            person.last = None

    # ------------------------------------------------------------------ finding

    def _should_search(self, tracks: dict[int, FaceTrack]) -> bool:
        if not tracks:
            return True
        lost = any(0 < p.lost_pixel_frames <= self.config.watch_pixel_frames for p in self.people.values())
        every = self.config.lost_look_pixel_frames if lost else self.config.look_pixel_frames
        return self._frame % every == 0 and len(tracks) < self.config.most

    def _search(self, rgb: Image, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        """Find faces that nobody follows yet and name them."""
        tiles = not tracks and self._alone % self.config.search_pixel_frames == 0
        found: list[tuple[Detection, NDArray[np.float32], float]] = []
        for detection in self._detector.detect(rgb, tiles=tiles):
            region = region_from_detection(detection)
            if region.side < 8 or any(self._near(detection, track) for track in tracks.values()):
                continue
            landmarks, presence = self._mesh.landmarks(rgb, region)
            if presence >= self.config.min_presence:
                # A second look from its own landmarks, as in `FaceTracker`.
                landmarks, presence = self._mesh.landmarks(rgb, region_from_landmarks(landmarks))
            if presence < self.config.min_presence:
                continue
            if all(_apart(landmarks, t.landmarks) > 0.2 for t in (*tracks.values(), *_as_tracks(found))):
                found.append((detection, landmarks, presence))
        found = found[: max(self.config.most - len(tracks), 0)]
        for index, person in self._names(rgb, found, tracks):
            _, landmarks, presence = found[index]
            tracks[person.id] = self._seen(person, landmarks, presence)

    @staticmethod
    def _near(detection: Detection, track: FaceTrack) -> bool:
        region = region_from_landmarks(track.landmarks)
        return math.hypot(detection.centre[0] - region.x, detection.centre[1] - region.y) < 0.2 * region.side

    def _names(
        self,
        rgb: Image,
        found: list[tuple[Detection, NDArray[np.float32], float]],
        tracks: dict[int, FaceTrack],
    ) -> list[tuple[int, Person]]:
        """Who the found faces are: (index, person), the surest first; people not known so far get a new id."""
        lost = [p for p in self.people.values() if p.id not in tracks]
        seen = [looks_of(rgb, landmarks) for _, landmarks, _ in found] if lost else []
        pairs = []
        for i, (detection, _, _) in enumerate(found):
            for person in lost:
                unlike = person.gallery.unlike(seen[i]) if person.gallery else SAME
                here = person.last is not None and _close(detection, person.last)
                # A short gap in the same place: the same person, unless somebody else fits better.
                if here or unlike < SAME:
                    pairs.append((unlike - (SAME if here else 0.0), i, person))
        named: list[tuple[int, Person]] = []
        for _, i, person in sorted(pairs, key=lambda pair: pair[0]):
            if all(i != other and person is not known for other, known in named):
                named.append((i, person))
        for i in range(len(found)):
            if all(i != other for other, _ in named):
                new = Person(id=max(self.people, default=-1) + 1)
                self.people[new.id] = new
                named.append((i, new))
        return named

    # ------------------------------------------------------------------ telling apart

    def _look(self, rgb: Image, id: int, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> Looks:
        if id not in looks:
            looks[id] = looks_of(rgb, tracks[id].landmarks)
        return looks[id]

    def _unlike(self, id: int, seen: Looks) -> float:
        gallery = self.people[id].gallery
        return gallery.unlike(seen) if gallery else 2 * SAME

    def _tell_apart(self, rgb: Image, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        """Two that met and each look like the other change their names."""
        for a, b in itertools.combinations(sorted(tracks), 2):
            pair = (a, b)
            if _distance(tracks[a], tracks[b]) < self.config.met:
                self._met[pair] = self._frame
            met = self._met.get(pair)
            if met is None or not (self.people[a].gallery and self.people[b].gallery):
                continue
            if self._frame - met > self.config.watch_pixel_frames:
                del self._met[pair]
                self._evidence.pop(pair, None)
                continue
            one, two = self._look(rgb, a, tracks, looks), self._look(rgb, b, tracks, looks)
            wrong = self._unlike(a, two) + self._unlike(b, one) - self._unlike(a, one) - self._unlike(b, two)
            history = self._evidence.setdefault(pair, [])
            history.append(wrong)
            del history[: -self.config.agree_pixel_frames]
            if len(history) == self.config.agree_pixel_frames and float(np.mean(history)) < -self.config.margin:
                self._swap(a, b, tracks, looks)
                history.clear()

    def _swap(self, a: int, b: int, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        one, two = self.people[a], self.people[b]
        one.region, two.region = two.region, one.region
        one.last, two.last = two.last, one.last
        tracks[a], tracks[b] = (
            FaceTrack(landmarks=tracks[b].landmarks, score=tracks[b].score, id=a),
            FaceTrack(landmarks=tracks[a].landmarks, score=tracks[a].score, id=b),
        )
        looks[a], looks[b] = looks[b], looks[a]

    def _learn(self, rgb: Image, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        """Note what people look like, where it is certain who they are."""
        for id in tracks:
            gallery = self.people[id].gallery
            if gallery and self._frame % self.config.learn_pixel_frames:
                continue
            if any(id in pair for pair in self._met) and gallery:
                continue
            gallery.add(self._look(rgb, id, tracks, looks))

    def _recognise(self, rgb: Image, tracks: dict[int, FaceTrack], looks: dict[int, Looks]) -> None:
        """Somebody new who looks like somebody lost, now that the face shows better, is that one."""
        for id in list(tracks):
            person = self.people[id]
            if person.seen_pixel_frames > self.config.young_pixel_frames or id not in looks:
                continue
            others = [p for p in self.people.values() if p.id not in tracks and p.id < id and p.gallery]
            known = min(others, key=lambda p: p.gallery.unlike(looks[id]), default=None)
            if known is None or known.gallery.unlike(looks[id]) >= SAME:
                continue
            known.region, known.last, known.lost_pixel_frames = person.region, person.last, 0
            known.seen_pixel_frames += person.seen_pixel_frames
            track = tracks.pop(id)
            tracks[known.id] = FaceTrack(landmarks=track.landmarks, score=track.score, id=known.id)
            looks[known.id] = looks.pop(id)
            del self.people[id]
            self._met = {pair: frame for pair, frame in self._met.items() if id not in pair}


def _as_tracks(found: list[tuple[Detection, NDArray[np.float32], float]]) -> list[FaceTrack]:
    return [FaceTrack(landmarks=landmarks, score=score, id=-1) for _, landmarks, score in found]


def _close(detection: Detection, last: Region) -> bool:
    return math.hypot(detection.centre[0] - last.x, detection.centre[1] - last.y) < 0.5 * last.side


def _apart(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    """Mean distance of the landmarks of two faces over the size of the larger."""
    size = max(float(np.ptp(points[:, :2], axis=0).max()) for points in (one, two))
    return float(np.linalg.norm(one[:, :2] - two[:, :2], axis=1).mean()) / max(size, 1e-6)


def _distance(one: FaceTrack, two: FaceTrack) -> float:
    """Distance of two faces' centres over the mean side of their squares."""
    a, b = region_from_landmarks(one.landmarks), region_from_landmarks(two.landmarks)
    return math.hypot(a.x - b.x, a.y - b.y) / max((a.side + b.side) / 2, 1e-6)
