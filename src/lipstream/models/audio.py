"""Streaming speech encoder of the pocket model: 16 kHz samples in, one feature row per 25 fps pixel frame out.

The paper conditions its transformer on wav2vec2 features, which look at the whole file. The pocket model has to
run live, so it has this small causal network instead, distilled (`lipstream.training.speech`) from the encoder of
whisper-tiny.en. Row `i` describes the speech around the middle of pixel frame `i`, at (i + 0.5) * 40 ms, and no
sample later than `i * 40 ms + lookahead` has any influence on it. The look-ahead is nothing but a delay: every
layer is causal, and the first rows that come out, which would belong to frames before the start, are dropped.

    encoder = load_speech_encoder(path)
    rows = encoder(samples)                    # offline: [b, n] -> [b, ceil(n / 640), width]
    with encoder.streaming(batch=1):           # live: any chunk sizes, the same rows
        for chunk in chunks:
            rows = encoder(chunk)              # the rows that are certain by now, perhaps none
        rows = encoder.flush()                 # the rest, as if silence followed

Shapes: b batch, n samples, m mel frames (100 Hz), t steps of a layer, r rows (25 Hz), c channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, repeat
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.streaming.base import StreamingModule

SAMPLE_RATE = 16_000
SAMPLES_PER_ROW = 640  # one pixel frame at 25 fps
MEL_HOP_SAMPLES = 160
MEL_WINDOW_SAMPLES = 400
MEL_FRAMES_PER_ROW = SAMPLES_PER_ROW // MEL_HOP_SAMPLES
FFT_SIZE = 512

# Powers are relative to full scale (a full-scale square wave has power 1).
POWER_FLOOR = 1e-9  # -90 dB: below the noise of 16-bit recordings, so digital silence stays finite
PRIOR_POWER = 1e-3  # the loudness assumed before anything was heard: speech at about -30 dB
LEVEL_SECONDS = 2.0  # memory of the running loudness
LEVEL_BLOCK_ROWS = 64  # rows solved at once; bounds the size of the decay matrix

Flavour = Literal["test", "pocket"]


@dataclass(frozen=True, kw_only=True)
class SpeechEncoderConfig:
    """Sizes of the encoder; written into the weights file.

    `lookahead_samples` counts from the START of a pixel frame to the last sample its row may depend on, so 3200
    samples (200 ms) reach 160 ms past the frame's end.
    """

    lookahead_samples: int = 3_200
    mel_bands: int = 80
    stem_width: int = 192
    width: int = 256
    kernel: int = 3
    dilations_50hz: tuple[int, ...] = (1, 2, 4, 8)
    dilations_25hz: tuple[int, ...] = (1, 2, 4, 8, 1, 2)

    def __post_init__(self) -> None:
        if self.lookahead_samples % SAMPLES_PER_ROW or self.lookahead_samples < SAMPLES_PER_ROW:
            raise ValueError(f"lookahead_samples must be a multiple of {SAMPLES_PER_ROW}: {self.lookahead_samples}")

    @property
    def delay_rows(self) -> int:
        """Rows that the causal network lags behind: row i leaves it with group i + delay_rows."""
        return self.lookahead_samples // SAMPLES_PER_ROW - 1

    @property
    def lookahead_ms(self) -> float:
        """The look-ahead in milliseconds, everything included."""
        return 1000 * self.lookahead_samples / SAMPLE_RATE


def speech_config(flavour: Flavour) -> SpeechEncoderConfig:
    """The encoder's sizes: `test` runs in milliseconds with random weights, `pocket` is the shipped one."""
    if flavour == "pocket":
        return SpeechEncoderConfig()
    if flavour == "test":
        return SpeechEncoderConfig(mel_bands=16, stem_width=16, width=16, dilations_50hz=(1, 2), dilations_25hz=(1, 2))
    raise ValueError(f"unknown flavour of the speech encoder: {flavour!r}")


