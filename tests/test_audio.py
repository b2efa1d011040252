"""Streaming speech encoder: any chunking equals one shot, the look-ahead is a hard limit, files round-trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lipstream.models.audio import (
    SAMPLES_PER_ROW,
    SpeechEncoder,
    load_speech_encoder,
    mel_filters,
    running_power,
    save_speech_encoder,
    speech_config,
)
from lipstream.training import speech


@pytest.fixture(name="encoder")
def _encoder() -> SpeechEncoder:
    torch.manual_seed(0)
    return SpeechEncoder(speech_config("test")).eval().requires_grad_(False)


def _samples(count: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    loudness = torch.linspace(0.01, 0.5, count)
    return torch.randn(batch, count, generator=generator).clamp(-1, 1) * loudness


@pytest.mark.parametrize("seed", range(4))
def test_any_chunking_equals_one_shot(encoder: SpeechEncoder, seed: int) -> None:
    samples = _samples(640 * 90 + 123)
    whole = encoder(samples)
    rng = np.random.default_rng(seed)
    rows, position = [], 0
    with encoder.streaming(batch=2):
        while position < samples.shape[1]:
            size = int(rng.integers(0, [50, 2_000, 9_000, 30_000][seed]))
            rows.append(encoder(samples[:, position : position + size]))
            position += size
        rows.append(encoder.flush())
    assert whole.shape == (2, 91, encoder.config.width)
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=1e-4, rtol=0)


def test_rows_are_certain_after_their_lookahead(encoder: SpeechEncoder) -> None:
    samples = _samples(640 * 40)
    changed_row = 20
    first_changed_sample = changed_row * SAMPLES_PER_ROW + encoder.config.lookahead_samples
    other = samples.clone()
    other[:, first_changed_sample:] = _samples(other.shape[1] - first_changed_sample + 1)[:, 1:]
    difference = (encoder(other) - encoder(samples)).abs().amax(dim=(0, 2))
    assert difference[: changed_row + 1].max() == 0
    assert difference[changed_row + 1] > 0


def test_a_stream_gives_each_row_as_soon_as_its_lookahead_is_complete(encoder: SpeechEncoder) -> None:
    with encoder.streaming(batch=1):
        assert encoder(_samples(encoder.config.lookahead_samples - 1, batch=1)).shape[1] == 0
        assert encoder(torch.zeros(1, 1)).shape[1] == 1
        assert encoder.flush().shape[1] == encoder.config.delay_rows
    with pytest.raises(ValueError, match="not streaming"):
        encoder.flush()


def test_snapshot_rolls_a_stream_back(encoder: SpeechEncoder) -> None:
    samples = _samples(640 * 30, batch=1)
    with encoder.streaming(batch=1):
        encoder(samples[:, :7_000])
        saved = encoder.snapshot()
        once = encoder(samples[:, 7_000:])
        encoder.restore(saved)
        torch.testing.assert_close(encoder(samples[:, 7_000:]), once, atol=0, rtol=0)


@pytest.mark.parametrize(("count", "rows"), [(0, 0), (1, 1), (640, 1), (641, 2)])
def test_offline_gives_one_row_per_started_pixel_frame(encoder: SpeechEncoder, count: int, rows: int) -> None:
    assert encoder(torch.zeros(1, count)).shape == (1, rows, encoder.config.width)


def test_silence_and_clipping_stay_finite(encoder: SpeechEncoder) -> None:
    assert encoder(torch.zeros(1, 16_000)).isfinite().all()
    assert encoder(torch.ones(1, 16_000)).isfinite().all()


def test_running_power_equals_its_recursion() -> None:
    power, mean = torch.rand(1, 150), torch.tensor([0.3])
    means, last = running_power(power, mean)
    decay = float(torch.exp(torch.tensor(-0.04 / 2.0)))
    for row in range(150):
        mean = decay * mean + (1 - decay) * power[:, row]
        torch.testing.assert_close(means[:, row], mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, mean, atol=1e-5, rtol=1e-5)


def test_every_mel_band_hears_something() -> None:
    filters = mel_filters(80)
    assert filters.shape == (80, 257)
    torch.testing.assert_close(filters.sum(1), torch.ones(80))


def test_weights_round_trip_through_a_file(encoder: SpeechEncoder, tmp_path: Path) -> None:
    path = tmp_path / "speech.safetensors"
    save_speech_encoder(encoder, path, {"teacher": "none"})
    loaded = load_speech_encoder(path)
    assert loaded.config == encoder.config
    samples = _samples(6_400)
    torch.testing.assert_close(loaded(samples), encoder(samples), atol=2e-2, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["speech.safetensors"]


def test_the_pocket_size_keeps_its_promises() -> None:
    config = speech_config("pocket")
    parameters = sum(p.numel() for p in SpeechEncoder(config).parameters())
    assert config.lookahead_ms <= 200
    assert 2e6 < parameters < 4e6
    with pytest.raises(ValueError, match="lookahead_samples"):
        type(config)(lookahead_samples=1_000)


def _tiny_corpus(path: Path) -> None:
    """Prepared utterances of random sound, as `prepare_corpus` would write them."""
    rng = np.random.default_rng(0)
    for name in ("train_one_0.0", "train_two_0.0", "test_real_0.0", "train_kept_0.0", "train_kept_0.1"):
        samples = rng.normal(0, 0.1, 640 * 40).clip(-1, 1)
        np.savez(
            path / f"{name}.npz",
            wav=(samples * 32767).astype(np.int16),
            features=rng.normal(size=(40, 12)).astype(np.float16),
            labels=rng.integers(-1, 22, (40, 4)).astype(np.int8),
            prosody=speech.prosody(samples).astype(np.float16),
        )


def test_distillation_resumes_exactly_where_it_stopped(tmp_path: Path) -> None:
    _tiny_corpus(tmp_path)

    def run(name: str, steps: int) -> speech.Distiller:
        settings = speech.SpeechTraining(
            corpus=tmp_path,
            checkpoint=tmp_path / name,
            weights=tmp_path / name / "speech.safetensors",
            steps=steps,
            batch=2,
            rows=10,
            target_dims=4,
            warmup_steps=100,
            held_out=("kept",),
        )
        return speech.train(settings, speech_config("test"))

    whole = run("whole", 3)
    run("parts", 1)
    resumed = run("parts", 3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=0, rtol=0)
    assert (tmp_path / "parts" / "speech.safetensors").exists()
    assert "kept" in (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_projection_keeps_what_the_teacher_says() -> None:
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 12)
    projection = speech.Projection.fit(features, dims=3)
    back = projection(features) @ projection.inverse + projection.mean
    torch.testing.assert_close(back, features, atol=1e-2, rtol=1e-2)


def test_augmentation_is_repeatable_and_bounded() -> None:
    samples = _samples(8_000, batch=4)
    damaged = [speech.augment(samples, torch.Generator().manual_seed(5)) for _ in range(2)]
    torch.testing.assert_close(damaged[0], damaged[1], atol=0, rtol=0)
    assert damaged[0].abs().max() <= 1
    assert damaged[0].shape == samples.shape
