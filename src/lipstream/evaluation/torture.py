"""The torture set: videos that people bring and files that attackers send, each with the promise it must not break.

    lipstream evaluate torture                    # builds every case, runs it, prints a table
    lipstream evaluate torture --only vfr rotated

A case is a function in one of `MODULES` under the `case` decorator: it builds its files in a folder of its own, runs,
and raises `Broken` where the promise is not kept. What it returns is said in the table.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lipstream.data.synthetic.requirements import MissingRequirementError
from lipstream.evaluation.speed import write_wav
from lipstream.media.speech import load_speech
from lipstream.media.timeline import SPEECH_RATE
from lipstream.options import SyncOptions
from lipstream.pipeline import LipSync

# Where cases live; append a module to add some.
MODULES = [
    "lipstream.evaluation.torture_media",
    "lipstream.evaluation.torture_hostile",
    "lipstream.evaluation.torture_faces",
]


class Broken(Exception):  # noqa: N818 - what happens to a promise
    """A promise that was not kept, with what was found instead."""


class Bench:
    """What a case works with.

    Attributes:
        folder: an empty folder of the case's own.
        clip, speech: the demo's video (4 s) and another voice's speech (3.96 s).
        warnings: what was logged as a warning so far.
    """

    def __init__(self, lipsync: LipSync, folder: Path, clip: Path, speech: Path) -> None:
        self.lipsync, self.folder, self.clip, self.speech = lipsync, folder, clip, speech

    @cached_property
    def short(self) -> Path:
        """The first 1.2 s of the speech, as a file."""
        path = self.folder / "short.wav"
        write_wav(load_speech(self.speech)[: SPEECH_RATE * 6 // 5], path)
        return path

    @cached_property
    def warnings(self) -> list[str]:
        return []

    def sync(self, video: Path, audio: Path, name: str = "out.mp4", options: SyncOptions | None = None) -> Path:
        """Run the pipeline; the written file."""
        output = self.folder / name
        self.lipsync(video, audio, output, options=options)
        return output


def require(kept: object, found: str) -> None:
    """Raise `Broken` with what was found unless a promise is kept."""
    if not kept:
        raise Broken(found)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One entry of the set: `run` returns a short text of what was found. Long ones run only when asked for."""

    name: str
    promise: str
    run: Callable[[Bench], str]
    long: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table."""

    name: str
    promise: str
    kept: bool
    found: str
    seconds: float


_CASES: dict[str, Case] = {}


def case(name: str, promise: str, *, long: bool = False) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Register a function as a case of the set."""

    def register(run: Callable[[Bench], str]) -> Callable[[Bench], str]:
        if name in _CASES:
            raise ValueError(f"two cases are called '{name}'")
        _CASES[name] = Case(name=name, promise=promise, run=run, long=long)
        return run

    return register


def cases(only: Iterable[str] = (), *, long: bool = False) -> list[Case]:
    """The cases to run: all, or those whose names begin with one of `only`.

    Raises:
        ValueError: a name that no case has.
    """
    for module in MODULES:
        importlib.import_module(module)
    wanted = list(only)
    for name in wanted:
        if not any(known.startswith(name) for known in _CASES):
            raise ValueError(f"no case '{name}': there are {', '.join(_CASES)}")
    chosen = [c for c in _CASES.values() if not wanted or any(c.name.startswith(name) for name in wanted)]
    return [c for c in chosen if long or wanted or not c.long]


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(record.getMessage())


def run_cases(lipsync: LipSync, chosen: Iterable[Case], clip: Path, speech: Path) -> Iterator[Outcome]:
    """Run cases one after the other; every failure is a line, none stops the rest."""
    for item in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lipstream-torture-") as name:
            bench = Bench(lipsync, Path(name), clip, speech)
            listener = _Listener(bench.warnings)
            logger = logging.getLogger("lipstream")
            logger.addHandler(listener)
            propagates, logger.propagate = logger.propagate, False
            try:
                found, kept = item.run(bench), True
            except Broken as broken:
                found, kept = str(broken), False
            except MissingRequirementError:
                raise  # nothing was tried, so no promise is broken
            except Exception as error:
                found, kept = f"{type(error).__name__}: {error}", False
            finally:
                logger.removeHandler(listener)
                logger.propagate = propagates
        seconds = time.monotonic() - began
        yield Outcome(name=item.name, promise=item.promise, kept=kept, found=" ".join(found.split()), seconds=seconds)


def as_markdown(outcomes: Iterable[Outcome]) -> str:
    """The table."""
    lines = ["| case | promise | | found | s |", "|---|---|---|---|---|"]
    for o in outcomes:
        cells = (o.name, o.promise, "kept" if o.kept else "BROKEN", o.found.replace("|", "/"), f"{o.seconds:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
