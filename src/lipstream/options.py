"""What one run of the pipeline may be told: one frozen dataclass, so that every caller passes the same thing along.

>>> lipsync("talk.mp4", "speech.wav", "out.mp4", options=SyncOptions(length="loop", quality="best"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Length = Literal["cut", "loop", "bounce", "freeze", "silence"]
Fit = Literal["video", "audio"]
Quality = Literal["draft", "good", "best", "lossless"]

# What may fill the shorter side: pictures can be repeated, speech can only be followed by silence.
FILLS: dict[Fit, tuple[Length, ...]] = {"audio": ("bounce", "loop", "freeze", "cut"), "video": ("silence", "cut")}
MAX_DELAY_MS = 3_600_000


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

    Raises:
        ValueError: values that do not exist or do not go together.
    """

    length: Length | None = None
    fit: Fit | None = None
    audio_delay_ms: int = 0
    audio_track: int | None = None
    quality: Quality = "good"
    crf: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("length", self.length, get_args(Length)),
            ("fit", self.fit, get_args(Fit)),
            ("quality", self.quality, get_args(Quality)),
        ):
            if value is not None and value not in known:
                raise ValueError(f"unknown {name} '{value}': there are {', '.join(known)}")
        if self.resolved_length not in FILLS[self.resolved_fit]:
            fills = ", ".join(FILLS[self.resolved_fit])
            raise ValueError(
                f"length '{self.length}' does not go with fit '{self.resolved_fit}'; it takes one of {fills}"
            )
        if abs(self.audio_delay_ms) > MAX_DELAY_MS:
            raise ValueError(f"audio delay must lie within {MAX_DELAY_MS} ms either way, got {self.audio_delay_ms}")
        if self.audio_track is not None and self.audio_track < 1:
            raise ValueError(f"audio tracks count from 1, got {self.audio_track}")
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ValueError(f"crf must lie in 0..51, got {self.crf}")
        if self.crf is not None and self.quality == "lossless":
            raise ValueError(f"quality 'lossless' takes no crf, got {self.crf}")

    @property
    def resolved_fit(self) -> Fit:
        """Who decides the duration."""
        return self.fit or ("video" if self.length == "silence" else "audio")

    @property
    def resolved_length(self) -> Length:
        """How what is too short is filled."""
        return self.length or FILLS[self.resolved_fit][0]
