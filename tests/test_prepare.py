"""From videos to training samples: the grid, the cuts, the segments, the filters, the shards and the report."""

from __future__ import annotations

import io
import json
import tarfile
import wave
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipstream.batch.jobs import Job
from lipstream.batch.state import read_report
from lipstream.cli.demo import demo_files
from lipstream.cli.main import main
from lipstream.data.prepare import pack as packing
from lipstream.data.prepare import work
from lipstream.data.prepare.filters import SegmentView, Sharpness, SyncMeasure, open_quality
from lipstream.data.prepare.segments import SegmentConfig, Stretch, on_grid, plan_segments
from lipstream.data.prepare.shots import ShotChanges, find_cuts
from lipstream.data.prepare.work import PrepareConfig, prepare_video
from lipstream.evaluation.speed import write_wav
from lipstream.faces.canvas import FaceCanvas
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader
from lipstream.media.speech import SpeechWindow, load_speech
from lipstream.models.syncnet import FLAVOURS, SyncNet, prepare_frames
from lipstream.training.judging import OfficialSync, open_sync
from lipstream.training.samples import load_clips

SHOT = 30  # frames of each shot of the test video
LATE = 3  # frames by which its sound is late
CONFIG = SegmentConfig(min_pixel_frames=24, max_pixel_frames=28)


def write_video(path: Path, pictures: list[np.ndarray], late: int = LATE) -> None:
    """25 fps with PCM sound that says in every sample which frame it belongs to (level = frame / 200)."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i, picture in enumerate(pictures):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            level = np.full((1, 640), round(max(0, i - late) / 200 * 32768), np.int16)
            sound = av.AudioFrame.from_ndarray(level, format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 16000, 640 * i, Fraction(1, 16000)
            container.mux(audio.encode(sound))
        for stream in (video, audio):
            container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn head, then a grey wall, then another shot of a drawn head (mirrored, other light)."""
    with demo_files() as (clip, _):
        frames = [frame.image for frame, _ in zip(VideoReader(clip), range(SHOT), strict=False)]
    wall = np.tile(np.linspace(40, 90, frames[0].shape[1], dtype=np.uint8)[None, :, None], (frames[0].shape[0], 1, 3))
    other = [np.ascontiguousarray(cv2.convertScaleAbs(frame[:, ::-1], alpha=0.7)) for frame in frames]
    path = tmp_path_factory.mktemp("prepare") / "two shots.mkv"
    write_video(path, [*frames, *[wall] * 10, *other])
    return path


@dataclass
class Judge:
    """Says the same of every segment."""

    confidence: float = 5.0
    late_frames: int = LATE
    minimum: float = 3.0
    name: str = "SyncNet"
    max_shift: int = 15

    def judge(self, segment: SegmentView) -> SyncMeasure:
        assert len(segment.samples) == 640 * len(segment.pictures) == 640 * len(segment.landmarks)
        assert segment.pictures[0].shape == (512, 512, 3)
        return SyncMeasure(confidence=self.confidence, distance=1.0, late_frames=self.late_frames)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def levels(content: bytes) -> np.ndarray:
    """Which frame of the source each frame of a sample's sound belongs to."""
    with wave.open(io.BytesIO(content)) as audio:
        samples = np.frombuffer(audio.readframes(audio.getnframes()), "<i2")
    return np.round(samples.reshape(-1, 640)[:, 320] / 32768 * 200).astype(int)


