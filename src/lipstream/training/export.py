"""Turn training runs into a model folder that ``LipSync.from_pretrained`` reads (half precision, averaged weights).

python -m lipstream.training.export FOLDER --codec RUN --forcing RUN --speech speech.safetensors --guidance 2.0
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import torch
from torch import nn

from lipstream.checkpoints.dcp import read_dcp
from lipstream.checkpoints.networks import save_codec, save_dit
from lipstream.checkpoints.strict import listed
from lipstream.models.codec import FLAVOURS as CODECS
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.training.parallel import latest_checkpoint

log = logging.getLogger(__name__)


def load_averaged(model: nn.Module, run: Path, trainee: str = "model") -> int:
    """Fill ``model`` with a run's averaged weights (without an average: the trained ones); returns their step.

    The run may be of one process or of many. A run in pieces holds only what learnt, so ``model`` has to have the rest.

    Raises:
        ValueError: the run has no checkpoint, or none of this trainee or network.
    """
    checkpoint, pieces = run / "checkpoint.pt", latest_checkpoint(run / "checkpoints")
    if pieces is not None:
        return _load_pieces(model, pieces, trainee)
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint}: no such checkpoint; has the run saved one yet?")
    state = torch.load(checkpoint, weights_only=True)
    if trainee not in state:
        raise ValueError(f"{checkpoint}: trained no {trainee}; it holds {sorted(state)}")
    model.load_state_dict(state[trainee].get("averaged", state[trainee]["model"]))
    return int(state["step"])


def _load_pieces(model: nn.Module, folder: Path, trainee: str) -> int:
    """Read a checkpoint of many processes, one tensor at a time."""
    stored = read_dcp(folder)
    roles = (f"{trainee}.averaged.", f"{trainee}.model.")
    prefix = next((role for role in roles if any(name.startswith(role) for name in stored)), None)
    if prefix is None:
        raise ValueError(f"{folder}: trained no {trainee}; it holds {sorted({name.split('.')[0] for name in stored})}")
    tensors = {name.removeprefix(prefix): stored[name].read() for name in stored if name.startswith(prefix)}
    result = model.load_state_dict(tensors, strict=False)
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    odd = sorted({*result.unexpected_keys, *(learnt & set(result.missing_keys))})
    if odd:
        raise ValueError(f"{folder}: of another network than this one: {listed(odd)}")
    return int(stored["step"].read())


def export(
    folder: Path,
    codec: Path | None,
    forcing: Path | None,
    speech: Path | None,
    guidance: float,
    flavour: str = "pocket",
) -> None:
    """Write the parts that are given; the others stay as they are in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if codec is not None:
        codec_model = PocketCodec(CODECS[flavour])
        log.info("codec of step %d", load_averaged(codec_model, codec))
        save_codec(codec_model, folder / "codec.safetensors")
    if forcing is not None:
        dit = DiT(FLAVOURS[flavour])
        log.info("dit of step %d, guidance %.2f", load_averaged(dit, forcing), guidance)
        save_dit(dit, guidance, folder / "dit.safetensors")
    if speech is not None and speech.resolve() != (folder / "speech.safetensors").resolve():
        shutil.copyfile(speech, folder / "speech.safetensors")


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codec", type=Path, metavar="RUN")
    parser.add_argument("--forcing", type=Path, metavar="RUN")
    parser.add_argument("--speech", type=Path, metavar="FILE")
    parser.add_argument("--guidance", type=float, help="audio guidance shipped with the DiT; --forcing needs it")
    arguments = parser.parse_args()
    if arguments.forcing is not None and arguments.guidance is None:
        parser.error("--forcing needs --guidance: the pocket model has 2.0, 1 is none")
    logging.basicConfig(level=logging.INFO)
    export(arguments.folder, arguments.codec, arguments.forcing, arguments.speech, arguments.guidance or 1.0)


if __name__ == "__main__":
    main()
