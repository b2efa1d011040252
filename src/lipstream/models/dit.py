"""The diffusion transformer of Lip Forcing: one Wan-style network, all sizes, all roles.

The bidirectional teacher, the causal student and the critic are this class with other attention: no cache and
no mask (teacher, critic), a frame mask (diffusion forcing, stage 1) or a `KVCache` (student). Sizes are data,
see `FLAVOURS`; "14b" has exactly the tensor names of the released checkpoint, which therefore loads strictly.

Shapes: B batch, C latent channels, T latent frames, H x W latent cells, S tokens per latent frame, D width.
Input channels in order: noisy latent, reference, mask (1 = regenerate), masked video, reference sequence.

    model = DiT(FLAVOURS["test"])
    x0 = model(x_t, t, conditions)                       # bidirectional
    x0 = model(x_t, t, conditions, cache=model.make_cache(1, H, W))   # first chunk of a rollout
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lipstream.models.attention import Backend, attention
from lipstream.models.audio_pack import AudioPack
from lipstream.models.dit_config import FLAVOURS, Conditions, DiTConfig
from lipstream.models.rope import Rotation, RotationTables, rotate
from lipstream.streaming.kv_cache import Extend, KVCache, TextMemory, runs
from lipstream.streaming.windows import chunk_causal_frame_mask, window_frame_positions
from lipstream.streaming.windows import chunk_windows as chunk_windows_of

__all__ = [
    "FLAVOURS",
    "AudioPack",
    "Conditions",
    "DiT",
    "DiTConfig",
    "Prediction",
    "chunk_causal_frame_mask",
    "time_sinusoid",
    "window_frame_positions",
]

EPS = 1e-6


class Prediction(NamedTuple):
    """Both views of one output, [B, C, T, H, W] in the dtype of x."""

    x0: Tensor
    velocity: Tensor  # noise - x0; at t = 0, where only a velocity network defines it, taken at t = 0.001


class RMSNorm(nn.Module):
    """Root mean square norm over the whole width (all heads together), float32 inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]."""
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

    def split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, heads, N, head_dim]."""
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def join(self, x: Tensor) -> Tensor:
        """[B, heads, N, head_dim] -> output map -> [B, N, D]."""
        out: Tensor = self.o(rearrange(x, "b h n d -> b n (h d)"))
        return out

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normed, un-rotated keys and plain values of [B, N, D]."""
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))

    def queries(self, x: Tensor) -> Tensor:
        """Normed, un-rotated queries."""
        return self.split(self.norm_q(self.q(x)))


class ChunkSight(NamedTuple):
    """What one chunk of a full-sequence call sees: token slices of its queries and of its visible keys."""

    own: slice
    keys: list[slice]
    rotation_q: Rotation
    rotation_k: Rotation


class Sight(NamedTuple):
    """What self attention sees in one call; the same for all blocks."""

    rotation_q: Rotation
    rotation_k: Rotation
    mask: Tensor | None
    backend: Backend
    chunks: list[ChunkSight] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate and attend, [B, heads, tokens, head_dim]; k is not rotated yet."""
        if self.chunks is None:
            return attention(rotate(q, self.rotation_q), rotate(k, self.rotation_k), v, self.mask, backend=self.backend)
        seen = []
        for own, keys, rotation_q, rotation_k in self.chunks:
            window_k, window_v = (torch.cat([x[:, :, part] for part in keys], dim=2) for x in (k, v))
            rotated_q, rotated_k = rotate(q[:, :, own], rotation_q), rotate(window_k, rotation_k)
            seen.append(attention(rotated_q, rotated_k, window_v, backend=self.backend))
        return torch.cat(seen, dim=2)


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
        self, x: Tensor, time: Tensor, sight: Sight, extend: Extend | None, text: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """x [B, T, S, D], time [B, T or 1, 6, D] -> [B, T, S, D]; text: keys, values [B', heads, L, head_dim]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unsqueeze(3).unbind(dim=2)
        frames = x.shape[1]

        h = rearrange(_modulate(self.norm1(x), shift1, scale1), "b t s d -> b (t s) d")
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        if extend is not None:
            k, v = extend(k, v)
        x = x + gate1 * rearrange(self.self_attn.join(sight.attend(q, k, v)), "b (t s) d -> b t s d", t=frames)

        if text is not None:
            q = self.cross_attn.queries(rearrange(self.norm3(x), "b t s d -> b (t s) d"))
            # Guidance branches share one text: rows are [conditional B; null B].
            k, v = (row.repeat(len(q) // len(row), 1, 1, 1) if len(row) != len(q) else row for row in text)
            read = self.cross_attn.join(attention(q, k, v, backend=sight.backend))
            x = x + rearrange(read, "b (t s) d -> b t s d", t=frames)

        out: Tensor = x + gate2 * self.ffn(_modulate(self.norm2(x), shift2, scale2))
        return out


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


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


def time_sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of 1000 t at `width`/2 frequencies, float64: [...] -> [..., width]."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = (1000 * t.to(torch.float64)).unsqueeze(-1) * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class DiT(nn.Module):
    """The network; see the module docstring."""

    active: Tensor | None

    def __init__(self, config: DiTConfig, *, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = backend
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, stride=config.patch)
        if config.text_dim:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        first, last = config.audio_blocks
        self.audio_proj = AudioPack(config.audio_dim, config.audio_hidden)
        self.audio_cond_projs = nn.ModuleList(nn.Linear(config.audio_hidden, dim) for _ in range(last - first + 1))
        active = None
        if config.active_tokens is not None:
            active = torch.tensor(config.active_tokens, device="cpu").flatten().nonzero().squeeze(1)
        self.register_buffer("active", active, persistent=False)
        self._rotations = RotationTables(config.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh weights: Xavier maps, small normal embeddings, zero head (the first output is zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in [self.time_embedding, *([self.text_embedding] if self.config.text_dim else [])]:
            for layer in embedding:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def pack_audio(self, features: Tensor) -> Tensor:
        """Feature rows [B, 1 + 4(T-1), audio_dim] -> [B, T, audio_hidden]; in pieces when streaming."""
        out: Tensor = self.audio_proj(features.to(self.dtype))
        return out

    def null_audio(self, batch: int, latent_frames: int) -> Tensor:
        """The null branch of guidance: zero features through the pack, [B, T, audio_hidden]."""
        zeros = torch.zeros(1, 1, self.audio_proj.proj.in_features, dtype=self.dtype, device=self.device)
        row: Tensor = self.audio_proj.norm_out(self.audio_proj.proj(zeros))
        return row.expand(batch, latent_frames, -1)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a latent of height x width cells."""
        _, ph, pw = self.config.patch
        if height % ph or width % pw:
            raise ValueError(f"latent of {height} x {width} cells is not a multiple of the patch {ph} x {pw}")
        rows, columns = height // ph, width // pw
        active = self.config.active_tokens
        if active is not None and (len(active), len(active[0])) != (rows, columns):
            raise ValueError(f"active_tokens is {len(active)} x {len(active[0])}, tokens are {rows} x {columns}")
        return rows, columns

    def tokens_per_latent_frame(self, height: int, width: int) -> int:
        """How many tokens of a latent frame are computed."""
        rows, columns = self.token_grid(height, width)
        return rows * columns if self.active is None else len(self.active)

    def make_cache(self, batch: int, height: int, width: int, **overrides: Any) -> KVCache:
        """An empty cache for height x width latent cells; overrides go to `KVCache` (window, sink)."""
        settings: dict[str, Any] = {
            "layers": self.config.num_layers,
            "batch": batch,
            "heads": self.config.num_heads,
            "head_dim": self.config.head_dim,
            "tokens_per_latent_frame": self.tokens_per_latent_frame(height, width),
            "window_latent_frames": self.config.window_latent_frames,
            "sink_latent_frames": self.config.sink_latent_frames,
            "dtype": self.dtype,
            "device": self.device,
        }
        return KVCache(**(settings | overrides))

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, **options: Any) -> Tensor:
        """The x0 prediction of `predict`, [B, C, T, H, W]."""
        return self.predict(x, t, conditions, **options).x0

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        conditions: Conditions,
        *,
        cache: KVCache | None = None,
        store: bool = False,
        frame_positions: Tensor | None = None,
        frame_mask: Tensor | None = None,
        chunk_windows: bool = False,
    ) -> Prediction:
        """Denoise x [B, C, T, H, W] at time t [B] or [B, T] (float64, 0 = clean, 1 = noise).

        cache: history of earlier chunks; x is the next chunk. store: keep this call's keys (the clean pass).
        frame_positions [T]: temporal rotary index per latent frame; default 0..T-1, or from the cache.
        frame_mask [T, T] or [B, T, T]: row may attend to column; default all.
        chunk_windows: treat x as a clip of chunks, each with the window and the positions it has in a rollout (the
        past as noisy as x has it). Diffusion forcing without a train/run mismatch, and cheaper than a mask.
        """
        batch, _, frames, height, width = x.shape
        rows, columns = self.token_grid(height, width)
        if (cache is not None or chunk_windows) and (frame_positions is not None or frame_mask is not None):
            raise ValueError("with a cache or chunk_windows, positions and visibility are theirs to say")
        if cache is not None and chunk_windows:
            raise ValueError("chunk_windows is for whole clips, a cache for one chunk at a time")
        if store and (cache is None or torch.is_grad_enabled() or cache.batch != batch):
            raise ValueError("store needs a cache of the same batch and torch.no_grad(): stored keys have no gradient")

        time = self.time_embedding(time_sinusoid(t.reshape(batch, -1), self.config.freq_dim).to(self.dtype))
        modulation = rearrange(self.time_projection(time), "b t (six d) -> b t six d", six=6)
        tokens = self._embed(x, t, conditions)
        audio = conditions.audio
        audio = self.null_audio(batch, frames) if audio is None else audio.to(self.dtype)
        text = self._text_memory(conditions.text, cache)
        extends: list[Extend | None] = [None] * len(self.blocks)
        if chunk_windows:
            sight = self._chunked_sight(frames, (rows, columns))
        else:
            sight, extends = self._sight(batch, frames, (rows, columns), cache, frame_positions, frame_mask)

        first, last = self.config.audio_blocks
        for index, block in enumerate(self.blocks):
            if first <= index <= last:
                tokens = tokens + self.audio_cond_projs[index - first](audio).unsqueeze(2)
            tokens = block(tokens, modulation, sight, extends[index], None if text is None else text[index])
        if store and cache is not None:
            cache.advance(frames)
        return self._prediction(self.head(tokens, time), x, t, conditions)

    def _embed(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Stack the input channels and embed the (active) patches: [B, T, S, D]."""
        batch, _, frames, height, width = x.shape
        if conditions.latent_frames != frames:
            raise ValueError(f"x has {frames} latent frames, conditions have {conditions.latent_frames}")
        if self.config.input_gate:
            clean = (1 - t.to(torch.float64)).reshape(batch, 1, -1, 1, 1)
            x = x * (clean / torch.sqrt(clean**2 + (1 - clean) ** 2)).to(x.dtype)
        stacked = torch.cat(
            (
                x,
                conditions.reference.expand(batch, -1, frames, -1, -1).to(x.dtype),
                conditions.mask.expand(batch, -1, frames, height, width).to(x.dtype),
                conditions.masked_video.expand(batch, -1, -1, -1, -1).to(x.dtype),
                conditions.ref_sequence.expand(batch, -1, -1, -1, -1).to(x.dtype),
            ),
            dim=1,
        )
        # A convolution whose stride is its kernel is a linear map of patches, which can skip inactive ones.
        _, ph, pw = self.config.patch
        patches = rearrange(stacked, "b c t (h ph) (w pw) -> b t (h w) (c ph pw)", ph=ph, pw=pw)
        if self.active is not None:
            patches = patches[:, :, self.active]
        return F.linear(patches.to(self.dtype), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _text_memory(self, text: Tensor | None, cache: KVCache | None) -> list[tuple[Tensor, Tensor]] | None:
        """Text keys and values per block; kept in the cache, but never reused where a gradient must flow."""
        if not self.config.text_dim:
            return None
        if text is None:
            raise ValueError("this network has text attention: conditions.text is missing")
        keep = cache is not None and not torch.is_grad_enabled()
        if keep and cache is not None and cache.text is not None and cache.text.text is text:
            return cache.text.layers
        missing = self.config.text_len - text.shape[1]
        if missing < 0:
            raise ValueError(f"text has {text.shape[1]} rows, the network takes {self.config.text_len}")
        # Rows behind the prompt are zeros, become constants after the biases and are attended: no mask.
        embedded = self.text_embedding(F.pad(text.to(self.dtype), (0, 0, 0, missing)))
        layers = [block.cross_attn.keys_values(embedded) for block in self._blocks()]
        if keep and cache is not None:
            cache.text = TextMemory(text=text, layers=layers)
        return layers

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _sight(
        self,
        batch: int,
        frames: int,
        grid: tuple[int, int],
        cache: KVCache | None,
        frame_positions: Tensor | None,
        frame_mask: Tensor | None,
    ) -> tuple[Sight, list[Extend | None]]:
        """Rotations, mask and history of this call, fixed before the first block runs."""

        def table(positions: tuple[int, ...]) -> Rotation:
            return self._rotations.get(positions, *grid, self.active, self.device)

        layers = range(self.config.num_layers)
        if cache is not None:
            window = cache.window(frames)
            if batch % cache.batch:
                raise ValueError(f"batch {batch} is not a multiple of the cache's {cache.batch}")
            in_place = batch == cache.batch and not torch.is_grad_enabled()
            keys = table(window.in_slot_order if in_place else window.past_then_own)
            sight = Sight(table(window.own_positions), keys, None, self.backend)
            if in_place:
                return sight, [cache.extend_in_place(layer, window) for layer in layers]
            return sight, [cache.extend_copy(layer, window, batch // cache.batch) for layer in layers]

        if frame_positions is None:
            own = table(tuple(range(frames)))
        else:
            own = self._rotations.make(frame_positions.to(self.device), *grid, self.active)
        mask = None
        if frame_mask is not None:
            tokens = grid[0] * grid[1] if self.active is None else len(self.active)
            mask = repeat(frame_mask.to(self.device), "... q k -> ... (q a) (k b)", a=tokens, b=tokens)
            mask = mask.reshape(-1, 1, frames * tokens, frames * tokens)
        return Sight(own, own, mask, self.backend), [None] * len(layers)

    def _chunked_sight(self, frames: int, grid: tuple[int, int]) -> Sight:
        """The windows of all chunks of a clip with window-relative positions."""
        config = self.config
        tokens = grid[0] * grid[1] if self.active is None else len(self.active)
        chunks = []
        for window in chunk_windows_of(
            frames, config.chunk_latent_frames, config.window_latent_frames, config.sink_latent_frames
        ):
            positions = tuple(range(len(window.visible)))
            own = len(positions) - (window.end - window.start)
            keys = [slice(f * tokens, (f + n) * tokens) for f, _, n in runs(window.visible)]
            rotation_q, rotation_k = (
                self._rotations.get(which, *grid, self.active, self.device) for which in (positions[own:], positions)
            )
            chunks.append(ChunkSight(slice(window.start * tokens, window.end * tokens), keys, rotation_q, rotation_k))
        return Sight(chunks[0].rotation_q, chunks[0].rotation_k, None, self.backend, chunks)

    def _prediction(self, patches: Tensor, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
        """Patches [B, T, S, (ph pw C)] -> x0 and velocity; inactive cells come from the conditions."""
        rows, columns = self.token_grid(x.shape[3], x.shape[4])
        if self.active is not None:
            dense = patches.new_zeros(*patches.shape[:2], rows * columns, patches.shape[3])
            patches = dense.index_copy(2, self.active, patches)
        _, ph, pw = self.config.patch
        output = rearrange(patches, "b t (h w) (ph pw c) -> b c t (h ph) (w pw)", h=rows, w=columns, ph=ph, pw=pw).to(
            x.dtype
        )
        # Float64 here costs nothing and keeps x_t - t v exact for half precision inputs.
        time = t.to(torch.float64).reshape(len(x), 1, -1, 1, 1)
        kind = self.config.prediction
        if kind == "velocity":
            x0 = (x - time * output).to(x.dtype)
        else:
            x0 = output if kind == "x0" else conditions.ref_sequence.to(x.dtype) + output
        if self.active is not None:
            kept = conditions.ref_sequence if kind == "reference_residual" else conditions.masked_video
            x0 = torch.where(self._active_cells(rows, columns), x0, kept.to(x.dtype))
        if self.config.keep_known:
            x0 = torch.where(conditions.mask > 0, x0, conditions.masked_video.to(x.dtype))
        elif kind == "velocity" and self.active is None:
            return Prediction(x0, output)
        return Prediction(x0, ((x - x0) / time.clamp(min=1e-3)).to(x.dtype))

    def _active_cells(self, rows: int, columns: int) -> Tensor:
        """Boolean map [H, W] of the latent cells that are computed."""
        assert self.active is not None
        cells = torch.zeros(rows * columns, dtype=torch.bool, device=self.device)
        cells[self.active] = True
        _, ph, pw = self.config.patch
        return repeat(cells, "(h w) -> (h ph) (w pw)", h=rows, ph=ph, pw=pw)
