"""The command line: what it accepts, what it refuses in one line, and what it writes. The network is a stand-in."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from rich.text import Text

from lipstream import __version__, pipeline
from lipstream.casting import Choice
from lipstream.cli import common, doctor
from lipstream.cli.demo import demo_files
from lipstream.cli.main import main
from lipstream.contact import contact_sheet, evenly_spaced
from lipstream.media.opening import MediaError
from lipstream.media.plan import Plan
from lipstream.media.reader import VideoReader
from lipstream.media.writer import VideoWriter
from lipstream.options import SyncOptions
from lipstream.pipeline import Progress, SyncReport

# The face of the program: another flag is a decision, and this list is where it is taken.
FLAGS = {
    "sync": {
        "--output", "--model", "--seed", "--threads", "--crf", "--force", "--verbose",
        "--device", "--dtype", "--decoder", "--mask", "--memory", "--speech-lookahead", "--parity",
        "--length", "--fit", "--audio-delay", "--audio-track", "--quality", "--copy-unchanged", "--isolate",
        "--speaker", "--voice", "--silence", "--strength",
    },
    "batch": {
        "--videos", "--audios", "--out", "--model", "--seed", "--threads", "--device", "--dtype", "--decoder", "--mask",
        "--memory", "--speech-lookahead", "--parity", "--workers", "--retries", "--report", "--dry-run", "--ray",
        "--force", "--verbose",
    },
    "prepare": {
        "--output", "--format", "--min-frames", "--max-frames", "--shard-samples", "--syncnet", "--min-sync",
        "--quality", "--min-quality", "--workers", "--retries", "--report", "--dry-run", "--ray", "--verbose",
    },
    "demo": {"--output", "--model", "--seed", "--threads", "--verbose"},
    "doctor": {"--no-speed", "--verbose"},
    "pull": {"--folder", "--mirror", "--from-folder", "--only", "--accept", "--yes", "--verbose"},
    "convert": {
        "--to",
        "--kind",
        "--merge-precision",
        "--dtype",
        "--licence",
        "--max-shard-gb",
        "--force",
        "--verbose",
    },
    "analyze": {
        "--model", "--samples", "--output", "--only", "--limit", "--scale", "--steps", "--landings-every", "--codec",
        "--speech", "--syncnet", "--seed", "--threads", "--verbose",
    },
    "ablate": {"--output", "--seeds", "--list", "--workers", "--config", "--verbose"},
    "personalize": {"--output", "--model", "--seed", "--threads", "--steps", "--keep-anyway", "--verbose"},
    "bench": {
        "--model", "--device", "--dtype", "--size", "--chunks", "--starts", "--layers", "--threads", "--attention",
        "--compile", "--join-clean", "--json", "--memory", "--verbose",
    },
}  # fmt: skip


class Copier:
    """Stands in for `LipSync`: copies the video, calls every third frame faceless."""

    fails_with: BaseException | None = None
    engine = None

    @classmethod
    def from_pretrained(cls, model: str, *, seed: int = 0, threads: int | None = None, **options: object) -> Copier:
        if model != "pocket":
            raise ValueError(f"unknown model '{model}'")
        return cls()

    def __call__(
        self,
        video: Path,
        audio: Path,
        output: Path,
        *,
        options: SyncOptions | None = None,
        progress: Callable[[Progress], None] | None = None,
        on_plan: Callable[[Plan], None] | None = None,
    ) -> SyncReport:
        reader, frames = VideoReader(video), 0
        with VideoWriter(output, like=reader, audio=audio) as writer:
            for frame in reader:
                writer.write(frame)
                frames += 1
                if progress is not None:
                    progress(Progress("sync", frames, None, 25.0, None))
                if frames == 5 and self.fails_with is not None:
                    raise self.fails_with
        return SyncReport(
            output=Path(output),
            frames=frames,
            synced_frames=frames - 10,
            passed_through=((0, 5), (25, 30)),
            seconds=2.0,
            stage_seconds={},
            model="pocket",
            first_frame_seconds=0.1,
            speakers=(Choice("auto", "the only face", 0, 0.2, (101.4, 80.6)),),
        )


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> type[Copier]:
    monkeypatch.setattr(pipeline, "LipSync", Copier)
    monkeypatch.setattr(Copier, "fails_with", None)
    return Copier


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with demo_files() as (video, _):
        (tmp_path / "clip.mp4").write_bytes(video.read_bytes())
    return tmp_path / "clip.mp4"


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    with demo_files() as (_, audio):
        (tmp_path / "speech.m4a").write_bytes(audio.read_bytes())
    return tmp_path / "speech.m4a"


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line of an error."""
    error = capsys.readouterr().err
    assert error.startswith("lipstream: error: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_the_allowed_ones(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    usage = capsys.readouterr().out
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage)) - {"--help"} == FLAGS[command]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lipstream {__version__}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(
        command in listed
        for command in ("sync", "demo", "doctor", "evaluate", "bench", "data", "pull", "convert", "personalize")
    )


