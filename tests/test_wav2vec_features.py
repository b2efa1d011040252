"""Official speech features: golden vectors, parity with the stock network, strict loading, row rules."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from golden_model import vectors
from lipstream.checkpoints.encoders import load_speech_features
from lipstream.checkpoints.keys_wav2vec2 import FORMATS, PUBLIC, RECOGNISER_HEAD
from lipstream.models import extras, wav2vec_features
from lipstream.models.wav2vec_features import (
    FLAVOURS,
    SpeechFeatures,
    Wav2VecConfig,
    normalise,
    rows_for,
    to_25hz,
)
from wav2vec_networks import golden_features, golden_weights, random_features

transformers = pytest.importorskip("transformers")
PUBLIC_FILE_BYTES = 377_607_901  # wav2vec2-base-960h/model.safetensors, spec section 0.1
RECOGNISER_HEAD_NUMBERS = 32 * 768 + 32


def write_folder(folder: Path, tensors: dict[str, Tensor], **changes: object) -> Path:
    """A Hub-style folder of the `test` size."""
    config = {
        "model_type": "wav2vec2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "conv_dim": [24] * 7, "feat_extract_norm": "group", "vocab_size": 32,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_features(attention: wav2vec_features.Attention) -> None:
    data, features = vectors("audio_features"), golden_features(attention)
    speech = data["in.waveform"][None]
    normalised = normalise(speech)
    torch.testing.assert_close(normalised[:, ::16], data["out.normalised_waveform_every16"], atol=1e-5, rtol=0)
    assert rows_for(speech.shape[1], 69) == data["out.A.seq_len"] == 78
    assert rows_for(speech.shape[1], 81) == data["out.B.seq_len"] == 81
    whole = data["out.A.audio_embedding_all"]
    torch.testing.assert_close(features(speech, 69), whole[:, :69], atol=1e-4, rtol=0)
    torch.testing.assert_close(features.rows(normalised, 78), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(features(speech, 81), data["out.B.audio_embedding"], atol=1e-4, rtol=0)


def test_golden_convolutions_and_their_resampling() -> None:
    data, features = vectors("audio_features"), golden_features()
    padded = torch.nn.functional.pad(normalise(data["in.waveform"][None]), (0, 78 * 640 - 49_877))
    frames = features.cnn(padded, features.frame_statistics(padded))
    torch.testing.assert_close(frames, data["out.A.cnn_features"], atol=1e-4, rtol=0)
    # Why windows may take every second frame: of padded speech there are always 2 rows - 1.
    assert torch.equal(to_25hz(frames, 78), frames[:, ::2])


def test_interpolating_after_the_transformer_is_something_else() -> None:
    """The mistake that a stock model invites; the golden file holds its result."""
    data, features = vectors("audio_features"), golden_features()
    padded = torch.nn.functional.pad(normalise(data["in.waveform"][None]), (0, 81 * 640 - 49_877))
    frames = features.cnn(padded, features.frame_statistics(padded))
    wrong = to_25hz(features.encode(frames)[..., :32], 81)
    control = data["out.control.stock_model_then_interpolate_last_hidden_81"]
    torch.testing.assert_close(wrong, control, atol=1e-4, rtol=0)
    assert (features(data["in.waveform"][None], 81)[..., :32] - control).abs().mean() > 0.1


def test_columns_are_the_last_state_then_all_states() -> None:
    features = random_features()
    rows = features(torch.randn(2, 9_000), 15)
    assert rows.shape == (2, 15, features.config.feature_dim) == (2, 15, 128)
    assert torch.equal(rows[..., :32], rows[..., -32:])
    assert Wav2VecConfig().feature_dim == 10_752


def test_stock_network_gives_the_same_states() -> None:
    """Without resampling, transformers' own forward is the oracle (random weights, norms included)."""
    features, speech = random_features(), normalise(torch.randn(2, 16_000))
    ours = features.encode(features.cnn(speech, features.frame_statistics(speech)))
    stock = features.network(speech, output_hidden_states=True)
    theirs = torch.cat([stock.last_hidden_state, *stock.hidden_states], dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_normalisation_is_that_of_the_stock_extractor() -> None:
    speech = 0.1 * torch.randn(12_345) + 0.03
    stock = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(speech.numpy(), sampling_rate=16_000)
    torch.testing.assert_close(normalise(speech[None])[0], torch.tensor(stock.input_values[0]), atol=1e-5, rtol=0)


def test_blocks_of_the_convolutions_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    features, speech = random_features(), torch.randn(1, 640 * 30 + 77)
    whole = features(speech, 31)
    monkeypatch.setattr(wav2vec_features, "BLOCK_FRAMES", 7)
    torch.testing.assert_close(features(speech, 31), whole, atol=1e-5, rtol=0)


def test_training_mode_changes_nothing() -> None:
    features, speech = random_features(), torch.randn(1, 6_400)
    assert torch.equal(features(speech, 10), features.train()(speech, 10))


def test_few_and_many_samples() -> None:
    features = random_features()
    assert features(torch.randn(1, 100), 1).shape == (1, 1, 128)  # a single row has nothing to interpolate
    # More speech than rows is squeezed onto them, by the official grid.
    squeezed = features.rows(torch.randn(1, 640 * 12), 10)
    assert squeezed.shape[1] == 10 and squeezed.isfinite().all()


def test_folder_loads_in_the_public_and_in_the_present_naming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    weights = golden_weights()
    head = {"lm_head.weight": torch.zeros(32, 32), "lm_head.bias": torch.zeros(32)}
    recogniser = {f"wav2vec2.{key}": value for key, value in weights.items()} | head
    present = dict(golden_features().network.state_dict())
    speech = vectors("audio_features")["in.waveform"][None]
    for name, tensors in {"bare": weights, "public": recogniser, "present": present}.items():
        features = load_speech_features(write_folder(tmp_path / name, tensors))
        rows = features(speech, 81)
        torch.testing.assert_close(rows, vectors("audio_features")["out.B.audio_embedding"], atol=1e-4, rtol=0)
        assert not any(parameter.requires_grad or parameter.is_meta for parameter in features.parameters())


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    weights = golden_weights()
    with pytest.raises(ValueError, match=r"holds no \.safetensors file"):
        load_speech_features(tmp_path)
    norm = "encoder.layer_norm.bias"
    missing = {key: value for key, value in weights.items() if key != norm}
    changed = {"an unknown tensor": weights | {"project_hid.bias": torch.zeros(3)}, "a missing one": missing}
    changed["another shape"] = weights | {norm: torch.zeros(31)}
    texts = {"an unknown tensor": "1 unknown: project_hid.bias", "a missing one": f"1 missing: network.{norm}"}
    texts["another shape"] = r"is \[31\], the network needs \[32\]"
    for what, tensors in changed.items():
        with pytest.raises(ValueError, match=texts[what]):
            load_speech_features(write_folder(tmp_path / what, tensors))
    with pytest.raises(ValueError, match="wav2vec2-base family"):
        load_speech_features(write_folder(tmp_path / "large", weights, feat_extract_norm="layer"))
    twice = weights | {"wav2vec2.masked_spec_embed": weights["masked_spec_embed"].clone()}
    with pytest.raises(ValueError, match="1 unknown: wav2vec2"):
        load_speech_features(write_folder(tmp_path / "twice", twice))
    damaged = write_folder(tmp_path / "damaged", weights)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_speech_features(damaged)
    puzzling = write_folder(tmp_path / "puzzling", weights)
    (puzzling / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        load_speech_features(puzzling)


def test_key_map_is_a_bijection_of_the_official_size() -> None:
    with torch.device("meta"):
        features = SpeechFeatures(FLAVOURS["official"])
    state = features.state_dict()
    for key_map in FORMATS:
        keys = [str(key_map.to_foreign(name)) for name in state]
        assert len(set(keys)) == len(state) and [key_map.to_ours(key) for key in keys] == list(state)
    assert PUBLIC.to_ours("lm_head.weight") is None and "lm_head.weight" in RECOGNISER_HEAD
    numbers = sum(tensor.numel() for tensor in state.values()) + RECOGNISER_HEAD_NUMBERS
    header_bytes = PUBLIC_FILE_BYTES - 4 * numbers
    assert 0 < header_bytes < 32_768  # the published file holds exactly these numbers in float32


def test_wrong_input_is_named() -> None:
    features = random_features()
    with pytest.raises(ValueError, match=r"\[batch, samples\]"):
        features(torch.zeros(100), 3)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        features.rows(torch.zeros(1, 100), 0)
    with pytest.raises(ValueError, match="multiply to 320"):
        Wav2VecConfig(conv_strides=(5, 2, 2, 2, 2, 2, 1))
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        SpeechFeatures(FLAVOURS["test"], "flash")  # type: ignore[arg-type]


def test_a_missing_or_old_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "OLDEST_TRANSFORMERS", 99)
    with pytest.raises(ValueError, match=r"too old .* pip install 'transformers>=99'"):
        SpeechFeatures(FLAVOURS["test"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'transformers>=99'"):
        SpeechFeatures(FLAVOURS["test"])
