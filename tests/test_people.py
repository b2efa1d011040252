"""People are told apart and known again; speakers are chosen; cuts, covers, silences and fades do what they say."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from lipstream.beginning import Beginning, speaking
from lipstream.casting import Cast
from lipstream.evaluation.speed import write_wav
from lipstream.faces.canvas import Alignment, FaceCanvas
from lipstream.faces.likeness import SAME, Gallery, looks_of
from lipstream.faces.occlusion import FORGET_PIXEL_FRAMES, WARM_PIXEL_FRAMES, Cover
from lipstream.faces.people import PeopleTracker, Person
from lipstream.faces.pose import FRONTAL_DEGREES, PROFILE_DEGREES, FrontalGate, yaw_degrees
from lipstream.faces.track import FaceTracker
from lipstream.manner import Manner
from lipstream.media.cuts import CutDetector
from lipstream.media.mix import MIX_RATE, mixed_sound
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.silence import SpeechEars
from lipstream.media.speech import load_speech
from lipstream.mouth import Take
from lipstream.options import SyncOptions
from lipstream.session import FADE_SECONDS, Face, Observed, Session
from lipstream.speaker import parse_speaker
from test_session import canvas_frames
from tiny import tiny_mouth_model

DEMO = Path(__file__).parents[1] / "src" / "lipstream" / "assets" / "demo"
SIDE = 192


@cache
def one() -> list[np.ndarray]:
    """A person: frames of the demo."""
    frames = []
    for frame in VideoReader(DEMO / "clip.mp4"):
        frames.append(cv2.resize(frame.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        if len(frames) == 30:
            return frames
    raise AssertionError


@cache
def other() -> list[np.ndarray]:
    """Somebody else: the same with another skin, other hair and a mirrored face."""
    frames = []
    for rgb in one():
        lab = cv2.cvtColor(rgb[:, ::-1], cv2.COLOR_RGB2LAB).astype(np.float32)
        lab[..., 0] = 255 * (lab[..., 0] / 255) ** 2.2
        frames.append(cv2.cvtColor(np.clip(lab, 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB))
    return frames


def side_by_side(index: int, swapped: bool = False) -> np.ndarray:
    pair = (other()[index], one()[index]) if swapped else (one()[index], other()[index])
    return np.concatenate(pair, axis=1)


def video_of(path: Path, images: list[np.ndarray]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = images[0].shape[1], images[0].shape[0], "yuv420p"
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# ------------------------------------------------------------------ identity


def test_a_person_is_nearer_to_themselves_than_to_another() -> None:
    tracker, gallery = FaceTracker(), Gallery()
    looks = []
    for rgb in one():
        track = tracker.step(rgb)
        assert track is not None
        looks.append(looks_of(rgb, track.landmarks))
    gallery.add(looks[0])
    stranger = FaceTracker().step(other()[0])
    assert stranger is not None
    far = gallery.unlike(looks_of(other()[0], stranger.landmarks))
    assert max(gallery.unlike(look) for look in looks) < SAME < far
    assert Gallery().unlike(looks[0]) == float("inf")


def test_two_people_keep_their_names_when_they_change_places_at_a_cut() -> None:
    tracker = PeopleTracker()
    for index in range(12):
        tracks = tracker.step(side_by_side(index))
    assert sorted(tracks) == [0, 1]
    left = next(id for id, track in tracks.items() if track.landmarks[1, 0] < SIDE)
    for index in range(12, 15):
        tracks = tracker.step(side_by_side(index, swapped=True), cut=index == 12)
    assert sorted(tracks) == [0, 1]
    assert tracks[left].landmarks[1, 0] > SIDE


def test_a_mistaken_name_is_corrected_after_a_meeting() -> None:
    tracker = PeopleTracker()
    for index in range(12):
        tracker.step(side_by_side(index))
    a, b = tracker.people[0], tracker.people[1]
    a.region, b.region = b.region, a.region  # as if they had passed through each other
    tracker._met[(0, 1)] = tracker._frame
    where = a.region.x if a.region else 0.0
    for index in range(12, 18):
        tracks = tracker.step(side_by_side(index))
    assert abs(tracks[0].landmarks[1, 0] - where) > SIDE / 2


def test_known_people_are_known_from_the_first_frame() -> None:
    before = PeopleTracker()
    for index in range(3):
        before.step(side_by_side(index))
    left = next(p for p in before.people.values() if p.region is not None and p.region.x < SIDE)
    after = PeopleTracker(known=[dataclasses.replace(p, last=None) for p in before.people.values()])
    tracks = after.step(side_by_side(3, swapped=True))
    assert tracks[left.id].landmarks[1, 0] > SIDE


# ------------------------------------------------------------------ speakers


def test_speakers_are_read_from_text() -> None:
    assert parse_speaker("left").kind == "left"
    point = parse_speaker("0.7,0.4@2.5")
    assert (point.kind, point.point, point.seconds) == ("point", (0.7, 0.4), 2.5)
    assert parse_speaker("me.JPG").path == Path("me.JPG")
    for wrong in ("nobody", "1,2,3", "-1,0", "1,2@x", "nan,1"):
        with pytest.raises(ValueError, match="speaker"):
            parse_speaker(wrong)


def test_options_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="two voices"):
        SyncOptions(speaker="left", voices=(("left", "b.wav"),))
    with pytest.raises(ValueError, match=r"strength must lie in 0\.\.2"):
        SyncOptions(strength=3)
    with pytest.raises(ValueError, match="silence"):
        SyncOptions(silence="loud")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty frames of two people, `one` left; without sound."""
    return video_of(tmp_path_factory.mktemp("pair") / "pair.mp4", [side_by_side(i) for i in range(20)])


