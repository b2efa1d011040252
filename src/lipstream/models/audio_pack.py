"""Audio Pack: how driving speech enters the diffusion transformer (OmniAvatar's scheme, kept by Lip Forcing).

Feature rows at 25 per second are joined four by four, the latent frame's share of time, and mapped to one short row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from lipstream.streaming.base import StreamingModule

AUDIO_ROWS_PER_LATENT_FRAME = 4


@dataclass
class AudioPackState:
    """Whether the three copies of the first row were already put in front."""

    started: bool = False


class AudioPack(StreamingModule[AudioPackState]):
    """Audio Pack: four feature rows (25 per second) make one row per latent frame.

    Latent frame 0 sees row 0 four times, latent frame k >= 1 rows 4k-3 ... 4k. Streaming: the first call
    takes 1 + 4n rows, later calls 4n rows.
    """

    def __init__(self, audio_dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(AUDIO_ROWS_PER_LATENT_FRAME * audio_dim, hidden)
        self.norm_out = nn.LayerNorm(hidden, eps=1e-5)

    def _init_state(self, batch: int) -> AudioPackState:
        return AudioPackState()

    def forward(self, features: Tensor) -> Tensor:
        """features [B, pixel frames, audio_dim] -> [B, latent frames, hidden]."""
        state = self.state_or_fresh(len(features))
        rows = features.shape[1]
        expected = rows % AUDIO_ROWS_PER_LATENT_FRAME == (0 if state.started else 1)
        if not expected or not rows:
            raise ValueError(f"audio rows must be 1 + 4n in the first call and 4n later, got {rows}")
        if not state.started:
            features = torch.cat((features[:, :1].expand(-1, 3, -1), features), dim=1)
            state.started = True
        return self.join(rearrange(features, "b (t r) d -> b t r d", r=AUDIO_ROWS_PER_LATENT_FRAME))

    def join(self, groups: Tensor) -> Tensor:
        """Rows already grouped by latent frame [B, T, 4, audio_dim] -> [B, T, hidden]; no state."""
        out: Tensor = self.norm_out(self.proj(rearrange(groups, "b t r d -> b t (r d)")))
        return out
