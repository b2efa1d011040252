"""Scaled dot-product attention behind one function with named backends.

"sdpa" is torch's kernel; "tiled" walks over tiles of 512 queries with two matrix products and a softmax,
which wins on CPUs whose SDPA is slow and bounds the memory of the score matrix. "auto" is "sdpa".
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["auto", "sdpa", "tiled"]
QUERY_TILE = 512


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """softmax(q kᵀ / √d) v with q [B, heads, N, d], k and v [B, heads, M, d] -> [B, heads, N, d].

    mask: boolean, broadcastable to [B, heads, N, M]; True = may attend.
    """
    if backend == "tiled":
        return _tiled(q, k, v, mask)
    if backend in ("auto", "sdpa"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    raise ValueError(f"unknown attention backend {backend!r}; known: {get_args(Backend)}")


def _tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scale = q.shape[-1] ** -0.5
    keys = k.transpose(-1, -2)
    tiles = []
    for start in range(0, q.shape[2], QUERY_TILE):
        scores = (q[:, :, start : start + QUERY_TILE] * scale) @ keys
        if mask is not None:
            rows = mask if mask.shape[-2] == 1 else mask[..., start : start + QUERY_TILE, :]
            scores = scores.masked_fill(~rows, float("-inf"))
        tiles.append(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v)
    return torch.cat(tiles, dim=2)
