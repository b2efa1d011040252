"""Tests of the measurements themselves: on curves and pictures whose answer is known."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from lipstream.evaluation import correlation as corr
from lipstream.evaluation.closure import Closure, SpokenClip, closure, load_spoken
from lipstream.evaluation.codec import gate_passed, gate_rows, group_starts, numbers_per_frame, score_canvas
from lipstream.evaluation.fidelity import check_fidelity
from lipstream.evaluation.opening import mouth_opening
from lipstream.evaluation.pictures import psnr, quality, ssim, thumbnail
from lipstream.evaluation.protocol import as_json, as_markdown, summarise
from lipstream.evaluation.reversed import ReversedResult, write_reversed, wrong_partners
from lipstream.evaluation.sharpness import mouth_sharpness, sharpness_ratio
from lipstream.evaluation.speed import run_command, run_warm, write_input
from lipstream.faces.composite import Patch
from lipstream.media.bounce import BouncingReader
from lipstream.media.reader import SourceFrame, VideoReader, replace_region
from lipstream.media.speech import count_speech_samples
from lipstream.media.writer import VideoWriter
from lipstream.models.codec import FLAVOURS, PocketCodec
from lipstream.options import SyncOptions


def smooth_curve(frames: int = 80, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=frames)
    return np.convolve(noise, np.ones(5) / 5, mode="same")


def write_clip(path: Path, frames: int = 12, size: tuple[int, int] = (64, 48)) -> Path:
    """A silent-picture clip with a moving square and a tone of the same length."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "10"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(frames):
            image = np.full((size[1], size[0], 3), 10 + 15 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        tone = (np.sin(np.arange(frames * 640) / 9) * 8000).astype(np.int16)
        block = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        block.sample_rate, block.pts = 16000, 0
        container.mux(audio.encode(block))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


# ------------------------------------------------------------------ curves


def test_opening_is_free_of_size_and_place() -> None:
    landmarks = np.zeros((468, 2))
    landmarks[33], landmarks[263] = (0, 0), (100, 0)
    for upper, lower in ((13, 14), (82, 87), (312, 317)):
        landmarks[lower] = landmarks[upper] + (0, 20)
    assert mouth_opening(landmarks) == pytest.approx(0.2)
    assert mouth_opening(landmarks * 3 + 50) == pytest.approx(0.2)


@pytest.mark.parametrize("late", [-3, 0, 2])
def test_lag_is_positive_when_the_measured_curve_is_late(late: int) -> None:
    true = smooth_curve()
    found = corr.compare(np.roll(true, late) * 0.5, true)
    assert found.lag_pixel_frames == late
    assert found.best_r == pytest.approx(1, abs=0.02)
    assert found.amplitude == pytest.approx(0.5, abs=0.02)


def test_correlation_leaves_out_unknown_frames_and_refuses_constants() -> None:
    true = smooth_curve()
    holes = true.copy()
    holes[10:20] = np.nan
    assert corr.correlation(holes, true) == pytest.approx(1)
    assert math.isnan(corr.correlation(np.zeros(80), true))
    assert math.isnan(corr.correlation(true[:10], true))
    assert corr.compare(np.zeros(80), true).lag_pixel_frames is None


def test_crossed_uses_only_other_clips() -> None:
    curves = [smooth_curve(seed=i) for i in range(4)]
    assert abs(corr.crossed(curves, curves)) < 0.4
    assert math.isnan(corr.crossed(curves[:1], curves[:1]))


def spoken() -> tuple[SpokenClip, np.ndarray]:
    """Vowel, p, vowel, p at 25 fps, and an opening curve that follows it."""
    opening = np.full(40, 0.2)
    opening[10:14] = opening[30:34] = 0.0
    times = ((0.0, 0.4), (0.4, 0.56), (0.56, 1.2), (1.2, 1.36))
    return SpokenClip(visemes=("AA", "PBM", "AA", "PBM"), times_s=times, drawn_opening=opening, frame_rate=25), opening


def test_closures_are_counted_and_a_still_mouth_is_found_out() -> None:
    clip, opening = spoken()
    good = closure(opening + 0.01, opening + 0.01, clip)
    assert (good.share, good.share_real, good.elsewhere) == (1, 1, 0)
    half = opening + 0.01
    half[29:35] = 0.15
    assert closure(half, opening + 0.01, clip).share == 0.5
    shut = closure(np.full(40, 0.01), opening + 0.01, clip)
    assert shut.share == 1 and shut.elsewhere == 1
    assert (good + shut).events == 4
    assert math.isnan(Closure().share)


def test_truth_without_visemes_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", opening=np.zeros(3))
    with pytest.raises(ValueError, match="lacks"):
        load_spoken(tmp_path / "a.npz")


# ---------------------------------------------------------------- pictures


def test_blur_lowers_sharpness_and_similarity() -> None:
    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 255, (40, 40, 3), np.uint8), (80, 80))
    landmarks = np.full((468, 2), 40.0)
    landmarks[33], landmarks[263], landmarks[61], landmarks[291] = (20, 20), (60, 20), (25, 40), (55, 40)
    soft = cv2.GaussianBlur(picture, (7, 7), 2)
    ratio = mouth_sharpness(soft, landmarks) / mouth_sharpness(picture, landmarks)
    assert 0 < ratio < 0.3
    assert math.isnan(mouth_sharpness(picture, landmarks + 500))
    assert sharpness_ratio(np.array([1.0, np.nan, 3.0]), np.array([2.0, 1.0, 6.0])) == 0.5
    assert psnr(picture, picture) == math.inf
    grey = picture[..., 0].copy()
    assert ssim(grey, grey) == pytest.approx(1)
    assert quality(soft, picture).ssim < 0.9 and quality(soft, picture).sharpness < 0.5


