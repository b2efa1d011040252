"""What stands behind `LipSync`: the same stages for every model, chosen once when it is loaded.

An engine makes the three things that a run needs (who looks at frames, who hears speech, who generates) and knows
nothing of files. `CanvasEngine` is the small model that works on the face canvas; `lipstream.fullsize_engine` holds the
official sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.track import FaceTrack
from lipstream.manner import Manner
from lipstream.media.bounce import BouncingReader
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.timeline import Fit, Length
from lipstream.mouth import MouthModel
from lipstream.options import Silence, SyncOptions
from lipstream.session import Observed, Observer, Session, SpeechRows, TakeSession

#: The next samples of the speech (mono, 16 kHz), fewer at its end, none after it.
ReadSpeech = Callable[[int], NDArray[np.float32]]
#: Feature rows [stop - start, D] of the model frames start .. stop. Behind the end of the speech: silence for the small
#: model, the last row again at full size.
Rows = Callable[[int, int], Tensor]


class Observes(Protocol):
    """First half of a session: looks at a face."""

    def step(self, frame: SourceFrame) -> Observed[Any, Any]:
        """Track the only face of one frame; frames come in order of time."""
        ...

    def look(self, frame: SourceFrame, track: FaceTrack | None, cut: bool = False) -> Observed[Any, Any]:
        """What there is to see of a face that somebody else tracked; ``cut``: the picture itself is a new one."""
        ...


class Engine(Protocol):
    """A loaded model.

    Attributes:
        silences: what it can do in silence; the first is its own choice.
        steadies: whether landmarks are freed of their tremor before it sees them.
    """

    silences: tuple[Silence, ...]
    steadies: bool

    @classmethod
    def refuses(cls, options: SyncOptions) -> str | None:
        """Why it cannot do what a run asks for, and what to leave out; None: it can. Known before it is loaded."""
        ...

    def frames(
        self, reader: VideoReader, speech_samples: int, length: Length = "bounce", fit: Fit = "audio"
    ) -> BouncingReader:
        """The source's frames of one run, cut or filled to the speech; see `timeline.FILLS`."""
        ...

    def observer(self, name: str = "the video") -> Observes:
        """Looks at the frames of one run; ``name`` is the video's, for messages."""
        ...

    def rows(self, read: ReadSpeech) -> Rows:
        """Hears the speech of one run."""
        ...

    def session(self, time_base: Fraction, rows: Rows, seed: int, manner: Manner) -> TakeSession[Any, Any, Any]:
        """Generates and composes one run.

        Raises:
            ValueError: it cannot speak in that manner.
        """
        ...


class CanvasEngine:
    """The small model (`lipstream.mouth`)."""

    silences: tuple[Silence, ...] = ("close", "source", "model")
    steadies = True

    @classmethod
    def refuses(cls, options: SyncOptions) -> str | None:
        """See :class:`Engine`."""
        return None

    def __init__(self, model: MouthModel) -> None:
        self.model = model

    def frames(
        self, reader: VideoReader, speech_samples: int, length: Length = "bounce", fit: Fit = "audio"
    ) -> BouncingReader:
        """See :class:`Engine`."""
        return BouncingReader(reader, speech_samples, length=length, fit=fit)

    def observer(self, name: str = "the video") -> Observer:
        """See :class:`Engine`."""
        return Observer(self.model.canvas)

    def rows(self, read: ReadSpeech) -> SpeechRows:
        """See :class:`Engine`; streaming, with bounded look-ahead."""
        return SpeechRows(self.model, read)

    def session(self, time_base: Fraction, rows: Rows, seed: int, manner: Manner) -> Session:
        """See :class:`Engine`."""
        return Session(self.model, time_base, rows, seed, manner)
