"""Hostile media: refused without touching anything else, in bounded time; a kept corpus and a short round of fuzzing.

More: `pytest tests/test_hostile.py --fuzz 5000`, or `python tests/fuzz_media.py --count 20000`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import pytest

import fuzz_media
from lipstream.evaluation.torture import Broken, case, cases, run_cases
from lipstream.evaluation.torture_hostile import Trap, damages, linked_elsewhere
from lipstream.media import probe as probing
from lipstream.media.atomic import AtomicFile
from lipstream.media.opening import Limits, MediaError, open_media
from lipstream.media.probe import examine, probe
from lipstream.media.reader import VideoReader
from test_media import Make, make

__all__ = ["make"]

LISTS = {
    "m3u8": "#EXTM3U\n#EXTINF:1,\n{url}\n#EXTINF:1,\n{sibling}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile {sibling}\n",
    "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "mpd": '<?xml version="1.0"?><MPD><Period><BaseURL>{url}</BaseURL></Period></MPD>',
    "ffmetadata": ";FFMETADATA1\ntitle={url}\n",
    "idx": "# VobSub index file, v7\nfile: {sibling}\n",
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("name", ["own", "renamed.mp4"])
def test_lists_open_nothing(kind: str, name: str, tmp_path: Path) -> None:
    with Trap(tmp_path) as trap:
        file = tmp_path / (f"list.{kind}" if name == "own" else name)
        file.write_text(LISTS[kind].format(url=trap.url, sibling=trap.sibling.name))
        for need in ("video", "audio"):
            with pytest.raises(MediaError, match="is not a video or audio file"):
                examine(str(file), need)
    assert not trap.touched


def test_the_trap_sees_an_open(tmp_path: Path) -> None:
    with Trap(tmp_path) as trap:
        # The watcher is the other end that lets a blocked open return.
        assert os.close(os.open(trap.sibling, os.O_RDONLY)) is None
    assert trap.touched == ["the sibling file was opened"]


@pytest.mark.parametrize("allowed", [False, True])
def test_samples_in_another_file_are_not_fetched(make: Make, tmp_path: Path, allowed: bool) -> None:
    """FFmpeg, asked to, follows the link: so the trap would have seen it."""
    with Trap(tmp_path) as trap:
        linked = tmp_path / "linked.mp4"
        linked.write_bytes(linked_elsewhere(make("in.mp4").read_bytes(), trap.sibling))
        with suppress(MediaError, av.FFmpegError):
            if allowed:
                av.open(str(linked), options={"enable_drefs": "1", "use_absolute_path": "1"}).close()
            else:
                sum(1 for _ in VideoReader(linked))
    assert bool(trap.touched) is allowed


@pytest.mark.parametrize("limits", [{"file_bytes": 100}, {"pixels": 100}, {"streams": 0}, {"duration_seconds": 0}])
def test_caps_are_one_line(make: Make, limits: dict[str, int]) -> None:
    path = make("in.mp4", frames=30)
    with pytest.raises(MediaError, match=str(path)) as caught:
        open_media(path, need="video", limits=Limits(**limits))
    assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(MediaError, match="not a plain file"):
            open_media(path)
    with pytest.raises(MediaError, match="no file name"):
        open_media("a\0b.mp4")


def test_probe_tells_every_time(make: Make) -> None:
    pts = [0, 40, 41, 90, 200, 201, 333, 400]
    path = make("in.mkv", frames=8, pts=pts, time_base=probing.Fraction(1, 1000))
    found = probe(path, need="video")
    read = [frame.pts for frame in VideoReader(path)]
    assert list(found.pts) == read == pts and found.format.startswith("matroska")


@pytest.mark.parametrize("suffix", [s for s, (video, _) in fuzz_media.SEEDS.items() if video])
def test_probe_equals_the_reader_in_every_container(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    fuzz_media.write_seed(path, *fuzz_media.SEEDS[suffix])
    frames = list(VideoReader(path))
    found = probe(path, need="video")
    assert list(found.pts) == [f.pts for f in frames] and found.time_base == frames[0].time_base
    assert found.last_duration_pts == frames[-1].duration_pts


@pytest.mark.parametrize(
    "trick, said",
    [
        ("import os; os.kill(os.getpid(), 11)", "crashes its decoder"),
        ("while True: pass", "takes too much time|not be examined"),
        ("x = bytearray(1 << 40)", "too much memory"),
    ],
)
def test_a_probe_that_breaks_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch, trick: str, said: str) -> None:
    """The process is replaced by one that misbehaves after its limits are set."""
    program = (
        "import sys, json; from lipstream.media import probe; "
        f"probe.examine = lambda *_: exec({trick!r}); sys.exit(probe.main(sys.argv[1:]))"
    )
    real = subprocess.run
    monkeypatch.setattr(probing, "SECONDS", 1)
    monkeypatch.setattr(
        probing.subprocess, "run", lambda command, **k: real([sys.executable, "-c", program, *command[4:]], **k)
    )
    with pytest.raises(MediaError, match=said):
        probe(make("in.mp4"), need="video")


def test_an_unfinished_file_has_no_name(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_text("old")
    file = AtomicFile(target)
    Path(file.name).write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"] or not hasattr(os, "O_TMPFILE")
    file.commit()
    assert target.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out.bin"]
    file.discard()
    assert target.read_text() == "new"
    other = AtomicFile(target)
    other.discard()
    assert target.read_text() == "new"


@pytest.mark.parametrize("system", ["with", "without"])
def test_the_longest_name_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """File systems count bytes: 82 letters of three and a suffix are as long as a name may be, or nearly."""
    if system == "without":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    target = tmp_path / f"{'視' * 82}.mp4"
    file = AtomicFile(target)
    Path(file.name).write_text("x")
    file.commit()
    assert target.read_text() == "x" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("system", ["with", "without"])
def test_named_and_nameless_files_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    if system == "without":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    file = AtomicFile(tmp_path / "a")
    Path(file.name).write_text("x")
    file.commit()
    dropped = AtomicFile(tmp_path / "b")
    dropped.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_damages_are_refused(make: Make, tmp_path: Path) -> None:
    for name, content in damages(make("in.mp4").read_bytes()).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError) as caught:
            examine(str(tmp_path / name), "video")
        assert "\n" not in str(caught.value)


def test_corpus_breaks_nothing() -> None:
    files = sorted(fuzz_media.CORPUS.iterdir())
    assert files and not fuzz_media.run(files)


def test_fuzzed_files_break_nothing(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    count = pytestconfig.getoption("--fuzz")
    for batch in range(-(-count // 200)):
        assert not fuzz_media.run(fuzz_media.mutants(tmp_path, min(count - 200 * batch, 200), batch))


def test_the_fuzzer_sees_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "child.py"
    program.write_text(
        "import sys\nfor p in sys.argv[2:]:\n    print('> ' + p, flush=True)\n    assert 'bad' not in p\n"
    )
    monkeypatch.setattr(fuzz_media, "__file__", str(program))
    broken = fuzz_media.run([Path("a"), Path("bad"), Path("c")])
    assert [path.name for path, _ in broken] == ["bad"] and "AssertionError" in broken[0][1]


def test_torture_table_names_what_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipstream.evaluation import torture

    monkeypatch.setattr(torture, "_CASES", {})
    monkeypatch.setattr(torture, "MODULES", [])

    @case("fine", "nothing")
    def _fine(bench: torture.Bench) -> str:
        torture.logging.getLogger("lipstream.media").warning("heard")
        return ", ".join(bench.warnings)

    @case("wrong", "all")
    def _wrong(bench: torture.Bench) -> str:
        raise Broken("2, not 1")

    @case("slow", "all", long=True)
    def _slow(bench: torture.Bench) -> str:
        return 1 / 0  # type: ignore[return-value]

    assert [c.name for c in cases()] == ["fine", "wrong"] and [c.name for c in cases(["slo"])] == ["slow"]
    with pytest.raises(ValueError, match="fine, wrong, slow"):
        cases(["none"])
    done = list(run_cases(None, cases(long=True), Path(), Path()))  # type: ignore[arg-type]
    assert [(o.kept, o.found) for o in done] == [
        (True, "heard"), (False, "2, not 1"), (False, "ZeroDivisionError: division by zero"),
    ]  # fmt: skip
    assert torture.as_markdown(done).count("BROKEN") == 2
