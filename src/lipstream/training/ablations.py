"""The paper's ablations as data: rows of changes to one recipe, run once each, printed beside the paper's numbers.

A row never says how to train: it is a name, what is replaced in the recipe, and the paper's numbers of that row. Two
callables do the work, so that this module needs no training code:

* `train(row, seed, folder)` trains (or goes on training) the row's model in its folder;
* `measure(row, seed, folder)` gives {metric: number} of the model that lies there.

Rows of different tables with the same changes share one folder, `OUT/runs/KEY/seed-S`, and are trained once; a folder
with `measured.json` is neither trained nor measured again.

    outcome = run_table(TABLES["guidance"], train, measure, folder, seeds=(0, 1))
    print(as_markdown(outcome))
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, TypeVar

from lipstream.diffusion.schedule import T_MAX, shifted_grid

log = logging.getLogger(__name__)

Config = TypeVar("Config")
#: What a row trains or measures: stage 2 (the default), stage 1 alone, the teacher, or nothing (the truth).
Role = Literal["student", "stage1", "teacher", "truth"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    Attributes:
        changes: (field of the recipe, value) pairs. Fields used here: `guidance_schedule` ("all", "none", "window",
            "reverse"), `beta` (of the reward; 0 is none), `times` (of the calls and, last, the clean pass),
            `defective_gradients` (bool: the reference's zeroed cache under checkpointing, spec 11.1).
        role: what is measured; only a "student" takes changes.
        paper: the paper's numbers of this row, {metric: number}.
    """

    name: str
    changes: tuple[tuple[str, Any], ...] = ()
    role: Role = "student"
    paper: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> str:
        """Names the row's folder; rows with the same role and changes have the same."""
        text = json.dumps([self.role, sorted((name, value) for name, value in self.changes)])
        words = re.sub(r"[^a-z0-9.]+", "-", "_".join(f"{n}-{v}" for n, v in sorted(self.changes)).lower()).strip("-")
        return "-".join(filter(None, (self.role, words[:60], hashlib.sha256(text.encode()).hexdigest()[:6])))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and the one that the effects of the others are counted from."""

    title: str
    rows: tuple[Row, ...]
    reference: str

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names) or self.reference not in names:
            raise ValueError(f"rows need different names and one is the reference: {names}, {self.reference!r}")


#: Our metric -> the paper's that stands for the same thing, and whether more is better, as in both.
COUNTERPARTS: dict[str, tuple[str, bool]] = {
    "sync": ("Sync-C", True),
    "sync_distance": ("Sync-D", False),
    "mouth_error": ("FVD", False),
    "similarity": ("SSIM", True),
    "fps": ("FPS", True),
}


def student_times(*steps: int) -> tuple[float, ...]:
    """Times of calls at steps of the teacher's grid, to three decimals as in the released code, and the clean pass."""
    grid = shifted_grid(50).clamp(max=T_MAX)
    return (*(round(float(grid[j]), 3) for j in steps), 0.0)


def _paper(sync_c: float, sync_d: float, fvd: float, ssim: float) -> tuple[tuple[str, float], ...]:
    return (("Sync-C", sync_c), ("Sync-D", sync_d), ("FVD", fvd), ("SSIM", ssim))


def _student(
    name: str, paper: tuple[tuple[str, float], ...] = (), *, guidance: str = "window", reward: bool = False, **more: Any
) -> Row:
    changes = {"guidance_schedule": guidance, **({} if reward else {"beta": 0.0}), **more}
    return Row(name=name, changes=tuple(sorted(changes.items())), paper=paper)


#: The 4-step list of the Self Forcing baseline and of the reference's older recipe (spec 3): shifted quarters.
FOUR_CALLS = (0.999, 0.937, 0.833, 0.624, 0.0)
#: What `lipstream analyze` derived for the pocket teacher at scale 2.5 on 30 clips (docs/analysis.md).
POCKET_WINDOW, POCKET_LANDING = (0.093, 0.737), 44
_PAPER_ALL, _PAPER_WINDOW = _paper(7.13, 7.85, 138.32, 0.916), _paper(6.81, 7.85, 119.88, 0.920)
_PAPER_25 = _paper(6.95, 7.85, 124.57, 0.926)

