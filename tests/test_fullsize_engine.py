"""The official sizes behind `LipSync`: tiny files in the official format go through the small model's pipeline."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from lipstream.checkpoints.artefacts import default_folder
from lipstream.checkpoints.convert import convert
from lipstream.checkpoints.encoders import load_prompt_embedding
from lipstream.fullsize_speech import WindowedRows
from lipstream.media.reader import VideoReader
from lipstream.memory import MemoryNeed
from lipstream.pipeline import LipSync
from lipstream.session import SyncedFrame
from official_files import write_official_folder
from tiny import write_noise

DEMO = Path(str(resources.files("lipstream"))) / "assets" / "demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official_folder(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a second of speech."""
    return write_noise(tmp_path_factory.mktemp("speech") / "short.wav", 7_000)


def load(folder: Path, **options: object) -> LipSync:
    return LipSync.from_pretrained(folder, dtype=torch.float32, mask="built-in", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def streamed(folder: Path, short: Path) -> list[SyncedFrame]:
    return list(load(folder).stream(DEMO / "clip.mp4", short))


def test_a_video_goes_through_at_full_size(streamed: list[SyncedFrame]) -> None:
    source = VideoReader(DEMO / "clip.mp4")
    assert [frame.synced for frame in streamed] == [True] * 11
    for before, after in zip(source, streamed, strict=False):
        assert after.patch is not None and after.frame.size == before.size
        left, top, right, bottom = after.patch.box
        changed = np.any(before.image != after.frame.image, -1)
        assert changed[top:bottom, left:right].mean() > 0.3  # random weights paint a mouth of noise ...
        changed[top:bottom, left:right] = False
        assert not changed.any()  # ... and nothing but a mouth


def test_a_converted_model_writes_the_same_to_a_file(
    folder: Path, short: Path, tmp_path: Path, streamed: list[SyncedFrame]
) -> None:
    parts = {"student": "lipforcing_1.3b.pth", "wan-vae": "Wan2.1_VAE.pth", "tae": "taew2_1.pth"}
    for kind, name in (parts | {"wav2vec2": "wav2vec2-base-960h"}).items():
        convert([folder / name], tmp_path / "model" / kind)
    (tmp_path / "model" / "prompt.safetensors").symlink_to(folder / "prompt.safetensors")
    report = load(tmp_path / "model")(DEMO / "clip.mp4", short, tmp_path / "out.mp4")
    result = list(VideoReader(tmp_path / "out.mp4"))
    assert report.frames == report.synced_frames == len(result) == 11
    for one, two in zip(streamed, result, strict=True):
        assert np.abs(one.frame.image.astype(int) - two.image).mean() < 3  # the encoder's loss


def test_speech_is_heard_through_a_window(folder: Path, short: Path, streamed: list[SyncedFrame]) -> None:
    lipsync = load(folder, speech_lookahead=0.1)
    assert lipsync.engine.window.lookahead_rows == 3  # type: ignore[attr-defined]
    assert isinstance(lipsync.engine.rows(lambda count: np.zeros(0, np.float32)), WindowedRows)
    live = list(lipsync.stream(DEMO / "clip.mp4", short))
    assert [frame.pts for frame in live] == [frame.pts for frame in streamed] and all(frame.synced for frame in live)
    with pytest.raises(ValueError, match="look-ahead must be"):
        load(folder, speech_lookahead=-1.0)


def test_two_forms_of_one_part_are_not_chosen_from(folder: Path, tmp_path: Path) -> None:
    linked(folder, tmp_path)
    convert([folder / "taew2_1.pth"], tmp_path / "tae")
    with pytest.raises(ValueError, match=r"2 of the kind tae in it, tae and taew2_1\.pth"):
        load(tmp_path)


def test_the_wan_decoder_is_another_choice(folder: Path) -> None:
    engine = load(folder, decoder="wan").engine
    assert engine.model.decoder is engine.model.encoder  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": None}, "mask.png"),
        ({"memory_gb": 0.001}, "not enough memory"),
        ({"decoder": "jpeg"}, "unknown decoder"),
        ({"device": "cuda"}, "no GPU"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"memory_gb": float("inf")}, "positive number"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    folder: Path, options: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lipstream.checkpoints.convert.Assembled.load", lambda self: pytest.fail("loaded"))
    wanted = {"mask": "built-in", **options}
    with pytest.raises(ValueError, match=said) as caught:
        LipSync.from_pretrained(folder, **wanted)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def linked(folder: Path, target: Path, *without: str) -> Path:
    """A copy of a model folder without some files."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in without:
            (target / path.name).symlink_to(path)
    return target


@pytest.mark.parametrize("missing", ["taew2_1.pth", "Wan2.1_VAE.pth", "wav2vec2-base-960h"])
def test_every_file_is_missed_before_the_student_is_loaded(
    folder: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipstream.checkpoints.convert.Assembled.load", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=missing):
        load(linked(folder, tmp_path, missing))


def test_the_text_encoder_is_weighed_in_main_memory_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked(folder, tmp_path, "prompt.safetensors")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(bytes(1000))
    monkeypatch.setattr("lipstream.fullsize_engine.free_bytes", lambda device: 999)
    told: list[MemoryNeed] = []
    with pytest.raises(ValueError, match="to embed the prompt"):
        load(tmp_path, on_memory=told.append)
    monkeypatch.setattr("lipstream.fullsize_engine.free_bytes", lambda device: None)
    monkeypatch.setattr(
        "lipstream.fullsize_engine._Files.embedding", lambda self: load_prompt_embedding(folder / "prompt.safetensors")
    )
    load(tmp_path, on_memory=told.append)
    assert len(told) == 1 and told[0].speech > 0


def test_only_a_student_is_taken(folder: Path, tmp_path: Path) -> None:
    linked(folder, tmp_path, "lipforcing_1.3b.pth")
    convert([folder / "Wan2.1_VAE.pth"], tmp_path / "student", kind="wan-vae")
    with pytest.raises(ValueError, match="holds a wan-vae"):
        load(tmp_path)


@pytest.mark.parametrize(
    "missing", ["lipforcing_1.3b.pth", "Wan2.1_VAE.pth", "wav2vec2-base-960h", "prompt.safetensors"]
)
def test_a_missing_file_is_named(folder: Path, missing: str, tmp_path: Path) -> None:
    linked(folder, tmp_path, missing)
    with pytest.raises(ValueError, match=missing.split(".")[0].split("_")[0]):
        load(tmp_path)


def test_options_of_full_size_models_are_refused_by_the_small_one() -> None:
    for option in ({"mask": "built-in"}, {"speech_lookahead": 0.0}, {"parity": True}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            LipSync.from_pretrained("pocket", **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lipstream pull"):
        LipSync.from_pretrained("lipforcing-14b")


def test_pulled_files_are_looked_for_where_pull_puts_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=str(tmp_path)):
        LipSync.from_pretrained("lipforcing-14b")
    linked(folder, default_folder("lipforcing-14b"))
    lipsync = LipSync.from_pretrained("lipforcing-14b", dtype=torch.float32, mask="built-in")
    assert lipsync.name == "lipforcing-14b"