def test_two_shots_become_two_samples_with_their_sound_in_time(video: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    told = prepare_video(video, "key", target, PrepareConfig(segments=CONFIG), Judge(), Sharpness(0.0))
    stretches = [(line["start"], line["stop"], line["reason"]) for line in told["stretches"]]
    # 30 frames are more than 28, and two halves would be too short; the last 3 frames of sound came too late.
    assert stretches == [
        (0, 28, ""), (28, 30, "rest of a shot"), (30, 40, "no face"), (40, 68, ""), (68, 70, "rest of a shot"),
    ]  # fmt: skip
    files = members(target)
    assert [name for name in files if name.startswith("key_000040")] == [
        f"key_000040.{suffix}" for suffix in ("mp4", "wav", "txt", "json")
    ]
    for start in (0, 40):
        heard = levels(files[f"key_{start:06}.wav"])
        expected = np.arange(start, start + 28)
        assert (np.abs(heard - expected)[: 70 - LATE - start] <= 1).all(), "the sound of the frames that show"
        with av.open(io.BytesIO(files[f"key_{start:06}.mp4"])) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.width, stream.height) == (25, 512, 512)
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(pictures) == 28 and pictures[14].std() > 20
    assert json.loads(files["key_000040.json"])["late_frames"] == LATE
    again = tmp_path / "b.tar"
    prepare_video(video, "key", again, PrepareConfig(segments=CONFIG), Judge(), Sharpness(0.0))
    assert again.read_bytes() == target.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "b.tar"}


def test_filters_drop_and_say_why(tmp_path: Path) -> None:
    write_wav(np.zeros(60 * 640, np.float32), tmp_path / "a.wav")
    pictures = [np.zeros((512, 512, 3), np.uint8)] * 20

    def reason(judge: Judge | None, quality: Sharpness | None = None, start: int = 0) -> tuple[str, bool]:
        stretch = Stretch(start=start, stop=start + 20)
        taken = work._Taken(stretch, np.zeros((20, 468, 3), np.float32), pictures)
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            speech = SpeechWindow(tmp_path / "a.wav", work.BACK_SAMPLES)
            said = work._finish(taken, speech, tar, "key", Path("a.mp4"), judge, quality)
        return said["reason"], bool(members(tmp_path / "a.tar"))

    assert reason(Judge(confidence=3.0), Sharpness(0.0)) == ("", True)
    assert reason(None) == ("", True)
    assert reason(Judge(confidence=2.9)) == ("SyncNet confidence below 3", False)
    assert reason(Judge(confidence=float("nan"))) == ("SyncNet confidence below 3", False)
    assert reason(Judge(late_frames=-15)) == ("offset of 15 frames or more", False)
    assert reason(None, Sharpness(1e6)) == ("sharpness below 1e+06", False)
    assert reason(Judge(late_frames=-4)) == ("no sound after offset correction", False)
    assert reason(Judge(late_frames=-4), start=4) == ("", True)
    assert reason(None, start=42) == ("", True), "up to 100 ms of missing sound are silence"
    assert reason(None, start=50) == ("no sound", False)


