"""The paper's trajectory analysis as curves of made-up clips, with noise: what the rule of `analysis.derive` must read.

The paper's figures were not at hand (only its text), so these are shapes, not readings. What the text fixes, and how:

* guidance gains synchronisation in a mid-trajectory band, steps 20 to 40, and little outside; it costs fidelity
  (mouth LPIPS) everywhere, more outside of the band ("preserve fidelity where guidance is harmful");
* one call already has "approximate mouth timing", so that synchronisation starts well above nothing;
* sizes: Sync-C of the 14B teacher 8.98 with guidance; no-CFG and all-CFG students differ by 1.0 (6.14, 7.13);
* two calls: the mixed schedule (1, s) recovers most of the gap near landing 30, its plateau is 25 to 32, earlier
  landings have more synchronisation and later ones more fidelity (ablation 13, 25, 30, 37: Sync-C 6.79, 6.95, 6.81,
  6.73; FVD 135, 125, 120, 115);
* ten clips. Clips differ by more than guidance does (Sync-C of ± 1.5); the noise within a clip runs on from step to
  step (a first-order process), because neighbouring predictions are nearly the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lipstream.analysis.curves import Factorial, TradeOff, factorial, trade_off
from lipstream.diffusion.teacher import teacher_times

STEPS = 50
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A teacher. Defaults are the paper's; the tests shift them and take parts away."""

    band: tuple[float, float] = (20, 40)
    plateau: tuple[float, float] = (25, 32)
    gain: float = 1.0
    cost: float = 0.03
    cost_inside: float = 0.35  # of the cost outside
    gain_follows_cost: bool = False
    late_is_faithful: bool = True
    clips: int = 10
    noise: float = 0.25  # of the gain, in one clip at one step
    noise_run: float = 0.85  # correlation of neighbouring steps


def bump(steps: Values, low: float, high: float, width: float) -> Values:
    """About 1 between low and high, about 0 outside."""
    return (np.tanh((steps - low) / width) - np.tanh((steps - high) / width)) / 2


def running_noise(rng: np.random.Generator, clips: int, count: int, run: float) -> Values:
    """Unit noise [clips, count] whose neighbours correlate by `run`."""
    noise = rng.normal(size=(clips, count))
    for index in range(1, count):
        noise[:, index] = run * noise[:, index - 1] + np.sqrt(1 - run**2) * noise[:, index]
    return noise


def draw(situation: Situation, seed: int) -> tuple[TradeOff, Factorial]:
    """The curves of one draw of clips."""
    s, rng = situation, np.random.default_rng(seed)
    times = teacher_times(STEPS)

    def clips(mean: Values, size: float, offsets: Values) -> Values:
        wobble = running_noise(rng, s.clips, len(mean), s.noise_run)
        return mean + offsets[:, None] + size * wobble

    steps = np.arange(STEPS, dtype=np.float64)
    band = bump(steps, *s.band, 2.0)
    gain = s.gain * (0.05 + 0.95 * band)
    cost = s.cost * (gain / max(s.gain, 1e-9) if s.gain_follows_cost else s.cost_inside * band + (1 - band))
    talent, blur = 1.5 * rng.normal(size=s.clips), 0.03 * rng.normal(size=s.clips)
    plain_sync = 7.2 - 2.0 * np.exp(-steps / 12)
    plain_error = 0.10 + 0.10 * np.exp(-steps / 15)
    sync = {
        "plain": clips(plain_sync, s.noise, talent),
        "guided": clips(plain_sync + gain, s.noise, talent),
    }
    error = {
        "plain": clips(plain_error, s.noise * 0.03, blur),
        "guided": clips(plain_error + cost, s.noise * 0.03, blur),
    }
    trade = trade_off(times[:-1], sync, error)

    landings = np.arange(1, STEPS, dtype=np.float64)
    top = bump(landings, s.plateau[0] - 2, s.plateau[1] + 2, 3.0) / bump(np.array([28.5]), 23, 34, 3.0).max()
    mixed = s.gain * (0.1 + 0.75 * top) - 0.004 * s.gain * landings
    floor = 6.2 - 0.004 * s.gain * landings
    lift = {"plain+plain": 0.0, "plain+guided": mixed, "guided+plain": 0.5 * s.gain, "guided+guided": s.gain}
    direction = 1 if s.late_is_faithful else -1
    softness = 0.14 - direction * 0.0008 * landings
    dearness = {"plain+plain": 0.0, "plain+guided": 0.01, "guided+plain": 0.025, "guided+guided": 0.03}
    cells_sync = {cell: clips(floor + lift[cell], s.noise, talent) for cell in lift}
    cells_error = {cell: clips(softness + dearness[cell], s.noise * 0.01, blur) for cell in lift}
    return trade, factorial([int(j) for j in landings], times[1:-1], cells_sync, cells_error)
