"""The pocket SyncNet on its `test` flavour: it learns a toy correspondence, and its scores mean what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lipstream.checkpoints.networks import load_sync_scorer, load_syncnet, save_syncnet
from lipstream.cli.demo import demo_files
from lipstream.evaluation.syncnet import auc, damages, gate_markdown, held_out, run_gate, score_video
from lipstream.models.audio import SpeechEncoder, speech_config
from lipstream.models.syncnet_pocket import FLAVOURS, PocketSyncNet, SyncScorer, pose_free_fields
from lipstream.training.loop import LoopConfig
from lipstream.training.samples import Clip
from lipstream.training.syncnet import SyncLoss, SyncTraining, Talk, contrast, train
from tiny import tiny_codec

FRAMES = 60
CHANNELS = FLAVOURS["test"].speech_channels
POCKET = Path(__file__).parent.parent / "src" / "lipstream" / "assets" / "pocket"
QUICK = SyncTraining(batch=6, frames=24, variants=2, jitter=0.0, bias=0.0, blur_odds=0.0)


def toy(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Fields [count, F, 20, 20, 2] whose mouths follow four random curves, and the curves as speech, seen from afar."""
    patterns, ears = (
        torch.randn(4, size, generator=torch.Generator().manual_seed(9 + size)) for size in (14 * 20 * 2, CHANNELS)
    )
    curves = torch.randn(count, FRAMES, 4, generator=torch.Generator().manual_seed(seed))
    fields = torch.zeros(count, FRAMES, 20, 20, 2)
    fields[:, :, 6:] = (curves @ patterns).unflatten(-1, (14, 20, 2))
    return fields + 5 * torch.randn(count, 1, 1, 1, 1), curves @ ears


