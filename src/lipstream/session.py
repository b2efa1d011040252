"""The stages of lip-sync, pushed frame by frame: track, cut into takes, generate, give every source frame its mouth.

A file and a live stream are the same thing here: whoever has a source frame calls :meth:`Session.push`, and gets back
the frames that are finished. Memory is bounded by one chunk (0.48 s) of frames. The pipeline runs the first half
(:class:`Observer`) in a thread of its own.

:class:`TakeSession` is the bookkeeping, the same for every kind of model: what a take is and how its mouths get into a
frame is for its subclasses to say (:class:`Session` for the canvas, `fullsize_session.CropSession` for 512 px crops).

Time: model frame i stands at i / 25 s from the first source frame and hears that instant of the speech. A source frame
between two model frames gets the mean of their mouths' shapes, weighted by time (canvas), or the nearest one (crops).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.canvas import KNOWN_ROWS_PX, Alignment, FaceCanvas, Float
from lipstream.faces.composite import Compositor, Patch, joined
from lipstream.faces.occlusion import Cover
from lipstream.faces.pose import FrontalGate
from lipstream.faces.steady import LiveSteady
from lipstream.faces.track import FaceTrack, FaceTracker
from lipstream.manner import PLAIN, Manner
from lipstream.media.reader import SourceFrame, replace_region
from lipstream.media.timeline import MODEL_FPS, GridSampler
from lipstream.mouth import CanvasFrame, Mouth, MouthModel, Take
from lipstream.options import Silence

QUIET_SAMPLES = 10 * 16_000  # the encoder's memory of loudness is two seconds; steady after five of them
MAX_GAP_MODEL_FRAMES = 12  # a face lost for longer ends its take
MAX_JUMP_CROP_PX = 60.0  # more than half the distance between the eyes from one frame to the next is a cut
# So is another face in the same place. Mean difference of nose and cheeks on the canvas, of 255: at most 14 from frame
# to frame of 58 clips (synthetic, GRID and moving heads), more than 18 between 99 % of pairs of people.
MAX_CHANGE = 18.0
# A mouth comes and goes in a fifth of a second where its face is lost, turns away or is covered.
FADE_SECONDS = 0.2
MAX_COVERED = 0.3  # of the mouth's mask; beyond it, the frame stays as it is

FaceT = TypeVar("FaceT")  # where a face is on its frame
ViewT = TypeVar("ViewT")  # what the networks see of it
ViewT_contra = TypeVar("ViewT_contra", contravariant=True)
MouthT = TypeVar("MouthT")  # what they make


class AnyTake(Protocol[ViewT_contra, MouthT]):
    """State of one face's uninterrupted stretch of video: `mouth.Take`, `fullsize.FullSizeTake`."""

    @property
    def next_pixel_frames(self) -> int:
        """How many frames the next step takes: 9, then 12."""
        ...

    def step(self, frames: Sequence[ViewT_contra], speech: Tensor, /) -> list[MouthT]:
        """One chunk: as many views and rows of speech as ``next_pixel_frames``, as many mouths."""
        ...


@dataclass(frozen=True)
class Face:
    """A tracked face on its frame."""

    alignment: Alignment
    field: Float
    id: int
    covered: Float | None = None  # [CANVAS_PX, CANVAS_PX] in 0..1: where something stands before the face


@dataclass(frozen=True)
class Observed(Generic[FaceT, ViewT]):
    """A source frame and the face on it, if any.

    Attributes:
        face, view: None where the frame is to stay as it is, and fades are to lead to it.
        cut: this face, or this picture, does not continue the one before.
    """

    frame: SourceFrame
    face: FaceT | None
    view: ViewT | None
    cut: bool


@dataclass(frozen=True)
class _Placed(Generic[FaceT, ViewT]):
    """An observed frame and the number of its shot, which counts the cuts so far.

    The model's grid may skip the frame that carries the cut (sources above 25 fps) or see it twice (below), so that
    takes go by shots and not by the mark itself.
    """

    observed: Observed[FaceT, ViewT]
    shot: int


