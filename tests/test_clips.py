"""Official sample folders: what is read, what is refused, what the null branch drops, and the reward on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from golden_model import random_model
from lipstream.checkpoints.encoders import save_prompt_embedding
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.models.mfcc import mfcc
from lipstream.models.syncnet import FLAVOURS as SYNCNETS
from lipstream.models.syncnet import SyncNet, audio_windows, prepare_frames, reward_score
from lipstream.models.tae import TAE, TAE_FLAVOURS
from lipstream.models.text import PromptEmbedding
from lipstream.training.clips import ClipBatch, ClipConfig, Clips, ClipTask, load_empty_prompt, read_list, sync_reward
from lipstream.training.task import predict
from official_clips import (
    CELLS,
    CONFIG,
    LATENT_FRAMES,
    ROWS,
    shape_of_clips,
    write_clip,
    write_empty_prompt,
    write_list,
)
from official_clips import written_clips as written


def task_of(folder: Path, *, speech: bool = False, count: int = 2, **settings: object) -> ClipTask:
    clips = written(folder, count, speech)
    empty = load_empty_prompt(write_empty_prompt(folder / "empty.pt"))
    config = ClipConfig(**{"batch": 2, **settings})  # type: ignore[arg-type]
    return ClipTask(clips, built_in_mask(), config, empty_prompt=empty)


def test_a_batch_is_what_lies_in_the_folders(tmp_path: Path) -> None:
    task = task_of(tmp_path, speech=True, count=1)
    batch = task.batch(LATENT_FRAMES)
    stored = torch.load(tmp_path / "clip_0" / "vae_latents_mask_all.pt", weights_only=True)
    reference = torch.load(tmp_path / "clip_0" / "ref_latents.pt", weights_only=True)["ref_sequence_latents"]
    audio = torch.load(tmp_path / "clip_0" / "audio_emb_omniavatar.pt", weights_only=True)["audio_emb"]
    assert torch.equal(batch.target[0], stored["input_latents"].float()) and batch.target.dtype == torch.float32
    assert torch.equal(batch.masked[1], stored["masked_latents"].float())
    assert torch.equal(batch.reference[0], reference.float())
    assert torch.equal(batch.audio[0], audio[:ROWS])
    assert batch.text.shape == (2, 2, CONFIG.text_dim)  # without the zeros at its end, which the network adds
    assert batch.samples.shape == (2, ROWS * 640) and batch.samples.abs().max() > 0.1
    conditions = task.conditions(random_model(CONFIG), batch)
    assert torch.equal(conditions.reference, batch.target[:, :, :1])
    # The picture's upper left corner is kept, the mouth is not; the same on every latent frame.
    assert conditions.mask.shape == (1, 1, 1, *CELLS)
    assert conditions.mask[..., 0, 0] == 0 and conditions.mask[..., 5, 4] == 1
    short = task.batch(3)
    assert short.target.shape[2] == 3 and short.audio.shape[1] == 9 and short.samples.shape[1] == 9 * 640
    for request in ({"latent_frames": 9}, {"latent_frames": 6, "sink_apart": True}):
        with pytest.raises(ValueError, match="clips have 6 latent frames"):
            task.batch(**request)  # type: ignore[arg-type]


def test_text_and_speech_are_dropped_apart(tmp_path: Path) -> None:
    task = task_of(tmp_path, batch=64, drop_text=0.3, drop_audio=0.6)
    batches = [task.batch(3) for _ in range(4)]
    empty = torch.stack([(text[1:] == 0).all() for batch in batches for text in batch.text])
    silent = torch.stack([(audio == 0).all() for batch in batches for audio in batch.audio])
    assert empty.float().mean().item() == pytest.approx(0.3, abs=0.1)
    assert silent.float().mean().item() == pytest.approx(0.6, abs=0.1)
    assert (empty & silent).float().mean().item() == pytest.approx(0.18, abs=0.1)
    row = next(text for batch in batches for text in batch.text if (text[1:] == 0).all())
    assert task.empty_prompt is not None and torch.equal(row[0], task.empty_prompt[0, 0])
    with pytest.raises(ValueError, match="--empty-prompt"):
        ClipTask(task.clips, built_in_mask(), ClipConfig(batch=2, drop_text=0.1))


@pytest.mark.parametrize("drop", ["text+audio", "audio"])
def test_the_null_branch_drops_what_it_says(tmp_path: Path, drop: str) -> None:
    task = task_of(tmp_path, guidance_drop=drop)
    model, batch = random_model(CONFIG), task.batch(LATENT_FRAMES)
    noisy, t = torch.randn_like(batch.target), torch.full((2,), 0.7, dtype=torch.float64)

    def null(changed: ClipBatch) -> torch.Tensor:
        return predict(task, model, noisy, t, changed, null=True)

    def same(changed: ClipBatch) -> bool:
        return torch.equal(null(batch), null(changed))

    other = {name: torch.randn_like(part) for name, part in batch._asdict().items()}
    assert same(batch._replace(audio=other["audio"]))
    assert same(batch._replace(text=other["text"])) == (drop == "text+audio")
    for seen in ("masked", "reference", "target"):
        assert not same(batch._replace(**{seen: other[seen]}))
    # Silence is zero features, the empty prompt its encoding (not zeros).
    assert task.empty_prompt is not None
    text = task.empty_prompt.expand(2, -1, -1) if drop == "text+audio" else batch.text
    zero = predict(task, model, noisy, t, batch._replace(audio=torch.zeros_like(batch.audio), text=text))
    torch.testing.assert_close(null(batch), zero, rtol=0.02, atol=0.02)
    assert not torch.equal(null(batch), predict(task, model, noisy, t, batch))


def test_errors_weigh_the_mouth(tmp_path: Path) -> None:
    task, plain = task_of(tmp_path, mouth_weight=2.0), task_of(tmp_path)
    target = torch.zeros(1, CONFIG.latent_channels, 2, *CELLS)
    share = task.mask.mean().item()
    assert 0.2 < share < 0.6
    for region, weighted, count in ((task.mask, 2 * share, share), (1 - task.mask, 1 - share, 1 - share)):
        x0 = target + region
        torch.testing.assert_close(task.errors(x0, target).loss, torch.full((1, 2), weighted))
        torch.testing.assert_close(plain.errors(x0, target).loss, torch.full((1, 2), count))


def test_bad_folders_are_listed_by_folder_file_and_shape(tmp_path: Path) -> None:
    listed = read_list(write_list(tmp_path, 4))
    (listed[1] / "text_emb.pt").unlink()
    torch.save({"audio_emb": torch.zeros(ROWS - 1, CONFIG.audio_dim)}, listed[1] / "audio_emb_omniavatar.pt")
    torch.save({"ref_sequence_latents": torch.zeros(4, 6, 8, 9)}, listed[2] / "ref_latents.pt")
    (listed[3] / "vae_latents_mask_all.pt").write_bytes(b"cut off")
    folders = [*listed, tmp_path / "nowhere"]
    clips = Clips(folders, shape_of_clips())
    with pytest.raises(ValueError) as caught:
        clips.usable()
    message = str(caught.value)
    for part in (
        "4 of 5 sample folders",
        f"{listed[1] / 'text_emb.pt'}: no such file",
        f"{listed[1] / 'audio_emb_omniavatar.pt'}: audio_emb is [20, 6], needed is [at least 21, 6]",
        f"{listed[2] / 'ref_latents.pt'}: ref_sequence_latents is [4, 6, 8, 9], needed is [4, at least 6, 8, 8]",
        f"{listed[3] / 'vae_latents_mask_all.pt'}: not readable",
        f"{tmp_path / 'nowhere'}: no such folder",
        "--skip-damaged",
    ):
        assert part in message
    kept, left_out = clips.usable(skip_damaged=True)
    assert kept.folders == listed[:1] and len(left_out) == 5
    with pytest.raises(ValueError, match="none is left"):
        Clips(folders[1:], shape_of_clips()).usable(skip_damaged=True)
    (tmp_path / "empty.txt").write_text("\n")
    for path, text in ((tmp_path / "no.txt", "no such list"), (tmp_path / "empty.txt", "names no sample folder")):
        with pytest.raises(ValueError, match=text):
            read_list(path)


def test_a_reference_that_is_the_target_is_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    source = torch.load(folder / "vae_latents_mask_all.pt", weights_only=True)["input_latents"]
    torch.save({"ref_sequence_latents": source.clone()}, folder / "ref_latents.pt")
    with pytest.raises(ValueError, match=r"ref_latents.pt is the target itself.*at least 162 frames"):
        Clips([folder], shape_of_clips()).load(0)


def test_missing_references_are_zeros_only_when_asked_for(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    (folder / "ref_latents.pt").unlink()
    assert Clips([folder], shape_of_clips()).problems(folder) == [f"{folder / 'ref_latents.pt'}: no such file"]
    clips = Clips([folder], shape_of_clips(), zero_reference=True)
    assert not clips.problems(folder) and not clips.load(0).reference.any()


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    torch.save({"audio_emb": folder}, folder / "audio_emb_omniavatar.pt")  # a Path is code to a pickle
    (problem,) = Clips([folder], shape_of_clips()).problems(folder)
    assert "audio_emb_omniavatar.pt: not readable" in problem


def test_empty_prompt_is_the_empty_one(tmp_path: Path) -> None:
    rows = torch.randn(1, CONFIG.text_dim)
    for name, prompt in (("empty", ""), ("talking", "a person talking")):
        embedding = PromptEmbedding(prompt=prompt, rows=rows, text_rows=4)
        save_prompt_embedding(embedding, tmp_path / f"{name}.safetensors")
    assert torch.equal(load_empty_prompt(tmp_path / "empty.safetensors"), rows[None])
    with pytest.raises(ValueError, match="is of the prompt 'a person talking'"):
        load_empty_prompt(tmp_path / "talking.safetensors")


def test_reward_is_syncnets_confidence_of_the_decoded_pictures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tae = TAE(replace(TAE_FLAVOURS["test"], latent_channels=CONFIG.latent_channels)).eval()
    syncnet = SyncNet(SYNCNETS["test"]).eval().requires_grad_(False)
    batch = task_of(tmp_path, speech=True).batch(LATENT_FRAMES)
    z = torch.randn_like(batch.target, requires_grad=True)
    got = sync_reward(tae, syncnet)(z, batch)
    assert got.shape == (2,) and not got.requires_grad
    with torch.no_grad():
        video = tae.decode(z[1:])[0]
        pictures = torch.from_numpy(np.floor(video.numpy() * 255).astype(np.uint8)).permute(1, 0, 2, 3)
        lips = syncnet.embed_lips(prepare_frames(pictures)[None])[0]
        speech = syncnet.embed_speech(audio_windows(mfcc(batch.samples[1])))
    torch.testing.assert_close(got[1], reward_score(lips, speech).confidence)
    other = sync_reward(tae, syncnet)(z, batch._replace(samples=batch.samples.flip(1)))
    assert not torch.equal(got, other)
