"""What a run promises beyond its frames: its plan, delay and tracks, other streams, depth, losslessness, HDR, comb."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lipstream.evaluation.fidelity import max_difference
from lipstream.media.encoder import encoder_for
from lipstream.media.opening import MediaError, open_media
from lipstream.media.plan import Plan
from lipstream.media.probe import probe
from lipstream.media.reader import VideoReader
from lipstream.media.speech import count_speech_samples, load_speech, speech_blocks
from lipstream.media.timeline import SPEECH_RATE
from lipstream.media.writer import VideoWriter
from lipstream.options import SyncOptions
from test_media import Make, make, tone_frames, wav

__all__ = ["make"]


# --- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, fit, seconds, said",
    [
        ("bounce", "audio", 2, "50 frames, 2.000 s: the video (0.400 s) plays forwards and backwards for the speech"),
        ("loop", "audio", 2, "50 frames, 2.000 s: the video (0.400 s) is looped to the speech (2.000 s)"),
        ("freeze", "audio", 2, "50 frames, 2.000 s: the video (0.400 s) is frozen to the speech (2.000 s)"),
        ("cut", "audio", 2, "10 frames, 0.400 s: the speech (2.000 s) is cut to the video (0.400 s)"),
        ("silence", "video", 0.2, "10 frames, 0.400 s: the speech (0.200 s) is followed by silence to the end of"),
        ("bounce", "audio", 0.2, "5 frames, 0.200 s: the video (0.400 s) is cut to the speech (0.200 s)"),
        ("bounce", "audio", 0.41, "10 frames, 0.400 s: the video (0.400 s) and the speech (0.410 s) end together"),
    ],
)
def test_plans_say_what_will_happen(make: Make, length: str, fit: str, seconds: float, said: str) -> None:
    plan = Plan.of(probe(make("in.mp4"), need="video"), round(seconds * SPEECH_RATE), length, fit)  # type: ignore[arg-type]
    assert str(plan).startswith(said)


def test_a_plan_holds_or_says_why(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan.of(probe(make("in.mp4"), need="video"), SPEECH_RATE // 5)
    pts = list(plan.timeline.pts)
    plan.check("a.mp4", pts[:5], 5, 5)
    for given, finished in ((5, 4), (4, 4), (6, 6)):
        with pytest.raises(RuntimeError, match="promised 5 frames"):
            plan.check("a.mp4", pts[:5], given, finished)
    assert not caplog.records
    plan.check("a.mp4", pts[:3], 3, 3)  # the source broke off
    assert "only 3 of 5 frames can be decoded" in caplog.text


def test_options_that_do_not_go_together() -> None:
    assert SyncOptions(length="silence").resolved_fit == "video"
    assert SyncOptions(fit="video").resolved_length == "silence" and SyncOptions().resolved_length == "bounce"
    for wrong in (
        {"length": "loop", "fit": "video"}, {"length": "silence", "fit": "audio"}, {"length": "long"},
        {"audio_delay_ms": 10**8}, {"audio_track": 0}, {"crf": 52}, {"crf": 3, "quality": "lossless"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"length|delay|tracks|crf"):
            SyncOptions(**wrong)  # type: ignore[arg-type]


# --- speech --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 130, -130, 2500, -2500])
def test_delay_is_exact(tmp_path: Path, delay: int) -> None:
    path = wav(tmp_path / "a.wav", 16000, 1, 1.5)
    whole = load_speech(path)
    late = np.zeros(max(delay, 0) * 16, np.float32)
    moved = list(speech_blocks(path, delay_ms=delay))
    assert np.array_equal(np.concatenate(moved or [late]), np.concatenate([late, whole[max(-delay, 0) * 16 :]]))
    assert count_speech_samples(path, delay_ms=delay) == max(whole.size + delay * 16, 0)


def two_tracks(path: Path, default: int) -> Path:
    """Sounds of 440 Hz, one with half a second and one with a whole one."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("flac", rate=16000, layout="mono") for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        for stream, seconds in zip(streams, (0.5, 1.0), strict=True):
            resampler = av.AudioResampler(stream.format, "mono", 16000, frame_size=4096)
            for block in [*tone_frames(16000, 1, seconds), None]:
                for part in resampler.resample(block):
                    out.mux(stream.encode(part))
            out.mux(stream.encode(None))
    return path


