"""`lipstream evaluate`: measure a model, each figure by one sub-command.

$ lipstream evaluate sync clips/*.mp4 --wrong-audio --json sync.json   # lips against speech, leak-free
$ lipstream evaluate syncnet talk.mp4                                  # Sync-C, Sync-D, offset (pocket SyncNet)
$ lipstream evaluate codec samples/ --model runs/codec/checkpoint.pt   # the codec against thumbnails
$ lipstream evaluate fidelity talk.mp4 speech.wav                      # what must not change
$ lipstream evaluate speed talk.mp4                                    # frames/s, first frame, memory
$ lipstream evaluate drift talk.mp4 --seconds 60                       # the end of a long run against its beginning
$ lipstream evaluate jitter talk.mp4                                   # how much mouths tremble, against the source's
$ lipstream evaluate torture                                           # every kind of video and hostile file
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.cli.common import EXIT_FAILED, EXIT_OK, UsageError, add_model, add_verbose, positive, silence_tflite

if TYPE_CHECKING:  # torch and the face networks load only for the sub-command that needs them
    from lipstream.evaluation.reversed import ReversedResult
    from lipstream.models.codec import PocketCodec
    from lipstream.pipeline import LipSync


def add_parser(subparsers: Any) -> None:
    """Add `evaluate` and its sub-commands to the main parser's sub-parsers."""
    evaluate = subparsers.add_parser(
        "evaluate", help="measure a model: sync, syncnet, codec, fidelity, speed, drift, jitter, torture"
    )
    actions = evaluate.add_subparsers(dest="evaluate_command", required=True, metavar="FIGURE")
    sync = actions.add_parser("sync", help="lips against speech: own speech onto the time-reversed picture")
    sync.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="25 fps videos with their own speech")
    sync.add_argument("--limit", type=positive, help="only the first so many clips")
    sync.add_argument("--wrong-audio", action="store_true", help="also drive each clip with the next clip's speech")
    syncnet = actions.add_parser("syncnet", help="Sync-C, Sync-D and offset by the pocket SyncNet; its own gate")
    syncnet.add_argument("videos", type=Path, nargs="*", metavar="VIDEO", help="videos with their own speech")
    syncnet.add_argument(
        "--gate", type=Path, nargs="+", metavar="SAMPLES", help="measure the SyncNet on held-out samples"
    )
    syncnet.add_argument("--network", type=Path, metavar="FILE", help="another SyncNet than the model's")
    codec = actions.add_parser("codec", help="mouths through the codec against thumbnails of twice the numbers")
    codec.add_argument("samples", type=Path, nargs="+", metavar="SAMPLES", help="folders of training samples")
    codec.add_argument("--only", nargs="+", metavar="NAME", help="samples or speakers (the part before the first _)")
    codec.add_argument("--limit", type=positive, help="only the first so many samples")
    codec.add_argument("--videos", type=Path, nargs="+", default=[], metavar="VIDEO", help="also on rendered pictures")
    fidelity = actions.add_parser("fidelity", help="frames, timestamps, size, and pixels outside the mouth")
    fidelity.add_argument("video", type=Path, metavar="VIDEO")
    fidelity.add_argument("audio", type=Path, metavar="AUDIO")
    speed = actions.add_parser("speed", help="frames per second, time to the first frame, peak memory")
    speed.add_argument("clip", type=Path, metavar="CLIP", help="a talking clip; scaled to 512 x 512 and looped")
    speed.add_argument("--audio", type=Path, help="speech (default: the clip's own)")
    speed.add_argument("--minutes", type=positive, nargs="+", default=[1, 10], help="input lengths (default: 1 10)")
    drift = actions.add_parser("drift", help="colour, identity and sharpness: the end of a long run against its start")
    drift.add_argument("clip", type=Path, metavar="CLIP", help="a talking clip; scaled to 512 x 512 and repeated")
    drift.add_argument("--audio", type=Path, help="speech (default: the clip's own)")
    drift.add_argument("--seconds", type=positive, default=60, help="length of the run (default: 60)")
    torture = actions.add_parser("torture", help="every kind of video that people bring, and files that attackers send")
    torture.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose names begin so")
    torture.add_argument("--long", action="store_true", help="also the cases that take minutes")
    jitter = actions.add_parser("jitter", help="how much mouths tremble, against the source's; own speech")
    jitter.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="videos with their own speech")
    measures = (
        (sync, _sync),
        (syncnet, _syncnet),
        (codec, _codec),
        (fidelity, _fidelity),
        (speed, _speed),
        (drift, _drift),
        (jitter, _jitter),
        (torture, _torture),
    )
    for parser, action in measures:
        parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure to a file")
        add_model(parser)
        add_verbose(parser)
        parser.set_defaults(measure=action)
    evaluate.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream evaluate ...`; returns the exit status."""
    measure: Callable[[argparse.Namespace], int] = args.measure
    return measure(args)


def _load(args: argparse.Namespace) -> LipSync:
    from lipstream.pipeline import LipSync

    return LipSync.from_pretrained(args.model, seed=args.seed, threads=args.threads)


def _write(path: Path | None, figures: Any) -> None:
    from lipstream.evaluation.protocol import plain

    if path is not None:
        path.write_text(json.dumps(plain(figures), indent=1))


def _sync(args: argparse.Namespace) -> int:
    from lipstream.evaluation.protocol import as_json, as_markdown, run_set

    def show(name: str, row: ReversedResult | None) -> None:
        figures = "failed" if row is None else f"r {row.own.r:.2f}, amplitude {row.own.amplitude:.2f}"
        print(f"{name}: {figures}", flush=True)

    summary = run_set(_load(args), args.clips[: args.limit], wrong_audio=args.wrong_audio, progress=show)
    if args.json is not None:
        args.json.write_text(as_json(summary))
    print(f"\n{as_markdown(summary)}")
    return EXIT_FAILED if summary.failed else EXIT_OK


def _syncnet(args: argparse.Namespace) -> int:
    import torch

    from lipstream.checkpoints.networks import load_sync_scorer
    from lipstream.evaluation.syncnet import gate_markdown, run_gate, score_video
    from lipstream.training.samples import load_clips

    if not args.videos and not args.gate:
        raise UsageError("nothing to measure: give videos, or --gate with folders of samples")
    torch.set_num_threads(args.threads or 1)
    scorer = load_sync_scorer(_model_path(args.model), args.network)
    figures: dict[str, Any] = {}
    if args.gate:
        rows = run_gate(scorer, load_clips(args.gate))
        figures["gate"] = {name: asdict(row) for name, row in rows.items()}
        print(gate_markdown(rows))
    for video in args.videos:
        found = score_video(scorer, video)
        figures.setdefault("videos", {})[str(video)] = asdict(found)
        score = f"Sync-C {found.confidence:.3f}, Sync-D {found.distance:.3f}, offset {found.offset:+d} frames"
        print(f"{video}: {score}", flush=True)
    _write(args.json, figures)
    return EXIT_OK


def _codec(args: argparse.Namespace) -> int:
    from lipstream.evaluation.codec import gate_markdown, gate_passed, gate_rows, merge, score_canvas, score_pictures
    from lipstream.evaluation.codec import see_video as see
    from lipstream.faces.canvas import FaceCanvas
    from lipstream.training.samples import load_clips

    codec = _open_codec(args.model)
    clips = [c for c in load_clips(args.samples) if not args.only or c.name in args.only or c.speaker in args.only]
    tallies = [score_canvas(codec, clip.fields, clip.textures, clip.tracked) for clip in clips[: args.limit]]
    rows = gate_rows(merge(tallies), codec)
    if not rows:
        raise UsageError(f"no samples to measure in {', '.join(map(str, args.samples))}; check --only")
    figures = {"canvas": [asdict(row) for row in rows], "passed": gate_passed(rows)}
    print(f"canvas, {len(tallies)} clips:\n{gate_markdown(rows)}\ngate passed: {gate_passed(rows)}")
    if args.videos:
        canvas = FaceCanvas()
        seen = merge(score_pictures(codec, see(video, canvas), canvas) for video in args.videos)
        pictures = gate_rows(seen, codec)
        figures["pictures"] = [asdict(row) for row in pictures]
        print(f"\nrendered pictures, {len(args.videos)} videos:\n{gate_markdown(pictures)}")
    _write(args.json, figures)
    return EXIT_OK


def _model_path(model: str) -> Path:
    """A folder or file as it is, else a model's name inside the package."""
    path = Path(model)
    return path if path.exists() else Path(__file__).parent.parent / "assets" / model


def _open_codec(model: str) -> PocketCodec:
    """A codec by model name, model folder, .safetensors file, or training checkpoint (.pt, flavour pocket)."""
    import torch

    from lipstream.checkpoints.networks import load_codec
    from lipstream.models.codec import FLAVOURS, PocketCodec

    path = Path(model)
    torch.set_num_threads(1)
    if path.suffix == ".pt":
        codec = PocketCodec(FLAVOURS["pocket"])
        codec.load_state_dict(torch.load(path, weights_only=True)["model"]["averaged"])
    else:
        path = _model_path(model)
        codec = load_codec(path / "codec.safetensors" if path.is_dir() else path)
    return codec.eval().requires_grad_(False)


def _fidelity(args: argparse.Namespace) -> int:
    from lipstream.evaluation.fidelity import check_fidelity

    found = check_fidelity(_load(args), args.video, args.audio)
    for name, value in asdict(found).items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' ')}: {text}")
    print("all as promised" if found.ok else "NOT as promised")
    _write(args.json, asdict(found) | {"ok": found.ok})
    return EXIT_OK if found.ok else EXIT_FAILED


def _speed(args: argparse.Namespace) -> int:
    from lipstream.evaluation.speed import COMMAND, CommandRun, run_command, run_warm, write_input
    from lipstream.media.timeline import MODEL_FPS

    options = ["--model", args.model, "--seed", str(args.seed)]
    options += ["--threads", str(args.threads)] if args.threads else []
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as name:
        runs: list[CommandRun] = []
        for minutes in sorted(args.minutes):
            frames = 60 * minutes * MODEL_FPS
            video, audio = write_input(args.clip, args.audio or args.clip, Path(name), 60 * minutes)
            done = run_command(video, audio, frames, [*COMMAND, *options])
            runs.append(done)
            figures[f"{minutes} minutes"] = asdict(done) | {"fps": done.fps}
            memory = f"peak {done.peak_mib:.0f} MiB"
            print(f"{minutes} min: {done.fps:.1f} frames/s everything included, {memory}", flush=True)
        if len(runs) > 1:
            figures["memory_ratio"] = runs[-1].peak_mib / runs[0].peak_mib
            print(f"peak memory, longest over shortest: {figures['memory_ratio']:.3f}")
        video, audio = write_input(args.clip, args.audio or args.clip, Path(name), 20)
        warm = run_warm(_load(args), video, audio, 20 * MODEL_FPS)
    figures["warm"] = asdict(warm)
    print(f"warm: {warm.fps:.1f} frames/s, first frame after {warm.first_frame_seconds:.2f} s")
    _write(args.json, figures)
    return EXIT_OK


_JITTER = "{}: sideways {:.2f}, vertical {:.2f}; typical frame {:.2f}, {:.2f}"


def _jitter(args: argparse.Namespace) -> int:
    import numpy as np

    from lipstream.evaluation.jitter import measure_jitter

    silence_tflite()
    lipsync, rows = _load(args), []
    for clip in args.clips:
        row = measure_jitter(lipsync, clip)
        rows.append(row)
        print(_JITTER.format(row.name, *row.ratio, *row.typical_ratio), flush=True)
    table = np.array([(*row.ratio, *row.typical_ratio) for row in rows])
    for word, values in (("mean", table.mean(0)), ("worst", table.max(0))):
        print(_JITTER.format(word, *values))
    _write(args.json, [asdict(row) | {"ratio": row.ratio, "typical_ratio": row.typical_ratio} for row in rows])
    return EXIT_OK


def _drift(args: argparse.Namespace) -> int:
    from lipstream.evaluation.drift import COMPARED_SECONDS, measure_drift

    silence_tflite()
    found = measure_drift(_load(args), args.clip, args.audio or args.clip, args.seconds)
    print(f"last {COMPARED_SECONDS} s against the first {COMPARED_SECONDS} s of {args.seconds} s:")
    for name in ("colour", "identity", "sharpness", "opening"):
        print(f"  {name}: {100 * getattr(found, name):+.2f} %")
    _write(args.json, asdict(found))
    return EXIT_OK


def _torture(args: argparse.Namespace) -> int:
    from lipstream.cli.demo import demo_files
    from lipstream.data.synthetic.requirements import MissingRequirementError
    from lipstream.evaluation.torture import as_markdown, cases, run_cases

    chosen, outcomes = cases(args.only, long=args.long), []
    silence_tflite()
    with demo_files() as (clip, speech):
        try:
            for outcome in run_cases(_load(args), chosen, clip, speech):
                outcomes.append(outcome)
                state = "kept" if outcome.kept else "BROKEN"
                print(f"{outcome.name}: {state} ({outcome.seconds:.1f} s): {outcome.found}", flush=True)
        except MissingRequirementError as error:
            raise UsageError(f"a case draws people: {error}") from error
    broken = sum(not outcome.kept for outcome in outcomes)
    print(f"\n{as_markdown(outcomes)}\n\n{len(outcomes) - broken} of {len(outcomes)} promises kept")
    _write(args.json, [asdict(outcome) for outcome in outcomes])
    return EXIT_FAILED if broken else EXIT_OK
