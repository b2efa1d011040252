"""What a chunk has to cost: floating point operations and cache bytes of the DiT, as formulas.

Deterministic, so that accidental recomputation fails a test on any machine, and the yardstick of the benchmark's
achieved rates. One multiplication and addition are two operations; softmax, norms and activations are not counted.

    costs = DiTCosts(FLAVOURS["1.3b"], tokens_per_latent_frame=1024)
    costs.reference_chunk_flops()            # 36.1e12: three full calls that read 512 text rows
    costs.call_flops(3, 7, text_keys=32)     # what this implementation executes
"""

from __future__ import annotations

from dataclasses import dataclass

from lipstream.models.dit import DiTConfig


@dataclass(frozen=True)
class DiTCosts:
    """Costs of one network at one picture size, batch 1.

    tokens_per_latent_frame: those that are computed.
    """

    config: DiTConfig
    tokens_per_latent_frame: int

    def linear_flops(self, latent_frames: int) -> int:
        """The linear maps of all blocks; text keys and values are not among them, they are computed once a clip."""
        return self.config.num_layers * self._block_linears(latent_frames * self.tokens_per_latent_frame)

    def attention_flops(self, latent_frames: int, visible_latent_frames: int) -> int:
        """Self attention of all blocks."""
        own, seen = (frames * self.tokens_per_latent_frame for frames in (latent_frames, visible_latent_frames))
        return self.config.num_layers * 4 * own * seen * self.config.dim

    def text_flops(self, latent_frames: int, text_keys: int) -> int:
        """Text attention of all blocks."""
        if not self.config.text_dim:
            return 0
        return self.config.num_layers * 4 * latent_frames * self.tokens_per_latent_frame * text_keys * self.config.dim

    def call_flops(self, latent_frames: int, visible_latent_frames: int, text_keys: int) -> int:
        """One denoising call, embeddings and head included."""
        tokens = latent_frames * self.tokens_per_latent_frame
        patch_cells = self.config.patch[1] * self.config.patch[2]
        head = 2 * tokens * self.config.dim * patch_cells * self.config.latent_channels
        blocks = self.linear_flops(latent_frames) + self.attention_flops(latent_frames, visible_latent_frames)
        return blocks + self.text_flops(latent_frames, text_keys) + self._inputs(latent_frames) + head

    def clean_flops(self, latent_frames: int, visible_latent_frames: int, text_keys: int) -> int:
        """The clean pass: of the last block only keys and values, no head."""
        layers, dim, tokens = self.config.num_layers, self.config.dim, latent_frames * self.tokens_per_latent_frame
        blocks = (
            self.linear_flops(latent_frames)
            + self.attention_flops(latent_frames, visible_latent_frames)
            + self.text_flops(latent_frames, text_keys)
        )
        return blocks // layers * (layers - 1) + 2 * tokens * 2 * dim * dim + self._inputs(latent_frames)

    def reference_chunk_flops(self) -> int:
        """A steady chunk as usually computed: two calls and a full clean pass, all rows of the text."""
        own, window = self.config.chunk_latent_frames, self.config.window_latent_frames
        blocks = self.linear_flops(own) + self.attention_flops(own, window) + self.text_flops(own, self.config.text_len)
        return 3 * blocks

    def cache_bytes(self, bytes_per_number: int) -> int:
        """Keys and values of the whole window."""
        window_tokens = self.config.window_latent_frames * self.tokens_per_latent_frame
        return 2 * self.config.num_layers * window_tokens * self.config.dim * bytes_per_number

    def _block_linears(self, tokens: int) -> int:
        dim, text = self.config.dim, 2 if self.config.text_dim else 0
        return 2 * tokens * ((4 + text) * dim * dim + 2 * dim * self.config.ffn_dim)

    def _inputs(self, latent_frames: int) -> int:
        """Patch and time embedding, and the audio rows' maps."""
        config, tokens = self.config, latent_frames * self.tokens_per_latent_frame
        patch = 2 * tokens * config.in_channels * config.patch[1] * config.patch[2] * config.dim
        time = 2 * (config.freq_dim * config.dim + 7 * config.dim * config.dim)
        first, last = config.audio_blocks
        return patch + time + (last - first + 1) * 2 * latent_frames * config.audio_hidden * config.dim
