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

from lipstream.models.attention import Backend
from lipstream.models.audio_pack import AudioPack
from lipstream.models.dit_block import Block, Head, Segment, Sight, TextKeys
from lipstream.models.dit_config import FLAVOURS, Conditions, DiTConfig
from lipstream.models.dit_text import merge_padding
from lipstream.models.rope import Rotation, RotationTables
from lipstream.streaming.kv_cache import Extend, KVCache, TextMemory, Window, runs
from lipstream.streaming.windows import chunk_causal_frame_mask, window_frame_positions
from lipstream.streaming.windows import chunk_windows as chunk_windows_of

__all__ = [
    "FLAVOURS",
    "AudioPack",
    "CleanPass",
    "Conditions",
    "DiT",
    "DiTConfig",
    "Prediction",
    "chunk_causal_frame_mask",
    "time_sinusoid",
    "window_frame_positions",
]


class Prediction(NamedTuple):
    """Both views of one output, [B, C, T, H, W] in the dtype of x."""

    x0: Tensor
    velocity: Tensor  # noise - x0; at t = 0, where only a velocity network defines it, taken at t = 0.001


class CleanPass(NamedTuple):
    """A finished chunk whose keys and values the cache still lacks; x0 [B, C, T, H, W], t [B] float64."""

    x0: Tensor
    t: Tensor
    conditions: Conditions


class _Inputs(NamedTuple):
    """What enters the blocks: tokens [B, T, S, D], time [B, T or 1, D], modulation [.., 6, D], audio [B, T, hidden]."""

    tokens: Tensor
    time: Tensor
    modulation: Tensor
    audio: Tensor


