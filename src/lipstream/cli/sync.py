"""`lipstream sync VIDEO AUDIO -o OUT`: the main job, one video and one speech in, the video speaking it out.

$ lipstream sync talk.mp4 speech.wav -o out.mp4
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from lipstream.cli.common import (
    EXIT_OK,
    UsageError,
    add_full_size,
    add_model,
    add_verbose,
    load_model,
    positive,
    refusal,
    show_progress,
    silence_tflite,
    summary,
)
from lipstream.media.encoder import Quality
from lipstream.media.plan import Plan
from lipstream.media.probe import probe
from lipstream.media.timeline import Fit, Length
from lipstream.options import Silence, SyncOptions
from lipstream.speaker import parse_voice

DESCRIPTION = (
    "Write VIDEO with lips that speak AUDIO. Size, frames and timestamps stay; AUDIO becomes the sound. Speech longer "
    "than the video plays the video forwards and backwards; shorter speech cuts it (--fit and --length choose "
    "otherwise). Frames without a face stay as they are and are reported."
)


def add_parser(subparsers: Any) -> None:
    """Add `sync` to the main parser's sub-parsers."""
    parser = subparsers.add_parser("sync", help="make a video speak other words", description=DESCRIPTION)
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video with a face (mp4, mov, mkv, webm, avi)")
    parser.add_argument("audio", type=Path, metavar="AUDIO", help="the speech: a sound file, or a video with sound")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="result: .mp4, .mov or .mkv")
    add_model(parser)
    add_full_size(parser)
    add_sync_options(parser)
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream sync`; returns the exit status."""
    options = sync_options(args)
    sounds = (args.audio, *(Path(file) for _, file in options.voices))
    check_output(args.output, (args.video, *sounds), force=args.force)
    probe(args.video, need="video")  # a wrong file is reported before torch is loaded
    for sound in sounds:
        probe(sound, need="audio")

    def tell(plan: Plan) -> None:
        print(f"{args.output}: {plan}", file=sys.stderr, flush=True)

    silence_tflite()
    if args.parity:
        from lipstream.fullsize_parity import check_source

        check_source(args.video)
    problem = refusal(args, options)
    if problem is not None:
        raise UsageError(problem)
    lipsync = load_model(args)
    with show_progress() as report:
        result = lipsync(args.video, args.audio, args.output, options=options, progress=report, on_plan=tell)
    print(summary(result))
    return EXIT_OK


def add_sync_options(parser: argparse.ArgumentParser) -> None:
    """The options of one run, whatever its files: those of `SyncOptions`."""
    parser.add_argument(
        "--fit", choices=get_args(Fit), help="who decides how long the result is (default: audio; see --length)"
    )
    parser.add_argument(
        "--length",
        choices=get_args(Length),
        help="how the shorter side is filled: the video by bounce (default), loop or freeze; the speech by silence "
        "(this means --fit video); cut ends the result with the shorter one. What is too long is always cut",
    )
    parser.add_argument(
        "--audio-delay", type=int, default=0, metavar="MS", help="speech starts later, or loses its start if negative"
    )
    parser.add_argument(
        "--audio-track", type=positive, metavar="N", help="which sound of AUDIO (default: the one marked default, or 1)"
    )
    parser.add_argument(
        "--quality", choices=get_args(Quality), default="good", help="preset of the video encoder (default: good)"
    )
    parser.add_argument("--crf", type=int, help="instead of the preset's own; lower is better (good: 16)")
    parser.add_argument(
        "--copy-unchanged",
        action="store_true",
        help="do not encode stretches of the picture in which nothing changed (no face, or silence with --silence "
        "source): copy them from VIDEO, bit for bit; for 8-bit H.264 in mp4, mov and mkv",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="decode all of VIDEO in a process with limits, not only its beginning: for files from strangers",
    )
    add_speech(parser)


def add_speech(parser: argparse.ArgumentParser) -> None:
    """The options that say who speaks, and how."""
    group = parser.add_argument_group("who speaks, and how")
    group.add_argument(
        "--speaker",
        default="auto",
        metavar="WHO",
        help="auto (default: whoever speaks in VIDEO, else the largest face), largest, left, right, X,Y@SECONDS "
        "(pixels or fractions of the picture), or a picture of the person",
    )
    group.add_argument(
        "--voice",
        action="append",
        default=[],
        type=voice,
        metavar="WHO=FILE",
        help="a further speaker and their speech, e.g. right=b.wav; may be repeated. The sound is the mix of all",
    )
    group.add_argument(
        "--silence",
        choices=get_args(Silence),
        help="where the speech is silent: close the lips (default), show the source's own mouth, or leave it to the "
        "model (default at full size)",
    )
    group.add_argument(
        "--strength", type=float, default=1.0, help="how far the lips move, 0 to 2; 0.7 to 1.3 is safe (default: 1)"
    )


def voice(text: str) -> tuple[str, str]:
    """An argument type: WHO=FILE."""
    try:
        return parse_voice(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sync_options(args: argparse.Namespace) -> SyncOptions:
    """What the options of `add_sync_options` say."""
    return SyncOptions(
        fit=args.fit,
        length=args.length,
        audio_delay_ms=args.audio_delay,
        audio_track=args.audio_track,
        quality=args.quality,
        crf=args.crf,
        copy_unchanged=args.copy_unchanged,
        isolate=args.isolate,
        speaker=args.speaker,
        voices=tuple(args.voice),
        strength=args.strength,
        silence=args.silence,
    )


def check_output(output: Path, inputs: tuple[Path, ...], *, force: bool) -> None:
    """Refuse to overwrite an input, or anything else without `--force`."""
    from lipstream.media.writer import MUXERS

    if output.parent.exists() and not output.parent.is_dir():
        raise UsageError(f"{output}: {output.parent} is a file, not a folder; name another place")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: the folder {output.parent} does not exist; create it or name another")
    if output.is_dir():
        raise UsageError(f"{output}: is a folder; name a file in it, like {output / 'out.mp4'}")
    if output.suffix.lower() not in MUXERS:
        raise UsageError(f"{output}: has an unknown output type '{output.suffix}'; end the name in {', '.join(MUXERS)}")
    if not os.access(output.parent, os.W_OK):
        raise UsageError(f"{output}: the folder {output.parent} cannot be written; choose another one")
    if not output.exists():
        return
    if any(path.exists() and output.samefile(path) for path in inputs):
        raise UsageError(f"{output}: the result would overwrite its own source; choose another name")
    if not force:
        raise UsageError(f"{output}: exists already; choose another name or add --force")
