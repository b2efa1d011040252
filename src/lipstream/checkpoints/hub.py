"""The Hub-style folder: sharded safetensors, an index and a config.json that says what the network is and came from.

save_pretrained(model, folder, kind="student")
model = load_pretrained(folder)                    # memory-mapped, strict
push_to_hub(folder, "someone/lipforcing-14b")      # needs `pip install huggingface_hub`
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lipstream import __version__
from lipstream.checkpoints.hashing import FileRecord, Report, no_report
from lipstream.checkpoints.kinds import kind_named
from lipstream.checkpoints.sources import TensorSource, from_tensors, open_source
from lipstream.checkpoints.strict import CheckpointError, dtype_name, dtype_named, fill

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMAT_VERSION = 1
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where weights came from and what was done to them."""

    sources: tuple[FileRecord, ...] = ()
    key_format: str = "lipstream"
    wrapper: str = ""
    merge: Mapping[str, Any] | None = None  # precision, rank, alpha of a merged adapter
    made_by: str = f"lipstream {__version__}"


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What config.json says.

    Attributes:
        kind: name in `kinds.KINDS`.
        dtype: of all floating tensors.
        config: the network's configuration as plain data.
    """

    kind: str
    dtype: str
    config: Mapping[str, Any]
    licence: str
    provenance: Provenance = dataclasses.field(default_factory=Provenance)

    def __post_init__(self) -> None:
        # As JSON gives it back (tuples become lists), so that what was written equals what is read.
        object.__setattr__(self, "config", json.loads(json.dumps(self.config)))


def save_pretrained(
    model: nn.Module,
    folder: Path,
    *,
    kind: str,
    provenance: Provenance | None = None,
    licence: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> FolderConfig:
    """Write a network with a `config` (a dataclass) as a Hub-style folder, atomically.

    Raises:
        ValueError: unknown kind, several floating dtypes, or a folder that is there already.
    """
    known = kind_named(kind)
    dtypes = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"the network has {len(dtypes)} floating dtypes; convert it to one with .to(dtype) first")
    network_config: Any = model.config
    about = FolderConfig(
        kind=kind,
        dtype=dtype_name(dtypes.pop()),
        config=network_config.to_dict() if hasattr(network_config, "to_dict") else dataclasses.asdict(network_config),
        licence=licence or known.licence,
        provenance=provenance or Provenance(),
    )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in known.tied}
    source = from_tensors(tensors, "the network")
    write_folder(folder, source, about, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    return about


def write_folder(
    folder: Path,
    source: TensorSource,
    about: FolderConfig,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    report: Report = no_report,
) -> None:
    """Write tensors shard by shard; the folder appears when it is complete. Memory holds one shard at most."""
    shards = plan_shards(source, max_shard_bytes)
    total = sum(spec.bytes for spec in source.specs.values())
    with new_folder(folder, overwrite) as temporary:
        weight_map: dict[str, str] = {}
        done = 0
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            report(f"write {file}", done, total)
            save_file({name: source.read(name).contiguous() for name in names}, temporary / file, {"format": "pt"})
            (temporary / file).chmod(0o644)  # safetensors writes for the owner only
            weight_map |= dict.fromkeys(names, file)
            done += sum(source.specs[name].bytes for name in names)
            report(f"write {file}", done, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        text = {"format": "lipstream", "format_version": FORMAT_VERSION, **dataclasses.asdict(about)}
        (temporary / CONFIG).write_text(json.dumps(text, indent=1) + "\n")


def plan_shards(source: TensorSource, max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order, each shard as full as it may be; a larger tensor gets one of its own."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    shards: list[list[str]] = []
    room = 0
    for name, spec in source.specs.items():
        if not shards or spec.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= spec.bytes
    return shards


def is_model_folder(folder: Path) -> bool:
    """Whether `save_pretrained` or `lipstream convert` wrote it (a foreign folder may have a config.json too)."""
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and stored.get("format") == "lipstream"


def read_folder_config(folder: Path) -> FolderConfig:
    """What a Hub-style folder says it is.

    Raises:
        CheckpointError: no config.json, not one of ours, or of a later format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no model folder, it has no {CONFIG}; make one with `lipstream convert`")
    try:
        stored = json.loads(path.read_text())
        if stored.pop("format", None) != "lipstream":
            raise CheckpointError(f"{path}: was not written by lipstream; make a model folder with `lipstream convert`")
        version = stored.pop("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {version}, this lipstream reads {FORMAT_VERSION}; update lipstream")
        made = stored.pop("provenance")
        sources = tuple(FileRecord(**record) for record in made.pop("sources"))
        return FolderConfig(**stored, provenance=Provenance(sources=sources, **made))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def load_pretrained(folder: Path, *, kind: str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The network of a Hub-style folder in eval mode: strict, memory-mapped, no second copy.

    Args:
        folder: what `save_pretrained` or `lipstream convert` wrote.
        kind: refuse a network of another kind.
        dtype: convert floating tensors (one by one; a converted tensor is a copy in memory).

    Raises:
        CheckpointError: files are missing or do not fit the configuration; all differences are listed.
    """
    about = read_folder_config(folder)
    if kind is not None and about.kind != kind:
        raise CheckpointError(f"{folder}: holds a {about.kind}, not a {kind}")
    known = kind_named(about.kind)
    source = open_source(folder, unwrap=False)
    stored = dtype_named(about.dtype)

    def build() -> nn.Module:
        try:
            return known.build(about.config)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / CONFIG}: describes no {about.kind}: {error}") from error

    return fill(build, source, f"its {CONFIG}", stored=stored, dtype=dtype, tied=known.tied)


def push_to_hub(folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, api: Any = None) -> str:
    """Upload a Hub-style folder to the Hugging Face Hub; returns the repository's address.

    Args:
        folder: what `save_pretrained` wrote; it is checked before anything is sent.
        repo_id: "owner/name"; made if it does not exist.
        api: stands in for `huggingface_hub.HfApi(token=...)`.

    Raises:
        ValueError: no such folder, or `huggingface_hub` is not installed.
    """
    about = read_folder_config(folder)
    if api is None:
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ValueError("uploading needs huggingface_hub: pip install huggingface_hub") from error
        api = HfApi(token=token)
    address = str(api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True))
    message = f"{about.kind} weights, written by {about.provenance.made_by}"
    api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type="model", commit_message=message)
    return address


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that takes its name when all went well and vanishes otherwise.

    Raises:
        ValueError: something of that name is there, and is not ours to replace.
    """
    if folder.exists():
        ours = folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))
        if not ours:
            raise ValueError(f"{folder}: is there already and no model folder; choose another name")
        if not overwrite and any(folder.iterdir()):
            raise ValueError(f"{folder}: holds a model already; choose another folder, or overwrite it (--force)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        if folder.exists():
            folder.rename(Path(scratch) / "old")  # removed with the scratch folder
        shutil.move(made, folder)
