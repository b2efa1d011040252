"""The layers of the diffusion transformer: norms, attention, the repeated block and the head.

A block sees its call as plain tensors and Python constants (`Sight`, `Extend`), so that `torch.compile` traces it
without a break and one compiled block serves all layers. Tensor names are those of the released checkpoint; the
query, key and value maps can be joined into one product and taken apart again without changing them.

Shapes: B batch, T latent frames, S tokens per latent frame, N = T S, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from lipstream.models.attention import Backend, attention
from lipstream.models.dit_config import DiTConfig
from lipstream.models.rope import Rotation, rotate
from lipstream.streaming.kv_cache import Extend

EPS = 1e-6
CACHED_ROWS = 512


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of rows [..., D]; on the CPU in pieces whose intermediate results stay in cache. Same numbers."""
    rows = x.flatten(0, -2)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or len(rows) < 2 * CACHED_ROWS:
        return function(x)
    return torch.cat([function(piece) for piece in torch.split(rows, CACHED_ROWS)]).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """Root mean square norm over the whole width (all heads together), float32 inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]."""
        return _by_rows(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Query, key, value and output maps with q/k-norm; used for self and for text attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)
        self.qkv: nn.Linear | None = None
        self.register_state_dict_post_hook(_split_fused)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_join_fused)  # type: ignore[no-untyped-call]

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, head_dim]."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def join(self, x: Tensor) -> Tensor:
        """[B, heads, N, head_dim] -> output map -> [B, N, D]."""
        out: Tensor = self.o(rearrange(x, "b h n d -> b n (h d)"))
        return out

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normed, un-rotated keys and plain values of [B, N, D]."""
        if self.qkv is None:
            k, v = self.k(x), self.v(x)
        else:
            dim = self.o.in_features
            k, v = nn.functional.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        return self.split(self.norm_k(k)), self.split(v)

    def queries(self, x: Tensor) -> Tensor:
        """Normed, un-rotated queries."""
        return self.split(self.norm_q(self.q(x)))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three of the same [B, N, D], in one product if fused."""
        if self.qkv is None:
            return self.queries(x), *self.keys_values(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.split(self.norm_q(q)), self.split(self.norm_k(k)), self.split(v)

    def fuse(self) -> None:
        """Make one linear map of q, k and v; `state_dict` and `load_state_dict` keep the three names."""
        if self.qkv is not None:
            return
        dim, parts = self.o.in_features, (self.q, self.k, self.v)
        with torch.device("meta"):
            fused = nn.Linear(dim, 3 * dim)
        for name in ("weight", "bias"):
            tensors = [getattr(part, name) for part in parts]
            joined = torch.cat([tensor.detach() for tensor in tensors])
            setattr(fused, name, nn.Parameter(joined, requires_grad=tensors[0].requires_grad))
        self.qkv = fused
        del self.q, self.k, self.v

    def unfuse(self) -> None:
        """Inverse of `fuse`."""
        if self.qkv is None:
            return
        fused, dim = self.qkv, self.o.in_features
        self.qkv = None
        for index, name in enumerate("qkv"):
            with torch.device("meta"):
                part = nn.Linear(dim, dim)
            for kind in ("weight", "bias"):
                whole = getattr(fused, kind)
                own = whole.detach()[index * dim : (index + 1) * dim].clone()
                setattr(part, kind, nn.Parameter(own, requires_grad=whole.requires_grad))
            setattr(self, name, part)


def _split_fused(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A fused attention writes the official names, as views."""
    for kind in ("weight", "bias"):
        fused = state.pop(f"{prefix}qkv.{kind}", None)
        if fused is not None:
            state |= {f"{prefix}{name}.{kind}": part for name, part in zip("qkv", fused.chunk(3), strict=True)}


def _join_fused(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A fused attention reads the official names; a missing one is left missing for the strict check to name."""
    assert isinstance(module, Attention)
    if module.qkv is None:
        return
    for kind in ("weight", "bias"):
        names = [f"{prefix}{name}.{kind}" for name in "qkv"]
        if all(name in state for name in names):
            state[f"{prefix}qkv.{kind}"] = torch.cat([state.pop(name) for name in names])


class Segment(NamedTuple):
    """A stretch of a call's tokens that share what they see."""

    own: slice  # its tokens in the call
    keys: tuple[slice, ...] | None  # the tokens of the call that it sees; None: its own, and what the cache adds
    rotation_q: Rotation
    rotation_k: Rotation
    mask: Tensor | None = None


class Sight(NamedTuple):
    """What self attention sees in one call; the same for all blocks but for their caches."""

    segments: tuple[Segment, ...]
    backend: Backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor, extends: Sequence[Extend | None]) -> Tensor:
        """Rotate and attend, [B, heads, tokens, head_dim]; k is not rotated yet. extends: one per segment."""
        seen = []
        for segment, extend in zip(self.segments, extends, strict=True):
            if segment.keys is not None:
                visible_k, visible_v = (torch.cat([x[:, :, part] for part in segment.keys], dim=2) for x in (k, v))
            else:
                visible_k, visible_v = k[:, :, segment.own], v[:, :, segment.own]
                if extend is not None:
                    visible_k, visible_v = extend.extend(visible_k, visible_v)
            own_q, own_k = rotate(q[:, :, segment.own], segment.rotation_q), rotate(visible_k, segment.rotation_k)
            seen.append(attention(own_q, own_k, visible_v, segment.mask, backend=self.backend))
        return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)


