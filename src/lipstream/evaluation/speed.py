"""How fast and how large a run is: frames per second with everything included, first frame, peak memory.

The command is measured from outside, as a user sees it (start, model loading, decoding, encoding), in child processes;
the warm figures come from a loaded model in this process.

    lipstream evaluate speed CLIP            # any talking clip; it is scaled and looped to the wanted length
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.media.bounce import BouncingReader
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import MODEL_FPS, SPEECH_RATE

SIDE_PX = 512
COMMAND = (sys.executable, "-m", "lipstream.cli.main", "sync")


class Streamer(Protocol):
    """A loaded model: `LipSync`."""

    def __call__(self, video: Path, audio: Path, output: Path) -> object:
        """Write a file."""
        ...

    def stream(self, video: Path, audio: Path) -> Iterator[object]:
        """The same frames one by one."""
        ...


@dataclass(frozen=True, kw_only=True)
class CommandRun:
    """A command from start to exit.

    Attributes:
        frames: of the input.
        wall_seconds: start and model loading included.
        peak_mib: largest resident memory.
    """

    frames: int
    wall_seconds: float
    peak_mib: float

    @property
    def fps(self) -> float:
        """Frames per second of wall time, everything included."""
        return self.frames / self.wall_seconds


@dataclass(frozen=True, kw_only=True)
class WarmRun:
    """A loaded model.

    Attributes:
        fps: frames per second from the call to the finished file.
        first_frame_seconds: from the call of `stream()` to its first frame.
    """

    fps: float
    first_frame_seconds: float


def write_input(clip: Path, audio: Path, folder: Path, seconds: int, side_px: int = SIDE_PX) -> tuple[Path, Path]:
    """A square 25 fps video and a speech file of that length, from a clip played back and forth and a repeated speech.

    Args:
        clip: a talking clip of any size; the middle square is scaled to side_px x side_px.
        audio: a file with speech.

    Returns:
        (video, speech) paths in `folder`.
    """
    speech = load_speech(audio)
    samples = seconds * SPEECH_RATE
    sound = folder / f"speech_{seconds}s.wav"
    write_wav(np.tile(speech, -(-samples // len(speech)))[:samples], sound)
    video = folder / f"video_{seconds}s.mp4"
    shown = islice(BouncingReader(VideoReader(clip), (seconds + 60) * 4 * SPEECH_RATE), seconds * MODEL_FPS)
    write_squares((square(frame.image, side_px) for frame in shown), video, side_px)
    return video, sound


def square(image: NDArray[np.uint8], side_px: int = SIDE_PX) -> NDArray[np.uint8]:
    """The middle square of a picture [H, W, 3], scaled to [side_px, side_px, 3]."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return np.asarray(cv2.resize(image[top : top + side, left : left + side], (side_px, side_px)), np.uint8)


def write_squares(
    images: Iterable[NDArray[np.uint8]], path: Path, side_px: int = SIDE_PX, *, crf: int = 18, preset: str = "veryfast"
) -> None:
    """Pictures [side_px, side_px, 3] as a 25 fps H.264 video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=MODEL_FPS, options={"crf": str(crf), "preset": preset})
        stream.width = stream.height = side_px
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, MODEL_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_wav(samples: np.ndarray[tuple[int, ...], np.dtype[np.float32]], path: Path) -> None:
    """Mono 16-bit WAV at 16 kHz."""
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=SPEECH_RATE, layout="mono")
        whole = np.clip(samples * 32767, -32768, 32767).astype(np.int16)
        for start in range(0, len(whole), SPEECH_RATE):
            frame = av.AudioFrame.from_ndarray(whole[None, start : start + SPEECH_RATE], format="s16", layout="mono")
            frame.sample_rate, frame.pts = SPEECH_RATE, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def run_command(video: Path, audio: Path, frames: int, command: Sequence[str] = COMMAND) -> CommandRun:
    """Run `command VIDEO AUDIO -o OUT` in a child process.

    Raises:
        ValueError: the command failed; the message ends with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as folder:
        report, output = Path(folder) / "report.json", Path(folder) / "out.mp4"
        arguments = [sys.executable, "-m", "lipstream.evaluation.child", str(report)]
        arguments += [*command, str(video), str(audio), "-o", str(output)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode or not report.exists() or not output.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{' '.join(command)}: exit status {done.returncode}: {last}")
        measured = json.loads(report.read_text())
    return CommandRun(frames=frames, wall_seconds=measured["seconds"], peak_mib=measured["peak_mib"])


def run_warm(sync: Streamer, video: Path, audio: Path, frames: int) -> WarmRun:
    """Measure a loaded model after one discarded first frame (which pays for lazy initialisation)."""
    _first_frame(sync, video, audio)
    first = _first_frame(sync, video, audio)
    with tempfile.TemporaryDirectory(prefix="lipstream-evaluate-") as folder:
        began = time.monotonic()
        sync(video, audio, Path(folder) / "out.mp4")
        seconds = time.monotonic() - began
    return WarmRun(fps=frames / seconds, first_frame_seconds=first)


def _first_frame(sync: Streamer, video: Path, audio: Path) -> float:
    """Seconds from asking for a stream to its first frame."""
    began = time.monotonic()
    stream = sync.stream(video, audio)
    if next(iter(stream), None) is None:
        raise MediaError(video, "gave no frame", "check that it has a picture")
    seconds = time.monotonic() - began
    close = getattr(stream, "close", None)
    if close is not None:
        close()
    return seconds
