"""Layers of the Wan 2.1 video VAE as streaming modules: everything that looks back in time keeps its own typed state.

Spec section 1.7. In time each 3-tap convolution sees the current and the two previous frames and nothing of the
future; before the start lie zeros. The first pixel frame has a latent frame of its own, so the temporal resampling
treats it apart: down-sampling passes it through, up-sampling does not double it. A layer therefore gives the same
frames however the clip is cut, and nothing is ever computed twice.

Module and parameter names are those of the official file, which is why some `nn.Sequential` hold parts without
parameters. Legend: B batch, C channels, T frames at the layer's own rate, H x W at its own resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.streaming import StreamingModule


@dataclass
class ConvState:
    """`past` [B, C, 2, H, W]: the last frames that went in; None before the first."""

    past: Tensor | None = None


class CausalConv3d(StreamingModule[ConvState]):
    """Convolution with 3 taps in time that look back only, and `space` x `space` taps that keep the size."""

    TAPS = 3

    def __init__(self, channels_in: int, channels_out: int, space: int = 3) -> None:
        super().__init__()
        like = nn.Conv3d(channels_in, channels_out, (self.TAPS, space, space))
        self.weight, self.bias = like.weight, like.bias

    def _init_state(self, batch: int) -> ConvState:
        return ConvState()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]."""
        state = self.state_or_fresh(x.shape[0])
        b, c, _, h, w = x.shape
        past = x.new_zeros(b, c, self.TAPS - 1, h, w) if state.past is None else state.past
        if past.shape[:2] != (b, c) or past.shape[3:] != (h, w):
            raise ValueError(
                f"the stream began with {tuple(past.shape[3:])} cells and a batch of {past.shape[0]}, now it is "
                f"{(h, w)} and {b}; call reset() before another size"
            )
        joined = torch.cat([past, x], dim=2)
        state.past = joined[:, :, 1 - self.TAPS :].clone()  # a view would keep the whole input alive
        margin = self.weight.shape[-1] // 2
        return F.conv3d(joined, self.weight, self.bias, padding=(0, margin, margin))


class ChannelNorm(nn.Module):
    """Root mean square norm over the channels of each cell, with a gain; `axes` trailing axes (3 video, 2 picture)."""

    def __init__(self, channels: int, axes: Literal[2, 3]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, ...] -> the same shape."""
        out: Tensor = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma
        return out


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(channels_in, 3),
            nn.SiLU(),
            CausalConv3d(channels_in, channels_out),
            ChannelNorm(channels_out, 3),
            nn.SiLU(),
            nn.Identity(),  # dropout in the reference: holds the next one's number
            CausalConv3d(channels_out, channels_out),
        )
        self.shortcut = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C', T, H, W]."""
        out: Tensor = self.residual(x) + self.shortcut(x)
        return out


class FrameAttention(nn.Module):
    """One head of self attention among the cells of each single frame: no memory."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape."""
        frames, height = x.shape[2], x.shape[3]
        qkv = self.to_qkv(self.norm(rearrange(x, "b c t h w -> (b t) c h w")))
        q, k, v = rearrange(qkv, "n (part c) h w -> part n 1 (h w) c", part=3).contiguous()
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=height)
        out: Tensor = x + rearrange(self.proj(seen), "(b t) c h w -> b c t h w", t=frames)
        return out


def _each_frame(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply picture layers to every frame of [B, C, T, H, W]."""
    out: Tensor = rearrange(layers(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=x.shape[2])
    return out


@dataclass
class DownState:
    """`last` [B, C, 1, H, W]: the last frame at half the size, from which the next pair goes on; None at the start."""

    last: Tensor | None = None


class Downsample(StreamingModule[DownState]):
    """Half the size; with `temporal`, from then on also one frame out of two (frame 0 stays as it is)."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        # The reference pads on the right and below only.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def _init_state(self, batch: int) -> DownState:
        return DownState()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, 1 + 2n or 2n, H, W] -> [B, C, 1 + n or n, H/2, W/2]; without `temporal` any T -> T."""
        state = self.state_or_fresh(x.shape[0])
        x = _each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        first = state.last is None
        joined = x if state.last is None else torch.cat([state.last, x], dim=2)
        state.last = x[:, :, -1:].clone()
        if joined.shape[2] == 1:
            return x
        out: Tensor = self.time_conv(joined)
        return torch.cat([x[:, :, :1], out], dim=2) if first else out


@dataclass
class UpState:
    """`started`: whether frame 0, the only one that is not doubled, has gone through."""

    started: bool = False


class Upsample(StreamingModule[UpState]):
    """Twice the size at half the channels; with `temporal` first two frames out of each one but frame 0."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, space=1) if temporal else None

    def _init_state(self, batch: int) -> UpState:
        return UpState()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C/2, 2T (2T - 1 at the start), 2H, 2W]; without `temporal` T -> T."""
        if self.time_conv is not None:
            state = self.state_or_fresh(x.shape[0])
            alone = 0 if state.started else 1
            state.started = True
            if x.shape[2] > alone:
                # Frame 0 does not enter the convolution's history either: its first input has zeros behind it.
                doubled = rearrange(self.time_conv(x[:, :, alone:]), "b (two c) t h w -> b c (t two) h w", two=2)
                x = torch.cat([x[:, :, :1], doubled], dim=2) if alone else doubled
        return _each_frame(self.resample, x)


def middle(channels: int) -> nn.Sequential:
    """The bottom of encoder and decoder."""
    return nn.Sequential(ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels))


def head(channels_in: int, channels_out: int) -> nn.Sequential:
    """The last layers of encoder and decoder."""
    return nn.Sequential(ChannelNorm(channels_in, 3), nn.SiLU(), CausalConv3d(channels_in, channels_out))
