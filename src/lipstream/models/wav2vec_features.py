"""Official speech features: wav2vec2-base-960h with its convolutions resampled to 25 Hz before the transformer.

This is the audio input of the released Lip Forcing networks (spec section 1.6; the paper's Sec. 3 only says
"wav2vec2 features"). The network is that of `transformers`; what differs from its stock forward, and changes the
numbers, is the order of work:

    whole-file zero mean, unit variance -> zeros up to rows * 640 samples -> CNN (50 Hz) -> linear interpolation with
    aligned corners to `rows` (25 Hz) -> projection -> transformer -> [last state, state 0, state 1, ..., last state]

Every step but the convolutions looks at the whole file, so a trimmed file has other features than the same part of
the whole one. For live use see `lipstream.models.wav2vec_windowed`.

    features = load_speech_features(folder)            # lipstream.checkpoints.encoders
    rows = features(samples, pixel_frames=81)          # [b, n] -> [b, 81, 10752]

Shapes: b batch, n samples at 16 kHz, f CNN frames (50 Hz), r rows (25 Hz, one per pixel frame), c channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.models.audio import SAMPLES_PER_ROW
from lipstream.models.extras import require_transformers

VARIANCE_FLOOR = 1e-7  # of the waveform's normalisation
GROUP_NORM_EPS = 1e-5
FRAMES_PER_ROW = 2  # CNN frames
TRAINING_ROWS = 81  # the official training clips
# Offline, the CNN runs over 30 s at a time: its first layer alone needs 6.5 MB for one second of speech.
BLOCK_FRAMES = 1_500

Attention = Literal["sdpa", "eager"]
# Fields of `Wav2VecConfig` -> what a Hub folder's config.json calls them.
HUB_NAMES = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "ffn": "intermediate_size", "conv_channels": "conv_dim", "conv_kernels": "conv_kernel",
    "conv_strides": "conv_stride", "position_taps": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups", "norm_eps": "layer_norm_eps",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wav2VecConfig:
    """Sizes of a wav2vec2 network of the base family (group norm in the first convolution, post-norm transformer)."""

    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    conv_channels: tuple[int, ...] = (512,) * 7
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    position_taps: int = 128
    position_groups: int = 16
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not len(self.conv_channels) == len(self.conv_kernels) == len(self.conv_strides):
            raise ValueError("conv_channels, conv_kernels and conv_strides must have the same length")
        if math.prod(self.conv_strides) * FRAMES_PER_ROW != SAMPLES_PER_ROW:
            raise ValueError(f"conv_strides {self.conv_strides} must multiply to {SAMPLES_PER_ROW // FRAMES_PER_ROW}")
        if not self.frame_stride <= self.frame_samples <= SAMPLES_PER_ROW:
            raise ValueError(f"a CNN frame sees {self.frame_samples} samples; 320 to {SAMPLES_PER_ROW} are supported")

    @property
    def feature_dim(self) -> int:
        """Columns of a row: the last hidden state, then all hidden states (10752 at the official size)."""
        return (self.layers + 2) * self.hidden

    @property
    def frame_stride(self) -> int:
        """Samples from one CNN frame to the next."""
        return math.prod(self.conv_strides)

    @property
    def frame_samples(self) -> int:
        """Samples that one CNN frame sees."""
        samples = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    @classmethod
    def from_hub(cls, data: Mapping[str, Any]) -> Wav2VecConfig:
        """The sizes in a Hub folder's config.json.

        Raises:
            ValueError: another kind of network than the base family.
        """
        needed = {"model_type": "wav2vec2", "feat_extract_norm": "group", "conv_bias": False}
        needed |= {"do_stable_layer_norm": False, "feat_extract_activation": "gelu", "hidden_act": "gelu"}
        # Fields that a config.json leaves out have the value of wav2vec2-base.
        wrong = {key: data[key] for key, value in needed.items() if data.get(key, value) != value}
        if wrong or data.get("add_adapter"):
            raise ValueError(f"not a network of the wav2vec2-base family: {wrong or {'add_adapter': True}}")
        given: dict[str, Any] = {ours: data[theirs] for ours, theirs in HUB_NAMES.items() if theirs in data}
        for field in ("conv_channels", "conv_kernels", "conv_strides"):
            if field in given:
                given[field] = tuple(given[field])  # JSON has lists
        return cls(**given)


FLAVOURS: dict[str, Wav2VecConfig] = {
    "test": Wav2VecConfig(hidden=32, layers=2, heads=4, ffn=64, conv_channels=(24,) * 7),
    "official": Wav2VecConfig(),  # facebook/wav2vec2-base-960h
}


def rows_for(samples: int, pixel_frames: int) -> int:
    """Rows that inference computes: every sample is heard, every pixel frame has a row (the first ones are kept)."""
    return max(math.ceil(samples / SAMPLES_PER_ROW), pixel_frames)


def training_rows_for(pixel_frames: int) -> int:
    """Rows that the official training computes for a clip of so many frames, before it keeps the first 81."""
    return max(pixel_frames, TRAINING_ROWS)


def normalise(samples: Tensor) -> Tensor:
    """Zero mean and unit (population) variance over each whole file [b, n], as wav2vec2's feature extractor does."""
    wide = samples.double()
    mean = wide.mean(1, keepdim=True)
    variance = (wide - mean).square().mean(1, keepdim=True)
    return ((wide - mean) / (variance + VARIANCE_FLOOR).sqrt()).float()


class FrameStatistics(NamedTuple):
    """Mean and population variance [b, c] of the first convolution over time: what its group norm divides by."""

    mean: Tensor
    variance: Tensor


