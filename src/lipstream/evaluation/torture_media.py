"""Cases of the torture set: every kind of video that people bring.

They are made from the demo clip, re-encoded with other rates, sizes, formats and streams. Each is synced, and the
result held against the promise: frames, times, size, rotation, colour tags, format, and no sample changed outside
the mouth.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from lipstream.evaluation.fidelity import Fidelity, check_fidelity, max_difference
from lipstream.evaluation.speed import run_command, write_input
from lipstream.evaluation.torture import Bench, case, require
from lipstream.media.bounce import BouncingReader
from lipstream.media.opening import open_media
from lipstream.media.plan import Plan
from lipstream.media.probe import probe
from lipstream.media.reader import VideoReader
from lipstream.media.speech import count_speech_samples, load_speech
from lipstream.media.timeline import SPEECH_RATE
from lipstream.options import SyncOptions


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a clip is encoded; times in units of `time_base`, one per frame."""

    fps: Fraction = Fraction(25)
    pts: Sequence[int] | None = None
    time_base: Fraction | None = None
    size: tuple[int, int] = (256, 256)
    pix_fmt: str = "yuv420p"
    codec: str = "libx264"
    options: tuple[tuple[str, str], ...] = (("preset", "ultrafast"), ("crf", "12"))
    rotation: int | None = None
    tags: tuple[int, int, int, int] = (1, 1, 1, 1)  # range, matrix, primaries, transfer


def pictures(clip: Path, frames: int) -> Iterator[NDArray[np.uint8]]:
    """Upright pictures of a clip, played forwards and backwards."""
    played = iter(BouncingReader(VideoReader(clip), SPEECH_RATE * 24 * 3600))
    for _ in range(frames):
        yield next(played).image


def write_clip(
    bench: Bench, name: str, look: Look, frames: int = 35, tones: Sequence[int] = (), subtitle: str | None = None
) -> Path:
    """A clip of the demo's person; `tones` are sounds of that frequency (Hz), 48 kHz AAC, one track each."""
    path = bench.folder / name
    base = look.time_base or 1 / look.fps
    with av.open(str(path), "w") as out:
        video = out.add_stream(look.codec, rate=look.fps, options=dict(look.options))
        assert isinstance(video, VideoStream)
        video.width, video.height = look.size
        video.pix_fmt = look.pix_fmt
        context = video.codec_context
        context.time_base = video.time_base = base
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = look.tags
        if look.rotation is not None:
            video.set_display_rotation(look.rotation)
        sounds = [out.add_stream("aac", rate=48_000, layout="mono") for _ in tones]
        texts = out.add_mux_stream("mov_text") if subtitle is not None else None
        for index, image in enumerate(pictures(bench.clip, frames)):
            scaled = np.asarray(cv2.resize(image, look.size, interpolation=cv2.INTER_AREA), np.uint8)
            frame = av.VideoFrame.from_ndarray(scaled, format="rgb24").reformat(
                format=look.pix_fmt, dst_colorspace=look.tags[1], dst_color_range=look.tags[0]
            )
            frame.pts, frame.time_base = (look.pts[index] if look.pts else index), base
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        seconds = float((look.pts[frames - 1] if look.pts else frames) * base)
        for sound, tone in zip(sounds, tones, strict=True):
            wave = (0.3 * np.sin(2 * np.pi * tone * np.arange(round(seconds * 48_000)) / 48_000)).astype(np.float32)
            for start in range(0, len(wave), 1024):
                block = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts = 48_000, start
                out.mux(sound.encode(block))
            out.mux(sound.encode(None))
        if texts is not None and subtitle is not None:
            data = subtitle.encode()
            packet = av.Packet(len(data).to_bytes(2, "big") + data)
            packet.stream, packet.time_base = texts, Fraction(1, 1000)
            packet.pts = packet.dts = 100
            packet.duration = 500
            out.mux(packet)
    return path


