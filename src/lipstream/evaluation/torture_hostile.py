"""Cases of the torture set: files that attackers send, and runs that are stopped half-way.

A hostile file must be refused in one line, leave no file, open no other file and no connection. Siblings are pipes
here: whoever opens one for reading is seen at its other end. Connections are counted by a listener on this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lipstream.evaluation.speed import COMMAND
from lipstream.evaluation.torture import Bench, case, require

SECONDS = 900  # of patience; a busy machine is no broken promise
EXIT_REFUSED = 2


class Trap:
    """A port that nobody may call and a file that nobody may open. Use as a context manager.

    Attributes:
        url: of the port.
        sibling: name of the file, beside the hostile one.
        touched: what happened.
    """

    def __init__(self, folder: Path) -> None:
        self.sibling = folder / "sibling.ts"
        os.mkfifo(self.sibling)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/a.ts"
        self.touched: list[str] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Trap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._socket.close()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            try:
                self._socket.accept()[0].close()
                self.touched.append("a connection was opened")
            except TimeoutError:
                pass
            try:  # succeeds only while somebody has it open for reading
                os.close(os.open(self.sibling, os.O_WRONLY | os.O_NONBLOCK))
                self.touched.append("the sibling file was opened")
            except OSError:
                pass


def command(bench: Bench, video: Path, audio: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`lipstream sync` as a user runs it."""
    arguments = [*COMMAND, str(video), str(audio), "-o", str(bench.folder / "out.mp4"), *options]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)


def refused(bench: Bench, name: str, content: bytes, *, as_audio: bool = False) -> str:
    """Run a hostile file as the video or the speech; the one line that was said."""
    file = bench.folder / name
    file.write_bytes(content)
    before = {path.name for path in bench.folder.iterdir()}
    video, audio = (bench.clip, file) if as_audio else (file, bench.speech)
    done = command(bench, video, audio)
    require(done.returncode == EXIT_REFUSED, f"exit status {done.returncode}: {done.stderr[-300:]}")
    lines = done.stderr.splitlines()
    require(len(lines) == 1 and name in lines[0], f"said {lines}")
    left = {path.name for path in bench.folder.iterdir()} - before
    require(not left, f"left {left}")
    return lines[0].partition(f"{name}: ")[2]


def _text_case(name: str, file: str, text: Callable[[Trap], str]) -> None:
    @case(f"hostile-{name}", "refused in one line; no connection, no other file opened, nothing left")
    def run(bench: Bench) -> str:
        with Trap(bench.folder) as trap:
            content = text(trap).encode()
            said = refused(bench, file, content)
            refused(bench, "renamed.mp4", content)
            refused(bench, "sound.wav", content, as_audio=True)
            require(not trap.touched, ", ".join(set(trap.touched)))
        return said


def _hls(trap: Trap) -> str:
    return (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{trap.url}\n#EXTINF:1,\n{trap.sibling.name}\n#EXT-X-ENDLIST\n"
    )


def _dash(trap: Trap) -> str:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" bandwidth="1"><BaseURL>{trap.url}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>\n"
    )


_text_case("hls", "live.m3u8", _hls)
_text_case("dash", "live.mpd", _dash)
_text_case("concat", "list.ffconcat", lambda trap: f"ffconcat version 1.0\nfile {trap.sibling.name}\n")
_text_case("sdp", "call.sdp", lambda trap: "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n")
_text_case("ffmetadata", "meta.txt", lambda trap: f";FFMETADATA1\ntitle={trap.url}\n")
_text_case("url", "link.txt", lambda trap: f"{trap.url}\n")
_text_case("subtitles", "vob.idx", lambda trap: f"# VobSub index file, v7\nfile: {trap.sibling.name}\n")


_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"dinf")


def linked_elsewhere(content: bytes, target: Path) -> bytes:
    """An MP4 whose samples are said to lie in another file (a QuickTime alias in every track's data reference)."""
    made, at = b"", 0
    while at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        body = content[at + 8 : at + size]
        if kind in _PARENTS:
            body = linked_elsewhere(body, target)
        elif kind == b"dref":
            path = str(target).encode()
            path += bytes(len(path) % 2)
            # Volume, file and times stay empty; record 2 is the absolute path, -1 ends the list.
            alias = bytes(150) + b"\0\2" + len(path).to_bytes(2, "big") + path + b"\xff\xff\0\0"
            entry = b"alis" + bytes(4) + alias
            body = content[at + 8 : at + 12] + b"\0\0\0\1" + (len(entry) + 4).to_bytes(4, "big") + entry
        made += (len(body) + 8).to_bytes(4, "big") + kind + body
        at += max(size, 8)
    return made


@case("hostile-dref", "an MP4 whose samples lie in another file: that file is not opened")
def _dref(bench: Bench) -> str:
    with Trap(bench.folder) as trap:
        file = bench.folder / "linked.mp4"
        file.write_bytes(linked_elsewhere(bench.clip.read_bytes(), trap.sibling))
        done = command(bench, file, bench.short)
        require("Traceback" not in done.stderr and done.returncode in (0, EXIT_REFUSED), done.stderr[-300:])
        require(not trap.touched, ", ".join(set(trap.touched)))
    return f"exit status {done.returncode}: {done.stderr.strip().splitlines()[-1][-80:]}"


def damages(good: bytes) -> dict[str, bytes]:
    """The damages of a good file."""
    half = len(good) // 2
    zeros = bytearray(good)
    zeros[half : half + 2000] = bytes(2000)
    return {
        "empty": b"",
        "head": good[:300],
        "noise": bytes(range(256)) * 40,
        "magic-only": b"\0\0\0\x20ftypisom" + bytes(5000),
        "endless-box": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + b"\xff\xff\xff\xffmoov" + b"\xff" * 4000,
        "ebml-bomb": b"\x1a\x45\xdf\xa3" + b"\x01\xff\xff\xff\xff\xff\xff\xfe" * 500,
        "gif": b"GIF89a" + bytes(400),
        "script": b"#!/bin/sh\nrm -rf /\n",
    }


