"""Run jobs to their end: skip what is finished, retry what may work, go on after failures, survive any kill.

with StateFile(report, [job.id for job in jobs]) as state, ProcessScheduler(2) as scheduler:
    summary = run_jobs(jobs, scheduler, factory, state)
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lipstream.batch.jobs import Factory, Job, Outcome, Scheduler, identity
from lipstream.batch.state import Record, StateFile
from lipstream.options import OptionError

log = logging.getLogger(__name__)

Action = Literal["do", "redo", "finish", "keep", "refuse"]
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a batch runs.

    Attributes:
        retries: further attempts after one that may have failed by chance (a dead worker, a full disk, a bug).
        force: overwrite results that are not this batch's own.
        run: what all items share (the model, its seed); when it changes, items are done again.
    """

    retries: int = 2
    force: bool = False
    run: str = ""

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise OptionError("retries", self.retries, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class BatchProgress:
    """How far a batch is; `seconds_left` is None until an item of this run is finished."""

    total: int
    done: int
    failed: int
    running: int
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """How a batch ended: items done now, finished earlier, and failed (with their error)."""

    done: int
    kept: int
    failed: dict[str, str]
    seconds: float


# Whether a finished record still stands; the usual answer is that its file is there, unchanged.
Standing = Callable[[Job, Record], bool]


def file_stands(job: Job, record: Record) -> bool:
    """Whether the file that a record tells of is still the one at the job's output."""
    return identity(job.output) == record.identity


def plan(
    jobs: Sequence[Job], records: Mapping[str, Record], config: BatchConfig, standing: Standing = file_stands
) -> list[tuple[Job, Action]]:
    """What a run would do with every job; changes nothing.

    "keep": finished. "finish": made by a run that was killed before it gave the file its name. "do". "redo": the item,
    its input or the model changed, or its result is gone. "refuse": another file has the output's name.
    """
    return [(job, _action(job, records.get(job.id), config, standing)) for job in jobs]


def _action(job: Job, record: Record | None, config: BatchConfig, standing: Standing) -> Action:
    known = record is not None and record.fingerprint == job.fingerprint(config.run)
    if record is not None and known:
        if record.state == "done" and standing(job, record):
            return "keep"
        if record.state in ("running", "done") and job.staged().exists():
            return "finish"
    if job.output.exists():
        ours = record is not None and record.size > 0 and identity(job.output) == record.identity
        return "redo" if ours else "do" if config.force else "refuse"
    return "redo" if record is not None and record.state == "done" else "do"


class _Run:
    """One run over the jobs."""

    def __init__(self, jobs: Sequence[Job], state: StateFile, config: BatchConfig) -> None:
        self.jobs, self.state, self.config = jobs, state, config
        self.waiting: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self.attempts: dict[str, int] = {}
        self.done = self.kept = 0
        self.failed: dict[str, str] = {}
        self.began = time.monotonic()

    def prepare(self, actions: list[tuple[Job, Action]]) -> None:
        """Sort the jobs, and put in order what a killed run left behind."""
        for job, action in actions:
            if action == "keep":
                self.kept += 1
                shutil.rmtree(job.staging(), ignore_errors=True)
            elif action == "finish":
                record = self.state.records[job.id]
                self.commit(job, record if record.state == "done" else replace(record, result={"recovered": True}))
                self.kept += 1
            elif action == "refuse":
                self.fail(job, f"{job.output}: exists already; choose another name or add --force", 0.0)
            else:
                self.waiting.append(job)
        mine = {job.id for job in self.jobs}
        for record in self.state.records.values():
            # An item that was running when a kill came, and is no longer asked for.
            if record.id not in mine and record.state == "running" and record.staging:
                shutil.rmtree(record.staging, ignore_errors=True)

    def submit(self, job: Job, scheduler: Scheduler) -> None:
        self.attempts[job.id] = self.attempts.get(job.id, 0) + 1
        self.state.write(replace(self._record(job), state="running"))
        self.running[job.id] = job
        scheduler.submit(job)

    def finish(self, outcome: Outcome) -> None:
        """Write down how an attempt ended."""
        job = self.running.pop(outcome.job.id)
        if outcome.ending == "done" or (outcome.ending == "died" and job.staged().exists()):
            result = outcome.result if outcome.ending == "done" else {"recovered": True}
            if not job.staged().exists():
                raise ValueError(
                    f"{job.staged()}: a worker made it, but it cannot be seen from here; use a shared folder"
                )
            self.commit(job, replace(self._record(job), result=result, seconds=round(outcome.seconds, 3)))
            self.done += 1
            return
        shutil.rmtree(job.staging(), ignore_errors=True)
        again = (outcome.retry or outcome.ending == "died") and self.attempts[job.id] <= self.config.retries
        if again:
            log.warning("%s: %s; attempt %d follows", job.id, outcome.error, self.attempts[job.id] + 1)
            self.waiting.append(job)
        else:
            self.fail(job, outcome.error, outcome.seconds)

    def commit(self, job: Job, record: Record) -> None:
        """Give a staged file its name. The record comes first: with it, a kill in between is made good."""
        found = identity(job.staged())
        assert found is not None, f"{job.staged()} was there a moment ago"
        self.state.write(replace(record, state="done", error="", staging="", size=found[0], mtime_ns=found[1]))
        os.replace(job.staged(), job.output)
        _sync_folder(job.output.parent)
        shutil.rmtree(job.staging(), ignore_errors=True)

    def fail(self, job: Job, error: str, seconds: float) -> None:
        self.failed[job.id] = error
        self.state.write(replace(self._record(job), state="failed", error=error, staging="", seconds=round(seconds, 3)))

    def give_up(self) -> None:
        """Clean up after jobs that were stopped at work."""
        for job in self.running.values():
            if not job.staged().exists():
                shutil.rmtree(job.staging(), ignore_errors=True)
                self.state.write(replace(self.state.records[job.id], state="pending", staging=""))

    def progress(self, slots: int) -> BatchProgress:
        left = None
        if self.done:
            # Whole items only: all workers together take so long per item.
            rate = (time.monotonic() - self.began) / self.done
            left = rate * (len(self.waiting) + len(self.running) / 2)
        finished = self.done + self.kept
        return BatchProgress(
            total=len(self.jobs), done=finished, failed=len(self.failed), running=len(self.running), seconds_left=left
        )

    def _record(self, job: Job) -> Record:
        """What is known of a job now. An earlier result stays known: it is not a stranger's and may be replaced."""
        before = self.state.records.get(job.id)
        size, mtime_ns = before.identity if before is not None else (0, 0)
        return Record(
            size=size,
            mtime_ns=mtime_ns,
            id=job.id,
            state="pending",
            attempts=self.attempts.get(job.id, 0),
            fingerprint=job.fingerprint(self.config.run),
            staging=str(job.staging()),
            about=dict(job.about),
        )


def run_jobs(
    jobs: Sequence[Job],
    scheduler: Scheduler,
    factory: Factory,
    state: StateFile,
    config: BatchConfig | None = None,
    *,
    standing: Standing = file_stands,
    progress: Callable[[BatchProgress], None] | None = None,
) -> BatchSummary:
    """Do all jobs that are not done.

    Args:
        scheduler: entered, not started; it is started if there is anything to do.
        factory: makes the worker function, once in every worker process.
        state: open.

    Raises:
        ValueError: the workers cannot start, or their files are not seen from here.
    """
    config = config or BatchConfig()
    run = _Run(jobs, state, config)
    run.prepare(plan(jobs, state.records, config, standing))
    report = progress or (lambda _: None)
    report(run.progress(scheduler.slots))
    try:
        if run.waiting:
            scheduler.start(factory, state.lock_path)
        while run.waiting or run.running:
            while run.waiting and len(run.running) < scheduler.slots:
                run.submit(run.waiting.popleft(), scheduler)
            for outcome in scheduler.wait(_POLL_SECONDS):
                run.finish(outcome)
            report(run.progress(scheduler.slots))
    except BaseException:
        scheduler.__exit__(None, None, None)  # first no worker may write any more
        run.give_up()
        raise
    return BatchSummary(done=run.done, kept=run.kept, failed=run.failed, seconds=time.monotonic() - run.began)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; file systems that cannot are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        log.info("%s: folder cannot be synced to disk", folder)
    finally:
        os.close(handle)