def check(bench: Bench, video: Path, audio: Path | None = None, options: SyncOptions | None = None) -> Fidelity:
    """Sync without loss and hold everything against the source; raises `Broken`."""
    audio, options = audio or bench.short, options or SyncOptions()
    found = check_fidelity(bench.lipsync, video, audio, options)
    samples = count_speech_samples(audio, options.audio_track, options.audio_delay_ms)
    plan = Plan.of(probe(video, need="video"), samples, options.resolved_length, options.resolved_fit)
    require(found.frames == plan.frames, f"{found.frames} frames, promised {plan.frames}")
    require(found.ok, f"not as promised: {found}")
    require(found.synced_frames, "no face was found")
    return found


def said(found: Fidelity) -> str:
    """The figures of a kept promise."""
    return f"{found.frames} frames ({found.synced_frames} synced), 0 samples outside the mask differ"


def _rate(fps: Fraction) -> object:
    def run(bench: Bench) -> str:
        return said(check(bench, write_clip(bench, "in.mp4", Look(fps=fps), frames=round(1.4 * fps))))

    name = {Fraction(24000, 1001): "23.976", Fraction(30000, 1001): "29.97"}.get(fps, str(fps))
    return case(f"rate-{name}", f"frames, times and duration at {name} frames/s")(run)


for _fps in (Fraction(24000, 1001), Fraction(30000, 1001), Fraction(50), Fraction(60)):
    _rate(_fps)


@case("vfr", "a variable rate (phone, screen recorder): every timestamp stays, bounced too")
def _vfr(bench: Bench) -> str:
    gaps = np.random.default_rng(1).integers(20, 70, 34)
    pts = [0, *(int(t) for t in np.cumsum(gaps))]
    look = Look(pts=pts, time_base=Fraction(1, 1000), fps=Fraction(25))
    first = check(bench, write_clip(bench, "in.mp4", look))
    bounced = check(bench, write_clip(bench, "short.mp4", look, frames=15))
    return f"{said(first)}; bounced: {bounced.frames} frames"


