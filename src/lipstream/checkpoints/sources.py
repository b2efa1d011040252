"""Foreign checkpoint files and folders as one thing: names with shapes and dtypes, and tensors read one at a time.

Read are `.safetensors` (one file, or a folder of shards with or without an index), `torch.save` files (flat, or
`{"net": ...}` or `{"model": {"net": ...}}` inside), distributed checkpoint folders, and the small `<step>.pth` stub
that stands beside `<step>.net_model/`. Nothing in a file is ever executed: pickles are read with `weights_only`,
a distributed checkpoint's metadata with an unpickler that knows a dozen classes. Files are memory-mapped.

    source = open_source(Path("lipforcing_14b.pth"))
    source.specs["patch_embedding.weight"].shape, source.read("patch_embedding.weight")
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lipstream.checkpoints.dcp import is_dcp_folder, read_dcp
from lipstream.checkpoints.keys import wrapper_of
from lipstream.checkpoints.mapping import load_mapped
from lipstream.checkpoints.strict import CheckpointError, TensorSpec, listed

log = logging.getLogger(__name__)

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSource:
    """Tensors that lie in files.

    Attributes:
        label: the file or folder, for messages.
        specs: name -> shape and dtype, known without reading the numbers.
        read: the tensor of a name; a view of the mapped file wherever the format allows.
        files: what it is made of, for hashes.
        wrapper: what stood in front of every key and was taken off.
    """

    label: str
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    files: tuple[Path, ...] = ()
    wrapper: str = ""

    def renamed(self, names: Mapping[str, str]) -> TensorSource:
        """The tensors `names` (new name -> name here), under the new names; all others are left out."""
        return dataclasses.replace(
            self,
            specs={new: self.specs[old] for new, old in names.items()},
            read=lambda new: self.read(names[new]),
        )


def from_tensors(tensors: Mapping[str, Tensor], label: str, files: tuple[Path, ...] = ()) -> TensorSource:
    """Tensors that are in memory (or mapped) already."""
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return TensorSource(label, specs, tensors.__getitem__, files)


def join(sources: Iterable[TensorSource], label: str | None = None) -> TensorSource:
    """Several shards as one source.

    Args:
        label: what messages call it; default: the first one's label and how many more there are.

    Raises:
        CheckpointError: no source, or a tensor in two of them.
    """
    sources = list(sources)
    if not sources:
        raise CheckpointError("no checkpoint to read")
    owner: dict[str, TensorSource] = {}
    for source in sources:
        twice = sorted(owner.keys() & source.specs.keys())
        if twice:
            raise CheckpointError(f"{source.label}: has tensors of {owner[twice[0]].label} again: {listed(twice)}")
        owner |= dict.fromkeys(source.specs, source)
    label = label or (sources[0].label if len(sources) == 1 else f"{sources[0].label} and {len(sources) - 1} more")
    specs = {name: source.specs[name] for name, source in owner.items()}
    files = tuple(file for source in sources for file in source.files)
    return TensorSource(label, specs, lambda name: owner[name].read(name), files, sources[0].wrapper)


def open_source(path: Path, *, unwrap: bool = True) -> TensorSource:
    """Open a checkpoint file or folder; ``unwrap`` takes off what wrappers put in front of its keys.

    Raises:
        CheckpointError: not there, not readable, or of no known format.
    """
    stub_folder = path.with_name(f"{path.stem}.net_model")
    if path.is_dir():
        source = read_dcp_source(path) if is_dcp_folder(path) else _open_folder(path)
    elif not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    elif path.suffix == ".safetensors":
        source = open_safetensors(path)
    elif is_dcp_folder(stub_folder):
        log.info("%s is the stub of %s", path, stub_folder)
        source = read_dcp_source(stub_folder)
    else:
        source = _open_torch(path)
    wrapper = wrapper_of(source.specs) if unwrap else ""
    bare = source.renamed({name.removeprefix(wrapper): name for name in source.specs}) if wrapper else source
    return dataclasses.replace(bare, wrapper=wrapper)


def read_dcp_source(folder: Path) -> TensorSource:
    """A distributed checkpoint; what is no tensor, or an optimizer's, is left out."""
    try:
        tensors = read_dcp(folder)
    except Exception as error:  # bytes that are no metadata make the unpickler fail in a dozen ways
        raise CheckpointError(f"{folder}: not a readable distributed checkpoint ({_first_line(error)})") from error
    # With {"model": {"net": ...}} inside, optimizer and scheduler stand beside it.
    nets = ("model.net.", "net.")
    inner = next((prefix for prefix in nets if any(name.startswith(prefix) for name in tensors)), "")
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(inner)}
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in chosen.items()}
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
    return TensorSource(str(folder), specs, lambda name: chosen[name].read(), files)


def _open_folder(folder: Path) -> TensorSource:
    """Safetensors shards: those that an index names, or all."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: has {len(indices)} index files; name one checkpoint's shards instead")
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: holds no .safetensors file and no distributed checkpoint")
        return join((open_safetensors(file) for file in files), label=str(folder))
    weight_map = read_index(indices[0])
    shards = {name: open_safetensors(folder / name) for name in sorted(set(weight_map.values()))}
    missing = [tensor for tensor, shard in weight_map.items() if tensor not in shards[shard].specs]
    if missing:
        raise CheckpointError(f"{indices[0]}: {len(missing)} tensors are not where it says: {listed(missing)}")
    joined = join(shards.values(), label=str(folder))
    unlisted = sorted(joined.specs.keys() - weight_map.keys())
    if unlisted:
        raise CheckpointError(f"{indices[0]}: {len(unlisted)} tensors are not in it: {listed(unlisted)}")
    return joined


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of a safetensors index: tensor -> shard file, which must lie in the index's own folder."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        pairs = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors index ({_first_line(error)})") from error
    outside = sorted({shard for shard in pairs.values() if Path(shard).name != shard})
    if outside:
        raise CheckpointError(f"{path}: names shards outside of its folder: {listed(outside)}")
    return pairs


def open_safetensors(path: Path) -> TensorSource:
    """One safetensors file, mapped, with its names as they are.

    Raises:
        CheckpointError: not there or not readable.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        file: Any = safe_open(str(path), "pt")
        slices = {name: file.get_slice(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    specs = {}
    for name, part in slices.items():
        dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise CheckpointError(f"{path}: {name} has the dtype {part.get_dtype()}, which no network here takes")
        specs[name] = TensorSpec(tuple(part.get_shape()), dtype)
    return TensorSource(str(path), specs, file.get_tensor, (path,))


def _open_torch(path: Path) -> TensorSource:
    try:
        content = load_mapped(path)
    except Exception as error:  # bytes that are no pickle make the unpickler fail in a dozen ways
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else _first_line(error)
        raise CheckpointError(f"{path}: not a checkpoint that can be read safely ({reason})") from error
    for container in ("model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no named tensors")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: {len(others)} entries are no tensors: {listed(others)}")
    return from_tensors({str(name): tensor for name, tensor in content.items()}, str(path), (path,))


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
