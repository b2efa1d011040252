"""Batches: what a manifest may say, what is done and done again, and that no kill costs or doubles anything."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from batch_child import Writer, jobs_in
from lipstream.batch.columns import ColumnError, read_fields
from lipstream.batch.jobs import Job, Outcome, Worker, attempt
from lipstream.batch.processes import ProcessScheduler
from lipstream.batch.run import BatchConfig, BatchProgress, BatchSummary, plan, run_jobs
from lipstream.batch.state import Record, StateFile, read_report
from lipstream.batch.syncing import SyncFactory
from lipstream.cli.batch import _scheduler, default_workers
from lipstream.cli.main import build_parser

CHILD = Path(__file__).with_name("batch_child.py")
KILLS = 50


class InLine:
    """A scheduler without processes: one job at a time, in this process."""

    slots = 1

    def __init__(self, dies_on: Callable[[Job], bool] = lambda job: False) -> None:
        self.dies_on, self.outcomes, self.done = dies_on, [], []  # type: ignore[var-annotated]

    def __enter__(self) -> InLine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, factory: Callable[[int], Worker], lock: Path | None) -> None:
        self.work = factory(0)

    def submit(self, job: Job) -> None:
        self.done.append(job.id)
        if self.dies_on(job):
            job.staging().mkdir(parents=True, exist_ok=True)
            (job.staging() / "half.part").write_text("half")
            self.outcomes.append(Outcome(job=job, ending="died", seconds=0, error="the worker process died"))
        else:
            self.outcomes.append(attempt(self.work, job))

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        ready, self.outcomes = self.outcomes, []
        return ready


def run(
    folder: Path, jobs: list[Job], scheduler: Any = None, factory: Any = None, **config: Any
) -> tuple[BatchSummary, list[str]]:
    """One run; the summary, and the jobs that were started."""
    scheduler = scheduler or InLine()
    factory = factory or Writer(folder / "log", 0.0)
    with StateFile(folder / "report.jsonl", [job.id for job in jobs]) as state, scheduler:
        summary = run_jobs(jobs, scheduler, factory, state, BatchConfig(**config))
    return summary, getattr(scheduler, "done", [])


def leftovers(folder: Path) -> set[str]:
    """Everything in a batch's folder that is neither a result, nor the report, nor the test's own diary."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or p.name.startswith(".")}
    return {name for name in found if not name.startswith("out/item")} - {"report.jsonl", "log"}


# ------------------------------------------------------------------------------------------ what is done


def test_second_run_does_nothing_and_the_report_has_one_line_per_item(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 3)
    summary, done = run(tmp_path, jobs)
    assert (summary.done, summary.kept, summary.failed) == (3, 0, {}) and len(done) == 3
    summary, done = run(tmp_path, jobs)
    assert (summary.done, summary.kept, done) == (0, 3, [])
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [(line["id"], line["state"], line["attempts"]) for line in lines] == [(job.id, "done", 1) for job in jobs]
    assert all(line["result"] == {"lines": 4} for line in lines)
    assert not leftovers(tmp_path)


def test_changed_lost_and_touched_items_are_done_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    jobs = [Job(id="item1", output=tmp_path / "out/item1", wish="1"), *jobs_in(tmp_path, 2)]
    jobs.append(Job(id="item9", output=tmp_path / "out/item9", inputs=(source,)))
    run(tmp_path, jobs)
    jobs[0] = Job(id="item1", output=tmp_path / "out/item1", wish="2")
    jobs[1].output.unlink()
    source.write_text("longer")
    records = read_report(tmp_path / "report.jsonl")
    assert [action for _, action in plan(jobs, records, BatchConfig())] == ["redo", "redo", "keep", "redo"]
    assert run(tmp_path, jobs)[1] == ["item1", "item000", "item9"]
    assert run(tmp_path, jobs, run="another model")[1] == [job.id for job in jobs]


