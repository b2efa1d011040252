"""The one session with full-size networks: a real clip through tiny ones, shots, and everything untouched."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import lipstream.fullsize_session as module
from golden_model import random_model
from lipstream.cli.common import EXIT_USAGE
from lipstream.cli.main import main
from lipstream.faces.canvas import Alignment, FaceCanvas
from lipstream.faces.crop import CropCompositor, covered_on_crop
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.faces.pose import mouth_opening
from lipstream.faces.track import FaceTracker
from lipstream.fullsize import FullSizeModel, FullSizeTake
from lipstream.fullsize_session import CropFace, CropObserver, CropSession
from lipstream.manner import Manner
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.models.dit import FLAVOURS
from lipstream.session import Observed, SyncedFrame
from test_fullsize import LinearCodec

CLIP = Path(__file__).parents[1] / "src" / "lipstream" / "assets" / "demo" / "clip.mp4"
TEST = FLAVOURS["test"]


@cache
def full_size_model() -> FullSizeModel:
    codec = LinearCodec()
    return FullSizeModel(random_model(TEST), codec, codec, built_in_mask(), text=torch.randn(1, 3, TEST.text_dim))


def rows(start: int, stop: int) -> torch.Tensor:
    return torch.stack([torch.full((TEST.audio_dim,), 0.1 * (i % 7)) for i in range(start, stop)])


def new_session(time_base: Fraction) -> CropSession:
    model = full_size_model()
    return CropSession(model, CropCompositor(model.mask), time_base, rows)


def test_a_clip_comes_back_with_the_same_frames_and_only_the_mask_changed() -> None:
    reader, observer = VideoReader(CLIP), CropObserver()
    session, source, out = new_session(reader.time_base), [], []
    for frame in islice(reader, 14):  # a chunk, and one that is padded
        source.append(frame)
        out += session.push(observer.step(frame))
        assert len(out) <= len(source)
    assert out  # frames come before the end
    out += session.finish()
    assert [f.pts for f in out] == [f.pts for f in source] and all(f.synced for f in out)
    for before, after in zip(source, out, strict=True):
        assert after.patch is not None
        x0, y0, x1, y1 = after.patch.box
        untouched = np.ones(before.image.shape[:2], bool)
        untouched[y0:y1, x0:x1] = after.patch.alpha == 0
        planes = [frame.stored.to_ndarray()[: before.size[1]] for frame in (before, after.frame)]
        np.testing.assert_array_equal(planes[0][untouched], planes[1][untouched])
        assert 0.03 < (~untouched).mean() < 0.5
        assert np.abs(planes[0].astype(int) - planes[1])[~untouched].mean() > 2  # and there it did


def made_up(fps: int, cut_at: int) -> list[Observed[CropFace, np.ndarray]]:
    """Observations of one second with a cut; a crop's level tells its shot."""
    stored, face = av.VideoFrame(96, 96, "yuv420p"), CropFace(Alignment(np.eye(2, 3)), 0)
    crops = [np.full((512, 512, 3), level, np.uint8) for level in (60, 200)]
    frames = [
        SourceFrame(index=i, pts=i + 7, duration_pts=1, time_base=Fraction(1, fps), stored=stored) for i in range(fps)
    ]
    return [Observed(f, face, crops[f.index >= cut_at], cut=f.index == cut_at) for f in frames]