@dataclass(frozen=True)
class SyncedFrame:
    """One output frame.

    Attributes:
        frame: the frame to show or write; the very source frame where ``synced`` is False.
        synced: whether a generated mouth was put in.
        patch: the changed pixels before encoding (None when nothing changed).
    """

    index: int
    pts: int
    time_base: Fraction
    frame: SourceFrame
    synced: bool
    patch: Patch | None


class Observer:
    """First half: where is the face, and what does the codec see of it.

    Args:
        live: frames given to :meth:`step` are shown as they come: landmarks are freed of their tremor without a look
            ahead. Those given to :meth:`look` are the caller's to steady.
    """

    def __init__(self, canvas: FaceCanvas, live: bool = True) -> None:
        self._canvas = canvas
        self._steady = LiveSteady() if live else None
        self._frontal = FrontalGate()
        self._cover = Cover()
        self._face_before: Face | None = None
        self._canvas_before: CanvasFrame | None = None  # of the last frame that was not passed

    @cached_property
    def _tracker(self) -> FaceTracker:
        return FaceTracker()

    def step(self, frame: SourceFrame) -> Observed[Face, CanvasFrame]:
        """Track the only face of one frame; frames come in order of time."""
        track = self._tracker.step(frame.image)
        return self.look(frame, track if self._steady is None else self._steady.step(track, frame.seconds))

    def look(self, frame: SourceFrame, track: FaceTrack | None, cut: bool = False) -> Observed[Face, CanvasFrame]:
        """What there is to see of a face that somebody else tracked.

        Args:
            cut: the picture itself does not continue the one before.
        """
        if cut:
            self._frontal.reset()
        if track is None:
            return Observed(frame, None, None, cut)
        alignment = self._canvas.align(track.landmarks)
        field = self._canvas.field(track.landmarks, alignment)
        canvas = CanvasFrame(field, self._canvas.texture(frame.image, field, alignment))
        face = Face(alignment, field, track.id)
        cut = cut or (self._face_before is not None and _moved(self._face_before, face))
        self._face_before = face
        if cut:
            self._cover.reset()
        frontal = self._frontal.step(track.landmarks)
        covered, share = self._cover.step(canvas.texture, frontal)
        if not frontal or share > MAX_COVERED:
            return Observed(frame, None, None, cut)
        if self._canvas_before is not None and not cut:
            cut = _look_change(self._canvas_before, canvas) > MAX_CHANGE
        self._canvas_before = canvas
        return Observed(frame, replace(face, covered=covered), canvas, cut)


def _moved(before: Face, face: Face) -> bool:
    """Whether it is another face, or it leapt (the old crop's origin seen in the new crop)."""
    if before.id != face.id:
        return True
    origin = before.alignment.inverse[:, 2]
    moved = face.alignment.matrix[:, :2] @ origin + face.alignment.matrix[:, 2]
    return bool(np.hypot(moved[0], moved[1]) > MAX_JUMP_CROP_PX)


def _look_change(before: CanvasFrame, canvas: CanvasFrame) -> float:
    """How differently nose and cheeks look, mean absolute difference of 255."""
    known = np.s_[2:KNOWN_ROWS_PX:4, 4:-4:4]
    return float(np.abs(canvas.texture[known].astype(np.float32) - before.texture[known]).mean())


