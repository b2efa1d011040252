"""Cases of the torture set about faces and speech: each builds its own clip, runs the product and checks one promise.

People come from the renderer (`lipstream.data.synthetic`, extra `synth`) and are put together with numpy, so that it is
known who is where in every frame.

    lipstream evaluate torture --only crossing cut hand
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from importlib.resources import files
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from lipstream.evaluation.opening import mouth_opening
from lipstream.evaluation.speed import write_wav
from lipstream.evaluation.torture import Bench, case, require
from lipstream.faces.track import FaceTracker
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import SPEECH_RATE
from lipstream.options import SyncOptions
from lipstream.session import SyncedFrame

Image = NDArray[np.uint8]
SIDE = 224  # px of an actor's picture
FPS = 25
# Two people of the renderer that also look different to a person.
ONE, OTHER = 3, 4


def write_video(path: Path, images: Iterable[Image]) -> Path:
    """An H.264 file at 25 frames/s, hardly compressed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12", "preset": "ultrafast"})
        for index, image in enumerate(images):
            if index == 0:
                stream.width, stream.height, stream.pix_fmt = image.shape[1], image.shape[0], "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_speech(path: Path, seconds: float, silent: Sequence[tuple[float, float]] = ()) -> Path:
    """The demo's speech, repeated to a length, with silences (start, stop in s) in it."""
    demo = load_speech(str(files("lipstream") / "assets" / "demo" / "speech.m4a"))
    samples = np.tile(demo, int(np.ceil(seconds * SPEECH_RATE / len(demo))))[: round(seconds * SPEECH_RATE)].copy()
    for start, stop in silent:
        samples[round(start * SPEECH_RATE) : round(stop * SPEECH_RATE)] = 0
    write_wav(samples, path)
    return path


@cache
def _acting(seed: int, frames: int, yaws: tuple[float, ...] = ()) -> tuple[list[Image], list[NDArray[np.float32]]]:
    """A person who opens and closes the mouth all the time: pictures and coverage."""
    from lipstream.data.synthetic.requirements import check_requirements

    check_requirements()
    from lipstream.data.synthetic.basis import load_basis
    from lipstream.data.synthetic.stage import Actor

    actor = Actor(load_basis(), seed, SIDE)
    pictures, covers = [], []
    for i in range(frames):
        opening = max(0.0, 0.13 * np.sin(0.9 * i) + 0.05 * np.sin(0.37 * i + seed))
        yaw = yaws[i] if yaws else 0.06 * float(np.sin(0.1 * i))
        picture, cover = actor.cut_out(opening=float(opening), yaw=yaw)
        pictures.append(picture)
        covers.append(cover)
    return pictures, covers


def _changed(done: SyncedFrame) -> tuple[float, float] | None:
    """Centre (x, y) px of what was changed in a frame."""
    if done.patch is None:
        return None
    x0, y0, x1, y1 = done.patch.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def _run(bench: Bench, video: Path, speech: Path, options: SyncOptions | None = None) -> list[SyncedFrame]:
    return list(bench.lipsync.stream(video, speech, options=options))


def _span(flags: Sequence[bool], start: int, stop: int) -> float:
    """Share of true flags in a range."""
    return float(np.mean(flags[start:stop]))


# ------------------------------------------------------------------ people


def _crossing_frames(frames: int) -> tuple[list[Image], list[float], list[float]]:
    """Two people walk past each other, ONE in front; their centres in every frame."""
    (a, cover_a), (b, cover_b) = _acting(ONE, frames), _acting(OTHER, frames)
    width = 2 * SIDE + 64
    wall = cv2.resize(a[0][:8, :8], (width, SIDE), interpolation=cv2.INTER_LINEAR)
    images, xs_a, xs_b = [], [], []
    for i in range(frames):
        u = min(max((i - 12) / (frames - 24), 0.0), 1.0)
        path = u * u * (3 - 2 * u) * (width - SIDE)
        picture = wall.astype(np.float32)
        for actor, cover, left in ((b[i], cover_b[i], width - SIDE - path), (a[i], cover_a[i], path)):
            x = round(left)
            weight = cover[..., None]
            picture[:, x : x + SIDE] += weight * (actor - picture[:, x : x + SIDE])
        images.append(np.asarray(picture, np.uint8))
        xs_a.append(path + SIDE / 2)
        xs_b.append(width - SIDE / 2 - path)
    return images, xs_a, xs_b


def _keeps(done: list[SyncedFrame], own: list[float], other: list[float]) -> str:
    """What was changed has to be the speaker's always, and again at the end."""
    centres = [_changed(frame) for frame in done]
    apart = [abs(x - y) > 0.6 * SIDE for x, y in zip(own, other, strict=True)]
    wrong = [
        i for i, c in enumerate(centres) if c is not None and apart[i] and abs(c[0] - other[i]) < abs(c[0] - own[i])
    ]
    flags = [c is not None for c in centres]
    start, end = _span(flags, 0, 12), _span(flags, len(flags) - 8, len(flags))
    detail = (
        f"{len(wrong)} frames changed the other person; spoke in {start:.0%} before and {end:.0%} after they crossed"
    )
    require(not wrong and start == 1 and end == 1, detail)
    return detail


