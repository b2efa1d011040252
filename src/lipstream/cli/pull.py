"""`lipstream pull`: download the released files of a model, checked, resumable, from anywhere.

$ lipstream pull lipforcing-14b --folder weights            # asks before it starts; --yes does not
$ lipstream pull lipforcing-14b --from-folder /mnt/usb      # offline: the same checks on files you have
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from lipstream.checkpoints.artefacts import MODELS, Artefact, artefacts_of, default_folder
from lipstream.checkpoints.pull import Outcome, check_disk, free_bytes, missing_bytes, pull
from lipstream.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_verbose,
    print_error,
    show_bytes,
    size_text,
)


def add_parser(subparsers: Any) -> None:
    """Add `pull` to the main parser's sub-parsers."""
    about = "Download a model's released files: every one is checked before it gets its name; a stopped run continues."
    parser = subparsers.add_parser("pull", help="download a model's released files", description=about)
    parser.add_argument("model", metavar="MODEL", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to (default: ~/.cache/lipstream/MODEL)")
    parser.add_argument(
        "--mirror", nargs="+", default=[], metavar="URL",
        help="places to try first: https://host/folder, or a pattern with {repo} and {path}",
    )  # fmt: skip
    parser.add_argument("--from-folder", type=Path, metavar="DIR", help="offline: copy and check files from here")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these files (* matches anything)")
    parser.add_argument(
        "--accept", choices=("non-commercial",), help="also fetch files that are for non-commercial research only"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before starting")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream pull`; returns the exit status."""
    folder = args.folder or default_folder(args.model)
    if args.from_folder is not None and args.mirror:
        raise UsageError("--from-folder is offline: leave out --mirror")
    if args.from_folder is not None and not args.from_folder.is_dir():
        raise UsageError(f"{args.from_folder}: no such folder")
    files = _chosen(artefacts_of(args.model), args.only)
    left_out = [file for file in files if file.non_commercial and not args.accept]
    files = [file for file in files if file not in left_out]
    _show_table(args.model, files)
    for file in left_out:
        print(f"left out: {file.name} is for {file.licence} ({file.what}); --accept non-commercial takes it")
    if not files:
        return EXIT_OK
    check_disk(files, folder)
    if not args.yes and not _confirmed(files, folder):
        return EXIT_OK
    failed = 0
    try:
        with show_bytes() as report:
            for outcome in pull(files, folder, mirrors=args.mirror, from_folder=args.from_folder, report=report):
                failed += outcome.status == "failed"
                _show(outcome)
    except KeyboardInterrupt:
        print_error("stopped by Ctrl-C; the same command continues where it stopped")
        return EXIT_INTERRUPTED
    print(f"{folder}: {len(files) - failed} of {len(files)} files are there")
    return EXIT_FAILED if failed else EXIT_OK


def _chosen(files: Sequence[Artefact], patterns: Sequence[str] | None) -> list[Artefact]:
    if patterns is None:
        return list(files)
    for pattern in patterns:
        if not any(fnmatchcase(file.name, pattern) for file in files):
            raise UsageError(f"--only {pattern}: the files are {', '.join(file.name for file in files)}")
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in patterns)]


def _show_table(model: str, files: Sequence[Artefact]) -> None:
    table = Table(Column("file", overflow="fold"), "what", "size", "licence", "checked by", title=f"files of {model}")
    for file in files:
        size = size_text(file.bytes) if file.bytes is not None else "unknown"
        if file.bytes is None and file.about_bytes is not None:
            size = f"about {size_text(file.about_bytes)}"
        table.add_row(file.name, file.what, size, file.licence, file.known)
    Console().print(table)


def _confirmed(files: Sequence[Artefact], folder: Path) -> bool:
    need, free = size_text(missing_bytes(files, folder)), size_text(free_bytes(folder))
    if not sys.stdin.isatty():
        raise UsageError(f"{need} would go to {folder} ({free} free); say --yes to start")
    answer = input(f"{need} to {folder} ({free} free), under the licences above: start? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _show(outcome: Outcome) -> None:
    file = outcome.artefact
    if outcome.status == "failed":
        print_error(outcome.problem)
    else:
        checked = (
            f"checked by {file.known}" if file.known != "nothing" else "NOT checked: neither size nor hash is known"
        )
        print(f"{outcome.status}: {file.name} ({checked}; SHA-256 {outcome.sha256})", flush=True)
