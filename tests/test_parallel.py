"""Two processes train what one does; a killed one costs nothing; adapters and averages come out of pieces whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn

import parallel_worker as worker
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.training import parallel
from lipstream.training.export import load_averaged
from lipstream.training.loop import Loop, LoopConfig, Trainee

TESTS = Path(__file__).parent
PATIENCE_SECONDS = 600  # of a machine that is busy with other things


def torchrun(folder: Path, *scenarios: str, restarts: int = 0) -> str:
    """Two processes on this machine; none is left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(TESTS / "parallel_worker.py"), str(folder), *scenarios]
    path = os.pathsep.join([str(TESTS), *sys.path])
    child = subprocess.Popen(
        command,
        # The store: or a second life may read the addresses of the first (see docs/training-at-scale.md).
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=PATIENCE_SECONDS)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)  # torchrun passes it on to its workers, which are no group of ours
            child.wait(30)
    assert child.returncode == 0, output[-4000:]
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios in two processes, in one launch for all workers of the test run: starting takes the time."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "together"
    with FileLock(base / "together.lock"):
        if not folder.exists():
            folder.mkdir()
            torchrun(folder, *worker.SCENARIOS)
            (folder / "done").touch()
    assert (folder / "done").exists(), "the launch failed in another worker"
    return folder


def compare(name: str, together: Path, alone: Path, relative: float, absolute: float) -> dict[str, Tensor]:
    """Every reported number and every weight of a scenario here and in two processes; returns the weights."""
    weights = worker.run(name, alone)
    here, there = worker.rows(alone), worker.rows(together / name)
    assert len(here) == worker.STEPS and here[0] != here[-1]
    for mine, theirs in zip(here, there, strict=True):
        assert mine == pytest.approx(theirs, rel=relative)
    others = torch.load(together / f"{name}.pt")
    assert weights.keys() == others.keys()
    for key, weight in weights.items():
        assert (weight - others[key]).abs().max() <= absolute, key
    return weights


def test_two_processes_are_one_with_accumulation_and_recomputation(together: Path, tmp_path: Path) -> None:
    compare("accumulated", together, tmp_path, 2e-5, 2e-6)


def test_critic_and_student_take_turns_in_two_processes(together: Path, tmp_path: Path) -> None:
    """The student's loss is a rollout: cache, clean passes, a shared exit step, another learning rate and clip."""
    compare("two", together, tmp_path, 2e-5, 2e-6)
    turns = [any(key.startswith("student.") for key in row) for row in worker.rows(together / "two")]
    assert turns == [True, False, False] * (worker.STEPS // 3)


def test_bfloat16_in_two_processes(together: Path, tmp_path: Path) -> None:
    """Gradients are rounded at other places; masters stay float32."""
    weights = compare("bf16", together, tmp_path, 5e-3, 2e-2)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_adapters_in_two_processes(together: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    weights = compare("lora", together, tmp_path, 2e-5, 2e-6)
    start = dict(worker.SCENARIOS["lora"](tmp_path / "start")._learners["model"].trainee.model.named_parameters())
    moved = {name for name, value in start.items() if not torch.equal(value, weights[f"model.model.{name}"])}
    assert moved == {name for name, value in start.items() if value.requires_grad}


def test_kill_9_in_the_midst_of_a_save_changes_nothing(together: Path, tmp_path: Path) -> None:
    """One process dies while it writes step 4; torchrun starts both again, and they go on from step 2."""
    output = torchrun(tmp_path, "killed", restarts=1)
    assert "SIGKILL" in output or "exitcode: -9" in output
    latest, found = json.loads((tmp_path / "found.json").read_text())
    assert latest == "step-00000002" and found == ["step-00000002", "step-00000004"]
    expected = {row["step"]: row for row in worker.rows(together / "free")}
    got = worker.rows(tmp_path / "killed")
    assert [row["step"] for row in got].count(3) == 2  # once in each life
    assert got == [expected[row["step"]] for row in got] and got[-1]["step"] == worker.STEPS
    weights = torch.load(tmp_path / "killed.pt")
    for name, value in torch.load(together / "free.pt").items():
        assert torch.equal(value, weights[name]), name
    kept = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000004", "step-00000006"]


def test_averages_are_read_out_of_pieces(together: Path) -> None:
    model = DiT(FLAVOURS["test"])
    assert load_averaged(model, together / "free") == worker.STEPS
    weights = torch.load(together / "free.pt")
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[f"model.averaged.{name}"]), name


def test_one_process_does_not_take_up_the_run_of_many(together: Path) -> None:
    with pytest.raises(ValueError, match="a run of many processes cannot go on as one of one process"):
        worker.SCENARIOS["free"](together / "free")


def test_without_an_average_the_trained_network_is_the_result(tmp_path: Path) -> None:
    def make(ema: float | None) -> Loop:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        trainee = Trainee(model=model, loss=lambda number: (model.weight.square().sum(), {}))
        return Loop([trainee], LoopConfig(steps=3, ema=ema), tmp_path)

    loop = make(None)
    model = loop.run()["model"]
    assert model is loop._learners["model"].trainee.model
    again = nn.Linear(2, 1)
    assert load_averaged(again, tmp_path) == 3
    assert torch.equal(again.weight, model.weight)
    with pytest.raises(ValueError, match="another choice of ema"):
        make(0.9)


def test_metrics_are_means_over_all_parts(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    trainee = Trainee(
        model=model, loss=lambda number: (0 * model.weight.sum() + number, {"odd": 1.0} if number % 2 else {})
    )
    Loop([trainee], LoopConfig(steps=1, accumulate=4), tmp_path).run()
    row = worker.rows(tmp_path)[0]
    assert row["loss"] == 1.5 and row["odd"] == 1.0


def test_alone_everything_is_a_no_op() -> None:
    assert (parallel.processes(), parallel.rank(), parallel.speaks()) == (1, 0, True)
    assert parallel.share(1.5) == 1.5 and parallel.micro_batch(7) == 7 and parallel.seed_for(3) == 3
    state = torch.get_rng_state()
    parallel.seed_apart()
    assert torch.equal(state, torch.get_rng_state())
    with parallel.started("cpu") as device:
        assert device.type == "cpu" and not parallel.together()
    with pytest.raises(ValueError, match="unknown device"):
        parallel.started("tpu9").__enter__()
