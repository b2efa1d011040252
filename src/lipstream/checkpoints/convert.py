"""Foreign checkpoints to a network, or to a Hub-style folder: open, rename, merge, check strictly, build or write.

found = assemble([Path("lipforcing_14b.pth")])                               # the merged student
found = assemble([wan_folder, Path("omniavatar_ls_14b.pt")], precision="fp32")  # the teacher
model = found.load()
convert([Path("lipforcing_14b.pth")], Path("lipforcing-14b"))
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipstream.checkpoints.hashing import FileRecord, Report, no_report, record_file
from lipstream.checkpoints.hub import (
    MAX_SHARD_BYTES,
    FolderConfig,
    Provenance,
    is_model_folder,
    read_folder_config,
    write_folder,
)
from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES
from lipstream.checkpoints.kinds import KINDS, STUDENT, TEACHER, Kind, kind_named
from lipstream.checkpoints.lora import (
    PATCH_KERNEL,
    LoraConfig,
    Precision,
    grow_patch_kernel,
    grown_source,
    is_adapter,
    merge_adapter,
)
from lipstream.checkpoints.sources import TensorSource, join, open_source
from lipstream.checkpoints.strict import (
    CheckpointError,
    TensorSpec,
    cast,
    dtype_name,
    fill,
    listed,
    require,
    specs_of,
)
from lipstream.models.dit import DiT
from lipstream.models.dit_config import DiTConfig

log = logging.getLogger(__name__)

DEFAULT_PRECISION: Precision = "bf16"  # what the release does


@dataclass(frozen=True)
class Assembled:
    """Foreign files that were found to be exactly one network.

    Attributes:
        source: its tensors under our names, read when asked for.
        dtype: of all floating tensors of ``source``.
        merge: precision, rank and alpha of a merged adapter.
    """

    kind: Kind
    config: Mapping[str, Any]
    source: TensorSource
    dtype: torch.dtype
    key_format: str
    merge: Mapping[str, Any] | None

    def load(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The network; a file without an adapter stays mapped, a merged one is in memory once.

        Args:
            dtype: convert floating tensors to this; a converted tensor is a copy.
        """
        what, tied = f"a {self.kind.name}", self.kind.tied
        return fill(lambda: self.kind.build(self.config), self.source, what, stored=self.dtype, dtype=dtype, tied=tied)


def assemble(
    paths: Sequence[Path],
    *,
    kind: str | None = None,
    precision: Precision | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    lora: LoraConfig | None = None,
) -> Assembled:
    """Open checkpoint files and folders that together are one network, and check them strictly.

    Args:
        paths: one checkpoint, or shards of one, or a base and its adapter, in any order; or one model folder.
        kind: name of the network; default: what the tensors say.
        precision: of merging an adapter; default bf16, as the release does it.
        dtype: of the floating tensors of the result; default: as stored (bfloat16 after a bf16 merge).
        config: of the network; default: what the shapes say.
        lora: rank and scale of an adapter; default: OmniAvatar's.

    Raises:
        CheckpointError: names the file and everything that is wrong.
    """
    if len(paths) == 1 and is_model_folder(paths[0]):
        about = read_folder_config(paths[0])
        if kind not in (None, about.kind):
            raise CheckpointError(f"{paths[0]}: holds a {about.kind}, not a {kind}")
        kind, config = about.kind, config or about.config
    opened = [open_source(path) for path in paths]
    adapters = [source for source in opened if is_adapter(source)]
    base = join(source for source in opened if not is_adapter(source))
    known = kind_named(kind) if kind else _detect(base, bool(adapters))
    _check_adapters(adapters, known, precision)
    renamed, key_map = known.in_our_names(base)
    merge = None
    if adapters:
        precision, lora = precision or DEFAULT_PRECISION, lora or LoraConfig()
        adapter, _ = known.in_our_names(adapters[0])
        # The network's input channels follow from the latent channels, which the base tells.
        audio = {name: spec for name, spec in adapter.specs.items() if _is_audio(name)}
        config = config or _inferred(known, {**renamed.specs, **audio}, f"{base.label} with {adapter.label}")
        channels = DiTConfig.from_dict(config).in_channels
        merged = merge_adapter(renamed, adapter, precision, channels=channels, lora=lora, dtype=dtype)
        merge = {"precision": precision, **asdict(lora)}
    elif known in (STUDENT, TEACHER):
        if not any(_is_audio(name) for name in renamed.specs):
            raise CheckpointError(f"{base.label}: a base Wan without audio; name its OmniAvatar adapter file as well")
        config = config or _inferred(known, renamed.specs, renamed.label)
        merged = _as_dtype(grown_source(renamed, DiTConfig.from_dict(config).in_channels), dtype)
    else:
        config = config or known.describe(paths[0]) or _inferred(known, renamed.specs, renamed.label)
        merged = _as_dtype(renamed, dtype)
    with torch.device("meta"):
        needed = specs_of(known.build(config), known.tied)
    merged = known.fit(merged, needed)
    require(merged.specs, needed, merged.label, f"a {known.name}", dtype)
    ordered = merged.renamed({name: name for name in needed})
    floats = [spec.dtype for spec in ordered.specs.values() if spec.dtype.is_floating_point]
    log.info("%s: a %s in %s naming, %s", merged.label, known.name, key_map.name, floats[0])
    return Assembled(known, config, ordered, floats[0], key_map.name, merge)


