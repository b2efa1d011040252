"""What `--speaker` may say: which of the faces of a video gets the new words.

>>> parse_speaker("0.7,0.4@2.5")  # Speaker(kind="point", point=(0.7, 0.4), seconds=2.5)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["auto", "largest", "left", "right", "point", "picture"]
WORDS: dict[str, Kind] = {"auto": "auto", "largest": "largest", "left": "left", "right": "right"}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A face of a video.

    Attributes:
        kind: "auto" is whoever speaks in the source, else the largest; "left" and "right" are as the viewer sees them,
            in the first frame that shows two faces; "point" is who is at a place and time; "picture" is who looks like
            somebody in a picture.
        text: as it was given.
        point: (x, y) px, or fractions of the picture where both are at most 1.
        seconds: time of the point, from the first frame.
        path: the picture.
    """

    kind: Kind
    text: str
    point: tuple[float, float] | None = None
    seconds: float = 0.0
    path: Path | None = None


def parse_voice(text: str) -> tuple[str, str]:
    """A further speaker and their speech, (who, file), from WHO=FILE.

    Raises:
        ValueError: it is not of that form.
    """
    who, _, file = (part.strip() for part in text.partition("="))
    if not (who and file):
        raise ValueError(f"must be WHO=FILE, e.g. right=b.wav, got '{text}'")
    return who, file


def parse_speaker(text: str) -> Speaker:
    """A speaker from an option's value.

    Raises:
        ValueError: it is none of the forms.
    """
    word = text.strip()
    if word.lower() in WORDS:
        return Speaker(kind=WORDS[word.lower()], text=word)
    if word.lower().endswith(PICTURES):
        return Speaker(kind="picture", text=word, path=Path(word))
    place, _, time = word.partition("@")
    try:
        x, y = (float(part) for part in place.split(","))
        seconds = float(time) if time else 0.0
    except ValueError:
        raise ValueError(
            f"unknown speaker '{text}': say auto, largest, left, right, X,Y or X,Y@SECONDS (pixels, or fractions of "
            f"the picture), or a picture of the person ({', '.join(PICTURES)})"
        ) from None
    if not (0 <= x < float("inf") and 0 <= y < float("inf") and 0 <= seconds < float("inf")):
        raise ValueError(f"speaker '{text}': place and time must not be negative")
    return Speaker(kind="point", text=word, point=(x, y), seconds=seconds)
