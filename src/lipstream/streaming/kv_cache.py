"""Ring key/value cache of the causal student: an attention sink plus a rolling window of latent frames.

Lip Forcing attends, in chunk k >= 2, to the very first latent frame (the sink), the previous chunk and
itself: 7 latent frames in all. Keys are stored after q/k-norm but *before* rotation, so the same stored key
can be given a new temporal position in each window ("dynamic RoPE"): sink 0, previous chunk 1-3, own chunk
4-6. The positions come out of the cache; nobody else computes them.

Layout per layer: [B, heads, slots * tokens, head_dim]. Latent frame f lives in slot f (sink) or in the ring
behind it. A chunk's own slots are exactly those whose frames leave its window, so denoising calls may write
there as scratch: the visible keys are then a contiguous prefix of the buffer and nothing is copied. All
indices are Python ints: no device synchronisation, and constant shapes from chunk 2 on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: (keys, values) of the own tokens -> (keys, values) of the whole window; both [B, heads, tokens, head_dim].
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    """Cross attention keys and values of one clip's text, computed once."""

    text: Tensor
    layers: list[tuple[Tensor, Tensor]]


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

    def window(self, own_latent_frames: int) -> Window:
        """The window of the next chunk; the same for every call of that chunk until `advance`."""
        start = self.latent_frames
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

    def extend_in_place(self, layer: int, window: Window) -> Extend:
        """Write the own keys to their slots and see the buffer itself: inference, keys in `in_slot_order`."""
        self._reserve(layer, max(window.own_slots) + 1)
        tokens = self.tokens_per_latent_frame
        end = (len(window.past_slots) + len(window.own_slots)) * tokens

        def extend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            for slot, source, length in runs(window.own_slots):
                at = slice(slot * tokens, (slot + length) * tokens)
                of = slice(source * tokens, (source + length) * tokens)
                self._keys[layer][:, :, at] = k[:, :, of]
                self._values[layer][:, :, at] = v[:, :, of]
            return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

        return extend

    def extend_copy(self, layer: int, window: Window, repeats: int = 1) -> Extend:
        """Append the own keys to a copy of the past: gradients, or `repeats` branches over one history.

        The copy is made now, so a checkpointed backward pass sees the keys of this call whatever is stored
        later.
        """
        past_k, past_v = (self._gather(buffers[layer], window.past_slots) for buffers in (self._keys, self._values))
        if repeats > 1:
            past_k, past_v = past_k.repeat(repeats, 1, 1, 1), past_v.repeat(repeats, 1, 1, 1)

        def extend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)

        return extend

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
        self._keys = [k.clone() for k in snapshot.keys]
        self._values = [v.clone() for v in snapshot.values]

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
