"""The end of a long run against its beginning: repeated inputs, and what counts as wearing out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from lipstream.cli.demo import demo_files
from lipstream.evaluation.drift import measure_drift, write_periodic
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames of the demo."""
    path = tmp_path_factory.mktemp("drift") / "short.mp4"
    with demo_files() as (video, _), av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width = stream.height = 256
        for index, frame in zip(range(6), VideoReader(video), strict=False):
            picture = av.VideoFrame.from_ndarray(frame.image, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@dataclass
class Shown:
    """A frame as a stream gives it."""

    image: Any

    @property
    def frame(self) -> Shown:
        return self


@dataclass
class Wearing:
    """Shows the source, blurred and darkened more and more from frame 40 on."""

    darker: float = 0.0
    blur: float = 0.0

    def __call__(self, *args: Any, **options: Any) -> None:
        raise AssertionError("only the stream is measured")

    def stream(self, video: Path, audio: Path, *, options: Any) -> Iterator[Shown]:
        for number, frame in enumerate(VideoReader(video)):
            image = frame.image
            if number > 40 and self.darker:
                image = (image * (1 - self.darker)).astype(np.uint8)
            if number > 40 and self.blur:
                image = np.asarray(cv2.GaussianBlur(image, (0, 0), self.blur))
            yield Shown(image)


def test_picture_and_speech_repeat_with_one_period(clip: Path, tmp_path: Path) -> None:
    with demo_files() as (_, audio):
        video, sound, period = write_periodic(clip, audio, tmp_path, 2)
    assert period == 10  # there and back, the ends once
    frames = [frame.image for frame in VideoReader(video)]
    assert len(frames) == 50
    assert all(np.array_equal(frames[i], frames[i + period]) for i in range(40))
    assert not np.array_equal(frames[0], frames[5]) and np.array_equal(frames[1], frames[9])
    speech, samples = load_speech(sound), period * 640
    assert len(speech) == 32_000
    np.testing.assert_array_equal(speech[:samples], speech[samples : 2 * samples])


def test_what_does_not_change_does_not_drift_and_what_wears_out_does(clip: Path) -> None:
    with demo_files() as (_, audio):
        still = measure_drift(Wearing(), clip, audio, 3, 1)
        assert still.worst < 1e-3 and abs(still.opening) < 0.02  # the tracker's own start is in the first seconds
        dark = measure_drift(Wearing(darker=0.1), clip, audio, 3, 1)
        assert 0.08 < dark.colour < 0.12 and dark.identity > 0.1
        soft = measure_drift(Wearing(blur=1.5), clip, audio, 3, 1)
        assert soft.sharpness < -0.2 and soft.colour < 0.03
        with pytest.raises(ValueError, match=r"2 s are too short.*take at least 4 s"):
            measure_drift(Wearing(), clip, audio, 2, 2)