def time_sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of 1000 t at `width`/2 frequencies, float64: [...] -> [..., width]."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = (1000 * t.to(torch.float64)).unsqueeze(-1) * 10000.0**-exponents
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class DiT(nn.Module):
    """The network; see the module docstring."""

    active: Tensor | None
    active_cells: Tensor | None

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
        active, cells = None, None
        if config.active_tokens is not None:
            chosen = torch.tensor(config.active_tokens, device="cpu")
            active = chosen.flatten().nonzero().squeeze(1)
            cells = repeat(chosen, "h w -> (h ph) (w pw)", ph=config.patch[1], pw=config.patch[2])
        self.register_buffer("active", active, persistent=False)
        self.register_buffer("active_cells", cells, persistent=False)  # [H, W]
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

    def make_cache(
        self, batch: int, height: int, width: int, kind: type[KVCache] = KVCache, **overrides: Any
    ) -> KVCache:
        """An empty cache for height x width latent cells; overrides go to its ``kind`` (window, sink)."""
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
        return kind(**(settings | overrides))

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
        owed: CleanPass | None = None,
    ) -> Prediction:
        """Denoise x [B, C, T, H, W] at time t [B] or [B, T] (float64, 0 = clean, 1 = noise).

        cache: history of earlier chunks; x is the next chunk. store: keep this call's keys (the clean pass).
        frame_positions [T]: temporal rotary index per latent frame; default 0..T-1, or from the cache.
        frame_mask [T, T] or [B, T, T]: row may attend to column; default all.
        chunk_windows: treat x as a clip of chunks, each with the window and the positions it has in a rollout (the
        past as noisy as x has it). Diffusion forcing without a train/run mismatch, and cheaper than a mask.
        owed: first run the clean pass of the chunk before in the same products: one pass over the weights for both,
        for throughput. The result is that of `remember` and then `predict`.
        """
        batch, _, frames, height, width = x.shape
        rows, columns = self.token_grid(height, width)
        if (cache is not None or chunk_windows) and (frame_positions is not None or frame_mask is not None):
            raise ValueError("with a cache or chunk_windows, positions and visibility are theirs to say")
        if cache is not None and chunk_windows:
            raise ValueError("chunk_windows is for whole clips, a cache for one chunk at a time")
        if store and (cache is None or torch.is_grad_enabled() or cache.batch != batch):
            raise ValueError("store needs a cache of the same batch and torch.no_grad(): stored keys have no gradient")

        if owed is not None:
            if cache is None or store:
                raise ValueError("owed goes with the cache that the clean pass is owed to, and without store")
            return self._predict_after(owed, x, t, conditions, cache)
        inputs = self._inputs(x, t, conditions)
        text = self._text_keys(conditions.text, cache)
        extends: list[tuple[Extend | None, ...]]
        if chunk_windows:
            sight = self._chunked_sight(frames, (rows, columns))
            extends = [(None,) * len(sight.segments)] * len(self.blocks)
        elif cache is not None:
            segment, layers = self._cached_segment(batch, cache.window(frames), (rows, columns), cache)
            sight, extends = Sight((segment,), self.backend), [(extend,) for extend in layers]
        else:
            sight = self._whole_sight(frames, (rows, columns), frame_positions, frame_mask)
            extends = [(None,)] * len(self.blocks)
        tokens = self._through(inputs, sight, extends, text)
        if store and cache is not None:
            cache.advance(frames)
        return self._prediction(self.head(tokens, inputs.time), x, t, conditions)

    @torch.no_grad()
    def remember(self, clean: CleanPass, cache: KVCache) -> None:
        """The clean pass alone: put the keys and values of a finished chunk into the cache.

        Of the last block only these are computed, and no output.
        """
        batch, _, frames, height, width = clean.x0.shape
        if cache.batch != batch:
            raise ValueError(f"x0 has {batch} rows, the cache {cache.batch}")
        inputs = self._inputs(*clean)
        segment, extends = self._cached_segment(batch, cache.window(frames), self.token_grid(height, width), cache)
        text = self._text_keys(clean.conditions.text, cache)
        sight = Sight((segment,), self.backend)
        tokens = self._through(inputs, sight, [(extend,) for extend in extends], text, blocks=len(self.blocks) - 1)
        self._last_block.remember(self._hear(-1, tokens, inputs.audio), inputs.modulation, extends[-1])
        cache.advance(frames)

    def _predict_after(
        self, owed: CleanPass, x: Tensor, t: Tensor, conditions: Conditions, cache: KVCache
    ) -> Prediction:
        """`predict` of a chunk together with the clean pass of the one before: per layer, its keys go first."""
        batch, _, frames, height, width = x.shape
        if torch.is_grad_enabled() or not batch == len(owed.x0) == cache.batch:
            raise ValueError("a joined clean pass needs torch.no_grad() and the cache's batch; run it alone instead")
        if owed.conditions.text is not conditions.text:
            raise ValueError("both chunks of a joined call must have the very same text")
        grid = self.token_grid(height, width)
        earlier, later = self._inputs(*owed), self._inputs(x, t, conditions)
        count = earlier.tokens.shape[1]
        start = cache.latent_frames
        clean, clean_extends = self._cached_segment(batch, cache.window(count), grid, cache)
        noisy, noisy_extends = self._cached_segment(batch, cache.window(frames, start + count), grid, cache)
        border = count * earlier.tokens.shape[2]
        both = (clean._replace(own=slice(0, border)), noisy._replace(own=slice(border, None)))
        text = self._text_keys(conditions.text, cache)

        def per_frame(inputs: _Inputs) -> list[Tensor]:
            times = (part.expand(-1, inputs.tokens.shape[1], *part.shape[2:]) for part in inputs[1:3])
            return [inputs.tokens, *times, inputs.audio]

        joined = _Inputs(*map(torch.cat, zip(per_frame(earlier), per_frame(later), strict=True), (1,) * 4))
        extends: list[tuple[Extend | None, ...]] = [*zip(clean_extends, noisy_extends, strict=True)]
        tokens = self._through(joined, Sight(both, self.backend), extends, text, blocks=len(self.blocks) - 1)
        tokens = self._hear(-1, tokens, joined.audio)
        self._last_block.remember(tokens[:, :count], earlier.modulation, clean_extends[-1])
        sight = Sight((noisy,), self.backend)
        tokens = self._last_block(tokens[:, count:], later.modulation, sight, (noisy_extends[-1],), text[-1])
        cache.advance(count)
        return self._prediction(self.head(tokens, later.time), x, t, conditions)

    def _inputs(self, x: Tensor, t: Tensor, conditions: Conditions) -> _Inputs:
        batch, _, frames, _, _ = x.shape
        time = self.time_embedding(time_sinusoid(t.reshape(batch, -1), self.config.freq_dim).to(self.dtype))
        modulation = rearrange(self.time_projection(time), "b t (six d) -> b t six d", six=6)
        audio = conditions.audio
        audio = self.null_audio(batch, frames) if audio is None else audio.to(self.dtype)
        return _Inputs(self._embed(x, t, conditions), time, modulation, audio)

    def _through(
        self,
        inputs: _Inputs,
        sight: Sight,
        extends: list[tuple[Extend | None, ...]],
        text: list[TextKeys | Tensor | None],
        blocks: int | None = None,
    ) -> Tensor:
        """Tokens behind the first `blocks` blocks (all of them), [B, T, S, D]."""
        tokens = inputs.tokens
        for index, block in enumerate(self.blocks[:blocks]):
            tokens = self._hear(index, tokens, inputs.audio)
            tokens = block(tokens, inputs.modulation, sight, extends[index], text[index])
        return tokens

    def _hear(self, index: int, tokens: Tensor, audio: Tensor) -> Tensor:
        """Add block `index`'s view of the audio to its tokens; most blocks have none."""
        first, last = self.config.audio_blocks
        index %= len(self.blocks)
        if first <= index <= last:
            tokens = tokens + self.audio_cond_projs[index - first](audio).unsqueeze(2)
        return tokens

    @property
    def _last_block(self) -> Block:
        block = self.blocks[-1]
        assert isinstance(block, Block)
        return block

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

    @torch.no_grad()
    def prepare_text(self, text: Tensor) -> TextMemory:
        """Keys and values of a clip's text [B, L, text_dim] for every block; give the result as `Conditions.text`.

        The equal rows of zeros behind the prompt become one key each (spec 1.5: they are attended). Reads the text,
        so it waits for the device once.
        """
        rows, bias = merge_padding(text.to(self.dtype), self.config.text_len)
        embedded = self.text_embedding(rows)
        return TextMemory(text=text, layers=[b.text_keys(embedded)[:2] for b in self._blocks()], bias=bias)

    def _text_keys(self, text: Tensor | TextMemory | None, cache: KVCache | None) -> list[TextKeys | Tensor | None]:
        """Text per block: its keys, kept in the cache; or embedded rows, where a gradient must flow."""
        if not self.config.text_dim:
            return [None] * len(self.blocks)
        if text is None:
            raise ValueError("this network has text attention: conditions.text is missing")
        if not isinstance(text, TextMemory):
            if cache is None or torch.is_grad_enabled():
                missing = self.config.text_len - text.shape[1]
                if missing < 0:
                    raise ValueError(f"text has {text.shape[1]} rows, the network takes {self.config.text_len}")
                # Rows behind the prompt are zeros, become constants after the biases and are attended: no mask.
                return [self.text_embedding(F.pad(text.to(self.dtype), (0, 0, 0, missing)))] * len(self.blocks)
            if cache.text is None or cache.text.text is not text:
                cache.text = self.prepare_text(text)
            text = cache.text
        if len(text.layers) != len(self.blocks):
            raise ValueError(f"text was prepared for {len(text.layers)} blocks, the network has {len(self.blocks)}")
        return [TextKeys(keys, values, text.bias) for keys, values in text.layers]

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def fuse_projections(self, fused: bool = True) -> None:
        """Compute queries, keys and values of self attention in one product (or, with False, in three again).

        For inference. Names and values of `state_dict` stay; memory, too, but for one layer while it works.
        """
        for block in self._blocks():
            if fused:
                block.self_attn.fuse()
            else:
                block.self_attn.unfuse()

    def compile_blocks(self, **options: Any) -> None:
        """Compile the repeated block, once for all layers; options go to `torch.compile` (backend, mode).

        Shapes are those of the calls: the first, second and third chunk compile, no later one does.
        """
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, **options)

    def prepare_rollout(self, cache: KVCache, height: int, width: int) -> None:
        """Make every table that the chunks of a rollout will need, so that no call has to send one to the device."""
        grid = self.token_grid(height, width)
        if cache.window_latent_frames is not None:
            for window in cache.arrangements(self.config.chunk_latent_frames):
                cache.extend_in_place(0, window)
                for positions in (window.own_positions, window.in_slot_order, window.past_then_own):
                    self._rotations.get(positions, *grid, self.active, self.device)

    def _cached_segment(
        self, batch: int, window: Window, grid: tuple[int, int], cache: KVCache
    ) -> tuple[Segment, list[Extend]]:
        """What a chunk with a history sees, and where its keys go layer by layer; fixed before the first block."""
        if batch % cache.batch:
            raise ValueError(f"batch {batch} is not a multiple of the cache's {cache.batch}")
        in_place = batch == cache.batch and not torch.is_grad_enabled()
        own, keys = (
            self._rotations.get(positions, *grid, self.active, self.device)
            for positions in (window.own_positions, window.in_slot_order if in_place else window.past_then_own)
        )
        segment = Segment(slice(None), None, own, keys)
        layers = range(self.config.num_layers)
        if in_place:
            return segment, [cache.extend_in_place(layer, window) for layer in layers]
        return segment, [cache.extend_copy(layer, window, batch // cache.batch) for layer in layers]

    def _whole_sight(
        self, frames: int, grid: tuple[int, int], frame_positions: Tensor | None, frame_mask: Tensor | None
    ) -> Sight:
        """A call without history."""
        if frame_positions is None:
            own = self._rotations.get(tuple(range(frames)), *grid, self.active, self.device)
        else:
            own = self._rotations.make(frame_positions.to(self.device), *grid, self.active)
        mask = None
        if frame_mask is not None:
            tokens = grid[0] * grid[1] if self.active is None else len(self.active)
            mask = repeat(frame_mask.to(self.device), "... q k -> ... (q a) (k b)", a=tokens, b=tokens)
            mask = mask.reshape(-1, 1, frames * tokens, frames * tokens)
        return Sight((Segment(slice(None), None, own, own, mask),), self.backend)

    def _chunked_sight(self, frames: int, grid: tuple[int, int]) -> Sight:
        """The windows of all chunks of a clip with window-relative positions."""
        config = self.config
        tokens = grid[0] * grid[1] if self.active is None else len(self.active)

        def table(positions: tuple[int, ...]) -> Rotation:
            return self._rotations.get(positions, *grid, self.active, self.device)

        segments = []
        for window in chunk_windows_of(
            frames, config.chunk_latent_frames, config.window_latent_frames, config.sink_latent_frames
        ):
            positions = tuple(range(len(window.visible)))
            first_own = len(positions) - (window.end - window.start)
            keys = tuple(slice(f * tokens, (f + n) * tokens) for f, _, n in runs(window.visible))
            own = slice(window.start * tokens, window.end * tokens)
            segments.append(Segment(own, keys, table(positions[first_own:]), table(positions)))
        return Sight(tuple(segments), self.backend)

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
        if self.active_cells is not None:
            kept = conditions.ref_sequence if kind == "reference_residual" else conditions.masked_video
            x0 = torch.where(self.active_cells, x0, kept.to(x.dtype))
        if self.config.keep_known:
            x0 = torch.where(conditions.mask > 0, x0, conditions.masked_video.to(x.dtype))
        elif kind == "velocity" and self.active is None:
            return Prediction(x0, output)
        return Prediction(x0, ((x - x0) / time.clamp(min=1e-3)).to(x.dtype))
