"""Media in and out: opening bad files, exact frames and timestamps, untouched planes, atomic output."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lipstream.media.bounce import BouncingReader
from lipstream.media.opening import MediaError, open_media
from lipstream.media.planes import Orientation, plane_arrays
from lipstream.media.reader import VideoReader, replace_region
from lipstream.media.timeline import FILLS, SPEECH_RATE, Fit, Length, Timeline
from lipstream.media.writer import VideoWriter

Make = Callable[..., Path]


def picture(index: int, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([(x * 3 + index * 5) % 256, (y * 4) % 256, (x + y + index * 9) % 256], axis=2).astype(np.uint8)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Builds tiny clips: make("a.mp4", frames=10, fps=25, pts=[...], tone=(rate, channels, seconds), ...)."""

    def build(
        name: str,
        *,
        frames: int = 10,
        fps: Fraction | int = 25,
        size: tuple[int, int] = (64, 48),
        pix_fmt: str = "yuv420p",
        codec: str = "libx264",
        pts: list[int] | None = None,
        time_base: Fraction | None = None,
        rotation: int | None = None,
        gop: int = 12,
        tags: tuple[int, int] = (1, 1),
        tone: tuple[int, int, float] | None = None,
        audio_codec: str = "aac",
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as out:
            options = {"preset": "ultrafast"} if codec == "libx264" else {}
            video = out.add_stream(codec, rate=Fraction(fps), options=options)
            video.width, video.height = size
            video.pix_fmt, video.gop_size = pix_fmt, gop
            base = time_base or 1 / Fraction(fps)
            video.codec_context.time_base = video.time_base = base
            video.codec_context.color_range, video.codec_context.colorspace = tags
            if rotation is not None:
                video.set_display_rotation(rotation)
            sound = None
            if tone is not None:
                sound = out.add_stream(audio_codec, rate=tone[0], layout="mono" if tone[1] == 1 else "stereo")
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24").reformat(format=pix_fmt)
                frame.pts, frame.time_base = (pts[i] if pts else i), base
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
            if sound is not None and tone is not None:
                for block in tone_frames(*tone):
                    out.mux(sound.encode(block))
                out.mux(sound.encode(None))
        return path

    return build


def tone_frames(rate: int, channels: int, seconds: float) -> list[av.AudioFrame]:
    count = round(rate * seconds)
    wave = (0.3 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)).astype(np.float32)
    blocks = []
    for start in range(0, count, 1000):
        data = np.repeat(wave[None, start : start + 1000], channels, axis=0)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(data), format="fltp", layout=("mono", "stereo")[channels - 1]
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        blocks.append(frame)
    return blocks


def wav(path: Path, rate: int, channels: int, seconds: float, codec: str = "pcm_s16le") -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=("mono", "stereo")[channels - 1])
        for frame in tone_frames(rate, channels, seconds):
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def times(path: Path) -> list[Fraction]:
    return [f.pts * f.time_base for f in VideoReader(path)]


def copy(source: Path, target: Path, audio: Path | None = None) -> VideoReader:
    reader = VideoReader(source)
    with VideoWriter(target, like=reader, audio=audio, preset="ultrafast") as writer:
        for frame in reader:
            writer.write(frame)
    return VideoReader(target)


# --- opening -------------------------------------------------------------------------------------------------------


def bad_files(folder: Path, good: Path) -> dict[str, Path]:
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello, this is not a video\n" * 20)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (folder / "live.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n")
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:600])
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 8)
    return {
        "no such file": folder / "missing.mp4",
        "is a folder": folder,
        "is empty": folder / "empty.mp4",
        "(text)": folder / "text.mp4",
        "is not a video": folder / "list.mp4",
        "not a video or audio": folder / "live.mp4",
        "truncated": folder / "cut.mp4",
        "no known media format": folder / "noise.mp4",
    }


def test_bad_files_get_one_clear_line(make: Make, tmp_path: Path) -> None:
    for words, path in bad_files(tmp_path, make("clip.mp4")).items():
        with pytest.raises(MediaError) as caught:
            VideoReader(path)
        message = str(caught.value)
        assert words in message and str(path) in message and "\n" not in message and caught.value.fix


