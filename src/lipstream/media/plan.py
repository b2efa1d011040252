"""What a run promises before it starts: frames and duration of its result, from the times in the file's index.

>>> print(Plan.of(probe("talk.mp4", need="video"), speech_samples=160_000))
250 frames, 10.000 s: the video (20.000 s) is cut to the speech (10.000 s)
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lipstream.media.probe import Probed
from lipstream.media.timeline import SPEECH_RATE, Fit, Length, Timeline, ends_together

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The promise of one run.

    Attributes:
        frames: of the result.
        seconds: how long it lasts, until its last frame ends.
        source_seconds, speech_seconds: how long the two sides last; the speech with its delay.
        timeline: where every frame comes from.
    """

    frames: int
    seconds: Fraction
    source_seconds: Fraction
    speech_seconds: Fraction
    timeline: Timeline

    @classmethod
    def of(cls, video: Probed, speech_samples: int, length: Length = "bounce", fit: Fit = "audio") -> Plan:
        """The plan of a video and so much speech at 16 kHz; see `timeline.FILLS`."""
        timeline = Timeline(
            pts=video.pts,
            time_base=video.time_base,
            last_duration_pts=video.last_duration_pts,
            speech_samples=speech_samples,
            length=length,
            fit=fit,
        )
        return cls(
            frames=timeline.output_frames,
            seconds=timeline.output_seconds,
            source_seconds=(video.pts[-1] + video.last_duration_pts - video.pts[0]) * video.time_base,
            speech_seconds=Fraction(speech_samples, SPEECH_RATE),
            timeline=timeline,
        )

    def __str__(self) -> str:
        """One line: frames, duration, and what happens to the side that does not fit."""
        video, speech = f"the video ({_text(self.source_seconds)})", f"the speech ({_text(self.speech_seconds)})"
        line = self.timeline
        filled = {"bounce": "plays forwards and backwards for", "loop": "is looped to", "freeze": "is frozen to"}
        end = round(self.source_seconds / line.time_base)
        if ends_together(end, line.time_base, line.speech_samples):
            how = f"{video} and {speech} end together"
        elif line.fills:
            how = f"{video} {filled[line.length]} {speech}"
        elif self.source_seconds < self.speech_seconds:
            how = f"{speech} is cut to {video}"
        elif line.length == "silence":
            how = f"{speech} is followed by silence to the end of {video}"
        else:
            how = f"{video} is cut to {speech}"
        return f"{self.frames} frames, {_text(self.seconds)}: {how}"

    def check(self, path: str, played_pts: Sequence[int], given: int, finished: int) -> None:
        """After the run: hold what came out against the promise.

        Args:
            path: the source, for messages.
            played_pts: times of the source's frames as far as they were decoded.
            given: frames handed to the stages.
            finished: frames that came out of them.

        Raises:
            RuntimeError: the result is not as promised and the source is not to blame. A source with frames that
                cannot be decoded is: that is a warning with both numbers.
        """
        promised = self.timeline.pts
        whole = list(played_pts) == list(promised[: len(played_pts)])
        needed = len(promised) if self.frames >= len(promised) else self.frames
        damaged = not whole or len(played_pts) < needed
        if finished != given or (given != self.frames and not damaged):
            raise RuntimeError(f"{path}: promised {self.frames} frames, {given} began, {finished} came out")
        if damaged:
            told = f"{len(played_pts)} of {needed}"
            logger.warning(
                "%s: only %s frames can be decoded as its index says; the result has %d frames, promised were %d",
                path, told, finished, self.frames,
            )  # fmt: skip


def _text(seconds: Fraction) -> str:
    return f"{float(seconds):.3f} s"
