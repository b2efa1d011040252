"""The official speech features, live: the same network over a sliding window with a bounded look-ahead.

The offline features (`lipstream.models.wav2vec_features`, spec section 1.6) need the whole file in three places.
Here each has the nearest thing that a stream can know:

* normalisation and the first convolution's group norm: statistics of all speech heard so far; the first two seconds
  suffer most, unless `prime` gives the statistics of earlier speech into the same microphone;
* the resampling grid: exact, because padded speech has 2 * rows - 1 CNN frames, so row r is CNN frame 2 r of any file;
* attention and the 128-tap positional convolution: `past_rows` before and `lookahead_rows` after the rows that leave.

If a window holds the whole file, nothing differs. Otherwise the rows are measurably others than the offline ones:
`tests/measure_windowed_features.py` measures by how much. With random weights of the official size and 200 ms of
look-ahead a row is 0.40 of the rows' spread away (median; cosine 0.92). What the trained network loses, and whether
lips suffer, was not measured: its weights were not at hand.

    live = WindowedSpeechFeatures(features, WindowConfig())
    with live.streaming(batch=1):
        live.prime(earlier_speech)     # optional
        for samples in chunks:
            rows = live(samples)       # [1, 0 or 9 or 12 ..., 10752]: the chunks that are complete by now
        rows = live.flush()            # the rest of the file's ceil(n / 640) rows

Shapes: b batch, n samples at 16 kHz, f CNN frames (50 Hz), r rows (25 Hz), c channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lipstream.models.audio import SAMPLE_RATE, SAMPLES_PER_ROW
from lipstream.models.wav2vec_features import FRAMES_PER_ROW, VARIANCE_FLOOR, FrameStatistics, SpeechFeatures
from lipstream.streaming.base import StreamingModule

MAX_LOOKAHEAD_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Which rows leave together and what they see; the defaults fit the diffusion chunks of 3 latent frames.

    `lookahead_rows` is a delay of 40 ms each, counted from the end of the last row that leaves.
    """

    first_rows: int = 9
    hop_rows: int = 12
    past_rows: int = 100
    lookahead_rows: int = 5

    def __post_init__(self) -> None:
        if min(self.first_rows, self.hop_rows, self.past_rows) < 1 or self.lookahead_rows < 0:
            raise ValueError(f"first_rows, hop_rows and past_rows must be at least 1, lookahead_rows 0: {self}")

    def heard_rows(self, rows: int) -> int:
        """Rows of speech that have to be heard before the first `rows` rows have left."""
        chunks = max(0, math.ceil((rows - self.first_rows) / self.hop_rows))
        return self.first_rows + chunks * self.hop_rows + self.lookahead_rows if rows else 0

    @property
    def lookahead_ms(self) -> float:
        """Milliseconds of speech after a chunk's last frame that its rows wait for."""
        return 1000 * self.lookahead_rows * SAMPLES_PER_ROW / SAMPLE_RATE


def window_of(lookahead_seconds: float) -> WindowConfig:
    """The window that looks so far ahead, rounded up to whole rows.

    Raises:
        ValueError: negative, or more than a minute.
    """
    if not 0 <= lookahead_seconds <= MAX_LOOKAHEAD_SECONDS:
        raise ValueError(
            f"speech look-ahead must be 0 to {MAX_LOOKAHEAD_SECONDS} seconds, got {lookahead_seconds}; leave it out to "
            "hear the whole file first"
        )
    return WindowConfig(lookahead_rows=math.ceil(round(lookahead_seconds * SAMPLE_RATE / SAMPLES_PER_ROW, 6)))