def test_a_strangers_file_is_kept_unless_forced(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 2)
    jobs[0].output.parent.mkdir()
    jobs[0].output.write_text("mine")
    summary, _ = run(tmp_path, jobs)
    assert summary.done == 1 and "--force" in summary.failed["item000"]
    assert jobs[0].output.read_text() == "mine"
    assert run(tmp_path, jobs, force=True)[0].done == 1
    assert jobs[0].output.read_text() == "item000 0\nitem000 1\nitem000 2\nitem000 3\n"


@dataclass(frozen=True)
class Failing:
    """A factory whose worker raises for some items."""

    errors: dict[str, Exception]

    def __call__(self, number: int) -> Worker:
        def work(job: Job, target: Path) -> dict[str, Any]:
            if job.id in self.errors:
                target.with_name("half.part").write_text("half")
                raise self.errors[job.id]
            target.write_text(job.id)
            return {}

        return work


def test_failures_do_not_stop_the_others_and_only_chance_is_tried_again(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 4)
    errors = {
        "item000": ValueError("no face"),
        "item001": OSError(28, "No space left"),
        "item002": RuntimeError("x\ny"),
    }
    summary, done = run(tmp_path, jobs, factory=Failing(errors), retries=2)
    assert Counter(done) == {"item000": 1, "item001": 3, "item002": 3, "item003": 1}
    assert summary.done == 1
    assert summary.failed["item000"] == "no face" and summary.failed["item002"] == "RuntimeError: x y"
    records = read_report(tmp_path / "report.jsonl")
    assert [(r.state, r.attempts) for r in records.values()] == [
        ("failed", 1),
        ("failed", 3),
        ("failed", 3),
        ("done", 1),
    ]
    assert not leftovers(tmp_path)
    assert run(tmp_path, jobs, factory=Failing({}))[1] == ["item000", "item001", "item002"]  # tried anew


def test_a_dead_worker_costs_an_attempt(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 2)
    deaths = iter([True, True, False, False])
    summary, done = run(tmp_path, jobs, InLine(lambda job: job.id == "item000" and next(deaths)), retries=2)
    assert summary.failed == {} and done.count("item000") == 3
    summary, done = run(tmp_path, jobs, InLine(lambda job: True), retries=1, run="again")
    assert set(summary.failed) == {"item000", "item001"} and len(done) == 4
    assert not leftovers(tmp_path)


def test_stopping_leaves_nothing_half_done(tmp_path: Path) -> None:
    class Stopped(InLine):
        def wait(self, timeout_seconds: float) -> list[Outcome]:
            raise KeyboardInterrupt

    jobs = jobs_in(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, jobs, Stopped(), factory=Failing({"item000": ValueError("stopped at work")}))
    assert read_report(tmp_path / "report.jsonl")["item000"].state == "pending"
    assert not leftovers(tmp_path)


def test_a_finished_file_without_a_name_gets_it_and_is_not_made_again(tmp_path: Path) -> None:
    """The moments around the end of a job, one by one: a kill at each of them leaves this."""
    (job,) = jobs = jobs_in(tmp_path, 1)
    print_of = job.fingerprint()
    for state in ("running", "done"):
        job.staging().mkdir(parents=True)
        job.staged().write_text("finished")
        stat = job.staged().stat()
        size, mtime = (stat.st_size, stat.st_mtime_ns) if state == "done" else (0, 0)
        record = Record(id=job.id, state=state, fingerprint=print_of, size=size, mtime_ns=mtime)  # type: ignore[arg-type]
        (tmp_path / "report.jsonl").write_text(json.dumps(record.__dict__) + "\n" + '{"id": "item0')  # cut off
        summary, done = run(tmp_path, jobs)
        assert (done, summary.kept, job.output.read_text()) == ([], 1, "finished")
        assert not leftovers(tmp_path)
        job.output.unlink()


def test_two_runs_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipstream.batch.state.LOCK_PATIENCE_SECONDS", 0.1)
    with (
        StateFile(tmp_path / "report.jsonl", []),
        pytest.raises(ValueError, match="another run"),
        StateFile(tmp_path / "report.jsonl", []),
    ):
        pass
    (tmp_path / "other").write_text("not a report\n")
    with pytest.raises(ValueError, match="line 1 is not a report's"), StateFile(tmp_path / "other", []):
        pass
    assert (tmp_path / "other").read_text() == "not a report\n"


