"""Takes, sessions and the pipeline on tiny random networks: chunking, gaps, fidelity of everything untouched."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from lipstream.background import Ahead
from lipstream.engines import CanvasEngine
from lipstream.faces.canvas import Alignment, FaceCanvas
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.mouth import CanvasFrame, MouthModel, Take
from lipstream.pipeline import LipSync
from lipstream.session import Face, Observed, Observer, Session, SpeechRows
from tiny import tiny_mouth_model

DEMO = Path(__file__).parents[1] / "src" / "lipstream" / "assets" / "demo"


def canvas_frames(count: int) -> list[CanvasFrame]:
    rng = np.random.default_rng(0)
    return [
        CanvasFrame(
            rng.normal(size=(20, 20, 2)).astype(np.float32),
            rng.integers(0, 255, (160, 160, 3), dtype=np.uint8),
        )
        for _ in range(count)
    ]


def test_take_is_deterministic_and_its_seed_matters() -> None:
    model, frames, speech = tiny_mouth_model(), canvas_frames(21), torch.randn(21, 16)

    def run(seed: int) -> np.ndarray:
        take = Take(model, seed)
        mouths = take.step(frames[:9], speech[:9])
        take.commit()  # paid early or late, the result is the same
        return np.stack([m.field for m in [*mouths, *take.step(frames[9:], speech[9:])]])

    one = run(1)
    np.testing.assert_array_equal(one, run(1))
    assert np.abs(one - run(2)).max() > 1e-5  # one call from t = 0.999 leaves little of the noise


def test_take_hears_the_speech_but_not_the_sources_hidden_mouth() -> None:
    model, frames, speech = tiny_mouth_model(), canvas_frames(9), torch.randn(9, 16)
    a = Take(model).step(frames, speech)
    b = Take(model).step(frames, speech + 1)
    assert np.abs(a[4].field - b[4].field).max() > 1e-4


def test_take_refuses_wrong_chunks() -> None:
    with pytest.raises(ValueError, match="9 frames"):
        Take(tiny_mouth_model()).step(canvas_frames(12), torch.randn(12, 16))


def test_speech_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    model = tiny_mouth_model()
    samples = np.random.default_rng(0).normal(size=16_000 * 2).astype(np.float32) * 0.1

    def reader() -> SpeechRows:
        left = [samples]

        def read(count: int) -> np.ndarray:
            piece, left[0] = left[0][:count], left[0][count:]
            return piece

        return SpeechRows(model, read)

    whole = reader()(0, 60)
    pieces = reader()
    parts = torch.cat([pieces(0, 9), pieces(9, 21), pieces(21, 60)])
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    assert len(whole) == 60  # 50 rows of speech, then rows of silence
    torch.testing.assert_close(whole[-1], whole[-2])


@pytest.fixture(scope="module")
def lipsync() -> LipSync:
    return LipSync(CanvasEngine(tiny_mouth_model()), "tiny")


@pytest.fixture(scope="module")
def short_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.2 s of noise as WAV: shorter than the demo clip, so that the video is cut."""
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    samples = (np.random.default_rng(0).normal(size=19_200) * 3000).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_stream_and_file_agree_and_nothing_outside_the_mask_changes(
    lipsync: LipSync, short_speech: Path, tmp_path: Path
) -> None:
    clip = DEMO / "clip.mp4"
    source = list(VideoReader(clip))
    streamed = list(lipsync.stream(clip, short_speech))
    report = lipsync(clip, short_speech, tmp_path / "out.mp4")
    assert report.frames == len(streamed) == 30
    assert report.synced_frames == 30 and report.passed_through == ()
    written = list(VideoReader(tmp_path / "out.mp4"))
    assert [f.seconds for f in written] == pytest.approx([f.seconds for f in source[:30]])
    for before, after in zip(source, streamed, strict=False):
        assert after.patch is not None and after.pts == before.pts
        untouched = np.ones(before.image.shape[:2], bool)
        x0, y0, x1, y1 = after.patch.box
        untouched[y0:y1, x0:x1] = after.patch.alpha == 0
        planes = [(f.stored.to_ndarray()[: before.size[1]]) for f in (before, after.frame)]
        np.testing.assert_array_equal(planes[0][untouched], planes[1][untouched])


def test_a_video_without_a_face_is_one_clear_error_and_no_file(
    lipsync: LipSync, short_speech: Path, tmp_path: Path
) -> None:
    path = tmp_path / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((96, 96, 3), 120, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no face"):
        lipsync(path, short_speech, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["grey.mp4"]


def test_ahead_keeps_order_and_hands_over_errors_and_stops() -> None:
    with Ahead(iter(range(100)), depth=3) as ahead:
        assert list(ahead) == list(range(100))

    def failing() -> object:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), Ahead(failing(), depth=2) as ahead:  # type: ignore[arg-type]
        list(ahead)

    closed = []

    def endless() -> object:
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    with Ahead(endless(), depth=2) as ahead:  # type: ignore[arg-type]
        next(iter(ahead))
    assert closed == [True]


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="pocket"):
        LipSync.from_pretrained("no-such-model")


@pytest.mark.parametrize("fps", [10, 25, 50])
def test_a_cut_begins_one_take_and_keeps_the_mouths_apart(fps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid may skip the frame that carries the cut (50 fps) or see it more than once (10 fps)."""
    takes: list[Take] = []

    def counted(model: MouthModel, seed: int, strength: float) -> Take:
        takes.append(Take(model, seed, strength))
        return takes[-1]

    monkeypatch.setattr("lipstream.session.Take", counted)
    fields: list[np.ndarray] = []  # what was composed, frame by frame
    session = Session(tiny_mouth_model(), Fraction(1, fps), lambda start, stop: torch.zeros(stop - start, 16))
    monkeypatch.setattr(session, "_compositor", lambda *arguments: fields.append(arguments[3]))
    canvases = canvas_frames(2)
    face = Face(Alignment(np.eye(2, 3)), np.zeros((20, 20, 2), np.float32), 0)
    stored = av.VideoFrame(96, 96, "yuv420p")
    out = []
    for index in range(fps):
        frame = SourceFrame(index=index, pts=index + 7, duration_pts=1, time_base=Fraction(1, fps), stored=stored)
        out += session.push(Observed(frame, face, canvases[index >= 5], cut=index == 5))
    out += session.finish()
    assert [f.index for f in out] == list(range(fps)) and len(fields) == fps
    assert len(takes) == 2
    if fps == 50:  # frame 5 lies between a model frame of either shot: it takes its own shot's, unmixed
        np.testing.assert_array_equal(fields[5], fields[6])


def test_a_face_that_suddenly_looks_different_in_the_same_place_is_a_cut() -> None:
    observer, frames = Observer(FaceCanvas()), []
    for frame in VideoReader(DEMO / "clip.mp4"):
        frames.append(frame)
        if len(frames) == 6:
            break
    for frame in frames[3:]:
        picture = av.VideoFrame.from_ndarray((frame.image * 0.5).astype(np.uint8), format="rgb24")
        stored = picture.reformat(format="yuv420p")
        frames[frame.index] = dataclasses.replace(frame, stored=stored)
    assert [observer.step(frame).cut for frame in frames] == [False, False, False, True, False, False]
