"""`lipstream batch MANIFEST`: many lip-syncs, in parallel, resumable after any stop.

$ lipstream batch jobs.csv --workers 2
$ lipstream batch --videos talks --audios speech --out synced --dry-run
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.cli.common import (
    EXIT_FAILED,
    EXIT_OK,
    Heartbeat,
    UsageError,
    add_full_size,
    add_model,
    add_verbose,
    clock,
    positive,
    print_error,
    refusal,
)

if TYPE_CHECKING:
    from lipstream.batch.jobs import Factory, Job, Scheduler
    from lipstream.batch.manifest import Item
    from lipstream.batch.run import BatchConfig, BatchProgress, BatchSummary, Standing

DESCRIPTION = (
    "Sync every item of MANIFEST (.csv or .jsonl with the columns video, audio, output and any option of a run), or "
    "pair the files of two folders by name. A stopped run is continued by the same command; an item that fails does "
    "not stop the others, and the exit status is 1 then."
)
MANY = 20  # lines shown of a long list


def add_parser(subparsers: Any) -> None:
    """Add `batch` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("batch", help="sync many videos, resumable", description=DESCRIPTION)
    parser.add_argument("manifest", type=Path, nargs="?", metavar="MANIFEST", help="list of items, .csv or .jsonl")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="instead of a manifest: a folder of videos")
    parser.add_argument(
        "--audios", type=Path, metavar="DIR", help="with --videos: speech of the same names, or one file"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --videos: folder of the results")
    add_model(parser)
    add_full_size(parser)
    add_running(parser)
    parser.add_argument("--force", action="store_true", help="overwrite outputs that another program made")
    add_verbose(parser)
    parser.set_defaults(run=run)


def add_running(parser: argparse.ArgumentParser) -> None:
    """The options of every command that runs many jobs."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="jobs at a time (default: half the CPU cores; on GPUs one each)",
    )
    group.add_argument("--retries", type=int, default=2, help="more attempts after a crash (default: 2)")
    group.add_argument("--report", type=Path, metavar="FILE", help="state of every item, JSON lines")
    group.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, do nothing")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on Ray: a cluster's address, or none for this machine",
    )


def run(args: argparse.Namespace) -> int:
    """Run `lipstream batch`; returns the exit status."""
    from lipstream.batch.run import BatchConfig
    from lipstream.batch.syncing import SyncFactory, model_of, sync_jobs

    items = _items(args)
    if args.model != "pocket":  # which does anything that an item may ask for
        _check_options(args, items)
    report = args.report or _default_report(args)
    loading = {
        "model": args.model, "seed": args.seed, "threads": args.threads, "device": args.device, "dtype": args.dtype,
        "decoder": args.decoder, "mask": args.mask, "memory_gb": args.memory,
        "speech_lookahead": args.speech_lookahead, "parity": args.parity,
    }  # fmt: skip
    config = BatchConfig(retries=args.retries, force=args.force, run=model_of(loading))
    jobs = sync_jobs(items)
    if args.dry_run:
        return dry_run(jobs, report, config, _wrong(items))
    factory = SyncFactory(loading=loading, gpus=gpus_of(args))
    summary = run_all(args, jobs, report, config, factory, gpus=1 if str(args.device).startswith("cuda") else 0)
    return say(summary, report, "synced")


def run_all(
    args: argparse.Namespace,
    jobs: Sequence[Job],
    report: Path,
    config: BatchConfig,
    factory: Factory,
    *,
    standing: Standing | None = None,
    gpus: float = 0,
) -> BatchSummary:
    """Run jobs with the options of `add_running` and a progress bar."""
    from lipstream.batch.run import file_stands, run_jobs
    from lipstream.batch.state import StateFile

    with (
        StateFile(report, [job.id for job in jobs]) as state,
        _scheduler(args, len(jobs), gpus) as scheduler,
        show_items() as progress,
    ):
        return run_jobs(jobs, scheduler, factory, state, config, standing=standing or file_stands, progress=progress)


def say(summary: BatchSummary, report: Path, verb: str) -> int:
    """The end of a run: one line for each failure, one for everything; returns the exit status."""
    failures = list(summary.failed.items())
    for name, error in failures[:MANY]:
        print_error(error if error.startswith(name) else f"{name}: {error}")
    if len(failures) > MANY:
        print_error(f"and {len(failures) - MANY} more; all are in {report}")
    parts = [f"{summary.done} {verb}", f"{summary.kept} were finished already", f"{len(failures)} failed"]
    print(f"{', '.join(parts)} in {clock(summary.seconds)}; report: {report}")
    return EXIT_FAILED if failures else EXIT_OK


def dry_run(
    jobs: Sequence[Job],
    report: Path,
    config: BatchConfig,
    wrong: dict[str, str],
    *,
    standing: Standing | None = None,
) -> int:
    """Say what a run would do; status 1 where an item would fail for certain."""
    from lipstream.batch.run import file_stands, plan
    from lipstream.batch.state import read_report

    said = {
        "do": "would be done",
        "redo": "would be done again (it changed, or its result did)",
        "finish": "would get its name (a killed run finished it)",
        "keep": "is finished",
        "refuse": "would fail: the output exists already; choose another name or add --force",
    }
    counts: Counter[str] = Counter()
    for job, action in plan(jobs, read_report(report), config, standing or file_stands):
        problem = wrong.get(job.id) if action in ("do", "redo") else None
        counts["fail" if problem or action == "refuse" else "keep" if action == "keep" else "do"] += 1
        print(f"{job.id}: {f'would fail: {problem}' if problem else said[action]}")
    print(f"{counts['do']} to do, {counts['keep']} finished, {counts['fail']} would fail; nothing was done")
    return EXIT_FAILED if counts["fail"] else EXIT_OK


@contextmanager
def show_items() -> Iterator[Callable[[BatchProgress], None]]:
    """A bar with items, failures and time left on standard error; a line now and then where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[more]}"),
    )
    beat = Heartbeat()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("items", total=None, more="")

        def report(now: BatchProgress) -> None:
            more = f"{now.running} running"
            more += f", {now.failed} failed" if now.failed else ""
            more += f", {clock(now.seconds_left)} left" if now.seconds_left is not None else ""
            bar.update(task, total=now.total, completed=now.done + now.failed, more=more)
            if not console.is_terminal:
                beat(f"{now.done + now.failed} of {now.total} items, {more}")

        yield report