@pytest.mark.parametrize("speaker,left", [("left", True), ("right", False), ("0.75,0.5@0.2", False), ("60,90", True)])
def test_the_named_speaker_is_found(pair: Path, speaker: str, left: bool) -> None:
    reader = VideoReader(pair)
    cast = Cast(reader, [parse_speaker(speaker)])
    for frame in reader:
        cut, (track,) = cast.step(frame)
        assert track is not None and not cut
        assert (track.landmarks[1, 0] < SIDE) == left
        if frame.index == 3:
            break


def test_a_picture_names_the_speaker(pair: Path, tmp_path: Path) -> None:
    picture = tmp_path / "person.png"
    cv2.imwrite(str(picture), cv2.cvtColor(other()[25], cv2.COLOR_RGB2BGR))
    reader = VideoReader(pair)
    _, (track,) = Cast(reader, [parse_speaker(str(picture))]).step(next(iter(reader)))
    assert track is not None and track.landmarks[1, 0] > SIDE


def test_what_is_not_there_is_one_clear_error(pair: Path, tmp_path: Path) -> None:
    reader = VideoReader(pair)
    with pytest.raises(ValueError, match=r"no face at 1,190 at 0 s; faces are there at \d+,\d+"):
        Cast(reader, [parse_speaker("1,190")])
    with pytest.raises(ValueError, match=r"ends at 0\.80 s"):
        Cast(reader, [parse_speaker("1,1@9")])
    with pytest.raises(MediaError, match=r"no such file|cannot be read"):
        Cast(reader, [parse_speaker(str(tmp_path / "none.jpg"))])
    alone = video_of(tmp_path / "alone.mp4", one()[:6])
    with pytest.raises(ValueError, match="same face"):
        Cast(VideoReader(alone), [parse_speaker("left"), parse_speaker("right")])


def test_auto_is_somebody_whom_no_other_voice_named(pair: Path) -> None:
    for named in ("left", "right"):
        reader = VideoReader(pair)
        cast = Cast(reader, [parse_speaker("auto"), parse_speaker(named)])
        _, (main, second) = cast.step(next(iter(reader)))
        assert main is not None and second is not None
        assert (second.landmarks[1, 0] < SIDE) == (named == "left") != (main.landmarks[1, 0] < SIDE)