@case("crossing, speaker in front", "the speaker, walking past another person, speaks before and after")
def crossing_in_front(bench: Bench) -> str:
    """The speaker walks past another person, before them."""
    images, xs_a, xs_b = _crossing_frames(62)
    video = write_video(bench.folder / "crossing.mp4", images)
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", len(images) / FPS), SyncOptions(speaker="left"))
    return _keeps(done, xs_a, xs_b)


@case("crossing, speaker behind", "the speaker, hidden by another person for a moment, speaks before and after")
def crossing_behind(bench: Bench) -> str:
    """The speaker is hidden by another person for a moment."""
    images, xs_a, xs_b = _crossing_frames(62)
    video = write_video(bench.folder / "crossing.mp4", images)
    done = _run(
        bench, video, write_speech(bench.folder / "speech.wav", len(images) / FPS), SyncOptions(speaker="right")
    )
    return _keeps(done, xs_b, xs_a)


@case("cut to another person and back", "the speaker speaks in both shots, the other person keeps their own mouth")
def cut_and_back(bench: Bench) -> str:
    """Another person is shown for a second, in the same place."""
    (a, _), (b, _) = _acting(ONE, 62), _acting(OTHER, 62)
    images = [*a[:20], *b[20:40], *a[40:60]]
    video = write_video(bench.folder / "cuts.mp4", images)
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", len(images) / FPS))
    flags = [frame.synced for frame in done]
    before, other, after = _span(flags, 0, 20), _span(flags, 20, 40), _span(flags, 40, 60)
    detail = f"changed: {before:.0%} before, {other:.0%} of the other person, {after:.0%} after"
    require(before == 1 and other == 0 and after >= 0.9, detail)
    return detail