TABLES: dict[str, Table] = {
    "guidance": Table(
        title="Guidance schedule of the teacher; two calls, no reward",
        reference="none",
        rows=(
            _student("all", _PAPER_ALL, guidance="all"),
            _student("none", _paper(6.14, 8.39, 120.85, 0.921), guidance="none"),
            _student("window", _PAPER_WINDOW),
            _student("reverse", _paper(6.98, 7.81, 126.62, 0.917), guidance="reverse"),
        ),
    ),
    "reward": Table(
        title="Components; two calls",
        reference="static",
        rows=(
            _student("static", _PAPER_ALL, guidance="all"),
            _student("static + reward", _paper(7.24, 7.76, 135.94, 0.917), guidance="all", reward=True),
            _student("window", _PAPER_WINDOW),
            _student("window + reward", _paper(6.88, 7.93, 118.86, 0.919), reward=True),
        ),
    ),
    "steps": Table(
        title="Number of calls; window, no reward",
        reference="2 (j1 = 30)",
        rows=(
            _student("1", _paper(6.81, 7.92, 131.50, 0.926), times=student_times(0)),
            _student("2 (j1 = 25)", _PAPER_25, times=student_times(0, 25)),
            _student("2 (j1 = 30)", _PAPER_WINDOW),
            _student("4", _paper(6.81, 8.01, 117.80, 0.923), times=FOUR_CALLS),
        ),
    ),
    "landing": Table(
        title="Landing of the second call; window, no reward",
        reference="30",
        rows=(
            _student("13", _paper(6.79, 7.92, 135.22, 0.927), times=student_times(0, 13)),
            _student("25", _PAPER_25, times=student_times(0, 25)),
            _student("30", _PAPER_WINDOW),
            _student("37", _paper(6.73, 7.87, 114.78, 0.920), times=student_times(0, 37)),
        ),
    ),
    "systems": Table(
        title="Systems (the paper's: 1.3B on HDTF)",
        reference="Lip Forcing, 2 calls",
        rows=(
            Row(name="ground truth", role="truth", paper=(("Sync-C", 7.95), ("Sync-D", 6.92))),
            Row(name="teacher, 50 steps", role="teacher", paper=(("FPS", 1.79), *_paper(8.04, 6.99, 143.75, 0.904))),
            _student(
                "Self Forcing, 4 calls",
                (("FPS", 27.48), *_paper(7.12, 7.80, 124.78, 0.915)),
                guidance="all",
                times=FOUR_CALLS,
            ),
            Row(name="stage 1 only", role="stage1"),
            _student("Lip Forcing, 2 calls", (("FPS", 31.58), *_paper(6.88, 7.93, 118.86, 0.919)), reward=True),
        ),
    ),
    "derived": Table(
        title="The paper's window and landing against those that `lipstream analyze` gave for the pocket teacher",
        reference="the paper's",
        rows=(
            _student("the paper's"),
            _student("derived window", window=POCKET_WINDOW),
            _student("derived window and landing", window=POCKET_WINDOW, times=student_times(0, POCKET_LANDING)),
        ),
    ),
    "gradients": Table(
        title="The reference's student gradients (spec 11.1); window and reward. The paper has no such row",
        reference="ours",
        rows=(
            _student("ours", reward=True),
            _student("as in the reference", reward=True, defective_gradients=True),
        ),
    ),
}


