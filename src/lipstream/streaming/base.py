"""Streaming contract: every layer that remembers something between chunks is a `StreamingModule`.

A layer declares a typed state dataclass, makes a fresh one in `_init_state`, and reads it in `forward`
through `self.state_or_fresh(batch)`. Outside `with model.streaming(batch):` the layer gets a throw-away
state, so offline is the one-chunk case of streaming and `forward` has a single body. The property test "any
chunking == one shot" (tests/test_streaming.py) is what each such layer has to pass.

    with model.streaming(batch=1):
        for chunk in chunks:
            out = model(chunk)
        saved = model.snapshot()      # plain data: session migration, roll back, crash recovery
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

StateT = TypeVar("StateT")
Snapshot = dict[str, Any]
ModuleT = TypeVar("ModuleT", bound="StreamingModule[Any]")


def clone_state(value: Any) -> Any:
    """Deep copy of a state of dataclasses, tensors, containers and plain values; tensors lose their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{f.name: clone_state(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init},
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(clone_state(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(clone_state(item) for item in value)
    if isinstance(value, Mapping):
        return {key: clone_state(item) for key, item in value.items()}
    return value


class StreamingModule(nn.Module, Generic[StateT]):
    """A module whose memory between chunks is one explicit, typed state object.

    Subclasses implement `_init_state(batch)`; containers need no code, their stateful children are found
    through the module tree.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: StateT | None = None

    def _init_state(self, batch: int) -> StateT:
        """A fresh state for `batch` rows."""
        raise NotImplementedError(f"{type(self).__name__} does not declare a streaming state")

    @property
    def state(self) -> StateT | None:
        """The live state, or None outside of `streaming`."""
        return self._state

    def state_or_fresh(self, batch: int) -> StateT:
        """The live state when streaming, else a throw-away one: what `forward` calls first."""
        return self._init_state(batch) if self._state is None else self._state

    @property
    def is_streaming(self) -> bool:
        """Whether this layer, or any layer below it, carries state from call to call."""
        return any(module._state is not None for _, module in _stateful(self))

    @contextmanager
    def streaming(self, batch: int) -> Iterator[None]:
        """Carry state over calls inside the block; the state is dropped at its end."""
        self.start_streaming(batch)
        try:
            yield
        finally:
            self.stop_streaming()

    def start_streaming(self, batch: int) -> None:
        """`streaming` for owners that outlive a block (a session)."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if self.is_streaming:
            raise ValueError(f"{type(self).__name__} is streaming already; nested streams would share state")
        for _, module in _stateful(self):
            module._state = module._init_state(batch)

    def stop_streaming(self) -> None:
        """Drop all state below this module."""
        for _, module in _stateful(self):
            module._state = None

    def stream_view(self: ModuleT, batch: int) -> ModuleT:
        """A streaming twin that shares every weight and has a state of its own: one per stream, however many run."""
        tensors = [*self.parameters(), *self.buffers()]
        twin = copy.deepcopy(self, {id(tensor): tensor for tensor in tensors})
        twin.stop_streaming()
        twin.start_streaming(batch)
        return twin

    def reset(self, batch: int) -> None:
        """Forget the past and go on streaming with `batch` rows."""
        self.stop_streaming()
        self.start_streaming(batch)

    def snapshot(self) -> Snapshot:
        """An independent copy of all state below this module, keyed by module path."""
        return {name: clone_state(module._state) for name, module in _stateful(self) if module._state is not None}

    def restore(self, snapshot: Snapshot) -> None:
        """Take up a `snapshot` of this module (or of an equal one in another process)."""
        stateful = dict(_stateful(self))
        unknown = sorted(set(snapshot) - set(stateful))
        if unknown:
            raise ValueError(f"snapshot holds states of unknown modules: {unknown}")
        for name, module in stateful.items():
            module._state = clone_state(snapshot[name]) if name in snapshot else None


def _stateful(root: nn.Module) -> Iterator[tuple[str, StreamingModule[Any]]]:
    """All streaming layers of the tree that declare a state; pure containers are skipped."""
    for name, module in root.named_modules():
        if isinstance(module, StreamingModule) and type(module)._init_state is not StreamingModule._init_state:
            yield name, module