@case("hostile-damaged", "damaged files are refused in one line, as video and as speech")
def _damaged(bench: Bench) -> str:
    kinds = damages(bench.clip.read_bytes())
    for name, content in kinds.items():
        refused(bench, f"{name}.mp4", content)
    refused(bench, "noise.wav", kinds["noise"], as_audio=True)
    refused(
        bench, "huge.wav", b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\1\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0", as_audio=True
    )
    return f"{len(kinds) + 2} files"


@case("hostile-truncated", "a file cut in its middle, one with a hole: refused, or what can be read of it")
def _truncated(bench: Bench) -> str:
    good = bench.clip.read_bytes()
    hole = bytearray(good)
    middle = len(good) // 2
    hole[middle : middle + 3000] = bytes(3000)
    found = []
    for name, content in (("cut.mp4", good[: len(good) * 2 // 3]), ("hole.mp4", bytes(hole))):
        file = bench.folder / name
        file.write_bytes(content)
        done = command(bench, file, bench.short)
        require(done.returncode in (0, EXIT_REFUSED) and "Traceback" not in done.stderr, done.stderr[-300:])
        written = (bench.folder / "out.mp4").exists()
        require(written == (done.returncode == 0), "exit status and file disagree")
        (bench.folder / "out.mp4").unlink(missing_ok=True)
        found.append(f"{name}: {'written' if written else 'refused'}")
    return ", ".join(found)


@case("hostile-times", "timestamps that leap by years are refused before work starts")
def _times(bench: Bench) -> str:
    from fractions import Fraction

    from lipstream.evaluation.torture_media import Look, write_clip

    look = Look(pts=[0, 1, 2, 200_000_000_000], time_base=Fraction(1, 1000))
    file = write_clip(bench, "leap.mkv", look, frames=4)
    return refused(bench, "leap.mkv", file.read_bytes())


def started(bench: Bench, *options: str) -> subprocess.Popen[str]:
    """A run that is busy writing."""
    arguments = [*COMMAND, str(bench.clip), str(bench.speech), "-o", str(bench.folder / "out.mp4"), *options]
    # A shell starts its background jobs deaf to Ctrl-C, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.stderr is not None
    run.stderr.readline()  # the promise: work starts now
    time.sleep(1)
    return run


def _stopped(bench: Bench, number: int) -> tuple[int, str]:
    (bench.folder / "out.mp4").write_text("old")
    run = started(bench, "--force")
    run.send_signal(number)
    _, error = run.communicate(timeout=SECONDS)
    left = sorted(path.name for path in bench.folder.iterdir())
    require((bench.folder / "out.mp4").read_text(errors="replace") == "old", "the old file is gone")
    require(left == ["out.mp4"], f"left {left}")
    return run.returncode, error


@case("killed", "kill -9 leaves the old file and nothing else")
def _killed(bench: Bench) -> str:
    status, _ = _stopped(bench, signal.SIGKILL)
    require(status == -signal.SIGKILL, f"exit status {status}")
    return "old file whole, no other file"


@case("ctrl-c", "Ctrl-C: one line, status 130, the old file stays")
def _interrupted(bench: Bench) -> str:
    status, error = _stopped(bench, signal.SIGINT)
    require(status == 130 and error.count("\n") == 1, f"exit status {status}: {error}")
    return error.strip()


@case("full-disk", "a file that may not grow: one line, nothing left")
def _full(bench: Bench) -> str:
    program = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "runpy.run_module('lipstream.cli.main', run_name='__main__', alter_sys=True)"
    )
    arguments: Sequence[str] = [sys.executable, "-c", program, "sync", str(bench.clip), str(bench.short)]
    arguments = [*arguments, "-o", str(bench.folder / "out.mp4"), "--quality", "lossless"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
    last = done.stderr.strip().splitlines()[-1]
    require(done.returncode == EXIT_REFUSED and "cannot be written" in last, f"{done.returncode}: {done.stderr[-300:]}")
    left = sorted(path.name for path in bench.folder.iterdir() if path.name != "short.wav")
    require(not left, f"left {left}")
    return last.partition("out.mp4: ")[2]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[str]:
    """A file system of that size at a folder, for the time of the ``with``; what stands in the way of it, or ""."""
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        why = (made.stderr.strip() or f"mount says {made.returncode}") if made.returncode else ""
    except OSError as error:
        why = str(error)
    try:
        yield why
    finally:
        if not why:
            subprocess.run(["umount", str(folder)], check=True)


@case("full-disk-real", "a disk that fills up: one line, the old file stays, nothing else is left (needs root)")
def _full_disk(bench: Bench) -> str:
    disk = bench.folder / "disk"
    with small_disk(disk, "256k") as why:
        if why:
            return f"skipped, no small disk here: {why}"
        output = disk / "out.mp4"
        output.write_text("old")
        arguments = [*COMMAND, str(bench.clip), str(bench.short), "-o", str(output), "--force", "--quality", "lossless"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
        last = done.stderr.strip().splitlines()[-1]
        require(done.returncode == EXIT_REFUSED and "the disk is full" in last, f"{done.returncode}: {last}")
        require([path.name for path in disk.iterdir()] == ["out.mp4"], f"left {sorted(disk.iterdir())}")
        require(output.read_text() == "old", "the old file is gone")
        free = os.statvfs(disk)
        require(free.f_bfree * free.f_bsize > 200_000, f"only {free.f_bfree * free.f_bsize} bytes are free again")
    return last.partition("out.mp4: ")[2]