def apply(recipe: Config, row: Row) -> Config:
    """The recipe (a dataclass) with a row's changes.

    Raises:
        ValueError: the recipe has no such field.
    """
    known = {field.name for field in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    unknown = [name for name, _ in row.changes if name not in known]
    if unknown:
        raise ValueError(f"row '{row.name}' changes {unknown[0]!r}; {type(recipe).__name__} has {sorted(known)}")
    return dataclasses.replace(recipe, **dict(row.changes))  # type: ignore[type-var]


Train = Callable[[Row, int, Path], object]
Measure = Callable[[Row, int, Path], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A table's measurements: row name -> one {metric: number} per seed."""

    table: Table
    seeds: tuple[int, ...]
    measured: dict[str, tuple[dict[str, float], ...]]

    def values(self, row: str, metric: str) -> list[float]:
        """A metric of a row over the seeds that have it."""
        found = (seed.get(metric, math.nan) for seed in self.measured.get(row, ()))
        return [value for value in found if value is not None and not math.isnan(value)]

    @property
    def metrics(self) -> list[str]:
        """All metrics, in the order they first appear."""
        return list(dict.fromkeys(name for seeds in self.measured.values() for seed in seeds for name in seed))


def run_table(table: Table, train: Train, measure: Measure, folder: Path, seeds: Sequence[int]) -> Outcome:
    """Train and measure every row with every seed, or take what lies in the folder.

    Raises:
        ValueError: no seed.
    """
    if not seeds:
        raise ValueError("an ablation takes at least one seed")
    measured: dict[str, tuple[dict[str, float], ...]] = {}
    for row in table.rows:
        measured[row.name] = tuple(_measured(row, seed, folder, train, measure) for seed in seeds)
    return Outcome(table=table, seeds=tuple(seeds), measured=measured)


def _measured(row: Row, seed: int, folder: Path, train: Train, measure: Measure) -> dict[str, float]:
    run = folder / "runs" / row.key / f"seed-{seed}"
    path = run / "measured.json"
    if path.exists():
        log.info("%s, seed %d: taken from %s", row.name, seed, path)
        kept: dict[str, float] = json.loads(path.read_text())
        return kept
    run.mkdir(parents=True, exist_ok=True)
    if row.role != "truth":
        log.info("%s, seed %d: training in %s", row.name, seed, run)
        train(row, seed, run)
    found = {name: float(value) for name, value in measure(row, seed, run).items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1))
    temporary.replace(path)
    return found


@dataclass(frozen=True)
class Effect:
    """How a row differs from the reference row: our difference with its spread over seeds, and the paper's.

    `agrees` is None where the paper has no number, or ours is smaller than its spread or has none (one seed).
    """

    ours: float
    spread: float
    paper: float | None

    @property
    def agrees(self) -> bool | None:
        """Whether both differences have the same sign."""
        if self.paper is None or self.paper == 0 or math.isnan(self.spread) or abs(self.ours) <= self.spread:
            return None
        return (self.ours > 0) == (self.paper > 0)


def effect(outcome: Outcome, row: Row, metric: str) -> Effect | None:
    """A row's difference from the reference row in one metric; None where either lacks it."""
    table = outcome.table
    ours, base = outcome.values(row.name, metric), outcome.values(table.reference, metric)
    if row.name == table.reference or not ours or not base:
        return None
    spread = math.hypot(_spread(ours), _spread(base))
    counterpart = COUNTERPARTS.get(metric, ("", True))[0]
    reference = next(r for r in table.rows if r.name == table.reference)
    here, there = dict(row.paper).get(counterpart), dict(reference.paper).get(counterpart)
    paper = None if here is None or there is None else here - there
    return Effect(mean(ours) - mean(base), spread, paper)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    return _number(mean(values)) + (f" ± {_number(_spread(values))}" if len(values) > 1 else "")


def _sign(found: Effect | None) -> str:
    """Our sign against the paper's: `+ / -` and whether they agree."""
    if found is None:
        return "-"
    unsure = math.isnan(found.spread) or abs(found.ours) <= found.spread
    ours = "0" if found.ours == 0 else "+" if found.ours > 0 else "−"
    ours += " (one seed)" if math.isnan(found.spread) else " (within the spread)" if unsure else ""
    if found.paper is None:
        return f"{ours}; paper: none"
    theirs = "0" if found.paper == 0 else "+" if found.paper > 0 else "−"
    verdict = {True: ", agrees", False: ", DIFFERS", None: ""}[found.agrees]
    return f"{ours}; paper {theirs}{verdict}"


def as_markdown(outcome: Outcome) -> str:
    """Three tables: ours (mean ± spread over seeds), the paper's, and the sign of each effect in both."""
    table, metrics = outcome.table, outcome.metrics
    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) != 1 else ''}"
    ours = {row.name: [_cell(outcome.values(row.name, m)) for m in metrics] for row in table.rows}
    shared = [m for m in metrics if m in COUNTERPARTS]
    signs = {
        row.name: [_sign(effect(outcome, row, m)) for m in shared]
        for row in table.rows
        if row.name != table.reference
    }  # fmt: skip
    parts = [f"## {table.title}", _table(f"ours ({seeds})", metrics, ours), _paper_table(table)]
    names = [f"{m} ({COUNTERPARTS[m][0]})" for m in shared]
    if shared:
        parts.append(_table(f"sign of the effect against '{table.reference}'", names, signs))
    return "\n\n".join(filter(None, parts))


def describe(table: Table) -> str:
    """What the rows change, and the paper's numbers."""
    changes = {
        row.name: [row.role, ", ".join(f"{name} = {value}" for name, value in row.changes) or "-", row.key]
        for row in table.rows
    }
    parts = [f"## {table.title}", _table("row", ["role", "changes", "folder"], changes), _paper_table(table)]
    return "\n\n".join(filter(None, parts))


def _paper_table(table: Table) -> str:
    names = list(dict.fromkeys(name for row in table.rows for name, _ in row.paper))
    if not names:
        return ""
    rows = {r.name: [str(dict(r.paper).get(name, "not reported")) for name in names] for r in table.rows}
    return _table("the paper's (other data, other sizes)", names, rows)


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = f"| {corner} | " + " | ".join(columns) + " |"
    lines = [head, "|" + " --- |" * (len(columns) + 1)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)
