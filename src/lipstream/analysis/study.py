"""The whole analysis of a teacher in one drop mode: sample, score, average, derive; every clip's work is kept.

Under the folder, per drop mode: `trajectories/CLIP.safetensors` (x0 of every step), `scores/CLIP.json` (all metrics of
trajectory and factorial), `curves.json` (means, standard errors, what was derived). A stopped analysis goes on where it
was; clips that another metric set scored are scored again; files of another teacher or schedule are refused.

    study = Study(network, metrics, StudyConfig(scale=4.5, drop="audio"), folder)
    findings = study.run(clips)
    findings.derived.window_steps
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipstream.analysis.curves import Curve, Factorial, TradeOff, factorial, over_clips, trade_off
from lipstream.analysis.derive import Derived, Rule, derive
from lipstream.analysis.metrics import Metrics
from lipstream.analysis.trajectory import (
    CELLS,
    SAMPLINGS,
    AnalysisClip,
    Trajectory,
    load_or_run,
    run_factorial,
    run_trajectory,
)
from lipstream.diffusion.guidance import DropMode, null_conditions
from lipstream.diffusion.sampler import chunk_generator
from lipstream.diffusion.teacher import TEACHER_STEPS, Network, Teacher, teacher_times
from lipstream.evaluation.protocol import plain

log = logging.getLogger(__name__)

#: Metric -> one number per step (or landing) of a clip.
Scores = dict[str, list[float]]
STEPS_SCORED_AT_ONCE = 10


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is sampled.

    Attributes:
        scale: the guidance scale that is compared with none.
        landings: landing steps of the factorial; None takes 1 ... steps - 1.
        teacher: names the weights (a hash), so that results of others are not taken for theirs.
    """

    scale: float = 4.5
    steps: int = TEACHER_STEPS
    drop: DropMode = "text+audio"
    seed: int = 0
    landings: tuple[int, ...] | None = None
    teacher: str = ""

    def __post_init__(self) -> None:
        if self.scale <= 1:
            raise ValueError(f"the guidance scale to study must be above 1, got {self.scale}")

    @property
    def landing_steps(self) -> tuple[int, ...]:
        """The landings j1 that are run."""
        return tuple(range(1, self.steps)) if self.landings is None else self.landings


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Curves of one drop mode and what the rule makes of them.

    Attributes:
        trade, trade_local: guidance on its own path (the paper's), and at the states of the plain path.
        euler, renoised: the factorial with Euler steps (the paper's), and with fresh noise between the calls.
        derived: of `trade` and `euler`. derived_local: of `trade_local` and `renoised`, what the student meets.
        all_curves: every metric of every run, for the data file.
    """

    config: StudyConfig
    clips: tuple[str, ...]
    sync: str
    error: str
    missing: tuple[str, ...]
    trade: TradeOff
    trade_local: TradeOff
    euler: Factorial
    renoised: Factorial
    derived: Derived
    derived_local: Derived
    all_curves: dict[str, dict[str, Curve]]


class Study:
    """One teacher in one drop mode; see the module docstring.

    Args:
        empty_prompt: encoding of the empty string, for networks with text.
    """

    def __init__(
        self,
        network: Network,
        metrics: Metrics,
        config: StudyConfig,
        folder: Path,
        *,
        empty_prompt: Tensor | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.network, self.metrics, self.config, self.rule = network, metrics, config, rule
        self.folder = folder / config.drop.replace("+", "-")
        self._empty_prompt = empty_prompt

    def run(self, clips: Sequence[AnalysisClip], progress: Callable[[str], None] | None = None) -> Findings:
        """Analyse clips (at least two); `progress` is called with the name of every finished clip.

        Raises:
            ValueError: too few clips, or files of another teacher or schedule in the folder.
        """
        if len(clips) < 2:
            raise ValueError(f"standard errors over clips take at least two clips, got {len(clips)}")
        scores = []
        for clip in clips:
            scores.append(self._scored(clip))
            if progress is not None:
                progress(clip.name)
        findings = self._find([clip.name for clip in clips], scores)
        write_json(self.folder / "curves.json", as_data(findings))
        return findings

    def _teacher(self, clip: AnalysisClip) -> Teacher:
        null = null_conditions(clip.conditions, self.config.drop, self._empty_prompt)
        return Teacher(network=self.network, conditions=clip.conditions, null=null)

    def _noise(self, clip: AnalysisClip) -> tuple[Tensor, Tensor]:
        """Noise of call 1 and of the renoising; depends on (seed, clip name) only."""
        generator = chunk_generator(self.config.seed, zlib.crc32(clip.name.encode()))
        shape = (2, *clip.target.shape)
        drawn = torch.randn(shape, generator=generator).to(clip.target.device)
        return drawn[:1], drawn[1:]

    def _trajectory(self, clip: AnalysisClip) -> Trajectory:
        config = self.config
        settings = {k: getattr(config, k) for k in ("scale", "steps", "drop", "seed", "teacher")}
        path = self.folder / "trajectories" / f"{clip.name}.safetensors"
        return load_or_run(
            path,
            settings,
            lambda: run_trajectory(self._teacher(clip), self._noise(clip)[0], config.scale, config.steps),
        )

    def _scored(self, clip: AnalysisClip) -> dict[str, Any]:
        """{"trajectory": {run: Scores}, "factorial": {sampling: {cell: Scores}}} of a clip, from its file if there."""
        path = self.folder / "scores" / f"{clip.name}.json"
        made: dict[str, Any] = {
            "config": plain(asdict(replace(self.config, landings=self.config.landing_steps)), digits=None)
        }
        made["metrics"] = [type(self.metrics).__name__, self.metrics.sync, self.metrics.error]
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            if kept.pop("made") == made:
                return kept
            log.info("%s: scored with other settings; scoring again", path)
        trajectory = self._trajectory(clip)
        scored: dict[str, Any] = {"trajectory": {}, "factorial": {}}
        for run, x0 in trajectory._asdict().items():
            parts = [self.metrics(part.to(clip.target.device), clip) for part in _pieces(x0)]
            scored["trajectory"][run] = {name: torch.cat([p[name] for p in parts]).tolist() for name in parts[0]}
        scored["factorial"] = self._factorial_scores(clip)
        write_json(path, {"made": made, **scored})
        return scored

    def _factorial_scores(self, clip: AnalysisClip) -> dict[str, dict[str, Scores]]:
        config = self.config
        first, fresh = self._noise(clip)
        found: dict[str, dict[str, Scores]] = {sampling: {cell: {} for cell in CELLS} for sampling in SAMPLINGS}
        for landing in run_factorial(
            self._teacher(clip), first, fresh, config.scale, config.landing_steps, config.steps
        ):
            for sampling, x0 in landing.x0.items():
                for name, values in self.metrics(x0, clip).items():
                    for cell, value in zip(CELLS, values.tolist(), strict=True):
                        found[sampling][cell].setdefault(name, []).append(value)
        return found

    def _find(self, names: list[str], scores: list[dict[str, Any]]) -> Findings:
        config, sync, error = self.config, self.metrics.sync, self.metrics.error
        times = teacher_times(config.steps)
        landing_times = [times[j] for j in config.landing_steps]

        def stack(where: tuple[str, ...], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            rows = []
            for found in scores:
                for key in where:
                    found = found[key]
                rows.append([np.nan if value is None else value for value in found[metric]])
            return np.array(rows, np.float64)

        def path(guided: str) -> TradeOff:
            runs = {"plain": "plain", "guided": guided}
            return trade_off(
                times[:-1],
                {k: stack(("trajectory", v), sync) for k, v in runs.items()},
                {k: stack(("trajectory", v), error) for k, v in runs.items()},
            )

        def calls(sampling: str) -> Factorial:
            syncs, errors = (
                {str(cell): stack(("factorial", sampling, cell), m) for cell in CELLS} for m in (sync, error)
            )
            return factorial(config.landing_steps, landing_times, syncs, errors)

        metrics = list(scores[0]["trajectory"]["plain"])
        places = [("trajectory", run) for run in Trajectory._fields]
        places += [("factorial", s, cell) for s in SAMPLINGS for cell in CELLS]  # type: ignore[misc]
        own, local, euler, renoised = path("guided"), path("local"), calls("euler"), calls("renoise")
        return Findings(
            config=config,
            clips=tuple(names),
            sync=sync,
            error=error,
            missing=self.metrics.missing,
            trade=own,
            trade_local=local,
            euler=euler,
            renoised=renoised,
            derived=derive(own, euler, self.rule),
            derived_local=derive(local, renoised, self.rule),
            all_curves={"/".join(p): {m: over_clips(stack(p, m)) for m in metrics} for p in places},
        )


def _pieces(x0: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(x0), STEPS_SCORED_AT_ONCE):
        yield x0[start : start + STEPS_SCORED_AT_ONCE]


def as_data(findings: Findings) -> dict[str, Any]:
    """The data file of the figures: every curve, and what was derived from which."""
    times = teacher_times(findings.config.steps)
    return {
        "config": asdict(findings.config),
        "clips": list(findings.clips),
        "sync_metric": findings.sync,
        "error_metric": findings.error,
        "missing": list(findings.missing),
        "times": list(times),
        "landings": list(findings.config.landing_steps),
        "derived": asdict(findings.derived),
        "derived_local": asdict(findings.derived_local),
        "paired": {
            "gain": asdict(findings.trade.gain),
            "cost": asdict(findings.trade.cost),
            "gain_local": asdict(findings.trade_local.gain),
            "cost_local": asdict(findings.trade_local.cost),
        },
        "curves": {place: {m: asdict(c) for m, c in curves.items()} for place, curves in findings.all_curves.items()},
    }


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plain(data, digits=None), indent=1))
    temporary.replace(path)
