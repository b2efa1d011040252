"""All mouths of one run: the faces that speak, each with its own speech, in one pass over the picture.

One voice is the usual case; with more, every voice has its own observer, take and speech, and what they change goes
into the same frame one after the other.

    voices = Voices(engine, Cast(reader, speakers), reads, reader.time_base, seed, options)
    for frame in source:
        for looked in voices.look(frame):
            for done in voices.push(looked): ...
    for looked in voices.look_at_rest(): ...
    voices.finish()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from lipstream.casting import Cast
from lipstream.engines import Engine, ReadSpeech
from lipstream.faces.composite import joined
from lipstream.faces.steady import Steady
from lipstream.faces.track import FaceTrack
from lipstream.manner import Manner
from lipstream.media.reader import SourceFrame, replace_region
from lipstream.media.silence import SpeechEars
from lipstream.options import SyncOptions
from lipstream.session import Observed, SyncedFrame, TakeSession

Looked = list[Observed[Any, Any]]


def manner_of(engine: Engine, options: SyncOptions, ears: SpeechEars) -> Manner:
    """How a voice speaks.

    Raises:
        ValueError: the model cannot do that in silence.
    """
    silence = options.silence or engine.silences[0]
    if silence not in engine.silences:
        known = ", ".join(engine.silences)
        raise ValueError(f"this model has no silence '{silence}': there are {known}")
    return Manner(strength=options.strength, silence=silence, quiet=ears.quiet)


@dataclass
class _Voice:
    observer: Any
    session: TakeSession[Any, Any, Any]
    ears: SpeechEars
    ready: deque[SyncedFrame]


class Voices:
    """The stages of a run, for one speaker or several.

    Args:
        cast: whose faces; as many as ``reads``.
        reads: the samples of each speech.
        time_base: of the frames.
        seed: of all noise.
    """

    def __init__(
        self,
        engine: Engine,
        cast: Cast,
        reads: Sequence[ReadSpeech],
        time_base: Fraction,
        seed: int,
        options: SyncOptions,
    ) -> None:
        self._cast = cast
        self._steady = Steady[SourceFrame]() if engine.steadies else None
        self._voices: list[_Voice] = []
        for read in reads:
            ears = SpeechEars(read)
            session = engine.session(time_base, engine.rows(ears.read), seed, manner_of(engine, options, ears))
            self._voices.append(_Voice(engine.observer(cast.video), session, ears, deque()))

    @property
    def mute(self) -> list[bool]:
        """Of every voice: whether there was no speech in it (unknown, and False, for silence "model")."""
        return [voice.ears.mute for voice in self._voices]

    def look(self, frame: SourceFrame) -> list[Looked]:
        """First half: find the faces in a frame; frames come in order of time.

        Gives what there is to see in the frames whose faces are known well enough now, see `faces.steady`.
        """
        cut, tracks = self._cast.step(frame)
        if self._steady is None:
            return [self._observe(frame, tracks, cut)]
        return [self._observe(*known) for known in self._steady.push(frame, frame.seconds, tracks, cut)]

    def look_at_rest(self) -> list[Looked]:
        """First half: there are no more frames."""
        return [] if self._steady is None else [self._observe(*known) for known in self._steady.finish()]

    def _observe(self, frame: SourceFrame, tracks: Sequence[FaceTrack | None], cut: bool) -> Looked:
        pairs = zip(self._voices, tracks, strict=True)
        return [voice.observer.look(frame, track, cut) for voice, track in pairs]

    def push(self, looked: Looked) -> list[SyncedFrame]:
        """Second half: take what was found; gives the frames that are finished now."""
        for voice, observed in zip(self._voices, looked, strict=True):
            voice.ready.extend(voice.session.push(observed))
        return self._joined()

    def finish(self) -> list[SyncedFrame]:
        """No more frames: generate the rest."""
        for voice in self._voices:
            voice.ready.extend(voice.session.finish())
        return self._joined()

    def _joined(self) -> list[SyncedFrame]:
        """Frames that every voice has finished."""
        done = []
        while all(voice.ready for voice in self._voices):
            first, *others = (voice.ready.popleft() for voice in self._voices)
            for other in others:
                first = _with(first, other)
            done.append(first)
        return done


def _with(first: SyncedFrame, other: SyncedFrame) -> SyncedFrame:
    """A frame with the changes of both; where they overlap, the second's."""
    if other.patch is None:
        return first
    if first.patch is None:
        return other
    patch = other.patch
    frame = replace_region(first.frame, patch.rgb, patch.box, (patch.alpha > 0).astype(np.float32))
    return replace(first, frame=frame, patch=joined(first.patch, patch, frame.image))
