"""Per-step curves: means over clips with their standard errors, and differences taken clip by clip.

Clips differ far more from each other than guidance changes any of them, and both runs of a clip start from the same
noise; so what guidance does is averaged as a difference within clips, whose standard error is what the rule goes by.

    curve = over_clips(values)            # [clips, steps] -> mean and standard error per step
    gain = over_clips(guided - plain)     # paired
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lipstream.analysis.trajectory import CELLS

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Mean and standard error per step, [n] each."""

    mean: Values
    se: Values

    def __len__(self) -> int:
        return len(self.mean)

    def minus(self, other: Curve) -> Curve:
        """The difference of two curves as if their clips were unrelated; paired differences are tighter."""
        return Curve(self.mean - other.mean, np.hypot(self.se, other.se))


def over_clips(values: ArrayLike) -> Curve:
    """Mean and standard error over clips of values [clips, n]; NaN (a metric that a clip has not) is left out.

    Raises:
        ValueError: fewer than two clips, of which no error can be told.
    """
    rows = np.asarray(values, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"standard errors over clips take at least two clips, got values of shape {rows.shape}")
    known = ~np.isnan(rows)
    count = known.sum(0)
    total = np.where(known, rows, 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(count > 0, total / count, np.nan)
        squares = np.where(known, (rows - mean) ** 2, 0).sum(0)
        se = np.where(count > 1, np.sqrt(squares / (count - 1) / count), np.nan)
    return Curve(mean, se)


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """What guidance does over the steps of the teacher's trajectory (the paper's figure (a)).

    Attributes:
        times: τ_j of each step.
        sync_guided, sync_plain: synchronisation, higher is better.
        error_guided, error_plain: fidelity error of the mouth, lower is better.
        gain, cost: guided minus plain of both, paired over clips.
    """

    steps: NDArray[np.int64]
    times: Values
    sync_guided: Curve
    sync_plain: Curve
    error_guided: Curve
    error_plain: Curve
    gain: Curve
    cost: Curve


@dataclass(frozen=True, kw_only=True)
class Factorial:
    """Two calls with guidance (s0, s1), over the landing step of the second (the paper's figure (b)).

    Attributes:
        sync, error: by cell (`trajectory.CELLS`).
        gain: sync of each cell minus that of "plain+plain" at the same landing, paired over clips.
    """

    landings: NDArray[np.int64]
    times: Values
    sync: Mapping[str, Curve]
    error: Mapping[str, Curve]
    gain: Mapping[str, Curve]


def trade_off(times: Sequence[float], sync: Mapping[str, ArrayLike], error: Mapping[str, ArrayLike]) -> TradeOff:
    """Curves of per-clip values [clips, steps] under "plain" and "guided".

    Args:
        times: of the steps 0, 1, ...
    """
    arrays = {
        (what, run): np.asarray(values[run], np.float64)
        for what, values in (("sync", sync), ("error", error))
        for run in ("plain", "guided")
    }
    return TradeOff(
        steps=np.arange(len(times)),
        times=np.asarray(times, np.float64),
        sync_guided=over_clips(arrays["sync", "guided"]),
        sync_plain=over_clips(arrays["sync", "plain"]),
        error_guided=over_clips(arrays["error", "guided"]),
        error_plain=over_clips(arrays["error", "plain"]),
        gain=over_clips(arrays["sync", "guided"] - arrays["sync", "plain"]),
        cost=over_clips(arrays["error", "guided"] - arrays["error", "plain"]),
    )


def factorial(
    landings: Sequence[int], times: Sequence[float], sync: Mapping[str, ArrayLike], error: Mapping[str, ArrayLike]
) -> Factorial:
    """Curves of per-clip values [clips, landings] of all four cells."""
    arrays = {cell: np.asarray(sync[cell], np.float64) for cell in CELLS}
    return Factorial(
        landings=np.asarray(landings),
        times=np.asarray(times, np.float64),
        sync={cell: over_clips(values) for cell, values in arrays.items()},
        error={cell: over_clips(error[cell]) for cell in CELLS},
        gain={cell: over_clips(values - arrays["plain+plain"]) for cell, values in arrays.items()},
    )