class SpeechFeatures(nn.Module):
    """The official features; float32 throughout (the reference runs this network in float32 too)."""

    def __init__(self, config: Wav2VecConfig, attention: Attention = "sdpa") -> None:
        """`attention`: `eager` is what the reference runs; `sdpa` is equal to 1e-5 and does not need r * r memory."""
        super().__init__()
        self.config = config
        self.network = _network(config, attention)

    def use_attention(self, attention: Attention) -> None:
        """Choose `eager` or `sdpa` after loading."""
        self.network.set_attn_implementation(attention)

    def forward(self, samples: Tensor, pixel_frames: int) -> Tensor:
        """Whole files [b, n] in -1..1 -> the first `pixel_frames` rows [b, pixel_frames, feature_dim] (inference)."""
        _check(samples)
        return self.rows(normalise(samples), rows_for(samples.shape[1], pixel_frames))[:, :pixel_frames]

    def rows(self, normalised: Tensor, rows: int) -> Tensor:
        """Normalised speech [b, n] -> [b, rows, feature_dim]; zeros follow it up to rows * 640 samples.

        Speech that is longer than that is squeezed onto the rows, as in the official training; `rows_for` never asks
        for it.
        """
        _check(normalised)
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        missing = rows * SAMPLES_PER_ROW - normalised.shape[1]
        padded = F.pad(normalised.float(), (0, max(missing, 0)))
        return self.encode(to_25hz(self.cnn(padded, self.frame_statistics(padded)), rows))

    def first_convolution(self, samples: Tensor) -> Tensor:
        """[b, n] -> [b, c, steps], before its group norm; 3200 steps a second at the official strides."""
        out: Tensor = self.network.feature_extractor.conv_layers[0].conv(samples[:, None])
        return out

    def frame_statistics(self, normalised: Tensor) -> FrameStatistics:
        """Statistics of the first convolution over all of `normalised` [b, n], 30 s at a time."""
        kernel, stride = self.config.conv_kernels[0], self.config.conv_strides[0]
        steps = (normalised.shape[1] - kernel) // stride + 1
        block = BLOCK_FRAMES * self.config.frame_stride // stride
        total = squares = torch.zeros((), dtype=torch.float64, device=normalised.device)
        for start in range(0, steps, block):
            stop = min(start + block, steps)
            part = self.first_convolution(normalised[:, start * stride : (stop - 1) * stride + kernel]).double()
            total, squares = total + part.sum(2), squares + part.square().sum(2)
        mean = total / steps
        return FrameStatistics(mean.float(), (squares / steps - mean.square()).clamp_min(0).float())

    def cnn(self, normalised: Tensor, statistics: FrameStatistics) -> Tensor:
        """[b, n] -> [b, f, c], frame k from the samples at k * 320; 30 s at a time with one set of statistics."""
        stride, seen = self.config.frame_stride, self.config.frame_samples
        frames = (normalised.shape[1] - seen) // stride + 1
        parts = []
        for start in range(0, frames, BLOCK_FRAMES):
            stop = min(start + BLOCK_FRAMES, frames)
            parts.append(self._cnn_block(normalised[:, start * stride : (stop - 1) * stride + seen], statistics))
        return torch.cat(parts, dim=1)

    def _cnn_block(self, samples: Tensor, statistics: FrameStatistics) -> Tensor:
        first, *others = self.network.feature_extractor.conv_layers
        norm = first.layer_norm
        scale = norm.weight / (statistics.variance + GROUP_NORM_EPS).sqrt()
        normed = (first.conv(samples[:, None]) - statistics.mean[..., None]) * scale[..., None] + norm.bias[:, None]
        x: Tensor = first.activation(normed)
        for layer in others:
            x = layer(x)
        return rearrange(x, "b c f -> b f c")

    def encode(self, frames: Tensor) -> Tensor:
        """CNN features at 25 Hz [b, r, c] -> rows [b, r, feature_dim]; all rows attend to each other."""
        encoder = self.network.encoder
        hidden, _ = self.network.feature_projection(frames)
        hidden = encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden))
        states = [hidden]
        for layer in encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        return torch.cat([states[-1], *states], dim=-1)


def to_25hz(frames: Tensor, rows: int) -> Tensor:
    """Linear interpolation with aligned corners: CNN frames [b, f, c] -> [b, rows, c].

    Of speech padded to rows * 640 samples there are 2 * rows - 1 frames, so this takes every second one.
    """
    resampled = F.interpolate(rearrange(frames, "b f c -> b c f"), size=rows, mode="linear", align_corners=True)
    return rearrange(resampled, "b c r -> b r c")


def _check(samples: Tensor) -> None:
    if samples.ndim != 2 or not samples.shape[1]:
        raise ValueError(f"speech must have shape [batch, samples] and hold a sample, got {list(samples.shape)}")


def _network(config: Wav2VecConfig, attention: Attention) -> Any:
    """`transformers`' Wav2Vec2Model of these sizes, without any dropout: the features are never trained."""
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attention must be 'sdpa' or 'eager', got {attention!r}")
    transformers = require_transformers()
    hub = transformers.Wav2Vec2Config(
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        conv_dim=config.conv_channels,
        conv_kernel=config.conv_kernels,
        conv_stride=config.conv_strides,
        num_conv_pos_embeddings=config.position_taps,
        num_conv_pos_embedding_groups=config.position_groups,
        layer_norm_eps=config.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        mask_time_prob=0.05,  # keeps the (unused) masking vector that the public file holds
        attn_implementation=attention,
    )
    return transformers.Wav2Vec2Model(hub).eval()
