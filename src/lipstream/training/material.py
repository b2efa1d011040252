"""What every stage of the pocket model reads before it starts: samples, codec and speech encoder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lipstream.checkpoints.networks import load_codec
from lipstream.models.audio import load_speech_encoder
from lipstream.models.codec import PocketCodec
from lipstream.training.codec import LEFT_OUT
from lipstream.training.coded import Coded, code_clips
from lipstream.training.samples import load_clips


class Material(NamedTuple):
    """Coded clips; ``held`` are those of ``LEFT_OUT``, in one plain appearance, never to be trained on."""

    codec: PocketCodec
    coded: list[Coded]
    weights: NDArray[np.float64]
    held: list[Coded]


def add_material(parser: argparse.ArgumentParser) -> None:
    """The arguments of :func:`read_material`, and of every run."""
    parser.add_argument("run", type=Path, help="folder of the run; one that exists is resumed")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, help="from lipstream.training.samples")
    parser.add_argument("--codec", type=Path, required=True, metavar="FILE")
    parser.add_argument("--speech", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keeps the coded clips for the next run")
    parser.add_argument("--threads", type=int, default=2)


def read_material(arguments: argparse.Namespace, versions: int = 2) -> Material:
    """Load and code what the command line names; also sets up logging and threads."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    codec, encoder = load_codec(arguments.codec), load_speech_encoder(arguments.speech)
    codec.requires_grad_(False)
    clips = load_clips(arguments.samples)
    held = [c for c in clips if c.name in LEFT_OUT or c.speaker in LEFT_OUT]
    kept = [c for c in clips if c.name not in {h.name for h in held}]
    coded, weights = code_clips(codec, kept, encoder, versions, arguments.cache)
    listened = code_clips(codec, held, encoder, 1, arguments.cache)[0] if held else []
    return Material(codec, coded, weights, listened)
