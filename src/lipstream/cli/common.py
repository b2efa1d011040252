"""What the commands share: exit codes, one-line errors, the progress bar and how times and sizes are written.

Results go to standard output, everything else (progress, errors, log) to standard error.

    >>> with show_progress() as report:
    ...     lipsync(video, audio, output, progress=report)
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from lipstream.media.opening import open_media, picture_stream, seconds

if TYPE_CHECKING:  # importing the pipeline loads torch: `--help` and a mistyped file name should not wait for that
    from lipstream.checkpoints.hashing import Report
    from lipstream.memory import MemoryNeed
    from lipstream.options import SyncOptions
    from lipstream.pipeline import LipSync, Progress, SyncReport

EXIT_OK = 0
EXIT_FAILED = 1  # a check failed, or a bug of ours
EXIT_USAGE = 2  # the user's mistake: arguments or files
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

HEARTBEAT_SECONDS = 30.0  # between lines of progress where there is no terminal to draw a bar on


class UsageError(ValueError):
    """A mistake in what the user typed, with one line that says how to put it right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is, then leave with status 2."""
        print_error(f"{message}; see {self.prog} --help")
        raise SystemExit(EXIT_USAGE)


def print_error(message: str) -> None:
    """One line on standard error, never a trace."""
    print(f"lipstream: error: {' '.join(message.split())}", file=sys.stderr)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """The `-v` option of every command."""
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step; on an error show the full trace")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that choose the model and how it runs."""
    parser.add_argument("--model", default="pocket", help="name of the model (default: pocket, the one inside)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; the same seed gives the same result")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of the networks (default: 1; the other stages use other cores)"
    )


def add_full_size(parser: argparse.ArgumentParser) -> None:
    """The options for full-size models; the small one takes `--dtype` alone. `--seed` becomes the model's own."""
    group = parser.add_argument_group("full-size models")
    group.add_argument("--device", help="torch device: cpu (default), cuda, cuda:1")
    group.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the networks")
    group.add_argument("--decoder", choices=("tae", "wan"), help="tae (default) is fast, wan a little finer")
    group.add_argument("--mask", metavar="FILE", help="mouth mask: built-in or a file (default: mask.png of the model)")
    group.add_argument("--memory", type=float, metavar="GB", help="what may be used (default: what is free)")
    group.add_argument(
        "--speech-lookahead",
        type=float,
        metavar="SECONDS",
        help="hear the speech as it comes, only so far ahead: an approximation for live use (default: the whole file)",
    )
    group.add_argument(
        "--parity",
        action="store_true",
        help="run as the official scripts do, to compare with them (seed 42 unless --seed): 25 fps sources only, a "
        "face in every frame, the end cut to 12 n - 3 frames (up to half a second of speech), the whole crop "
        "pasted back",
    )
    parser.set_defaults(seed=None)  # the model's own: 0, with --parity 42


def load_model(args: argparse.Namespace) -> LipSync:
    """The model that the options of `add_model` and `add_full_size` name; says what memory a large one takes."""
    import torch

    from lipstream.pipeline import LipSync

    def tell(need: MemoryNeed) -> None:
        parts = ", ".join(f"{part} {size_text(count)}" for part, count in need.table())
        print(f"{args.model}: takes about {size_text(need.total)} of memory ({parts})", file=sys.stderr, flush=True)

    return LipSync.from_pretrained(
        args.model,
        seed=args.seed,
        threads=args.threads,
        device=args.device,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        decoder=args.decoder,
        mask=args.mask,
        memory_gb=args.memory,
        speech_lookahead=args.speech_lookahead,
        parity=args.parity,
        on_memory=tell,
    )


def refusal(args: argparse.Namespace, options: SyncOptions) -> str | None:
    """Why the model that the options of `add_model` name cannot do a run, said before it is loaded."""
    from lipstream.pipeline import engine_kind

    return engine_kind(args.model, args.parity).refuses(options)


def positive(text: str) -> int:
    """An argument type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def set_logging(verbose: bool) -> None:
    """Log to standard error: warnings, or everything with `-v`."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)


def silence_tflite() -> None:
    """See `faces.detect`, which is not loaded before there is something to do."""
    from lipstream.faces import detect

    detect.silence_tflite()