class TextKeys(NamedTuple):
    """One block's text keys and values [B', heads, L, head_dim] and the bias of their logits [L]."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


class Block(nn.Module):
    """Self attention, text attention and feed-forward, modulated by the time embedding."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = Attention(dim, config.num_heads)
        if config.text_dim:
            self.cross_attn = Attention(dim, config.num_heads)
            self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time: Tensor, sight: Sight, extends: Sequence[Extend | None], text: TextKeys | Tensor | None
    ) -> Tensor:
        """x [B, T, S, D], time [B, T or 1, 6, D] -> [B, T, S, D]; extends: this layer's cache, one per segment.

        text: keys that were made before, or embedded rows [B', L, D] (training: a gradient reaches them, and a sharded
        block has its weights together only while it runs).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(3).unbind(dim=2)
        frames = x.shape[1]

        h = rearrange(_modulate(self.norm1(x), shift1, scale1), "b t s d -> b (t s) d")
        read = self.self_attn.join(sight.attend(*self.self_attn.queries_keys_values(h), extends))
        x = torch.addcmul(x, gate1, rearrange(read, "b (t s) d -> b t s d", t=frames))

        if text is not None:
            if isinstance(text, Tensor):
                text = TextKeys(*self.cross_attn.keys_values(text), None)
            q = self.cross_attn.queries(rearrange(self.norm3(x), "b t s d -> b (t s) d"))
            # Guidance branches share one text: rows are [conditional B; null B].
            k, v = (row.repeat(len(q) // len(row), 1, 1, 1) if len(row) != len(q) else row for row in text[:2])
            mask = None if text.bias is None else text.bias.view(1, 1, 1, -1)
            read = self.cross_attn.join(attention(q, k, v, mask, backend=sight.backend))
            x = x + rearrange(read, "b (t s) d -> b t s d", t=frames)

        return torch.addcmul(x, gate2, _by_rows(self.ffn, _modulate(self.norm2(x), shift2, scale2)))

    def text_keys(self, embedded: Tensor) -> TextKeys:
        """Keys and values of embedded text rows [B', L, D]."""
        return TextKeys(*self.cross_attn.keys_values(embedded), None)

    def remember(self, x: Tensor, time: Tensor, extend: Extend) -> None:
        """Only put the keys and values of x [B, T, S, D] into the cache: all that a clean pass needs of the last block.

        time: [B, T or 1, 6, D].
        """
        shift, scale = (self.modulation + time)[:, :, :2].unsqueeze(3).unbind(dim=2)
        h = rearrange(_modulate(self.norm1(x), shift, scale), "b t s d -> b (t s) d")
        extend.extend(*self.self_attn.keys_values(h))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class Head(nn.Module):
    """Modulated norm and the map to one patch of latent cells."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch_cells = config.patch[0] * config.patch[1] * config.patch[2]
        self.norm = nn.LayerNorm(config.dim, eps=EPS, elementwise_affine=False)
        self.head = nn.Linear(config.dim, patch_cells * config.latent_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, T, S, D], time [B, T or 1, D] -> [B, T, S, patch cells * C]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unsqueeze(3).unbind(dim=2)
        out: Tensor = self.head(_modulate(self.norm(x), shift, scale))
        return out
