"""`lipstream prepare VIDEOS -o OUT`: training data from any videos, resumable, with a report of what was dropped.

$ lipstream prepare talks -o data --workers 2
$ lipstream prepare talks -o data --syncnet syncnet_v2.model --dry-run
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lipstream.cli.batch import add_running, dry_run, run_all, say
from lipstream.cli.common import add_verbose, clock, positive

DESCRIPTION = (
    "Cut VIDEOS (files, or folders searched for videos) into training samples: 25 fps and 16 kHz, one shot, one face, "
    "6.5-10 s, aligned at 512 px, speech and lips at the same time, blurred and badly synced ones left out. A stopped "
    "run is continued by the same command."
)


def add_parser(subparsers: Any) -> None:
    """Add `prepare` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("prepare", help="make training data from videos", description=DESCRIPTION)
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEOS", help="videos, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the data set")
    parser.add_argument(
        "--format", choices=("webdataset", "folders", "samples"), default="webdataset",
        help="tar shards (default), the official folders, or samples of the pocket model's training",
    )  # fmt: skip
    parser.add_argument("--min-frames", type=positive, default=162, help="shortest sample, 25 fps (default: 162)")
    parser.add_argument("--max-frames", type=positive, default=250, help="longest sample, 25 fps (default: 250)")
    parser.add_argument("--shard-samples", type=positive, default=256, help="samples in a shard (default: 256)")
    group = parser.add_argument_group("filters")
    group.add_argument(
        "--syncnet", type=Path, metavar="FILE", help="syncnet_v2.model, or a folder with a pocket SyncNet"
    )
    group.add_argument("--min-sync", type=float, help="lowest confidence that is kept (default: 3; for pocket 0.2)")
    group.add_argument("--quality", default="sharpness", metavar="NAME", help="sharpness (default) or none")
    group.add_argument("--min-quality", type=float, help="lowest quality that is kept (default for sharpness: 10)")
    add_running(parser)
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream prepare`; returns the exit status."""
    from lipstream.batch.state import read_report
    from lipstream.data.prepare import dataset
    from lipstream.data.prepare.filters import open_quality
    from lipstream.data.prepare.segments import SegmentConfig
    from lipstream.data.prepare.work import PrepareConfig, PrepareFactory
    from lipstream.training.judging import open_sync

    segments = SegmentConfig(min_pixel_frames=args.min_frames, max_pixel_frames=args.max_frames)
    factory = PrepareFactory(
        config=PrepareConfig(format=args.format, segments=segments),
        sync=partial(open_sync, args.syncnet, args.min_sync),
        quality=partial(open_quality, args.quality, args.min_quality),
    )
    filters = f"sync {args.syncnet} {args.min_sync}, quality {args.quality} {args.min_quality}"
    skipped = dataset.skipped_steps(factory)  # opens the filters: a wrong one is told before anything starts
    plan = dataset.plan(args.videos, args.output, factory, filters)
    report = args.report or args.output / "report.jsonl"
    config = plan.config(args.retries)
    if args.dry_run:
        return dry_run(plan.jobs, report, config, dataset.check_videos(plan.jobs), standing=plan.stands)
    for step in skipped:
        print(f"skipped: {step}", file=sys.stderr)
    plan.begin()
    summary = run_all(args, plan.jobs, report, config, factory, standing=plan.stands)
    told = plan.finish(read_report(report), args.shard_samples, skipped)
    status = say(summary, report, "videos cut")
    print(f"{args.output}: {told['samples']} samples, {clock(told['sample_seconds'])}")
    for reason, lost in told["dropped"].items():
        print(f"dropped: {reason}: {lost['stretches']} stretches, {clock(lost['seconds'])}")
    return status
