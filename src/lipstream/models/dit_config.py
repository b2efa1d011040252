"""Configuration, flavours and conditions of the diffusion transformer: plain data, no network.

Everything that differs between the CPU model and the paper's sizes is a field of `DiTConfig`.
"""

from __future__ import annotations

import builtins
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lipstream.streaming.kv_cache import TextMemory


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Everything that defines the network's shape and its prediction."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096  # 0: no text cross attention
    text_len: int = 512
    audio_dim: int = 10752  # features per pixel frame
    audio_hidden: int = 32
    audio_blocks: tuple[int, int]  # first and last block that receives audio, inclusive
    chunk_latent_frames: int = 3
    window_latent_frames: int = 7  # includes the sink and the current chunk
    sink_latent_frames: int = 1
    # velocity: x0 = x_t - t * output; x0: output is x0; reference_residual: x0 = reference sequence + output
    prediction: Literal["velocity", "x0", "reference_residual"] = "velocity"
    # Scale the noisy channels by (1-t)/sqrt((1-t)²+t²): at t = .999 they are pure noise, which a small
    # network spends its capacity on ignoring.
    input_gate: bool = False
    # Put the given cells (mask 0) of the masked video into every x0 prediction; the official networks do not.
    keep_known: bool = False
    # Static map [H/2][W/2] of the tokens that touch the dilated mouth mask; None computes all.
    active_tokens: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.patch[0] != 1:
            raise ValueError(f"patch must not join latent frames, got {self.patch}")
        first, last = self.audio_blocks
        if not 0 <= first <= last < self.num_layers:
            raise ValueError(f"audio_blocks {self.audio_blocks} are outside of {self.num_layers} layers")
        if self.active_tokens is not None and not any(any(row) for row in self.active_tokens):
            raise ValueError("active_tokens selects no token")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def in_channels(self) -> int:
        """Noisy latent, reference, mask, masked video, reference sequence."""
        return 4 * self.latent_channels + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DiTConfig:
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples)."""

        def tuples(value: Any) -> Any:
            return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value

        return cls(**{key: tuples(value) for key, value in data.items()})


FLAVOURS: dict[str, DiTConfig] = {
    "test": DiTConfig(
        dim=48, ffn_dim=64, num_heads=2, num_layers=3, latent_channels=4, freq_dim=32, text_dim=8, text_len=4,
        audio_dim=6, audio_hidden=8, audio_blocks=(1, 1),
    ),
    "pocket": DiTConfig(
        dim=320, ffn_dim=1280, num_heads=5, num_layers=8, latent_channels=48, text_dim=0, audio_dim=256,
        audio_hidden=192, audio_blocks=(0, 7), prediction="reference_residual", input_gate=True, keep_known=True,
        active_tokens=((False,) * 5, *((True,) * 5 for _ in range(4))),
    ),
    "1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, audio_blocks=(2, 15)),
    "14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, audio_blocks=(2, 20)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All that steers the denoising of T latent frames; the one object that enters the DiT beside x and t."""

    reference: Tensor  # [B, C, 1, H, W], unmasked identity frame
    mask: Tensor  # [B or 1, 1, 1, H, W], 1 = regenerate
    masked_video: Tensor  # [B, C, T, H, W], the source with the mouth area zeroed
    ref_sequence: Tensor  # [B, C, T, H, W], unmasked reference clip, frame aligned
    audio: Tensor | None = None  # [B, T, audio_hidden] from `pack_audio`; None = silence, the null branch
    text: Tensor | TextMemory | None = None  # [B, L, text_dim], or prepared once by `DiT.prepare_text`

    @property
    def latent_frames(self) -> int:
        """T."""
        return self.masked_video.shape[2]

    def slice(self, latent_frames: builtins.slice) -> Conditions:
        """The conditions of some latent frames of the clip; reference, mask and text hold for all."""
        return dataclasses.replace(
            self,
            masked_video=self.masked_video[:, :, latent_frames],
            ref_sequence=self.ref_sequence[:, :, latent_frames],
            audio=None if self.audio is None else self.audio[:, latent_frames],
        )
