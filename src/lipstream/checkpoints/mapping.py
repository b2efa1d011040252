"""`torch.save` files mapped into memory, also those that are larger than the machine's memory.

`torch.load(mmap=True)` maps a file in one piece that may be written to (privately), and Linux refuses such a piece when
it is larger than memory and swap together: the 28.6 GB of the 14B student on a machine with 24 GB. Tensor by tensor
the same kind of mapping is granted, and pages that are only read can be given back at any time.
"""

from __future__ import annotations

import logging
import mmap
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def load_mapped(path: Path) -> Any:
    """The content of a file that `torch.save` wrote, its tensors mapped; nothing in it is executed.

    Files from before torch 1.6 cannot be mapped and are read; the ones of this field are small.

    Raises:
        Exception: whatever torch raises for bytes that are no such file, of many types.
    """
    if not zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error) or "allocate" not in str(error):
            raise
        log.info("%s is larger than this machine's memory: mapped tensor by tensor", path)
        return load_in_pieces(path)


def load_in_pieces(path: Path) -> Any:
    """The same, with a mapping for every tensor."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Loaded without numbers, a storage knows its place in the file.
    with FakeTensorMode():
        content = torch.load(path, map_location="cpu", weights_only=True)
    with path.open("rb") as file:
        return _with_numbers(content, file.fileno(), {})


def _with_numbers(content: Any, file: int, mapped: dict[int, Tensor]) -> Any:
    """``content`` with mapped tensors in place of empty ones; ``mapped`` holds the bytes by their place."""
    if isinstance(content, dict):
        return {key: _with_numbers(value, file, mapped) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    storage: Any = content.untyped_storage()
    if not storage.nbytes():
        return torch.empty(content.shape, dtype=content.dtype)
    start = int(storage._checkpoint_offset)
    if start not in mapped:
        lead = start % mmap.ALLOCATIONGRANULARITY
        area = mmap.mmap(file, lead + storage.nbytes(), access=mmap.ACCESS_COPY, offset=start - lead)
        mapped[start] = torch.frombuffer(area, dtype=torch.uint8, count=storage.nbytes(), offset=lead)
    numbers = mapped[start].view(content.dtype)
    return torch.as_strided(numbers, content.shape, content.stride(), content.storage_offset())