@case("rotated", "a phone's rotation tag is read, and kept")
def _rotated(bench: Bench) -> str:
    # The tag turns the stored picture: a face that lies on its side is upright again.
    video = write_clip(bench, "turned.mp4", Look(size=(192, 256)), frames=30)
    stored = bench.folder / "in.mp4"
    with av.open(str(stored), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 256, 192, "yuv420p"
        stream.set_display_rotation(90)
        for frame in VideoReader(video):
            turned = np.ascontiguousarray(np.rot90(frame.image, -1))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(turned, format="rgb24").reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    reader = VideoReader(stored)
    require((reader.width, reader.height) == (192, 256), f"upright size is {reader.width}x{reader.height}")
    return said(check(bench, stored))


@case("odd-size", "a picture of odd width and height keeps both")
def _odd(bench: Bench) -> str:
    look = Look(size=(255, 243), pix_fmt="yuv444p", codec="libx264")
    return said(check(bench, write_clip(bench, "in.mp4", look)))


@case("10-bit-hdr", "10 bits in, 10 bits out; BT.2020 and PQ tags and mastering data stay")
def _deep(bench: Bench) -> str:
    told = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
    look = Look(
        pix_fmt="yuv420p10le",
        codec="libx265",
        options=(("preset", "ultrafast"), ("x265-params", f"log-level=none:{told}")),
        tags=(1, 9, 9, 16),
    )
    video = write_clip(bench, "in.mp4", look, frames=30)
    found = check(bench, video)
    source, result = VideoReader(video), VideoReader(bench.sync(video, bench.short))
    require(result.colour == source.colour, f"colour {result.colour}, was {source.colour}")
    require(source.hdr.mastering and result.hdr == source.hdr, f"HDR data {result.hdr}, was {source.hdr}")
    return f"{said(found)}; {result.pix_fmt}, {result.hdr.light} cd/m2"


@case("full-range", "full-range colours (phone, webcam) are neither washed out nor crushed")
def _full(bench: Bench) -> str:
    video = write_clip(bench, "in.mp4", Look(pix_fmt="yuvj420p", tags=(2, 5, 5, 6)), frames=30)
    found = check(bench, video)
    source, result = VideoReader(video), VideoReader(bench.sync(video, bench.short))
    require(result.colour == source.colour, f"colour {result.colour}, was {source.colour}")
    return said(found)


@case("interlaced", "a camcorder's interlaced picture is deinterlaced with a warning, frame by frame")
def _interlaced(bench: Bench) -> str:
    look = Look(options=(("flags", "+ilme+ildct"), ("x264-params", "tff=1"), ("crf", "12")))
    video = write_clip(bench, "in.mp4", look)
    require(VideoReader(video).interlaced, "the clip is not interlaced")
    found = check(bench, video)
    require(any("interlaced" in text for text in bench.warnings), "nobody was told")
    return said(found)


@case("alpha", "transparency is dropped with a warning")
def _alpha(bench: Bench) -> str:
    video = write_clip(bench, "in.mov", Look(codec="qtrle", pix_fmt="argb", options=(), tags=(0, 2, 2, 2)), frames=30)
    found = check(bench, video)
    require(any("transparency" in text for text in bench.warnings), "nobody was told")
    return said(found)


@case("two-sounds-subtitles", "the second sound, subtitles and titles stay; the first sound becomes the speech")
def _streams(bench: Bench) -> str:
    video = write_clip(bench, "in.mp4", Look(), frames=30, tones=(300, 1200), subtitle="hello")
    output = bench.sync(video, bench.short)
    with open_media(output) as container:
        kinds = [stream.type for stream in container.streams]
    require(kinds == ["video", "audio", "audio", "subtitle"], f"streams are {kinds}")
    speech, given = load_speech(output), load_speech(bench.short)
    alike = np.corrcoef(speech[: len(given)], given[: len(speech)])[0, 1]
    require(alike > 0.99, f"the first sound is not the speech (correlation {alike:.3f})")
    other = np.abs(np.fft.rfft(np.concatenate(list(_track(output, 2)))))
    peak = int(other.argmax()) * SPEECH_RATE / (2 * (len(other) - 1))
    require(abs(peak - 1200) < 20, f"the second sound has its peak at {peak:.0f} Hz, not 1200")
    return f"{', '.join(kinds)}; second sound at {peak:.0f} Hz"


def _track(path: Path, track: int) -> Iterator[NDArray[np.float32]]:
    from lipstream.media.speech import speech_blocks

    return speech_blocks(path, track)


@case("no-sound", "a silent video gets the speech")
def _no_sound(bench: Bench) -> str:
    output = bench.sync(write_clip(bench, "in.mp4", Look(), frames=30), bench.short)
    with open_media(output, need="audio") as container:
        return f"{len(container.streams)} streams"


@case("silence", "speech of digital silence, and longer than the video")
def _silence(bench: Bench) -> str:
    sound = bench.folder / "silence.wav"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16_000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 32_000), np.int16), format="s16", layout="mono")
        block.sample_rate = 16_000
        out.mux(stream.encode(block))
    found = check(bench, write_clip(bench, "in.mp4", Look(), frames=30), sound)
    require(found.frames == 50, f"{found.frames} frames, 50 were promised")
    return said(found)


@case("lengths", "all ways of filling: loop, freeze, silence, cut, and a delay either way")
def _lengths(bench: Bench) -> str:
    video = write_clip(bench, "in.mp4", Look(), frames=20)  # 0.8 s; the speech has 1.2 s
    wanted = {
        "loop": (SyncOptions(length="loop"), 30),
        "freeze": (SyncOptions(length="freeze"), 30),
        "silence": (SyncOptions(length="silence"), 20),
        "cut": (SyncOptions(length="cut"), 20),
        "late": (SyncOptions(audio_delay_ms=400), 40),
        "early": (SyncOptions(audio_delay_ms=-400), 20),
    }
    for name, (options, frames) in wanted.items():
        found = check(bench, video, options=options)
        require(found.frames == frames, f"{name}: {found.frames} frames, promised {frames}")
    return ", ".join(f"{name} {frames}" for name, (_, frames) in wanted.items())


