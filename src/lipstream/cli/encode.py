"""`lipstream data encode DATA`: samples of `lipstream prepare` to what the training of the official sizes reads.

$ lipstream data encode data --device cuda
$ lipstream data encode data --prompts prompt.safetensors empty.safetensors      # without the 11 GB text encoder
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.checkpoints.artefacts import default_folder
from lipstream.cli.batch import add_running, dry_run, gpus_of, run_all, say
from lipstream.cli.common import EXIT_OK, UsageError, add_verbose

if TYPE_CHECKING:
    from lipstream.training.encoding import Prompts

DESCRIPTION = (
    "Add latents, speech features and prompt embeddings to the sample folders of DATA (what `lipstream prepare` wrote, "
    "as shards or folders, or a list of sample folders), and write encoded.txt, the list for --clips of the training "
    "stages. Files of `lipstream pull lipforcing-14b` are taken where nothing else is said. A stopped run is continued "
    "by the same command; what changed is encoded again."
)


def add_parser(actions: Any) -> None:
    """Add `encode` to the sub-parsers of `lipstream data`."""
    pulled = default_folder("lipforcing-14b")
    parser = actions.add_parser("encode", help="latents, speech features and prompts", description=DESCRIPTION)
    parser.add_argument("data", type=Path, metavar="DATA", help="data set of `prepare`, or a list of sample folders")
    parser.add_argument("--vae", type=Path, default=pulled / "Wan2.1_VAE.pth", metavar="FILE", help="video encoder")
    parser.add_argument(
        "--speech", type=Path, default=pulled / "wav2vec2-base-960h", metavar="FOLDER", help="speech features"
    )
    parser.add_argument(
        "--text", type=Path, default=pulled / "models_t5_umt5-xxl-enc-bf16.pth", metavar="FILE",
        help="text encoder; needed once, for prompts that have no embedding yet",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=Path, default=pulled / "google" / "umt5-xxl", metavar="FOLDER", help="of the text encoder"
    )
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], metavar="FILE", help="embeddings you have")
    parser.add_argument("--mask", default=str(pulled / "mask.png"), metavar="FILE", help="mask.png, or built-in")
    parser.add_argument(
        "--masking", choices=("one-pass", "two-step"), default="one-pass",
        help="one-pass (default): as inference does it; two-step: as the authors' own cached data",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of the pictures (default: 512)")
    parser.add_argument("--latent-frames", type=int, default=21, help="of a clip (default: 21, 81 pictures)")
    parser.add_argument("--device", default="cpu", help="torch device: cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the video encoder"
    )
    add_running(parser)
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream data encode`; returns the exit status."""
    from lipstream.batch.run import BatchConfig
    from lipstream.batch.state import read_report
    from lipstream.data.prepare import pack
    from lipstream.devices import usable_device
    from lipstream.faces.mouth_mask import mouth_mask
    from lipstream.training.encoding import (
        EncodeConfig,
        EncodeFactory,
        encode_jobs,
        encoded_stands,
        read_prompt,
        weights_of,
    )

    usable_device(args.device)
    if not args.data.exists():
        raise UsageError(f"{args.data}: no such folder or list; `lipstream prepare` makes one")
    own_mask = [("--mask", Path(args.mask))] if args.mask != "built-in" else []
    for option, path in (("--vae", args.vae), ("--speech", args.speech), *own_mask):
        if not path.exists():
            raise UsageError(f"{path}: no such file; `lipstream pull lipforcing-14b` fetches it, or name it ({option})")
    mouth_mask(args.mask)
    place = args.data if args.data.is_dir() else args.data.parent
    if args.data.is_dir() and (place / "shards").is_dir():
        waiting = pack.packed_names(place, "webdataset") - pack.packed_names(place, "folders")
        if waiting and args.dry_run:
            print(f"{len(waiting)} samples of the shards would be laid down in {place / 'samples'} and encoded")
            return EXIT_OK
        pack.unpack(place)
    folders = _samples(args.data)
    config = EncodeConfig(
        latent_frames=args.latent_frames, size=args.size, mask=args.mask, masking=args.masking, dtype=args.dtype
    )
    prompts = _prompts(args, place / "prompts")
    wanted = [read_prompt(folder) for folder in folders]
    jobs, report = encode_jobs(folders, config), args.report or place / "encoding.jsonl"
    batch = BatchConfig(retries=args.retries, force=True, run=weights_of((args.vae, args.speech)))
    if args.dry_run:
        missing = [f"'{prompt}'" for prompt in prompts.missing(wanted)]
        print(f"prompts without an embedding: {', '.join(missing) or 'none'}")
        return dry_run(jobs, report, batch, {}, standing=encoded_stands)
    factory = EncodeFactory(
        config=config, vae=args.vae, speech=args.speech, prompts=prompts.complete(wanted), device=args.device,
        gpus=gpus_of(args),
    )  # fmt: skip
    if args.data.resolve() != (place / "encoded.txt").resolve():  # which names whole samples only: no longer now
        (place / "encoded.txt").unlink(missing_ok=True)
    gpus = 1 if args.device.startswith("cuda") else 0
    summary = run_all(args, jobs, report, batch, factory, standing=encoded_stands, gpus=gpus)
    status = say(summary, report, "encoded")
    done = {record.id for record in read_report(report).values() if record.state == "done"}
    names = [os.path.relpath(folder, place) for folder in folders if str(folder) in done]
    (place / "encoded.txt").write_text("".join(f"{name}\n" for name in names))
    print(f"{place / 'encoded.txt'}: {len(names)} sample folders for --clips; --empty-prompt {prompts.known['']}")
    return status


def _samples(data: Path) -> list[Path]:
    """The sample folders of a data set or a list."""
    from lipstream.training.clips import read_list
    from lipstream.training.encoding import VIDEO

    if not data.is_dir():
        return [folder.resolve() for folder in read_list(data)]
    inside = data / "samples" if (data / "samples").is_dir() else data
    folders = sorted(path.parent.resolve() for path in inside.glob(f"[!.]*/{VIDEO}"))
    if not folders:
        raise UsageError(f"{data}: holds no samples; `lipstream prepare VIDEOS -o {data}` makes them")
    return folders


def _prompts(args: argparse.Namespace, folder: Path) -> Prompts:
    from lipstream.checkpoints.encoders import load_prompt_encoder, load_prompt_tokenizer
    from lipstream.models.text import PromptEmbedding
    from lipstream.training.encoding import Prompts

    loaded: list[Any] = []

    def embed(prompt: str) -> PromptEmbedding:
        if not loaded:
            loaded.extend([load_prompt_encoder(args.text), load_prompt_tokenizer(args.tokenizer)])
        found: PromptEmbedding = loaded[0].embed(prompt, loaded[1])
        return found

    prompts = Prompts(folder, embed if args.text.exists() else None)
    prompts.add(args.prompts)
    return prompts