@contextmanager
def show_progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with stage, frames, speed and time left on standard error; without a terminal a line now and then."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[frames]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
    )
    console, beat = Console(stderr=True), Heartbeat()
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("starting", total=None, frames="", speed="", left="")

        def report(progress: Progress) -> None:
            total = progress.total_frames
            frames = f"{progress.done_frames}/{total or '?'} frames"
            speed = f"{progress.fps:.1f} frames/s" if progress.fps else ""
            left = "" if progress.seconds_left is None else f"{clock(progress.seconds_left)} left"
            bar.update(
                task,
                description=escape(progress.stage),
                completed=progress.done_frames,
                total=total,
                frames=frames,
                speed=speed,
                left=left,
            )
            if not console.is_terminal:
                beat(f"{progress.stage}: {', '.join(filter(None, (frames, speed, left)))}")

        yield report


@contextmanager
def show_bytes() -> Iterator[Report]:
    """A bar for large files on standard error: stage, bytes, speed, time left; see :func:`show_progress`."""
    with _stages(size_text, DownloadColumn(), TransferSpeedColumn()) as report:
        yield report


@contextmanager
def show_steps() -> Iterator[Report]:
    """The same for work that is counted in frames or steps."""
    with _stages(lambda count: f"{count:.0f}", MofNCompleteColumn()) as report:
        yield report


@contextmanager
def _stages(as_text: Callable[[float], str], *counts: ProgressColumn) -> Iterator[Report]:
    """A bar that shows one stage at a time."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), *counts, TimeRemainingColumn())
    console, beat = Console(stderr=True), Heartbeat()
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done_bytes: int, total_bytes: int | None) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.remove_task(task)
                tasks.clear()
                tasks[stage] = bar.add_task(escape(stage), total=total_bytes)
            bar.update(tasks[stage], completed=done_bytes, total=total_bytes)
            if not console.is_terminal:
                beat(f"{stage}: {as_text(done_bytes)}" + (f" of {as_text(total_bytes)}" if total_bytes else ""))

        yield report


class Heartbeat:
    """Says a line on standard error, but not more often than every so many seconds: a sign of life in a log."""

    def __init__(self, every_seconds: float = HEARTBEAT_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        self._every, self._now, self._said = every_seconds, now, now()

    def __call__(self, line: str) -> None:
        if self._now() - self._said >= self._every:
            self._said = self._now()
            print(line, file=sys.stderr, flush=True)


def clock(time_seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(time_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def timestamp(time_seconds: float) -> str:
    """A place in a video: m:ss.ss or h:mm:ss.ss."""
    hundredths = round(time_seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest // 100:02}.{rest % 100:02}"
    return f"{hours}:{minutes:02}:{text}" if hours else f"{minutes}:{text}"


def size_text(count_bytes: float) -> str:
    """Bytes as B, kB, MB or GB (powers of 1000)."""
    for unit in ("B", "kB", "MB"):
        if count_bytes < 1000:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} GB"


def frame_times(path: Path) -> list[float]:
    """Start of every frame of a video in seconds from its first, read from the packets without decoding."""
    with open_media(path, need="video") as container:
        stream = picture_stream(container)
        assert stream is not None  # open_media(need="video") made sure
        ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        return [float(seconds(tick - ticks[0], stream.time_base)) for tick in ticks]


def summary(report: SyncReport) -> str:
    """The one line at the end of a run: frames, speed, what was passed through and where the result lies."""
    synced = f"{report.synced_frames} of {report.frames} frames synced"
    parts = [f"{synced} in {report.seconds:.1f} s ({report.fps:.1f} frames/s)"]
    if report.speakers:
        parts.append(_speakers(report))
    if report.passed_through:
        parts.append(f"left unchanged: {_spans(report)}")
    if report.copied_frames:
        parts.append(f"{report.copied_frames} frames copied without encoding")
    return f"{report.output}: {'; '.join(parts)}; model {report.model}"


def _speakers(report: SyncReport, limit: int = 4) -> str:
    """Who got the words: where that face first shows (px), and why it is the one."""
    said = []
    for choice in report.speakers[:limit]:
        x, y = choice.place
        since = f" from {timestamp(choice.seconds)}" if choice.seconds else ""
        said.append(f"speaker {choice.speaker}: the face at {x:.0f},{y:.0f}{since} ({choice.why})")
    more = len(report.speakers) - limit
    return ", ".join(said) + (f" and {more} more" if more > 0 else "")


def _spans(report: SyncReport, limit: int = 8) -> str:
    """The passed-through frame ranges as times; the end is the start of the first frame after."""
    times = frame_times(report.output)
    step = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    times.append(times[-1] + step)
    last = len(times) - 1
    spans = [f"{timestamp(times[min(a, last)])}-{timestamp(times[min(b, last)])}" for a, b in report.passed_through]
    more = f" and {len(spans) - limit} more" if len(spans) > limit else ""
    return ", ".join(spans[:limit]) + more
