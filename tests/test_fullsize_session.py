"""The one session with full-size networks: a real clip through tiny ones, shots, and everything untouched."""

from __future__ import annotations

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
from lipstream.faces.canvas import Alignment
from lipstream.faces.crop import CropCompositor
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.fullsize import FullSizeModel, FullSizeTake
from lipstream.fullsize_session import CropFace, CropObserver, CropSession
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
    assert not module._is_cut(face, crop, face, crop)
    assert module._is_cut(face, crop, CropFace(face.alignment, face.id + 1), crop)
    moved = face.alignment.matrix.copy()
    moved[0, 2] += 200
    assert module._is_cut(face, crop, CropFace(Alignment(moved), face.id), crop)
    assert module._is_cut(face, crop, face, (crop * 0.5).astype(np.uint8))


def test_a_frame_without_a_face_passes() -> None:
    stored = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 120, np.uint8), format="rgb24").reformat(format="yuv420p")
    frame = SourceFrame(index=0, pts=0, duration_pts=1, time_base=Fraction(1, 25), stored=stored)
    session = new_session(Fraction(1, 25))
    out = [*session.push(CropObserver().step(frame)), *session.finish()]
    assert len(out) == 1 and not out[0].synced and out[0].frame is frame
