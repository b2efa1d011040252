"""`lipstream convert`: released checkpoint files to a model folder (safetensors and config.json), once.

$ lipstream convert lipforcing_14b.pth --to models/lipforcing-14b
$ lipstream convert Wan2.1-T2V-14B/ omniavatar_ls_14b.pt --to models/teacher-14b --merge-precision fp32
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lipstream.cli.common import EXIT_OK, add_verbose, show_bytes, size_text

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_parser(subparsers: Any) -> None:
    """Add `convert` to the main parser's sub-parsers."""
    about = (
        "Read released checkpoints (one file, shards, a distributed folder, or a base and its adapter), check every "
        "tensor, and write a model folder. Nothing in the files is executed."
    )
    parser = subparsers.add_parser("convert", help="make a model folder of released checkpoints", description=about)
    parser.add_argument("source", type=Path, nargs="+", metavar="SOURCE", help="files or folders of one network")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument("--kind", help="what the network is (default: what its tensors say)")
    parser.add_argument(
        "--merge-precision",
        choices=("fp32", "bf16"),
        help="of merging an adapter: bf16 as the release does it (default), fp32 as an unmerged adapter computes",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    parser.add_argument("--licence", help="of the weights, for config.json (default: of the released ones)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file in GB (default: 5)")
    parser.add_argument("--force", action="store_true", help="replace a model folder that is there already")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream convert`; returns the exit status."""
    from lipstream.checkpoints.convert import convert
    from lipstream.checkpoints.strict import dtype_named

    with show_bytes() as report:
        about = convert(
            args.source,
            args.to,
            kind=args.kind,
            precision=args.merge_precision,
            dtype=dtype_named(DTYPES[args.dtype]) if args.dtype else None,
            licence=args.licence,
            max_shard_bytes=round(args.max_shard_gb * 1e9),
            overwrite=args.force,
            report=report,
        )
    written = sum(path.stat().st_size for path in args.to.glob("*.safetensors"))
    merged = "" if about.provenance.merge is None else f", adapter merged in {about.provenance.merge['precision']}"
    print(f"{args.to}: {about.kind}, {about.dtype}, {size_text(written)}{merged}; licence {about.licence}")
    return EXIT_OK
