"""The clock: source frames at any rate <-> the model's 25 fps grid <-> 16 kHz speech, in integers only.

Times count from the first source frame. Model frame i stands at i/25 s and hears speech samples [640 i, 640 (i+1)).
The model sees, at i/25 s, the source frame that a player would show then; how a source frame between two model frames
gets its mouth is the session's to say. Unless told otherwise, frame counts follow the speech: a longer source is cut, a
shorter one plays forwards and backwards without repeating its end frames. Chunks are 9 pixel frames first and 12
after (3 latent frames each, the codec packing 1 + 4 + 4 and then 4 + 4 + 4).

    >>> timeline = Timeline(pts=[0, 1, 2], time_base=Fraction(1, 25), last_duration_pts=1, speech_samples=3200)
    >>> [timeline.source_index(k) for k in range(timeline.output_frames)]  # [0, 1, 2, 1, 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Literal, TypeVar

MODEL_FPS = 25
SPEECH_RATE = 16_000
SAMPLES_PER_MODEL_FRAME = SPEECH_RATE // MODEL_FPS
FIRST_CHUNK_PIXEL_FRAMES = 9
CHUNK_PIXEL_FRAMES = 12
# A frame is kept while at least half a model frame of speech is left when it starts.
TAIL = Fraction(1, 2 * MODEL_FPS)
# Containers end audio and video a codec frame or two apart: so close, both end together and all frames are kept.
SLACK = Fraction(1, 20)

# No filling frame is shorter: a last frame of one tick would be repeated thousands of times.
SHORTEST_FRAME = Fraction(1, 240)

Length = Literal["cut", "loop", "bounce", "freeze", "silence"]
Fit = Literal["video", "audio"]
# Who decides the duration -> what may fill the other one: pictures can be repeated, speech only followed by silence.
FILLS: dict[Fit, tuple[Length, ...]] = {"audio": ("bounce", "loop", "freeze", "cut"), "video": ("silence", "cut")}

T = TypeVar("T")


def model_frame_at(pts: int, time_base: Fraction) -> int:
    """The model frame nearest to a source timestamp counted from the first frame; halfway goes to the earlier."""
    ticks = 2 * MODEL_FPS * pts * time_base.numerator
    return -((time_base.denominator - ticks) // (2 * time_base.denominator))


def grid_frames_before(pts: int, time_base: Fraction) -> int:
    """How many model frames stand strictly before a source timestamp counted from the first frame."""
    return max(-(-MODEL_FPS * pts * time_base.numerator // time_base.denominator), 0)


def is_within_speech(pts: int, time_base: Fraction, speech_samples: int) -> bool:
    """Whether a frame at pts (counted from the first frame) belongs to an output of that much speech."""
    return pts <= 0 or pts * time_base + TAIL <= Fraction(speech_samples, SPEECH_RATE)


def needs_bounce(source_end_pts: int, time_base: Fraction, speech_samples: int) -> bool:
    """Whether speech outlasts a source that ends at source_end_pts (counted from the first frame)."""
    return Fraction(speech_samples, SPEECH_RATE) > source_end_pts * time_base + SLACK


def ends_together(source_end_pts: int, time_base: Fraction, speech_samples: int) -> bool:
    """Whether a source and its speech end so close to each other that every frame is kept and none is added."""
    return abs(Fraction(speech_samples, SPEECH_RATE) - source_end_pts * time_base) <= SLACK


def bounce_index(position: int, frames: int) -> int:
    """Source frame at a position of 0, 1, ... n-1, n-2, ... 1, 0, 1, ... (0, 0, ... for a single frame)."""
    if frames < 1 or position < 0:
        raise ValueError(f"position {position} of {frames} frames does not exist")
    if frames == 1:
        return 0
    leg, offset = divmod(position, frames - 1)
    return offset if leg % 2 == 0 else frames - 1 - offset


def bounce_pts(position: int, pts: Sequence[int], last_duration_pts: int) -> int:
    """Continuing timestamp of that position: backwards, frames last as long as they did forwards.

    pts: every timestamp of the source; last_duration_pts: how long a single-frame source shows per repeat.
    """
    frames = len(pts)
    if frames == 1:
        return pts[0] + position * max(last_duration_pts, 1)
    leg, offset = divmod(position, frames - 1)
    span = pts[-1] - pts[0]
    inside = pts[offset] - pts[0] if leg % 2 == 0 else pts[-1] - pts[frames - 1 - offset]
    return pts[0] + leg * span + inside


def filling_duration(last_duration_pts: int, time_base: Fraction) -> int:
    """How long a source's last frame counts where pictures are repeated after it, in ticks."""
    return max(last_duration_pts, -(-SHORTEST_FRAME // time_base))


def fill_index(position: int, frames: int, length: Length) -> int:
    """The source frame at a position of the result, for any way of filling."""
    if length == "loop":
        return position % frames
    if length == "freeze":
        return min(position, frames - 1)
    return bounce_index(position, frames)


def fill_pts(position: int, pts: Sequence[int], last_duration_pts: int, length: Length) -> int:
    """The continuing timestamp of a position, for any way of filling; see `bounce_pts`.

    A loop goes on when the last frame has been shown; a frozen frame is repeated as often as frames came on average.
    """
    frames = len(pts)
    if length == "loop":
        turn, place = divmod(position, frames)
        return turn * (pts[-1] - pts[0] + last_duration_pts) + pts[place]
    if length == "freeze":
        if position < frames:
            return pts[position]
        step = max((pts[-1] - pts[0]) // (frames - 1), 1) if frames > 1 else last_duration_pts
        return pts[-1] + last_duration_pts + (position - frames) * step
    return bounce_pts(position, pts, last_duration_pts)


@dataclass(frozen=True, kw_only=True)
class ChunkSpan:
    """Model frames [start, stop) of a chunk, of which the first `valid` exist; the rest repeats the last one."""

    index: int
    start: int
    stop: int
    valid: int

    @property
    def samples(self) -> tuple[int, int]:
        """Speech samples [first, last) that sound during the chunk."""
        return self.start * SAMPLES_PER_MODEL_FRAME, self.stop * SAMPLES_PER_MODEL_FRAME


def chunk_start(chunk: int) -> int:
    """First model frame of a chunk."""
    return 0 if chunk == 0 else FIRST_CHUNK_PIXEL_FRAMES + (chunk - 1) * CHUNK_PIXEL_FRAMES


def chunk_of(model_frame: int) -> int:
    """The chunk that holds a model frame."""
    if model_frame < FIRST_CHUNK_PIXEL_FRAMES:
        return 0
    return (model_frame - FIRST_CHUNK_PIXEL_FRAMES) // CHUNK_PIXEL_FRAMES + 1


def chunk_plan(model_frames: int) -> list[ChunkSpan]:
    """The chunks that cover model_frames frames, the last one padded."""
    if model_frames < 1:
        raise ValueError(f"a plan needs at least one model frame, got {model_frames}")
    spans = []
    for index in range(chunk_of(model_frames - 1) + 1):
        start, stop = chunk_start(index), chunk_start(index + 1)
        spans.append(ChunkSpan(index=index, start=start, stop=stop, valid=min(stop, model_frames) - start))
    return spans


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The whole plan of one video and one speech.

    Attributes:
        pts: timestamps of every source frame, strictly increasing.
        time_base: their unit.
        last_duration_pts: how long the last source frame shows.
        speech_samples: length of the speech at 16 kHz, delay included.
        length, fit: how both are made to last as long; see `FILLS`.
    """

    pts: Sequence[int]
    time_base: Fraction
    last_duration_pts: int
    speech_samples: int
    length: Length = "bounce"
    fit: Fit = "audio"

    def __post_init__(self) -> None:
        if not self.pts:
            raise ValueError("a timeline needs at least one source frame")
        if any(b <= a for a, b in zip(self.pts, self.pts[1:], strict=False)):
            raise ValueError("source timestamps must increase")
        if self.speech_samples < 0:
            raise ValueError(f"speech_samples must not be negative, got {self.speech_samples}")

    @property
    def fills(self) -> bool:
        """Whether the source is shorter than the speech and its pictures are repeated."""
        repeats = self.fit == "audio" and self.length != "cut"
        return repeats and needs_bounce(self._end_pts, self.time_base, self.speech_samples)

    @property
    def output_frames(self) -> int:
        """Number of frames of the result."""
        whole = self.fit == "video" and self.length == "silence"
        if whole or ends_together(self._end_pts, self.time_base, self.speech_samples):
            return len(self.pts)
        low, high = 1, len(self.pts)
        while self.fills and self._within(high):
            low, high = high, 2 * high
        while low < high:  # the largest count whose last frame is still within the speech
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._within(middle - 1) else (low, middle - 1)
        return low

    @property
    def output_seconds(self) -> Fraction:
        """How long the result lasts."""
        last = self.output_frames - 1
        ends = last == len(self.pts) - 1
        shown = self.last_duration_pts if ends else self.output_pts(last + 1) - self.output_pts(last)
        return (self.output_pts(last) + shown - self.pts[0]) * self.time_base

    @property
    def model_frames(self) -> int:
        """Number of model frames that serve them."""
        return self.model_frame(self.output_frames - 1) + 1

    def source_index(self, output_frame: int) -> int:
        """The source frame behind an output frame."""
        return fill_index(output_frame, len(self.pts), self.length)

    def output_pts(self, output_frame: int) -> int:
        """The timestamp of an output frame in the source's time base."""
        last = filling_duration(self.last_duration_pts, self.time_base)
        return fill_pts(output_frame, self.pts, last, self.length)

    def model_frame(self, output_frame: int) -> int:
        """The model frame whose mouth an output frame gets."""
        return model_frame_at(self.output_pts(output_frame) - self.pts[0], self.time_base)

    def shown_at(self, model_frame: int) -> int:
        """The output frame that a player shows at model_frame / 25 s (the last one that has begun)."""
        low, high = 0, self.output_frames - 1
        while low < high:
            middle = (low + high + 1) // 2
            begun = grid_frames_before(self.output_pts(middle) - self.pts[0], self.time_base) <= model_frame
            low, high = (middle, high) if begun else (low, middle - 1)
        return low

    def chunks(self) -> list[ChunkSpan]:
        """The model's work, chunk by chunk."""
        return chunk_plan(self.model_frames)

    @property
    def _end_pts(self) -> int:
        return self.pts[-1] + self.last_duration_pts - self.pts[0]

    def _within(self, output_frame: int) -> bool:
        return is_within_speech(self.output_pts(output_frame) - self.pts[0], self.time_base, self.speech_samples)


class GridSampler(Generic[T]):
    """Streaming half of a timeline: push frames as they are decoded, get what the model sees on its grid.

    Frame i of the grid can be given out once the next source frame has begun after it, or at the end.

    >>> sampler = GridSampler(Fraction(1, 50)); [sampler.push(pts, pts) for pts in (0, 1, 2)]  # [[], [0], []]
    """

    def __init__(self, time_base: Fraction) -> None:
        self.time_base = time_base
        self.emitted = 0
        self._origin: int | None = None
        self._last: tuple[int, T] | None = None

    def push(self, pts: int, item: T) -> list[T]:
        """Take a source frame; the items of the grid frames that are now certain, in order."""
        ready: list[T] = []
        if self._origin is None or self._last is None:
            self._origin = pts
        else:
            if pts <= self._last[0]:
                raise ValueError(f"timestamps must increase, got {pts} after {self._last[0]}")
            ready = self._until(grid_frames_before(pts - self._origin, self.time_base))
        self._last = (pts, item)
        return ready

    def finish(self) -> list[T]:
        """No more frames: the items of the grid frames that the last source frames still need."""
        if self._last is None or self._origin is None:
            return []
        return self._until(model_frame_at(self._last[0] - self._origin, self.time_base) + 1)

    def _until(self, count: int) -> list[T]:
        assert self._last is not None
        ready = [self._last[1]] * max(count - self.emitted, 0)
        self.emitted += len(ready)
        return ready