def convert(
    paths: Sequence[Path],
    folder: Path,
    *,
    kind: str | None = None,
    precision: Precision | None = None,
    dtype: torch.dtype | None = None,
    licence: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    report: Report = no_report,
    lora: LoraConfig | None = None,
) -> FolderConfig:
    """Write foreign checkpoints as a Hub-style folder with provenance; see `assemble` for the arguments.

    Raises:
        ValueError: the sources are not one network, or the folder is there already.
    """
    found = assemble(paths, kind=kind, precision=precision, dtype=dtype, lora=lora)
    records: list[FileRecord] = [record_file(path, report) for path in found.source.files]
    about = FolderConfig(
        kind=found.kind.name,
        dtype=dtype_name(found.dtype),
        config=found.config,
        licence=licence or found.kind.licence,
        provenance=Provenance(
            sources=tuple(records), key_format=found.key_format, wrapper=found.source.wrapper, merge=found.merge
        ),
    )
    write_folder(folder, found.source, about, max_shard_bytes=max_shard_bytes, overwrite=overwrite, report=report)
    return about


def load_base(model: DiT, paths: Sequence[Path]) -> tuple[str, ...]:
    """Start a network from a base Wan (no audio, 16 input channels), in place, for training.

    The patch kernel's further input channels and the audio layers keep what the network has. Returns the names of
    the tensors that were not in the base.

    Raises:
        CheckpointError: anything else is missing, or is unknown or misshapen.
    """
    base, _ = STUDENT.in_our_names(join(open_source(path) for path in paths))
    needed = {name: spec for name, spec in specs_of(model).items() if not _is_audio(name)}
    found = grown_source(base, model.config.in_channels)
    require(found.specs, needed, base.label, "the network without its audio layers")
    state = model.state_dict()
    with torch.no_grad():
        for name in needed:
            tensor = base.read(name)
            if name == PATCH_KERNEL:
                tensor = grow_patch_kernel(tensor, model.config.in_channels, state[name])
            state[name].copy_(tensor)
    return tuple(name for name in state if name not in needed)


def _inferred(kind: Kind, specs: Mapping[str, TensorSpec], label: str) -> Mapping[str, Any]:
    try:
        return kind.infer(specs)
    except ValueError as error:
        raise CheckpointError(f"{label}: {error}") from error


def _is_audio(name: str) -> bool:
    return name.startswith(AUDIO_PREFIXES)


def _detect(base: TensorSource, has_adapter: bool) -> Kind:
    """The kind whose key maps know most of the tensors; they cannot tell student from teacher, the wrapper can."""
    best = max(KINDS.values(), key=lambda kind: kind.share_known(base))
    if best.share_known(base) <= 0.5:
        raise CheckpointError(
            f"{base.label}: no known network has these tensors: {listed(base.specs)}; say --kind {'|'.join(KINDS)}"
        )
    if best is STUDENT and (has_adapter or base.wrapper == "model."):
        return TEACHER
    return best


def _check_adapters(adapters: Sequence[TensorSource], kind: Kind, precision: Precision | None) -> None:
    if len(adapters) > 1:
        raise CheckpointError(f"{adapters[0].label} and {adapters[1].label}: only one adapter can be merged")
    if adapters and kind not in (STUDENT, TEACHER):
        raise CheckpointError(f"{adapters[0].label}: an adapter is for a student or teacher, not for a {kind.name}")
    if precision is not None and not adapters:
        raise ValueError("a merge precision was given, but none of the sources is an adapter; leave it out")


def _as_dtype(source: TensorSource, dtype: torch.dtype | None) -> TensorSource:
    """The same tensors with floating ones converted when they are read."""
    if dtype is None:
        return source
    specs = {
        name: TensorSpec(spec.shape, dtype if spec.dtype.is_floating_point else spec.dtype)
        for name, spec in source.specs.items()
    }
    return TensorSource(source.label, specs, lambda name: cast(source.read(name), dtype), source.files, source.wrapper)