def test_psnr_and_thumbnail_numbers() -> None:
    black, grey = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 10, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * math.log10(25.5))
    picture = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    assert psnr(thumbnail(picture, 4800), picture) > psnr(thumbnail(picture, 1200), picture)
    assert np.array_equal(thumbnail(picture, 160 * 160 * 3), picture)


def test_group_starts_need_a_face_before_and_keep_source_away() -> None:
    tracked = np.ones(40, np.bool_)
    tracked[18] = False
    pairs = group_starts(tracked, 5)
    assert len(pairs) == 5
    for target, source in pairs:
        assert tracked[target - 4 : target + 4].all() and tracked[source : source + 4].all()
        assert abs(target - source) >= 4
    assert group_starts(np.zeros(40, np.bool_), 5) == []


def test_codec_gate_on_a_random_clip() -> None:
    codec = PocketCodec(FLAVOURS["test"]).eval()
    assert numbers_per_frame(codec) == 200
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(24, 20, 20, 2)).astype(np.float16)
    textures = rng.integers(0, 255, (24, 160, 160, 3), np.uint8)
    torch.manual_seed(0)
    rows = gate_rows(score_canvas(codec, fields, textures, np.ones(24, np.bool_), groups=2), codec)
    methods = {row.method: row for row in rows}
    assert set(methods) == {"codec", "paint alone", "linear", "thumbnail x1", "thumbnail x2", "source"}
    assert methods["thumbnail x2"].numbers_per_frame == 400 and methods["codec"].groups == 2
    assert not gate_passed(rows)  # an untrained codec


# ---------------------------------------------------------- files and runs


