"""Tiny auto-encoder for the latents of Wan 2.1 (`taew2_1.pth` by madebyollin, MIT): about 30x cheaper than the VAE.

Spec section 1.7. It reads and writes the *normalised* latents of the diffusion network directly and has pictures in
[0, 1]. Four pixel frames make one latent frame; the first pixel frame is encoded as four copies of itself, and of the
four pictures of the first latent frame only the last is shown, so lengths are those of the Wan VAE: 1 + 4n <-> 1 + n.
Each memory block also sees the frame before, at its own depth: that frame is all the state there is.

Two forms with equal output: "parallel" sends all frames of a call through each layer (fewest kernels), "sequential"
sends a single frame through all layers before the next (least memory, best use of a CPU's cache).

    tae = TAE(TAE_FLAVOURS["official"]).half()
    video = tae.decode(latents)                        # a whole clip
    stream = tae.stream_view(1)                        # one per stream, weights are shared
    for latents in chunks:
        video = stream.decode(latents)                 # 9 pixel frames of the first 3 latent frames, then 12

Legend: B batch, F pixel frames, T latent frames, N frames at a layer's own rate, C channels, H x W pixels or cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.streaming import StreamingModule

Form = Literal["parallel", "sequential"]

LATENT_LIMIT = 3.0  # latents are squashed smoothly into +-3 before decoding
BLOCKS_PER_STAGE = 3


@dataclass(frozen=True, kw_only=True)
class TAEConfig:
    """Architecture of :class:`TAE`.

    Attributes:
        encoder_width: channels of every encoder layer.
        decoder_widths: channels of the decoder's three stages and of its last layers.
        pool: how many frames each encoder stage joins into one; its product is the frames of a latent frame.
        grow: how many frames each decoder stage makes of one; the same product.
    """

    encoder_width: int
    decoder_widths: tuple[int, int, int, int]
    latent_channels: int = 16
    pool: tuple[int, int, int] = (2, 2, 1)
    grow: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if self.pool[0] * self.pool[1] * self.pool[2] != self.pixel_frames_per_latent:
            raise ValueError(f"pool {self.pool} and grow {self.grow} must have the same product")

    @property
    def pixel_frames_per_latent(self) -> int:
        """Pixel frames behind each latent frame but the first, which has one."""
        return self.grow[0] * self.grow[1] * self.grow[2]

    @property
    def pixels_per_cell(self) -> int:
        """Pixels a side of a latent cell."""
        return int(2 ** len(self.pool))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TAEConfig:
        """Inverse of `to_dict`, also after a trip through JSON (lists become tuples)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)


TAE_FLAVOURS: dict[str, TAEConfig] = {
    "test": TAEConfig(encoder_width=6, decoder_widths=(12, 8, 6, 6)),
    "official": TAEConfig(encoder_width=64, decoder_widths=(256, 128, 64, 64)),
}


@dataclass
class MemoryState:
    """`past` [B, 1, C, H, W]: the last frame that went in; None before the first (then zeros)."""

    past: Tensor | None = None


class MemoryBlock(StreamingModule[MemoryState]):
    """Residual block that sees each frame beside the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def _init_state(self, batch: int) -> MemoryState:
        return MemoryState()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C, H, W] -> the same shape."""
        state = self.state_or_fresh(x.shape[0])
        past = torch.zeros_like(x[:, :1]) if state.past is None else state.past
        if past.shape[0] != x.shape[0] or past.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the stream began with {tuple(past.shape[3:])} cells and a batch of {past.shape[0]}, now it is "
                f"{tuple(x.shape[3:])} and {x.shape[0]}; call reset() before another size"
            )
        before = torch.cat([past, x[:, :-1]], dim=1)
        state.past = x[:, -1:].clone()
        out: Tensor = F.relu(_each_frame(self.conv, torch.cat([x, before], dim=2)) + x)
        return out


class TemporalPool(nn.Module):
    """Joins `stride` frames into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N * stride, C, H, W] -> [B, N, C, H, W]."""
        return _each_frame(self.conv, rearrange(x, "b (n s) c h w -> b n (s c) h w", s=self.stride))


class TemporalGrow(nn.Module):
    """Makes `stride` frames of one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C, H, W] -> [B, N * stride, C, H, W]."""
        return rearrange(_each_frame(self.conv, x), "b n (s c) h w -> b (n s) c h w", s=self.stride)


class SoftLimit(nn.Module):
    """Squashes latents smoothly into +-3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / LATENT_LIMIT) * LATENT_LIMIT


def _each_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a picture layer to every frame of [B, N, C, H, W]."""
    out: Tensor = rearrange(layer(rearrange(x, "b n c h w -> (b n) c h w")), "(b n) c h w -> b n c h w", b=x.shape[0])
    return out


def encoder_layers(config: TAEConfig) -> nn.Sequential:
    """Layers numbered as in the official file: stem, three stages of pool, half size and memory, head."""
    width = config.encoder_width
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for stride in config.pool:
        layers += [TemporalPool(width, stride), nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
        layers += [MemoryBlock(width) for _ in range(BLOCKS_PER_STAGE)]
    return nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))


