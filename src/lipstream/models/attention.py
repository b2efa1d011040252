"""Scaled dot-product attention behind one function with named backends.

"sdpa" is torch's kernel. "tiled" walks over heads and tiles of 512 queries with two matrix products and a softmax:
on CPUs with bfloat16 products its score tiles stay in cache and it is the faster one. "fa3" is FlashAttention-3, used
where the package `flash_attn_interface` is installed and the GPU is a Hopper or later; it is never required. "auto"
is the best of those present for the tensors at hand. All of them read every visible key: masks exist for training and
for merged text keys, and FlashAttention-3, which knows none, leaves masked calls to torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "sdpa", "tiled", "fa3"]
QUERY_TILE = 512
# Queries x keys from which two plain bfloat16 products beat SDPA on the CPU. Measured, one thread: at 60 x 140 they
# need 1.4 times its CPU time, at 256 x 600 a third of it. In float32 they never win.
TILED_FROM_SCORES = 1 << 16
HOPPER = (9, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """softmax(q kᵀ / √d + mask) v with q [B, heads, N, d], k and v [B, heads, M, d] -> [B, heads, N, d].

    mask: broadcastable to [B, heads, N, M]; boolean (True = may attend) or, in q's dtype, added to the scores.
    """
    if backend == "auto":
        backend = choose_backend(q, k)
    if backend == "tiled":
        return _tiled(q, k, v, mask)
    if backend == "fa3" and mask is None:
        return _flash3(q, k, v)
    if backend in ("sdpa", "fa3"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    raise ValueError(f"unknown attention backend {backend!r}; known: {get_args(Backend)}")


def choose_backend(q: Tensor, k: Tensor) -> Backend:
    """What "auto" stands for with these queries and keys; depends on device, dtype and shapes only."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.is_cuda and half and has_flash3(q.device.index or 0):
        return "fa3"
    if q.device.type == "cpu" and half and q.shape[2] * k.shape[2] >= TILED_FROM_SCORES:
        return "tiled"
    return "sdpa"


def available_backends(device: torch.device) -> tuple[Backend, ...]:
    """The backends that run on a device, for parity tests and the benchmark's report."""
    flash: tuple[Backend, ...] = ("fa3",) if device.type == "cuda" and has_flash3(device.index or 0) else ()
    return ("sdpa", "tiled", *flash)


@functools.cache
def has_flash3(device_index: int) -> bool:
    """Whether FlashAttention-3 is installed and this GPU has what it needs (by capability: an H200 is a Hopper too)."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    return torch.cuda.get_device_capability(device_index) >= HOPPER


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 wants [B, tokens, heads, d]; some of its versions also return the log sum of exponentials."""
    try:
        interface: Any = importlib.import_module("flash_attn_interface")
    except ImportError as error:
        raise ValueError("attention backend fa3 needs FlashAttention-3 (flash_attn_interface): use auto") from error
    out = interface.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result.transpose(1, 2)


def _tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Head by head, so that one tile of scores and one head's keys are what the caches have to hold."""
    batch, heads, queries, width = q.shape
    if mask is not None:
        mask = mask.expand(batch, heads, *mask.shape[-2:])
    rows = []
    for row in range(batch):
        for head in range(heads):
            keys, values = k[row, head].T, v[row, head]
            for start in range(0, queries, QUERY_TILE):
                tile = slice(start, start + QUERY_TILE)
                scores = (q[row, head, tile] * width**-0.5) @ keys
                if mask is not None:
                    scores = _masked(scores, mask[row, head] if mask.shape[2] == 1 else mask[row, head, tile])
                # Of bfloat16, too, the softmax is computed in float32.
                rows.append(scores.softmax(dim=-1).to(v.dtype) @ values)
    return torch.cat(rows).view(batch, heads, queries, -1)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores.float() + mask  # a bias as large as log 500 would round the scores a second time
