"""The reference's wrong student gradients, to be measured as a row of `lipstream ablate gradients` (spec 11.1).

With activation checkpointing a backward pass runs every block again. The reference overwrites its key/value buffers
with zeros when its rollout ends, which is before that: the blocks then run again on an empty past. The loss is right,
all gradients but the last layer's are not. Ours come from copies that nobody touches; this module touches them.

    cache = student.make_cache(batch, height, width, kind=ForgetfulCache)
    recompute_blocks(student)
    ...                    # the rollout
    cache.forget()         # and only now loss.backward()
"""

from __future__ import annotations

from typing import Any

from lipstream.streaming.kv_cache import Copied, Extend, KVCache, Window


class ForgetfulCache(KVCache):
    """A cache that can wipe the pasts that it has handed out; see the module."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._handed_out: list[Copied] = []

    def extend_copy(self, layer: int, window: Window, repeats: int = 1) -> Extend:
        """As :meth:`KVCache.extend_copy`; the copy is remembered."""
        copied = super().extend_copy(layer, window, repeats)
        assert isinstance(copied, Copied)
        self._handed_out.append(copied)
        return copied

    def forget(self) -> None:
        """Set all pasts that were handed out to zero: what runs on them again sees none."""
        for past in self._handed_out:
            past.keys.zero_()
            past.values.zero_()
        self._handed_out.clear()
