"""The report of a batch, which is also its memory: JSON lines, one state per item.

While a batch runs, changes are appended (one write each, flushed to the disk) and the last line of an item counts. When
a run opens or closes the file it is rewritten with one line per item, in the batch's order, under a temporary name that
is then renamed. A line that a kill cut off is ignored.

A lock file beside it keeps two runs apart. Every worker shares the lock: after a kill of the parent, the next run
waits until the orphans are gone, so that none of them writes where it works.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

State = Literal["pending", "running", "done", "failed"]
LOCK_PATIENCE_SECONDS = 10.0
BEGINNING = b'{"id": '  # of every line; what begins otherwise is not ours, and must not be rewritten


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known about one item.

    Attributes:
        attempts: in the run that wrote this.
        fingerprint: of the job, see `Job.fingerprint`.
        size, mtime_ns: of the finished file; they tell it from any other file of that name.
        staging: folder of an unfinished item.
        result: what the worker said.
        about: what the item is.
    """

    id: str
    state: State
    attempts: int = 0
    seconds: float = 0.0
    error: str = ""
    fingerprint: str = ""
    size: int = 0
    mtime_ns: int = 0
    staging: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[int, int]:
        """Size and time of the finished file."""
        return self.size, self.mtime_ns


class StateFile:
    """The records of a batch. Use as a context manager; it is locked in between."""

    def __init__(self, path: Path, order: Iterable[str]) -> None:
        self.path, self._order = path, list(order)
        self.records: dict[str, Record] = {}
        self._stream: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def lock_path(self) -> Path:
        """The lock file that the workers share."""
        return self.path.with_name(f".{self.path.name}.lock")

    def __enter__(self) -> StateFile:
        """Lock and read.

        Raises:
            ValueError: another run uses the file, or it is not a report.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_run(self.lock_path, self.path)
        try:
            self.records = read_report(self.path)
            self._rewrite()
            self._stream = self.path.open("ab", buffering=0)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._stream is not None:
                self._stream.close()
            self._rewrite()
        finally:
            self._unlock()

    def write(self, record: Record) -> None:
        """Remember a record; it is on the disk when this returns."""
        assert self._stream is not None, "the file is not open"
        self.records[record.id] = record
        self._stream.write(_line(record))
        os.fsync(self._stream.fileno())

    def _rewrite(self) -> None:
        """One line per item: those of this batch in their order, then what other batches left here."""
        known = list(dict.fromkeys([*self._order, *self.records]))
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("wb") as stream:
            stream.writelines(_line(self.records[id]) for id in known if id in self.records)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, self.path)

    def _unlock(self) -> None:
        if self._lock is not None:
            self.lock_path.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def read_report(path: Path) -> dict[str, Record]:
    """The last state of every item of a report; empty where there is none.

    Raises:
        ValueError: the file is something else.
    """
    records: dict[str, Record] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return records
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            cut_off = number == len(lines)  # without its line end: by a kill
            if cut_off and line.startswith(BEGINNING[: len(line)]):
                continue
            raise ValueError(
                f"{path}: line {number} is not a report's ({error}); name another file with --report"
            ) from None
        records[record.id] = record
    return records


def _line(record: Record) -> bytes:
    return json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n"


def _lock_run(lock: Path, report: Path) -> IO[bytes]:
    """The run's own hold on the lock file: alone at first, then shared with its workers."""
    import fcntl  # not on Windows, where everything else here would work without

    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while True:
        stream = lock.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(stream, lock):
                fcntl.flock(stream, fcntl.LOCK_SH)
                return stream
        except BlockingIOError:
            pass
        stream.close()
        if time.monotonic() > deadline:
            raise ValueError(f"{report}: another run is at work on it; wait for it, or name another with --report")
        time.sleep(0.05)


def _same_file(stream: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name: the run before may have removed it while we waited."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def shared_lock(lock: Path | None) -> Iterator[None]:
    """A worker's hold on the lock file.

    Raises:
        OSError: the run that started this worker is gone and another one has taken over.
    """
    if lock is None:
        yield
        return
    import fcntl

    with lock.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
