"""`lipstream sync VIDEO AUDIO -o OUT`: the main job, one video and one speech in, the video speaking it out.

$ lipstream sync talk.mp4 speech.wav -o out.mp4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lipstream.cli.common import (
    EXIT_OK,
    UsageError,
    add_full_size,
    add_model,
    add_verbose,
    load_model,
    show_progress,
    silence_tflite,
    summary,
)
from lipstream.media.opening import open_media
from lipstream.options import SyncOptions

DESCRIPTION = (
    "Write VIDEO with lips that speak AUDIO. Size, frames and timestamps stay; AUDIO becomes the sound. Speech longer "
    "than the video plays the video forwards and backwards; shorter speech cuts it. Frames without a face stay as "
    "they are and are reported."
)


def add_parser(subparsers: Any) -> None:
    """Add `sync` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("sync", help="make a video speak other words", description=DESCRIPTION)
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video with a face (mp4, mov, mkv, webm, avi)")
    parser.add_argument("audio", type=Path, metavar="AUDIO", help="the speech: a sound file, or a video with sound")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="result: .mp4, .mov or .mkv")
    add_model(parser)
    add_full_size(parser)
    parser.add_argument("--crf", type=int, help="quality of the video, lower is better (default: 16)")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream sync`; returns the exit status."""
    options = SyncOptions(crf=args.crf)
    check_output(args.output, (args.video, args.audio), force=args.force)
    open_media(args.video, need="video").close()  # a wrong file is reported before torch is loaded
    open_media(args.audio, need="audio").close()

    silence_tflite()
    lipsync = load_model(args)
    with show_progress() as report:
        result = lipsync(args.video, args.audio, args.output, options=options, progress=report)
    print(summary(result))
    return EXIT_OK


def check_output(output: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse to overwrite an input, or anything else without `--force`."""
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist; create it or name another")
    if not output.exists():
        return
    if any(path.exists() and output.samefile(path) for path in inputs):
        raise UsageError(f"{output}: the result would overwrite its own source; choose another name")
    if not force:
        raise UsageError(f"{output}: exists already; choose another name or add --force")
