"""Read a video in a process of its own from the first to the last frame: what crashes its decoder crashes only that.

The process opens the file, decodes, takes the comb out and converts, as `VideoReader` does here. It has limits on
memory and on CPU time per frame, and may not write files. Pictures come through memory that both share, numbers and
messages through a pipe; nothing that it says is executed, or trusted in size. Sound and other streams are not its task.
The samples are the same; RGB made of pictures with more than 8 bits may differ by where chroma is taken to lie, which
frames cannot be told from Python.

    >>> with IsolatedReader("talk.mp4") as reader:
    ...     for frame in reader: ...                  # the frames of VideoReader("talk.mp4")

It is also the program of that process: `python -m lipstream.media.isolated talk.mp4 DESCRIPTOR`.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from lipstream.media.encoder import HdrTags
from lipstream.media.opening import LIMITS, MediaError, check_file
from lipstream.media.planes import CHROMA_SHIFT, Orientation, Plane, plane_arrays, sample_bytes
from lipstream.media.probe import MEMORY_BYTES, limit_process
from lipstream.media.reader import ColourTags, SourceFrame, VideoReader

SECONDS = 60  # for one frame: of CPU time in the process, and of waiting for it here
MOST_SLOTS, SLOT_BYTES = 4, 64 * 1024 * 1024  # frames on their way, and what they may take
MOST_MESSAGE_BYTES = 65_536
_COMMAND = struct.Struct("<cq")  # what to do, and from which timestamp
_FROM_START = -(2**63)
_MESSAGE = struct.Struct("<cI")  # what it is, and how many bytes follow
_FRAME = struct.Struct("<Iqqq4i")  # slot; index, pts, duration; range, matrix, primaries, transfer

logger = logging.getLogger("lipstream.media.reader")  # what is said there is said here


class IsolatedReader(VideoReader):
    """A `VideoReader` whose work is done in limited processes; one, unless several readings run at a time.

    Raises:
        MediaError: as `VideoReader`; also where the process crashes, or one frame takes too much time or memory.
        ValueError: this system cannot pass memory to a process (Windows).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._all: list[_Process] = []
        self._idle: list[_Process] = []
        check_file(path)
        process = self._process()
        told = process.told
        self.stored_size = (int(told["stored_size"][0]), int(told["stored_size"][1]))
        self.pix_fmt = str(told["pix_fmt"])
        self.time_base, self.fps = Fraction(*told["time_base"]), Fraction(*told["fps"])
        self.duration_seconds = told["duration_seconds"]
        self.frames = told["frames"]
        ratio = told["sample_aspect_ratio"]
        self.sample_aspect_ratio = None if ratio is None else Fraction(*ratio)
        matrix = told["display_matrix"]
        self.display_matrix = None if matrix is None else tuple(int(value) for value in matrix)
        self.orientation = Orientation.from_matrix(self.display_matrix)
        self.colour = ColourTags(**{name: int(value) for name, value in told["colour"].items()})
        self.hdr = HdrTags(**told["hdr"])
        self.interlaced = bool(told["interlaced"])
        turned = self.orientation.transpose
        self.width, self.height = self.stored_size[::-1] if turned else self.stored_size
        self._idle.append(process)

    def close(self) -> None:
        """End all processes; a later reading begins a new one."""
        self._idle.clear()
        while self._all:
            self._all.pop().close()

    def _process(self) -> _Process:
        if self._idle:
            return self._idle.pop()
        process = _Process(self.path)
        self._all.append(process)
        return process

    def read(self, seek_pts: int | None = None) -> Iterator[SourceFrame]:
        """See :class:`VideoReader`."""
        process, broken = self._process(), True
        try:
            for slot, index, pts, duration, tags in process.frames(seek_pts):
                stored = process.picture(slot)
                stored.color_range, stored.colorspace, stored.color_primaries, stored.color_trc = tags
                process.free()
                yield self._timed(stored, index, pts, duration)
            broken = False
        except GeneratorExit:  # wanted no further
            broken = False
            raise
        finally:
            if not broken and process.stop():
                self._idle.append(process)
            else:
                process.close()


