"""Whether the lips close for p, b and m: measurable where the phonemes are known, as in the synthetic clips.

The rule. From the *real* clip, seen by the tracker: `rest` is the median opening of the frames that were drawn shut
(true opening <= 0.005), `speech` the 90th percentile of its opening. An event is *closed* in a video if the smallest
opening in the frames that the sound touches is at most rest + 0.2 (speech - rest). By this rule the real synthetic
clips close in 100 % of events and keep 6 % of their open vowels shut.

A share alone says little: mouths are shut in pauses, and a time-reversed picture already "closes" in 66 %. So the
same count of the real clip and of the open vowels (a mouth that hardly opens is shut there too) go with it, and
protocols add the do-nothing row.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lipstream.evaluation.opening import Series

CLOSED_SHARE = 0.2
DRAWN_SHUT = 0.005  # true opening (inter-ocular distances) of a mouth that the renderer drew closed
CLOSING, SILENT = "PBM", "sil"  # viseme names of lipstream.data.synthetic
OPEN = frozenset(("AA", "AE", "AH", "AO", "EH", "OW", "IY", "IH", "AX"))  # vowels of open lips


@dataclass(frozen=True, kw_only=True)
class SpokenClip:
    """What was said in a synthetic clip and how it was drawn.

    Attributes:
        visemes: names in order.
        times_s: (start, end) of each, seconds of the clip.
        drawn_opening: [frames] the renderer's own opening, inter-ocular distances.
        frame_rate: frames per second.
    """

    visemes: tuple[str, ...]
    times_s: tuple[tuple[float, float], ...]
    drawn_opening: Series
    frame_rate: float


@dataclass(frozen=True, kw_only=True)
class Closure:
    """Counts of one clip or, added, of several.

    Attributes:
        events: p, b and m with a known opening.
        closed: of these, closed in the measured video.
        closed_real: of these, closed in the real video by the same rule.
        vowels, vowels_closed: open vowels, and those throughout which the measured mouth was closed (should be few).
        vowels_closed_real: the same of the real video.
    """

    events: int = 0
    closed: int = 0
    closed_real: int = 0
    vowels: int = 0
    vowels_closed: int = 0
    vowels_closed_real: int = 0

    def __add__(self, other: Closure) -> Closure:
        return Closure(
            events=self.events + other.events,
            closed=self.closed + other.closed,
            closed_real=self.closed_real + other.closed_real,
            vowels=self.vowels + other.vowels,
            vowels_closed=self.vowels_closed + other.vowels_closed,
            vowels_closed_real=self.vowels_closed_real + other.vowels_closed_real,
        )

    @property
    def share(self) -> float:
        """Share of p, b and m that close the lips; NaN without any."""
        return self.closed / self.events if self.events else math.nan

    @property
    def share_real(self) -> float:
        """The same of the real video: the most that the measurement allows."""
        return self.closed_real / self.events if self.events else math.nan

    @property
    def elsewhere(self) -> float:
        """Share of open vowels in which the mouth is closed: near `share`, that one means nothing."""
        return self.vowels_closed / self.vowels if self.vowels else math.nan

    @property
    def elsewhere_real(self) -> float:
        """The same of the real video."""
        return self.vowels_closed_real / self.vowels if self.vowels else math.nan


def load_spoken(truth: str | os.PathLike[str]) -> SpokenClip:
    """The ground truth of a synthetic clip, from its .npz.

    Raises:
        ValueError: the file lacks visemes or the drawn opening.
    """
    with np.load(Path(truth)) as data:
        missing = {"visemes", "viseme_times_s", "opening", "frame_rate"} - set(data.files)
        if missing:
            raise ValueError(f"{truth}: no synthetic ground truth, lacks {sorted(missing)}")
        times = tuple((float(a), float(b)) for a, b in data["viseme_times_s"])
        return SpokenClip(
            visemes=tuple(str(name) for name in data["visemes"]),
            times_s=times,
            drawn_opening=data["opening"].astype(np.float64),
            frame_rate=float(data["frame_rate"]),
        )


def threshold(real: Series, drawn_opening: Series) -> float:
    """Largest opening (inter-ocular distances) that counts as closed; see the rule above. Both [frames]."""
    count = min(len(real), len(drawn_opening))
    shut = real[:count][drawn_opening[:count] <= DRAWN_SHUT]
    rest = float(np.nanmedian(shut)) if len(shut) and not np.all(np.isnan(shut)) else float(np.nanpercentile(real, 5))
    return rest + CLOSED_SHARE * (float(np.nanpercentile(real, 90)) - rest)


def event_extremes(opening: Series, times_s: Sequence[tuple[float, float]], frame_rate: float) -> tuple[Series, Series]:
    """Smallest and largest opening in the frames that each event touches, [events] each; NaN if none is known."""
    low, high = [], []
    for start_s, end_s in times_s:
        seen = opening[math.floor(start_s * frame_rate) : math.ceil(end_s * frame_rate)]
        known = seen[~np.isnan(seen)]
        low.append(float(known.min()) if len(known) else math.nan)
        high.append(float(known.max()) if len(known) else math.nan)
    return np.array(low, np.float64), np.array(high, np.float64)


def closure(measured: Series, real: Series, spoken: SpokenClip) -> Closure:
    """Count closures of one clip.

    Args:
        measured, real: [frames] opening of the result and of the real clip, inter-ocular distances.
        spoken: what was said.
    """
    limit = threshold(real, spoken.drawn_opening)
    named = list(zip(spoken.visemes, spoken.times_s, strict=True))
    events = [span for name, span in named if name == CLOSING]
    vowels = [span for name, span in named if name in OPEN]
    got, wanted = (event_extremes(series, events, spoken.frame_rate)[0] for series in (measured, real))
    widest, widest_real = (event_extremes(series, vowels, spoken.frame_rate)[1] for series in (measured, real))
    known, open_known = ~(np.isnan(got) | np.isnan(wanted)), ~(np.isnan(widest) | np.isnan(widest_real))
    return Closure(
        events=int(known.sum()),
        closed=int((got[known] <= limit).sum()),
        closed_real=int((wanted[known] <= limit).sum()),
        vowels=int(open_known.sum()),
        vowels_closed=int((widest[open_known] <= limit).sum()),
        vowels_closed_real=int((widest_real[open_known] <= limit).sum()),
    )
