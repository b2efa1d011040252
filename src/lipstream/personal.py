"""One person's videos in, a model of that person out: the composition of the stages, nothing else.

A small model that has seen a face beats a large one that has not, if there is enough of it to see. So the end of the
material is never trained on: before and after are scored there, and where the new weights are no better, the folder
gets the general ones, and the report says so.

    report = personalize([Path("me.mp4")], Path("me"))
    LipSync.from_pretrained("me")                            # as any other model
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lipstream.checkpoints.hashing import record_file
from lipstream.checkpoints.networks import load_dit, save_dit
from lipstream.evaluation.rehearsal import Rehearsal, Spoken, rehearse, rise_error
from lipstream.faces.canvas import FaceCanvas
from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import MODEL_FPS, SAMPLES_PER_MODEL_FRAME, SPEECH_RATE, GridSampler
from lipstream.models.audio import SpeechEncoder
from lipstream.mouth import CanvasFrame, MouthModel
from lipstream.pipeline import folder_of
from lipstream.session import Observer
from lipstream.training.coded import code_clips
from lipstream.training.material import Material
from lipstream.training.person import LEAST_FRAMES, PersonConfig, Span, pieces, split_by_time, train_person
from lipstream.training.samples import Clip

log = logging.getLogger(__name__)

LEAST_SECONDS = 8  # of a face and speech; two are held out, which says little
MOST_SECONDS = 180  # what lies beyond is not read: memory (2 MB a second) and minutes
LEAST_LOUDNESS = 1e-3  # root mean square; below it nobody speaks
# Standard errors of the rise that are needed; docs/personalize.md says why not more: a few held-out seconds cannot show
# it, and of weights that change nothing three in ten pass as it is.
WORTH_ERRORS = 0.5
JUDGED_FRAMES = 500  # of the held-out part, or a little more
RUN = "unfinished"  # folder inside the result's; removed when it is done
PARTS = ("dit.safetensors", "speech.safetensors", "codec.safetensors")  # the last one makes a folder a model

#: (stage, how far, of how much): frames of a video, steps of training, stretches judged.
Tell = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class PersonalReport:
    """What came of it.

    Attributes:
        train_seconds, held_seconds: of video that was trained on, and that was judged by.
        before, after: the general and the personal weights on the held-out part.
        rise_error: standard error of the rise of the correlation, over the half seconds of the held-out part.
        better: whether the personal ones follow better there, by more than `WORTH_ERRORS` times that.
        kept: whether the folder has them.
    """

    folder: Path
    train_seconds: float
    held_seconds: float
    before: Rehearsal
    after: Rehearsal
    rise_error: float
    better: bool
    kept: bool
    seconds: float


class _Stretch(NamedTuple):
    """A span and what it shows; speech is int16 from the video's first frame on."""

    span: Span
    fields: NDArray[np.float16]
    textures: NDArray[np.uint8]
    speech: NDArray[np.int16]


