"""The rule that turns a teacher's curves into its guidance window and its landing step; a pure function.

Notation: g_j the paired gain in synchronisation of guidance at step j, c_j its paired cost in fidelity error, both
smoothed by a running mean over a few steps.

**Is there a trade-off?** Guidance must buy synchronisation (largest g_j at least three standard errors) and cost
fidelity (largest c_j likewise). If it buys nothing: guide never. If it costs nothing: guide always. No window then.

**Window.** Step j holds the share γ_j = g_j / Σ g⁺ of the gain and κ_j = c_j / Σ c⁺ of the cost (⁺: positive parts).
The window is the run of steps with the largest Σ (γ_j - κ_j): most gain for least cost, without a threshold and in
any unit. Where that advantage is below a tenth, or below one and a half times its own error (of all steps together, as
if they erred alike: neighbouring steps nearly do), no step is worth more than another: no window, and the reason is
told. The one and a half comes from made-up teachers whose cost follows their gain: 95 % of them stay below 1.3.

**Landing.** In the mixed schedule, no guidance at call 1 and guidance at call 2 (the paper's best compromise), the
synchronisation over landings has a peak and around it a plateau: landings that lose less than a tenth of what
guidance gains, or less than one standard error of that gain, whichever is more. The landing lies three quarters of
the way along the plateau towards its faithful end, the end of lower fidelity error (in the middle where both ends
are the same). The paper calls its choice fidelity-leaning: 30 on a plateau of 25 to 32; the three quarters are set
by that one example, the rest of the rule is not.

    derived = derive(trade_off, factorial)
    derived.window_steps, derived.landing_step, derived.reasons
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lipstream.analysis.curves import Curve, Factorial, TradeOff, Values

MIXED = "plain+guided"
CEILING = "guided+guided"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The constants of the rule; see the module docstring.

    Attributes:
        smooth_steps: width of the running mean.
        standard_errors: how many a gain or a cost must have to count.
        least_advantage: share of the gain less share of the cost that a window must have.
        advantage_errors: how many of its own errors the advantage must be.
        plateau_loss: of the gain of guidance, what a landing on the plateau may lose.
        lean: where on the plateau the landing lies, 0 at the end of more error, 1 at the end of less.
    """

    smooth_steps: int = 5
    standard_errors: float = 3.0
    least_advantage: float = 0.1
    advantage_errors: float = 1.5
    plateau_loss: float = 0.1
    lean: float = 0.75


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What the rule says about a teacher.

    Attributes:
        guidance: "window" where there is one; else "always" or "never".
        window_steps: first and last guided step, both inclusive.
        window_times: (lowest, highest) time of the window, as `diffusion.guidance` takes it.
        window_gain, window_cost: the shares of all gain and of all cost that lie in the window.
        plateau_steps: landings that are as good as the best in synchronisation.
        reasons: the findings in words, in order.
    """

    guidance: Literal["window", "always", "never"]
    window_steps: tuple[int, int] | None = None
    window_times: tuple[float, float] | None = None
    window_gain: float | None = None
    window_cost: float | None = None
    plateau_steps: tuple[int, int] | None = None
    landing_step: int | None = None
    landing_time: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def trade_off(self) -> bool:
        """Whether the teacher has the paper's structure, so that a gate can help."""
        return self.guidance == "window"


def smoothed(values: Values, width: int) -> Values:
    """Running mean of odd width (less where there are fewer values); at the ends over what there is."""
    kernel = np.ones(min(width, len(values) - 1 + len(values) % 2))
    total = np.convolve(values, kernel, "same")
    return np.asarray(total / np.convolve(np.ones(len(values)), kernel, "same"))


def best_run(values: Values) -> tuple[int, int]:
    """First and last index of the run with the largest sum."""
    best, best_range = -np.inf, (0, 0)
    total, start = 0.0, 0
    for index, value in enumerate(values):
        if total <= 0:
            total, start = 0.0, index
        total += float(value)
        if total > best:
            best, best_range = total, (start, index)
    return best_range


def derive(trade: TradeOff, factorial: Factorial, rule: Rule | None = None) -> Derived:
    """Apply the rule of the module docstring.

    Raises:
        ValueError: a curve holds NaN (a metric that no clip has, or one clip only).
    """
    rule = rule or Rule()
    for name, curve in (("gain", trade.gain), ("cost", trade.cost), ("factorial gain", factorial.gain[MIXED])):
        if np.isnan(curve.mean).any() or np.isnan(curve.se).any():
            raise ValueError(f"the curve of the {name} has steps without a value; are there enough clips?")
    window = _window(trade, rule)
    landing = _landing(factorial, rule)
    reasons = (*window.reasons, *landing.reasons)
    if window.window_steps and landing.landing_step is not None:
        low, high = window.window_steps
        where = "inside" if low <= landing.landing_step <= high else "OUTSIDE"
        reasons = (*reasons, f"the landing lies {where} the window")
    return Derived(
        guidance=window.guidance,
        window_steps=window.window_steps,
        window_times=window.window_times,
        window_gain=window.window_gain,
        window_cost=window.window_cost,
        plateau_steps=landing.plateau_steps,
        landing_step=landing.landing_step,
        landing_time=landing.landing_time,
        reasons=reasons,
    )