def test_reversed_video_keeps_timestamps_and_turns_pictures(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    assert write_reversed(clip, tmp_path / "back.mp4") == 12
    ahead, back = list(VideoReader(clip)), list(VideoReader(tmp_path / "back.mp4"))
    assert [f.seconds for f in ahead] == pytest.approx([f.seconds for f in back])
    levels = [float(f.image.mean()) for f in ahead]
    assert [float(f.image.mean()) for f in back] == pytest.approx(levels[::-1], abs=3)


def test_wrong_audio_is_never_the_own() -> None:
    clips = [Path("a"), Path("b"), Path("c")]
    assert all(a != b for a, b in zip(clips, wrong_partners(clips), strict=True))
    assert wrong_partners(clips[:1]) == [None]


def result(name: str, seed: int) -> ReversedResult:
    truth = smooth_curve(seed=seed)
    good = corr.compare(truth, truth)
    return ReversedResult(
        name=name,
        frames=80,
        frames_off=0,
        lost_frames=0,
        own=good,
        nothing=corr.compare(truth[::-1], truth),
        oracle=good,
        wrong_audio_r=0.1,
        sharpness=0.5,
        closure=Closure(events=4, closed=3, closed_real=4, vowels=5),
        nothing_closure=None,
        measured=truth,
        truth=truth,
    )


def test_summary_reports_means_failures_and_valid_json() -> None:
    summary = summarise([result("a", 0), result("b", 1)], {"c": "no face"})
    assert summary.r == pytest.approx(1) and summary.closure.share == 0.75 and summary.beats_wrong_audio == 2
    data = json.loads(as_json(summary))
    assert data["r"] == 1 and data["closure_shares"]["share"] == 0.75 and len(data["rows"][0]["truth"]) == 80
    text = as_markdown(summary)
    assert "| **mean of 2** |" in text and "FAILED c: no face" in text and "75%" in text
    assert json.loads(as_json(summarise([])))["r"] is None


@dataclass(frozen=True)
class Done:
    frame: SourceFrame
    synced: bool
    patch: Patch | None


class Painter:
    """A stand-in for LipSync that paints a rectangle; `leak` also changes a pixel outside of its mask."""

    def __init__(self, leak: bool = False) -> None:
        self.leak = leak

    def stream(self, video: Path, audio: Path, *, options: SyncOptions | None = None) -> Iterator[Done]:
        for frame in BouncingReader(VideoReader(video), count_speech_samples(audio)):
            rgb = np.full((16, 20, 3), 200, np.uint8)
            patch = Patch((10, 10, 30, 26), rgb, np.full((16, 20), 255, np.uint8))
            told = replace(patch, box=(12, 10, 32, 26)) if self.leak else patch
            yield Done(replace_region(frame, rgb, patch.box, patch.alpha > 0), True, told)

    def __call__(self, video: Path, audio: Path, output: Path, *, options: SyncOptions | None = None) -> None:
        with VideoWriter(output, like=VideoReader(video), quality=(options or SyncOptions()).quality) as writer:
            for done in self.stream(video, audio):
                writer.write(done.frame)


def test_fidelity_accepts_an_honest_mask_and_finds_a_leak(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    good = check_fidelity(Painter(), clip, clip)
    assert good.ok and good.frames == good.file_frames == good.synced_frames == 12
    assert good.mask_share == pytest.approx(320 / (64 * 48))
    bad = check_fidelity(Painter(leak=True), clip, clip)
    assert not bad.ok and bad.samples_outside > 0 and bad.stream_file_max_difference == 0


def test_speed_inputs_and_child_measurement(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    video, audio = write_input(clip, clip, tmp_path, 2, side_px=32)
    reader = VideoReader(video)
    assert (reader.width, reader.height, reader.fps) == (32, 32, Fraction(25))
    assert sum(1 for _ in reader) == 50 and count_speech_samples(audio) == 32000
    copy = "import shutil, sys; block = bytearray(64 << 20); shutil.copy(sys.argv[1], sys.argv[4])"
    done = run_command(video, audio, 50, [sys.executable, "-c", copy])
    assert 64 < done.peak_mib < 200 and done.fps > 0
    with pytest.raises(ValueError, match="exit status 3"):
        run_command(video, audio, 50, [sys.executable, "-c", "raise SystemExit(3)"])
    warm = run_warm(Painter(), video, audio, 50)
    assert warm.fps > 0 and 0 < warm.first_frame_seconds < 5