def test_the_command_makes_resumes_and_reports_a_data_set(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / video.name).write_bytes(video.read_bytes())
    (tmp_path / "in" / "broken.mp4").write_bytes(b"not a video")
    out = tmp_path / "out"
    command = ["prepare", str(tmp_path / "in"), "-o", str(out), "--min-frames", "24", "--max-frames", "28"]
    command += ["--quality", "none", "--workers", "1"]
    assert main([*command, "--dry-run"]) == 1 and not out.exists()
    assert "broken.mp4: would fail" in capsys.readouterr().out
    assert main(command) == 1  # one video is broken
    said = capsys.readouterr()
    assert "skipped: A/V offset correction and sync filter: no SyncNet given" in said.err and "broken.mp4" in said.err
    assert "2 samples" in said.out and "dropped: no face: 1 stretches" in said.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples"] == 2 and summary["dropped"]["no face"] == {"stretches": 1, "seconds": 0.4}
    assert len(summary["skipped_steps"]) == 2 and next(iter(summary["failed"])).endswith("broken.mp4")
    assert {r.state for r in read_report(out / "report.jsonl").values()} == {"done", "failed"}
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == ["index.jsonl", "prepare.json", "report.jsonl", "shards/000000.tar", "summary.json"]
    index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["start_pixel_frames"]) for line in index] == [
        ("shards/000000.tar", 0),
        ("shards/000000.tar", 40),
    ]
    before = (out / "shards/000000.tar").read_bytes()
    (tmp_path / "in" / "broken.mp4").unlink()
    assert main(command) == 0
    assert "0 videos cut, 1 were finished already" in capsys.readouterr().out
    assert (out / "shards/000000.tar").read_bytes() == before
    assert main([*command[:-4], "--quality", "sharpness"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


def test_samples_of_the_pocket_training(video: Path, tmp_path: Path) -> None:
    config = PrepareConfig(format="samples", segments=CONFIG)
    job = Job(id="a", output=tmp_path / "videos.tar")
    prepare_video(video, "speaker", job.output, config, Judge(), canvas=FaceCanvas())
    packing.pack([job], tmp_path / "out", "samples")
    clips = load_clips([tmp_path / "out"])
    assert [(clip.name, clip.speaker, len(clip), len(clip.speech)) for clip in clips] == [
        ("speaker_000000", "speaker", 28, 28 * 640),
        ("speaker_000040", "speaker", 28, 28 * 640),
    ]
    assert clips[0].textures.shape == (28, 160, 160, 3) and clips[0].tracked.all()
    assert not job.output.exists()


def fake_tar(path: Path, names: list[str]) -> Job:
    with tarfile.open(path, "w") as tar:
        for name in names:
            for suffix, content in (("mp4", b"m"), ("wav", b"w"), ("txt", b"t"), ("json", b'{"x": 1}')):
                about = tarfile.TarInfo(f"{name}.{suffix}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return Job(id=path.stem, output=path)


@pytest.mark.parametrize("form", ["webdataset", "folders"])
def test_packing_goes_on_where_a_kill_stopped_it(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is stopped before each of its renames in turn; continued, it gives what it gives without a stop."""

    def make(folder: Path) -> list[Job]:
        folder.mkdir()
        return [fake_tar(folder / f"{v}.tar", [f"{v}_{i}" for i in range(count)]) for v, count in (("a", 3), ("b", 4))]

    def state_of(folder: Path) -> dict[str, bytes]:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return {name: content for name, content in files.items() if name != "list.txt"}  # absolute paths

    def run(folder: Path, jobs: list[Job]) -> None:
        (folder / "out").mkdir(exist_ok=True)
        packing.pack(jobs, folder / "out", form, shard_samples=2)

    run(tmp_path / "whole", make(tmp_path / "whole"))
    whole = state_of(tmp_path / "whole" / "out")
    assert len([name for name in whole if name.endswith((".tar", ".mp4"))]) == (4 if form == "webdataset" else 7)
    real, stops = packing.os.replace, 0
    while True:
        folder, left = tmp_path / f"stop{stops}", stops
        jobs = make(folder)

        def replace(a: Path, b: Path) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(a, b)

        monkeypatch.setattr(packing.os, "replace", replace)
        try:
            run(folder, jobs)
            break  # all renames were reached
        except KeyboardInterrupt:
            monkeypatch.setattr(packing.os, "replace", real)
        run(folder, jobs)
        assert state_of(folder / "out") == whole
        assert not any(job.output.exists() for job in jobs)
        stops += 1
    assert stops >= 5


# ------------------------------------------------------------------------------------------ parts


def test_the_grid_shows_what_a_player_shows() -> None:
    def grid(pts: list[int], rate: Fraction) -> list[int]:
        frames = [SimpleNamespace(index=i, pts=p) for i, p in enumerate(pts)]
        reader = type("R", (), {"time_base": 1 / rate, "__iter__": lambda self: iter(frames)})()
        return [frame.index for frame in on_grid(reader)]  # type: ignore[arg-type]

    assert grid([7, 8, 9], Fraction(25)) == [0, 1, 2]
    assert grid(list(range(60)), Fraction(50)) == list(range(0, 60, 2))
    assert grid(list(range(30)), Fraction(30)) == [i * 30 // 25 for i in range(25)]
    assert grid([0, 5, 6], Fraction(25)) == [0, 0, 0, 0, 0, 1, 2]  # a long frame, variable rate
    assert grid([0], Fraction(1000)) == [0]


def test_cuts_are_found_and_pans_and_flicker_are_none() -> None:
    rng = np.random.default_rng(1)
    scenes = [cv2.resize(rng.integers(0, 255, (6, 6, 3), np.uint8), (160, 120)) for _ in range(3)]
    cut = [scenes[0]] * 8 + [scenes[1]] * 8 + [scenes[2]] * 8
    noisy = [np.clip(s.astype(int) + rng.integers(-12, 13, s.shape), 0, 255).astype(np.uint8) for s in cut]
    wide = cv2.resize(rng.integers(0, 255, (6, 24, 3), np.uint8), (640, 120))
    pan = [np.ascontiguousarray(wide[:, x : x + 160]) for x in range(0, 480, 20)]
    for frames, expected in ((noisy, [8, 16]), (pan, [])):
        shots = ShotChanges()
        assert find_cuts(np.array([shots.step(frame) for frame in frames])) == expected


@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 90)), min_size=1, max_size=8),
    st.integers(1, 40), st.integers(0, 40),
)  # fmt: skip
def test_every_frame_is_in_one_stretch(runs: list[tuple[int, int]], least: int, more: int) -> None:
    faces = np.concatenate([np.full(count, face) for face, count in runs])
    config = SegmentConfig(min_pixel_frames=least, max_pixel_frames=least + more)
    stretches = plan_segments(np.zeros(len(faces)), faces, config)
    assert [stretches[0].start, stretches[-1].stop] == [0, len(faces)]
    assert all(a.stop == b.start for a, b in pairwise(stretches))
    for stretch in stretches:
        inside = set(faces[stretch.start : stretch.stop].tolist())
        assert len(inside) == 1 and ((-1 in inside) == (stretch.reason == "no face"))
        if not stretch.reason:
            assert least <= stretch.pixel_frames <= least + more


def test_the_official_judge_in_blocks_equals_one_pass_and_knows_late_from_early() -> None:
    torch.manual_seed(0)
    network = SyncNet(FLAVOURS["test"]).eval()
    pictures = list(np.random.default_rng(0).integers(0, 255, (38, 64, 64, 3), np.uint8))
    samples = np.random.default_rng(1).standard_normal(44 * 640).astype(np.float32) * 0.1
    view = SegmentView(pictures=pictures, landmarks=np.zeros((38, 468, 3), np.float32), samples=samples)
    whole = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        at_once = network.embed_lips(prepare_frames(whole)[None])[0]
        torch.testing.assert_close(OfficialSync(network)._lips(view), at_once)

    vectors = torch.randn(60, 8)

    class Known(OfficialSync):
        """Lips say vectors 10, 11, ...; speech says the same, so many frames later."""

        def _lips(self, segment: SegmentView) -> torch.Tensor:
            return vectors[10:50]

    for late in (-4, 0, 6):
        spoken = SimpleNamespace(embed_speech=lambda windows, late=late: vectors[10 - late : 50 - late])
        assert Known(spoken).judge(view).late_frames == late  # type: ignore[arg-type]


def test_the_pocket_judge_finds_how_late_the_speech_is() -> None:
    """A drawn head of the package and its own speech, shifted by known numbers of frames."""
    with demo_files() as (clip, _):
        tracker, frames = FaceTracker(), [frame.image for frame in VideoReader(clip)][:75]
        samples = np.pad(load_speech(clip), 8 * 640)
    landmarks = np.stack([tracker.step(frame).landmarks for frame in frames])  # type: ignore[union-attr]
    judge = open_sync("pocket")
    assert judge is not None
    found = []
    for late in (-6, 0, 6):
        heard = samples[(8 - late) * 640 :][: 75 * 640]
        found.append(judge.judge(SegmentView(pictures=frames, landmarks=landmarks, samples=heard)))
    assert [round(m.late_frames / 6) for m in found] == [-1, 0, 1], "within three frames"
    assert found[1].confidence > judge.minimum


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hyperiqa.*koniq_pretrained\.pkl"):
        open_quality("hyperiqa")
    with pytest.raises(ValueError, match="unknown quality filter 'x'"):
        open_quality("x")
    with pytest.raises(ValueError, match="holds no syncnet"):
        open_sync(str(tmp_path))
    with pytest.raises(ValueError, match=r"none\.model"):
        open_sync(str(tmp_path / "none.model"))
    assert open_sync(None) is None and open_quality("none") is None
    with pytest.raises(ValueError, match="do not exist"):
        SegmentConfig(min_pixel_frames=9, max_pixel_frames=8)
