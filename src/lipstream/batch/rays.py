"""Jobs on a Ray cluster: `pip install '.[ray]'`.

Without an address Ray runs embedded on this machine, with as many worker processes as wished. On a cluster, all
machines must see the input and output files under the same names (a shared folder) and have lipstream installed.

    with RayScheduler(workers=8, address="ray://head:10001", gpus=1) as scheduler: ...
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

from lipstream.batch.jobs import Factory, Job, Outcome, attempt
from lipstream.batch.processes import MAX_STILLBORN, log_as_parent, log_level
from lipstream.batch.state import shared_lock

log = logging.getLogger(__name__)

_CLUSTER_PATIENCE_SECONDS = 600.0  # a cluster may have to start machines first


class _Labourer:
    """What an actor is made of: it loads once, then takes job after job."""

    def __init__(self, factory: Factory, number: int, lock: Path | None, level: int | None) -> None:
        log_as_parent(level, number)
        self._hold = shared_lock(lock if lock is not None and lock.exists() else None)
        self._hold.__enter__()
        self._problem, self._work = "", None
        try:
            self._work = factory(number)
        except (ValueError, OSError) as error:
            self._problem = str(error) or type(error).__name__

    def problem(self) -> str:
        """Why it cannot work; empty where it can."""
        return self._problem

    def work(self, job: Job) -> Outcome:
        """Do one job."""
        assert self._work is not None, self._problem
        return attempt(self._work, job)


class RayScheduler:
    """A `Scheduler` of Ray actors.

    Args:
        workers: actors, each doing one job at a time.
        address: of a cluster ("auto", "ray://host:port", "host:port"); None runs Ray inside this process's machine.
        gpus: GPUs of each actor; Ray shows it only those.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, workers: int, address: str | None = None, *, gpus: float = 0) -> None:
        if workers < 1:
            raise ValueError(f"there must be at least 1 worker, got {workers}")
        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed; pip install '.[ray]', or leave out --ray") from None
        self._ray: Any = ray
        self._workers, self._gpus = workers, gpus
        self._own = not ray.is_initialized()
        self._actors: list[Any] = []
        self._tasks: dict[Any, tuple[int, Job, float]] = {}
        self._factory: Factory | None = None
        self._lock: Path | None = None
        if self._own:
            _connect(ray, address, workers)

    @property
    def slots(self) -> int:
        """How many jobs run at a time."""
        return self._workers

    def __enter__(self) -> RayScheduler:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._tasks = [], {}
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()

    def start(self, factory: Factory, lock: Path | None) -> None:
        """Start the actors; returns when all have loaded, so that a wrong model is told before any job begins."""
        self._factory, self._lock = factory, lock
        self._actors = [self._create(number) for number in range(self._workers)]
        for number in range(self._workers):
            self._await(number)

    def submit(self, job: Job) -> None:
        """Hand a job to a free actor."""
        busy = {number for number, _, _ in self._tasks.values()}
        number = next(i for i in range(self._workers) if i not in busy)
        self._tasks[self._actors[number].work.remote(job)] = (number, job, time.perf_counter())

    def wait(self, timeout_seconds: float) -> list[Outcome]:
        """Attempts that have ended."""
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=timeout_seconds)
        return [self._hear(reference) for reference in ready]

    def _hear(self, reference: Any) -> Outcome:
        number, job, since = self._tasks.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
            return outcome
        except self._ray.exceptions.RayActorError as error:
            reason = " ".join(str(error).split())[:200]
            log.info("actor %d died (%s) and is replaced", number, reason)
            self._actors[number] = self._create(number)
            self._await(number)
            seconds = time.perf_counter() - since
            return Outcome(job=job, ending="died", seconds=seconds, error=f"the Ray worker died ({reason})", retry=True)

    def _create(self, number: int) -> Any:
        remote = self._ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0)(_Labourer)
        return remote.remote(self._factory, number, self._lock, log_level())

    def _await(self, number: int) -> None:
        """Wait until an actor has loaded.

        Raises:
            ValueError: it cannot load, or the cluster has no room for it.
            RuntimeError: it dies of loading, again and again.
        """
        for _ in range(MAX_STILLBORN):
            try:
                problem = self._ray.get(self._actors[number].problem.remote(), timeout=_CLUSTER_PATIENCE_SECONDS)
            except self._ray.exceptions.GetTimeoutError:
                raise ValueError(
                    f"the Ray cluster has no room for worker {number + 1} of {self._workers}; lower --workers"
                ) from None
            except self._ray.exceptions.RayActorError:
                self._actors[number] = self._create(number)
                continue
            if problem:
                raise ValueError(problem)
            return
        raise RuntimeError(f"{MAX_STILLBORN} Ray workers in a row died while loading; enough memory?")


def _connect(ray: Any, address: str | None, workers: int) -> None:
    if address is not None and ":" in address:
        _knock(address)
    quiet = {"log_to_driver": log.isEnabledFor(logging.INFO), "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "embedded Ray" if address is None else f"Ray cluster {address}"
        raise ValueError(f"{where}: cannot be reached ({' '.join(str(error).split())[:200]})") from None


def _knock(address: str) -> None:
    """See whether anybody listens: Ray itself tries for minutes.

    Raises:
        ValueError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(f"Ray cluster {address}: cannot be reached ({error}); check the address") from None