# ------------------------------------------------------------------------------------------ processes and kills


def children_of(pid: int) -> list[int]:
    """Worker processes of a batch (its resource tracker left out)."""
    try:
        pids = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [p for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    except OSError:
        return []


def diary(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def starts(folder: Path) -> int:
    return sum(word == "start" for word, *_ in diary(folder))


def check_diary(folder: Path, count: int) -> None:
    """Every item there once, with the right content; none started after it was finished; nothing left over."""
    finished: set[str] = set()
    for word, name, *_ in diary(folder):
        if word in ("start", "finish"):
            assert name not in finished, f"{name} was finished and then done again"
        if word == "finish":
            finished.add(name)
    for job in jobs_in(folder, count):
        assert job.output.read_text() == "".join(f"{job.id} {line}\n" for line in range(4))
    assert not leftovers(folder)
    records = read_report(folder / "report.jsonl")
    assert len((folder / "report.jsonl").read_text().splitlines()) == count
    assert {r.state for r in records.values()} == {"done"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_fifty_kills_at_random_points_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """The issue's figure: 50 SIGKILLs, of the parent or of a worker, then a run to the end. About 20 s, all of it
    process starts: a kill needs something to kill."""
    count, kills, chance = 100, 0, random.Random(5)
    command = [sys.executable, str(CHILD), str(tmp_path), str(count), "0.008", "2"]
    (tmp_path / "log").touch()
    while kills < KILLS:
        begun = starts(tmp_path)
        with subprocess.Popen(command) as process:
            # From the first job of the run on: a kill before it would only meet Python's own start.
            while starts(tmp_path) == begun and process.poll() is None:
                time.sleep(0.005)
            while kills < KILLS and process.poll() is None:
                time.sleep(chance.uniform(0.0, 0.15))
                workers = children_of(process.pid)
                victim = chance.choice(workers) if workers and chance.random() < 0.4 else process.pid
                os.kill(victim, signal.SIGKILL)
                kills += 1
                if victim == process.pid:
                    process.wait()
            process.kill()
        if all(job.output.exists() for job in jobs_in(tmp_path, count)):
            count += 100  # finished already: more work for the other kills
            command[3] = str(count)
    assert subprocess.run(command, timeout=60).returncode == 0
    check_diary(tmp_path, count)


def test_workers_load_once_and_die_with_their_parent(tmp_path: Path) -> None:
    jobs = jobs_in(tmp_path, 6)
    seen: list[BatchProgress] = []
    with StateFile(tmp_path / "report.jsonl", [j.id for j in jobs]) as state, ProcessScheduler(2) as scheduler:
        run_jobs(jobs, scheduler, Writer(tmp_path / "log", 0.01), state, progress=seen.append)
    assert sum(word == "load" for word, *_ in diary(tmp_path)) == 2
    assert (seen[0].done, seen[-1].done, seen[-1].running) == (0, 6, 0)
    assert any(p.seconds_left for p in seen)
    check_diary(tmp_path, 6)


@dataclass(frozen=True)
class Unusable:
    """A factory that cannot load."""

    def __call__(self, number: int) -> Worker:
        raise ValueError("unknown model 'x'")


def test_a_model_that_cannot_be_loaded_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'x'"):
        run(tmp_path, jobs_in(tmp_path, 3), ProcessScheduler(1), Unusable())
    assert not leftovers(tmp_path)


@dataclass(frozen=True)
class Unlucky:
    """A factory that fails with what no user is to blame for."""

    def __call__(self, number: int) -> Worker:
        raise RuntimeError("out of memory")


def test_a_worker_that_cannot_load_shows_no_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="3 workers in a row died while loading"):
        run(tmp_path, jobs_in(tmp_path, 1), ProcessScheduler(1), Unlucky())
    said = capfd.readouterr().err
    assert "worker 0 cannot load: RuntimeError: out of memory" in said and "Traceback" not in said


@pytest.mark.parametrize("text", ['{"video": "a.mp4", "audio": "b.wav", "output": "c.mp4"}', "a note", '{"id": 1}\nx'])
def test_what_is_no_report_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a report's"), StateFile(path, []):
        pass
    assert path.read_text() == text


# ------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Options:
    """Every kind of field that a manifest can fill."""

    size: int = 1
    gain: float = 1.0
    loud: bool = False
    mode: Literal["a", "b"] | None = None
    near: int | None = None
    file: Path | None = None


def test_columns_become_fields_of_any_dataclass() -> None:
    row = {"size": "3", "gain": "0.5", "loud": "yes", "mode": "b", "near": "", "file": "x.png", "other": "?"}
    assert read_fields(Options, row) == Options(3, 0.5, True, "b", None, Path("x.png"))
    assert read_fields(Options, {"size": 3.0, "loud": False, "near": 7}) == Options(size=3, near=7)
    for column, value, said in (
        ("size", "3.5", "not a whole number"),
        ("size", True, "not a number"),
        ("gain", "loud", "not a number"),
        ("loud", "maybe", "neither yes nor no"),
        ("mode", "c", "use one of a, b"),
        ("file", 3, "not text"),
    ):
        with pytest.raises(ColumnError, match=said) as error:
            read_fields(Options, {column: value})
        assert error.value.column == column


def test_a_result_may_have_the_longest_name(tmp_path: Path) -> None:
    """255 bytes: the hidden folder beside it needs another name, the same in every run, one for each result."""
    names = [f"{start}{'ü' * 125}.mp4" for start in ("a", "b")]
    assert [len(os.fsencode(name)) for name in names] == [255, 255]
    jobs = [Job(id=name, output=tmp_path / name) for name in names]
    assert len({job.staging() for job in jobs}) == 2 and jobs[0].staging() == jobs[0].staging()
    summary, _ = run(tmp_path, jobs)
    assert summary.done == 2 and sorted(path.name for path in tmp_path.glob("*.mp4")) == names
    assert Job(id="c", output=tmp_path / "c.mp4").staging() == tmp_path / ".c.mp4.batch"


def test_workers_log_what_their_run_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`-v` reaches the processes that do the work, and each says which one it is."""
    root, before = logging.getLogger(), logging.getLogger().level
    jobs = [Job(id="a", output=tmp_path / "a.txt")]
    for level, expected in ((logging.INFO, True), (logging.WARNING, False)):
        root.setLevel(level)
        try:
            with ProcessScheduler(1) as scheduler:
                scheduler.start(Speaker(), None)
                scheduler.submit(jobs[0])
                while not (outcomes := scheduler.wait(20)):
                    pass
        finally:
            root.setLevel(before)
        assert outcomes[0].ending == "done"
        said = capfd.readouterr().err
        assert ("INFO worker 0 speaker: at work" in said) is expected
        assert "WARNING worker 0 speaker: careful" in said


@dataclass(frozen=True)
class Speaker:
    """Factory of a worker that logs."""

    def __call__(self, number: int) -> Worker:
        def work(job: Job, target: Path) -> dict[str, Any]:
            logging.getLogger("speaker").info("at work")
            logging.getLogger("speaker").warning("careful")
            target.write_text("done")
            return {}

        return work


def test_a_worker_a_gpu_or_for_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)), raising=False)
    assert [default_workers(device) for device in ("cuda", "cuda:1", "cpu", None)] == [3, 1, 5, 5]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # told when the model loads
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert [default_workers(device) for device in ("cuda", None)] == [1, 1]
    arguments = build_parser().parse_args(["batch", "jobs.csv", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for jobs, slots in ((8, 3), (2, 2)):
        assert _scheduler(arguments, jobs, 1).slots == slots


def test_workers_share_out_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipstream.pipeline import LipSync

    devices: list[str] = []
    monkeypatch.setattr(LipSync, "from_pretrained", lambda **loading: devices.append(loading["device"]))
    for number in range(4):
        SyncFactory(loading={"model": "pocket", "device": "cuda"}, gpus=2)(number)
    SyncFactory(loading={"model": "pocket", "device": "cuda:1"}, gpus=0)(3)
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:1"]