def test_help_does_not_load_torch() -> None:
    code = "import sys; from lipstream.cli.main import main; main(['sync', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["sink"], "sink"),
        (["sync", "clip.mp4"], "AUDIO"),
        (["sync", "none.mp4", "speech.m4a", "-o", "out.mp4"], "no such file"),
        (["sync", "speech.m4a", "speech.m4a", "-o", "out.mp4"], "no video stream"),
        (["sync", "text.mp4", "speech.m4a", "-o", "out.mp4"], "not a video"),
        (["sync", "empty.mp4", "speech.m4a", "-o", "out.mp4"], "empty"),
        (["sync", "clip.mp4", "silent.mp4", "-o", "out.mp4"], "no audio stream"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "no/out.mp4"], "does not exist"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "taken.mp4"], "--force"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "clip.mp4", "--force"], "its own source"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.txt"], ".txt"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--crf", "99"], "99"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--threads", "0"], "at least 1"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--model", "huge"], "huge"),
        (["demo", "-o", "taken.mp4"], "taken.mp4"),
        (["personalize", "none.mp4", "-o", "me"], "no such file"),
        (["personalize", "silent.mp4", "-o", "me"], "no audio stream"),
        (["personalize", "clip.mp4", "clip.mp4", "-o", "me"], "given twice"),
        (["personalize", "clip.mp4", "-o", "taken.mp4"], "is a file"),
        (["personalize", "clip.mp4", "-o", "me"], "8 s are the least"),
        (["bench", "--model", "huge"], "1.3b"),
        (["bench", "--model", "test", "--device", "gpu"], "unknown device"),
        (["bench", "--model", "test", "--size", "70"], "16 pixels"),
        (["bench", "--model", "test", "--layers", "9"], "1 to 3"),
        (["bench", "--model", "test", "--chunks", "2"], "at least 3"),
        (["bench", "--model", "test", "--dtype", "int3"], "bfloat16"),
        (["bench", "--model", "test", "--attention", "warp"], "sdpa"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    clip: Path,
    speech: Path,
    copier: type[Copier],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("not a video\n")
    Path("empty.mp4").touch()
    Path("taken.mp4").write_text("precious")
    with av.open("silent.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == common.EXIT_USAGE
    assert said in one_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sync_writes_and_reports(
    clip: Path, speech: Path, tmp_path: Path, copier: type[Copier], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.mp4"
    assert main(["sync", str(clip), str(speech), "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # not a terminal: no bar
    assert "90 of 100 frames synced in 2.0 s (50.0 frames/s)" in shown.out
    assert "; speaker auto: the face at 101,81 from 0:00.20 (the only face); " in shown.out
    assert "0:00.00-0:00.20, 0:01.00-0:01.20" in shown.out and str(out) in shown.out
    assert main(["sync", str(clip), str(speech), "-o", str(out)]) == common.EXIT_USAGE
    assert main(["sync", str(clip), str(speech), "-o", str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("failure", "status"),
    [(KeyboardInterrupt(), 130), (MediaError("a.mp4", "broke", "fix it"), 2), (RuntimeError("a\nbug"), 1)],
)
def test_failures_leave_no_file(
    failure: BaseException,
    status: int,
    clip: Path,
    speech: Path,
    tmp_path: Path,
    copier: type[Copier],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copier, "fails_with", failure)
    before = set(tmp_path.iterdir())
    assert main(["sync", str(clip), str(speech), "-o", str(tmp_path / "out.mp4")]) == status
    one_line(capsys)
    assert set(tmp_path.iterdir()) == before
    if status != 130:
        assert main(["sync", str(clip), str(speech), "-o", str(tmp_path / "out.mp4"), "-v"]) == status
        assert "Traceback" in capsys.readouterr().err


def test_termination_removes_the_half_written_file(
    clip: Path, speech: Path, tmp_path: Path, copier: type[Copier], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminated(Copier):
        def __call__(self, *args: Any, **kwargs: Any) -> SyncReport:
            kwargs["progress"] = lambda _: signal.raise_signal(signal.SIGTERM)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(pipeline, "LipSync", Terminated)
    before, handler = set(tmp_path.iterdir()), signal.getsignal(signal.SIGTERM)
    assert main(["sync", str(clip), str(speech), "-o", str(tmp_path / "out.mp4")]) == common.EXIT_TERMINATED
    assert set(tmp_path.iterdir()) == before and signal.getsignal(signal.SIGTERM) == handler


def test_demo_writes_video_and_picture(
    tmp_path: Path, copier: type[Copier], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # again over its own files
        assert main(["demo", "-o", str(tmp_path / "new" / "out")]) == 0
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["lipstream-demo.mp4", "lipstream-demo.png"]
    shown = capsys.readouterr().out
    assert all(str(path) in shown for path in folder.iterdir())
    assert cv2.imread(str(folder / "lipstream-demo.png")) is not None


def test_contact_sheet_shows_pairs(clip: Path) -> None:
    alone = contact_sheet(clip, columns=3, rows=2, tile_height=64)
    pairs = contact_sheet(clip, source=clip, columns=3, rows=2, tile_height=64)
    assert alone.shape[1] == pairs.shape[1] == 3 * 68 + 4
    assert pairs.shape[0] - alone.shape[0] == 2 * 68
    np.testing.assert_array_equal(pairs[4:68], pairs[72:136])  # the same video above and below
    assert evenly_spaced(100, 4) == [12, 37, 62, 87] and evenly_spaced(2, 6) == [0, 1]


def test_times_and_sizes_are_readable() -> None:
    assert common.clock(59.7) == "1:00" and common.clock(3661) == "1:01:01"
    assert common.timestamp(0.2) == "0:00.20" and common.timestamp(3725.5) == "1:02:05.50"
    assert common.size_text(950) == "950 B" and common.size_text(23_366_888) == "23.4 MB"


def test_doctor_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {finding.name: finding for finding in doctor.examine(speed=False)}
    assert {"python", "torch", "bf16", "codecs", "faces", "weights dit", "disk", "languages"} <= found.keys()
    assert all(found[name].status == "ok" for name in ("python", "torch", "codecs", "faces"))

    def broken() -> Any:
        raise ImportError("no libavcodec\nlong story")

    monkeypatch.setattr(doctor, "check_codecs", broken)
    assert main(["doctor", "--no-speed"]) == common.EXIT_FAILED
    shown = capsys.readouterr().out
    assert "ImportError: no libavcodec" in shown and "long story" not in shown and "pip install" in shown


def test_doctor_compares_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pocket = tmp_path / "assets" / "pocket"
    pocket.mkdir(parents=True)
    monkeypatch.setattr(doctor, "files", lambda _: tmp_path)
    for name in ("codec", "dit"):
        (pocket / f"{name}.safetensors").write_bytes(name.encode())
    right = hashlib.sha256(b"codec").hexdigest()
    (pocket / "SHA256SUMS").write_text(f"{right}  codec.safetensors\n{right}  dit.safetensors\n")
    status = {finding.name: finding.status for finding in doctor.check_weights()}
    assert status == {"weights codec": "ok", "weights dit": "fail", "weights speech": "fail"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--strength", "9"], "--strength 9: must lie in 0..2"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--strength", "nan"], "--strength nan: must lie in 0..2"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--crf", "99"], "--crf 99: must lie in 0..51"),
        (["sync", "clip.mp4", "speech.m4a", "-o", "out.mp4", "--audio-delay", "9999999"], "--audio-delay 9999999:"),
        (["bench", "--chunks", "2"], "--chunks 2: must be at least 3"),
        (["bench", "--model", "test", "--layers", "9"], "--layers 9: must be 1 to 3"),
        (["bench", "--model", "test", "--size", "70"], "--size 70: must be a multiple of 16 pixels"),
        (["batch", "--videos", ".", "--audios", "speech.m4a", "--out", "o", "--retries", "-1"], "--retries -1: must"),
        (["prepare", "clip.mp4", "-o", "data", "--min-frames", "300"], "--min-frames 300: must be at least 1 and not"),
    ],
)  # fmt: skip
def test_a_wrong_range_names_the_option(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    clip: Path,
    speech: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == common.EXIT_USAGE
    assert one_line(capsys).startswith(f"lipstream: error: {said}")


def test_doctor_lists_every_extra_with_what_it_is_for_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev"}
    declared = [
        f"{line}; extra == '{extra}'" for extra, all in project["optional-dependencies"].items() for line in all
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: [*project["dependencies"], *declared])
    assert doctor.packages_of("full") == ["transformers", "ftfy"]
    monkeypatch.setattr(doctor, "_installed", lambda package: package not in ("ftfy", "ray"))
    found = {finding.name: finding for finding in doctor.check_extras()}
    assert {name: finding.status for name, finding in found.items() if finding.status != "ok"} == {
        "extra full": "off", "extra ray": "off",
    }  # fmt: skip
    assert "1.3B" in found["extra full"].detail and "not installed: ftfy" in found["extra full"].detail
    assert found["extra synth"].fix == ""
    monkeypatch.setattr(doctor, "examine", lambda speed: doctor.check_extras())
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr(doctor.Console, "print", lambda self, table: shown.extend(table.columns[3]._cells))
        assert main(["doctor"]) == 0  # what is optional is no failure
    assert Text.from_markup(shown[1]).plain == "in the clone: pip install -c constraints.txt '.[full]'"


def test_doctor_says_which_languages_were_heard(capsys: pytest.CaptureFixture[str]) -> None:
    (finding,) = doctor.check_languages()
    card = (Path(__file__).parents[1] / "src/lipstream/assets/pocket/README.md").read_text()
    assert "recorded prompts in five languages" in card and "40 languages" in card
    for language in ("English", "Spanish", "French", "Italian", "Russian", "40 languages", "wav2vec2-base-960h"):
        assert language in finding.detail


def test_a_log_gets_a_sign_of_life(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal for a bar: stage, frames, speed and time left, every half minute."""
    times = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    monkeypatch.setattr(common.Heartbeat.__init__, "__defaults__", (common.HEARTBEAT_SECONDS, lambda: next(times)))
    with common.show_progress() as report:
        for done in (100, 200, 300, 400):
            report(Progress("sync", done, 1000, 25.0, (1000 - done) / 25))
    assert capsys.readouterr().err.splitlines() == [
        "sync: 200/1000 frames, 25.0 frames/s, 0:32 left", "sync: 400/1000 frames, 25.0 frames/s, 0:24 left",
    ]  # fmt: skip
    times = iter([0.0, 31.0, 31.0])
    with common.show_bytes() as tell:
        tell("fetching", 5_000_000, 20_000_000)
    assert capsys.readouterr().err == "fetching: 5.0 MB of 20.0 MB\n"


def test_bench_prints_memory_per_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--memory", "--json", str(tmp_path / "memory.json")]) == 0
    shown = capsys.readouterr().out
    assert "40.6 GB" in shown and "10.0 GB" in shown and "not measured on a GPU" in shown
    rows = json.loads((tmp_path / "memory.json").read_text())
    assert {(row["model"], row["dtype"], row["decoder"]) for row in rows} == set(
        itertools.product(("1.3b", "14b"), ("bfloat16", "float32"), ("wan", "tae"))
    )
    guide = (Path(__file__).parents[1] / "docs/full-size.md").read_text()
    assert "14B 40.6 GB, 1.3B 10.0 GB" in " ".join(guide.split())  # the guide says what the command says
