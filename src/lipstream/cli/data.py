"""`lipstream data`: make training data.

$ lipstream data synthesize --hours H --seed S OUT     # draws talking heads
$ lipstream data encode DATA                           # samples of `lipstream prepare` for the official sizes
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lipstream.cli import encode
from lipstream.cli.common import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, print_error
from lipstream.data.synthetic.generate import SynthesisConfig, synthesize
from lipstream.data.synthetic.requirements import MissingRequirementError


def add_parser(subparsers: Any) -> None:
    """Add `data` and its sub-commands to the main parser's sub-parsers."""
    data = subparsers.add_parser("data", help="make training data")
    actions = data.add_subparsers(dest="data_command", required=True)
    make = actions.add_parser("synthesize", help="draw licence-clean talking heads with exact ground truth")
    make.add_argument("out", type=Path, metavar="OUT", help="folder of the data set; a stopped run is continued")
    make.add_argument("--hours", type=float, required=True, help="hours of video")
    make.add_argument("--seed", type=int, required=True, help="the same seed gives the same people and sentences")
    make.add_argument("--size", type=int, default=256, help="picture size in pixels (default 256)")
    make.add_argument("--clip-seconds", type=float, default=5.0, help="length of a clip (default 5)")
    make.set_defaults(run=run)
    encode.add_parser(actions)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream data ...`; returns the exit status."""
    try:
        config = SynthesisConfig(hours=args.hours, seed=args.seed, size=args.size, clip_seconds=args.clip_seconds)
        _synthesize(config, args.out)
    except (ValueError, OSError) as error:
        print_error(str(error))
        return EXIT_USAGE
    except MissingRequirementError as error:
        print_error(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        print_error("stopped by Ctrl-C; run the same command again to continue")
        return EXIT_INTERRUPTED
    return EXIT_OK


def _synthesize(config: SynthesisConfig, folder: Path) -> None:
    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    drawn, kept, began = 0, 0, time.monotonic()
    with Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress:
        task = progress.add_task("drawing heads", total=config.clips, speed="")
        for _, new in synthesize(config, folder):
            drawn, kept = drawn + new, kept + (not new)
            seconds = time.monotonic() - began
            speed = f"{drawn * config.pixel_frames / seconds:.1f} frames/s" if drawn else ""
            progress.update(task, advance=1, speed=speed)
    print(f"{folder}: {drawn} clips drawn, {kept} were there already")


def _main() -> int:
    """`python -m lipstream.cli.data synthesize ...`: the same command without the main parser."""
    parser = argparse.ArgumentParser(prog="lipstream")
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *sys.argv[1:]])
    return int(args.run(args))


if __name__ == "__main__":
    raise SystemExit(_main())
