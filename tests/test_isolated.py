"""Decoding in a limited process: the same frames; a crash there is one line here, and leaves no file and no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lipstream import LipSync, pipeline
from lipstream.evaluation.fidelity import max_difference
from lipstream.evaluation.speed import write_wav
from lipstream.media import isolated
from lipstream.media.bounce import BouncingReader
from lipstream.media.isolated import IsolatedReader
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.writer import VideoWriter
from lipstream.options import SyncOptions
from test_media import Make, make

__all__ = ["make"]
DEMO = Path(pipeline.__file__).parent / "assets" / "demo"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="no processes with shared memory")


def gone(pid: int) -> bool:
    """Whether a process of ours has ended and was waited for."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
    return False


def same(one: SourceFrame, two: SourceFrame) -> bool:
    numbers = [
        (f.index, f.pts, f.duration_pts, f.time_base, f.orientation, f.size, f.stored.pts, f.stored.color_range,
         f.stored.colorspace, f.stored.color_primaries, f.stored.color_trc)
        for f in (one, two)
    ]  # fmt: skip
    if numbers[0] != numbers[1] or max_difference(one, two):
        return False
    # Deeper pictures are converted by where their chroma samples lie, which a frame cannot be told here.
    return "10" in one.stored.format.name or bool((one.image == two.image).all())


@pytest.mark.parametrize(
    "given",
    [
        {"frames": 30},
        {"name": "a.mkv", "codec": "libx265", "pix_fmt": "yuv420p10le", "tags": (1, 9)},
        {"rotation": 90, "pix_fmt": "yuv444p"},
        {"size": (65, 47), "pix_fmt": "yuv444p"},
        {"name": "a.mov", "codec": "qtrle", "pix_fmt": "argb", "tags": (0, 2)},
        {"pts": [0, 40, 41, 90, 200, 201, 333, 400], "frames": 8, "time_base": Fraction(1, 1000)},
    ],
    ids=["plain", "deep", "turned", "odd", "transparent", "variable"],
)
def test_frames_and_attributes_are_the_reader_s(make: Make, given: dict[str, object]) -> None:
    path = make(given.pop("name", "a.mp4"), **given)  # type: ignore[arg-type]
    here = VideoReader(path)
    with IsolatedReader(path) as there:
        assert {k: v for k, v in vars(here).items() if k != "_threads"}.items() <= vars(there).items()
        assert all(same(a, b) for a, b in zip(here, there, strict=True))
        pids = {process.pid for process in there._all}
        for _ in range(3):  # given up in the middle, the same process goes on from the start
            frames = iter(there)
            next(frames)
            frames.close()  # type: ignore[attr-defined]
        late = list(here)[-2].pts
        assert all(same(a, b) for a, b in zip(here.read(late), there.read(late), strict=True))
        together = zip(there, there, strict=True)  # two readings at a time are two processes
        assert all(same(a, b) for a, b in together)
        assert len(there._all) == 2 and pids < {process.pid for process in there._all}
        pids = {process.pid for process in there._all}
    assert all(map(gone, pids))


def test_pictures_are_repeated_the_same_way(make: Make) -> None:
    path = make("a.mp4", frames=12, gop=5)
    with IsolatedReader(path) as there:
        played = [list(BouncingReader(reader, 20_000, cache_frames=4)) for reader in (VideoReader(path), there)]
        assert len(there._all) == 1
    assert len(played[0]) == 31 and all(same(a, b) for a, b in zip(*played, strict=True))