@case("delay-in-sync", "a delayed sound stands where its lips are, to the sample that its codec allows")
def _delay(bench: Bench) -> str:
    video = write_clip(bench, "in.mp4", Look(), frames=30)
    given, found = load_speech(bench.short), []
    for delay in (300, -300):
        heard = load_speech(bench.sync(video, bench.short, options=SyncOptions(audio_delay_ms=delay)))
        moved = np.concatenate([np.zeros(max(delay, 0) * 16, np.float32), given[max(-delay, 0) * 16 :]])
        lag = _lag(heard, moved)
        require(abs(lag) <= 16, f"delay {delay} ms is off by {lag / 16:.1f} ms")
        found.append(f"{delay} ms: {lag / 16:+.2f} ms")
    return ", ".join(found)


def _lag(heard: NDArray[np.float32], wanted: NDArray[np.float32]) -> int:
    """How many samples later `heard` is, by correlation."""
    count = min(len(heard), len(wanted))
    size = 2 * count
    product = np.fft.rfft(heard[:count], size) * np.conj(np.fft.rfft(wanted[:count], size))
    best = int(np.fft.irfft(product).argmax())
    return best - size if best > count else best


@case("copy-unchanged", "what shows no face is copied bit for bit, and every frame stands in its place")
def _copied(bench: Bench) -> str:
    made, grey = bench.folder / "in.mp4", np.full((256, 256, 3), 90, np.uint8)
    with av.open(str(made), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"x264-params": "keyint=10"})
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = 256, 256, "yuv420p"
        for image in [*pictures(bench.clip, 30), *[grey] * 30]:
            scaled = np.asarray(cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA), np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(scaled, format="rgb24").reformat(format="yuv420p")))
        out.mux(video.encode(None))
    options = SyncOptions(fit="video", copy_unchanged=True)
    result = bench.sync(made, bench.short, options=options)
    frames = list(zip(VideoReader(made), VideoReader(result), strict=True))
    equal = [not max_difference(a, b) for a, b in frames]
    require(all(equal[30:]), f"{equal[30:].count(False)} of 30 frames without a face differ")
    require(all(a.pts == b.pts for a, b in frames), "times differ")
    require(not all(equal[:30]), "no mouth was made")
    return f"{len(frames)} frames, {sum(equal)} of them the source's"


@case("4k", "3840x2160: exact, and in bounded memory (stated)")
def _4k(bench: Bench) -> str:
    video = write_clip(bench, "in.mp4", Look(size=(3840, 2160)), frames=30)
    measured = run_command(video, bench.short, 30)
    require(measured.peak_mib < 4000, f"peak memory {measured.peak_mib:.0f} MiB")
    return f"peak {measured.peak_mib:.0f} MiB, {measured.frames} frames in {measured.wall_seconds:.0f} s"


@case("names", "names with spaces, quotes, unicode and leading dashes are files, not options")
def _names(bench: Bench) -> str:
    video, sound = bench.folder / '-it\'s "a" täst 視頻.mp4', bench.folder / "--speech %d [1].wav"
    video.write_bytes(write_clip(bench, "in.mp4", Look(), frames=20).read_bytes())
    sound.write_bytes(bench.short.read_bytes())
    command = [sys.executable, "-m", "lipstream.cli.main", "sync", "-o", "out 'ü'.mp4", "--", video.name, sound.name]
    done = subprocess.run(command, cwd=bench.folder, capture_output=True, text=True, check=False)
    require(done.returncode == 0 and (bench.folder / "out 'ü'.mp4").exists(), done.stderr)
    return "written"


@case("10-minutes", "memory for 10 minutes at most 1.1 times that for 1 minute", long=True)
def _long(bench: Bench) -> str:
    peaks = []
    for minutes in (1, 10):
        video, sound = write_input(bench.clip, bench.speech, bench.folder, 60 * minutes)
        peaks.append(run_command(video, sound, 1500 * minutes).peak_mib)
    require(peaks[1] <= 1.1 * peaks[0], f"peak {peaks[1]:.0f} MiB against {peaks[0]:.0f}")
    return f"peak {peaks[1]:.0f} MiB against {peaks[0]:.0f}, {peaks[1] / peaks[0]:.2f}"
