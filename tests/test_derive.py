"""The rule for window and landing on the paper's situation and on teachers that differ from it, over many draws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lipstream.analysis.curves import over_clips
from lipstream.analysis.derive import Derived, best_run, derive, smoothed
from lipstream.diffusion.guidance import sync_window_scale
from lipstream.diffusion.schedule import SYNC_WINDOW
from paper_situation import Situation, draw

DRAWS = 60


def derived(situation: Situation, draws: int = DRAWS) -> list[Derived]:
    return [derive(*draw(situation, seed)) for seed in range(draws)]


def share(found: list[bool]) -> float:
    return sum(found) / len(found)


def test_paper_situation_gives_the_papers_choices() -> None:
    found = derived(Situation())
    assert all(d.trade_off for d in found)
    edges = np.array([d.window_steps for d in found])
    assert np.abs(edges - [20, 40]).max() <= 3 and np.abs(np.median(edges, 0) - [20, 40]).max() <= 1
    landings = np.array([d.landing_step for d in found if d.landing_step is not None])
    assert len(landings) >= 0.95 * DRAWS and share(list(np.abs(landings - 30) <= 3)) >= 0.95
    assert abs(np.median(landings) - 30) <= 1
    for d in found:
        assert d.window_gain is not None and d.window_cost is not None and d.window_gain > 2 * d.window_cost


def test_window_times_are_those_that_gate_guidance() -> None:
    d = next(d for d in derived(Situation(), 20) if d.window_steps == (20, 40))
    assert d.window_times == pytest.approx(SYNC_WINDOW, abs=1e-3)  # the released code's 0.556 ... 0.882
    times = [draw(Situation(), 0)[0].times[j] for j in (19, 20, 30, 40, 41)]
    scales = sync_window_scale(np_tensor(times), 4.5, d.window_times)
    assert scales.tolist() == [1, 4.5, 4.5, 4.5, 1]


def np_tensor(values: list[float]):  # type: ignore[no-untyped-def]
    import torch

    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("situation", "window", "landing"),
    [
        (Situation(band=(8, 22), plateau=(10, 16)), (8, 22), 14.5),
        (Situation(band=(30, 46), plateau=(36, 42)), (30, 46), 40.5),
        (Situation(band=(26, 34)), (26, 34), 30),
        (Situation(cost_inside=1.0), (20, 40), 30),  # the cost is the same everywhere
        (Situation(noise=0.5, clips=40), (20, 40), 30),
    ],
)
def test_other_teachers_give_other_choices(situation: Situation, window: tuple[int, int], landing: float) -> None:
    found = derived(situation)
    edges = np.array([d.window_steps for d in found if d.window_steps])
    assert len(edges) >= 0.95 * DRAWS
    assert np.abs(np.median(edges, 0) - window).max() <= 2
    assert abs(np.median([d.landing_step for d in found if d.landing_step is not None]) - landing) <= 2


def test_landing_leans_to_the_faithful_end() -> None:
    late, early = (derived(Situation(late_is_faithful=late), 20) for late in (True, False))
    for a, b in zip(late, early, strict=True):
        assert a.plateau_steps == b.plateau_steps and a.landing_step > b.landing_step  # type: ignore[operator]


@pytest.mark.parametrize(
    ("situation", "guidance", "said"),
    [
        (Situation(gain=0.0), "never", "buys nothing"),
        (Situation(cost=0.0), "always", "costs nothing"),
        (Situation(gain_follows_cost=True), "always", "no step is worth more"),
        (Situation(band=(-30, 90)), "always", "no step is worth more"),  # gain and cost alike at all steps
    ],
)
def test_no_trade_off_is_reported(situation: Situation, guidance: str, said: str) -> None:
    found = derived(situation)
    assert share([d.guidance == guidance and not d.window_steps for d in found]) >= 0.9
    told = next(d for d in found if d.guidance == guidance)
    assert not told.trade_off and told.window_times is None and said in " ".join(told.reasons)


def test_no_gain_at_call_2_gives_no_landing() -> None:
    assert share([d.landing_step is None for d in derived(Situation(gain=0.0))]) >= 0.9


def test_few_noisy_clips_do_not_make_certain_windows() -> None:
    found = derived(Situation(clips=3, gain=0.2))
    assert share([d.trade_off for d in found]) < 0.5


def test_curves_without_values_are_refused() -> None:
    trade, factorial = draw(Situation(), 0)
    broken = dataclasses.replace(trade, gain=over_clips(np.full((3, 50), np.nan)))
    with pytest.raises(ValueError, match="gain"):
        derive(broken, factorial)
    with pytest.raises(ValueError, match="two clips"):
        over_clips(np.zeros((1, 50)))


def test_parts() -> None:
    assert best_run(np.array([-1.0, 2, -1, 2, -5, 2])) == (1, 3)
    np.testing.assert_allclose(smoothed(np.array([0.0, 3, 0, 0]), 3), [1.5, 1, 1, 0])
    assert len(smoothed(np.arange(2.0), 5)) == 2
    curve = over_clips([[1.0, np.nan], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_allclose(curve.mean, [3, 5])
    np.testing.assert_allclose(curve.se, [2 / np.sqrt(3), 1.0])