@pytest.fixture(scope="module")
def trained() -> PocketSyncNet:
    torch.manual_seed(0)
    network = PocketSyncNet(FLAVOURS["test"])
    fields, speech = toy(24)
    assert network.fit((fields - fields.mean(1, keepdim=True)).flatten(0, 1)) > 0.99
    talks = [
        Talk(i % 2 == 0, network.movements(f)[None].half(), s[None].half())
        for i, (f, s) in enumerate(zip(fields, speech, strict=True))
    ]
    loss = SyncLoss(network, talks, QUICK, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    for step in range(80):
        optimizer.zero_grad()
        value, _ = loss(step)
        value.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@pytest.fixture
def scorer(trained: PocketSyncNet) -> SyncScorer:
    return SyncScorer(trained, tiny_codec(), SpeechEncoder(speech_config("test")))


def test_learns_a_toy_correspondence(scorer: SyncScorer) -> None:
    fields, speech = toy(8, seed=1)  # curves and faces that it has not seen
    matched = scorer.scores(fields, speech)
    wrong = scorer.scores(fields, speech.roll(1, 0))
    assert (matched.offset == 0).all()
    assert matched.confidence.min() > wrong.confidence.max() + 0.2
    assert torch.equal(scorer.confidence(fields, speech), matched.confidence)


@pytest.mark.parametrize("late", [-7, -1, 3, 12])
def test_shifted_speech_moves_the_minimum(scorer: SyncScorer, late: int) -> None:
    fields, speech = toy(4, seed=2)
    assert (scorer.scores(fields, speech.roll(late, 1)).offset == late).all()


def test_constant_video_has_no_confidence(scorer: SyncScorer) -> None:
    fields, speech = toy(4, seed=3)
    still = fields[:, :1].expand_as(fields)
    assert scorer.confidence(still, speech).abs().max() < 0.1 < scorer.confidence(fields, speech).min()


def test_the_form_of_a_face_does_not_count(scorer: SyncScorer) -> None:
    fields, speech = toy(2, seed=4)
    moved = fields + 3 * torch.randn(2, 1, 20, 20, 2)
    torch.testing.assert_close(scorer.confidence(moved, speech), scorer.confidence(fields, speech), rtol=0, atol=1e-4)


def test_wrong_lengths_and_widths_are_named(scorer: SyncScorer) -> None:
    fields, speech = toy(1)
    with pytest.raises(ValueError, match="differ in length"):
        scorer.scores(fields, speech[:, 1:])
    with pytest.raises(ValueError, match="at least 16 vectors"):
        scorer.scores(fields[:, :19], speech[:, :19])
    with pytest.raises(ValueError, match="at least 5 frames"):
        scorer.network.embed_speech(speech[:, :4])
    with pytest.raises(ValueError, match=r"\[\.\.\., 20, 20, 2\]"):
        scorer.network.embed_lips(fields[..., :1])
    with pytest.raises(ValueError, match="hears 256 channels, the speech encoder gives 16"):
        SyncScorer(PocketSyncNet(FLAVOURS["pocket"]), scorer.codec, scorer.encoder)


def test_speech_is_heard_frame_by_frame(scorer: SyncScorer) -> None:
    """Rows of a clip are what the encoder gives, whether or not the speech is as long as the picture."""
    samples = torch.randn(2, 30 * 640)
    rows = scorer.encoder(samples)
    torch.testing.assert_close(scorer.hear(samples, 30), rows)
    torch.testing.assert_close(scorer.hear(samples[:, : 28 * 640], 30)[:, :20], rows[:, :20])
    torch.testing.assert_close(
        scorer.confidence(torch.zeros(2, 30, 20, 20, 2), samples), torch.zeros(2), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("lead", range(4))
def test_pose_free_fields_are_what_the_generator_makes(lead: int) -> None:
    codec = tiny_codec()
    fields = torch.randn(21, 20, 20, 2)
    free = pose_free_fields(codec, fields, lead)
    assert free.shape == fields.shape
    first = (4 - lead) % 4  # the first whole group
    groups = fields[first : first + 16].unflatten(0, (4, 4))
    z = codec.encode_groups(groups, torch.zeros(4, 4, 3, 160, 160))
    torch.testing.assert_close(free[first : first + 16], codec.decode_fields(codec.pose_free(z)).flatten(0, 1))


def test_latents_decode_to_fields(scorer: SyncScorer) -> None:
    z = torch.randn(2, scorer.codec.config.latent_channels, 3, 10, 10)
    fields = scorer.decode(z)
    assert fields.shape == (2, 12, 20, 20, 2)
    torch.testing.assert_close(fields[1, 4:8], scorer.codec.decode_fields(z[1:, :, 1])[0])


def test_contrast_wants_the_own_frame_and_spares_the_next() -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(3, 12, 32), dim=-1)
    right, shown = contrast(vectors, vectors, 0.05)
    late, _ = contrast(vectors[:, 2:], vectors[:, :-2], 0.05)
    assert shown["found"] == 1.0 and right < 0.1 < late
    twins = vectors.clone()
    twins[:, 1::2] = vectors[:, ::2]  # neighbours that sound alike cost nothing
    assert contrast(twins, twins, 0.05)[0] < 0.1


def clip(name: str, seed: int, frames: int = 44) -> Clip:
    rng = np.random.default_rng(seed)
    fields = rng.normal(size=(frames, 20, 20, 2)).astype(np.float16)
    speech = rng.integers(-9000, 9000, frames * 640).astype(np.int16)
    return Clip(name, fields, np.zeros((frames, 1, 1, 3), np.uint8), np.ones(frames, bool), speech)


def test_training_resumes_and_leaves_out(tmp_path: Path) -> None:
    clips = [clip("s1_x", 0), clip("synth_s0001_0", 1), clip("s26_a", 2), clip("s1_bbal6n", 3), clip("s1_short", 4, 20)]
    codec, loop = tiny_codec(), LoopConfig(steps=4, save_every=2, report_every=2)
    encoder = SpeechEncoder(speech_config("test")).requires_grad_(False)
    torch.manual_seed(0)
    network = train(tmp_path / "all", clips, codec, encoder, loop, QUICK, "test")
    torch.manual_seed(0)
    alone = train(tmp_path / "known", clips[:2], codec, encoder, loop, QUICK, "test")
    for name, value in network.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name  # the left-out ones change nothing
    train(tmp_path / "all", clips, codec, encoder, replace(loop, steps=6), QUICK, "test")
    steps = [json.loads(line)["step"] for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]  # resumed at 4
    with pytest.raises(ValueError, match="no clip has 24 frames"):
        train(tmp_path / "none", clips[2:4], codec, encoder, loop, QUICK, "test")


def test_gate_runs_on_people_that_were_left_out(scorer: SyncScorer) -> None:
    clips = [
        clip(n, i) for i, n in enumerate(("s26_a", "s26_b", "s31_a", "s1_known", "synth_s0001_0", "synth_s0099_0"))
    ]
    assert {k: len(v) for k, v in held_out(clips).items()} == {"s26": 2, "s31": 1, "synth": 1}
    rows = run_gate(scorer, clips)
    assert rows["s26"].clips == 2 and 0.2 < rows["s26"].auc_segment < 0.8  # noise tells nothing
    assert rows["s26"].damaged["scale 0.0"] == pytest.approx(0, abs=0.05)
    assert gate_markdown(rows).count("\n") > 10
    with pytest.raises(ValueError, match="were trained on"):
        held_out(clips[3:5])


def test_auc() -> None:
    assert auc([3, 4], [1, 2]) == 1.0 and auc([1, 2], [3, 4]) == 0.0 and auc([1, 1], [1]) == 0.5
    assert auc([2.0], [1.0, 3.0]) == 0.5


def test_damage_is_graded() -> None:
    fields = torch.randn(40, 20, 20, 2)
    found = damages(fields)
    torch.testing.assert_close(found["scale 0.0"], fields.mean(0).expand_as(fields))
    assert all(f.shape == fields.shape for f in found.values())
    spread = [found[f"blur {w}"].std(0).mean() for w in (3, 7, 15)]
    assert spread == sorted(spread, reverse=True)


def test_file_round_trip(trained: PocketSyncNet, tmp_path: Path) -> None:
    save_syncnet(trained, tmp_path / "syncnet.safetensors")
    loaded = load_syncnet(tmp_path / "syncnet.safetensors")
    assert loaded.config == trained.config and not loaded.training
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-3)


def test_shipped_network_scores_the_demo_clip() -> None:
    scorer = load_sync_scorer(POCKET)
    with demo_files() as (video, _):
        found = score_video(scorer, video)
    assert found.frames > 50 and abs(found.offset) <= 15 and 0 < found.distance < 2
