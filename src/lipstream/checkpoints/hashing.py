"""SHA-256 of large files with progress; what a file is, for provenance and downloads. Needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BLOCK_BYTES = 1 << 22


class Report(Protocol):
    """A callback for progress: what is done with which file, and how far it is (total None = unknown)."""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int | None) -> None: ...


def no_report(stage: str, done_bytes: int, total_bytes: int | None) -> None:
    """Progress that nobody watches."""


def sha256_of(path: Path, report: Callable[[int], None] | None = None) -> str:
    """Hexadecimal SHA-256 of a file; ``report`` is told the bytes read so far."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if report is not None:
                report(done)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """A file by its content; the name is without its folder, which is nobody's business."""

    name: str
    bytes: int
    sha256: str


def record_file(path: Path, report: Report = no_report) -> FileRecord:
    """Read a file once and say what it is."""
    size = path.stat().st_size
    return FileRecord(path.name, size, sha256_of(path, lambda done: report(f"hash {path.name}", done, size)))