def personalize(
    videos: Sequence[Path],
    folder: Path,
    *,
    base: str | Path = "pocket",
    config: PersonConfig | None = None,
    seed: int = 0,
    keep_anyway: bool = False,
    tell: Tell = lambda stage, done, total: None,
) -> PersonalReport:
    """Fine-tune the small model on one person and write a model folder; an unfinished run is continued.

    Args:
        videos: of one person who speaks, with their own sound; their order is that of time, the end is held out.
        folder: of the new model; it must not hold one yet.
        base: the model to begin with, of the small kind.
        keep_anyway: keep the new weights where they are no better, too.

    Raises:
        ValueError: a file cannot be used, there is too little to learn from, or the folder is taken.
    """
    started, config = time.monotonic(), config or PersonConfig()
    source, run = folder_of(base), folder / RUN
    if not (source / PARTS[-1]).exists():
        raise ValueError(f"model '{base}' cannot be personalized: only the small kind can (default: pocket)")
    if (folder / PARTS[-1]).exists():
        raise ValueError(f"{folder}: holds a model already; choose another folder or remove it first")
    model = MouthModel.load(source)
    stretches = _stretches(videos, model.canvas, tell)
    try:
        split = split_by_time([stretch.span for stretch in stretches], config)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, videos))}: {error}") from None
    records = [asdict(record_file(path)) for path in (source / PARTS[0], *videos)]
    _claim(run, {"files": records, "config": asdict(config), "seed": seed})
    held = [piece for span in split.held for piece in pieces(span)]
    begun = np.cumsum([0, *map(len, held)])
    judged = [piece for piece, frames in zip(held, begun, strict=False) if frames < JUDGED_FRAMES]
    takes = [_spoken(clip, model.speech) for clip in _clips(stretches, judged, model.speech)]
    tell("judging the general model", 0, None)
    before = rehearse(model, takes, seed)
    clips = _clips(stretches, [piece for span in split.train for piece in pieces(span)], model.speech)
    learned = _learn(run, model, clips, source, config, seed, tell)
    tell("judging the personal model", 0, None)
    after = rehearse(learned, takes, seed)
    doubt = rise_error(before, after)
    better = after.r - before.r > WORTH_ERRORS * doubt
    report = PersonalReport(
        folder=folder,
        train_seconds=sum(map(len, split.train)) / MODEL_FPS,
        held_seconds=sum(len(take.speech) for take in takes) / MODEL_FPS,
        before=before,
        after=after,
        rise_error=doubt,
        better=better,
        kept=better or keep_anyway,
        seconds=time.monotonic() - started,
    )
    _write(report, source, run)
    return report


# ---------------------------------------------------------------------------------------------- what there is to see


def _stretches(videos: Sequence[Path], canvas: FaceCanvas, tell: Tell) -> list[_Stretch]:
    """Stretches of all videos, at 25 frames per second.

    Raises:
        ValueError: see :func:`personalize`.
    """
    found: list[_Stretch] = []
    for index, video in enumerate(videos):
        room = MOST_SECONDS * MODEL_FPS - sum(len(stretch.span) for stretch in found)
        if room <= 0:
            log.warning("%s: not needed, the videos before it show %d s of the face", video, MOST_SECONDS)
            break
        found += _look(index, video, canvas, room, tell)
    seconds = sum(len(stretch.span) for stretch in found) / MODEL_FPS
    if seconds < LEAST_SECONDS:
        raise ValueError(
            f"{', '.join(map(str, videos))}: {seconds:.1f} s of a face in stretches of at least "
            f"{LEAST_FRAMES / MODEL_FPS:.1f} s; {LEAST_SECONDS} s are the least, a minute is better"
        )
    return found


