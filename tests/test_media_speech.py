"""Speech samples: exact length and place for every container, streaming equal to whole."""

from __future__ import annotations

import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lipstream.media.opening import MediaError
from lipstream.media.speech import SpeechReader, SpeechWindow, count_speech_samples, load_speech
from test_media import Make, make, wav

__all__ = ["make"]


def reference(samples: int) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16000)


@pytest.mark.parametrize("codec,suffix", [("aac", ".m4a"), ("pcm_s16le", ".wav"), ("flac", ".flac"), ("mp3", ".mp3")])
@pytest.mark.parametrize("rate,channels", [(44100, 2), (48000, 1), (16000, 1)])
def test_two_seconds_are_32000_samples_in_place(
    tmp_path: Path, codec: str, suffix: str, rate: int, channels: int
) -> None:
    speech = load_speech(wav(tmp_path / f"a{suffix}", rate, channels, 2.0, codec))
    assert speech.dtype == np.float32 and abs(speech.size - 32000) <= 2
    # A shift of one sample would differ by 0.033 on average; AAC itself by 0.01.
    assert np.abs(speech[2000:30000] - reference(32000)[2000:30000]).mean() < 0.015


@pytest.mark.parametrize("piece", [1, 777, 640, 100_000])
def test_any_pieces_equal_the_whole(tmp_path: Path, piece: int) -> None:
    path = wav(tmp_path / "a.wav", 44100, 2, 0.1 if piece == 1 else 0.7)
    reader, parts = SpeechReader(path), []
    while (part := reader.read(piece)).size:
        parts.append(part)
    whole = load_speech(path)
    assert np.array_equal(np.concatenate(parts), whole)
    assert reader.position_samples == whole.size == count_speech_samples(path)


def test_video_files_have_speech_too(make: Make) -> None:
    speech = load_speech(make("in.mp4", frames=25, tone=(44100, 2, 1.0)))
    assert abs(speech.size - 16000) <= 2
    assert np.abs(speech[2000:14000] - reference(16000)[2000:14000]).mean() < 0.015


def test_sound_counts_from_the_first_picture(make: Make) -> None:
    """Pictures from 0.2 s on: the first 0.2 s of the sound come before time 0."""
    path = make("late.mp4", frames=20, pts=list(range(5, 25)), tone=(16000, 1, 1.0))
    speech = load_speech(path)
    assert abs(speech.size - 12800) <= 2
    assert np.abs(speech[2000:10000] - reference(16000)[5200:13200]).mean() < 0.015


def test_late_sound_starts_with_silence(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for i in range(25):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        data = av.AudioFrame.from_ndarray(np.full((1, 8000), 8000, np.int16), format="s16", layout="mono")
        data.sample_rate, data.pts, data.time_base = 16000, 8000, Fraction(1, 16000)
        out.mux(sound.encode(data))
        out.mux(video.encode(None))
        out.mux(sound.encode(None))
    speech = load_speech(path)
    assert abs(speech.size - 16000) <= 2
    assert np.abs(speech[:7900]).max() < 1e-3 and speech[8200:15000].min() > 0.2


def test_silent_video_says_so(make: Make) -> None:
    with pytest.raises(MediaError, match="no audio stream"):
        load_speech(make("silent.mp4"))


def test_header_without_sound_says_so(tmp_path: Path) -> None:
    path = tmp_path / "none.wav"
    with av.open(str(path), "w") as out:
        out.add_stream("pcm_s16le", rate=16000, layout="mono")
        out.start_encoding()
    with pytest.raises(MediaError):
        load_speech(path)


def test_windows_are_slices(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", 44100, 2, 3.0)
    whole, window = load_speech(path), SpeechWindow(path, 2000)
    for first, last in ((0, 100), (50, 9000), (9000, 9000), (8000, 20_000), (30_000, 30_500), (28_500, 31_000)):
        assert np.array_equal(window.read(first, last), whole[first:last])
    assert np.array_equal(window.read(40_000, 60_000), whole[40_000:]) and not window.read(70_000, 80_000).size
    with pytest.raises(ValueError, match="are gone"):
        window.read(10_000, 11_000)
    assert np.array_equal(load_speech(path, 1234), whole[:1234]) and load_speech(path, 10**6).size == whole.size


def test_memory_does_not_grow_with_the_sound(tmp_path: Path) -> None:
    """Stretches all over a long sound, and the beginning of one: as `prepare` and `personalize` read."""
    peaks = []
    for seconds in (24, 96):
        path = tmp_path / f"{seconds}.wav"
        with wave.open(str(path), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(16_000)
            for _ in range(seconds):
                out.writeframes(np.arange(16_000, dtype="<i2").tobytes())
        tracemalloc.start()
        try:
            window = SpeechWindow(path, 16_000)
            for second in range(0, seconds - 5, 6):
                assert window.read(16_000 * second, 16_000 * (second + 4)).size == 64_000
            assert load_speech(path, 200_000).size == 200_000
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
