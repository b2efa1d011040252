"""The session of the full-size models: clock, takes and shots as for the canvas, other crops, another paste-back.

    observer = CropObserver()
    session = CropSession(model, compositor, reader.time_base, rows, seed=0)
    for frame in reader:
        for done in session.push(observer.step(frame)): ...
    session.finish()

A source frame between two model frames gets the nearest one's mouth, in its own alignment: pictures, unlike the canvas'
shapes, cannot be mixed without ghosts. What stands before the face, and how its lips close in silence, is seen on the
face canvas as for the small model; neither has to do with the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.canvas import CANVAS_PX, Alignment, FaceCanvas
from lipstream.faces.composite import Compositor, Patch
from lipstream.faces.crop import CropAligner, CropCompositor, covered_on_crop, read_crop
from lipstream.faces.occlusion import Cover
from lipstream.faces.official import TEMPLATE
from lipstream.faces.pose import FrontalGate
from lipstream.faces.steady import LiveSteady
from lipstream.faces.track import FaceTrack, FaceTracker
from lipstream.fullsize import FullSizeModel, FullSizeTake
from lipstream.manner import PLAIN, Manner
from lipstream.media.reader import SourceFrame
from lipstream.mouth import SHUT_PX
from lipstream.session import MAX_COVERED, Face, Observed, TakeSession

Crop = NDArray[np.uint8]

MAX_JUMP_CROP_PX = 150.0  # the canvas' 60 px in the larger crop; more than half the distance between the eyes
# Between the eyes and on the nose, which the mask keeps, at a quarter of the size: mean difference of 255. Frame to
# frame at most 14.9 in 20 clips (GRID and moving heads, 60 frames each); half of all pairs of those clips exceed 38.
_KNOWN = np.s_[130:250, 160:352]
MAX_CHANGE = 22.0


@dataclass(frozen=True)
class CropFace:
    """Where a face is on its frame.

    Attributes:
        seen: the same face on the canvas: its shape, and what stands before it. None: a bare place.
    """

    alignment: Alignment
    id: int
    seen: Face | None = None


class CropObserver:
    """First half: where is the face, and its aligned crop.

    Args:
        live: as of `session.Observer`.
    """

    def __init__(self, canvas: FaceCanvas | None = None, live: bool = True) -> None:
        self._canvas = canvas or FaceCanvas()
        self._aligner = CropAligner(self._canvas)
        self._steady = LiveSteady() if live else None
        self._frontal = FrontalGate()
        self._cover = Cover()
        self._face_before: CropFace | None = None
        self._crop_before: Crop | None = None

    @cached_property
    def _tracker(self) -> FaceTracker:
        return FaceTracker()

    def step(self, frame: SourceFrame) -> Observed[CropFace, Crop]:
        """Track the only face of one frame; frames come in order of time."""
        track = self._tracker.step(frame.image)
        return self.look(frame, track if self._steady is None else self._steady.step(track, frame.seconds))

    def look(self, frame: SourceFrame, track: FaceTrack | None, cut: bool = False) -> Observed[CropFace, Crop]:
        """What there is to see of a face that somebody else tracked; see `session.Observer`."""
        if cut:
            self._aligner.reset()
            self._frontal.reset()
        if track is None:
            return Observed(frame, None, None, cut)
        if self._face_before is not None and self._face_before.id != track.id:
            self._aligner.reset()
        face = CropFace(self._aligner.step(track.landmarks), track.id)
        if not cut and self._face_before is not None and _moved(self._face_before, face):
            cut, face = True, self._afresh(track)
        self._face_before = face
        if cut:  # a change of looks alone is none here: it may be a hand
            self._cover.reset()
        frontal = self._frontal.step(track.landmarks)
        alignment = self._canvas.align(track.landmarks)
        field = self._canvas.field(track.landmarks, alignment)
        covered, share = self._cover.step(self._canvas.texture(frame.image, field, alignment), frontal)
        if not frontal or share > MAX_COVERED:
            return Observed(frame, None, None, cut)
        crop = read_crop(frame.image, face.alignment)
        if not cut and self._crop_before is not None and look_change(self._crop_before, crop) > MAX_CHANGE:
            cut, face = True, self._afresh(track)
            self._face_before, crop = face, read_crop(frame.image, face.alignment)
        self._crop_before = crop
        face = replace(face, seen=Face(alignment, field, track.id, covered))
        return Observed(frame, face, crop, cut)

    def _afresh(self, track: FaceTrack) -> CropFace:
        """The face after a cut: the framing of the one before is no part of its own."""
        self._aligner.reset()
        return CropFace(self._aligner.step(track.landmarks), track.id)


def _moved(face_before: CropFace, face: CropFace) -> bool:
    """Whether it is another face, or it leapt (the old crop's nose seen in the new crop)."""
    if face_before.id != face.id:
        return True
    nose = TEMPLATE[2]
    before, now = face_before.alignment.inverse, face.alignment.matrix
    moved = now[:, :2] @ (before[:, :2] @ nose + before[:, 2]) + now[:, 2] - nose
    return bool(np.hypot(moved[0], moved[1]) > MAX_JUMP_CROP_PX)


def look_change(before: Crop, after: Crop) -> float:
    """How differently two crops look around the nose: mean absolute difference, of 255."""
    small = [cv2.resize(crop[_KNOWN], None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA) for crop in (before, after)]
    return float(np.abs(small[0].astype(np.float32) - small[1]).mean())


class CropSession(TakeSession[CropFace, Crop, Crop]):
    """Second half. In silence the mouth gives way to the source's own, as it is or with its lips closed.

    Args:
        model: the networks.
        compositor: how crops go back.
        time_base, rows, manner: see :class:`TakeSession`.
        seed: of all noise.
    """

    _gives_way = ("source", "close")

    def __init__(
        self,
        model: FullSizeModel,
        compositor: CropCompositor,
        time_base: Fraction,
        rows: Callable[[int, int], Tensor],
        seed: int = 0,
        manner: Manner = PLAIN,
    ) -> None:
        super().__init__(time_base, rows, manner)
        self._model, self._compositor, self._seed = model, compositor, seed
        self._canvas = FaceCanvas()
        self._lips = Compositor(self._canvas)
        self._unpainted = np.zeros((CANVAS_PX, CANVAS_PX, 3), np.uint8)
        self._ungated = np.zeros((CANVAS_PX, CANVAS_PX), np.float32)

    def _new_take(self) -> FullSizeTake:
        return FullSizeTake(self._model, self._seed)

    def _patch(
        self, image: NDArray[np.uint8], face: CropFace, mouth: Crop, after: Crop | None, share: float, strength: float
    ) -> Patch | None:
        nearest = mouth if after is None or share < 0.5 else after
        covered, seen = None, face.seen
        if seen is not None and seen.covered is not None:
            places = self._canvas.places(seen.field, seen.alignment)
            covered = covered_on_crop(seen.covered, places, face.alignment)
        return self._compositor(image, face.alignment, nearest, strength, covered)

    def _own(self, image: NDArray[np.uint8], face: CropFace, quiet: float) -> Patch | None:
        """In silence "close" the source's own lips are moved together, as far as they are open: no network says how."""
        seen = face.seen
        if self._manner.silence != "close" or seen is None:
            return None
        weights, rest = self._canvas.lip_rulers()[0]
        gap = max(float(seen.field[..., 1].ravel() @ weights) + rest - SHUT_PX, 0.0)
        shut = seen.field - np.float32(quiet * gap) * self._canvas.gaping_field()
        return self._lips(image, seen.alignment, seen.field, shut, self._unpainted, self._ungated, seen.covered)
