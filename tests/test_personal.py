"""One person's fine-tuning on tiny networks: what is trained on, what moves, what is kept, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lipstream import LipSync, personal
from lipstream.checkpoints.networks import load_dit, save_codec, save_dit
from lipstream.cli.demo import demo_files
from lipstream.cli.main import main
from lipstream.cli.personalize import as_text
from lipstream.evaluation import rehearsal
from lipstream.evaluation.correlation import correlation
from lipstream.evaluation.rehearsal import Spoken, agreement, rehearsed_opening
from lipstream.faces.canvas import FaceCanvas
from lipstream.media.opening import MediaError
from lipstream.models.audio import SpeechEncoder, save_speech_encoder, speech_config
from lipstream.models.codec import PocketCodec
from lipstream.mouth import CanvasFrame, Mouth, MouthModel
from lipstream.personal import personalize
from lipstream.session import Observed
from lipstream.training.low_rank import add_low_rank, merge_low_rank
from lipstream.training.material import Material
from lipstream.training.person import LEAST_FRAMES, PersonConfig, Span, pieces, split_by_time, train_person
from tiny import coded_clips, made_up_clip, tiny_codec, tiny_dit, tiny_mouth_model

CONFIG = PersonConfig(batch=2, versions=1, rank=2, steps=2)
GAP = CONFIG.gap_frames


@pytest.fixture(scope="module")
def codec() -> PocketCodec:
    return tiny_codec()


@pytest.mark.parametrize(
    ("stretches", "train_videos"),
    [
        ([Span(0, 0, 1500)], {0}),  # one long shot: cut in time
        ([Span(0, 0, 200)], {0}),  # the shortest that is allowed
        ([Span(0, 0, 300), Span(0, 310, 700), Span(0, 705, 760)], {0}),  # shots of one video, close together
        ([Span(v, 0, 75) for v in range(10)], set(range(7))),  # short videos: whole ones are held out
        ([Span(0, 0, 900), Span(1, 0, 20), Span(1, 40, 100)], {0}),  # too short ones belong to nobody
        ([Span(0, 0, 800), Span(1, 0, 200)], {0}),
    ],
)
def test_held_out_part_is_never_trained_on(stretches: list[Span], train_videos: set[int]) -> None:
    split = split_by_time(stretches, CONFIG)
    assert {span.video for span in split.train} == train_videos
    assert max((s.video, s.stop) for s in split.train) < min((s.video, s.start) for s in split.held)
    for trained in split.train:
        assert len(trained) >= LEAST_FRAMES
        for held in split.held:
            assert trained.video != held.video or held.start - trained.stop >= GAP > 25  # more than a second
    for span in (*split.train, *split.held):
        assert any(s.video == span.video and s.start <= span.start and span.stop <= s.stop for s in stretches)
    share = sum(map(len, split.held)) / sum(map(len, stretches))
    assert 0.2 <= share <= 0.35


@pytest.mark.parametrize("stretches", [[], [Span(0, 0, 60)], [Span(0, 0, 2 * LEAST_FRAMES)], [Span(0, 0, 20)] * 9])
def test_too_little_to_split(stretches: list[Span]) -> None:
    with pytest.raises(ValueError, match=r"stretch|too little"):
        split_by_time(stretches, CONFIG)


def test_pieces_cover_a_span_once() -> None:
    parts = pieces(Span(3, 10, 1261))
    assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (10, 1261) and {p.video for p in parts} == {3}
    assert max(map(len, parts)) <= 250 and min(map(len, parts)) >= LEAST_FRAMES


def test_only_declared_tensors_move_and_merge_to_the_same(codec: PocketCodec, tmp_path: Path) -> None:
    coded = coded_clips(2, 60)
    general = tiny_dit(codec)
    before = {name: tensor.clone() for name, tensor in general.state_dict().items()}
    config = PersonConfig(batch=2, rank=2, steps=4, lr=1e-2)
    trained = train_person(tmp_path, general, Material(codec, coded, np.ones(2), []), config)
    after = trained.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    maps = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"}
    declared = {f"blocks.{block}.{name}.weight" for block in (0, 1) for name in maps}
    declared |= {f"audio_cond_projs.{block}.{kind}" for block in (0, 1) for kind in ("weight", "bias")}
    assert moved == declared
    for name in declared - {n for n in declared if n.startswith("audio")}:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= config.rank
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_merged_weights_equal_live_factors(codec: PocketCodec) -> None:
    model = tiny_dit(codec)
    same = tiny_dit(codec)
    add_low_rank(model, 3)
    torch.manual_seed(1)
    maps = model.blocks[0].self_attn.q, model.blocks[1].ffn[2]
    for part in maps:
        torch.nn.init.normal_(part.parametrizations.weight[0].b)
    x = torch.randn(5, 32)
    live = maps[0](x)
    with pytest.raises(ValueError, match="already"):
        add_low_rank(model, 3)
    merge_low_rank(model)
    torch.testing.assert_close(maps[0](x), live, rtol=0, atol=0)
    assert not torch.allclose(same.blocks[0].self_attn.q(x), live)
    same.load_state_dict(model.state_dict())  # plain names and shapes


def test_a_stopped_run_goes_on(codec: PocketCodec, tmp_path: Path) -> None:
    material = Material(codec, coded_clips(1, 60), np.ones(1), [])
    config = PersonConfig(batch=2, rank=2, steps=30)
    steps: list[int] = []

    def stop_at_27(step: int) -> None:
        steps.append(step)
        if step == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_person(tmp_path, tiny_dit(codec), material, config, progress=stop_at_27)
    train_person(tmp_path, tiny_dit(codec), material, config, progress=steps.append)
    assert steps == [*range(28), *range(25, 30)]  # a checkpoint lies at 25


class Parrot:
    """A take that gives its source back."""

    next_pixel_frames = 12

    def __init__(self, model: MouthModel, seed: int) -> None:
        pass

    def step(self, frames: Sequence[CanvasFrame], speech: torch.Tensor) -> list[Mouth]:
        assert len(frames) == len(speech) == 12
        return [Mouth(frame.field, frame.texture, np.zeros((160, 160), np.float32)) for frame in frames]


def test_rehearsal_shows_the_face_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "Take", Parrot)
    model, clip = tiny_mouth_model(), made_up_clip(frames=50)
    spoken = Spoken(clip.fields, clip.textures, torch.zeros(50, 16))
    truth = model.ruler.opening(torch.from_numpy(clip.fields.astype(np.float32))).double().numpy()
    got = rehearsed_opening(model, spoken)
    np.testing.assert_allclose(got, truth[::-1])
    score = rehearsal.rehearse(model, [spoken, spoken])
    assert score.r == pytest.approx(correlation(truth[::-1], truth)) and score.r < 0.9
    assert score.pixel_frames == 100 and score.amplitude == pytest.approx(1)
    assert score.error_px == pytest.approx(float(np.sqrt(np.mean((truth[::-1] - truth) ** 2))))
    assert agreement([(truth, truth)]).error_px == 0
    with pytest.raises(ValueError, match="too short"):
        agreement([(truth[:10], truth[:10])])


# ------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture
def base(codec: PocketCodec, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_dit(tiny_dit(codec), 1.5, folder / "dit.safetensors")
    save_codec(codec, folder / "codec.safetensors")
    torch.manual_seed(0)
    save_speech_encoder(SpeechEncoder(speech_config("test")), folder / "speech.safetensors")
    return folder


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for eight seconds of a face."""

    def look(index: int, video: Path, *rest: object) -> list[personal._Stretch]:
        clip = made_up_clip(frames=200)
        return [personal._Stretch(Span(index, 0, 200), clip.fields, clip.textures, clip.speech)]

    monkeypatch.setattr(personal, "_look", look)
    (tmp_path / "me.mp4").write_bytes(b"me")
    return tmp_path / "me.mp4"


