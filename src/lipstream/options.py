"""What one run of the pipeline may be told: one frozen dataclass, so that every caller passes the same thing along.

>>> lipsync("talk.mp4", "speech.wav", "out.mp4", options=SyncOptions(length="loop", quality="best"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lipstream.media.encoder import Quality
from lipstream.media.timeline import FILLS, Fit, Length
from lipstream.speaker import parse_speaker

Silence = Literal["close", "source", "model"]

MAX_DELAY_MS = 3_600_000
MAX_STRENGTH = 2.0


@dataclass(frozen=True, kw_only=True)
class SyncOptions:
    """The wishes of one run; every field has a default.

    Attributes:
        fit: who decides how long the result is, "audio" or "video". None: "video" where `length` is "silence",
            else "audio".
        length: how the other one is made to last as long. "bounce" (default), "loop" and "freeze" fill pictures,
            "silence" (default of fit "video") fills speech, "cut" fills nothing: the result ends with the shorter one.
            What is too long is always cut.
        audio_delay_ms: the speech starts so much after the picture; a negative one drops its beginning.
        audio_track: which sound of the speech file, 1 is the first; None: the one marked as default, else the first.
        quality: preset of the video encoder; see `media.encoder`.
        crf: instead of the preset's own, 0..51, lower is better.
        copy_unchanged: take stretches of the picture in which nothing changed over from the source, bit for bit, where
            its format allows it; see `media.unchanged`.
        isolate: decode the video in a limited process all the way; see `media.isolated`.
        speaker: whose lips follow the speech: "auto" (whoever speaks in the source, else the largest face), "largest",
            "left", "right", "X,Y@SECONDS" (pixels or fractions) or a picture of the person.
        voices: further speakers of the same video, (speaker, speech file) each; the result's sound is the mix.
        strength: how far the lips move around the closed mouth, 0..2; 1 is as the model has it, 0.7 to 1.3 is safe.
        silence: where the speech is silent, "close" shuts the lips, "source" shows the source's own mouth, "model"
            leaves it to the model. None: "close" for the small model, "model" at full size.

    Raises:
        ValueError: values that do not exist or do not go together.
    """

    length: Length | None = None
    fit: Fit | None = None
    audio_delay_ms: int = 0
    audio_track: int | None = None
    quality: Quality = "good"
    crf: int | None = None
    copy_unchanged: bool = False
    isolate: bool = False
    speaker: str = "auto"
    voices: tuple[tuple[str, str], ...] = ()
    strength: float = 1.0
    silence: Silence | None = None

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
            ("length", self.length, get_args(Length)),
            ("fit", self.fit, get_args(Fit)),
            ("quality", self.quality, get_args(Quality)),
            ("silence", self.silence, get_args(Silence)),
        )
        for name, value, known in choices:
            if value is not None and value not in known:
                raise ValueError(f"unknown {name} '{value}': there are {', '.join(known)}")
        if self.resolved_length not in FILLS[self.resolved_fit]:
            fills = ", ".join(FILLS[self.resolved_fit])
            raise ValueError(f"length '{self.length}' does not go with fit '{self.fit}', which takes one of {fills}")
        if abs(self.audio_delay_ms) > MAX_DELAY_MS:
            raise ValueError(f"audio delay must lie within {MAX_DELAY_MS} ms either way, got {self.audio_delay_ms}")
        if self.audio_track is not None and self.audio_track < 1:
            raise ValueError(f"audio tracks count from 1, got {self.audio_track}")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ValueError(f"crf must lie in 0..51, got {self.crf}")
        if self.crf is not None and self.quality == "lossless":
            raise ValueError(f"quality 'lossless' takes no crf, got {self.crf}")
        if self.copy_unchanged and self.quality == "lossless":
            raise ValueError(
                "copy_unchanged does not go with quality 'lossless', which changes nothing anyway; choose one"
            )
        if self.copy_unchanged and self.isolate:
            raise ValueError("copy_unchanged does not go with isolate: it decodes packets here; choose one")
        if not 0 <= self.strength <= MAX_STRENGTH:
            raise ValueError(f"strength must lie in 0..{MAX_STRENGTH:g}, got {self.strength}")
        speakers = [parse_speaker(text) for text in (self.speaker, *(name for name, _ in self.voices))]
        for i, speaker in enumerate(speakers):
            if speaker in speakers[:i]:
                raise ValueError(f"speaker '{speaker.text}' has two voices; name another one for the second")

    @property
    def resolved_fit(self) -> Fit:
        """Who decides the duration."""
        return self.fit or ("video" if self.length == "silence" else "audio")

    @property
    def resolved_length(self) -> Length:
        """How what is too short is filled."""
        return self.length or FILLS[self.resolved_fit][0]