def test_tracks_are_chosen(tmp_path: Path) -> None:
    first, second = two_tracks(tmp_path / "a.mka", 0), two_tracks(tmp_path / "b.mka", 1)
    assert [round(count_speech_samples(p) / 1600) for p in (first, second)] == [5, 10]
    assert [round(count_speech_samples(first, n) / 1600) for n in (1, 2)] == [5, 10]
    with pytest.raises(MediaError, match="no audio track 3; choose one of 1 to 2"):
        count_speech_samples(first, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("delay", [250, -250])
@pytest.mark.parametrize("kind", [".m4a", ".wav"])
def test_delayed_sound_is_written_in_place(make: Make, tmp_path: Path, suffix: str, delay: int, kind: str) -> None:
    """A tone that begins after half a second begins a quarter of a second later or earlier."""
    sound = tmp_path / f"a{kind}"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac" if kind == ".m4a" else "pcm_s16le", rate=48000, layout="mono")
        wave = 0.3 * np.sin(np.arange(60_000) / 10).astype(np.float32)
        wave[:24_000] = 0
        for start in range(0, len(wave), 1000):
            block = av.AudioFrame.from_ndarray(wave[None, start : start + 1000], format="fltp", layout="mono")
            block.sample_rate, block.pts = 48000, start
            out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    reader = VideoReader(make("in.mp4", frames=30))
    with VideoWriter(tmp_path / f"out{suffix}", like=reader, audio=sound, delay_ms=delay) as writer:
        for frame in reader:
            writer.write(frame)
    heard = load_speech(tmp_path / f"out{suffix}")
    begins = int(np.flatnonzero(np.abs(heard) > 0.1)[0]) / 16
    assert begins == pytest.approx(500 + delay, abs=3)


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p12le"])
def test_lossless_decodes_to_the_same_planes(make: Make, tmp_path: Path, pix_fmt: str, suffix: str) -> None:
    codec, tags = ("libx265", (1, 1)) if "12" in pix_fmt else ("libx264", (2 if "j" in pix_fmt else 1, 1))
    reader = VideoReader(make("in.mp4", frames=4, pix_fmt=pix_fmt, codec=codec, tags=tags))
    with VideoWriter(tmp_path / f"out{suffix}", like=reader, quality="lossless") as writer:
        for frame in reader:
            writer.write(frame)
    result = VideoReader(tmp_path / f"out{suffix}")
    assert result.pix_fmt == reader.pix_fmt and result.colour == reader.colour
    assert [max_difference(a, b) for a, b in zip(reader, result, strict=True)] == [0] * 4


def test_presets_go_from_coarse_to_exact(make: Make, tmp_path: Path) -> None:
    reader, errors = VideoReader(make("in.mp4", frames=6, size=(128, 96))), []
    for quality in ("draft", "good", "best", "lossless"):
        with VideoWriter(tmp_path / f"{quality}.mkv", like=reader, quality=quality) as writer:
            for frame in reader:
                writer.write(frame)
        pairs = zip(reader, VideoReader(tmp_path / f"{quality}.mkv"), strict=True)
        errors.append(np.mean([np.abs(a.image.astype(int) - b.image).mean() for a, b in pairs]))
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
    assert encoder_for("yuv420p", "best", crf=30)[1] == {"preset": "slow", "crf": "30"}


def test_hdr_tags_are_kept(tmp_path: Path) -> None:
    told = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=25, options={"x265-params": f"log-level=none:{told}"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 9, 9, 16
        for i in range(3):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    reader = VideoReader(path)
    with VideoWriter(tmp_path / "out.mp4", like=reader) as writer:
        for frame in reader:
            writer.write(frame)
    result = VideoReader(tmp_path / "out.mp4")
    assert (result.colour, result.hdr, result.pix_fmt) == (reader.colour, reader.hdr, "yuv420p10le")
    assert reader.hdr.light == "1000,400" and reader.hdr.mastering is not None


def test_interlaced_pictures_lose_their_comb(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"flags": "+ilme+ildct", "x264-params": "tff=1"})
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for i in range(8):
            image = np.zeros((64, 128, 3), np.uint8)
            for field in (0, 1):  # a bar that moves from field to field
                left = 8 * (2 * i + field) % 100
                image[field::2, left : left + 20] = 255
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    with open_media(path) as container:
        combed = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    reader = VideoReader(path)
    frames = list(reader)
    assert reader.interlaced and "interlaced" in caplog.text
    assert [f.pts for f in frames] == list(probe(path, need="video").pts) and len(frames) == 8

    def comb(image: np.ndarray) -> float:
        return float(np.abs(np.diff(image.astype(float), axis=0)).mean())

    assert comb(frames[4].image[..., 0]) < comb(combed[4]) / 3
    again = list(reader.read(frames[0].pts))
    assert [f.pts for f in again] == [f.pts for f in frames]


def test_transparency_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    reader = VideoReader(make("in.mov", codec="qtrle", pix_fmt="argb", tags=(0, 2)))
    assert "transparency" in caplog.text and reader.pix_fmt == "yuv444p"


# --- what else a source has ----------------------------------------------------------------------------------------


def rich(path: Path, subtitles: str) -> Path:
    """A picture, two sounds, a subtitle, two chapters and a title."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounds = [out.add_stream("aac", rate=48000, layout="mono") for _ in range(2)]
        sounds[1].metadata["language"] = "fra"
        text = out.add_mux_stream(subtitles)
        out.metadata["title"] = "A film"
        unit = Fraction(1, 1000)
        chapters = [(0, 500, "One"), (500, 1000, "Two")]
        out.set_chapters(
            [
                {"id": start, "start": start, "end": end, "time_base": unit, "metadata": {"title": title}}
                for start, end, title in chapters
            ]
        )
        for i in range(25):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for sound in sounds:
            for block in tone_frames(48000, 1, 1.0):
                out.mux(sound.encode(block))
            out.mux(sound.encode(None))
        packet = av.Packet(b"\0\5hello" if subtitles == "mov_text" else b"hello")
        packet.stream, packet.time_base = text, Fraction(1, 1000)
        packet.pts = packet.dts = 200
        packet.duration = 300
        out.mux(packet)
    return path


@pytest.mark.parametrize(
    "source, subtitles, target, kept",
    [
        ("a.mp4", "mov_text", "b.mp4", True),
        ("a.mkv", "subrip", "b.mkv", True),
        ("a.mkv", "subrip", "b.mp4", True),
        ("a.mp4", "mov_text", "b.mkv", True),
        ("a.mkv", "webvtt", "b.mp4", False),
    ],
)
def test_other_streams_are_carried_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, subtitles: str, target: str, kept: bool
) -> None:
    reader = VideoReader(rich(tmp_path / source, subtitles))
    speech = wav(tmp_path / "speech.wav", 48000, 1, 0.8)
    with VideoWriter(tmp_path / target, like=reader, audio=speech, carry=True) as writer:
        for frame, _ in zip(reader, range(20), strict=False):  # cut to 0.8 s
            writer.write(frame)
    with open_media(tmp_path / target) as container:
        kinds = [stream.type for stream in container.streams if stream.type != "data"]
        assert kinds == ["video", "audio", "audio", *(["subtitle"] if kept else [])]
        assert container.metadata["title"] == "A film" and container.streams.audio[1].language == "fra"
        assert [c["metadata"]["title"] for c in container.chapters()] == ["One", "Two"]
        assert all(c["end"] * c["time_base"] <= Fraction(81, 100) for c in container.chapters())
        if kept:
            text = [p for p in container.demux(container.streams.subtitles[0]) if p.size > 2]
            assert [bytes(p)[-5:] for p in text] == [b"hello"]
            assert float(text[0].pts * text[0].time_base) == pytest.approx(0.2, abs=0.03)
    assert (("left out" in caplog.text) and ("webvtt" in caplog.text)) is not kept


@pytest.mark.parametrize("repeats", [False, True])
def test_what_plays_once_beside_repeated_pictures_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, repeats: bool
) -> None:
    reader = VideoReader(rich(tmp_path / "a.mkv", "subrip"))
    with VideoWriter(tmp_path / "b.mkv", like=reader, carry=True, repeats=repeats) as writer:
        writer.write(next(iter(reader)))
    said = f"{reader.path}: its pictures are repeated; this plays once: audio (aac), subtitle (subrip)"
    assert [record.getMessage() for record in caplog.records] == ([said] if repeats else [])


@pytest.mark.parametrize("size, fits", [((2, 2), False), ((64, 14), False), ((16, 16), True)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv444p12le", "yuv444p16le"])
def test_tiny_deep_pictures_are_refused_in_a_line(
    make: Make, tmp_path: Path, pix_fmt: str, size: tuple[int, int], fits: bool
) -> None:
    reader = VideoReader(make("in.mkv", codec="ffv1", size=size, pix_fmt=pix_fmt, frames=2))
    if fits:
        with VideoWriter(tmp_path / "out.mp4", like=reader) as writer:
            writer.write(next(iter(reader)))
        return
    bits = 10 if "10" in pix_fmt else 12
    with pytest.raises(MediaError) as caught, VideoWriter(tmp_path / "out.mp4", like=reader):
        pass
    assert str(caught.value) == (
        f"{reader.path}: has pictures of {size[0]}x{size[1]} pixels with {bits} bits, too small for H.265; "
        "scale it to at least 16x16 or convert it to 8 bits"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.mkv"]


def test_a_source_whose_sound_nobody_knows_is_written(make: Make, tmp_path: Path) -> None:
    data = rich(tmp_path / "a.mkv", "subrip").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    reader = VideoReader(tmp_path / "a.mkv")
    with VideoWriter(tmp_path / "b.mkv", like=reader, carry=True) as writer:
        for frame in reader:
            writer.write(frame)
    with open_media(tmp_path / "b.mkv") as container:
        assert [stream.type for stream in container.streams] == ["video", "subtitle"]


# --- memory --------------------------------------------------------------------------------------------------------


def test_large_pictures_wait_in_short_queues(make: Make) -> None:
    from lipstream.pipeline import queue_frames

    small = VideoReader(make("in.mp4"))
    assert queue_frames(small) == 16
    small.stored_size = (small.width, small.height) = (3840, 2160)
    assert queue_frames(small) * small.frame_bytes <= 100 * 2**20 and queue_frames(small) >= 2
