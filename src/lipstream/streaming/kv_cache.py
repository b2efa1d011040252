"""Ring key/value cache of the causal student: an attention sink plus a rolling window of latent frames.

Lip Forcing attends, in chunk k >= 2, to the very first latent frame (the sink), the previous chunk and
itself: 7 latent frames in all. Keys are stored after q/k-norm but *before* rotation, so the same stored key
can be given a new temporal position in each window ("dynamic RoPE"): sink 0, previous chunk 1-3, own chunk
4-6. The positions come out of the cache; nobody else computes them.

Layout per layer: [B, heads, slots * tokens, head_dim]. Latent frame f lives in slot f (sink) or in the ring
behind it. A chunk's own slots are exactly those whose frames leave its window, so denoising calls may write
there as scratch: the visible keys are then a contiguous prefix of the buffer and nothing is copied.

Nothing waits for the device: lengths are Python ints, constant from the third chunk on, and the slots to write,
which change from chunk to chunk, enter as index tensors that are made once per arrangement. So one compiled or
captured call serves every later chunk. A limited cache never moves its buffers: `restore` and `reset` keep them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class InPlace(NamedTuple):
    """One layer's buffers and where the own tokens go; see `KVCache.extend_in_place`."""

    keys: Tensor  # [B, heads, slots * tokens, head_dim]
    values: Tensor
    own: Tensor  # [own tokens] places in the buffers
    visible_tokens: int

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the own keys and values, see all visible ones; [B, heads, tokens, head_dim] in and out.

        Under autocast they may come in another precision than the cache keeps.
        """
        self.keys.index_copy_(2, self.own, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.own, v.to(self.values.dtype))
        return self.keys[:, :, : self.visible_tokens], self.values[:, :, : self.visible_tokens]


class Copied(NamedTuple):
    """A copy of one layer's visible past; see `KVCache.extend_copy`."""

    keys: Tensor
    values: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The past with the own keys and values behind it; [B, heads, tokens, head_dim] in and out."""
        return torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)


#: (keys, values) of the own tokens -> (keys, values) of the whole window.
Extend = InPlace | Copied


@dataclass(frozen=True)
class Window:
    """What one call sees: frame numbers and temporal rotary positions, captured before the block loop."""

    start: int  # first own latent frame
    own_slots: tuple[int, ...]
    own_positions: tuple[int, ...]
    past_slots: tuple[int, ...]
    past_frames: tuple[int, ...]
    past_positions: tuple[int, ...]

    @property
    def in_slot_order(self) -> tuple[int, ...]:
        """Positions of the visible frames in buffer order (own frames already written to their slots)."""
        by_slot = dict(zip(self.past_slots, self.past_positions, strict=True))
        by_slot.update(zip(self.own_slots, self.own_positions, strict=True))
        return tuple(by_slot[slot] for slot in sorted(by_slot))

    @property
    def past_then_own(self) -> tuple[int, ...]:
        """Positions of the visible frames when the own frames are appended to a copy of the past."""
        return self.past_positions + self.own_positions


@dataclass(kw_only=True)
class TextMemory:
    """Cross attention keys and values of one clip's text, computed once (`DiT.prepare_text`).

    bias: what each key's logit is raised by, [keys]: one key can stand for n equal ones. None: nothing.
    """

    text: Tensor
    layers: list[tuple[Tensor, Tensor]]
    bias: Tensor | None = None


@dataclass(kw_only=True)
class KVCacheSnapshot:
    """Plain copy of a cache's content."""

    latent_frames: int
    keys: list[Tensor]
    values: list[Tensor]
    text: TextMemory | None