def _scheduler(args: argparse.Namespace, jobs: int, gpus: float) -> Scheduler:
    workers = args.workers or min(default_workers(getattr(args, "device", None)), max(1, jobs))
    if args.ray is not None:
        from lipstream.batch.rays import RayScheduler

        return RayScheduler(workers, args.ray or None, gpus=gpus)
    from lipstream.batch.processes import ProcessScheduler

    return ProcessScheduler(workers)


def default_workers(device: str | None) -> int:
    """How many jobs this machine takes at a time: a loaded model a GPU, or one for two of the cores we may use."""
    if device is not None and device.startswith("cuda"):
        import torch

        return 1 if ":" in device else max(1, torch.cuda.device_count())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2)


def _items(args: argparse.Namespace) -> list[Item]:
    from lipstream.batch.manifest import pair_folders, read_manifest

    folders = (args.videos, args.audios, args.out)
    if args.manifest is not None:
        if any(folder is not None for folder in folders):
            raise UsageError("a MANIFEST names its own files; leave out --videos, --audios and --out")
        return read_manifest(args.manifest)
    if any(folder is None for folder in folders):
        raise UsageError("name a MANIFEST, or all three of --videos, --audios and --out")
    return pair_folders(*folders)


def _check_options(args: argparse.Namespace, items: list[Item]) -> None:
    """Refuse what the model cannot do before any work."""
    for item in items:
        problem = refusal(args, item.options)
        if problem is not None:
            raise UsageError(f"{args.manifest}: line {item.line}: {problem}")


def _default_report(args: argparse.Namespace) -> Path:
    if args.manifest is not None:
        return Path(args.manifest).with_suffix(".report.jsonl")
    return Path(args.out) / "batch.report.jsonl"


def _wrong(items: list[Item]) -> dict[str, str]:
    from lipstream.batch.manifest import check_inputs

    return {str(item.output): problem for item, problem in check_inputs(items).items()}


def gpus_of(args: argparse.Namespace) -> int:
    """GPUs that the workers of this machine share out; Ray does that itself."""
    if args.device != "cuda" or args.ray is not None:
        return 0
    import torch

    return torch.cuda.device_count()
