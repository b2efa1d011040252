"""`lipstream convert` for the encoders: every official form becomes a model folder that the loaders take as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

from lipstream.checkpoints.convert import assemble, convert
from lipstream.checkpoints.encoders import load_prompt_encoder, load_speech_features, load_syncnet
from lipstream.checkpoints.hub import load_pretrained, read_folder_config, save_pretrained
from lipstream.checkpoints.strict import CheckpointError
from lipstream.cli.common import EXIT_OK, EXIT_USAGE
from lipstream.cli.main import main
from test_syncnet import random_network
from test_text import TEST, official_tensors
from test_wav2vec_features import write_folder
from wav2vec_networks import golden_features, golden_weights


def test_wav2vec2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"lm_head.weight": torch.zeros(32, 32), "lm_head.bias": torch.zeros(32)}
    public = {f"wav2vec2.{key}": value for key, value in golden_weights().items()} | head
    write_folder(tmp_path / "hub", public)
    assert (
        main(["convert", str(tmp_path / "hub"), "--to", str(tmp_path / "made"), "--max-shard-gb", "0.00005"]) == EXIT_OK
    )
    assert "wav2vec2, float32" in capsys.readouterr().out
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 1
    speech = torch.randn(1, 9_000) * 0.1
    expected = golden_features()(speech, 14)
    for attention in ("sdpa", "eager"):
        features = load_speech_features(tmp_path / "made", attention)  # type: ignore[arg-type]
        assert features.network.config._attn_implementation == attention
        torch.testing.assert_close(features(speech, 14), expected, atol=1e-5, rtol=0)
    half = convert([tmp_path / "made"], tmp_path / "half", dtype=torch.float16)  # a model folder is a source as well
    assert half.dtype == "float16" and load_speech_features(tmp_path / "half").network.dtype == torch.float32
    # A lone file of another size than the official one does not say its heads: it is not guessed.
    save_file(public, tmp_path / "lone.safetensors")
    with pytest.raises(CheckpointError, match=r"lone\.safetensors does not fit a wav2vec2: .* of another shape"):
        assemble([tmp_path / "lone.safetensors"])


def test_umt5(tmp_path: Path) -> None:
    path = tmp_path / "models_t5.pth"
    torch.save({name: tensor.bfloat16() for name, tensor in official_tensors().items()}, path)
    about = convert([path], tmp_path / "made")
    assert (about.kind, about.dtype, about.provenance.key_format) == ("umt5", "bfloat16", "wan")
    direct, converted = load_prompt_encoder(path, TEST), load_prompt_encoder(tmp_path / "made")
    ids = torch.tensor([[3, 4, 5, 1]])
    assert torch.equal(direct(ids), converted(ids)) and converted.weights_sha256 == direct.weights_sha256 != ""
    assert converted.network.encoder.embed_tokens.weight is converted.network.shared.weight
    again = save_pretrained(direct, tmp_path / "saved", kind="umt5")
    loaded = load_pretrained(tmp_path / "saved", kind="umt5")
    assert again.config["text_rows"] == TEST.text_rows and torch.equal(loaded(ids), direct(ids))


@pytest.mark.parametrize("counters", [True, False])
def test_syncnet(counters: bool, tmp_path: Path) -> None:
    path, network = tmp_path / "syncnet_v2.model", random_network()
    state = {key: value for key, value in network.state_dict().items() if counters or "num_batches" not in key}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert convert([path], tmp_path / "made").kind == "syncnet"
    windows = torch.randn(2, 1, 13, 20)
    loaded = load_syncnet(tmp_path / "made")
    assert not loaded.training and torch.equal(loaded.embed_speech(windows), network.embed_speech(windows))


def test_a_folder_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(random_network(), tmp_path / "made", kind="syncnet")
    assert read_folder_config(tmp_path / "made").licence == "unknown"
    with pytest.raises(CheckpointError, match="made: holds a syncnet, not a wav2vec2"):
        load_speech_features(tmp_path / "made")
    stranger = tmp_path / "stranger.pth"
    torch.save({"weight": torch.zeros(1)}, stranger)
    assert main(["convert", str(stranger), "--to", str(tmp_path / "x")]) == EXIT_USAGE
    assert "wav2vec2|umt5|syncnet" in capsys.readouterr().err
    (tmp_path / "made" / "config.json").write_text(json.dumps({"format": "lipstream"}))
    with pytest.raises(CheckpointError, match="damaged"):
        load_syncnet(tmp_path / "made")
