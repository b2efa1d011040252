"""Jobs in worker processes of this machine.

Processes are spawned, not forked: torch and the video library do not survive a fork. A worker dies with its parent,
also when the parent is killed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from lipstream.batch.jobs import Factory, Job, Outcome, attempt
from lipstream.batch.state import shared_lock

log = logging.getLogger(__name__)

MAX_STILLBORN = 3  # workers in a row that die before their first job: something is wrong with the machine


@dataclass
class _Slot:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    job: Job | None = None
    since: float = 0.0


class ProcessScheduler:
    """A `Scheduler` of worker processes."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"there must be at least 1 worker, got {workers}")
        self._workers = workers
        self._context = multiprocessing.get_context("spawn")
        self._slots: list[_Slot] = []
        self._stillborn = 0
        self._factory: Factory | None = None
        self._lock: Path | None = None

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        return self._workers

    def __enter__(self) -> ProcessScheduler:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            slot.process.kill()
        for slot in self._slots:
            slot.process.join()
            slot.pipe.close()
        self._slots = []

    def start(self, factory: Factory, lock: Path | None) -> None:
        """Start the workers."""
        self._factory, self._lock = factory, lock
        self._slots = [self._spawn(number) for number in range(self._workers)]

    def submit(self, job: Job) -> None:
        """Hand a job to a free worker; one that is still loading gets it when it is ready."""
        slot = next(slot for slot in self._slots if slot.job is None)
        slot.job, slot.since = job, time.perf_counter()
        if slot.ready:
            self._send(slot)

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Attempts that have ended."""
        busy: dict[object, int] = {slot.pipe: i for i, slot in enumerate(self._slots)}
        outcomes = []
        for pipe in wait([slot.pipe for slot in self._slots], timeout_seconds):
            outcome = self._hear(busy[pipe])
            if outcome is not None:
                outcomes.append(outcome)
        return outcomes

    def _hear(self, number: int) -> Outcome | None:
        slot = self._slots[number]
        try:
            message = slot.pipe.recv()
        except (EOFError, OSError):
            return self._bury(number)
        if message == "ready":
            slot.ready, self._stillborn = True, 0
            if slot.job is not None:
                self._send(slot)
            return None
        if isinstance(message, Outcome):
            slot.job = None
            return message
        raise ValueError(str(message))

    def _bury(self, number: int) -> Outcome | None:
        """Put another worker in the place of a dead one."""
        slot = self._slots[number]
        slot.pipe.close()
        slot.process.join()
        code = slot.process.exitcode
        self._slots[number] = self._spawn(number)
        how = (
            f"killed by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
        )
        log.info("worker %d died (%s) and was replaced", number, how)
        if not slot.ready:
            self._stillborn += 1
            if self._stillborn >= MAX_STILLBORN:
                raise RuntimeError(f"{MAX_STILLBORN} workers in a row died while loading ({how}); enough memory?")
        if slot.job is None:
            return None
        if not slot.ready:  # the job never began: it is not its fault
            self._slots[number].job, self._slots[number].since = slot.job, slot.since
            return None
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        error = f"the worker process died ({how}{hint})"
        return Outcome(job=slot.job, ending="died", seconds=time.perf_counter() - slot.since, error=error, retry=True)

    def _send(self, slot: _Slot) -> None:
        slot.since = time.perf_counter()
        try:
            slot.pipe.send(slot.job)
        except OSError:
            log.info("a worker died before its job; seen at the next wait")

    def _spawn(self, number: int) -> _Slot:
        here, there = self._context.Pipe()
        arguments = (self._factory, number, there, self._lock, log_level())
        process = self._context.Process(target=_work, args=arguments, name=f"lipstream-batch-{number}", daemon=True)
        process.start()
        there.close()
        return _Slot(process, here)


def log_level() -> int | None:
    """What this process logs; None where nobody has asked for a log."""
    root = logging.getLogger()
    return root.getEffectiveLevel() if root.handlers else None


def log_as_parent(level: int | None, number: int) -> None:
    """Make a worker log what its run logs (`-v`), with its number."""
    if level is not None:
        form = f"%(levelname)s worker {number} %(name)s: %(message)s"
        logging.basicConfig(level=level, format=form, stream=sys.stderr, force=True)


def _work(factory: Factory, number: int, pipe: Connection, lock: Path | None, level: int | None) -> None:
    """A worker's life."""
    log_as_parent(level, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with shared_lock(lock):
        try:
            work = factory(number)
        except (ValueError, OSError) as error:
            pipe.send(str(error))
            return
        except Exception as error:  # memory, a driver: the next worker may have more luck
            log.warning("worker %d cannot load: %s", number, " ".join(f"{type(error).__name__}: {error}".split()))
            sys.exit(1)
        pipe.send("ready")
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            pipe.send(attempt(work, job))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