@case(
    "face leaving and returning",
    "frames without the face stay as they are; the speaker speaks again within half a second",
)
def leaving_and_returning(bench: Bench) -> str:
    """The speaker walks out of the picture and comes back."""
    pictures, covers = _acting(ONE, 62)
    wall = cv2.resize(pictures[0][:8, :8], (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
    images = []
    for i, (picture, cover) in enumerate(zip(pictures, covers, strict=True)):
        u = min(max((i - 14) / 8, 0.0), 1.0) - min(max((i - 38) / 8, 0.0), 1.0)
        away = round(u * u * (3 - 2 * u) * SIDE)
        image = wall.copy()
        if away < SIDE:
            weight = cover[:, : SIDE - away, None]
            part = image[:, away:].astype(np.float32)
            image[:, away:] = np.asarray(part + weight * (picture[:, : SIDE - away] - part), np.uint8)
        images.append(np.asarray(image, np.uint8))
    video = write_video(bench.folder / "leaving.mp4", images)
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", len(images) / FPS))
    flags = [frame.synced for frame in done]
    detail = (
        f"changed: {_span(flags, 0, 12):.0%} before, {_span(flags, 24, 37):.0%} away, {_span(flags, 56, 62):.0%} after"
    )
    require(_span(flags, 0, 12) == 1 and not any(flags[24:37]) and _span(flags, 56, 62) == 1, detail)
    return detail


@case("two voices", "both mouths are given their words in one pass")
def two_voices(bench: Bench) -> str:
    """Two people, each with a speech of their own."""
    (a, _), (b, _) = _acting(ONE, 30), _acting(OTHER, 30)
    video = write_video(bench.folder / "two.mp4", (np.concatenate(pair, axis=1) for pair in zip(a, b, strict=True)))
    speech, second = (
        write_speech(bench.folder / "speech.wav", 1.2),
        write_speech(bench.folder / "second.wav", 1.2, [(0, 0.6)]),
    )
    done = _run(bench, video, speech, SyncOptions(speaker="left", voices=(("right", str(second)),)))
    both = [frame.patch is not None and frame.patch.box[0] < SIDE < frame.patch.box[2] for frame in done]
    detail = f"both changed in {np.mean(both):.0%} of {len(both)} frames"
    require(all(both), detail)
    return detail


# ------------------------------------------------------------------ mouths


@case("hand over the mouth", "the hand stays in front")
def hand_over_mouth(bench: Bench) -> str:
    """A hand with fingers comes up before the mouth and goes again."""
    pictures, _ = _acting(ONE, 62)
    images, hands = [], []
    for i, picture in enumerate(pictures):
        u = min(max((i - 24) / 6, 0.0), 1.0) - min(max((i - 46) / 6, 0.0), 1.0)
        hand, image = _hand(picture, SIDE * (1.25 - 0.62 * u))
        hands.append(hand)
        images.append(image)
    video = write_video(bench.folder / "hand.mp4", images)
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", len(images) / FPS))
    source = list(VideoReader(video))
    worst, moved = 0.0, 0.0
    for i, (frame, before) in enumerate(zip(done, source, strict=True)):
        solid = cv2.erode(hands[i].astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        if not solid[int(0.5 * SIDE) : int(0.75 * SIDE)].any():
            continue
        change = np.abs(frame.frame.image.astype(int) - before.image).max(-1)[solid]
        worst = max(worst, float((change > 12).mean()))
        moved += float((change > 12).mean())
    spoke = _span([frame.synced for frame in done], 0, 22), _span([frame.synced for frame in done], 56, 62)
    detail = f"at worst {worst:.1%} of the hand changed; spoke in {spoke[0]:.0%} before and {spoke[1]:.0%} after"
    require(worst <= 0.05 and spoke == (1, 1), detail)
    return detail


def _hand(picture: Image, top: float) -> tuple[NDArray[np.bool_], Image]:
    """A hand of four fingers over a picture, its tips at ``top`` px: (where it is, the picture with it)."""
    shape = np.zeros(picture.shape[:2], np.uint8)
    shade = np.zeros(picture.shape[:2], np.float32)
    for finger in range(4):
        x = int(SIDE * (0.38 + 0.075 * finger))
        tip = int(top + SIDE * (0.05, 0.0, 0.01, 0.06)[finger])
        cv2.rectangle(shape, (x - 8, tip + 8), (x + 8, SIDE + 100), 1, -1)
        cv2.circle(shape, (x, tip + 8), 8, 1, -1)
        cv2.line(shade, (x + 8, tip + 8), (x + 8, SIDE + 100), 1.0, 2)
    skin = np.array([196, 140, 112], np.float32)
    light = 1.0 - 0.45 * cv2.GaussianBlur(shade, (0, 0), 1.5)
    hand = shape > 0
    return hand, np.where(hand[..., None], np.clip(skin * light[..., None], 0, 255), picture).astype(np.uint8)


@case("profile turn", "a profile keeps its own mouth; the front speaks")
def profile_turn(bench: Bench) -> str:
    """The speaker turns to the side and back."""
    frames = 62
    yaws = tuple(float(1.25 * np.sin(np.pi * min(max((i - 12) / 38, 0), 1)) ** 2) for i in range(frames))
    pictures, _ = _acting(ONE, frames, yaws)
    video = write_video(bench.folder / "profile.mp4", pictures)
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", frames / FPS))
    degrees = np.degrees(yaws)
    side = [frame.synced for frame, yaw in zip(done, degrees, strict=True) if yaw > 62]
    front = [frame.synced for frame, yaw in zip(done, degrees, strict=True) if yaw < 30]
    detail = f"changed: {np.mean(side):.0%} of {len(side)} profiles, {np.mean(front):.0%} of {len(front)} fronts"
    require(not any(side) and all(front), detail)
    return detail


@case("silence in the speech", "lips close within four frames and stay closed")
def silence_closes(bench: Bench) -> str:
    """A pause in the speech, while the source goes on talking."""
    pictures, _ = _acting(ONE, 62)
    video = write_video(bench.folder / "silence.mp4", [*pictures, *pictures[:38]])
    done = _run(bench, video, write_speech(bench.folder / "speech.wav", 4.0, [(1.6, 3.0)]))
    tracker = FaceTracker()
    tracks = [tracker.step(frame.frame.image) for frame in done]
    opening = np.array([np.nan if track is None else mouth_opening(track.landmarks) for track in tracks])
    pause, speech = opening[44:73], np.concatenate([opening[:38], opening[78:]])
    limit = float(np.nanpercentile(speech, 5) + 0.25 * (np.nanpercentile(speech, 90) - np.nanpercentile(speech, 5)))
    shut = float(np.mean(pause <= limit))
    mean = f"opening {np.nanmean(pause):.3f}, in speech {np.nanmean(speech):.3f}"
    detail = f"closed in {shut:.0%} of {len(pause)} frames; {mean}"
    require(shut >= 0.95, detail)
    return detail


@case("drawn figure", "said within seconds, with the best score and what to do")
def drawing_is_refused(bench: Bench) -> str:
    """Forty seconds of a drawn figure."""
    image = np.full((180, 240, 3), (200, 220, 250), np.uint8)
    cv2.rectangle(image, (80, 50), (160, 150), (240, 200, 60), -1)
    for x in (105, 135):
        cv2.circle(image, (x, 80), 4, (20, 20, 20), -1)
    cv2.line(image, (100, 125), (140, 125), (20, 20, 20), 3)
    video = write_video(bench.folder / "drawing.mp4", (np.roll(image, i % 30, axis=1) for i in range(1000)))
    looked, message = 0, "no error"
    try:
        for _ in bench.lipsync.stream(video, write_speech(bench.folder / "speech.wav", 40)):
            looked += 1
    except MediaError as error:
        message = str(error)
    detail = f"after {looked} frames of 1000: {message}"
    require("shows no face" in message and "scores" in message and looked <= 150, detail)
    return detail