def decoder_layers(config: TAEConfig) -> nn.Sequential:
    """Layers numbered as in the official file: limit, stem, three stages of memory, double size and grow, head."""
    widths = config.decoder_widths
    layers: list[nn.Module] = [SoftLimit(), nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for stage, stride in enumerate(config.grow):
        layers += [MemoryBlock(widths[stage]) for _ in range(BLOCKS_PER_STAGE)]
        layers += [nn.Upsample(scale_factor=2, mode="nearest"), TemporalGrow(widths[stage], stride)]
        layers += [nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[-1], 3, 3, padding=1))


def run_parallel(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """All frames of [B, N, C, H, W] through one layer after the other."""
    for layer in layers:
        in_time = isinstance(layer, (MemoryBlock, TemporalPool, TemporalGrow, SoftLimit))
        x = layer(x) if in_time else _each_frame(layer, x)
    return x


def run_sequential(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The same, each frame as deep as it goes before the next one enters (a pool waits for its frames)."""
    frames: Iterator[Tensor] = iter(torch.split(x, 1, dim=1))
    for layer in layers:
        frames = _frame_by_frame(layer, frames)
    return torch.cat(list(frames), dim=1)


def _frame_by_frame(layer: nn.Module, frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """One layer of the chain: asks for what it needs when it is asked for a frame [B, 1, C, H, W]."""
    needs = layer.stride if isinstance(layer, TemporalPool) else 1
    while group := list(islice(frames, needs)):
        yield from torch.split(run_parallel([layer], torch.cat(group, dim=1)), 1, dim=1)


@dataclass
class TAEState:
    """Whether the stream's first frame has been encoded, and whether its first latent frame has been decoded."""

    encoding: bool = False
    decoding: bool = False


class TAE(StreamingModule[TAEState]):
    """Encoder and decoder; every call goes on where the last one of the stream ended."""

    pixel_range = (0.0, 1.0)

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder_layers(config), decoder_layers(config)

    def _init_state(self, batch: int) -> TAEState:
        return TAEState()

    def encode(self, video: Tensor, form: Form = "parallel") -> Tensor:
        """Latents of the next pixel frames.

        Args:
            video: [B, 3, F, H, W] in [0, 1]; F is 1 + 4n in the first (or only) call, then 4n; H, W multiples of 8.
            form: "parallel" or "sequential", see the module.

        Returns:
            [B, C, T, H/8, W/8] in the weights' dtype, normalised as the diffusion network has them.

        Raises:
            ValueError: F makes no whole latent frames, or the size does not fit.
        """
        if not self.is_streaming:
            return self.stream_view(video.shape[0]).encode(video, form)
        state = self.state_or_fresh(video.shape[0])
        group = self.config.pixel_frames_per_latent
        first = 0 if state.encoding else 1
        if video.shape[2] < 1 or (video.shape[2] - first) % group:
            expected = f"1 + {group}n pixel frames in the first call" if first else f"{group}n after the first call"
            raise ValueError(f"the TAE encodes {expected}, got {video.shape[2]}")
        if first:
            video = torch.cat([video[:, :, :1].expand(-1, -1, group - 1, -1, -1), video], dim=2)
        return self.encode_groups(video, form)

    def encode_groups(self, video: Tensor, form: Form = "parallel") -> Tensor:
        """`encode` without the copies of the first frame: [B, 3, 4T, H, W] -> [B, C, T, H/8, W/8]."""
        if not self.is_streaming:
            return self.stream_view(video.shape[0]).encode_groups(video, form)
        group, cell = self.config.pixel_frames_per_latent, self.config.pixels_per_cell
        frames, height, width = video.shape[2:]
        if frames < 1 or frames % group or height % cell or width % cell:
            raise ValueError(
                f"the TAE encodes groups of {group} frames with sides that are multiples of {cell}, got {frames} "
                f"frames of {height} x {width}"
            )
        latents = self._run(self.encoder, video, form)
        self.state_or_fresh(video.shape[0]).encoding = True
        return latents

    def decode(self, latents: Tensor, form: Form = "parallel") -> Tensor:
        """Pixel frames of the next latent frames.

        Args:
            latents: [B, C, T, H/8, W/8] as the diffusion network has them.
            form: "parallel" or "sequential", see the module.

        Returns:
            [B, 3, F, H, W] in [0, 1], in the weights' dtype; F is 4T, minus 3 in the first (or only) call.

        Raises:
            ValueError: no latent frame, or another number of channels.
        """
        if not self.is_streaming:
            return self.stream_view(latents.shape[0]).decode(latents, form)
        state = self.state_or_fresh(latents.shape[0])
        if latents.shape[2] < 1 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"the TAE decodes at least one latent frame of {self.config.latent_channels} channels, got "
                f"{latents.shape[2]} of {latents.shape[1]}"
            )
        # The first latent frame stands for one pixel frame: the last of its pictures.
        skip = 0 if state.decoding else self.config.pixel_frames_per_latent - 1
        video = self._run(self.decoder, latents, form)[:, :, skip:]
        state.decoding = True
        return video.clamp(*self.pixel_range)

    def _run(self, layers: nn.Sequential, x: Tensor, form: Form) -> Tensor:
        """Layers on [B, C, N, H, W] in the weights' dtype."""
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
        weight = next(layers.parameters())
        frames = rearrange(x, "b c n h w -> b n c h w").to(weight.dtype)
        run = run_parallel if form == "parallel" else run_sequential
        return rearrange(run(layers, frames), "b n c h w -> b c n h w")