def _look(index: int, video: Path, canvas: FaceCanvas, room: int, tell: Tell) -> list[_Stretch]:
    """Follow the face through a video."""
    # No more than can be needed; the last frames' rows hear a little ahead.
    reader, speech = VideoReader(video), load_speech(video, room * SAMPLES_PER_MODEL_FRAME + SPEECH_RATE)
    if np.sqrt(np.mean(np.square(speech))) < LEAST_LOUDNESS:
        raise MediaError(video, "its sound is silent", "use a video in which the person is heard")
    samples = np.clip(speech * 32768.0, -32768, 32767).astype(np.int16)
    observer, grid = Observer(canvas, live=False), GridSampler[tuple[int, CanvasFrame | None]](reader.time_base)
    shot, count, row = 0, 0, list[tuple[int, CanvasFrame | None]]()
    # Beyond its sound a video has nothing to teach.
    room = min(room, len(samples) // SAMPLES_PER_MODEL_FRAME)
    for frame in reader:
        seen = observer.step(frame)
        shot, count = shot + seen.cut, count + 1
        row += grid.push(frame.pts, (shot, seen.view))
        tell(f"looking at {video.name}", count, reader.frames)
        if len(row) >= room:
            break
    row = (row + grid.finish())[:room]
    if not any(view for _, view in row):
        raise MediaError(video, f"shows no face in any of its {count} frames", "use a video of a talking person")
    stretches = []
    for _, group in groupby(enumerate(row), key=lambda item: (item[1][0], item[1][1] is not None)):
        views = [(place, view) for place, (_, view) in group if view is not None]
        if len(views) >= LEAST_FRAMES:
            fields = np.stack([view.field for _, view in views]).astype(np.float16)
            textures = np.stack([view.texture for _, view in views])
            stretches.append(_Stretch(Span(index, views[0][0], views[-1][0] + 1), fields, textures, samples))
    return stretches


def _clips(stretches: Sequence[_Stretch], spans: Sequence[Span], encoder: SpeechEncoder) -> list[Clip]:
    """The spans as training clips; speech goes on for what the encoder hears ahead."""
    clips = []
    for span in spans:
        shown = next(
            s
            for s in stretches
            if s.span.video == span.video and s.span.start <= span.start and span.stop <= s.span.stop
        )
        part = slice(span.start - shown.span.start, span.stop - shown.span.start)
        size = SAMPLES_PER_MODEL_FRAME
        speech = shown.speech[span.start * size : span.stop * size + encoder.config.lookahead_samples]
        tracked = np.ones(len(span), np.bool_)
        name = f"person_{span.video}_{span.start}"
        clips.append(Clip(name, shown.fields[part], shown.textures[part], tracked, speech))
    return clips


@torch.no_grad()
def _spoken(clip: Clip, encoder: SpeechEncoder) -> Spoken:
    samples = np.zeros(len(clip) * SAMPLES_PER_MODEL_FRAME + encoder.config.lookahead_samples, np.float32)
    known = clip.speech[: len(samples)]
    samples[: len(known)] = known.astype(np.float32) / 32768
    rows = encoder(torch.from_numpy(samples)[None])[0, : len(clip)]
    return Spoken(clip.fields, clip.textures, rows)


# ------------------------------------------------------------------------------------------------ learn and write


def _claim(run: Path, plan: dict[str, Any]) -> None:
    """Begin a run, or make sure that the one in the folder is the same.

    Raises:
        ValueError: it is another one.
    """
    text = json.dumps(plan, sort_keys=True)
    digest, file = hashlib.sha256(text.encode()).hexdigest(), run / "plan.sha256"
    if file.exists() and file.read_text() != digest:
        raise ValueError(f"{run}: an unfinished run of other videos or settings; remove it or choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(digest)


def _learn(
    run: Path, model: MouthModel, clips: Sequence[Clip], source: Path, config: PersonConfig, seed: int, tell: Tell
) -> MouthModel:
    """Train on the clips; the result is read back from its file, so that what is judged is what is kept."""
    tell("learning", 0, config.steps)
    torch.manual_seed(seed)
    coded, _ = code_clips(model.codec, clips, model.speech, config.versions)
    weights = np.tile([float(len(clip)) for clip in clips], config.versions)
    dit, guidance = load_dit(source / PARTS[0])
    material = Material(model.codec, coded, weights, [])
    trained = train_person(run, dit, material, config, seed, lambda step: tell("learning", step, config.steps))
    save_dit(trained, guidance, run / PARTS[0])
    return MouthModel(load_dit(run / PARTS[0])[0], model.codec, model.speech, guidance)


def _write(report: PersonalReport, source: Path, run: Path) -> None:
    """Make a model of the folder: the codec, which makes it one, comes last."""
    sources = [run / PARTS[0] if report.kept else source / PARTS[0], *(source / part for part in PARTS[1:])]
    figures = asdict(report) | {"folder": report.folder.name}
    if not math.isfinite(report.rise_error):  # JSON knows no infinity
        figures["rise_error"] = None
    (report.folder / "personal.json").write_text(json.dumps(figures, indent=1) + "\n")
    for part in sources:
        temporary = report.folder / f"{part.name}.tmp"
        shutil.copyfile(part, temporary)
        temporary.replace(report.folder / part.name)
    shutil.rmtree(run)
