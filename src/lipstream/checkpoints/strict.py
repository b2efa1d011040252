"""Strict loading: every tensor of a network is there, nothing else is, all shapes and dtypes fit; or one clear error.

The network is made on the meta device and given the tensors of the file as they lie in memory (`assign`), so a
memory-mapped checkpoint is never copied: its pages are read when the network first needs them.

    model = fill(lambda: DiT(config), open_source(path), "DiT 14b")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from lipstream.checkpoints.sources import TensorSource

SHOWN = 8  # of each kind of difference; then a count
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
Module = TypeVar("Module", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file and all that is wrong with it."""


class TensorSpec(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Differences:
    """How a checkpoint differs from what a network needs."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshapen: tuple[str, ...]
    mistyped: tuple[str, ...]

    def __bool__(self) -> bool:
        return any((self.missing, self.unknown, self.misshapen, self.mistyped))

    def __str__(self) -> str:
        groups = (
            ("missing", self.missing),
            ("unknown", self.unknown),
            ("of another shape", self.misshapen),
            ("of another dtype", self.mistyped),
        )
        return "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in groups if names)


def listed(names: Iterable[str]) -> str:
    """The first eight names, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def specs_of(module: nn.Module, without: Container[str] = ()) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a network's state."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in module.state_dict().items() if name not in without}


def compare(
    found: Mapping[str, TensorSpec], needed: Mapping[str, TensorSpec], dtype: torch.dtype | None = None
) -> Differences:
    """All differences; floating tensors must be ``dtype``, or else all of one floating dtype."""
    common = sorted(found.keys() & needed.keys())
    floating = {name for name in common if needed[name].dtype in FLOATS}
    wanted = dtype or _majority(found[name].dtype for name in sorted(floating))
    right = {name: wanted if name in floating else needed[name].dtype for name in common}
    return Differences(
        missing=tuple(sorted(needed.keys() - found.keys())),
        unknown=tuple(sorted(found.keys() - needed.keys())),
        misshapen=tuple(
            f"{name} is {list(found[name].shape)}, the network needs {list(needed[name].shape)}"
            for name in common
            if found[name].shape != needed[name].shape
        ),
        mistyped=tuple(
            f"{name} is {dtype_name(found[name].dtype)}, not {dtype_name(right[name])}"
            for name in common
            if found[name].dtype != right[name]
        ),
    )


def require(
    found: Mapping[str, TensorSpec],
    needed: Mapping[str, TensorSpec],
    where: str,
    what: str = "the network",
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse a checkpoint that is not exactly what is needed.

    Raises:
        CheckpointError: names the file and lists the differences.
    """
    differences = compare(found, needed, dtype)
    if differences:
        raise CheckpointError(f"{where} does not fit {what}: {differences}")


def fill(
    build: Callable[[], Module],
    source: TensorSource,
    what: str = "the network",
    *,
    stored: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    tied: Mapping[str, str] | None = None,
) -> Module:
    """A network that holds the tensors of ``source`` themselves: no second copy, nothing read before it is used.

    Args:
        build: makes the network; called under the meta device.
        source: tensors under our names.
        stored: the dtype that floating tensors must have; None: any, but one for all.
        dtype: convert floating tensors to this (a converted tensor is a copy).
        tied: second name of a parameter -> the name that the source has it under.

    Raises:
        CheckpointError: see `require`.
    """
    with torch.device("meta"):
        module = build()
    tied = tied or {}
    require(source.specs, specs_of(module, tied), source.label, what, stored)
    state = {name: cast(source.read(name), dtype) for name in source.specs}
    for alias, name in tied.items():
        state[name] = state[alias] = nn.Parameter(state[name], requires_grad=False)  # one parameter, not two
    module.load_state_dict(state, strict=True, assign=True)
    left = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"{what}: still on the meta device (make such buffers on a real one): {listed(left)}"
    return module.eval()


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Floating tensors as ``dtype``, others and None untouched."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16", as files and messages say it."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Inverse of `dtype_name`.

    Raises:
        ValueError: no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype is called '{name}'")
    return dtype


def _majority(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The commonest floating dtype; float32 where there is none."""
    counts: dict[torch.dtype, int] = {}
    for dtype in dtypes:
        if dtype in FLOATS:
            counts[dtype] = counts.get(dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