def test_missing_streams_are_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no audio stream"):
        open_media(make("silent.mp4"), need="audio")
    with pytest.raises(MediaError, match="no video stream"):
        VideoReader(wav(tmp_path / "a.wav", 16000, 1, 0.1))


def test_strange_names_are_files(make: Make, tmp_path: Path) -> None:
    odd = make("clip.mp4").rename(tmp_path / "http:ü %d name.txt")
    assert VideoReader(odd).frames == 10
    # relative, and looking like a protocol
    before = Path.cwd()
    try:
        os.chdir(tmp_path)
        assert len(list(VideoReader(odd.name))) == 10
    finally:
        os.chdir(before)


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [24, 25, Fraction(30000, 1001), 60])
def test_frames_and_times_are_kept(make: Make, tmp_path: Path, fps: Fraction | int) -> None:
    source = make("in.mp4", fps=fps, frames=20)
    result = copy(source, tmp_path / "out.mp4")
    assert times(tmp_path / "out.mp4") == times(source)
    assert (result.width, result.height, result.fps) == (64, 48, Fraction(fps))
    assert result.duration_seconds == pytest.approx(VideoReader(source).duration_seconds, abs=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_variable_rate_is_kept(make: Make, tmp_path: Path, suffix: str) -> None:
    source = make("in.mp4", frames=8, pts=[0, 40, 41, 90, 200, 201, 333, 400], time_base=Fraction(1, 1000))
    result = copy(source, tmp_path / f"out{suffix}")
    assert times(tmp_path / f"out{suffix}") == times(source)
    assert result.duration_seconds == pytest.approx(0.44, abs=0.002)  # the last frame shows 1/25 s


def test_late_start_is_kept(make: Make, tmp_path: Path) -> None:
    source = make("in.mp4", frames=5, pts=[7, 8, 9, 10, 11])
    copy(source, tmp_path / "out.mp4", wav(tmp_path / "a.wav", 16000, 1, 0.2))
    assert times(tmp_path / "out.mp4") == times(source)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_is_upright_and_kept(make: Make, tmp_path: Path, rotation: int) -> None:
    source = make("in.mp4", rotation=rotation, pix_fmt="yuv444p")
    result = copy(source, tmp_path / "out.mp4")
    reader = VideoReader(source)
    assert (reader.width, reader.height) == ((64, 48) if rotation == 180 else (48, 64))
    assert result.display_matrix == reader.display_matrix is not None
    frame = next(iter(reader))
    assert frame.image.shape == (reader.height, reader.width, 3)
    upright = np.rot90(picture(0, 64, 48), rotation // 90)
    assert np.abs(frame.image.astype(int) - upright).mean() < 12


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
def test_orientation_inverts(transpose: bool, mirror_x: bool, mirror_y: bool) -> None:
    turn = Orientation(transpose=transpose, mirror_x=mirror_x, mirror_y=mirror_y)
    stored = np.arange(20).reshape(4, 5)
    upright = turn.upright(stored)
    assert np.array_equal(turn.stored(upright), stored)
    x0, y0, x1, y1 = turn.stored_box((1, 2, 3, 4), upright.shape[1], upright.shape[0])
    assert np.array_equal(turn.stored(upright[2:4, 1:3]), stored[y0:y1, x0:x1])


@pytest.mark.parametrize("tags", [(1, 1), (1, 5), (2, 1), (0, 2)])
def test_colour_tags_are_kept(make: Make, tmp_path: Path, tags: tuple[int, int]) -> None:
    source = make("in.mp4", tags=tags)
    assert copy(source, tmp_path / "out.mp4").colour == VideoReader(source).colour


def test_odd_sizes_are_kept(make: Make, tmp_path: Path) -> None:
    source = make("in.mkv", size=(63, 47), pix_fmt="bgr0", codec="ffv1", tags=(0, 2))
    result = copy(source, tmp_path / "out.mp4")
    assert (result.width, result.height, result.pix_fmt) == (63, 47, "yuv444p")


# --- changing a region ---------------------------------------------------------------------------------------------

FORMATS = ["yuv420p", "yuv422p", "yuv444p", "yuvj420p", "nv12", "yuv420p10le", "yuv422p10le", "yuv444p10le"]


@pytest.mark.parametrize("pix_fmt", FORMATS)
@pytest.mark.parametrize("rotation", [None, 90])
def test_everything_outside_alpha_is_bit_identical(make: Make, pix_fmt: str, rotation: int | None) -> None:
    path = make("in.mp4", frames=1, pix_fmt=pix_fmt, rotation=rotation)
    reader = VideoReader(path)
    frame = next(iter(reader))
    box = (11, 7, 32, 28)
    alpha = np.zeros((21, 21), np.float32)
    alpha[4:15, 3:18] = 1
    patch = np.random.default_rng(0).integers(0, 256, (21, 21, 3)).astype(np.uint8)
    before = [p.copy() for p in plane_arrays(frame.stored)]
    changed = replace_region(frame, patch, box, alpha)
    touched = np.zeros((reader.height, reader.width), bool)
    touched[7:28, 11:32] = alpha > 0
    touched = np.asarray(reader.orientation.stored(touched))
    for plane, old, source in zip(plane_arrays(changed.stored), before, plane_arrays(frame.stored), strict=True):
        assert np.array_equal(source, old)  # the source frame itself is never changed
        step_y, step_x = touched.shape[0] // plane.shape[0], touched.shape[1] // plane.shape[1]
        cells = touched.reshape(plane.shape[0], step_y, plane.shape[1], step_x).all(axis=(1, 3))
        assert np.array_equal(plane[~cells], old[~cells])
        assert (plane[cells] != old[cells]).mean() > 0.9


@pytest.mark.parametrize("tags", [(1, 1), (1, 5), (2, 1), (2, 5)])
def test_patch_colours_survive(make: Make, tags: tuple[int, int]) -> None:
    frame = next(iter(VideoReader(make("in.mp4", frames=1, tags=tags))))
    for colour in ((200, 30, 60), (10, 220, 100), (128, 128, 128), (250, 250, 250)):
        patch = np.full((16, 16, 3), colour, np.uint8)
        image = replace_region(frame, patch, (8, 8, 24, 24), np.ones((16, 16), np.float32)).image
        assert np.abs(image[10:22, 10:22].astype(int) - colour).max() <= 4


@pytest.mark.parametrize("pix_fmt", FORMATS)
def test_own_pixels_back_change_nothing(make: Make, pix_fmt: str) -> None:
    frame = next(iter(VideoReader(make("in.mp4", frames=1, pix_fmt=pix_fmt))))
    # away from the clipped colours of the test picture
    grey = replace_region(frame, frame.image // 2 + 64, (0, 0, 64, 48), np.ones((48, 64), np.float32))
    changed = replace_region(grey, grey.image[8:40, 8:40], (8, 8, 40, 40), np.ones((32, 32), np.float32))
    for a, b in zip(plane_arrays(changed.stored), plane_arrays(grey.stored), strict=True):
        assert np.array_equal(a, b)


def test_boxes_beyond_the_picture_are_clipped(make: Make) -> None:
    frame = next(iter(VideoReader(make("in.mp4", frames=1))))
    patch, alpha = np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), np.float32)
    assert (replace_region(frame, patch, (-10, -10, 10, 10), alpha).image[:9, :9] < 8).all()
    assert np.array_equal(replace_region(frame, patch, (100, 100, 120, 120), alpha).image, frame.image)
    with pytest.raises(ValueError, match="box"):
        replace_region(frame, patch, (0, 0, 10, 10), alpha)


# --- playing to the length of the speech ---------------------------------------------------------------------------


@pytest.mark.parametrize("length, fit", [(w, fit) for fit, ways in FILLS.items() for w in ways])
@pytest.mark.parametrize("cache, gop", [(4, 3), (4, 50), (64, 50)])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.8, 2.5])
def test_playing_equals_the_plan(make: Make, length: Length, fit: Fit, cache: int, gop: int, seconds: float) -> None:
    path = make("in.mp4", frames=20, gop=gop)
    reader = VideoReader(path)
    source = list(reader)
    speech = round(seconds * SPEECH_RATE)
    plan = Timeline(
        pts=[f.pts for f in source], time_base=reader.time_base,
        last_duration_pts=source[-1].duration_pts, speech_samples=speech, length=length, fit=fit,
    )  # fmt: skip
    playing = BouncingReader(reader, speech, length=length, fit=fit, cache_frames=cache)
    played = list(playing)
    assert len(played) == plan.output_frames == playing.given
    for k, frame in enumerate(played):
        assert (frame.index, frame.pts) == (k, plan.output_pts(k))
        assert np.array_equal(frame.image, source[plan.source_index(k)].image)
    end = played[-1].pts + played[-1].duration_pts - played[0].pts
    assert end * reader.time_base == plan.output_seconds