def test_a_sound_that_cannot_be_heard_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "broken.mkv"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16_000)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        noise = np.random.default_rng(0).normal(0, 0.1, (1, 16_000)).astype(np.float32)
        heard = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        heard.sample_rate, heard.pts = 16_000, 0
        container.mux(sound.encode(heard))
        container.mux(sound.encode(None))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.audio[0]):
            place = data.find(bytes(packet)) if packet.size > 20 else -1
            if place > 0:
                data[place : place + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    with pytest.raises(MediaError, match="its sound is damaged"):
        load_speech(path)
    assert speaking(VideoReader(path), Beginning()) is None
    path.write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    assert speaking(VideoReader(path), Beginning()) is None


def test_who_speaks_is_whose_lips_move_with_the_sound(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.random(20) > 0.5, 5).astype(np.float32)  # 100 frames of on and off
    sound = rng.normal(size=64_000).astype(np.float32) * np.repeat(loud, 640) * 0.1
    images, path = [np.zeros((64, 64, 3), np.uint8)] * 10, tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream("pcm_s16le", rate=16_000)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for image in images:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        frame = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*video.encode(None), *audio.encode(frame), *audio.encode(None)])
    talks = 0.02 + 0.1 * loud * np.abs(np.sin(np.arange(100)))
    chews = 0.02 + 0.1 * np.roll(loud, 5)[::-1] * np.abs(np.sin(np.arange(100)))
    looks = Gallery()
    looks.add(np.zeros(300, np.float32))
    people = [Person(id=0, gallery=looks), Person(id=1, gallery=looks), Person(id=2, gallery=looks)]
    openings = {
        id: [(i / 25, float(value)) for i, value in enumerate(curve)]
        for id, curve in enumerate((chews, talks, np.full(100, 0.02)))
    }
    assert speaking(VideoReader(path), Beginning(people=people, openings=openings)) == 1
    still = {id: openings[2] for id in range(3)}
    assert speaking(VideoReader(path), Beginning(people=people, openings=still)) is None


# ------------------------------------------------------------------ cuts, profiles, covers


def test_a_cut_is_seen_and_a_pan_is_not() -> None:
    rng = np.random.default_rng(0)
    world = cv2.resize(rng.integers(0, 255, (9, 30, 3), dtype=np.uint8), (1200, 180), interpolation=cv2.INTER_CUBIC)
    cuts = CutDetector()
    assert not any(cuts.step(world[:, 8 * i : 8 * i + 320]) for i in range(20))
    assert cuts.step(world[:, 800:1120])
    assert not cuts.step(world[:, 808:1128])


def test_profiles_are_left_alone_with_hysteresis() -> None:
    def turned(degrees: float) -> np.ndarray:
        points = np.zeros((468, 3))
        angle = np.radians(degrees)
        points[263] = 100 * np.cos(angle), 0, 100 * np.sin(angle)
        return points

    assert yaw_degrees(turned(30)) == pytest.approx(30)
    gate, between = FrontalGate(), (PROFILE_DEGREES + FRONTAL_DEGREES) / 2
    assert [gate.step(turned(d)) for d in (0, between, -60, -between, 30)] == [True, True, False, False, True]


def mouth_canvas(level: float = 1.0) -> np.ndarray:
    """Skin with red lips."""
    x, y = np.meshgrid(np.arange(160), np.arange(160))
    skin = np.full((160, 160, 3), (200, 160, 140), np.float32)
    skin[((x - 80) / 46) ** 2 + ((y - 72) / 29) ** 2 < 1] = (190, 90, 95)
    noise = np.random.default_rng(0).normal(0, 3, skin.shape)
    return np.clip(level * (skin + noise), 0, 255).astype(np.uint8)


def warm() -> Cover:
    cover = Cover()
    for _ in range(WARM_PIXEL_FRAMES + 3):
        assert cover.step(mouth_canvas()) == (None, 0.0)
    return cover


def test_a_microphone_stays_in_front_and_light_does_not_count() -> None:
    cover = warm()
    assert cover.step(mouth_canvas(0.8)) == (None, 0.0)
    dark = mouth_canvas()
    dark[100:, 60:110] = (30, 30, 35)
    for _ in range(4):
        covered, share = cover.step(dark)
    assert covered is not None and 0.06 < share < 0.6
    assert covered[130, 85] > 0.9 and covered[60, 10] == 0
    for _ in range(30):
        covered, share = cover.step(mouth_canvas())
    assert covered is None and share == 0