@dataclass(kw_only=True)
class KVCache:
    """Keys and values of all layers for one rollout.

    window_latent_frames counts the sink and the current chunk; None means unlimited (buffers then grow).
    window_positions False gives every frame its absolute number as temporal position (full attention, stage
    1).
    """

    layers: int
    batch: int
    heads: int
    head_dim: int
    tokens_per_latent_frame: int
    window_latent_frames: int | None = 7
    sink_latent_frames: int = 1
    window_positions: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    latent_frames: int = field(default=0, init=False)  # stored so far: the next chunk starts here
    text: TextMemory | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.window_latent_frames is not None and self.window_latent_frames <= self.sink_latent_frames:
            raise ValueError(
                f"window of {self.window_latent_frames} latent frames leaves no room beside a sink of "
                f"{self.sink_latent_frames}"
            )
        # An unlimited cache starts with a few seconds and doubles.
        self._keys = [self._allocate(self.window_latent_frames or 24) for _ in range(self.layers)]
        self._values = [torch.zeros_like(k) for k in self._keys]
        self._places: dict[tuple[int, ...], Tensor] = {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all keys and values: 2 x layers x window x tokens x width x bytes of a number (x batch)."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def buffers(self) -> Iterator[Tensor]:
        """The key and value buffers of all layers."""
        yield from self._keys
        yield from self._values

    def _allocate(self, slots: int) -> Tensor:
        shape = (self.batch, self.heads, slots * self.tokens_per_latent_frame, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _slot(self, frame: int) -> int:
        if self.window_latent_frames is None or frame < self.sink_latent_frames:
            return frame
        ring = self.window_latent_frames - self.sink_latent_frames
        return self.sink_latent_frames + (frame - self.sink_latent_frames) % ring

    def _visible_past(self, start: int, own: int) -> tuple[int, ...]:
        """Latent frames that a chunk of `own` frames beginning at `start` sees besides itself."""
        if self.window_latent_frames is None:
            return tuple(range(start))
        sink = min(self.sink_latent_frames, start)
        room = self.window_latent_frames - own - sink
        if room < 0:
            raise ValueError(
                f"a chunk of {own} latent frames and a sink of {sink} do not fit a window of "
                f"{self.window_latent_frames}"
            )
        return tuple(range(sink)) + tuple(range(max(sink, start - room), start))

    def window(self, own_latent_frames: int, start: int | None = None) -> Window:
        """The window of the next chunk; the same for every call of that chunk until `advance`.

        start: of another chunk, that begins at this latent frame.
        """
        start = self.latent_frames if start is None else start
        own = tuple(range(start, start + own_latent_frames))
        past = self._visible_past(start, own_latent_frames)
        frames = past + own
        positions = tuple(range(len(frames))) if self.window_positions else frames
        return Window(
            start=start,
            own_slots=tuple(map(self._slot, own)),
            own_positions=positions[len(past) :],
            past_slots=tuple(map(self._slot, past)),
            past_frames=past,
            past_positions=positions[: len(past)],
        )

    def arrangements(self, own_latent_frames: int) -> Iterator[Window]:
        """Every kind of window that chunks of one length will have: the first ones, then one turn of the ring."""
        seen: set[tuple[tuple[int, ...], ...]] = set()
        for start in itertools.count(0, own_latent_frames):
            window = self.window(own_latent_frames, start)
            kind = (window.own_slots, window.past_slots)
            if kind in seen:
                return
            seen.add(kind)
            yield window

    def extend_in_place(self, layer: int, window: Window) -> Extend:
        """Write the own keys to their slots and see the buffer itself: inference, keys in `in_slot_order`."""
        self._reserve(layer, max(window.own_slots) + 1)
        end = (len(window.past_slots) + len(window.own_slots)) * self.tokens_per_latent_frame
        return InPlace(self._keys[layer], self._values[layer], self._own_places(window.own_slots), end)

    def extend_copy(self, layer: int, window: Window, repeats: int = 1) -> Extend:
        """Append the own keys to a copy of the past: gradients, or `repeats` branches over one history.

        The copy is made now, so a checkpointed backward pass sees the keys of this call whatever is stored
        later.
        """
        past_k, past_v = (self._gather(buffers[layer], window.past_slots) for buffers in (self._keys, self._values))
        if repeats > 1:
            past_k, past_v = past_k.repeat(repeats, 1, 1, 1), past_v.repeat(repeats, 1, 1, 1)
        return Copied(past_k, past_v)

    def advance(self, own_latent_frames: int) -> None:
        """Keep the own frames written last: the end of the clean pass."""
        self.latent_frames += own_latent_frames

    def held(self, layer: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """(latent frame numbers, keys, values) in time order, for tests; keys are not rotated."""
        limit, sink = self.window_latent_frames, self.sink_latent_frames
        frames = tuple(range(self.latent_frames))
        if limit is not None and len(frames) > limit:
            frames = frames[:sink] + frames[len(frames) - (limit - sink) :]
        slots = tuple(map(self._slot, frames))
        return frames, self._gather(self._keys[layer], slots), self._gather(self._values[layer], slots)

    def snapshot(self) -> KVCacheSnapshot:
        """An independent copy; text memory is shared because nobody writes to it."""
        return KVCacheSnapshot(
            latent_frames=self.latent_frames,
            keys=[k.clone() for k in self._keys],
            values=[v.clone() for v in self._values],
            text=self.text,
        )

    def restore(self, snapshot: KVCacheSnapshot) -> None:
        """Take up the content of a snapshot of an equally shaped cache."""
        if len(snapshot.keys) != self.layers or snapshot.keys[0].shape[:2] != self._keys[0].shape[:2]:
            raise ValueError("snapshot is of a cache with other layers, batch or heads")
        self.latent_frames, self.text = snapshot.latent_frames, snapshot.text
        for buffers, saved in ((self._keys, snapshot.keys), (self._values, snapshot.values)):
            for layer, content in enumerate(saved):
                if buffers[layer].shape != content.shape:  # an unlimited cache of another length
                    buffers[layer] = torch.empty_like(content)
                buffers[layer].copy_(content)  # in place: captured graphs know the buffers by their address

    def reset(self) -> None:
        """Forget everything; buffers stay allocated."""
        self.latent_frames, self.text = 0, None
        for buffer in (*self._keys, *self._values):
            buffer.zero_()

    def _gather(self, buffer: Tensor, slots: tuple[int, ...]) -> Tensor:
        tokens = self.tokens_per_latent_frame
        if not slots:
            return buffer[:, :, :0]
        return torch.cat([buffer[:, :, s * tokens : (s + n) * tokens] for s, _, n in runs(slots)], dim=2)

    def _own_places(self, slots: tuple[int, ...]) -> Tensor:
        """Places [own tokens] of these slots in the buffers. A ring has few arrangements, so all are kept."""
        if slots not in self._places:
            if self.window_latent_frames is None:
                self._places.clear()  # no ring: these slots never come again
            tokens = self.tokens_per_latent_frame
            places = [place for slot in slots for place in range(slot * tokens, (slot + 1) * tokens)]
            with torch.inference_mode(False):  # must also serve outside of inference mode
                self._places[slots] = torch.tensor(places, dtype=torch.long, device=self.device)
        return self._places[slots]

    def _reserve(self, layer: int, slots: int) -> None:
        tokens = self.tokens_per_latent_frame
        have = self._keys[layer].shape[2] // tokens
        if slots <= have:
            return
        for buffers in (self._keys, self._values):
            grown = self._allocate(max(slots, 2 * have))
            grown[:, :, : have * tokens] = buffers[layer]
            buffers[layer] = grown


def runs(slots: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Contiguous runs as (first slot, index in `slots`, length): few slices instead of an index tensor."""
    found: list[tuple[int, int, int]] = []
    for index, slot in enumerate(slots):
        if found and slot == found[-1][0] + found[-1][2]:
            first, source, length = found[-1]
            found[-1] = (first, source, length + 1)
        else:
            found.append((slot, index, 1))
    return found
