"""How long a clip is: pixel frames, latent frames and chunks of the official networks, in integers (spec section 4.1).

The codec packs pixel frame 0 alone and then four at a time: latent frame 0 is pixel frame 0, latent frame k >= 1 is
pixel frames 4k-3 ... 4k, and it hears the audio rows of the same numbers (one row per pixel frame). A chunk is three
latent frames: 9 pixel frames first, 12 after that; where chunks begin is `media.timeline`'s to say.

Ours covers all of the speech and pads the last chunk (`latent_frames_covering`); the official scripts cut the video
down to whole chunks (`official_length`), so that up to half a second of speech is lost.
"""

from __future__ import annotations

from typing import NamedTuple

SAMPLES_PER_SECOND = 16_000
SAMPLES_PER_PIXEL_FRAME = 640
PIXEL_FRAMES_PER_LATENT_FRAME = 4
CHUNK_LATENT_FRAMES = 3


class OfficialLength(NamedTuple):
    """What the official scripts generate for a speech."""

    pixel_frames: int
    latent_frames: int

    @property
    def chunks(self) -> int:
        """How many chunks their loop runs; latent frames beyond a whole chunk are never generated."""
        return self.latent_frames // CHUNK_LATENT_FRAMES


def pixel_frames_of(latent_frames: int) -> int:
    """Pixel frames of a clip's first latent frames: 1 + 4 (T - 1)."""
    if latent_frames < 1:
        raise ValueError(f"a clip has at least one latent frame, got {latent_frames}")
    return 1 + PIXEL_FRAMES_PER_LATENT_FRAME * (latent_frames - 1)


def whole_latent_frames(pixel_frames: int) -> int:
    """Latent frames that lie wholly within so many pixel frames: 1 + (F - 1) // 4."""
    if pixel_frames < 1:
        raise ValueError(f"a clip has at least one pixel frame, got {pixel_frames}")
    return 1 + (pixel_frames - 1) // PIXEL_FRAMES_PER_LATENT_FRAME


def latent_frames_covering(pixel_frames: int) -> int:
    """Latent frames of the whole chunks that cover so many pixel frames; the last chunk's rest is padding."""
    covering = whole_latent_frames(pixel_frames + PIXEL_FRAMES_PER_LATENT_FRAME - 1)
    return -(-covering // CHUNK_LATENT_FRAMES) * CHUNK_LATENT_FRAMES


def audio_rows_of(latent_frame: int) -> tuple[int, int, int, int]:
    """The four feature rows that a latent frame hears: row 0 four times, then 4k-3 ... 4k."""
    if latent_frame < 0:
        raise ValueError(f"latent frames count from 0, got {latent_frame}")
    if latent_frame == 0:
        return 0, 0, 0, 0
    last = PIXEL_FRAMES_PER_LATENT_FRAME * latent_frame
    return last - 3, last - 2, last - 1, last


def official_length(speech_samples: int, *, min_latent_frames: int = 0, float_seconds: bool = False) -> OfficialLength:
    """What the official scripts make of a speech at 16 kHz: rounded down to whole chunks, at least one.

    Args:
        speech_samples: length at 16 kHz.
        min_latent_frames: their option of that name; taken as it is, not rounded to whole chunks.
        float_seconds: count frames as int(seconds * 25) in floating point, as the scripts do: 18,560 samples, exactly
            29 frames, are then 28. For parity only.
    """
    if speech_samples < 0:
        raise ValueError(f"speech_samples must not be negative, got {speech_samples}")
    frames = speech_samples // SAMPLES_PER_PIXEL_FRAME
    if float_seconds:
        frames = int(speech_samples / SAMPLES_PER_SECOND * 25)
    latent_frames = whole_latent_frames(max(frames, 1))
    latent_frames = max(latent_frames // CHUNK_LATENT_FRAMES * CHUNK_LATENT_FRAMES, CHUNK_LATENT_FRAMES)
    latent_frames = max(latent_frames, min_latent_frames)
    return OfficialLength(pixel_frames_of(latent_frames), latent_frames)
