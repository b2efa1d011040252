"""`lipstream personalize VIDEO... -o FOLDER`: teach the small model one person, and say whether it helped.

$ lipstream personalize me.mp4 -o me && lipstream sync other.mp4 speech.wav -o out.mp4 --model me
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.cli.common import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    UsageError,
    add_verbose,
    clock,
    positive,
    print_error,
    show_steps,
    silence_tflite,
)
from lipstream.media.opening import open_media

if TYPE_CHECKING:
    from lipstream.personal import PersonalReport

UNHEARD_R = 0.1  # do-nothing scores about 0
DESCRIPTION = (
    "Fine-tune the small model on one person who speaks in VIDEO (8 s at least, a minute is better, the first 3 "
    "minutes count) and write a model folder for `lipstream sync --model FOLDER`. The last quarter is not trained on: "
    "there the model is judged before and after. Where it did not help, the folder gets the general weights. The same "
    "command continues a stopped run."
)


def add_parser(subparsers: Any) -> None:
    """Add `personalize` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("personalize", help="teach the small model one person", description=DESCRIPTION)
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="the person, speaking, with sound")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the new model's folder")
    parser.add_argument("--model", default="pocket", help="what to begin with (default: pocket, the one inside)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws; the same seed gives the same model")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all cores)")
    parser.add_argument("--steps", type=positive, help="steps of learning (default: 60)")
    parser.add_argument("--keep-anyway", action="store_true", help="keep the new weights where they are no better, too")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream personalize`; returns the exit status."""
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"{args.output}: is a file; name a folder for the model")
    for index, video in enumerate(args.videos):
        open_media(video, need="video").close()
        open_media(video, need="audio").close()
        if any(video.samefile(other) for other in args.videos[:index]):
            raise UsageError(f"{video}: given twice; what is judged on must not be trained on")

    import torch

    from lipstream.personal import personalize
    from lipstream.training.person import PersonConfig

    silence_tflite()
    torch.set_num_threads(args.threads or os.cpu_count() or 1)
    config = PersonConfig() if args.steps is None else PersonConfig(steps=args.steps)
    try:
        with show_steps() as tell:
            report = personalize(
                args.videos,
                args.output,
                base=args.model,
                config=config,
                seed=args.seed,
                keep_anyway=args.keep_anyway,
                tell=tell,
            )
    except KeyboardInterrupt:
        print_error("stopped by Ctrl-C; the same command goes on with it")
        return EXIT_INTERRUPTED
    print(as_text(report))
    return EXIT_OK


def as_text(report: PersonalReport) -> str:
    """What was learned from what, before and after, and which weights the folder has."""
    before, after = report.before, report.after
    lines = [
        f"trained on {report.train_seconds:.1f} s, judged on {report.held_seconds:.1f} s that were not trained on "
        f"(own speech onto the reversed face), in {clock(report.seconds)}",
        f"lips follow the speech (correlation): {before.r:.2f} before, {after.r:.2f} after "
        f"(standard error of the rise {report.rise_error:.3f})",
        f"size of the opening against the real one: {before.amplitude:.2f} before, {after.amplitude:.2f} after",
        f"error of the lip gap (crop px): {before.error_px:.2f} before, {after.error_px:.2f} after",
    ]
    if report.better:
        lines.append(f"{report.folder}: follows this person better; use it with --model {report.folder}")
    elif report.kept:
        lines.append(f"{report.folder}: NOT better on what it had not seen; kept all the same, as you asked")
    else:
        lines.append(
            f"{report.folder}: it did not help, so the folder has the general weights; more speech of this person "
            f"helps, --keep-anyway keeps the new ones"
        )
    if max(before.r, after.r) < UNHEARD_R:
        lines.append("the lips of the video hardly move with its sound: is the one who is seen the one who is heard?")
    return "\n".join(lines)