class TakeSession(ABC, Generic[FaceT, ViewT, MouthT]):
    """Second half: generate and compose, whatever the model.

    Args:
        time_base: unit of the source's pts.
        rows: ``rows(start, stop)`` gives the speech encoder's rows [stop - start, D] of those model frames; silence
            where the speech has ended.
        manner: how the mouth speaks, and what it does in silence.
    """

    #: Kinds of silence in which the source's own mouth shows.
    _gives_way: tuple[Silence, ...] = ("source",)

    def __init__(self, time_base: Fraction, rows: Callable[[int, int], Tensor], manner: Manner = PLAIN) -> None:
        self._rows, self._manner = rows, manner
        self._grid: GridSampler[_Placed[FaceT, ViewT]] = GridSampler(time_base)
        self._time_base = time_base
        self._origin: int | None = None
        self._shot = 0
        self._waiting: deque[_Placed[FaceT, ViewT]] = deque()
        self._mouths: dict[int, tuple[int, MouthT]] = {}  # model frame -> (shot, mouth)
        self._quiet: dict[int, float] = {}  # model frame -> how much of it is silence, where that shows the source
        self._passed: tuple[float, int] | None = None  # time (s) and shot of the last frame that stayed as it was
        self._decided = 0  # model frames below this have their mouth (or none, where no face showed)
        self._take: AnyTake[ViewT, MouthT] | None = None
        self._take_shot = 0
        self._chunk: list[ViewT] = []
        self._held: ViewT | None = None  # the last face of the take
        self._missing = 0

    @abstractmethod
    def _new_take(self) -> AnyTake[ViewT, MouthT]:
        """A take for the next stretch of video."""

    @abstractmethod
    def _patch(
        self,
        image: NDArray[np.uint8],
        face: FaceT,
        mouth: MouthT,
        after: MouthT | None,
        share: float,
        strength: float,
    ) -> Patch | None:
        """Put a mouth into an image; where ``after`` is given, the image stands ``share`` of the way towards it.

        ``strength`` is how much of the mouth there is to be, 1 or on the way between the source's mouth and it.
        """

    def _own(self, image: NDArray[np.uint8], face: FaceT, quiet: float) -> Patch | None:
        """What becomes of the source's own mouth where ``quiet`` (0..1) of the other gives way to it."""
        return None

    def _speak(self, take: AnyTake[ViewT, MouthT], views: list[ViewT], start: int) -> list[MouthT]:
        """One step of a take that begins at model frame ``start``."""
        return take.step(views, self._rows(start, start + len(views)))

    def push(self, observed: Observed[FaceT, ViewT]) -> list[SyncedFrame]:
        """Take the next source frame; gives the frames that are finished now."""
        if self._origin is None:
            self._origin = observed.frame.pts
        self._shot += observed.cut
        placed = _Placed(observed, self._shot)
        self._waiting.append(placed)
        for shown in self._grid.push(observed.frame.pts, placed):
            self._model_frame(shown)
        return list(self._finished(final=False))

    def finish(self) -> list[SyncedFrame]:
        """No more frames: generate the rest."""
        for shown in self._grid.finish():
            self._model_frame(shown)
        self._end_take()
        return list(self._finished(final=True))

    # ------------------------------------------------------------------ model side

    def _model_frame(self, shown: _Placed[FaceT, ViewT]) -> None:
        """Advance the 25 fps grid by one frame."""
        if self._take is not None and (shown.shot != self._take_shot or self._missing > MAX_GAP_MODEL_FRAMES):
            self._end_take()
        view = shown.observed.view
        if view is None:
            self._missing += 1
        else:
            self._missing = 0
            if self._take is None:
                self._take, self._take_shot = self._new_take(), shown.shot
        if self._take is None:
            self._decided += 1
            return
        # A short gap holds the last face, so that the take's history stays whole; its frames pass through anyway.
        self._held = self._held if view is None else view
        assert self._held is not None  # a take begins with a face
        self._chunk.append(self._held)
        if len(self._chunk) == self._take.next_pixel_frames:
            self._generate()

    def _generate(self) -> None:
        """Run the take on the gathered chunk, padded at the end of a take."""
        assert self._take is not None
        valid, need = len(self._chunk), self._take.next_pixel_frames
        frames = self._chunk + [self._chunk[-1]] * (need - valid)
        mouths = self._speak(self._take, frames, self._decided)
        gives_way = self._manner.silence in self._gives_way
        quiet = self._manner.quiet(self._decided, self._decided + need) if gives_way else None
        # Where a source frame shows for long, most model frames belong to nobody: they are not kept.
        wanted = {place + step for place, _ in map(self._place, self._waiting) for step in (0, 1)}
        for step, mouth in enumerate(mouths[:valid]):
            if self._decided in wanted:
                self._mouths[self._decided] = (self._take_shot, mouth)
                if quiet is not None:
                    self._quiet[self._decided] = float(quiet[step])
            self._decided += 1
        self._chunk = []

    def _end_take(self) -> None:
        if self._take is not None and self._chunk:
            self._generate()
        self._take, self._held, self._missing = None, None, 0

    # --------------------------------------------------------------- picture side

    def _place(self, placed: _Placed[FaceT, ViewT]) -> tuple[int, float]:
        """Where a source frame stands: the model frame at or before it, and its share of the way to the next."""
        place = (placed.observed.frame.pts - (self._origin or 0)) * self._time_base * MODEL_FPS
        lower = int(place)
        share = float(place - lower)
        # Time bases like 1/90000 round; a hair beside a model frame is that model frame.
        if share > 0.98:
            return lower + 1, 0.0
        return lower, share if share > 0.02 else 0.0

    def _finished(self, final: bool) -> Iterator[SyncedFrame]:
        while self._waiting:
            lower, share = self._place(self._waiting[0])
            if not final and (self._decided < lower + (2 if share else 1) or not self._sees_ahead()):
                return
            strength = self._fade(self._waiting[0])
            yield self._compose(self._waiting.popleft(), min(lower, self._decided - 1), share, strength)
            for old in [i for i in self._mouths if i < lower]:
                del self._mouths[old]
                self._quiet.pop(old, None)

    def _seconds(self, placed: _Placed[FaceT, ViewT]) -> float:
        return float((placed.observed.frame.pts - (self._origin or 0)) * self._time_base)

    def _sees_ahead(self) -> bool:
        """Whether it is known if the first waiting frame lies in a fade."""
        first, newest = self._waiting[0], self._waiting[-1]
        return newest.shot != first.shot or self._seconds(newest) - self._seconds(first) >= FADE_SECONDS

    def _fade(self, placed: _Placed[FaceT, ViewT]) -> float:
        """How much of the new mouth a frame gets: less near a frame of the same shot that stays as it was, 0 on it."""
        now = self._seconds(placed)
        if placed.observed.view is None:
            self._passed = now, placed.shot
            return 0.0
        gaps = [FADE_SECONDS]
        if self._passed is not None and self._passed[1] == placed.shot:
            gaps.append(now - self._passed[0])
        for later in self._waiting:
            ahead = self._seconds(later) - now
            if later.shot != placed.shot or ahead >= FADE_SECONDS:
                break
            if later.observed.view is None:
                gaps.append(ahead)
                break
        u = min(gaps) / FADE_SECONDS
        return u * u * (3 - 2 * u)

    def _mouth(self, model_frame: int, shot: int) -> MouthT | None:
        """The mouth of a model frame, if it was generated for this shot."""
        made_for, mouth = self._mouths.get(model_frame, (shot, None))
        return mouth if made_for == shot else None

    def _compose(self, placed: _Placed[FaceT, ViewT], lower: int, share: float, strength: float) -> SyncedFrame:
        frame, face = placed.observed.frame, placed.observed.face
        mouth = self._mouth(lower, placed.shot)
        after = self._mouth(lower + 1, placed.shot) if share else None
        if mouth is None:  # the shot, or its face, begins between two model frames
            mouth, after = after, None
        patch = None
        if face is not None and mouth is not None and strength > 0:
            quiet, image = self._quiet.get(lower, 0.0), frame.image
            own = self._own(image, face, strength * quiet) if quiet else None
            if own is not None:
                image = own.on(image)
            if quiet < 1:
                patch = self._patch(image, face, mouth, after, share, strength * (1 - quiet))
            patch = own if patch is None else patch if own is None else joined(own, patch, image)
        if patch is None:
            return SyncedFrame(frame.index, frame.pts, frame.time_base, frame, False, None)
        changed = replace_region(frame, patch.rgb, patch.box, (patch.alpha > 0).astype(np.float32))
        return SyncedFrame(frame.index, frame.pts, frame.time_base, changed, True, patch)


