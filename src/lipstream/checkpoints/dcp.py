"""Distributed checkpoint folders (`torch.distributed.checkpoint`), read one tensor at a time without its machinery.

A folder holds `.metadata` (a pickle: which tensor has which pieces in which file) and `*.distcp` files in which every
piece is a `torch.save` archive at some offset. torch's own reader unpickles `.metadata` without limits, which runs
whatever a stranger wrote there; here an unpickler finds only the classes that such a file is made of.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata

METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                dcp_metadata,
                (
                    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                    "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
                ),
            ),
            (filesystem, ("_StorageInfo", "_StoragePrefix")),
        )
        for name in names
    },
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    ("torch.serialization", "_get_layout"): lambda name: torch.strided,  # unused here
    # Where the writer's folder was: of no use, and its class depends on the writer's system.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
    ("pathlib._local", "WindowsPath"): PureWindowsPath,
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of a metadata file and the dtypes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name, if a metadata file may hold it."""
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no metadata needs")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and where its archive lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start_bytes: int
    length_bytes: int

    def read(self) -> Tensor:
        """The numbers of the box."""
        with self.file.open("rb") as file:
            file.seek(self.start_bytes)
            archive = io.BytesIO(file.read(self.length_bytes))
        tensor = torch.load(archive, map_location="cpu", weights_only=True)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.sizes:
            raise ValueError(f"{self.file}: the piece at byte {self.start_bytes} is not what the metadata says")
        return tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """The whole tensor, put together."""
        if len(self.pieces) == 1 and self.pieces[0].sizes == self.shape:
            return self.pieces[0].read()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            box = tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))
            whole[box] = piece.read()
        return whole


def is_dcp_folder(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint."""
    return (path / METADATA).is_file()


def read_dcp(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a distributed checkpoint by name; entries that are no tensors are left out.

    Raises:
        ValueError: pieces are missing or do not fill a tensor, or lie outside of the folder.
        pickle.UnpicklingError: the metadata holds something else than metadata.
    """
    with (folder / METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, dcp_metadata.Metadata):
        raise ValueError("its metadata is something else")
    storage = {(index.fqn, _offsets(index.offset)): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
            continue
        pieces = []
        for chunk in entry.chunks:
            info = storage.get((name, tuple(chunk.offsets)))
            if info is None:
                raise ValueError(f"a piece of {name} is in no file")
            if Path(info.relative_path).name != info.relative_path or not (folder / info.relative_path).is_file():
                raise ValueError(f"{name} lies in {info.relative_path}, which is not in the folder")
            place = (folder / info.relative_path, info.offset, info.length)
            pieces.append(Piece(tuple(chunk.offsets), tuple(chunk.sizes), *place))
        shape = tuple(entry.size)
        if sum(torch.Size(piece.sizes).numel() for piece in pieces) != entry.size.numel():
            raise ValueError(f"the pieces of {name} do not fill it")
        tensors[name] = StoredTensor(shape, entry.properties.dtype, tuple(pieces))
    return tensors


def _offsets(offset: Any) -> tuple[int, ...]:
    return () if offset is None else tuple(offset)
