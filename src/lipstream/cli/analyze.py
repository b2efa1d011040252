"""`lipstream analyze`: where audio guidance helps a teacher and what it costs, and what follows for distillation.

$ lipstream analyze --model teacher.safetensors --samples samples/ -o out/
$ lipstream analyze --model teacher.safetensors --samples samples/ --only s26 s31 --scale 2.5 -o out/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lipstream.cli.common import EXIT_OK, UsageError, add_verbose, positive

if TYPE_CHECKING:  # torch loads when the command runs
    from lipstream.analysis.metrics import SyncScore
    from lipstream.analysis.study import Findings
    from lipstream.models.audio import SpeechEncoder
    from lipstream.models.codec import PocketCodec
    from lipstream.training.samples import Clip

POCKET = Path(__file__).parent.parent / "assets" / "pocket"
PAPER_CLIPS = 10
PAPER_SCALE = 4.5
T = TypeVar("T")
DESCRIPTION = (
    "Run TEACHER over clips that it has not seen, once without and once with audio guidance, step by step, and find "
    "where guidance buys synchronisation and what it costs in fidelity. What follows is printed and drawn: the steps "
    "in which to guide a distillation (or that none is worth it), and the step at which a student of two calls should "
    "land. Needs pip install '.[analysis]'. A stopped run is continued by the same command."
)
EPILOG = "Written to OUT: curves.json (every number), tradeoff.png, factorial.png. The method is in docs/analysis.md."


def add_parser(subparsers: Any) -> None:
    """Add `analyze` to the main parser's sub-parsers."""
    about = "a teacher's trajectory: guidance window and landing step"
    parser = subparsers.add_parser("analyze", help=about, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--model", type=Path, required=True, metavar="TEACHER", help="weights of a bidirectional DiT")
    parser.add_argument(
        "--samples", type=Path, nargs="+", required=True, metavar="DIR", help="folders of training samples"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder; a run is continued")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="clips or speakers (default: those left out)")
    parser.add_argument("--limit", type=positive, default=PAPER_CLIPS, help="clips (default: 10, as in the paper)")
    parser.add_argument("--scale", type=float, help="guidance (default: the teacher's own, or the paper's 4.5)")
    parser.add_argument("--steps", type=positive, default=50, help="of the teacher's grid (default: 50)")
    parser.add_argument(
        "--landings-every",
        type=positive,
        default=1,
        metavar="N",
        help="try only every Nth step as landing (default: all)",
    )
    parser.add_argument(
        "--codec", type=Path, default=POCKET / "codec.safetensors", help="its codec (default: built-in)"
    )
    parser.add_argument(
        "--speech", type=Path, default=POCKET / "speech.safetensors", help="its speech encoder (default: built-in)"
    )
    syncnet = str(POCKET / "syncnet.safetensors")
    parser.add_argument(
        "--syncnet",
        default=syncnet,
        metavar="FILE",
        help="scores synchronisation (default: built-in), or none: the lip gap's correlation stands in",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream analyze`; returns the exit status."""
    import torch

    from lipstream.analysis.figures import draw_factorial, draw_trade_off
    from lipstream.analysis.metrics import PocketMetrics
    from lipstream.analysis.pocket import load_teacher, pocket_clips, pocket_network
    from lipstream.analysis.study import Study, StudyConfig
    from lipstream.checkpoints.hashing import sha256_of
    from lipstream.checkpoints.networks import load_codec
    from lipstream.models.audio import load_speech_encoder
    from lipstream.training.samples import load_clips

    torch.set_num_threads(args.threads)
    model, own_scale = load_teacher(args.model)
    if model.config.text_dim:
        raise UsageError(
            f"{args.model}: has text attention, so it is no pocket teacher; see docs/analysis.md for those"
        )
    codec = load_codec(args.codec).eval().requires_grad_(False)
    if codec.config.latent_channels != model.config.latent_channels:
        channels = (model.config.latent_channels, codec.config.latent_channels)
        raise UsageError(f"{args.model}: takes {channels[0]} latent channels, {args.codec} makes {channels[1]}")
    scale = args.scale if args.scale is not None else own_scale if own_scale > 1 else PAPER_SCALE
    config = StudyConfig(
        scale=scale,
        steps=args.steps,
        drop="audio",  # without text, both modes are the same
        seed=args.seed,
        landings=tuple(range(args.landings_every, args.steps, args.landings_every)),
        teacher=sha256_of(args.model)[:12],
    )
    chosen = choose(load_clips(args.samples), args.only, args.limit)
    encoder = load_speech_encoder(args.speech)
    metrics = PocketMetrics(codec, sync_score(args.syncnet, codec, encoder))
    clips = pocket_clips(chosen, codec, encoder, model)
    study = Study(pocket_network(model), metrics, config, args.output)
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        print(f"{done}/{len(clips)} {name}", file=sys.stderr, flush=True)

    findings = study.run(clips, tell)
    draw_trade_off(findings, study.folder / "tradeoff.png")
    draw_factorial(findings, study.folder / "factorial.png")
    print(report(findings))
    print(f"{study.folder}: tradeoff.png, factorial.png, curves.json")
    return EXIT_OK


def sync_score(name: str, codec: PocketCodec, encoder: SpeechEncoder) -> SyncScore | None:
    """The confidence of the pocket SyncNet in a file; None for "none": the lip gap's correlation stands in."""
    from lipstream.analysis.metrics import field_score
    from lipstream.checkpoints.networks import load_syncnet
    from lipstream.models.syncnet_pocket import SyncScorer

    if name == "none":
        return None
    return field_score(codec, SyncScorer(load_syncnet(Path(name)), codec, encoder).confidence)


def choose(clips: Sequence[Clip], only: Sequence[str] | None, limit: int) -> list[Clip]:
    """The clips or speakers that are named (default: those that no training sees), spread evenly over the list."""
    from lipstream.training.codec import LEFT_OUT

    names = only or LEFT_OUT
    found = [clip for clip in clips if clip.name in names or clip.speaker in names]
    if not found:
        wanted = "named by --only" if only else "left out of training"
        raise UsageError(f"none of the {len(clips)} samples is {wanted}; name clips or speakers with --only")
    return spread(found, limit)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def report(findings: Findings) -> str:
    """What was found, in words."""
    lines = [f"{len(findings.clips)} clips, sync = {findings.sync}, error = {findings.error}"]
    lines += [f"not measured: {name}" for name in findings.missing]
    for title, derived in (
        ("own path, Euler steps (the paper's)", findings.derived),
        ("plain path's states, fresh noise (what a student meets)", findings.derived_local),
    ):
        lines.append(f"{title}:")
        lines += [f"  {reason}" for reason in derived.reasons]
        if derived.window_steps and derived.window_times:
            (low, high), (least, most) = derived.window_steps, derived.window_times
            lines.append(f"  window: steps {low} to {high}, times {least:.3f} to {most:.3f}")
        else:
            lines.append(f"  no window: guide {derived.guidance}")
        if derived.landing_step is not None:
            lines.append(f"  landing: step {derived.landing_step}, time {derived.landing_time:.3f}")
    return "\n".join(lines)