def score_of(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    left = list(values)
    score = rehearsal.Rehearsal(r=0, amplitude=1, error_px=1, pixel_frames=50)
    monkeypatch.setattr(
        personal, "rehearse", lambda *_: rehearsal.Rehearsal(**(vars(score) | {"r": left.pop(0)}))
    )  # fmt: skip


@pytest.mark.parametrize(("after", "keep_anyway", "kept"), [(0.6, False, True), (0.4, False, False), (0.4, True, True)])
def test_weights_are_kept_where_they_help(
    base: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: float,
    keep_anyway: bool,
    kept: bool,
) -> None:
    score_of(monkeypatch, 0.5, after)
    out = tmp_path / "me"
    report = personalize([video], out, base=base, config=CONFIG, keep_anyway=keep_anyway)
    assert (report.better, report.kept) == (after > 0.5, kept)
    assert report.held_seconds == 2.0 and report.train_seconds == (150 - GAP) / 25
    same = (out / "dit.safetensors").read_bytes() == (base / "dit.safetensors").read_bytes()
    assert same is not kept
    assert load_dit(out / "dit.safetensors")[1] == 1.5
    assert load_file(out / "dit.safetensors").keys() == load_file(base / "dit.safetensors").keys()
    for part in ("codec.safetensors", "speech.safetensors"):
        assert (out / part).read_bytes() == (base / part).read_bytes()
    assert not (out / personal.RUN).exists() and (out / "personal.json").exists()
    assert LipSync.from_pretrained(out).name == str(out)
    with pytest.raises(ValueError, match="holds a model already"):
        personalize([video], out, base=base, config=CONFIG)


def test_real_scores_are_made_with_the_takes(base: Path, video: Path, tmp_path: Path) -> None:
    report = personalize([video], tmp_path / "me", base=base, config=CONFIG)
    assert -1 <= report.before.r <= 1 and report.before.pixel_frames == report.after.pixel_frames == 50


def test_an_unfinished_run_belongs_to_its_videos(
    base: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score_of(monkeypatch, 0.5, 0.5, 0.6)
    out, told = tmp_path / "me", list[tuple[str, int]]()

    def stop(stage: str, done: int, total: int | None) -> None:
        told.append((stage, done))
        if stage == "learning" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize([video], out, base=base, config=CONFIG, tell=stop)
    assert ("learning", 0) in told and not (out / "codec.safetensors").exists()  # no model, half or whole
    with pytest.raises(ValueError, match="unfinished run of other"):
        personalize([video], out, base=base, config=PersonConfig(batch=2, versions=1, rank=2, steps=9))
    assert personalize([video], out, base=base, config=CONFIG).kept


def test_other_models_cannot_be_personalized(video: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    with pytest.raises(ValueError, match="only the small kind"):
        personalize([video], tmp_path / "me", base=tmp_path / "large")
    with pytest.raises(ValueError, match="unknown model"):
        personalize([video], tmp_path / "me", base="huge")


def test_help_names_the_default_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["personalize", "--help"]) == 0
    assert f"(default: {PersonConfig().steps})" in capsys.readouterr().out


def test_a_real_file_gives_a_stretch() -> None:
    with demo_files() as (clip, _):
        look = personal._look(0, clip, FaceCanvas(), 60, lambda *_: None)
    assert [stretch.span for stretch in look] == [Span(0, 0, 60)]
    assert look[0].fields.shape == (60, 20, 20, 2) and look[0].textures.shape == (60, 160, 160, 3)


class Reader:
    """A video of 8 seconds at 50 frames per second."""

    time_base, frames = Fraction(1, 50), 400

    def __init__(self, path: Path) -> None:
        pass

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return (SimpleNamespace(pts=i) for i in range(self.frames))


def look_at(monkeypatch: pytest.MonkeyPatch, seen: Callable[[int], bool], loudness: float) -> list[personal._Stretch]:
    """The stretches of that video; field i holds the number of its source frame, a cut lies at 200."""

    def step(self: object, frame: SimpleNamespace) -> Observed[None, CanvasFrame]:
        field = np.full((20, 20, 2), frame.pts, np.float32)
        view = CanvasFrame(field, np.zeros((160, 160, 3), np.uint8)) if seen(frame.pts) else None
        return Observed(frame, None, view, frame.pts == 200)  # type: ignore[arg-type]

    monkeypatch.setattr(personal, "VideoReader", Reader)
    monkeypatch.setattr(personal.Observer, "step", step)
    monkeypatch.setattr(
        personal, "load_speech", lambda path, samples: np.full(min(samples, 128_000), loudness, np.float32)
    )
    return personal._look(4, Path("me.mp4"), FaceCanvas(), 4500, lambda *_: None)


def test_any_frame_rate_and_no_stretch_across_a_cut_or_a_lost_face(monkeypatch: pytest.MonkeyPatch) -> None:
    look = look_at(monkeypatch, lambda i: not 300 <= i < 304, loudness=0.1)
    assert [stretch.span for stretch in look] == [Span(4, 0, 100), Span(4, 100, 150), Span(4, 152, 200)]
    numbers = np.concatenate([stretch.fields[:, 0, 0, 0] for stretch in look])
    assert numbers.tolist() == [*range(0, 300, 2), *range(304, 400, 2)]


def test_what_a_video_must_show(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match=r"me.mp4: shows no face in any of its 400 frames"):
        look_at(monkeypatch, lambda i: False, loudness=0.1)
    with pytest.raises(MediaError, match=r"me.mp4: its sound is silent"):
        look_at(monkeypatch, lambda i: True, loudness=0.0)


def test_too_short_says_the_least_length(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personal, "_look", lambda *_: [])
    with pytest.raises(ValueError, match=r"0.0 s of a face .* 8 s are the least"):
        personalize([tmp_path / "me.mp4"], tmp_path / "me", base=base)
    assert not (tmp_path / "me").exists()


def test_the_report_is_honest(tmp_path: Path) -> None:
    before = rehearsal.Rehearsal(r=0.05, amplitude=1, error_px=2, pixel_frames=50)
    report = personal.PersonalReport(
        folder=tmp_path,
        train_seconds=30,
        held_seconds=2,
        before=before,
        after=before,
        better=False,
        kept=False,
        seconds=1,
    )
    text = as_text(report)
    assert "did not help" in text and "0.05 before, 0.05 after" in text and "is heard" in text
    assert "NOT better" in as_text(replace(report, kept=True))
    better = replace(before, r=0.5)
    good = as_text(replace(report, after=better, better=True, kept=True))
    assert "follows this person better" in good and "is heard" not in good