@pytest.mark.parametrize("fps", [10, 50])
def test_a_cut_begins_one_take_and_keeps_the_mouths_apart(fps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the canvas: the bookkeeping is the same."""

    class Echo(FullSizeTake):
        """Gives back what it gets."""

        made = 0

        def __init__(self, model: FullSizeModel, seed: int = 0) -> None:
            super().__init__(model, seed)
            Echo.made += 1
            self.chunks = 0

        @property
        def next_pixel_frames(self) -> int:
            return 12 if self.chunks else 9

        def step(self, crops, speech):  # type: ignore[no-untyped-def]
            assert len(crops) == len(speech) == self.next_pixel_frames
            self.chunks += 1
            return list(crops)

    monkeypatch.setattr(module, "FullSizeTake", Echo)
    session, shown = new_session(Fraction(1, fps)), []
    monkeypatch.setattr(session, "_compositor", lambda image, alignment, crop, *_: shown.append(int(crop[0, 0, 0])))
    out: list[SyncedFrame] = []
    for observed in made_up(fps, 5):
        out += session.push(observed)
    out += session.finish()
    assert [f.index for f in out] == list(range(fps)) and Echo.made == 2
    assert shown == [60] * 5 + [200] * (fps - 5)


def test_observer_marks_a_leap_and_another_look() -> None:
    frame = next(iter(VideoReader(CLIP)))
    first = CropObserver().step(frame)
    assert first.face is not None and first.view is not None and not first.cut
    face, crop = first.face, first.view
    assert not module._moved(face, face) and module.look_change(crop, crop) == 0
    assert module._moved(face, CropFace(face.alignment, face.id + 1))
    moved = face.alignment.matrix.copy()
    moved[0, 2] += 200
    assert module._moved(face, CropFace(Alignment(moved), face.id))
    assert module.look_change(crop, (crop * 0.5).astype(np.uint8)) > module.MAX_CHANGE


def test_a_frame_without_a_face_passes() -> None:
    stored = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 120, np.uint8), format="rgb24").reformat(format="yuv420p")
    frame = SourceFrame(index=0, pts=0, duration_pts=1, time_base=Fraction(1, 25), stored=stored)
    session = new_session(Fraction(1, 25))
    out = [*session.push(CropObserver().step(frame)), *session.finish()]
    assert len(out) == 1 and not out[0].synced and out[0].frame is frame


def covered_clip(top: float, half_width: float, count: int = 18) -> tuple[list[SourceFrame], np.ndarray]:
    """Frames of the demo, from the 14th on with a dark board before the face, shares of the picture; where it is."""
    frames, board = [], np.zeros(0, bool)
    for frame in islice(VideoReader(CLIP), count):
        image = frame.image.copy()
        board = np.zeros(image.shape[:2], bool)
        middle, half = image.shape[1] // 2, int(half_width * image.shape[1])
        board[int(top * len(image)) :, middle - half : middle + half] = frame.index >= 14
        image[board] = (30, 40, 90)
        stored = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p")
        frames.append(replace(frame, stored=stored))
    return frames, board


def test_what_stands_before_the_mouth_stays_in_front() -> None:
    frames, board = covered_clip(0.84, 0.06, 22)  # a microphone
    observer, compositor = CropObserver(), CropCompositor(built_in_mask())
    seen = [observer.step(frame) for frame in frames]
    for before in seen[:14]:
        assert before.face is not None and before.face.seen is not None and before.face.seen.covered is None
    last = seen[-1]
    assert last.face is not None and last.face.seen is not None and last.face.seen.covered is not None
    canvas = FaceCanvas()
    covered = covered_on_crop(
        last.face.seen.covered, canvas.places(last.face.seen.field, last.face.seen.alignment), last.face.alignment
    )
    image, changed = frames[-1].image, []
    for cover in (None, covered):
        patch = compositor(image, last.face.alignment, 255 - last.view, 1.0, cover)
        assert patch is not None
        change = np.abs(patch.on(image).astype(int) - image).max(-1) > 24
        changed.append((float(change[board].mean()), int(change[~board].sum())))
    assert changed[1][0] < 0.3 * changed[0][0]  # the board, but for its rim
    assert changed[1][1] > 0.6 * changed[0][1]  # and the face above it


def test_a_hidden_mouth_passes() -> None:
    observer = CropObserver()
    seen = [observer.step(frame) for frame in covered_clip(0.55, 0.5)[0]]
    assert all(s.view is not None for s in seen[:14]) and seen[-1].view is None and seen[-1].face is None


def test_silence_closes_the_sources_own_lips() -> None:
    model, reader = full_size_model(), VideoReader(CLIP)
    quiet = np.r_[np.zeros(4), np.ones(20)].astype(np.float32)
    manner = Manner(silence="close", quiet=lambda start, stop: quiet[start:stop])
    session = CropSession(model, CropCompositor(model.mask), reader.time_base, rows, manner=manner)
    observer, source, out = CropObserver(), [], []
    for frame in islice(reader, 36, 48):  # in which the mouth opens wide
        source.append(frame)
        out += session.push(observer.step(frame))
    out += session.finish()
    assert all(done.synced for done in out)
    opening: list[list[float]] = []
    for images in ([f.image for f in source], [done.frame.image for done in out]):
        tracker = FaceTracker()
        tracks = [tracker.step(image) for image in images[6:]]
        opening.append([mouth_opening(track.landmarks) for track in tracks if track is not None])
    assert len(opening[0]) == len(opening[1]) == 6
    assert max(opening[1]) < 0.06 and max(opening[0]) > 0.2, opening


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (["--strength", "0.5"], "a full-size model has no strength (got 0.5)"),
        (["--strength", "0.5", "--parity"], "a parity run has the model's own mouths"),
        (["--silence", "close", "--parity"], "leave out --strength and --silence"),
        (["--voice", f"right={CLIP}", "--parity"], "a parity run has one voice: leave out --voice"),
        (["--length", "loop", "--parity"], "a parity run has the official length"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    wish: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's folder is empty: loading would say that instead."""
    (tmp_path / "model").mkdir()
    speech = CLIP.with_name("speech.m4a")
    command = ["sync", str(CLIP), str(speech), "-o", str(tmp_path / "out.mp4"), "--model", str(tmp_path / "model")]
    assert main([*command, *wish]) == EXIT_USAGE
    assert said in capsys.readouterr().err
    manifest = tmp_path / "jobs.csv"
    column, value = wish[0].removeprefix("--").replace("voice", "voices"), wish[1]
    manifest.write_text(f"video,audio,output,{column}\n{CLIP},{speech},out.mp4,{value}\n")
    assert main(["batch", str(manifest), "--model", str(tmp_path / "model"), *wish[2:]]) == EXIT_USAGE
    assert f"line 2: {said}" in capsys.readouterr().err or said.startswith("leave")
