"""`lipstream ablate TABLE`: train (or reuse) the rows of one of the paper's tables and print ours beside the paper's.

$ lipstream ablate guidance --list                     # the rows, what they change, the paper's numbers
$ lipstream ablate guidance -o out/ --seeds 0 1        # train and measure what is not there yet
$ lipstream ablate landing -o out/ --workers my.module:workers
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.cli.common import EXIT_OK, UsageError, add_verbose

if TYPE_CHECKING:
    from lipstream.training.ablations import Measure, Train

#: MODULE:FUNCTION that takes the options' remaining arguments and gives (train, measure).
WORKERS = "lipstream.training.ablation_workers:ablation_workers"
#: Of the tables; a test compares them.
NAMES = ("guidance", "reward", "steps", "landing", "systems", "derived", "gradients")


def add_parser(subparsers: Any) -> None:
    """Add `ablate` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("ablate", help="the paper's tables: train the rows, print ours beside the paper's")
    parser.add_argument("table", choices=NAMES, metavar="TABLE", help=", ".join(NAMES))
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder of the runs; what is there is reused")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run a row and seed (default: 0)")
    parser.add_argument("--list", action="store_true", help="only show the rows and the paper's numbers")
    parser.add_argument("--workers", default=WORKERS, metavar="MODULE:FUNCTION", help=f"(default: {WORKERS})")
    parser.add_argument("--config", type=Path, metavar="FILE", help="handed to the workers (data, weights, budget)")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream ablate`; returns the exit status."""
    from lipstream.training.ablations import TABLES, as_markdown, describe, run_table

    table = TABLES[args.table]
    if args.list:
        print(describe(table))
        return EXIT_OK
    if args.output is None:
        raise UsageError("name a folder for the runs with -o OUT, or --list to see the rows only")
    train, measure = load_workers(args.workers, args.config)
    outcome = run_table(table, train, measure, args.output, args.seeds)
    text = as_markdown(outcome)
    (args.output / f"{args.table}.md").write_text(text + "\n")
    print(text)
    return EXIT_OK


def load_workers(name: str, config: Path | None) -> tuple[Train, Measure]:
    """The two callables of `MODULE:FUNCTION`, which is called with the path of --config.

    Raises:
        UsageError: no such module or function.
    """
    module_name, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), function or "ablation_workers")
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--workers {name}: {error}; it names a function that gives (train, measure)") from error
    train, measure = make(config)
    return train, measure
