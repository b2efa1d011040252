"""Parity mode: the pipeline equals the official pieces strung together by hand, and bad sources are refused."""

from __future__ import annotations

from fractions import Fraction
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import numpy as np
import pytest
import torch

from golden_model import vectors
from lipstream import fullsize_parity
from lipstream.cli.common import EXIT_USAGE
from lipstream.cli.main import main
from lipstream.diffusion.lengths import official_length
from lipstream.diffusion.official_noise import OfficialNoise
from lipstream.faces import mouth_mask
from lipstream.faces.mouth_mask import MouthMask
from lipstream.faces.official import OfficialAligner, anchors_from_106, anchors_from_mesh
from lipstream.faces.official_paste import OfficialCompositor
from lipstream.faces.track import FaceTracker
from lipstream.fullsize import FullSizeTake
from lipstream.fullsize_engine import FullSizeOptions
from lipstream.fullsize_parity import OfficialObserver, ParityEngine, check_source
from lipstream.manner import PLAIN
from lipstream.media.bounce import BouncingReader
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import bounce_index
from lipstream.models.wav2vec_windowed import WindowConfig
from lipstream.options import SyncOptions
from lipstream.pipeline import LipSync
from lipstream.session import SyncedFrame
from official_files import write_official_folder
from test_fullsize import LinearCodec
from tiny import write_noise

CLIP = Path(str(resources.files("lipstream"))) / "assets" / "demo" / "clip.mp4"
SAMPLES = 21 * 640 + 300  # 21 frames: two chunks, 300 samples are never heard of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_official_folder(tmp_path_factory.mktemp("official"))
    (path / "mask.png").touch()  # see `official_mask`
    return path


@pytest.fixture(autouse=True)
def official_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official picture is among the golden vectors, its file is not."""
    bits = vectors("lengths_and_masks")["out.mask_png_256_1keep_packed_bits_big_endian"].numpy()
    mask = MouthMask(np.unpackbits(bits, axis=1) * np.uint8(255), "official")
    monkeypatch.setattr(mouth_mask, "official_mask", lambda path: mask)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("speech") / "speech.wav", SAMPLES)


def grey_video(path: Path, fps: int, frames: int = 12) -> Path:
    """Nobody is in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 120, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def still(index: int, pts: int | None = None, image: Any = None) -> Any:
    return SimpleNamespace(index=index, pts=index if pts is None else pts, time_base=Fraction(1, 25), image=image)


def by_hand(engine: ParityEngine, speech: Path) -> list[np.ndarray]:
    """Section 4.2 of the spec, written out over the whole clip."""
    model, samples = engine.model, torch.from_numpy(load_speech(speech))[None]
    length = official_length(samples.shape[1], float_seconds=True)
    rows = engine.features(samples, length.pixel_frames)[0]
    frames = [frame.image for frame, _ in zip(VideoReader(CLIP), range(length.pixel_frames), strict=False)]
    tracker, aligner = FaceTracker(), OfficialAligner()
    tracks = [tracker.step(frame) for frame in frames]
    aligned = [
        aligner.step(frame, anchors_from_mesh(track.landmarks))
        for frame, track in zip(frames, tracks, strict=True)
        if track is not None
    ]
    noise = OfficialNoise((1, 16, length.latent_frames, 64, 64), seed=42, dtype=model.dtype, device="cpu")
    take, compose, out = FullSizeTake(model, noise=noise), OfficialCompositor(model.mask), []
    for start, stop in pairwise((0, 9, 21)):
        latents = take.encode([one.picture for one in aligned[start:stop]])
        pictures = take.decode(take.generate(latents, rows[start:stop])).permute(0, 2, 3, 1).numpy()
        out += [compose(f, p, a) for f, p, a in zip(frames[start:stop], pictures, aligned[start:stop], strict=True)]
    return out


class SpyNoise(OfficialNoise):
    """Keeps what is drawn, by chunk and call."""

    drawn: ClassVar[dict[tuple[int, int], torch.Tensor]] = {}

    def __call__(self, chunk: int) -> Any:
        draw = super().__call__(chunk)
        return lambda call: SpyNoise.drawn.setdefault((chunk, call), draw(call))


