"""The ablation tables: the paper's numbers, shared runs, ours beside the paper's, and signs that can disagree."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lipstream.checkpoints.networks import save_dit
from lipstream.cli import ablate
from lipstream.cli.main import main
from lipstream.diffusion.schedule import STUDENT_TIMES
from lipstream.training import ablation_workers
from lipstream.training.ablations import (
    TABLES,
    Outcome,
    Row,
    Table,
    apply,
    as_markdown,
    describe,
    effect,
    run_table,
    student_times,
)
from lipstream.training.distill import DistillConfig
from lipstream.training.material import Material
from tiny import coded_clips, tiny_codec, tiny_dit

PAPER = Path(__file__).parents[2] / "shared" / "paper.md"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stands in for the recipe of stage 2: the fields that rows may change, and one that they may not."""

    guidance_schedule: str = "window"
    beta: float = 10.0
    times: tuple[float, ...] = STUDENT_TIMES
    defective_gradients: bool = False
    window: tuple[float, float] = (0.556, 0.882)
    lr: float = 2e-6


class Workers:
    """Train and measure by writing down what was asked; scores come from a table of the schedule's worth."""

    def __init__(self, worth: Mapping[str, float]) -> None:
        self.worth, self.trained, self.measured = worth, [], []  # type: ignore[var-annotated]

    def train(self, row: Row, seed: int, folder: Path) -> None:
        recipe = apply(Recipe(), row) if row.role == "student" else None
        self.trained.append((row.name, seed))
        (folder / "model.txt").write_text(repr(recipe))

    def measure(self, row: Row, seed: int, folder: Path) -> dict[str, float]:
        assert (folder / "model.txt").exists() == (row.role != "truth")
        self.measured.append((row.name, seed))
        return {"sync": self.worth[row.name] + 0.01 * seed, "lip_r": 0.5}


def test_student_times_are_the_released_ones() -> None:
    assert student_times(0, 30) == STUDENT_TIMES
    assert student_times(0, 25)[1] == 0.833 and student_times(0, 13)[1] == 0.934 and student_times(0) == (0.999, 0.0)


def test_every_row_fits_the_recipe_and_defaults_are_the_papers_choice() -> None:
    for table in TABLES.values():
        for row in table.rows:
            assert isinstance(apply(Recipe(), row), Recipe)
            apply(DistillConfig(), row)  # which has all these fields
            assert row.role == "student" or not row.changes
    final = next(row for row in TABLES["systems"].rows if row.name == "Lip Forcing, 2 calls")
    assert apply(Recipe(), final) == Recipe()
    with pytest.raises(ValueError, match=r"'guidance'.*Recipe has"):
        apply(Recipe(), Row(name="x", changes=(("guidance", "all"),)))


@pytest.mark.skipif(not PAPER.exists(), reason="the paper's digest is not part of the project")
def test_numbers_are_the_papers() -> None:
    text = PAPER.read_text()
    lines = {line.replace(" ", "").lower() for line in text.splitlines()}
    titles = {
        "all": "all-cfg",
        "none": "no-cfg",
        "static + reward": "static+r",
        "window": "windowed",
        "1": "1",
        "4": "4",
    }
    titles |= {"window + reward": "windowed+r", "2 (j1 = 25)": "2(uniform,$j_1=25$)", "2 (j1 = 30)": "2(ours,$j_1=30$)"}
    titles |= {
        "Self Forcing, 4 calls": "selfforcing(1.3b)427.480.38",
        "teacher, 50 steps": "omniavatar-ls(1.3b)501.7945.36",
    }
    checked = 0
    for table in TABLES.values():
        for row in table.rows:
            if len(row.paper) < 4:
                continue
            paper = dict(row.paper)
            numbers = f"{paper['Sync-C']:.2f}{paper['Sync-D']:.2f}"
            start = titles.get(row.name, row.name)
            ends = f"{paper['FVD']:.2f}{paper['SSIM']:.3f}"
            if row.name == "Lip Forcing, 2 calls":
                start = "lipforcing(1.3b)231.580.32"
            found = [line for line in lines if line.startswith(start + numbers) and line.endswith(ends)]
            assert found, (row.name, start + numbers, ends)
            checked += 1
    assert checked == 19


def test_rows_with_the_same_changes_are_trained_once(tmp_path: Path) -> None:
    workers = Workers({row.name: 1.0 for table in TABLES.values() for row in table.rows})
    for name in ("guidance", "reward", "landing"):
        run_table(TABLES[name], workers.train, workers.measure, tmp_path, (0, 1))
    names = [name for name, _ in workers.trained]
    assert len(names) == 2 * (4 + 2 + 3) and names.count("window") == 2  # "static", "window", "30" were there
    before = list(workers.trained)
    again = run_table(TABLES["reward"], workers.train, workers.measure, tmp_path, (0, 1))
    assert workers.trained == before and again.values("static", "sync") == [1.0, 1.01]
    with pytest.raises(ValueError, match="seed"):
        run_table(TABLES["reward"], workers.train, workers.measure, tmp_path, ())


def test_a_killed_run_is_done_again(tmp_path: Path) -> None:
    workers = Workers(dict.fromkeys(("ours", "as in the reference"), 1.0))

    def dies(row: Row, seed: int, folder: Path) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_table(TABLES["gradients"], workers.train, dies, tmp_path, (0,))
    run_table(TABLES["gradients"], workers.train, workers.measure, tmp_path, (0,))
    assert [name for name, _ in workers.trained] == ["ours", "ours", "as in the reference"]
    assert len(list(tmp_path.glob("runs/*/seed-0/measured.json"))) == 2