def _width(steps: NDArray[np.int64], rule: Rule) -> int:
    """The running mean's width in points, odd; sparse landings are smoothed over as many steps as dense ones."""
    spacing = int(steps[1] - steps[0]) if len(steps) > 1 else 1
    points = max(1, rule.smooth_steps // spacing)
    return points - 1 + points % 2


def _peak(curve: Curve, width: int, rule: Rule) -> tuple[Values, int, bool, str]:
    """Smoothed curve, where its peak lies, whether the peak counts, and the peak in words."""
    mean, se = smoothed(curve.mean, width), smoothed(curve.se, width)
    peak = int(np.argmax(mean))
    counts = bool(mean[peak] > 0 and mean[peak] >= rule.standard_errors * se[peak])
    return mean, peak, counts, f"{mean[peak]:+.3g} ± {se[peak]:.2g}"


def _window(trade: TradeOff, rule: Rule) -> Derived:
    width = _width(trade.steps, rule)
    gain, at, gains, gain_text = _peak(trade.gain, width, rule)
    cost, cost_at, costs, cost_text = _peak(trade.cost, width, rule)
    bought = f"guidance changes synchronisation by at most {gain_text} (step {trade.steps[at]})"
    paid = f"and the fidelity error by at most {cost_text} (step {trade.steps[cost_at]})"
    needed = f"{rule.standard_errors:g} standard errors"
    if not gains:
        return Derived(guidance="never", reasons=(f"{bought}: less than {needed}, it buys nothing; guide never",))
    if not costs:
        return Derived(
            guidance="always",
            reasons=(
                bought,
                f"{paid}: less than {needed}, it costs nothing; no gate",
            ),
        )
    all_gain, all_cost = (float(np.maximum(values, 0).sum()) for values in (gain, cost))
    share, price = gain / all_gain, cost / all_cost
    low, high = best_run(share - price)
    inside = slice(low, high + 1)
    doubt = float(np.hypot(trade.gain.se / all_gain, trade.cost.se / all_cost)[inside].sum())
    held, paid_share = float(share[inside].sum()), float(price[inside].sum())
    steps = int(trade.steps[low]), int(trade.steps[high])
    text = f"steps {steps[0]} to {steps[1]} hold {held:.0%} of the gain and {paid_share:.0%} of the cost"
    least = max(rule.least_advantage, rule.advantage_errors * doubt)
    if held - paid_share < least or high - low + 1 == len(gain):
        reason = f"{text}: no step is worth more than another, a gate has nothing to choose; guide always"
        return Derived(guidance="always", reasons=(bought, paid, reason))
    return Derived(
        guidance="window",
        window_steps=steps,
        window_times=(float(trade.times[high]), float(trade.times[low])),
        window_gain=held,
        window_cost=paid_share,
        reasons=(bought, paid, text),
    )


def _landing(factorial: Factorial, rule: Rule) -> Derived:
    width = _width(factorial.landings, rule)
    gain, at, counts, text = _peak(factorial.gain[MIXED], width, rule)
    bought = f"guidance at call 2 alone changes synchronisation by at most {text} (landing {factorial.landings[at]})"
    if not counts:
        reason = f"{bought}: less than {rule.standard_errors:g} standard errors, no landing is better than another"
        return Derived(guidance="never", reasons=(reason,))
    sync = smoothed(factorial.sync[MIXED].mean, width)
    se = smoothed(factorial.gain[MIXED].se, width)
    peak = int(np.argmax(sync))
    allowed = max(rule.plateau_loss * float(gain[at]), float(se[peak]))
    good = sync >= sync[peak] - allowed
    low = high = peak
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(good) and good[high + 1]:
        high += 1
    error = smoothed(factorial.error[MIXED].mean, width)
    difference = float(error[low] - error[high])
    same = abs(difference) < 0.01 * abs(float(error[peak]))
    lean = 0.5 if same else rule.lean if difference > 0 else 1 - rule.lean
    chosen = round(low + lean * (high - low))
    plateau = int(factorial.landings[low]), int(factorial.landings[high])
    faithful = "both ends alike" if same else f"the {'late' if difference > 0 else 'early'} end is the faithful one"
    ceiling = smoothed(factorial.gain[CEILING].mean, width)[chosen]
    recovered = f"there it recovers {gain[chosen] / ceiling:.0%} of the gain of guidance at both calls"
    reasons = [bought, f"plateau of landings {plateau[0]} to {plateau[1]}, {faithful}: {factorial.landings[chosen]}"]
    if ceiling > 0:
        reasons.append(recovered)
    return Derived(
        guidance="window",
        plateau_steps=plateau,
        landing_step=int(factorial.landings[chosen]),
        landing_time=float(factorial.times[chosen]),
        reasons=tuple(reasons),
    )
