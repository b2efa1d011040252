"""Windowed speech features: any chunking equals one shot, the look-ahead is a hard limit, a whole window is offline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from lipstream.models.wav2vec_features import normalise
from lipstream.models.wav2vec_windowed import (
    WindowConfig,
    WindowedSpeechFeatures,
    agreement,
    relative_error,
)
from wav2vec_networks import golden_features, random_features

SMALL = WindowConfig(first_rows=3, hop_rows=4, past_rows=10, lookahead_rows=2)


def live_features(window: WindowConfig = SMALL) -> WindowedSpeechFeatures:
    return WindowedSpeechFeatures(random_features(), window)


def speech(samples: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return torch.randn(batch, samples, generator=generator) * torch.linspace(0.02, 0.3, samples) + 0.01


@pytest.mark.parametrize("largest_chunk", [300, 2_000, 20_000])
def test_any_chunking_equals_one_shot(largest_chunk: int) -> None:
    live, samples = live_features(), speech(640 * 41 + 123, batch=2)
    whole = live(samples)
    rng = np.random.default_rng(largest_chunk)
    rows, position = [], 0
    with live.streaming(batch=2):
        while position < samples.shape[1]:
            size = int(rng.integers(0, largest_chunk))
            rows.append(live(samples[:, position : position + size]))
            position += size
        rows.append(live.flush())
    assert whole.shape == (2, 42, 128)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [640 * 40, 640 * 40 + 1, 640 * 40 - 200, 500])
def test_a_window_over_the_whole_file_gives_the_offline_rows(samples: int) -> None:
    features = golden_features()
    live = WindowedSpeechFeatures(features, WindowConfig(past_rows=99, lookahead_rows=99))
    audio = speech(samples)
    rows = -(-samples // 640)
    torch.testing.assert_close(live(audio), features(audio, rows), atol=1e-4, rtol=0)


def test_rows_leave_with_their_chunk_and_its_lookahead() -> None:
    live, samples = live_features(), speech(640 * 20)
    with live.streaming(batch=1):
        assert live(samples[:, : 640 * 5 - 1]).shape[1] == 0
        assert live(samples[:, 640 * 5 - 1 : 640 * 5]).shape[1] == 3
        assert live(samples[:, 640 * 5 : 640 * 9 - 1]).shape[1] == 0
        assert live(samples[:, 640 * 9 - 1 :]).shape[1] == 12
        assert live.flush().shape[1] == 5
        assert live.flush().shape[1] == 0
    assert SMALL.lookahead_ms == 80
    with pytest.raises(ValueError, match="not streaming"):
        live.flush()


def test_later_speech_has_no_influence() -> None:
    live, samples = live_features(), speech(640 * 30)
    with live.streaming(batch=1):
        rows = live(samples[:, : 640 * 9])
    assert rows.shape[1] == 7
    other = samples.clone()
    other[:, 640 * 9 :] = 0.5
    torch.testing.assert_close(live(other)[:, :7], rows, atol=1e-6, rtol=0)
    assert (live(other)[:, 7:11] - live(samples)[:, 7:11]).abs().max() > 1e-3


def test_memory_is_the_window_however_long_the_stream() -> None:
    live = live_features()
    with live.streaming(batch=1):
        for _ in range(50):
            live(speech(2_500))
        state = live.state
        assert state is not None and state.heard_samples == 125_000
        held_rows = state.recent.shape[1] / 640
        assert held_rows <= SMALL.past_rows + SMALL.hop_rows + SMALL.lookahead_rows + 2


def test_snapshot_rolls_a_stream_back() -> None:
    live, samples = live_features(), speech(640 * 30)
    with live.streaming(batch=1):
        live(samples[:, :9_000])
        saved = live.snapshot()
        once = live(samples[:, 9_000:])
        live.restore(saved)
        assert torch.equal(live(samples[:, 9_000:]), once)


def test_two_streams_share_the_weights() -> None:
    live, samples = live_features(), speech(640 * 12)
    twin = live.stream_view(batch=1)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in live.parameters()}
    with live.streaming(batch=1):
        live(speech(5_000))
        mixed = torch.cat([twin(samples), twin.flush()], dim=1)
    torch.testing.assert_close(mixed, live(samples), atol=1e-6, rtol=0)


def test_primed_statistics_are_there_from_the_first_row() -> None:
    """Primed with a recording, a stream begins with the statistics that offline features have of that recording."""
    features = random_features()
    live, earlier = WindowedSpeechFeatures(features, SMALL), speech(640 * 100)
    offline = features.frame_statistics(normalise(earlier))
    with live.streaming(batch=1):
        live.prime(earlier)
        state = live.state
        assert state is not None
        mean, deviation = state.mean_and_deviation()
        statistics = live._statistics(state, mean, deviation)
        torch.testing.assert_close(statistics, offline, atol=1e-4, rtol=1e-3)
        quiet = 0.1 * speech(640 * 5)
        primed = live(quiet)
        with pytest.raises(ValueError, match="before the stream's first"):
            live.prime(earlier)
    with live.streaming(batch=1):
        assert (live(quiet) - primed).abs().mean() > 0.1
    with pytest.raises(ValueError, match="in `streaming`"):
        live.prime(earlier)


def test_silence_is_finite_and_loudness_does_not_matter() -> None:
    live, samples = live_features(), speech(640 * 25)
    assert live(torch.zeros(1, 640 * 12)).isfinite().all()
    # The statistics follow the stream, so gain and offset leave the rows alone up to the variance floor.
    torch.testing.assert_close(live(3 * samples + 0.05), live(samples), atol=2e-3, rtol=0)


def test_measures_of_deviation() -> None:
    reference = torch.randn(1, 2_000, 64)
    assert relative_error(reference, reference).max() == 0 and agreement(reference, reference).min() > 0.9999
    unrelated = torch.randn(1, 2_000, 64)
    assert abs(relative_error(unrelated, reference).mean() - 2**0.5) < 0.05
    assert agreement(unrelated, reference).mean().abs() < 0.05


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WindowConfig(past_rows=0)
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        live_features()(torch.zeros(100))
