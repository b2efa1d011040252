"""A batch of stand-in jobs, run as a process of its own so that it can be killed: see test_batch.py.

python tests/batch_child.py FOLDER JOBS SECONDS WORKERS [ray]
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lipstream.batch.jobs import Job, Scheduler, Worker
from lipstream.batch.processes import ProcessScheduler
from lipstream.batch.run import BatchConfig, run_jobs
from lipstream.batch.state import StateFile


def note(log: Path, line: str) -> None:
    """One line in one write, so that lines of several processes never mix."""
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


@dataclass(frozen=True)
class Writer:
    """Factory of a worker that writes a file slowly, complete or not at all, and keeps a diary."""

    log: Path
    seconds: float

    def __call__(self, number: int) -> Worker:
        note(self.log, f"load {os.getpid()}")

        def work(job: Job, target: Path) -> dict[str, Any]:
            note(self.log, f"start {job.id} {os.getpid()}")
            part = target.with_name("half.part")
            with part.open("w") as stream:
                for line in range(4):
                    stream.write(f"{job.id} {line}\n")
                    stream.flush()
                    time.sleep(self.seconds / 4)
            os.replace(part, target)
            note(self.log, f"finish {job.id} {os.getpid()}")
            return {"lines": 4}

        return work


def jobs_in(folder: Path, count: int) -> list[Job]:
    """The stand-in jobs."""
    return [Job(id=f"item{i:03}", output=folder / "out" / f"item{i:03}.txt") for i in range(count)]


def main(folder: Path, count: int, seconds: float, workers: int, kind: str = "processes") -> int:
    """Run or continue the batch."""
    scheduler: Scheduler
    if kind == "ray":
        from lipstream.batch.rays import RayScheduler

        scheduler = RayScheduler(workers)
    else:
        scheduler = ProcessScheduler(workers)
    jobs = jobs_in(folder, count)
    note(folder / "log", f"run {os.getpid()}")
    with StateFile(folder / "report.jsonl", [job.id for job in jobs]) as state, scheduler:
        # So many attempts that no item fails of being killed.
        config = BatchConfig(retries=1000)
        summary = run_jobs(jobs, scheduler, Writer(folder / "log", seconds), state, config)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]))