def mel_filters(bands: int) -> Tensor:
    """Triangular filters [bands, bins], evenly spaced in mel (2595 log10(1 + f/700)) up to 8 kHz, rows summing to 1.

    The sum makes a band's value an average of powers, comparable with the signal's variance.
    """
    top_mel = 2595 * math.log10(1 + SAMPLE_RATE / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top_mel, bands + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    # A band narrower than the bins' spacing must still touch one, so no triangle is slimmer than one bin.
    spacing = SAMPLE_RATE / FFT_SIZE
    rising = (bins - low) / (middle - low).clamp_min(spacing)
    falling = (high - bins) / (high - middle).clamp_min(spacing)
    weights = torch.minimum(rising, falling).clamp_min(0)
    nearest = F.one_hot((corners[1:-1] / spacing).round().long(), len(bins)).to(weights.dtype)
    weights = torch.where(weights.sum(1, keepdim=True) > 1e-6, weights, nearest)
    return (weights / weights.sum(1, keepdim=True)).float()


@dataclass
class LogMelState:
    """`tail` [b, 240]: the samples the next window begins with; `power` [b]: the running loudness."""

    tail: Tensor
    power: Tensor


class LogMel(StreamingModule[LogMelState]):
    """Log-mel frames relative to a causal running loudness, so that gain hardly matters and no future leaks."""

    window: Tensor
    filters: Tensor

    def __init__(self, bands: int) -> None:
        super().__init__()
        window = torch.hann_window(MEL_WINDOW_SAMPLES)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        self.register_buffer("filters", mel_filters(bands), persistent=False)

    def _init_state(self, batch: int) -> LogMelState:
        device = self.window.device
        tail = torch.zeros(batch, MEL_WINDOW_SAMPLES - MEL_HOP_SAMPLES, device=device)
        return LogMelState(tail=tail, power=torch.full((batch,), PRIOR_POWER, device=device))

    def forward(self, samples: Tensor) -> Tensor:
        """samples [b, 640 r] -> [b, 4 r, bands + 1]; the last channel is the absolute running loudness."""
        state = self.state_or_fresh(samples.shape[0])
        samples = torch.cat([state.tail, samples.float()], dim=1)
        state.tail = samples[:, samples.shape[1] - state.tail.shape[1] :]
        frames = samples.unfold(1, MEL_WINDOW_SAMPLES, MEL_HOP_SAMPLES) * self.window
        power = torch.fft.rfft(frames, n=FFT_SIZE).abs().square() @ self.filters.T
        level, state.power = running_power(rearrange(power, "b (r f) c -> b r (f c)", f=4).mean(2), state.power)
        log_level = repeat(torch.log10(level + POWER_FLOOR), "b r -> b (r f) 1", f=MEL_FRAMES_PER_ROW)
        relative = (torch.log10(power + POWER_FLOOR) - log_level).clamp(-5.0, 2.5)
        # Roughly zero mean and unit size for speech; exact statistics do not matter to a trained stem.
        return torch.cat([(relative + 1.5) / 1.5, (log_level + 3.0) / 2.0], dim=2)


def running_power(power: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Exponential running mean of `power` [b, r] that starts from `before` [b]: (means [b, r], the last one [b]).

    Solved in blocks by a small triangular matrix, because a loop over rows would dominate training.
    """
    decay = math.exp(-SAMPLES_PER_ROW / SAMPLE_RATE / LEVEL_SECONDS)
    step = torch.arange(LEVEL_BLOCK_ROWS, device=power.device)
    lag = step[:, None] - step[None, :]
    weights = torch.where(lag >= 0, (1 - decay) * decay ** lag.clamp_min(0).float(), 0.0)
    carried = decay ** (step + 1).float()
    means = []
    for block in torch.split(power, LEVEL_BLOCK_ROWS, dim=1):
        rows = block.shape[1]
        means.append(block @ weights[:rows, :rows].T + before[:, None] * carried[:rows])
        before = means[-1][:, -1]
    return torch.cat(means, dim=1), before


@dataclass
class TapsState:
    """`past` [b, (kernel - 1) * dilation, c]: the steps before the chunk."""

    past: Tensor


class CausalTaps(StreamingModule[TapsState]):
    """Dilated causal convolution over steps, as one matrix product on channels-last data (fast on CPUs)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.channels_in, self.kernel, self.dilation = channels_in, kernel, dilation
        self.linear = nn.Linear(kernel * channels_in, channels_out)

    def _init_state(self, batch: int) -> TapsState:
        weight = self.linear.weight
        length = (self.kernel - 1) * self.dilation
        return TapsState(past=torch.zeros(batch, length, self.channels_in, device=weight.device, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, t, c_in] -> [b, t, c_out]."""
        state = self.state_or_fresh(x.shape[0])
        steps = x.shape[1]
        x = torch.cat([state.past.to(x.dtype), x], dim=1)
        state.past = x[:, x.shape[1] - state.past.shape[1] :]
        taps = [x[:, k * self.dilation : k * self.dilation + steps] for k in range(self.kernel)]
        out: Tensor = self.linear(torch.cat(taps, dim=2))
        return out


class ResidualBlock(nn.Module):
    """x + W gelu(taps(norm(x))): all the context of the network comes from these."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.taps = CausalTaps(width, width, kernel, dilation)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, t, c] -> [b, t, c]."""
        update: Tensor = self.out(F.gelu(self.taps(self.norm(x))))
        return x + update


class HalveRate(nn.Module):
    """Joins neighbouring steps: [b, 2 t, c_in] -> [b, t, c_out]. Chunks hold whole rows, so pairs never split."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the number of steps."""
        out: Tensor = self.linear(rearrange(x, "b (t two) c -> b t (two c)", two=2))
        return out


@dataclass
class SpeechState:
    """`pending` [b, < 640]: samples of an unfinished row; `rows_to_drop`: delay rows still to come out."""

    pending: Tensor
    rows_to_drop: int


class SpeechEncoder(StreamingModule[SpeechState]):
    """Log-mel front end and dilated causal residual blocks at 50 and 25 Hz; see the module's text for the contract."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.log_mel = LogMel(config.mel_bands)
        self.stem = CausalTaps(config.mel_bands + 1, config.stem_width, config.kernel, 1)
        self.to_50hz = HalveRate(config.stem_width, config.width)
        self.blocks_50hz = nn.ModuleList(
            ResidualBlock(config.width, config.kernel, dilation) for dilation in config.dilations_50hz
        )
        self.to_25hz = HalveRate(config.width, config.width)
        self.blocks_25hz = nn.ModuleList(
            ResidualBlock(config.width, config.kernel, dilation) for dilation in config.dilations_25hz
        )
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.width)

    def _init_state(self, batch: int) -> SpeechState:
        pending = torch.zeros(batch, 0, device=self.out.weight.device)
        return SpeechState(pending=pending, rows_to_drop=self.config.delay_rows)

    def forward(self, samples: Tensor) -> Tensor:
        """samples [b, n] in -1..1 at 16 kHz -> rows [b, r, width] of unit mean square.

        Offline, r = ceil(n / 640): what comes after the last sample is taken for silence. While streaming, r is
        the number of rows whose look-ahead is complete; `flush` gives the rest.
        """
        if samples.ndim != 2:
            raise ValueError(f"samples must have shape [batch, samples], got {list(samples.shape)}")
        state = self.state_or_fresh(samples.shape[0])
        if self.state is None:
            samples = F.pad(samples, (0, self._silence_to_end(samples.shape[1])))
        samples = torch.cat([state.pending, samples.float()], dim=1)
        whole = samples.shape[1] - samples.shape[1] % SAMPLES_PER_ROW
        state.pending = samples[:, whole:]
        if whole == 0:
            return samples.new_zeros(samples.shape[0], 0, self.config.width)
        rows = self._rows(samples[:, :whole])
        dropped = min(state.rows_to_drop, rows.shape[1])
        state.rows_to_drop -= dropped
        return rows[:, dropped:]

    def flush(self) -> Tensor:
        """The rows still owed at the end of a stream [b, r, width]; `reset` before the next one."""
        if self.state is None:
            raise ValueError("flush() ends a stream, but this encoder is not streaming")
        pending = self.state.pending
        rows: Tensor = self(pending.new_zeros(pending.shape[0], self._silence_to_end(pending.shape[1])))
        return rows

    def _silence_to_end(self, samples: int) -> int:
        """Zeros that complete the last row and push the delayed rows out."""
        return -samples % SAMPLES_PER_ROW + self.config.delay_rows * SAMPLES_PER_ROW

    def _rows(self, samples: Tensor) -> Tensor:
        """The causal network: samples [b, 640 r] -> delayed rows [b, r, width]."""
        x = F.gelu(self.stem(self.log_mel(samples)))
        x = self.to_50hz(x)
        for block in self.blocks_50hz:
            x = block(x)
        x = self.to_25hz(x)
        for block in self.blocks_25hz:
            x = block(x)
        # The second norm fixes the size of what the transformer receives, whatever training does.
        return F.layer_norm(self.out(self.norm(x)), (self.config.width,))


def save_speech_encoder(encoder: SpeechEncoder, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Write the weights as float16 with the config and `notes` in the metadata; appears at `path` all at once."""
    tensors = {name: value.detach().half().contiguous() for name, value in encoder.state_dict().items()}
    metadata = {"config": json.dumps(asdict(encoder.config)), **(notes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors writes for the owner only
    partial.replace(path)


def load_speech_encoder(path: Path | str) -> SpeechEncoder:
    """The encoder of a file of `save_speech_encoder`, in float32, in evaluation mode and without gradients."""
    with safe_open(str(path), framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
    if "config" not in metadata:
        raise ValueError(f"{path} holds no speech encoder: its metadata has no 'config'")
    fields: dict[str, Any] = json.loads(metadata["config"])
    for name in ("dilations_50hz", "dilations_25hz"):
        fields[name] = tuple(fields[name])
    encoder = SpeechEncoder(SpeechEncoderConfig(**fields))
    encoder.load_state_dict(tensors)
    return encoder.eval().requires_grad_(False)