def outcome(values: dict[str, list[float]]) -> Outcome:
    seeds = tuple(range(len(next(iter(values.values())))))
    measured = {name: tuple({"sync": v} for v in found) for name, found in values.items()}
    return Outcome(table=TABLES["guidance"], seeds=seeds, measured=measured)


def test_signs_are_compared_with_the_papers() -> None:
    found = outcome({"none": [6.0, 6.1], "all": [7.0, 7.1], "window": [5.0, 5.1], "reverse": [6.0, 6.15]})
    rows = {row.name: row for row in TABLES["guidance"].rows}
    agrees = {name: effect(found, row, "sync") for name, row in rows.items()}
    assert agrees["none"] is None
    assert agrees["all"].agrees is True and agrees["window"].agrees is False  # type: ignore[union-attr]
    assert agrees["reverse"].agrees is None  # type: ignore[union-attr]  # within the spread
    text = as_markdown(found)
    assert "| all | 7.05 ± 0.0707 |" in text and "| all | 7.13 | 7.85 | 138.32 | 0.916 |" in text
    assert "+; paper +, agrees" in text and "−; paper +, DIFFERS" in text and "within the spread" in text
    assert text.index("ours (2 seeds)") < text.index("the paper's (other data")
    one = as_markdown(outcome({"none": [6.0], "all": [7.0], "window": [6.5], "reverse": [6.2]}))
    assert "+ (one seed); paper +" in one and "agrees" not in one


def test_missing_numbers_are_named() -> None:
    table = TABLES["systems"]
    measured = {row.name: ({"sync": 1.0},) for row in table.rows if row.name != "stage 1 only"}
    text = as_markdown(Outcome(table=table, seeds=(0,), measured=measured))
    assert "| stage 1 only | not measured |" in text and "| stage 1 only | not reported |" in text
    assert "no such row" in describe(TABLES["gradients"])
    with pytest.raises(ValueError, match="reference"):
        Table(title="x", rows=(Row(name="a"),), reference="b")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ablate.NAMES) == set(TABLES)
    assert main(["ablate", "landing", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "times = (0.999, 0.637, 0.0)" in shown and "114.78" in shown
    module = types.ModuleType("made_up_workers")
    workers = Workers({row.name: index for index, row in enumerate(TABLES["landing"].rows)})
    asked: list[Path | None] = []
    module.make = lambda config: (asked.append(config), (workers.train, workers.measure))[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_workers", module)
    command = ["ablate", "landing", "-o", str(tmp_path), "--seeds", "0", "1", "--workers", "made_up_workers:make"]
    assert main([*command, "--config", "x.json"]) == 0
    assert "| 13 | 0.005 ± " in capsys.readouterr().out and asked == [Path("x.json")]
    assert (tmp_path / "landing.md").read_text().startswith("## Landing")
    kept = json.loads(next(tmp_path.glob("runs/*/seed-1/measured.json")).read_text())
    assert set(kept) == {"sync", "lip_r"}
    for arguments, said in (
        (["ablate", "landing"], "-o OUT"),
        (["ablate", "colour"], "colour"),
        (["ablate", "landing", "-o", str(tmp_path), "--workers", "nowhere:make"], "nowhere"),
        (["ablate", "landing", "-o", str(tmp_path), "--workers", "made_up_workers:other"], "other"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert dataclasses.is_dataclass(Row)


def test_the_pocket_workers_train_and_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coded = coded_clips(2, 72)
    material = Material(tiny_codec(), coded, np.ones(2), coded[:1])
    for name in ("student", "teacher"):
        save_dit(tiny_dit(material.codec), 1.0, tmp_path / f"{name}.safetensors")
    for name in ("codec", "speech", "syncnet", "samples"):
        (tmp_path / name).touch()
    paths = {name: str(tmp_path / name) for name in ("codec", "speech", "syncnet")}
    weights = {name: str(tmp_path / f"{name}.safetensors") for name in ("student", "teacher")}
    file = tmp_path / "budget.json"
    given = {**paths, **weights, "samples": [str(tmp_path / "samples")], "steps": 2, "batch": 2}
    file.write_text(json.dumps(given))
    workers = ablation_workers.Workers(ablation_workers.Budget.read(file))
    workers.__dict__ |= {"material": material, "reward": lambda z, heard: torch.zeros(len(z))}
    found = {}
    for row in TABLES["systems"].rows:
        folder = tmp_path / row.key
        workers.train(row, 0, folder)
        assert (folder / "checkpoint.pt").exists() == (row.role == "student")
        found[row.name] = workers.measure(row, 0, folder)
    assert found["ground truth"]["opening_r"] == 1.0 and found["ground truth"]["mouth_error"] == 0.0
    assert found["teacher, 50 steps"]["fps"] < found["Lip Forcing, 2 calls"]["fps"]
    for change, words in (
        ({"codec": str(tmp_path / "no.safetensors")}, "no.safetensors does not exist"),
        ({"colour": 1}, r"unknown \['colour'\]"),
    ):
        file.write_text(json.dumps(given | change))
        with pytest.raises(ValueError, match=words):
            ablation_workers.ablation_workers(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        ablation_workers.ablation_workers(file)
    with pytest.raises(ValueError, match="--config"):
        ablation_workers.ablation_workers(None)