def test_a_hand_of_the_faces_colour_hides_the_lips() -> None:
    cover, hand = warm(), mouth_canvas()
    hand[30:] = (200, 160, 140)
    assert cover.step(hand)[1] == 1.0


def test_what_stays_is_learned_again() -> None:
    cover, dark = warm(), mouth_canvas()
    dark[100:, 60:110] = (30, 30, 35)
    shares = [cover.step(dark)[1] for _ in range(FORGET_PIXEL_FRAMES + 5)]
    assert shares[0] > 0 and shares[-1] == 0


# ------------------------------------------------------------------ silence and fades


def ears_of(samples: np.ndarray) -> SpeechEars:
    left = [samples.astype(np.float32)]

    def read(count: int) -> np.ndarray:
        piece, left[0] = left[0][:count], left[0][count:]
        return piece

    return SpeechEars(read)


@pytest.mark.parametrize("floor", [0.0, 0.003])
def test_silence_is_found_also_over_a_steady_noise(floor: float) -> None:
    rng = np.random.default_rng(0)
    speech = np.repeat(rng.uniform(0.3, 1.0, 150), 640) * np.sin(np.arange(96_000) * 2 * np.pi * 300 / 16_000) * 0.2
    speech[50 * 640 : 100 * 640] = 0
    quiet = ears_of(speech + floor * rng.normal(size=96_000)).quiet(0, 150)
    assert quiet[:50].max() == 0 and quiet[100:].max() == 0
    assert quiet[52:95].min() == 1.0 and 0 < quiet[50] < 1 and quiet[99] < 0.5


def test_short_gaps_are_speech_and_what_follows_the_speech_is_silence() -> None:
    tone = np.sin(np.arange(64_000) * 2 * np.pi * 300 / 16_000) * 0.2
    tone[30 * 640 : 35 * 640] = 0
    ears = ears_of(tone)
    assert ears.quiet(0, 100).max() == 0
    assert ears.quiet(103, 120).min() == 1


def test_the_ears_pass_every_sample_on_and_answers_do_not_depend_on_chunks() -> None:
    rng = np.random.default_rng(1)
    samples = (rng.normal(size=100_000) * np.repeat(rng.random(50) > 0.4, 2000) * 0.1).astype(np.float32)
    whole = ears_of(samples).quiet(0, 150)
    ears, parts, passed = ears_of(samples), [], []
    for start, stop in ((0, 9), (9, 21), (21, 33), (33, 150)):
        passed.append(ears.read(16_000))
        parts.append(ears.quiet(start, stop))
    while len(piece := ears.read(5000)):
        passed.append(piece)
    np.testing.assert_array_equal(np.concatenate(passed), samples)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_quiet_frames_close_the_lips_and_strength_scales_them() -> None:
    model, frames, speech = tiny_mouth_model(), canvas_frames(9), torch.randn(9, 16)
    quiet = np.zeros(9, np.float32)
    quiet[6:] = 1
    spoken, closed = Take(model).step(frames, speech), Take(model).step(frames, speech, quiet)
    for i in range(6):
        np.testing.assert_array_equal(spoken[i].field, closed[i].field)
    openings = [float(model.ruler.opening(torch.from_numpy(mouth.field))) for mouth in closed[6:]]
    assert max(openings) < 1.5
    none = Take(model, 0, 0.0).step(frames, speech)
    assert np.abs(none[4].field - spoken[4].field).max() > 1e-4


def test_gaping_opens_the_lips_by_one_pixel() -> None:
    canvas = FaceCanvas()
    weights = canvas.lip_rulers()[0][0]
    assert float(canvas.gaping_field()[..., 1].ravel() @ weights) == pytest.approx(1, abs=1e-4)