class Session(TakeSession[Face, CanvasFrame, Mouth]):
    """The session of the canvas model.

    Args:
        model: the networks.
        time_base, rows, manner: see :class:`TakeSession`.
        seed: of all noise.
    """

    def __init__(
        self,
        model: MouthModel,
        time_base: Fraction,
        rows: Callable[[int, int], Tensor],
        seed: int = 0,
        manner: Manner = PLAIN,
    ) -> None:
        super().__init__(time_base, rows, manner)
        self._model, self._seed = model, seed
        self._compositor = Compositor(model.canvas)

    def _new_take(self) -> Take:
        return Take(self._model, self._seed, self._manner.strength)

    def _speak(self, take: AnyTake[CanvasFrame, Mouth], views: list[CanvasFrame], start: int) -> list[Mouth]:
        stop = start + len(views)
        speech = self._rows(start, stop)
        if self._manner.silence != "close":
            return take.step(views, speech)
        assert isinstance(take, Take)
        return take.step(views, speech, self._manner.quiet(start, stop))

    def _patch(
        self, image: NDArray[np.uint8], face: Face, mouth: Mouth, after: Mouth | None, share: float, strength: float
    ) -> Patch | None:
        """Shapes are mixed by time, paint comes from the nearest mouth.

        A fade moves the source's own lips less far: pictures laid over each other would show two mouths.
        """
        field, nearest = mouth.field, mouth
        if after is not None:
            field = mouth.field + np.float32(share) * (after.field - mouth.field)
            nearest = mouth if share < 0.5 else after
        gate = nearest.gate
        if strength < 1:
            field = face.field + np.float32(strength) * (field - face.field)
            gate = np.float32(strength) * gate
        return self._compositor(image, face.alignment, face.field, field, nearest.paint, gate, face.covered)


