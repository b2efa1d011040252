"""Wan 2.1 video VAE, streaming: pixel frames <-> the latents of the official networks (spec section 1.7).

8x smaller in space, 4x in time; the first pixel frame has a latent frame of its own, so 1 + 4n pixel frames are 1 + n
latent frames. Encode and decode carry their past from call to call: a stream costs what one shot costs, without any
overlap, and gives the same numbers bit for bit, because both take the same passes (by default one latent frame each,
which also bounds memory). Flavour "official" has exactly the tensors of `Wan2.1_VAE.pth`.

    vae = WanVAE(WAN_VAE_FLAVOURS["official"]).to(torch.bfloat16)    # the released pipeline runs it in bf16
    latents = vae.encode(video)                       # a whole clip
    source, masked = vae.stream_view(1), vae.stream_view(1)    # two streams, one set of weights
    for chunk in chunks:                              # 1 + 4n pixel frames first, then 4n
        latents = source.encode(chunk)
        video = source.decode(latents)

Gradients flow through the carried past: run streams under `torch.inference_mode()` unless they are wanted.
Legend: B batch, F pixel frames, T latent frames, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipstream.models.wan_vae_layers import (
    CausalConv3d,
    Downsample,
    ResidualBlock,
    Upsample,
    head,
    middle,
)
from lipstream.streaming import StreamingModule

# Per-channel statistics of the official latents, before normalisation.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    """Architecture of :class:`WanVAE`.

    Attributes:
        width: channels at full resolution; level i has `width * multipliers[i]`.
        blocks_per_level: residual blocks of an encoder level; a decoder level has one more.
        temporal: whether the resampling after level i also halves the frame rate.
        latent_mean, latent_std: what the latents are normalised with, one number a channel.
    """

    width: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    def __post_init__(self) -> None:
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(
                f"{len(self.multipliers)} levels have {len(self.multipliers) - 1} resamplings between them"
            )
        if len(self.latent_mean) != len(self.latent_std) or min(self.latent_std) <= 0:
            raise ValueError("latent_mean and latent_std need one number a channel, deviations above zero")
        if any(channels % 2 for channels in self.channels[1:]):
            raise ValueError(f"up-sampling halves the channels: {self.channels[1:]} must be even")

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return len(self.latent_mean)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.width * factor for factor in self.multipliers)

    @property
    def pixel_frames_per_latent(self) -> int:
        """Pixel frames behind each latent frame but the first, which has one."""
        return int(2 ** sum(self.temporal))

    @property
    def pixels_per_cell(self) -> int:
        """Pixels a side of a latent cell."""
        return int(2 ** len(self.temporal))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WanVAEConfig:
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)


WAN_VAE_FLAVOURS: dict[str, WanVAEConfig] = {
    "test": WanVAEConfig(width=4, blocks_per_level=1),
    "official": WanVAEConfig(width=96),
}


class Encoder(nn.Module):
    """Pixels [B, 3, F, H, W] -> mean and log variance [B, 2C, T, H/8, W/8]."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = config.channels
        self.conv1 = CausalConv3d(3, widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks_per_level):
                layers.append(ResidualBlock(before, width))
                before = width
            if level < len(config.temporal):
                layers.append(Downsample(width, config.temporal[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(before)
        self.head = head(before, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """One pass: 1 + 4n frames at the start, then 4n."""
        out: Tensor = self.head(self.middle(self.downsamples(self.conv1(x))))
        return out


class Decoder(nn.Module):
    """Latents [B, C, T, H/8, W/8] -> pixels [B, 3, F, H, W], not clamped."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.conv1 = CausalConv3d(config.latent_channels, widths[0])
        self.middle = middle(widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks_per_level + 1):
                layers.append(ResidualBlock(before, width))
                before = width
            if level < len(config.temporal):
                layers.append(Upsample(width, config.temporal[::-1][level]))
                before = width // 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(before, 3)

    def forward(self, z: Tensor) -> Tensor:
        """One pass of any number of latent frames."""
        out: Tensor = self.head(self.upsamples(self.middle(self.conv1(z))))
        return out


@dataclass
class WanVAEState:
    """Whether the stream's first frame has been encoded, and whether its first latent frame has been decoded."""

    encoding: bool = False
    decoding: bool = False


class WanVAE(StreamingModule[WanVAEState]):
    """Encoder, decoder and the normalisation of the latents; deterministic (the mean, never a sample).

    Attributes:
        encode_latent_frames: of a pass, where a call of `encode` does not say; stream views take it over.
    """

    pixel_range = (-1.0, 1.0)

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1, self.conv2 = nn.Conv3d(2 * c, 2 * c, 1), nn.Conv3d(c, c, 1)
        self.encode_latent_frames = 1
        self._statistics: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _init_state(self, batch: int) -> WanVAEState:
        return WanVAEState()

    def encode(self, video: Tensor, latent_frames_per_pass: int | None = None) -> Tensor:
        """Normalised latents of the next pixel frames.

        Args:
            video: [B, 3, F, H, W] in [-1, 1]; F is 1 + 4n in the first (or only) call, then 4n; H, W multiples of 8.
            latent_frames_per_pass: more (a live chunk has 3) make fewer, larger kernels and need more memory; the
                result is the same up to the rounding of the convolutions. Default: `encode_latent_frames`.

        Returns:
            [B, C, T, H/8, W/8] in the weights' dtype.

        Raises:
            ValueError: F makes no whole latent frames, or the size does not fit.
        """
        if not self.is_streaming:
            return self.stream_view(video.shape[0]).encode(video, latent_frames_per_pass)
        state = self.state_or_fresh(video.shape[0])
        group, cell = self.config.pixel_frames_per_latent, self.config.pixels_per_cell
        first = 0 if state.encoding else 1
        count = self.encode_latent_frames if latent_frames_per_pass is None else latent_frames_per_pass
        frames, height, width = video.shape[2:]
        if frames < 1 or (frames - first) % group:
            expected = f"1 + {group}n pixel frames in the first call" if first else f"{group}n after the first call"
            raise ValueError(f"the Wan VAE encodes {expected}, got {frames}")
        if height % cell or width % cell:
            raise ValueError(f"height and width must be multiples of {cell}, got {height} x {width}")
        video = video.to(self.conv1.weight.dtype)
        moments = [
            self.conv1(self.encoder(part)) for part in _passes(video, first, frames_first=1, frames=group, count=count)
        ]
        state.encoding = True
        return self.normalise(torch.cat(moments, dim=2)[:, : self.config.latent_channels])

    def decode(self, latents: Tensor, latent_frames_per_pass: int = 1) -> Tensor:
        """Pixel frames of the next latent frames.

        Args:
            latents: [B, C, T, H/8, W/8], normalised as from `encode`.
            latent_frames_per_pass: as for `encode`.

        Returns:
            [B, 3, F, H, W] in [-1, 1], in the weights' dtype; F is 4T, minus 3 in the first (or only) call.

        Raises:
            ValueError: no latent frame, or another number of channels.
        """
        if not self.is_streaming:
            return self.stream_view(latents.shape[0]).decode(latents, latent_frames_per_pass)
        state = self.state_or_fresh(latents.shape[0])
        if latents.shape[2] < 1 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"the Wan VAE decodes at least one latent frame of {self.config.latent_channels} channels, got "
                f"{latents.shape[2]} of {latents.shape[1]}"
            )
        first = 0 if state.decoding else 1
        z = self.denormalise(latents.to(self.conv2.weight.dtype))
        # Every convolution runs inside of the passes: their sizes decide how it rounds.
        parts = _passes(z, first, frames_first=1, frames=1, count=latent_frames_per_pass)
        video = torch.cat([self.decoder(self.conv2(part)).clamp(*self.pixel_range) for part in parts], dim=2)
        state.decoding = True
        return video

    def normalise(self, mu: Tensor) -> Tensor:
        """Encoder output [B, C, ...] -> diffusion-space latents."""
        mean, inverse_std = self._latent_statistics(mu)
        return (mu - mean) * inverse_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        mean, inverse_std = self._latent_statistics(latents)
        return latents / inverse_std + mean

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, 1/std) [C, 1, 1, 1]; the inverse is taken in float32 and then rounded, as the reference does.

        Not buffers: the official file has no such tensors, and a network made on the meta device must have them.
        """
        key = like.device, like.dtype
        if key not in self._statistics:
            # A kept table must also serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                mean, std = (
                    torch.tensor(values, device=like.device).reshape(-1, 1, 1, 1)
                    for values in (self.config.latent_mean, self.config.latent_std)
                )
                self._statistics[key] = mean.to(like.dtype), (1 / std).to(like.dtype)
        return self._statistics[key]


def two_step_masked_latents(vae: WanVAE, video: Tensor, masked_video: Tensor) -> Tensor:
    """Masked latents as in the authors' cached training data (spec section 6.3); inference encodes all frames masked.

    The masked stream was encoded with frame 0 *not* masked, then latent frame 0 was replaced by that of the masked
    frame 0 alone. Both videos [B, 3, F, H, W] in [-1, 1] -> [B, C, T, H/8, W/8].
    """
    mixed = torch.cat([video[:, :, :1], masked_video[:, :, 1:]], dim=2)
    return torch.cat([vae.encode(masked_video[:, :, :1]), vae.encode(mixed)[:, :, 1:]], dim=2)


def _passes(x: Tensor, first: int, *, frames_first: int, frames: int, count: int) -> list[Tensor]:
    """Cut [B, C, F, H, W] into passes of `count` groups; at the start (`first` 1) one group has `frames_first`."""
    if count < 1:
        raise ValueError(f"latent_frames_per_pass must be at least 1, got {count}")
    sizes = [min(frames_first + (count - 1) * frames, x.shape[2])] if first else []
    while sum(sizes) < x.shape[2]:
        sizes.append(min(count * frames, x.shape[2] - sum(sizes)))
    return list(torch.split(x, sizes, dim=2))