def test_a_single_picture_repeats(make: Make, tmp_path: Path) -> None:
    reader = VideoReader(make("in.mp4", frames=1))
    with VideoWriter(tmp_path / "out.mp4", like=reader) as writer:
        for frame in BouncingReader(reader, SPEECH_RATE):
            writer.write(frame)
    assert len(times(tmp_path / "out.mp4")) == 25


# --- output --------------------------------------------------------------------------------------------------------


def parts(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part")]


def test_failure_leaves_nothing_and_keeps_the_old_file(make: Make, tmp_path: Path) -> None:
    reader = VideoReader(make("in.mp4"))
    target = tmp_path / "out.mp4"
    target.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), VideoWriter(target, like=reader) as writer:
            writer.write(next(iter(reader)))
            raise error
        assert target.read_text() == "old" and not parts(tmp_path)


def test_no_frames_is_an_error(make: Make, tmp_path: Path) -> None:
    with (
        pytest.raises(MediaError, match="no frames"),
        VideoWriter(tmp_path / "o.mp4", like=VideoReader(make("in.mp4"))),
    ):
        pass
    assert not parts(tmp_path) and not (tmp_path / "o.mp4").exists()


def test_unwritable_places_are_named(make: Make, tmp_path: Path) -> None:
    reader = VideoReader(make("in.mp4"))
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "no" / "o.mp4", "no folder"),
        (tmp_path / "file" / "o.mp4", "no folder"),
        (Path("/proc/o.mp4"), "cannot be written"),
        (tmp_path / "o.txt", "unknown output type"),
    ):
        with pytest.raises(MediaError, match=words):
            VideoWriter(path, like=reader)


