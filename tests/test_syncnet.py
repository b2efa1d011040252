"""SyncNet: golden cepstra, windows and scores, the official names, strict loading, the whole clip at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_model import vectors
from lipstream.checkpoints.encoders import load_syncnet
from lipstream.models import syncnet
from lipstream.models.mfcc import mfcc, mfcc_frames
from lipstream.models.syncnet import (
    FLAVOURS,
    SyncNet,
    audio_window_indices,
    audio_windows,
    evaluation_distances,
    evaluation_score,
    evaluation_windows,
    lip_window_indices,
    prepare_frames,
    reward_score,
    reward_windows,
)

# Places of the layers with weights in the official file's four groups.
LIP_LAYERS = {"conv": (0, 4, 8, 11, 14, 18), "norm": (1, 5, 9, 12, 15, 19)}
AUDIO_LAYERS = LIP_LAYERS
NORM = ("weight", "bias", "running_mean", "running_var")


def random_network(seed: int = 0) -> SyncNet:
    """Small and with norms that do something."""
    torch.manual_seed(seed)
    network = SyncNet(FLAVOURS["test"]).eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    return network


def test_golden_cepstra_and_windows() -> None:
    data = vectors("syncnet")
    cepstra = mfcc(data["in.waveform"])
    torch.testing.assert_close(cepstra, data["out.mfcc_reward_13xM"], atol=1e-3, rtol=0)
    as_16_bit = (data["in.waveform"] * 32_768).round().to(torch.int16)
    evaluation = data["out.mfcc_evaluation_13xM_float64"].float()
    torch.testing.assert_close(mfcc(as_16_bit), evaluation, atol=1e-3, rtol=0)
    for samples, frames, windows in data["out.mfcc_frame_count_table_samples_frames_windows"].tolist():
        assert mfcc_frames(samples) == frames == mfcc(torch.zeros(samples)).shape[1]
        assert (len(audio_window_indices(frames)) if frames >= 20 else 0) == windows
    assert torch.equal(audio_window_indices(323), data["out.audio_window_mfcc_indices"])
    assert torch.equal(lip_window_indices(81), data["out.lip_window_frame_indices_81"])
    windows = audio_windows(cepstra)[[0, 1, 2, -1]]
    torch.testing.assert_close(windows, data["out.audio_windows_first3_last1"], atol=1e-3, rtol=0)


def test_golden_pictures() -> None:
    data = vectors("syncnet")
    pictures = prepare_frames(data["in.video_uint8_RGB"])
    assert pictures.shape == (3, 7, 224, 224)
    golden = data["out.video_prepared_BGR_224_every16"]
    torch.testing.assert_close(pictures[None, :, :, ::16, ::16], golden, atol=1e-4, rtol=0)


def test_golden_reward() -> None:
    data = vectors("syncnet")
    score = reward_score(data["in.lip_embeddings"], data["in.audio_embeddings"])
    torch.testing.assert_close(score.curve, data["out.reward.mean_distance_per_shift_-15_15"], atol=1e-5, rtol=0)
    torch.testing.assert_close(score.confidence, data["out.reward.confidence"], atol=1e-5, rtol=0)
    torch.testing.assert_close(score.distance, data["out.reward.min_distance"], atol=1e-5, rtol=0)
    assert score.offset == data["out.reward.argmin_shift"] == 3
    constant = torch.ones(60, 64)
    assert reward_score(constant, constant).confidence == data["out.reward.confidence_identical_constant_embeddings"]
    floor = torch.tensor(1e-6 * 64**0.5)  # the epsilon of every component: equal vectors are not at distance 0
    torch.testing.assert_close(reward_score(constant, constant).distance, floor, atol=0, rtol=0.1)
    assert reward_windows(81, 51_840) == data["out.reward.windows_used_for_81_frames_51840_samples"]


def test_golden_evaluation() -> None:
    data = vectors("syncnet")
    lips, speech = data["in.lip_embeddings"], data["in.audio_embeddings"]
    golden = data["out.evaluation.distance_matrix_60x31"]
    torch.testing.assert_close(evaluation_distances(lips, speech), golden, atol=1e-5, rtol=0)
    score = evaluation_score(lips, speech)
    curve = data["out.evaluation.mean_distance_per_offset_index_0_30"]
    torch.testing.assert_close(score.curve, curve, atol=1e-5, rtol=0)
    torch.testing.assert_close(score.confidence, data["out.evaluation.confidence"], atol=1e-5, rtol=0)
    torch.testing.assert_close(score.distance, data["out.evaluation.min_distance"], atol=1e-5, rtol=0)
    assert score.offset == data["out.evaluation.av_offset"] == -3
    assert evaluation_windows(81, 51_840) == data["out.evaluation.frames_used_for_81_frames_51840_samples"]


def test_window_counts_differ_between_the_scores() -> None:
    """Section 11, correction 7: the evaluation has one lip vector fewer."""
    assert (reward_windows(50, 51_840), evaluation_windows(50, 51_840)) == (46, 45)
    assert reward_windows(5, 3_440) == 1
    with pytest.raises(ValueError, match="more than 5 frames"):
        evaluation_windows(81, 640 * 5 + 639)


@pytest.mark.parametrize("late", [-7, 0, 1, 15])
def test_speech_that_is_late_moves_the_minimum(late: int) -> None:
    """Spec anchor 11; the two scores count in opposite directions."""
    torch.manual_seed(0)
    track = torch.randn(100, 32)
    lips, speech = track[20:70], track[20 - late : 70 - late]
    reward, evaluation = reward_score(lips, speech), evaluation_score(lips, speech)
    assert reward.offset == late and evaluation.offset == -late
    assert reward.distance < 1e-4 < 3 < reward.confidence


def test_constant_video_scores_zero() -> None:
    """Spec anchor 11, through the network: still pictures and a steady tone have no best offset."""
    network = random_network()
    still = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(30, 3, 16, 16)
    tone = torch.sin(2 * torch.pi * 100 / 16_000 * torch.arange(30 * 640))  # a whole number of periods per window
    lips = network.embed_lips(prepare_frames(still)[None])[0]
    speech = network.embed_speech(audio_windows(mfcc(tone)[:, 1:-1]))
    assert reward_score(lips, speech).confidence < 1e-3 * reward_score(lips, speech).distance


@pytest.mark.parametrize("block", [32, 3, 1])
def test_whole_clip_at_once_equals_window_by_window(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncnet, "BLOCK_VECTORS", block)
    network = random_network()
    pictures = prepare_frames(torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8))
    at_once = network.embed_lips(pictures[None])[0]
    windows = torch.stack([pictures[:, rows] for rows in lip_window_indices(8)])
    one_by_one, speech = network(windows, torch.randn(4, 1, 13, 20))
    torch.testing.assert_close(at_once, one_by_one, atol=1e-5, rtol=0)
    assert at_once.shape == speech.shape == (4, 24)


def test_official_names_and_shapes() -> None:
    with torch.device("meta"):
        state = SyncNet(FLAVOURS["official"]).state_dict()
    expected: set[str] = set()
    for group, layers in {"netcnnlip": LIP_LAYERS, "netcnnaud": AUDIO_LAYERS}.items():
        expected |= {f"{group}.{place}.{part}" for place in layers["conv"] for part in ("weight", "bias")}
        expected |= {f"{group}.{place}.{part}" for place in layers["norm"] for part in NORM}
    for group in ("netfclip", "netfcaud"):
        expected |= {f"{group}.{place}.{part}" for place in (0, 3) for part in ("weight", "bias")}
        expected |= {f"{group}.1.{part}" for part in NORM}
    assert {key for key in state if not key.endswith("num_batches_tracked")} == expected
    shapes = {
        "netcnnlip.0.weight": (96, 3, 5, 7, 7), "netcnnlip.4.weight": (256, 96, 1, 5, 5),
        "netcnnlip.14.weight": (256, 256, 1, 3, 3), "netcnnlip.18.weight": (512, 256, 1, 6, 6),
        "netcnnaud.0.weight": (64, 1, 3, 3), "netcnnaud.8.weight": (384, 192, 3, 3),
        "netcnnaud.18.weight": (512, 256, 5, 4), "netfclip.3.weight": (1024, 512), "netfcaud.0.weight": (512, 512),
    }  # fmt: skip
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_official_sizes_run() -> None:
    network = SyncNet(FLAVOURS["official"]).eval().requires_grad_(False)
    lips, speech = network(torch.zeros(1, 3, 5, 224, 224), torch.zeros(1, 1, 13, 20))
    assert lips.shape == speech.shape == (1, 1024)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("counters", [True, False])
def test_file_loads_strictly(counters: bool, zipped: bool, tmp_path: Path) -> None:
    """The public file has torch's old container and no counters."""
    path, network = tmp_path / "syncnet_v2.model", random_network()
    state = {key: value for key, value in network.state_dict().items() if counters or "num_batches" not in key}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = load_syncnet(path)
    windows = torch.randn(2, 1, 13, 20)
    assert not loaded.training and torch.equal(loaded.embed_speech(windows), network.embed_speech(windows))
    state.pop("netfclip.3.bias")
    torch.save(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing: netfclip.3.bias; 1 unknown: extra"):
        load_syncnet(path)


def test_scores_have_gradients() -> None:
    torch.manual_seed(0)
    lips, speech = torch.randn(40, 8, requires_grad=True), torch.randn(40, 8)
    for score in (reward_score(lips, speech), evaluation_score(lips, speech)):
        (gradient,) = torch.autograd.grad(score.confidence, lips)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mfcc(torch.zeros(2, 100)), "one channel"),
        (lambda: audio_window_indices(19), "at least 20"),
        (lambda: prepare_frames(torch.zeros(3, 5, 8, 8)), r"\[f, 3, h, w\]"),
        (lambda: random_network().embed_lips(torch.zeros(1, 3, 4, 224, 224)), "at least 5"),
        (lambda: reward_score(torch.zeros(15, 4), torch.zeros(60, 4)), "at least 16"),
        (lambda: evaluation_score(torch.zeros(15, 4), torch.zeros(15, 5)), "one d"),
    ],
)
def test_wrong_input_is_named(call: object, text: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=text):
        call()


def test_silence_is_finite() -> None:
    cepstra: Tensor = mfcc(torch.zeros(16_000))
    assert cepstra.isfinite().all()