class _Process:
    """One process and the memory shared with it.

    Attributes:
        told: the reader's attributes in it.
    """

    def __init__(self, path: str) -> None:
        if os.name != "posix":
            raise ValueError("isolated decoding needs Linux or macOS; leave out --isolate")
        self._path = path
        self._memory = _shared_file()
        # -P: nothing is imported from the current folder, which may be a stranger's too.
        command = [sys.executable, "-P", "-m", "lipstream.media.isolated", os.path.abspath(path), str(self._memory)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=(self._memory,),
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the caller, who ends this one
        )
        assert self._child.stdout is not None
        self._heard = select.poll()
        self._heard.register(self._child.stdout, select.POLLIN)
        # Also where nobody closes it: no process stays behind.
        self.close = weakref.finalize(self, _end, self._child, self._memory)
        try:
            kind, data = self._message()
            if kind != b"T":
                raise MediaError(path, "its reader made no sense", "it is hostile; convert it again from its source")
            self.told: dict[str, Any] = json.loads(data)
            (width, height), self._format = self.told["stored_size"], self.told["pix_fmt"]
            if self._format not in CHROMA_SHIFT or not 0 < width * height <= LIMITS.pixels:
                raise MediaError(path, f"has a picture of an impossible size ({width}x{height})", "convert it again")
            self._size = int(width), int(height)
            self._slot_bytes = slot_bytes(self._size, self._format)
            self._slots = min(max(SLOT_BYTES // self._slot_bytes, 2), MOST_SLOTS)
            os.ftruncate(self._memory, self._slots * self._slot_bytes)
            _seal(self._memory)
            self._pictures = mmap.mmap(self._memory, self._slots * self._slot_bytes, prot=mmap.PROT_READ)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._child.pid

    def frames(self, seek_pts: int | None) -> Iterator[tuple[int, int, int, int, tuple[int, ...]]]:
        """Slot, index, pts, duration and colour tags of every frame; each slot is to be freed."""
        self._send(b"R", _FROM_START if seek_pts is None else seek_pts)
        while True:
            kind, data = self._message()
            if kind == b".":
                return
            if kind != b"F" or len(data) != _FRAME.size:
                raise MediaError(self._path, "its reader made no sense", "it is hostile; convert it again")
            slot, index, pts, duration, *tags = _FRAME.unpack(data)
            if slot >= self._slots:
                raise MediaError(self._path, "its reader made no sense", "it is hostile; convert it again")
            yield slot, index, pts, duration, tuple(tags)

    def picture(self, slot: int) -> av.VideoFrame:
        """A copy of the picture in a slot."""
        frame = av.VideoFrame(*self._size, self._format)
        for plane, shared in zip(
            plane_arrays(frame), _views(self._pictures, slot * self._slot_bytes, frame), strict=True
        ):
            plane[:] = shared
        return frame

    def free(self) -> None:
        """The oldest slot was read."""
        self._send(b"F")

    def stop(self) -> bool:
        """No more frames of this reading; what is on its way is thrown away. Whether the process can do another one."""
        if not self.close.alive:
            return False
        try:
            self._send(b"S")
            while self._message()[0] != b"!":
                pass
        except MediaError:
            return False  # who reads on is told by the next one
        return True

    def _send(self, what: bytes, pts: int = 0) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(_COMMAND.pack(what, pts))
        except OSError:
            raise self._broken() from None

    def _message(self) -> tuple[bytes, bytes]:
        """The next message; what is only to be said is said, an error raised."""
        while True:
            kind, size = _MESSAGE.unpack(self._bytes(_MESSAGE.size))
            if size > MOST_MESSAGE_BYTES:
                raise MediaError(self._path, "its reader made no sense", "it is hostile; convert it again")
            data = self._bytes(size)
            if kind == b"W":
                logger.log(data[0], "%s", data[1:].decode(errors="replace"))
            elif kind == b"E":
                told = json.loads(data)
                raise MediaError(self._path, str(told["problem"]), str(told["fix"]))
            else:
                return kind, data

    def _bytes(self, count: int) -> bytes:
        assert self._child.stdout is not None
        parts, limit = b"", time.monotonic() + SECONDS
        while len(parts) < count:
            wait = max(limit - time.monotonic(), 0)
            if not self._heard.poll(1000 * wait):
                self._child.kill()
                fix = "it is damaged; convert it again"
                raise MediaError(self._path, f"no frame could be decoded within {SECONDS} s", fix)
            part = os.read(self._child.stdout.fileno(), count - len(parts))
            if not part:
                raise self._broken()
            parts += part
        return parts

    def _broken(self) -> MediaError:
        """What is to be said of a process that ended."""
        self._child.kill()
        number = -self._child.wait()
        why = "takes too much time" if number == signal.SIGXCPU else f"crashes its decoder (status {-number})"
        return MediaError(self._path, why, "it is damaged or hostile; convert it again from its source")


def slot_bytes(size: tuple[int, int], pix_fmt: str) -> int:
    """What a picture takes in the shared memory, at most."""
    width, height = size[0] + size[0] % 2, size[1] + size[1] % 2
    return 3 * width * height * sample_bytes(pix_fmt)


def _views(memory: mmap.mmap, at: int, like: av.VideoFrame) -> Iterator[Plane]:
    """The planes of a picture in the shared memory, one after the other."""
    for plane in plane_arrays(like):
        view: Any = np.frombuffer(memory, plane.dtype, plane.size, at)
        yield view.reshape(plane.shape)
        at += plane.nbytes


def _shared_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("lipstream", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _seal(memory: int) -> None:
    """The size stays: reading memory that was taken away would crash this process."""
    if hasattr(os, "memfd_create"):
        import fcntl

        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def _end(child: subprocess.Popen[bytes], memory: int) -> None:
    """End a process and wait for it; the shared memory goes with the last who has it."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.wait()
    os.close(memory)


# ---------------------------------------------------------------------------------------------- inside the process


class _Stopped(Exception):  # noqa: N818 - the caller wants no more frames
    pass


class _Speaker(logging.Handler):
    """Says the reader's warnings to the caller."""

    def __init__(self, out: int) -> None:
        super().__init__(logging.INFO)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        _tell(self._out, b"W", bytes((record.levelno,)) + record.getMessage().encode()[:10_000])


def _tell(out: int, kind: bytes, data: bytes = b"") -> None:
    whole = _MESSAGE.pack(kind, len(data)) + data
    while whole:
        whole = whole[os.write(out, whole) :]


def _command(source: int) -> tuple[bytes, int]:
    data = b""
    while len(data) < _COMMAND.size:
        part = os.read(source, _COMMAND.size - len(data))
        if not part:
            raise SystemExit(0)  # the caller is gone
        data += part
    what, pts = _COMMAND.unpack(data)
    return what, pts


def _allow_one_more_frame() -> None:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _told(reader: VideoReader) -> dict[str, Any]:
    def pair(value: Fraction | None) -> list[int] | None:
        return None if value is None else [value.numerator, value.denominator]

    colour, hdr = reader.colour, reader.hdr
    return {
        "stored_size": reader.stored_size,
        "pix_fmt": reader.pix_fmt,
        "time_base": pair(reader.time_base),
        "fps": pair(reader.fps),
        "duration_seconds": reader.duration_seconds,
        "frames": reader.frames,
        "sample_aspect_ratio": pair(reader.sample_aspect_ratio),
        "display_matrix": reader.display_matrix,
        "colour": {
            "range": colour.range, "space": colour.space, "primaries": colour.primaries, "transfer": colour.transfer,
        },
        "hdr": {"mastering": hdr.mastering, "light": hdr.light},
        "interlaced": reader.interlaced,
    }  # fmt: skip


def _give(reader: VideoReader, seek: int, source: int, out: int, memory: mmap.mmap) -> None:
    """One reading: every frame into the next slot, as soon as that is free."""
    size = slot_bytes(reader.stored_size, reader.pix_fmt)
    slots = len(memory) // size
    freed = 0
    for given, frame in enumerate(reader.read(None if seek == _FROM_START else seek)):
        while given - freed >= slots:
            what, _ = _command(source)
            if what == b"S":
                raise _Stopped
            freed += 1
        slot, stored = given % slots, frame.stored
        for plane, shared in zip(plane_arrays(stored), _views(memory, slot * size, stored), strict=True):
            shared[:] = plane
        tags = (int(stored.color_range), int(stored.colorspace), int(stored.color_primaries), int(stored.color_trc))
        _tell(out, b"F", _FRAME.pack(slot, frame.index, frame.pts, frame.duration_pts, *tags))
        _allow_one_more_frame()


def main(arguments: list[str]) -> int:
    """The process: says what the reader found, then gives frames as often as they are asked for."""
    path, descriptor = arguments
    limit_process(SECONDS, MEMORY_BYTES, whole_run=False)
    source, out = 0, os.dup(1)
    os.dup2(2, 1)  # nothing else may get between the messages
    logger.addHandler(_Speaker(out))
    logger.setLevel(logging.INFO)
    try:
        try:
            reader = VideoReader(path)
            _tell(out, b"T", json.dumps(_told(reader)).encode())
            memory: mmap.mmap | None = None
            while True:
                what, seek = _command(source)
                if what != b"R":
                    continue
                if memory is None:
                    memory = mmap.mmap(int(descriptor), 0)
                try:
                    _give(reader, seek, source, out, memory)
                    _tell(out, b".")
                    while _command(source)[0] != b"S":
                        pass
                except _Stopped:
                    pass
                _tell(out, b"!")
        except MediaError as error:
            _tell(out, b"E", json.dumps({"problem": error.problem, "fix": error.fix}).encode())
        except MemoryError:
            told = {"problem": "takes too much memory to decode", "fix": "scale or convert it"}
            _tell(out, b"E", json.dumps(told).encode())
    except BrokenPipeError:
        return 0  # the caller is gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
