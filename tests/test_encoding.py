"""Prepared samples to what the official sizes train on: by hand, resumed after any stop, read by the trainer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from golden_model import random_model
from lipstream.batch.jobs import Job
from lipstream.checkpoints.encoders import save_prompt_embedding
from lipstream.checkpoints.hub import save_pretrained
from lipstream.cli.main import main
from lipstream.data.prepare import pack, work
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.models.text import PROMPT, PromptEmbedding
from lipstream.models.wan_vae import WanVAE, WanVAEConfig
from lipstream.models.wav2vec_features import SpeechFeatures, Wav2VecConfig
from lipstream.training import encoding, forcing
from lipstream.training.clips import Clips, read_list
from official_clips import CONFIG, LATENT_FRAMES, ROWS, shape_of_clips
from official_files import random_weights
from test_batch import InLine

SIZE, FRAMES = 64, 46  # a clip of 21 frames, 21 of reference, and some more
VAE = WanVAEConfig(width=4, blocks_per_level=1, latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)
SPEECH = Wav2VecConfig(hidden=2, layers=1, heads=1, ffn=4, conv_channels=(8,) * 7, position_groups=1)
FILES = ("audio_emb_omniavatar.pt", "encoded.json", "ref_latents.pt", "text_emb.pt", "vae_latents_mask_all.pt")


def sample(seed: int, frames: int = FRAMES, prompt: str = PROMPT) -> dict[str, bytes]:
    """What `prepare` writes of one sample, at a small size."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (8, 8, 3))
    pictures = [np.kron(np.roll(base, i // 3, axis=1), np.ones((8, 8, 1), int)).astype(np.uint8) for i in range(frames)]
    speech = (0.1 * rng.standard_normal(frames * 640)).astype(np.float32)
    return {
        "mp4": work.silent_mp4(pictures), "wav": work.wav_bytes(speech), "txt": prompt.encode(), "json": b'{"x": 1}',
    }  # fmt: skip


def data_set(folder: Path, samples: dict[str, dict[str, bytes]], form: Any = "webdataset") -> Path:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, files in samples.items():
            for suffix, content in files.items():
                about = tarfile.TarInfo(f"{name}.{suffix}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    pack.pack([Job(id="a", output=folder / "a.tar")], folder, form, 1)
    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ALIGNED_PX", SIZE)


@pytest.fixture
def in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without worker processes, which take seconds to start."""
    monkeypatch.setattr("lipstream.cli.batch._scheduler", lambda *_: InLine())


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks of the official shapes, with the widths of the `test` diffusion network."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_pretrained(random_weights(WanVAE(VAE), 0.1), folder / "vae", kind="wan-vae")
    save_pretrained(SpeechFeatures(SPEECH), folder / "speech", kind="wav2vec2")
    for name, prompt in (("talking", PROMPT), ("empty", "")):
        rows = torch.randn(3 if prompt else 1, CONFIG.text_dim)
        embedding = PromptEmbedding(prompt=prompt, rows=rows, text_rows=CONFIG.text_len)
        save_prompt_embedding(embedding, folder / f"{name}.safetensors")
    return folder


def command(networks: Path, data: Path, *more: str, prompts: tuple[str, ...] = ("talking", "empty")) -> list[str]:
    given = ["data", "encode", str(data), "--vae", str(networks / "vae"), "--speech", str(networks / "speech")]
    given += ["--text", "none.pth", "--mask", "built-in", "--size", str(SIZE), "--latent-frames", str(LATENT_FRAMES)]
    given += ["--dtype", "float32", "--workers", "1", *more]
    return [*given, "--prompts", *(str(networks / f"{name}.safetensors") for name in prompts)]


def test_training_reads_what_was_encoded(
    networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_set(tmp_path / "data", {"a_000000": sample(0), "b_000000": sample(1)})
    assert main(command(networks, data, "--dry-run")) == 0
    assert "2 samples of the shards" in capsys.readouterr().out and not (data / "samples").exists()
    assert main(command(networks, data)) == 0
    said = capsys.readouterr().out
    assert "2 encoded, 0 were finished already, 0 failed" in said and "empty.safetensors" in said
    folders = read_list(data / "encoded.txt")
    assert [folder.name for folder in folders] == ["a_000000", "b_000000"]
    assert {path.name for path in folders[0].iterdir()} == {
        *FILES,
        "sub_clip.mp4",
        "audio.wav",
        "prompt.txt",
        "about.json",
    }

    clips, problems = Clips(folders, shape_of_clips(), speech=True).usable()
    assert not problems and len(clips) == 2
    clip = clips.load(0)
    vae = encoding.assemble([networks / "vae"], kind="wan-vae").load()
    features = encoding.load_speech_features(networks / "speech")
    pictures = torch.from_numpy(np.stack([frame.image for frame in VideoReader(folders[0] / "sub_clip.mp4")]))
    video = pictures.permute(3, 0, 1, 2)[None] / 255 * 2 - 1
    kept = torch.from_numpy(built_in_mask().pixel_keep(SIZE))
    with torch.no_grad():
        for part, pixels in (
            (clip.source, video[:, :, :ROWS]),
            (clip.masked, video[:, :, :ROWS] * kept),
            (clip.reference, video[:, :, ROWS : 2 * ROWS]),
        ):
            torch.testing.assert_close(part, vae.encode(pixels)[0], rtol=0.01, atol=0.01)  # bfloat16
        heard = torch.from_numpy(load_speech(folders[0] / "audio.wav"))[None]
        rows = features.rows(encoding.normalise(heard), 81)[0, :ROWS]
    torch.testing.assert_close(clip.audio, rows)
    assert not torch.equal(clip.source, clip.masked) and not torch.equal(clip.source, clip.reference)
    assert clip.text.shape == (3, CONFIG.text_dim)
    stored = torch.load(folders[0] / "vae_latents_mask_all.pt", weights_only=True)
    assert stored["input_latents"].dtype == torch.bfloat16

    torch.save(random_model(CONFIG, 0).state_dict(), tmp_path / "student.pth")
    argv = [str(tmp_path / "run"), "--recipe", "test", "--clips", str(data / "encoded.txt"), "--mask", "built-in"]
    argv += ["--model", str(tmp_path / "student.pth"), "--empty-prompt", str(networks / "empty.safetensors")]
    monkeypatch.setattr("sys.argv", ["stage", *argv, "--steps", "1"])
    forcing.main()
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 1 and np.isfinite(row["loss"])


def test_a_second_run_does_what_changed_only(
    networks: Path, tmp_path: Path, in_line: None, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {f"{name}_000000": sample(seed) for seed, name in enumerate("abc")}
    data = data_set(tmp_path / "data", samples, "folders")
    assert main(command(networks, data)) == 0
    before = {path: path.read_bytes() for path in data.rglob("*.pt")}
    (data / "samples" / "b_000000" / "text_emb.pt").unlink()
    (data / "samples" / "c_000000" / "audio.wav").write_bytes(samples["a_000000"]["wav"])
    capsys.readouterr()
    assert main(command(networks, data)) == 0
    assert "2 encoded, 1 were finished already" in capsys.readouterr().out
    changed = {path.relative_to(data / "samples") for path, content in before.items() if path.read_bytes() != content}
    assert changed == {Path("c_000000/audio_emb_omniavatar.pt")}
    assert main(command(networks, data)) == 0
    assert "0 encoded, 3 were finished already" in capsys.readouterr().out
    assert main(command(networks, data, "--masking", "two-step")) == 0
    assert "3 encoded" in capsys.readouterr().out
    name = "samples/a_000000/vae_latents_mask_all.pt"
    old, new = torch.load(io.BytesIO(before[data / name])), torch.load(data / name)
    assert torch.equal(old["input_latents"], new["input_latents"])
    assert not torch.equal(old["masked_latents"][:, 1], new["masked_latents"][:, 1])


def test_a_stop_at_any_file_costs_nothing(networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of its renames in turn, then continued: the same files as without a stop, none half done."""
    config = encoding.EncodeConfig(latent_frames=LATENT_FRAMES, size=SIZE, dtype="float32")
    prompts = {PROMPT: networks / "talking.safetensors", "": networks / "empty.safetensors"}
    factory = encoding.EncodeFactory(
        config=config, vae=networks / "vae", speech=networks / "speech", prompts=prompts
    )  # fmt: skip
    folder = data_set(tmp_path / "data", {"a_000000": sample(0)}, "folders") / "samples" / "a_000000"
    encode, real, stops = factory(0), encoding.os.replace, 0
    (job,) = encoding.encode_jobs([folder], config)

    def run() -> None:
        job.staging().mkdir(exist_ok=True)
        encode(job, job.staged())

    while True:
        left = stops

        def replace(a: Path, b: Path) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            real(a, b)

        monkeypatch.setattr(encoding.os, "replace", replace)
        try:
            run()
            break
        except KeyboardInterrupt:
            assert not job.staged().exists()
            assert len(list(folder.glob("*.pt"))) == stops
            for path in folder.glob("*.pt"):
                torch.load(path, weights_only=True)  # whole
                path.unlink()
            stops += 1
    assert stops == 5 and {path.name for path in folder.glob("*.pt")} == {*FILES} - {"encoded.json"}


def test_what_cannot_be_encoded_is_named(
    networks: Path, tmp_path: Path, in_line: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {"good_0": sample(0), "short_0": sample(1, frames=41), "other_0": sample(2, prompt="somebody sings")}
    data = data_set(tmp_path / "data", samples)
    assert main(command(networks, data)) == 2
    assert "the prompt 'somebody sings' has no embedding" in capsys.readouterr().err
    (data / "samples" / "other_0" / "prompt.txt").write_text(PROMPT)
    (data / "samples" / "other_0" / "sub_clip.mp4").unlink()
    monkeypatch.setattr(work, "ALIGNED_PX", 32)
    small = work.silent_mp4([np.zeros((32, 32, 3), np.uint8)] * FRAMES)
    (data / "samples" / "other_0" / "sub_clip.mp4").write_bytes(small)
    assert main(command(networks, data)) == 1
    said = capsys.readouterr()
    assert "short_0/sub_clip.mp4: 41 frames; 21 and as many for the reference" in said.err
    assert "--min-frames 42" in said.err and "pictures of 32 x 32, needed is 64" in said.err
    assert [folder.name for folder in read_list(data / "encoded.txt")] == ["good_0"]
    assert main(command(networks, data, prompts=("talking",))) == 2
    assert "the prompt '' has no embedding" in capsys.readouterr().err
    assert main(command(networks, tmp_path)) == 2
    assert "holds no samples" in capsys.readouterr().err
    assert main(["data", "encode", str(data), "--vae", "no.pth", "--mask", "built-in"]) == 2
    assert "no.pth: no such file; `lipstream pull" in capsys.readouterr().err


def test_prompts_are_embedded_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def embed(prompt: str) -> PromptEmbedding:
        asked.append(prompt)
        return PromptEmbedding(prompt=prompt, rows=torch.randn(1, 8), text_rows=4)

    found = encoding.Prompts(tmp_path / "prompts", embed).complete(["sings", "talks", "sings"])
    assert asked == ["", "sings", "talks"] and found.keys() == set(asked)
    assert found[""].name == "empty.safetensors"
    assert encoding.Prompts(tmp_path / "prompts").complete(["talks"]) == {"": found[""], "talks": found["talks"]}
    assert len(asked) == 3