def test_warnings_and_errors_come_from_there(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make("a.mp4", frames=40)
    data = path.read_bytes()
    middle = data.index(b"mdat") + 3000
    (tmp_path / "hole.mp4").write_bytes(data[:middle] + bytes(1500) + data[middle + 1500 :])
    with IsolatedReader(tmp_path / "hole.mp4") as reader:
        assert 0 < len(list(reader)) <= 40
    said = caplog.text
    caplog.clear()
    list(VideoReader(tmp_path / "hole.mp4"))
    assert said == caplog.text or "damaged data skipped" in said
    for name, content in (("text.mp4", b"hello" * 100), ("cut.mp4", data[:600])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError) as here, VideoReader(tmp_path / name):
            pass
        with pytest.raises(MediaError) as there, IsolatedReader(tmp_path / name):
            pass
        assert str(there.value) == str(here.value)


def killer(number: int, after: int = 5) -> Callable[[IsolatedReader, int | None], Iterator[SourceFrame]]:
    """A reading whose process gets a signal after some frames."""
    read = IsolatedReader.read

    def reading(self: IsolatedReader, seek_pts: int | None = None) -> Iterator[SourceFrame]:
        for frame in read(self, seek_pts):
            if frame.index == after:
                os.kill(self._all[0].pid, number)
            yield frame

    return reading


def test_a_crash_in_the_middle_is_one_line(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IsolatedReader, "read", killer(signal.SIGSEGV))
    reader = IsolatedReader(make("a.mp4", frames=40))
    pid = reader._all[0].pid
    with pytest.raises(MediaError) as caught, VideoWriter(tmp_path / "out.mp4", like=reader) as writer:
        for frame in reader:
            writer.write(frame)
    message = str(caught.value)
    assert reader.path in message and f"crashes its decoder (status {-signal.SIGSEGV})" in message
    assert "\n" not in message and gone(pid)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_crash_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run: one error that names the file, no file, no process."""
    monkeypatch.setattr(IsolatedReader, "read", killer(signal.SIGSEGV, 8))
    began: list[int] = []
    start = isolated._Process.__init__

    def noted(self: isolated._Process, path: str) -> None:
        start(self, path)
        began.append(self.pid)

    monkeypatch.setattr(isolated._Process, "__init__", noted)
    lipsync, options = LipSync.from_pretrained("pocket"), SyncOptions(isolate=True, speaker="largest")
    with pytest.raises(MediaError, match="crashes its decoder"):
        lipsync(DEMO / "clip.mp4", DEMO / "speech.m4a", tmp_path / "out.mp4", options=options)
    assert not list(tmp_path.iterdir()) and began and all(map(gone, began))


def test_a_run_is_decoded_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wav(np.zeros(8000, np.float32), tmp_path / "a.wav")
    monkeypatch.setattr(VideoReader, "_decode", None)  # nothing is decoded here
    monkeypatch.setattr(VideoWriter, "_check", lambda self: None)
    lipsync, options = LipSync.from_pretrained("pocket"), SyncOptions(isolate=True, speaker="largest")
    report = lipsync(DEMO / "clip.mp4", tmp_path / "a.wav", tmp_path / "out.mp4", options=options)
    assert report.frames == report.synced_frames == 13 and (tmp_path / "out.mp4").exists()


def test_a_process_that_hangs_is_ended(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = IsolatedReader(make("a.mp4", frames=40))
    pid = reader._all[0].pid
    monkeypatch.setattr(IsolatedReader, "read", killer(signal.SIGSTOP))
    monkeypatch.setattr(isolated, "SECONDS", 0.3)
    with pytest.raises(MediaError, match=r"no frame could be decoded within 0\.3 s"):
        list(reader)
    assert gone(pid)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux")
def test_the_process_is_limited(make: Make) -> None:
    with IsolatedReader(make("a.mp4")) as reader:
        next(iter(reader))
        text = Path(f"/proc/{reader._all[0].pid}/limits").read_text()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()}
    assert limits["Max file size"] == ["0", "0"] and limits["Max core file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(isolated.MEMORY_BYTES)] * 2
    assert isolated.SECONDS <= int(limits["Max cpu time"][0]) < isolated.SECONDS + 10


def test_no_process_outlives_a_killed_caller(make: Make) -> None:
    program = (
        "import os, sys; from lipstream.media.isolated import IsolatedReader; r = IsolatedReader(sys.argv[1]); "
        "i = iter(r); next(i); print(r._all[0].pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(make("a.mp4", frames=40))], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(100):
        if not status.exists() or ") Z " in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the process goes on")


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="copy_unchanged does not go with isolate"):
        SyncOptions(copy_unchanged=True, isolate=True)
