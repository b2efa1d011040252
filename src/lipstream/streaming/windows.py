"""Chunk and window arithmetic of full-sequence calls (diffusion forcing, stage 1): which latent frame sees which.

The same rules as the ring cache applies chunk by chunk, written as masks and positions over a whole clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def chunk_ranges(latent_frames: int, chunk: int) -> list[tuple[int, int]]:
    """(start, end) of the chunks of a clip; a remainder joins the first chunk."""
    if latent_frames < chunk:
        return [(0, latent_frames)]
    first = chunk + latent_frames % chunk
    return [(0, first), *((start, start + chunk) for start in range(first, latent_frames, chunk))]


def chunk_causal_frame_mask(latent_frames: int, chunk: int, window: int | None, sink: int) -> Tensor:
    """[T, T] boolean mask of diffusion forcing: a frame sees its own chunk, the rolling window and the sink.

    window counts the sink and the own chunk; None sees the whole past.
    """
    mask = torch.zeros(latent_frames, latent_frames, dtype=torch.bool)
    for start, end in chunk_ranges(latent_frames, chunk):
        begin = 0 if window is None else max(0, min(start, end - (window - sink)))
        mask[start:end, begin:end] = True
        mask[start:end, : min(sink, end)] = True
    return mask


def window_frame_positions(latent_frames: int, chunk: int, window: int, sink: int) -> Tensor:
    """[T] temporal index of each latent frame counted from the start of its own chunk's rolling window.

    The reference's full-sequence "dynamic RoPE", kept for comparison: one index per frame cannot express a rollout,
    where a key's position depends on who reads it. To train exactly what the rollout runs, use chunk windows.
    """
    positions = torch.arange(latent_frames)
    for start, end in chunk_ranges(latent_frames, chunk):
        positions[start:end] -= max(0, end - (window - sink))
    return positions


class ChunkWindow(NamedTuple):
    """One chunk of a full-sequence call: own frames [start, end), visible frames in time order."""

    start: int
    end: int
    visible: tuple[int, ...]


def chunk_windows(latent_frames: int, chunk: int, window: int, sink: int) -> list[ChunkWindow]:
    """The windows of all chunks of a clip, the same that the ring cache shows one by one."""
    windows = []
    for start, end in chunk_ranges(latent_frames, chunk):
        held = min(sink, start)
        begin = max(held, start - max(0, window - held - (end - start)))
        windows.append(ChunkWindow(start, end, (*range(held), *range(begin, end))))
    return windows