def test_the_pipeline_runs_the_official_chain(folder: Path, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and with a cheap encoder: a VAE at 512 px takes a CPU most of a minute."""
    monkeypatch.setattr(fullsize_parity, "OfficialNoise", SpyNoise)
    lipsync = LipSync.from_pretrained(folder, parity=True, dtype=torch.float32)
    engine = lipsync.engine
    assert isinstance(engine, ParityEngine) and lipsync.seed == 42
    encoder = LinearCodec()
    encoder.up = torch.nn.Parameter(torch.randn(16, 3), requires_grad=False)
    engine.model.encoder = encoder
    out: list[SyncedFrame] = list(lipsync.stream(CLIP, speech))
    # Section 3: one draw for the whole clip, then one per chunk.
    generator = torch.Generator().manual_seed(42)
    clip = torch.randn((1, 16, 6, 64, 64), generator=generator).split(3, 2)
    expected_noise = {(chunk, 0): part for chunk, part in enumerate(clip)}
    for chunk in (0, 1):
        expected_noise[chunk, 1] = torch.randn((1, 16, 3, 64, 64), generator=generator)
    assert SpyNoise.drawn.keys() == expected_noise.keys()
    assert all(torch.equal(SpyNoise.drawn[key], noise) for key, noise in expected_noise.items())
    expected = by_hand(engine, speech)
    assert len(out) == len(expected) == official_length(SAMPLES).pixel_frames == 21
    for frame, picture in zip(out, expected, strict=True):
        assert frame.synced and frame.patch is not None
        np.testing.assert_array_equal(frame.patch.rgb, picture)  # whole frames, before they are encoded
        assert frame.patch.alpha.all() and frame.patch.box == (0, 0, *frame.frame.size)


def test_parity_loads_with_the_official_precision(folder: Path) -> None:
    engine: Any = LipSync.from_pretrained(folder, parity=True).engine
    assert engine.model.mask.name == "official" and engine.model.dtype == torch.bfloat16
    assert next(engine.model.encoder.parameters()).dtype == torch.bfloat16
    assert next(engine.model.decoder.parameters()).dtype == torch.float16
    assert engine.features.network.dtype == torch.float32
    assert engine.features.network.config._attn_implementation == "eager"
    assert engine.model.encoder.stream_view(1).encode_latent_frames == 1
    usual: Any = LipSync.from_pretrained(folder).engine
    assert usual.model.encoder.stream_view(1).encode_latent_frames == 3
    assert next(usual.model.decoder.parameters()).dtype == torch.bfloat16


def test_alignment_in_the_session_is_the_golden_one() -> None:
    data = {key: value.numpy() for key, value in vectors("face_alignment").items()}
    landmarks = iter(data["in.landmarks_106"])
    observer = OfficialObserver("golden", lambda image: anchors_from_106(next(landmarks)))
    image = data["in.frame3_uint8_HWC"]
    seen = [observer.step(still(index, image=image)) for index in range(len(data["in.landmarks_106"]))]
    for observed, matrix in zip(seen, data["out.matrix_fp16"], strict=True):
        assert observed.face is not None and not observed.cut
        np.testing.assert_array_equal(observed.face.matrix, matrix)
    crop = seen[3].view
    assert crop is not None
    np.testing.assert_array_equal(crop[::4, ::4].transpose(2, 0, 1), data["out.frame3.aligned_512_uint8_every4"])


@pytest.mark.parametrize("frames", [9, 21, 45, 99, 100, 101, 129, 213])
def test_exactly_the_official_frames_come(frames: int) -> None:
    """By their number, forwards and backwards, also where the video and the speech end a frame apart."""
    reader = VideoReader(CLIP)
    assert reader.frames is not None
    came = list(BouncingReader(reader, 0, frames=frames))
    step = came[1].pts - came[0].pts
    assert [frame.index for frame in came] == list(range(frames))
    assert [frame.pts - came[0].pts for frame in came] == [step * i for i in range(frames)]
    originals = [frame.stored.to_ndarray() for frame in reader]
    for frame in came[:: max(1, frames // 7)]:
        np.testing.assert_array_equal(frame.stored.to_ndarray(), originals[bounce_index(frame.index, len(originals))])


@pytest.mark.parametrize("samples", [1, 3_200, 7_000, 18_560, 51_840])
def test_frame_count_is_the_official_length(samples: int) -> None:
    engine = ParityEngine.__new__(ParityEngine)
    expected = official_length(samples, float_seconds=True)
    assert engine.frames(VideoReader(CLIP), samples, "bounce", "audio").frames == expected.pixel_frames
    parts = iter([np.zeros(samples, np.float32), np.zeros(0, np.float32)])
    engine.features = None  # type: ignore[assignment]
    assert engine.rows(lambda count: next(parts)).length == expected


def test_sources_that_the_official_chain_cannot_take(
    folder: Path, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thirty, nobody = grey_video(tmp_path / "thirty.mp4", 30), grey_video(tmp_path / "nobody.mp4", 25)
    command = ["sync", str(thirty), str(speech), "-o", str(tmp_path / "out.mp4"), "--model", str(folder), "--parity"]
    assert main(command) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "thirty.mp4: has 30 frames a second" in said and "-r 25" in said
    check_source(nobody)
    lipsync = LipSync.from_pretrained(folder, parity=True)
    with pytest.raises(MediaError, match=r"nobody\.mp4: its frame 0 \(0\.00 s\) shows no face"):
        lipsync(nobody, speech, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    observer = OfficialObserver("uneven.mp4", lambda image: anchors_from_106(np.random.default_rng(0).random((106, 2))))
    observer.step(still(0, image=np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(MediaError, match=r"uneven\.mp4: its frame 1 stands at 0\.080 s, at 25 fps it would at 0\.040"):
        observer.step(still(1, pts=2))


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="'pocket' has no option parity"):
        LipSync.from_pretrained("pocket", parity=True)
    with pytest.raises(ValueError, match="official mask"):
        FullSizeOptions(parity=True, mask="built-in")
    with pytest.raises(ValueError, match="no look-ahead"):
        FullSizeOptions(parity=True, window=WindowConfig())


def test_parity_has_one_voice(folder: Path, speech: Path) -> None:
    lipsync = LipSync.from_pretrained(folder, parity=True)
    with pytest.raises(ValueError, match="one voice"):
        next(iter(lipsync.stream(CLIP, speech, options=SyncOptions(voices=(("right", str(speech)),)))))


def test_the_official_session_needs_the_official_rows(folder: Path) -> None:
    engine = LipSync.from_pretrained(folder, parity=True).engine
    with pytest.raises(ValueError, match="official rows"):
        engine.session(Fraction(1, 25), lambda start, stop: torch.zeros(stop - start, 1), 0, PLAIN)
