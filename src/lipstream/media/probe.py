"""The first look at a stranger's file, in a process of its own with limits on time, memory and writing.

What crashes, hangs or fills the memory does so there, and comes back as a `MediaError`. What a run needs to know before
it begins comes back too: the time of every frame, without decoding them.

    >>> probe("talk.mp4", need="video").pts[:3]  # array('q', [0, 512, 1024])

It is also the program of that process: `python -m lipstream.media.probe video talk.mp4 SECONDS BYTES`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import av

from lipstream.media.opening import LIMITS, MediaError, check_file, open_media, picture_stream, sound_stream

Need = Literal["video", "audio"]

SECONDS = 60  # plus the time to read a file of this size from a slow disk
BYTES_PER_SECOND = 20_000_000
MEMORY_BYTES = 6 * 1024**3
TRIED_AUDIO_FRAMES = 50


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the first look found.

    Attributes:
        format: the demuxer.
        time_base: unit of the times below.
        pts: when each frame begins, in order; empty for sound.
        last_duration_pts: how long the last frame shows.
        audio_tracks: how many sounds there are.
    """

    format: str
    time_base: Fraction = Fraction(1)
    pts: array[int] = field(default_factory=lambda: array("q"), repr=False)
    last_duration_pts: int = 0
    audio_tracks: int = 0


def probe(path: str | os.PathLike[str], *, need: Need) -> Probed:
    """Look at a file in a limited process; the answer for an unchanged file is remembered.

    Raises:
        MediaError: it cannot be used, or looking at it crashed, took too long or too much memory.
    """
    check_file(path)
    found = os.stat(path)
    return _probe(os.path.abspath(path), os.fspath(path), need, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _probe(absolute: str, path: str, need: Need, size: int, changed: int) -> Probed:
    limit = SECONDS + size // BYTES_PER_SECOND
    # -P: nothing is imported from the current folder, which may be a stranger's too.
    command = [sys.executable, "-P", "-m", "lipstream.media.probe", need, absolute, str(limit), str(MEMORY_BYTES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, env=environment, timeout=limit + 5, check=False
        )
    except subprocess.TimeoutExpired:
        raise MediaError(path, f"could not be examined within {limit} s", "it is damaged; convert it again") from None
    if done.returncode:
        number = -done.returncode
        why = "takes too much time" if number == signal.SIGXCPU else f"crashes its decoder (status {done.returncode})"
        raise MediaError(path, why, "it is damaged or hostile; convert it again from its source")
    head, _, rest = done.stdout.partition(b"\n")
    told: dict[str, Any] = json.loads(head)
    if "problem" in told:
        raise MediaError(path, told["problem"], told["fix"])
    pts = array("q")
    pts.frombytes(rest)
    return Probed(
        format=told["format"],
        time_base=Fraction(*told["time_base"]),
        pts=pts,
        last_duration_pts=told["last_duration_pts"],
        audio_tracks=told["audio_tracks"],
    )


# ---------------------------------------------------------------------------------------------- inside the process


def examine(path: str, need: Need) -> Probed:
    """Open a file, decode a little of it and read its times; without limits of its own.

    Raises:
        MediaError: it cannot be used.
    """
    with open_media(path, need=need) as container:
        tracks = len(container.streams.audio)
        name = container.format.name
        stream = picture_stream(container) if need == "video" else sound_stream(path, container)
        assert stream is not None  # open_media made sure
        _try(path, container, stream, 1 if need == "video" else TRIED_AUDIO_FRAMES)
    if need == "audio":
        return Probed(format=name, audio_tracks=tracks)
    with open_media(path, need="video") as container:
        video = picture_stream(container)
        assert video is not None
        base = Fraction(video.time_base or Fraction(1, 90_000))
        pts, last = frame_times(container, video)
    if not pts:
        raise MediaError(path, "its video stream has no readable frame", "copy or download it again")
    span = (pts[-1] - pts[0]) * base
    if span > LIMITS.duration_seconds:
        raise MediaError(path, f"jumps {float(span):.0f} s in time", "its timestamps are damaged; convert it again")
    return Probed(format=name, time_base=base, pts=pts, last_duration_pts=last, audio_tracks=tracks)


def _try(path: str, container: av.container.InputContainer, stream: Any, frames: int) -> None:
    """Decode the first frames."""
    kind = "video" if stream.type == "video" else "audio"
    got = 0
    packets = container.demux(stream)
    while got < frames:
        try:
            got += len(next(packets).decode())
        except (StopIteration, av.EOFError):
            break
        except av.InvalidDataError:
            continue
        except (av.FFmpegError, OSError) as error:
            raise MediaError(path, f"cannot be read ({error})", "copy or download it again") from error
    if not got and kind == "video":
        raise MediaError(path, f"its {kind} stream has no readable frame", "copy or download it again")


def frame_times(container: av.container.InputContainer, stream: Any) -> tuple[array[int], int]:
    """Times of the frames that a decoder gives out, in order, and the duration of the last one."""
    base = Fraction(stream.time_base or Fraction(1, 90_000))
    step = max(round(1 / (Fraction(stream.average_rate or stream.guessed_rate or 25) * base)), 1)
    stamps: list[tuple[int, int]] = []
    begun = False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.EOFError):
            break
        except av.InvalidDataError:
            continue
        except (av.FFmpegError, OSError):
            break  # the reader says how far it came
        begun = begun or packet.is_keyframe
        when = packet.pts if packet.pts is not None else packet.dts
        if begun and when is not None and packet.size and not packet.is_discard:
            stamps.append((when, packet.duration or step))
    stamps.sort()
    pts = array("q")
    for when, _ in stamps:
        pts.append(when if not pts or when > pts[-1] else pts[-1] + 1)
    return pts, stamps[-1][1] if stamps else 0


def limit_process(seconds: int, memory_bytes: int, *, whole_run: bool = True) -> None:
    """Cap this process; a system without such limits (Windows) still has the parent's clock.

    Args:
        whole_run: the time is for everything; else the process may move the limit on.
    """
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1 if whole_run else resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> int:
    """The process: one line of JSON, then the times as 64-bit integers."""
    need, path, seconds, memory = arguments
    limit_process(int(seconds), int(memory))
    out = sys.stdout.buffer
    try:
        found = examine(path, "video" if need == "video" else "audio")
    except MediaError as error:
        out.write(json.dumps({"problem": error.problem, "fix": error.fix}).encode() + b"\n")
        return 0
    except MemoryError:
        out.write(json.dumps({"problem": "takes too much memory to open", "fix": "scale or convert it"}).encode())
        return 0
    told = {
        "format": found.format,
        "time_base": [found.time_base.numerator, found.time_base.denominator],
        "last_duration_pts": found.last_duration_pts,
        "audio_tracks": found.audio_tracks,
    }
    out.write(json.dumps(told).encode() + b"\n" + found.pts.tobytes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