@dataclass
class WindowState:
    """What a stream remembers; statistics are of the samples before normalisation, in float64.

    `recent` [b, n] begins at row `first_row`; `sums` [b, 2] (samples, squares) cover `counted_samples`;
    `step_sums` [b, 2, c] (first convolution, squares) cover `counted_steps`; both also cover the primed ones.
    """

    recent: Tensor
    first_row: int
    emitted_rows: int
    sums: Tensor
    counted_samples: int
    step_sums: Tensor
    counted_steps: int
    primed_samples: int = 0
    primed_steps: int = 0

    @property
    def heard_samples(self) -> int:
        """Samples of the stream so far."""
        return self.first_row * SAMPLES_PER_ROW + self.recent.shape[1]

    def between(self, start: int, stop: int) -> Tensor:
        """Samples [b, stop - start] by their index in the stream."""
        origin = self.first_row * SAMPLES_PER_ROW
        return self.recent[:, start - origin : stop - origin]

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Of all counted samples, [b] each, float64."""
        mean, square = (self.sums / (self.counted_samples + self.primed_samples)).unbind(1)
        variance = (square - mean.square()).clamp_min(0)
        return mean, (variance + VARIANCE_FLOOR).sqrt()


class WindowedSpeechFeatures(StreamingModule[WindowState]):
    """Rows of the official kind from a stream of samples; any chunking of the samples gives the same rows."""

    def __init__(self, features: SpeechFeatures, window: WindowConfig) -> None:
        super().__init__()
        self.features = features
        self.window = window

    def _init_state(self, batch: int) -> WindowState:
        weight = self.features.network.feature_extractor.conv_layers[0].conv.weight
        zeros = torch.zeros(batch, 2, weight.shape[0], dtype=torch.float64, device=weight.device)
        return WindowState(
            recent=torch.zeros(batch, 0, device=weight.device),
            first_row=0,
            emitted_rows=0,
            sums=zeros[..., 0].clone(),
            counted_samples=0,
            step_sums=zeros,
            counted_steps=0,
        )

    def forward(self, samples: Tensor) -> Tensor:
        """samples [b, n] in -1..1 -> rows [b, r, feature_dim].

        While streaming, r counts the rows of chunks whose look-ahead is complete, and `flush` gives the rest.
        Outside of `streaming` the call is the whole stream: r = ceil(n / 640).
        """
        if samples.ndim != 2:
            raise ValueError(f"samples must have shape [batch, samples], got {list(samples.shape)}")
        state = self.state_or_fresh(samples.shape[0])
        state.recent = torch.cat([state.recent, samples.float()], dim=1)
        rows = self._complete(state)
        return rows if self.state is not None else torch.cat([rows, self._rest(state)], dim=1)

    def prime(self, samples: Tensor) -> None:
        """Begin the statistics with earlier speech [b, n] of the same voice and microphone; no rows come of it.

        Raises:
            ValueError: not streaming, or the stream has begun.
        """
        state = self.state
        if state is None or state.heard_samples or samples.ndim != 2:
            raise ValueError("prime() takes samples [batch, samples] in `streaming`, before the stream's first ones")
        steps = self.features.first_convolution(samples.float())
        state.sums, state.step_sums = state.sums + _sums(samples), state.step_sums + _sums(steps)
        state.primed_samples += samples.shape[1]
        state.primed_steps += steps.shape[2]

    def flush(self) -> Tensor:
        """The rows still owed at the end of a stream [b, r, feature_dim]; `reset` before the next one."""
        if self.state is None:
            raise ValueError("flush() ends a stream, but these features are not streaming")
        return self._rest(self.state)

    def _complete(self, state: WindowState) -> Tensor:
        """Rows of all chunks whose look-ahead was heard."""
        parts = [self._no_rows(state)]
        while True:
            stop = state.emitted_rows + self._chunk_rows(state)
            last = stop + self.window.lookahead_rows
            if last * SAMPLES_PER_ROW > state.heard_samples:
                return torch.cat(parts, dim=1)
            self._count_samples(state, last * SAMPLES_PER_ROW)
            parts.append(self._emit(state, stop, last))

    def _rest(self, state: WindowState) -> Tensor:
        """Rows up to the end of the speech; zeros after normalisation complete the last one, as offline."""
        last = math.ceil(state.heard_samples / SAMPLES_PER_ROW)
        parts = [self._no_rows(state)]
        if state.emitted_rows < last:
            self._count_samples(state, state.heard_samples)
            mean, _ = state.mean_and_deviation()
            silence = mean.float()[:, None].expand(-1, last * SAMPLES_PER_ROW - state.heard_samples)
            state.recent = torch.cat([state.recent, silence], dim=1)
        while state.emitted_rows < last:
            parts.append(self._emit(state, min(state.emitted_rows + self._chunk_rows(state), last), last))
        return torch.cat(parts, dim=1)

    def _chunk_rows(self, state: WindowState) -> int:
        return self.window.hop_rows if state.emitted_rows else self.window.first_rows

    def _no_rows(self, state: WindowState) -> Tensor:
        return state.recent.new_zeros(len(state.recent), 0, self.features.config.feature_dim)

    def _count_samples(self, state: WindowState, stop: int) -> None:
        """Add the samples before `stop` to the loudness statistics."""
        state.sums = state.sums + _sums(state.between(state.counted_samples, stop))
        state.counted_samples = stop

    def _count_steps(self, state: WindowState, stop: int) -> None:
        """Add the first convolution's steps that end before sample `stop` to its statistics."""
        config = self.features.config
        kernel, stride = config.conv_kernels[0], config.conv_strides[0]
        steps = (stop - kernel) // stride + 1
        if steps <= state.counted_steps:
            return
        samples = state.between(state.counted_steps * stride, (steps - 1) * stride + kernel)
        state.step_sums = state.step_sums + _sums(self.features.first_convolution(samples))
        state.counted_steps = steps

    def _emit(self, state: WindowState, stop: int, last: int) -> Tensor:
        """Rows from the last emitted one to `stop`, seen in a window that ends at row `last`."""
        self._count_steps(state, last * SAMPLES_PER_ROW)
        start = max(0, state.emitted_rows - self.window.past_rows)
        mean, deviation = state.mean_and_deviation()
        samples = state.between(start * SAMPLES_PER_ROW, last * SAMPLES_PER_ROW).double()
        normalised = ((samples - mean[:, None]) / deviation[:, None]).float()
        frames = self.features.cnn(normalised, self._statistics(state, mean, deviation))
        rows = self.features.encode(frames[:, ::FRAMES_PER_ROW])
        rows = rows[:, state.emitted_rows - start : stop - start]
        state.emitted_rows = stop
        # One row more than the next window needs: the first convolution's next step may begin before it.
        keep = max(0, stop - self.window.past_rows - 1)
        state.recent = state.between(keep * SAMPLES_PER_ROW, state.heard_samples).clone()
        state.first_row = keep
        return rows

    def _statistics(self, state: WindowState, mean: Tensor, deviation: Tensor) -> FrameStatistics:
        """Statistics of the first convolution of *normalised* samples, from those of the samples as they came.

        The convolution is linear and has no bias: conv((x - mean) / deviation) = (conv(x) - mean * taps) / deviation.
        """
        taps = self.features.network.feature_extractor.conv_layers[0].conv.weight.double().sum((1, 2))
        raw_mean, square = (state.step_sums / (state.counted_steps + state.primed_steps)).unbind(1)
        variance = (square - raw_mean.square()).clamp_min(0)
        centred = (raw_mean - mean[:, None] * taps) / deviation[:, None]
        return FrameStatistics(centred.float(), (variance / deviation[:, None].square()).float())


def _sums(x: Tensor) -> Tensor:
    """Sums of values and of their squares over time, float64: [b, ..., t] -> [b, 2, ...]."""
    wide = x.double()
    return torch.stack([wide.sum(-1), wide.square().sum(-1)], dim=1)


def relative_error(rows: Tensor, reference: Tensor) -> Tensor:
    """Distance of each row from its reference, relative to the reference's own spread: [b, r, d] -> [b, r].

    0 is equal; about 1.4 is what two unrelated rows have.
    """
    spread = (reference - reference.mean(1, keepdim=True)).square().sum(2).mean(1, keepdim=True)
    return ((rows - reference).square().sum(2) / spread).sqrt()


def agreement(rows: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each row with its reference, both without the reference's mean row: [b, r, d] -> [b, r]."""
    mean = reference.mean(1, keepdim=True)
    return F.cosine_similarity(rows - mean, reference - mean, dim=2)