class SpeechRows:
    """Rows of the speech encoder by model frame, pulled from a stream of samples as they are needed.

    Args:
        read: ``read(samples)`` gives the next samples of the speech (mono, 16 kHz), fewer at its end.
    """

    def __init__(
        self, model: MouthModel, read: Callable[[int], np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
    ) -> None:
        self._encoder = model.speech.stream_view(1)
        self._read = read
        self._kept: Tensor = torch.zeros(0, self._encoder.config.width)
        self._start = 0  # model frame of the first kept row
        self._ended = False
        self._silence: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D]; rows before ``start`` are forgotten."""
        while not self._ended and self._start + len(self._kept) < stop:
            samples = self._read(16_000)
            if len(samples):
                rows: Tensor = self._encoder(torch.from_numpy(samples)[None])[0]
            else:
                rows, self._ended = self._encoder.flush()[0], True
            self._kept = torch.cat([self._kept, rows])
        self._kept = self._kept[max(0, start - self._start) :]
        self._start = max(self._start, start)
        rows = self._kept[: stop - start]
        missing = stop - start - len(rows)
        return torch.cat([rows, self._quiet().expand(missing, -1)]) if missing else rows

    def _quiet(self) -> Tensor:
        """The row of steady silence [1, D]."""
        if self._silence is None:
            self._silence = self._encoder.stream_view(1)(torch.zeros(1, QUIET_SAMPLES))[0, -1:]
        return self._silence
