"""Training stages on tiny networks and made-up clips: they run, learn, resume exactly, and never see the target."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lipstream.faces.canvas import FaceCanvas
from lipstream.models.audio import SpeechEncoder, speech_config
from lipstream.models.codec import FLAVOURS, PocketCodec
from lipstream.models.dit import DiT
from lipstream.training.codec import AreaWeight, PainterLoss, Sampler, fit_codes, texture_loss
from lipstream.training.coded import Coded, Windows, code_clips, shift_pitch
from lipstream.training.forcing import ForcingConfig, ForcingLoss, Listening, window_layout
from lipstream.training.loop import Loop, LoopConfig, LossFunction, Trainee
from lipstream.training.mouths import MouthTask
from lipstream.training.samples import load_clips
from tiny import assert_learns, coded_clips, made_up_clip, tiny_codec, tiny_dit


def test_loop_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def make() -> tuple[nn.Linear, object]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        data = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))

        def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
            value = (model(data[step : step + 1]) + torch.randn(1) - 1).square().mean()
            return value, {"value": value.item()}

        return model, loss

    config = LoopConfig(steps=20, lr=0.1, warmup=2, report_every=5, save_every=7)
    model, loss = make()
    whole = Loop([Trainee(model=model, loss=loss)], config, tmp_path / "whole").run()["model"]

    model, loss = make()
    first = Loop([Trainee(model=model, loss=loss)], config, tmp_path / "cut")
    while first.step < 9:  # killed two steps after the checkpoint of step 7
        first._one_step()
        if first.step == 7:
            first.save()
    model, loss = make()
    resumed = Loop([Trainee(model=model, loss=loss)], config, tmp_path / "cut")
    assert resumed.step == 7
    again = resumed.run()["model"]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and "grad_norm" in rows[-1]


def test_loop_stops_at_a_broken_gradient(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    broken = Trainee(model=model, loss=lambda step: (model.weight.sum() * float("inf"), {}))
    with pytest.raises(FloatingPointError, match="step 0"):
        Loop([broken], LoopConfig(steps=3), tmp_path).run()


def test_two_networks_take_turns_and_resume(tmp_path: Path) -> None:
    def make() -> tuple[Loop, list[str]]:
        torch.manual_seed(0)
        critic, student, turns = nn.Linear(1, 1), nn.Linear(1, 1), []

        def loss(name: str, model: nn.Linear) -> LossFunction:
            return lambda step: (turns.append(name), (model.weight.square().sum(), {}))[1]

        trainees = [
            Trainee(name="critic", model=critic, loss=loss("critic", critic)),
            Trainee(name="student", model=student, loss=loss("student", student), every=3, lr=0.5),
        ]
        return Loop(trainees, LoopConfig(steps=4, lr=0.1, save_every=2), tmp_path), turns

    loop, turns = make()
    loop.run(until=2)
    assert turns == ["critic", "student", "critic"]
    resumed, turns = make()
    resumed.run()
    assert resumed.step == 4 and turns == ["critic", "critic", "student"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"critic.loss", "student.loss"} < set(rows[-1])
    with pytest.raises(ValueError, match="another kind of run"):
        Loop([Trainee(model=nn.Linear(1, 1), loss=lambda step: (torch.zeros(()), {}))], LoopConfig(steps=4), tmp_path)


def test_learning_rate_warms_up_and_falls() -> None:
    config = LoopConfig(steps=1000, lr=1.0, warmup=10)
    assert config.lr_at(0) == pytest.approx(0.1, rel=1e-3)
    assert config.lr_at(10) > 0.99
    assert config.lr_at(1000) == pytest.approx(0.02)


def test_sampler_keeps_one_speaker_from_dominating() -> None:
    clips = [made_up_clip(f"s1_{i}", 16) for i in range(8)] + [made_up_clip("synth_a", 16)]
    sampler = Sampler(clips, seed=0, share={"s1": 0.3})
    assert sampler.weights[:8].sum() == pytest.approx(0.3)
    assert sampler.weights[8] == pytest.approx(0.7)


def test_left_out_speakers_and_clips_are_not_read(tmp_path: Path) -> None:
    for name in ("s26_a", "s1_b", "s1_c"):
        clip = made_up_clip(name, 16)
        np.savez(tmp_path / f"{name}.npz", field=clip.fields, ok=clip.tracked, wav=clip.speech)
        np.save(tmp_path / f"{name}.tex.npy", clip.textures)
    assert [c.name for c in load_clips([tmp_path], ("s26", "s1_c"))] == ["s1_b"]
    with pytest.raises(ValueError, match="no samples"):
        load_clips([tmp_path / "empty"])


def test_painter_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = PocketCodec(FLAVOURS["test"])
    sampler = Sampler([made_up_clip()], seed=0)
    kept = fit_codes(codec, sampler, clips=4)
    assert all(0 < share <= 1 for share in kept.values())
    loss = PainterLoss(codec, sampler, batch=2)
    losses = []
    trainee = Trainee(model=codec, loss=lambda step: (lambda out: (losses.append(out[0].item()), out)[1])(loss(step)))
    Loop([trainee], LoopConfig(steps=30, lr=5e-3, warmup=1), tmp_path).run()
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


def test_area_weight_is_small_inside_a_closed_mouth() -> None:
    canvas = FaceCanvas()
    weight = AreaWeight(canvas, (32, 112, 16, 144))
    closed = np.zeros((20, 20, 2), np.float32)
    # Press the canvas' open mouth (rows 56 to 83) into a line.
    rest = canvas.rest_map[4::8, 4::8, 1]
    closed[6:11, 5:15, 1] = rest[6:7, 5:15] - rest[6:11, 5:15]
    area = weight(torch.from_numpy(closed)[None])[0]
    assert area[36, 64] < 0.3 * area[5, 64]


def test_texture_loss_is_zero_only_at_the_target() -> None:
    target, weight = torch.rand(1, 3, 16, 16), torch.ones(1, 16, 16)
    assert texture_loss(target, target, weight) == 0
    assert texture_loss(target + 0.1, target, weight) > 0


@pytest.fixture(scope="module")
def coded() -> list[Coded]:
    return coded_clips(2, 44)


def test_windows_show_the_target_and_another_time_of_the_same_clip(coded: list[Coded]) -> None:
    windows = Windows(coded, np.ones(2), seed=0)
    for sink_apart in (False, True) * 8:
        target, audio, reference, shut, wide = windows.draw(sink_apart)
        assert target.shape == reference.shape == (7, 8, 10, 10) and audio.shape == (7, 4, 16)
        assert not any(torch.equal(target[i], reference[i]) for i in range(int(sink_apart), 7))
        clip = next(c for c in coded if any(torch.equal(m.float(), shut) for m in c.moving))
        lowest, highest = (
            next(o for o, m in zip(clip.opening, clip.moving, strict=True) if torch.equal(m.float(), end))
            for end in (shut, wide)
        )
        assert lowest <= highest
    clip = coded[0]
    target, audio = Windows([clip], np.ones(1), seed=3).draw()[:2]
    start = next(i for i in range(len(clip.still)) if torch.equal(clip.still[i].float(), target[0]))
    torch.testing.assert_close(target[1], clip.moving[start + 1].float())  # groups follow the first frame at once
    assert any(torch.equal(audio[1], rows[start + 1 : start + 5].float()) for rows in clip.speech)


def test_layouts_are_what_the_rolling_cache_shows() -> None:
    frames, visible = window_layout(2)
    assert frames == 7
    assert visible[0].tolist() == [True] + [False] * 6  # the sink sees itself
    assert visible[3].tolist() == [True] * 4 + [False] * 3  # the previous chunk sees the sink and itself
    assert visible[6].all()  # the current chunk sees everything
    assert window_layout(0)[1].all()


def test_forcing_learns_and_counts_only_hidden_cells(coded: list[Coded]) -> None:
    codec = tiny_codec()
    model = tiny_dit(codec)
    config = ForcingConfig(batch=4)
    task = MouthTask(codec, Windows(coded, np.ones(2), seed=0), config)
    loss = ForcingLoss(model, task, config)
    assert task.weight[:, : codec.config.known_rows].abs().max() == 0
    torch.manual_seed(0)
    assert_learns(model, loss)


def test_listening_tells_lips_that_follow_from_lips_that_do_not(coded: list[Coded]) -> None:
    codec = tiny_codec()
    task = MouthTask(codec, Windows(coded, np.ones(2), seed=0), ForcingConfig(batch=2))
    model = tiny_dit(codec).eval()

    class Knows(DiT):
        """Answers with the clean latents."""

        def forward(self, x, t, conditions, *, frame_mask=None):  # type: ignore[no-untyped-def, override]
            return truth[0]

    truth: list[torch.Tensor] = []
    pose_free = task.pose_free
    task.pose_free = lambda z: truth.append(pose_free(z)) or truth[-1]  # type: ignore[method-assign, func-returns-value]
    assert Listening(task, coded[:1])(Knows(model.config))["r_synth"] == pytest.approx(1.0, abs=1e-4)
    task.pose_free = pose_free  # type: ignore[method-assign]
    assert abs(Listening(task, coded[:1])(model)["r_synth"]) < 0.95


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_pitch_moves_and_timing_stays(factor: float) -> None:
    seconds = np.arange(32_000) / 16_000
    tone = np.sin(2 * np.pi * 200 * seconds).astype(np.float32)
    shifted = shift_pitch(tone, factor)
    assert len(shifted) == len(tone)
    spectrum = np.abs(np.fft.rfft(shifted[4000:20000]))
    assert spectrum.argmax() == pytest.approx(200 * factor, abs=3)
    bursts = (tone * (np.sin(2 * np.pi * 3 * seconds) > 0)).astype(np.float32)
    envelope = [np.convolve(np.abs(x), np.ones(320), "same")[2000:-2000] for x in (bursts, shift_pitch(bursts, factor))]
    lags = list(range(-800, 801, 80))
    best = lags[
        int(np.argmax([np.corrcoef(envelope[0][1000:-1000], np.roll(envelope[1], -k)[1000:-1000])[0, 1] for k in lags]))
    ]
    assert abs(best) <= 400  # 25 ms, well below a pixel frame


def test_coded_clips_are_kept_for_the_next_run(tmp_path: Path) -> None:
    codec, encoder = tiny_codec(), SpeechEncoder(speech_config("test"))
    clips = [made_up_clip(f"synth_{i}", 20, seed=i) for i in range(2)]
    made, weights = code_clips(codec, clips, encoder, 2, tmp_path)
    (kept,) = tmp_path.glob("*.pt")
    again, same = code_clips(codec, clips, encoder, 2, tmp_path)
    assert len(made) == len(again) == len(weights) == 4 and (weights == same).all()
    for a, b in zip(made, again, strict=True):
        assert a.name == b.name and a.speaker == "synth" and a.frames == 20
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    code_clips(codec, clips[:1], encoder, 2, tmp_path)
    assert len([*tmp_path.glob("*.pt")]) == 2 and kept.exists()
    with pytest.raises(ValueError, match="no clip has 41 frames"):
        Windows(made, weights, seed=0, latent_frames=8)
