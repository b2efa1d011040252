"""`lipstream bench`: frames per second, time to the first frame, a table of stages and memory, for any flavour.

$ lipstream bench                                                # the model inside, on this CPU
$ lipstream bench --model 1.3b --layers 2 --chunks 5 --starts 3  # 1.3B-wide blocks where all of them are too many
$ lipstream bench --model 14b --device cuda --json 14b.json      # random weights: speed does not depend on them
$ lipstream bench --memory                                       # what the official sizes take; loads nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lipstream.cli.common import EXIT_OK, add_verbose, positive, size_text

if TYPE_CHECKING:  # torch loads when the command runs
    from lipstream.evaluation.bench import BenchReport, SpeedFigures

NOT_MEASURED = "not measured"
DESCRIPTION = (
    "Run a model on this machine without any video and print its frames per second (cold and warm apart), the time to "
    "the first frame, what each stage of a chunk takes, and memory. Official sizes run with random weights: speed does "
    "not depend on them, and nothing is downloaded. Face finding, reading and writing of video are not part of it; "
    "`lipstream evaluate speed CLIP` measures everything."
)
EPILOG = (
    "Every line of the output says what it is: `live` is pixels in to pixels out, `prepared` the same with the source "
    "encoded before, `chunk` 12 frames (0.48 s of video). Close other programs first; the load average is printed."
)


def add_parser(subparsers: Any) -> None:
    """Add `bench` to the main parser's sub-parsers."""
    parser = subparsers.add_parser(
        "bench", help="how fast a model runs on this machine, stage by stage", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("--model", default="pocket", help="pocket (default), 1.3b, 14b or test")
    parser.add_argument("--device", default="cpu", help="torch device: cpu (default), cuda, cuda:1")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    parser.add_argument("--size", type=positive, metavar="PX", help="side of the picture (default: the model's own)")
    parser.add_argument("--chunks", type=positive, default=12, help="chunks of a run; the first two do not count")
    parser.add_argument("--starts", type=positive, default=20, help="first chunks for the time to the first frame")
    parser.add_argument("--layers", type=positive, metavar="N", help="only N blocks, where memory or time is short")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: 1)")
    parser.add_argument("--attention", default="auto", help="auto (default), sdpa, tiled or fa3")
    parser.add_argument("--compile", action="store_true", help="compile the repeated block with torch.compile")
    parser.add_argument(
        "--join-clean", action="store_true", help="clean pass together with the next chunk's first call"
    )
    parser.add_argument(
        "--memory", action="store_true", help="only print what the official sizes take, by precision and decoder"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure to a file")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream bench`; returns the exit status."""
    if args.memory:
        return _memory(args)
    import torch

    from lipstream.evaluation.bench import BenchConfig, bench

    torch.set_num_threads(args.threads or 1)
    config = BenchConfig(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        size=args.size,
        chunks=args.chunks,
        starts=args.starts,
        layers=args.layers,
        attention=args.attention,
        compile=args.compile,
        join_clean_pass=args.join_clean,
    )
    report = bench(config, progress=_tell if sys.stderr.isatty() else None)
    if args.json is not None:
        args.json.write_text(json.dumps(report.as_dict(), indent=1))
    show(report)
    return EXIT_OK


def _memory(args: argparse.Namespace) -> int:
    from lipstream.memory import MARGIN, memory_table
    from lipstream.models.dit import FLAVOURS

    rows = memory_table({name: FLAVOURS[name] for name in ("1.3b", "14b")}, args.size or 512)
    table = Table("model", "precision", "decoder", "weights", "all", "free memory wanted")
    for row in rows:
        sizes = [size_text(count) for count in (row.weights, row.total, row.total * (1 + MARGIN))]
        table.add_row(row.model, row.dtype, row.decoder, *sizes)
    Console(width=100).print(table)
    size = args.size or 512
    print(
        f"counted for one stream of {size} px, not measured on a GPU; float16 is as bfloat16; sync checks its own need"
    )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return EXIT_OK


def _tell(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)


def show(report: BenchReport) -> None:
    """The report as text and one table."""
    config, machine = report.config, report.machine
    print(f"{config.model}, {report.weights} weights, {config.dtype}, {machine['device']}, torch {machine['torch']}")
    print(f"{machine['threads']} threads of {machine['cores']} cores, load average {machine['load_average']:.1f}")
    print(f"attention: {report.attention}")
    table = Table("stage", "ms", "CPU ms", "GFLOP", "GFLOP/s", "GFLOP/CPU s", title="steady chunk, medians")
    for row in report.stages:
        cells = [_number(row.median_seconds, 1e3), _number(row.cpu_seconds, 1e3), _number(row.flops, 1e-9)]
        cells += [_number(row.flops_per_second, 1e-9), _number(row.flops_per_cpu_second, 1e-9)]
        table.add_row(row.stage, *cells)
    Console(width=100).print(table)
    print(f"live: {_speed(report.live)}")
    print(f"prepared: {_speed(report.prepared)}")
    if report.core is not None:
        print(f"core (no codec): {_speed(report.core)}")
    print(f"time to first frame: {_first(report.ttff_median_seconds, report.ttff_p99_seconds, report.starts)}")
    if report.first_chunk_core_median_seconds is not None:
        first = _first(report.first_chunk_core_median_seconds, report.first_chunk_core_p99_seconds, report.starts)
        print(f"first chunk's core: {first}")
    print(f"cold start: {report.cold_start_seconds:.2f} s, of it {report.load_seconds:.2f} s for the weights")
    print(
        f"DiT {report.dit_rate / 1e9:.0f} GFLOP/s, its linear maps alone {report.linear_rate / 1e9:.0f}: "
        f"ratio {report.dit_to_linears:.2f}; chunk FLOPs / formula {report.chunk_flops_to_reference:.3f}"
    )
    sizes = [f"{name.replace('_', ' ')} {_size(count)}" for name, count in report.memory_bytes.items()]
    print(f"memory: {', '.join(sizes)}")
    for note in report.notes:
        print(f"note: {note}")


def _number(value: float | None, scale: float) -> str:
    return NOT_MEASURED if value is None else f"{value * scale:.2f}"


def _size(count: int | None) -> str:
    return NOT_MEASURED if count is None else size_text(count)


def _speed(speed: SpeedFigures | None) -> str:
    if speed is None:
        return NOT_MEASURED
    median, p99 = speed.chunk_median_seconds, speed.chunk_p99_seconds
    return (
        f"{speed.fps:.2f} frames/s; chunk {median:.3f} s, p99 {p99:.3f} s; "
        f"{speed.late_chunks} of {speed.chunks} chunks slower than the 0.48 s they show"
    )


def _first(median: float | None, p99: float | None, starts: int) -> str:
    return NOT_MEASURED if median is None else f"median {median:.3f} s, p99 {p99:.3f} s of {starts} warm starts"
