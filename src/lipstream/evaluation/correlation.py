"""Whether two curves of mouth opening move together: correlation, its lag, and the ratio of their amplitudes.

>>> compare(opening_series("result.mp4"), opening_series("real.mp4"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lipstream.evaluation.opening import Series

MAX_LAG_PIXEL_FRAMES = 8
MIN_PIXEL_FRAMES = 20  # fewer common frames say nothing


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a measured curve follows the true one.

    Attributes:
        r: Pearson correlation at lag 0.
        best_r: the largest correlation over all lags.
        lag_pixel_frames: where it lies; positive: the measured curve comes late.
        amplitude: ratio of the standard deviations, measured over true.
    """

    r: float
    best_r: float
    lag_pixel_frames: int | None
    amplitude: float


def _common(measured: Series, true: Series, lag_pixel_frames: int) -> tuple[Series, Series]:
    """The frames that both curves have after shifting the measured one back by the lag."""
    a = measured[max(0, lag_pixel_frames) :]
    b = true[max(0, -lag_pixel_frames) :]
    count = min(len(a), len(b))
    a, b = a[:count], b[:count]
    valid = ~(np.isnan(a) | np.isnan(b))
    return a[valid], b[valid]


def correlation(measured: Series, true: Series, lag_pixel_frames: int = 0) -> float:
    """Pearson correlation of two curves [frames], NaN for a constant curve or too few common frames.

    Args:
        measured, true: one number per frame, NaN where it is unknown; the lengths may differ.
        lag_pixel_frames: by how much `measured` is taken to be late.
    """
    a, b = _common(measured, true, lag_pixel_frames)
    if len(a) < MIN_PIXEL_FRAMES or a.std() < 1e-9 or b.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def compare(measured: Series, true: Series, max_lag_pixel_frames: int = MAX_LAG_PIXEL_FRAMES) -> Agreement:
    """Correlation at lag 0 and at the best lag, and the amplitude ratio over the frames that both curves have."""
    lags = range(-max_lag_pixel_frames, max_lag_pixel_frames + 1)
    values = np.array([correlation(measured, true, lag) for lag in lags])
    known = not np.all(np.isnan(values))
    best = int(np.nanargmax(values)) if known else 0
    a, b = _common(measured, true, 0)
    return Agreement(
        r=correlation(measured, true),
        best_r=float(values[best]),
        lag_pixel_frames=lags[best] if known else None,
        amplitude=float(a.std() / b.std()) if len(a) and b.std() > 1e-9 else float("nan"),
    )


def crossed(measured: Sequence[Series], true: Sequence[Series]) -> float:
    """Mean correlation of each measured curve with every *other* clip's true curve: what clips share by habit alone.

    Clips of one corpus begin with silence and share a sentence rhythm; this row shows how much that is worth.
    """
    pairs = [correlation(a, b) for i, a in enumerate(measured) for j, b in enumerate(true) if i != j]
    return float(np.nanmean(pairs)) if pairs and not np.all(np.isnan(pairs)) else float("nan")
