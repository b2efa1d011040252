"""The paper's two analysis figures as PNG: guidance on and off over the steps, and the factorial over the landing.

Bands are one standard error over clips. The shaded band is the derived window (left figure) or plateau (right one);
the dashed line is the derived landing. Needs matplotlib, the extra `analysis`.

    draw_trade_off(findings, folder / "tradeoff.png")
    draw_factorial(findings, folder / "factorial.png")
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lipstream.analysis.curves import Curve, Factorial, TradeOff
from lipstream.analysis.derive import Derived
from lipstream.analysis.study import Findings

COLOURS = {
    "guided": "#c0392b",
    "plain": "#1f3a68",
    "plain+plain": "#1f3a68",
    "plain+guided": "#2e8b57",
    "guided+plain": "#d98e04",
    "guided+guided": "#c0392b",
}


def _new_figure(columns: int, rows: int, title: str) -> tuple[Any, Any]:
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError("drawing the figures needs matplotlib: run  pip install '.[analysis]'") from error
    figure = figures.Figure(figsize=(5.2 * columns, 3.3 * rows), layout="constrained")  # no pyplot: no global state
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _band(axes: Any, x: NDArray[np.int64], curve: Curve, colour: str, label: str) -> None:
    axes.plot(x, curve.mean, color=colour, label=label, linewidth=1.4)
    axes.fill_between(x, curve.mean - curve.se, curve.mean + curve.se, color=colour, alpha=0.18, linewidth=0)


def draw_trade_off(findings: Findings, path: Path) -> None:
    """Synchronisation, fidelity error and their paired differences over the steps; own path above, local below."""
    config = findings.config
    title = f"guidance {config.scale:g} against none, {config.drop} dropped, {len(findings.clips)} clips, ± 1 SE"
    figure, grid = _new_figure(4, 2, title)
    rows: list[tuple[TradeOff, Derived, str]] = [
        (findings.trade, findings.derived, "own path"),
        (findings.trade_local, findings.derived_local, "at the plain path's states"),
    ]
    for axes, (trade, derived, where) in zip(grid, rows, strict=True):
        pairs = (
            (f"{findings.sync}, higher is better", trade.sync_guided, trade.sync_plain),
            (f"{findings.error}, lower is better", trade.error_guided, trade.error_plain),
        )
        for panel, (name, guided, plain) in zip(axes[:2], pairs, strict=True):
            _band(panel, trade.steps, guided, COLOURS["guided"], f"s = {config.scale:g}")
            _band(panel, trade.steps, plain, COLOURS["plain"], "s = 1")
            panel.set_ylabel(name)
            panel.legend(fontsize=7)
        for panel, name, curve in zip(
            axes[2:], ("gain in sync", "cost in error"), (trade.gain, trade.cost), strict=True
        ):
            _band(panel, trade.steps, curve, "#444444", name)
            panel.axhline(0, color="black", linewidth=0.6)
            panel.set_ylabel(f"{name} (paired)")
        for panel in axes:
            _shade(panel, derived.window_steps)
            panel.set_xlabel(f"step j, {where}")
        axes[0].set_title(_window_text(derived), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_factorial(findings: Findings, path: Path) -> None:
    """Synchronisation and fidelity error of the four cells over the landing; Euler steps above, fresh noise below."""
    title = f"two calls, guidance (s0, s1), {findings.config.drop} dropped, {len(findings.clips)} clips, ± 1 SE"
    figure, grid = _new_figure(2, 2, title)
    rows: list[tuple[Factorial, Derived, str]] = [
        (findings.euler, findings.derived, "Euler step"),
        (findings.renoised, findings.derived_local, "fresh noise"),
    ]
    for axes, (two, derived, how) in zip(grid, rows, strict=True):
        for panel, curves, name in (
            (axes[0], two.sync, f"{findings.sync}, higher is better"),
            (axes[1], two.error, f"{findings.error}, lower is better"),
        ):
            for cell, curve in curves.items():
                numbers = cell.replace("plain", "1").replace("guided", f"{findings.config.scale:g}").replace("+", ", ")
                _band(panel, two.landings, curve, COLOURS[cell], f"({numbers})")
            _shade(panel, derived.plateau_steps)
            if derived.landing_step is not None:
                panel.axvline(derived.landing_step, color="black", linestyle="--", linewidth=0.9)
            panel.set_ylabel(name)
            panel.set_xlabel(f"landing step j1 of call 2, {how}")
        axes[0].legend(fontsize=7, title="(s0, s1)", title_fontsize=7)
        landing = "no landing derived" if derived.landing_step is None else f"landing {derived.landing_step}"
        axes[0].set_title(landing, fontsize=8)
    figure.savefig(path, dpi=110)


def _shade(axes: Any, steps: tuple[int, int] | None) -> None:
    if steps is not None:
        axes.axvspan(steps[0] - 0.5, steps[1] + 0.5, color="#f2c94c", alpha=0.25, linewidth=0)


def _window_text(derived: Derived) -> str:
    if derived.window_steps is None:
        return f"no window: guide {derived.guidance}"
    low, high = derived.window_steps
    return f"window {low} to {high}"
