"""What a job is and how it finishes: the promise that lets a batch be killed at any moment.

A worker makes its file in a staging folder beside the result (same disk), where it appears complete or not at all.
The run then writes down that the file is finished, and only then gives it its name. Whatever moment a kill strikes,
the next run finds one of three things: no complete file (the work is done again), a complete staged file (it only
gets its name), or the named file (nothing is left to do).

    def work(job: Job, target: Path) -> dict[str, Any]: ...   # writes `target` atomically, returns what to report
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

log = logging.getLogger(__name__)

MOST_NAME_BYTES = 255  # of a file's name, on every common file system


@dataclass(frozen=True, kw_only=True)
class Job:
    """One item of a batch.

    Attributes:
        id: unique in the batch and the same in every run.
        output: the file that it makes.
        payload: what the worker needs to know; pickled on the way.
        wish: what is wanted of it, as text; when it changes, the item is done again.
        inputs: files that it reads; when one of them changes, the item is done again.
        about: what the report says about it besides its state.
    """

    id: str
    output: Path
    payload: Any = None
    wish: str = ""
    inputs: tuple[Path, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, run: str = "") -> str:
        """A hash of everything that the result depends on; `run` stands for what all items share (the model)."""
        files = [(str(path), *(identity(path) or ())) for path in self.inputs]
        text = json.dumps([run, self.id, self.wish, files])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def staging(self) -> Path:
        """The folder in which the worker makes the file; hidden, and beside the result."""
        name = f".{self.output.name}.batch"
        if len(os.fsencode(name)) > MOST_NAME_BYTES:  # the result's own name may have them all
            name = f".{hashlib.sha256(os.fsencode(self.output.name)).hexdigest()[:32]}.batch"
        return self.output.parent / name

    def staged(self) -> Path:
        """The finished file before it gets its name."""
        return self.staging() / self.output.name


Worker: TypeAlias = Callable[[Job, Path], dict[str, Any]]
Factory: TypeAlias = Callable[[int], Worker]  # called once per worker process, with the worker's number
Ending = Literal["done", "failed", "died"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one attempt ended.

    Attributes:
        ending: "done"; "failed" (an exception); "died" (the worker process is gone).
        error: one line, for endings other than "done".
        retry: whether another attempt may help: not for wrong files and values.
    """

    job: Job
    ending: Ending
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    retry: bool = False


class Scheduler(Protocol):
    """Where jobs run. Workers load once, then take job after job; a worker that dies is replaced.

    Use as a context manager: leaving it stops all workers at once, also those at work.
    """

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""

    def start(self, factory: Factory, lock: Path | None) -> None:
        """Start the workers, each holding a shared lock on the file `lock` as long as it lives."""

    def submit(self, job: Job) -> None:
        """Hand a job over; at most `slots` at a time."""

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Attempts that have ended, after at most that time.

        Raises:
            ValueError: the workers cannot start (for instance: there is no such model).
        """

    def __enter__(self) -> Scheduler: ...
    def __exit__(self, *error: object) -> None: ...


def attempt(work: Worker, job: Job) -> Outcome:
    """Do a job in this process: what every scheduler's workers call."""
    began = time.perf_counter()
    try:
        shutil.rmtree(job.staging(), ignore_errors=True)  # of an attempt that was killed
        job.staging().mkdir(parents=True)
        result = work(job, job.staged())
    except (ValueError, OSError) as error:
        # A wrong file or value stays wrong; the machine (disk, network folder, memory) may be better next time.
        retry = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        return _failed(job, str(error), began, retry=retry)
    except Exception as error:
        log.info("%s", traceback.format_exc())
        return _failed(job, f"{type(error).__name__}: {error}", began, retry=True)
    if not job.staged().exists():
        return _failed(job, "the worker made no file (a bug)", began, retry=False)
    return Outcome(job=job, ending="done", seconds=time.perf_counter() - began, result=result)


def _failed(job: Job, error: str, began: float, *, retry: bool) -> Outcome:
    shutil.rmtree(job.staging(), ignore_errors=True)
    text = " ".join(error.split())
    return Outcome(job=job, ending="failed", seconds=time.perf_counter() - began, error=text, retry=retry)


def identity(path: Path) -> tuple[int, int] | None:
    """Size and time of a file, which a rename keeps; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
