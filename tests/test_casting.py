"""A run says who got the words, and a voice without a face gets the next one."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lipstream import casting
from lipstream.beginning import watch_beginning
from lipstream.casting import Cast
from lipstream.faces.mesh import region_from_landmarks
from lipstream.media.reader import VideoReader
from lipstream.speaker import parse_speaker
from test_people import SIDE, one, side_by_side, video_of


def test_a_run_says_whose_lips_move_and_why(tmp_path: Path) -> None:
    pair = video_of(tmp_path / "pair.mp4", [side_by_side(i) for i in range(20)])
    told = {
        "auto": ("the largest of 2 faces", None),
        "right": ("the right one of 2 faces", False),
        "0.25,0.5@0.2": ("who is at that place", True),
    }
    for speaker, (why, left) in told.items():
        reader = VideoReader(pair)
        cast = Cast(reader, [parse_speaker(speaker)])
        assert [waits.text for waits in cast.waiting()] == [speaker]
        for frame in islice(reader, 3):
            _, (track,) = cast.step(frame)
        (choice,) = cast.choices
        assert (choice.speaker, choice.why, choice.seconds) == (speaker, why, 0.0) and not cast.waiting()
        assert track is not None and choice.person == track.id
        face = region_from_landmarks(track.landmarks)
        assert abs(choice.place[0] - face.x) < 8 and abs(choice.place[1] - face.y) < 8
        assert left is None or (choice.place[0] < SIDE) == left


def test_a_second_voice_begins_with_the_second_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits ten seconds for a face that was nobody's before."""
    monkeypatch.setattr(casting, "watch_beginning", partial(watch_beginning, seconds=0.2))
    nobody = np.zeros_like(one()[0])
    alone = [np.concatenate([one()[i], nobody], axis=1) for i in range(14)]
    reader = VideoReader(video_of(tmp_path / "later.mp4", [*alone, *(side_by_side(i) for i in range(14, 30))]))
    cast = Cast(reader, [parse_speaker("left"), parse_speaker("auto")])
    assert "speaker 'auto' waits for a face that has no voice yet: the first 4 s show 1" in caplog.text
    for frame in reader:
        _, (first, second) = cast.step(frame)
        assert first is not None and first.landmarks[1, 0] < SIDE
        assert frame.index >= 14 or second is None
    assert second is not None and second.landmarks[1, 0] > SIDE
    assert [choice.speaker for choice in cast.choices] == ["left", "auto"]
    late = cast.choices[1]
    assert late.why == "the first face without a voice" and 14 / 25 <= late.seconds <= 27 / 25
