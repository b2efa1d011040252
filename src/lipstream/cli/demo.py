"""`lipstream demo`: the main job on a synthetic clip and another voice's speech, both inside the package.

$ lipstream demo -o out     # writes out/lipstream-demo.mp4 and out/lipstream-demo.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from lipstream.cli.common import EXIT_OK, add_model, add_verbose, show_progress, silence_tflite, summary


def add_parser(subparsers: Any) -> None:
    """Add `demo` to the main parser's sub-parsers."""
    about = "Run the lip-sync on a small synthetic clip that comes with the package and write the video and a picture."
    parser = subparsers.add_parser("demo", help="try it on a clip that comes with the package", description=about)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="folder of the results (default: out)"
    )
    add_model(parser)
    add_verbose(parser)
    parser.set_defaults(run=run)


@contextmanager
def demo_files() -> Iterator[tuple[Path, Path]]:
    """The clip and the speech inside the package, as files (valid inside the `with`)."""
    folder = files("lipstream") / "assets" / "demo"
    with ExitStack() as stack:
        yield stack.enter_context(as_file(folder / "clip.mp4")), stack.enter_context(as_file(folder / "speech.m4a"))


def run(args: argparse.Namespace) -> int:
    """Run `lipstream demo`; returns the exit status."""
    from lipstream.contact import write_contact_sheet
    from lipstream.pipeline import LipSync

    args.output.mkdir(parents=True, exist_ok=True)
    video, sheet = args.output / "lipstream-demo.mp4", args.output / "lipstream-demo.png"
    silence_tflite()
    lipsync = LipSync.from_pretrained(args.model, seed=args.seed, threads=args.threads)
    with demo_files() as (clip, speech):
        with show_progress() as report:
            result = lipsync(clip, speech, video, progress=report)
        write_contact_sheet(sheet, result=video, source=clip)
    print(summary(result))
    print(f"video:         {video.resolve()}")
    print(f"contact sheet: {sheet.resolve()} (rows in pairs: source above, result below)")
    return EXIT_OK