FULL_DISK = """
import sys
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.writer import VideoWriter
reader = VideoReader(sys.argv[1])
try:
    with VideoWriter(sys.argv[2], like=reader, crf=0) as writer:
        for frame in reader:
            writer.write(frame)
except MediaError as error:
    assert "cannot be written" in str(error), error
    sys.exit(7)
"""


def test_full_disk_is_one_clear_error(make: Make, tmp_path: Path) -> None:
    source = make("in.mp4", frames=30)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = [sys.executable, "-c", FULL_DISK, str(source), str(tmp_path / "out.mp4")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert not parts(tmp_path) and not (tmp_path / "out.mp4").exists()


# --- sound in the output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec,suffix,kept",
    [("aac", ".m4a", True), ("mp3", ".mp3", True), ("pcm_s16le", ".wav", False), ("flac", ".flac", False)],
)
@pytest.mark.parametrize("rate,channels", [(44100, 2), (16000, 1)])
def test_audio_keeps_rate_channels_and_ends_with_the_video(
    make: Make, tmp_path: Path, codec: str, suffix: str, kept: bool, rate: int, channels: int
) -> None:
    source = make("in.mp4", frames=25)
    speech = wav(tmp_path / f"a{suffix}", rate, channels, 1.7, codec)
    copy(source, tmp_path / "out.mp4", speech)
    with open_media(tmp_path / "out.mp4", need="audio") as container:
        audio = container.streams.audio[0]
        assert audio.codec_context.sample_rate == rate and len(audio.codec_context.layout.channels) == channels
        assert audio.codec_context.codec.canonical_name == (codec if kept else "aac")
        assert audio.duration is not None and audio.time_base is not None
        assert 1.0 - 0.03 <= float(audio.duration * audio.time_base) <= 1.0 + 0.08
    assert times(tmp_path / "out.mp4") == times(source)


def test_short_audio_is_not_stretched(make: Make, tmp_path: Path) -> None:
    copy(make("in.mp4", frames=25), tmp_path / "out.mp4", wav(tmp_path / "a.wav", 48000, 2, 0.4))
    with open_media(tmp_path / "out.mp4", need="audio") as container:
        audio = container.streams.audio[0]
        assert float(audio.duration * audio.time_base) == pytest.approx(0.4, abs=0.03)
