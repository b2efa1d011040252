"""The teacher's sampler, the metrics and the whole analysis, on tiny networks and on a teacher made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from lipstream.analysis.figures import draw_factorial, draw_trade_off
from lipstream.analysis.metrics import FrameMetrics, PocketMetrics, field_score, laplacian_form, pearson
from lipstream.analysis.pocket import analysis_clip, pocket_clips, pocket_network
from lipstream.analysis.study import Findings, Study, StudyConfig
from lipstream.analysis.trajectory import CELLS, AnalysisClip, run_factorial, run_trajectory
from lipstream.checkpoints.networks import save_codec, save_dit
from lipstream.cli.analyze import choose, spread
from lipstream.cli.main import main
from lipstream.diffusion.guidance import guided, null_conditions
from lipstream.diffusion.schedule import renoise
from lipstream.diffusion.teacher import Teacher, teacher_steps, teacher_times
from lipstream.models.audio import SpeechEncoder, save_speech_encoder, speech_config
from lipstream.models.dit import FLAVOURS, Conditions, DiT
from lipstream.training.codec import Sampler
from lipstream.training.coded import code_clip
from lipstream.training.samples import Clip
from made_teacher import made_clips, made_teacher
from test_training import made_up_clip
from tiny import tiny_codec, tiny_dit


def dit_with_text() -> tuple[DiT, Conditions]:
    torch.manual_seed(0)
    config = FLAVOURS["test"]
    model = DiT(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    c = config.latent_channels
    return model, Conditions(
        reference=torch.randn(1, c, 1, 4, 4),
        mask=torch.ones(1, 1, 1, 4, 4),
        masked_video=torch.randn(1, c, 3, 4, 4),
        ref_sequence=torch.randn(1, c, 3, 4, 4),
        audio=torch.randn(1, 3, config.audio_hidden),
        text=torch.randn(1, 2, config.text_dim),
    )


def test_grid_is_the_papers() -> None:
    times = teacher_times()
    assert len(times) == 51 and times[0] == 0.999 and times[50] == 0
    assert [round(times[j], 3) for j in (20, 30, 40)] == [0.882, 0.769, 0.555]


def test_sampler_is_the_euler_loop() -> None:
    model, conditions = dit_with_text()
    null = null_conditions(conditions, "text+audio", torch.zeros(1, 1, 8))
    teacher = Teacher(network=model, conditions=conditions, null=null)
    noise = torch.randn(1, 4, 3, 4, 4)
    steps = list(teacher_steps(teacher, noise, 3.0, teacher_times(6)))
    x = noise
    for step, time, following in zip(steps, teacher_times(6)[:-1], teacher_times(6)[1:], strict=True):
        t = torch.tensor([time], dtype=torch.float64)
        torch.testing.assert_close(step.x, x)
        velocity = guided(model.predict(x, t, conditions).velocity, model.predict(x, t, null).velocity, 3.0)
        torch.testing.assert_close(step.x0, x - time * velocity, atol=1e-4, rtol=1e-4)
        x = x + velocity * (following - time)
    torch.testing.assert_close(x, steps[-1].x0, atol=1e-4, rtol=1e-4)  # the last step ends at its own prediction


def test_drop_modes_drop_what_they_say() -> None:
    model, conditions = dit_with_text()
    empty = torch.zeros(1, 1, 8)
    both, audio = null_conditions(conditions, "text+audio", empty), null_conditions(conditions, "audio", empty)
    assert both.audio is None and both.text is empty and both.reference is conditions.reference
    assert audio.audio is None and audio.text is conditions.text
    x, t = torch.randn(1, 4, 3, 4, 4), torch.tensor([0.8], dtype=torch.float64)
    outputs = [model(x, t, c) for c in (conditions, both, audio)]
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[2])
    assert null_conditions(dataclasses.replace(conditions, text=None)).audio is None  # no text, nothing to replace
    with pytest.raises(ValueError, match="empty prompt"):
        null_conditions(conditions)
    with pytest.raises(ValueError, match="text\\+audio or audio"):
        null_conditions(conditions, "text")  # type: ignore[arg-type]


def test_trajectory_runs_are_what_they_are_called() -> None:
    model, conditions = dit_with_text()
    teacher = Teacher(network=model, conditions=conditions, null=null_conditions(conditions, "audio"))
    noise = torch.randn(1, 4, 3, 4, 4)
    found = run_trajectory(teacher, noise, 2.0, steps=5)
    for run, scale in ((found.plain, 1.0), (found.guided, 2.0)):
        expected = torch.cat([s.x0 for s in teacher_steps(teacher, noise, scale, teacher_times(5))])
        torch.testing.assert_close(run, expected)
    torch.testing.assert_close(found.local[0], found.guided[0])  # one state, the noise
    assert not torch.allclose(found.local[2], found.guided[2])


def test_factorial_cells_are_two_calls() -> None:
    model, conditions = dit_with_text()
    teacher = Teacher(network=model, conditions=conditions, null=null_conditions(conditions, "audio"))
    noise, fresh = torch.randn(2, 1, 4, 3, 4, 4)
    times = teacher_times()
    (landing,) = run_factorial(teacher, noise, fresh, 2.0, [30])
    assert landing.step == 30 and landing.x0["euler"].shape[0] == len(CELLS)
    t = torch.tensor([times[30]], dtype=torch.float64)
    for cell, euler, renoised in zip(CELLS, landing.x0["euler"], landing.x0["renoise"], strict=True):
        scales = [1.0 if part == "plain" else 2.0 for part in cell.split("+")]
        first = teacher(noise, times[0], scales[0])
        x = noise + (noise - first) / times[0] * (times[30] - times[0])
        torch.testing.assert_close(euler, teacher(x, times[30], scales[1])[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(renoised, teacher(renoise(first, fresh, t), times[30], scales[1])[0])
    with pytest.raises(ValueError, match="got 50"):
        next(run_factorial(teacher, noise, fresh, 2.0, [50]))


def test_metrics_of_truth_still_and_spoiled_mouths() -> None:
    codec = tiny_codec()
    clip = made_clips(codec, 1)[0]
    true = clip.target
    still = true.mean(1, keepdim=True).expand_as(true)
    rough = true + torch.randn(true.shape, generator=torch.Generator().manual_seed(9))
    scores = PocketMetrics(codec)(torch.stack([true, still, (true + still) / 2, rough]), clip)
    assert scores["mouth_error"][0] == 0 and scores["gap_r"][0] == pytest.approx(1, abs=1e-4)
    assert scores["sharp_space"][0] == pytest.approx(1) and scores["sharp_time"][0] == pytest.approx(1)
    assert scores["mouth_error"][1] == pytest.approx(1) and scores["sharp_time"][1] < 0.8
    assert scores["mouth_error"][2] == pytest.approx(0.5)
    assert scores["gap_amplitude"][2] < 1
    assert scores["sharp_space"][3] > 1.1 and scores["gap_r"][3] < 0.99


def test_edges_are_those_of_the_decoded_texture() -> None:
    codec = tiny_codec()
    codec.texture.mean.copy_(torch.rand(codec.texture.mean.shape))
    code = torch.randn(2, codec.config.texture_channels)
    cells = codec.texture.decode(code).reshape(2, 4, 3, 16, 16).mean(2)
    centre = cells[..., 1:-1, 1:-1]
    around = cells[..., :-2, 1:-1] + cells[..., 2:, 1:-1] + cells[..., 1:-1, :-2] + cells[..., 1:-1, 2:]
    ones = torch.cat([code, torch.ones(2, 1)], 1)
    energy = torch.einsum("ni, ij, nj -> n", ones, laplacian_form(codec), ones)
    torch.testing.assert_close(energy, (around - 4 * centre).square().mean((1, 2, 3)))


def test_a_scorer_takes_the_place_of_the_lip_gap() -> None:
    codec = tiny_codec()
    clip = made_clips(codec, 1)[0]
    seen: list[tuple[int, ...]] = []

    def confidence(fields: Tensor, rows: Tensor) -> Tensor:
        seen.extend([tuple(fields.shape), tuple(rows.shape)])
        return torch.arange(len(fields))

    metrics = PocketMetrics(codec, field_score(codec, confidence))
    scores = metrics(clip.target[None].expand(3, -1, -1, -1, -1), clip)
    assert metrics.sync == "confidence" and not metrics.missing and scores["confidence"].tolist() == [0, 1, 2]
    assert seen == [(3, 57, 20, 20, 2), (3, 57, 2)]
    assert "SyncNet" in PocketMetrics(codec).missing[0]


def test_frame_metrics_look_at_the_mouth_only() -> None:
    mask = torch.zeros(8, 8)
    mask[4:7, 2:6] = 1
    clip = made_clips(tiny_codec(), 1)[0]

    def decode(z: Tensor) -> Tensor:  # [1, K, T, 10, 10] -> [1, T, 3, 8, 8]
        return z[:, :3, :, :8, :8].transpose(1, 2)

    metrics = FrameMetrics(decode, mask)
    outside, inside = clip.target.clone(), clip.target.clone()
    outside[:, :, :3] += 1
    inside[:, :, 5] += 1
    scores = metrics(torch.stack([clip.target, outside, inside]), clip)
    assert scores["mouth_l1"][:2].tolist() == [0, 0] and scores["mouth_l1"][2] == pytest.approx(1 / 3)
    assert metrics.error == "mouth_l1" and len(metrics.missing) == 2
    perceptual = FrameMetrics(decode, mask, distance=lambda a, b: (a - b).abs().max())
    assert perceptual.error == "mouth_lpips" and "mouth_lpips" in perceptual(inside[None], clip)
    with pytest.raises(ValueError, match="empty"):
        FrameMetrics(decode, torch.zeros(4, 4))


def study(folder: Path, *, gain: float = 1.0, calls: list[float] | None = None, **changes: object) -> Study:
    config = StudyConfig(**{"scale": 3.0, "drop": "audio", "landings": tuple(range(1, 50, 4)), **changes})  # type: ignore[arg-type]
    codec = tiny_codec()
    return Study(made_teacher((15, 30), gain=gain, calls=calls), PocketMetrics(codec), config, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path]:
    work = study(tmp_path_factory.mktemp("study"))
    return work.run(made_clips(tiny_codec(), 6)), work.folder


def test_known_trade_off_is_found(found: tuple[Findings, Path]) -> None:
    findings = found[0]
    for derived in (findings.derived, findings.derived_local):
        assert derived.window_steps is not None and np.abs(np.subtract(derived.window_steps, (15, 30))).max() <= 2
        assert derived.landing_step is not None and 15 <= derived.landing_step <= 30
    gain = findings.trade.gain.mean
    assert gain[15:31].min() > 0.05 and np.abs(gain[:15]).max() < 0.05 and np.abs(gain[31:]).max() < 0.05


def test_useless_guidance_is_reported(tmp_path: Path) -> None:
    findings = study(tmp_path, gain=0.0).run(made_clips(tiny_codec(), 3))
    assert findings.derived.guidance == "never" and findings.derived.landing_step is None


def test_figures_and_data_file(found: tuple[Findings, Path], tmp_path: Path) -> None:
    findings, folder = found
    draw_trade_off(findings, tmp_path / "a.png")
    draw_factorial(findings, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert picture is not None and picture.shape[1] > 900 and picture.std() > 5
    data = json.loads((folder / "curves.json").read_text())
    assert data["derived"]["window_steps"] == list(findings.derived.window_steps or ())
    mean = data["curves"]["trajectory/guided"]["mouth_error"]["mean"]
    np.testing.assert_allclose(mean, findings.trade.error_guided.mean)
    assert set(data["curves"]["factorial/euler/plain+guided"]) >= {"gap_r", "sharp_space"}


def test_analysis_is_resumed_and_refuses_others_files(tmp_path: Path) -> None:
    clips, calls = made_clips(tiny_codec(), 3), []  # type: ignore[var-annotated]
    study(tmp_path, landings=(10, 30), calls=calls).run(clips[:2])
    first = len(calls)
    assert first == 2 * (50 * 4 + 2 + 2 * 2 * 2 * 2)
    again = study(tmp_path, landings=(10, 30), calls=calls).run(clips)
    assert len(calls) - first == first // 2  # one new clip
    assert again.clips == ("made_0", "made_1", "made_2")
    (tmp_path / "audio" / "scores" / "made_0.json").unlink()
    calls.clear()
    renewed = study(tmp_path, landings=(10, 30), calls=calls).run(clips)
    assert len(calls) == 2 + 16  # the factorial; the trajectory is on disk
    np.testing.assert_array_equal(renewed.trade.gain.mean, again.trade.gain.mean)
    with pytest.raises(ValueError, match=r"made_0\.safetensors: made with other settings"):
        study(tmp_path, landings=(10, 30), seed=1).run(clips)
    with pytest.raises(ValueError, match="at least two clips"):
        study(tmp_path).run(clips[:1])


# ------------------------------------------------------------------ pocket samples


def test_pocket_clip_is_what_the_teacher_is_trained_on() -> None:
    codec, clip = tiny_codec(), made_up_clip(frames=70)
    from lipstream.faces.canvas import FaceCanvas
    from lipstream.inside import LipRuler

    ruler = LipRuler(FaceCanvas())
    coded = code_clip(codec, Sampler([clip], 0), clip, torch.randn(1, 70, 16).half(), plain=True, ruler=ruler)
    item = analysis_clip(coded, codec, tiny_dit(codec))
    start = (70 - 57) // 2
    assert item.target.shape == (8, 15, 10, 10) and item.speech.shape == (15, 4, 16)
    torch.testing.assert_close(item.speech[1:].flatten(0, 1), coded.speech[0, start + 1 : start + 57].float())
    torch.testing.assert_close(item.target[:, 1], codec.pose_free(coded.moving[start + 1][None].float())[0])
    assert item.target[:, :, : codec.config.known_rows].abs().max() == 0
    for shown, row in (
        (item.conditions.reference[:, :, 0], coded.moving[coded.opening.argmin()]),
        (item.conditions.masked_video[:, :, 3], coded.moving[coded.opening.argmax()]),
        (item.conditions.ref_sequence[:, :, 7], coded.moving.float().mean(0)),
    ):
        torch.testing.assert_close(shown, codec.pose_free(row[None].float()))


def write_samples(folder: Path, names: list[str], frames: int = 64) -> None:
    folder.mkdir()
    for seed, name in enumerate(names):
        clip: Clip = made_up_clip(name, frames, seed)
        np.savez(folder / f"{name}.npz", field=clip.fields, ok=clip.tracked, wav=clip.speech)
        np.save(folder / f"{name}.tex.npy", clip.textures)


def test_command_analyzes_a_random_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codec = tiny_codec()
    torch.manual_seed(1)
    save_codec(codec, tmp_path / "codec.safetensors")
    save_dit(tiny_dit(codec), 1.0, tmp_path / "teacher.safetensors")
    encoder = SpeechEncoder(speech_config("test"))
    save_speech_encoder(encoder, tmp_path / "speech.safetensors")
    write_samples(tmp_path / "samples", ["s26_a", "s31_b", "s1_c"])
    out = tmp_path / "out"
    command = ["analyze", "--model", str(tmp_path / "teacher.safetensors"), "--samples", str(tmp_path / "samples")]
    command += ["--codec", str(tmp_path / "codec.safetensors"), "--speech", str(tmp_path / "speech.safetensors")]
    command += ["--syncnet", "none"]
    assert main([*command, "-o", str(out), "--steps", "8", "--landings-every", "3"]) == 0
    shown = capsys.readouterr()
    assert "2 clips, sync = gap_r" in shown.out and "not measured: SyncNet" in shown.out and "guide" in shown.out
    assert "2/2" in shown.err
    assert {p.name for p in (out / "audio").iterdir()} == {
        "trajectories", "scores", "curves.json", "tradeoff.png", "factorial.png",
    }  # fmt: skip
    data = json.loads((out / "audio" / "curves.json").read_text())
    assert data["config"]["scale"] == 4.5 and data["landings"] == [3, 6]

    def fails(*more: str) -> str:
        assert main([*command, "-o", str(out), *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "none of the 3 samples" in fails("--only", "s99")
    assert "at least two clips" in fails("--only", "s1_c")
    assert "above 1" in fails("--scale", "1")
    assert "other settings" in fails("--scale", "2")
    assert "SyncNet hears" in fails("--syncnet", str(pocket_weights().parent / "syncnet.safetensors"))
    assert "no such weights file" in fails("--model", "none.safetensors")
    assert "48 latent channels" in fails("--model", str(pocket_weights()))


def pocket_weights() -> Path:
    from lipstream.cli.analyze import POCKET

    return POCKET / "dit.safetensors"


def test_clips_are_spread_over_the_list() -> None:
    assert spread(list(range(20)), 4) == [2, 7, 12, 17] and spread([1, 2], 10) == [1, 2]
    clips = [made_up_clip(f"{speaker}_{i}", 16) for speaker in ("s1", "s26", "s31") for i in range(3)]
    assert {c.speaker for c in choose(clips, None, 4)} == {"s26", "s31"}


def test_pocket_network_is_bidirectional() -> None:
    codec = tiny_codec()
    model = tiny_dit(codec)
    encoder = SpeechEncoder(speech_config("test"))
    clips = pocket_clips([made_up_clip(f"synth_{i}", 60, i) for i in range(2)], codec, encoder, model, latent_frames=6)
    clip: AnalysisClip = clips[0]
    x = torch.randn(1, *clip.target.shape)
    t = torch.tensor([0.9], dtype=torch.float64)
    before = pocket_network(model)(x, t, clip.conditions)
    x[:, :, -1] += 5
    assert not torch.equal(pocket_network(model)(x, t, clip.conditions)[:, :, 0], before[:, :, 0])
    with pytest.raises(ValueError, match="at least two clips of 57 frames"):
        pocket_clips([made_up_clip(frames=50)], codec, encoder, model)


def test_pearson_of_constant_curves_is_unknown() -> None:
    a = torch.tensor([[1.0, 2, 3], [5, 5, 5], [3, 2, 1]])
    assert pearson(a, a[:1]).nan_to_num(9).tolist() == pytest.approx([1, 9, -1])