def observed_second(gone: range, cut: int | None = None) -> list[Observed]:
    canvas, stored = canvas_frames(1)[0], av.VideoFrame(96, 96, "yuv420p")
    face = Face(Alignment(np.eye(2, 3)), np.zeros((20, 20, 2), np.float32), 0)
    frames = [SourceFrame(index=i, pts=i, duration_pts=1, time_base=Fraction(1, 25), stored=stored) for i in range(40)]
    return [
        Observed(f, None if f.index in gone else face, None if f.index in gone else canvas, cut=f.index == cut)
        for f in frames
    ]


@pytest.mark.parametrize("cut", [None, 24])
def test_mouths_fade_around_a_gap_but_not_at_a_cut(cut: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny_mouth_model(), Fraction(1, 25), lambda start, stop: torch.zeros(stop - start, 16))
    strengths: dict[int, float] = {}
    compose = session._compose

    def noted(placed, lower, share, strength):  # type: ignore[no-untyped-def]
        strengths[placed.observed.frame.index] = strength
        return compose(placed, lower, share, strength)

    monkeypatch.setattr(session, "_compose", noted)
    monkeypatch.setattr(session, "_patch", lambda *arguments: None)
    out = []
    for observed in observed_second(range(20, 24), cut):
        out += session.push(observed)
    out += session.finish()
    assert [f.index for f in out] == list(range(40))
    fade = round(FADE_SECONDS * 25)
    assert all(strengths[i] == 1 for i in range(20 - fade + 1)) and all(strengths[i] == 0 for i in range(20, 24))
    down = [strengths[i] for i in range(20 - fade, 21)]
    assert down == sorted(down, reverse=True) and 0 < down[-2] < 0.2
    assert strengths[24] == (1 if cut else pytest.approx(down[-2]))


def test_silence_can_show_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = np.zeros(60, np.float32)
    quiet[10:20] = 1
    manner = Manner(silence="source", quiet=lambda start, stop: quiet[start:stop])
    rows = lambda start, stop: torch.zeros(stop - start, 16)  # noqa: E731
    session = Session(tiny_mouth_model(), Fraction(1, 25), rows, manner=manner)
    spoke: list[int] = []
    monkeypatch.setattr(session, "_patch", lambda *arguments: spoke.append(1))
    out = [f for observed in observed_second(range(0)) for f in session.push(observed)] + session.finish()
    assert len(out) == 40 and len(spoke) == 30


# ------------------------------------------------------------------ several voices


def test_a_voice_may_change_its_rate_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "two.aac"
    with path.open("wb") as joined:
        for rate, layout in ((16_000, "mono"), (44_100, "stereo")):
            part = tmp_path / f"{rate}.aac"
            with av.open(str(part), "w", format="adts") as container:
                stream = container.add_stream("aac", rate=rate, layout=layout)
                quiet = np.zeros((len(stream.layout.channels), rate), np.float32)
                sound = av.AudioFrame.from_ndarray(quiet, format="fltp", layout=layout)
                sound.sample_rate, sound.pts = rate, 0
                container.mux(stream.encode(sound))
                container.mux(stream.encode(None))
            joined.write(part.read_bytes())
    alone = len(load_speech(path))
    with mixed_sound((path, None), [path]) as (mix, _):
        assert abs(len(load_speech(mix)) - alone) < 320 < alone


def test_the_mix_is_the_sum_as_long_as_the_longest(tmp_path: Path) -> None:
    tone = (np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000) * 0.2).astype(np.float32)
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    write_wav(tone, a)
    write_wav(np.concatenate([tone, tone]), b)
    with mixed_sound((a, 2), []) as (path, track):
        assert (path, track) == (a, 2)
    with mixed_sound((a, None), [b]) as (path, _):
        mixed = load_speech(path)
        with av.open(str(path)) as container:
            assert container.streams.audio[0].rate == MIX_RATE
    assert abs(len(mixed) - 32_000) <= 2
    loud = [float(np.sqrt(np.mean(part**2))) for part in (mixed[2000:14_000], mixed[18_000:30_000])]
    assert loud[0] == pytest.approx(2 * loud[1], rel=0.03)
