"""Damaged media, made by the thousand: whatever arrives, the readers give frames or a `MediaError`, in bounded time.

    python tests/fuzz_media.py --count 20000 --keep tests/corpus    # files that break a reader are kept there

`tests/test_hostile.py` runs a short round of it, and every file of the corpus.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CORPUS = Path(__file__).parent / "corpus"
SEEDS = {
    "mp4": ("libx264", "aac"), "mov": ("mpeg4", "pcm_s16le"), "mkv": ("libx264", "flac"), "avi": ("mpeg4", "mp3"),
    "ts": ("mpeg2video", "aac"), "webm": ("libvpx", "libopus"), "wav": (None, "pcm_s16le"), "flac": (None, "flac"),
    "ogg": (None, "libopus"), "mp3": (None, "mp3"), "aac": (None, "aac"),
}  # fmt: skip
FRAMES, FRAME_LIMIT = 6, 2000


def write_seed(path: Path, video: str | None, audio: str) -> None:
    """A small good file."""
    with av.open(str(path), "w", format="mpegts" if path.suffix == ".ts" else None) as out:
        picture = None
        if video is not None:
            picture = out.add_stream(video, rate=25)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        rate = 48_000 if audio == "libopus" else 44_100
        sound = out.add_stream(audio, rate=rate, layout="mono")
        for i in range(FRAMES if picture is not None else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 30, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(picture.encode(frame.reformat(format="yuv420p")))
        if picture is not None:
            out.mux(picture.encode(None))
        resampler = av.AudioResampler(sound.format, "mono", rate, frame_size=sound.codec_context.frame_size or 1024)
        wave = (8000 * np.sin(np.arange(rate // 4) / 20)).astype(np.int16)[None]
        block = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        block.sample_rate, block.pts, block.time_base = rate, 0, Fraction(1, rate)
        for part in [*resampler.resample(block), *resampler.resample(None)]:
            out.mux(sound.encode(part))
        out.mux(sound.encode(None))


def mutate(good: bytes, chance: random.Random) -> bytes:
    """The file with one to eight damages: bytes, numbers at their limits, holes, cuts, repeats, moved blocks."""
    data = bytearray(good)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        # Headers lie at the start and, in MP4, at the end.
        span = chance.choice((64, 512, len(data)))
        at = chance.randrange(max(min(span, len(data)), 1))
        at = at if chance.random() < 0.7 else max(len(data) - 1 - at, 0)
        kind = chance.randrange(7)
        size = chance.choice((1, 2, 4, 8, 64, 500))
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            limit = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFFFFFE))
            data[at : at + 4] = limit.to_bytes(4, chance.choice(("big", "little")))
        elif kind == 2:
            data[at : at + size] = bytes(min(size, len(data) - at))
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size] * chance.choice((1, 5))
        elif kind == 5:
            del data[at + size :]
        else:
            other = chance.randrange(max(len(data), 1))
            data[at : at + size] = data[other : other + size]
    return bytes(data)


def check(path: Path) -> str:
    """Read a file in every way; what came of it. Anything but frames or a MediaError goes up."""
    from lipstream.media.opening import MediaError
    from lipstream.media.probe import examine
    from lipstream.media.reader import VideoReader
    from lipstream.media.speech import speech_blocks

    said = []
    for need in ("video", "audio"):
        try:
            examine(str(path), need)
            if need == "video":
                count = sum(1 for _, _ in zip(VideoReader(path), range(FRAME_LIMIT), strict=False))
            else:
                count = sum(len(b) for b, _ in zip(speech_blocks(path), range(FRAME_LIMIT), strict=False))
            said.append(f"{need} {count}")
        except MediaError as error:
            assert "\n" not in str(error), f"more than one line: {error}"
            said.append(error.problem)
    return "; ".join(said)


def child(paths: list[str]) -> int:
    """Inside the limited process: one line before and one after each file."""
    from lipstream.media.probe import limit_process

    limit_process(len(paths) + 60, 6 * 1024**3)
    for path in paths:
        print(f"> {path}", flush=True)
        check(Path(path))
        print(f"< {path}", flush=True)
    return 0


def run(paths: list[Path], seconds: float = 300) -> list[tuple[Path, str]]:
    """Read files in child processes; those that broke one, and how."""
    broken: list[tuple[Path, str]] = []
    left = [str(path) for path in paths]
    while left:
        command = [sys.executable, __file__, "--child", *left]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            status, output, error = str(done.returncode), done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            status, output, error = "hangs", (late.stdout or b"").decode(), ""
        if status == "0":
            return broken
        begun = [line[2:] for line in output.splitlines() if line.startswith("> ")]
        culprit = begun[-1] if begun else left[0]
        broken.append((Path(culprit), f"status {status}: {' '.join(error.split())[-300:]}"))
        left = left[left.index(culprit) + 1 :]
    return broken


def mutants(folder: Path, count: int, seed: int) -> list[Path]:
    """So many damaged files, the same for the same seed."""
    chance, seeds, files = random.Random(seed), {}, []
    for suffix, (video, audio) in SEEDS.items():
        good = folder / f"good.{suffix}"
        write_seed(good, video, audio)
        seeds[suffix] = good.read_bytes()
    for number in range(count):
        suffix = list(SEEDS)[number % len(SEEDS)]
        files.append(folder / f"{seed}_{number}.{suffix}")
        files[-1].write_bytes(mutate(seeds[suffix], chance))
    return files


def main() -> int:
    """A long round; exit status 1 if anything broke."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=CORPUS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    total = 0
    for batch in range(-(-args.count // 200)):
        with tempfile.TemporaryDirectory() as name:
            files = mutants(Path(name), min(200, args.count - 200 * batch), args.seed + batch)
            for path, how in run(files):
                total += 1
                args.keep.mkdir(exist_ok=True)
                (args.keep / path.name).write_bytes(path.read_bytes())
                print(f"{path.name}: {how}", flush=True)
    print(f"{args.count} files, {total} broke a reader")
    return 1 if total else 0


if __name__ == "__main__":
    raise SystemExit(main())
