"""One video to the samples in it: the work of a `lipstream prepare` worker.

The result is a tar file with the samples' files, one after the other, and the report's lines about every stretch of
the video. `pack` turns the tar files of all videos into the data set.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from numpy.typing import NDArray

from lipstream.batch.jobs import Job, Worker
from lipstream.data.prepare.canvas_sample import CanvasSample
from lipstream.data.prepare.filters import QualityFilter, SegmentView, SyncJudge, SyncMeasure
from lipstream.data.prepare.segments import SegmentConfig, Stretch, on_grid, plan_segments, watch
from lipstream.faces.canvas import FaceCanvas
from lipstream.faces.detect import silence_tflite
from lipstream.faces.official import ALIGNED_PX, OfficialAligner, anchors_from_mesh
from lipstream.media.opening import open_media
from lipstream.media.reader import VideoReader
from lipstream.media.speech import SpeechWindow
from lipstream.media.timeline import MODEL_FPS, SAMPLES_PER_MODEL_FRAME, SPEECH_RATE

Format = Literal["webdataset", "folders", "samples"]
PROMPT = "a person talking"  # what the official tool writes for every clip
BACK_SAMPLES = 5 * SPEECH_RATE  # twice the largest offset that a judge may find
_CRF = "13"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What samples are made.

    Attributes:
        format: "webdataset" (tar shards of mp4, wav, txt, json), "folders" (the official layout) or "samples" (the
            pocket model's training).
        segments: how long they are.
    """

    format: Format = "webdataset"
    segments: SegmentConfig = field(default_factory=SegmentConfig)


@dataclass(frozen=True, kw_only=True)
class PrepareFactory:
    """Makes a worker; `sync` and `quality` open their scorers there, None where that step is skipped."""

    config: PrepareConfig = field(default_factory=PrepareConfig)
    sync: Callable[[], SyncJudge | None] | None = None
    quality: Callable[[], QualityFilter | None] | None = None

    def __call__(self, number: int) -> Worker:
        """Load the scorers."""
        silence_tflite()
        judge = None if self.sync is None else self.sync()
        quality = None if self.quality is None else self.quality()
        canvas = FaceCanvas() if self.config.format == "samples" else None

        def work(job: Job, target: Path) -> dict[str, Any]:
            return prepare_video(job.payload, job.about["key"], target, self.config, judge, quality, canvas)

        return work


@dataclass
class _Taken:
    """One segment in the making."""

    stretch: Stretch
    landmarks: NDArray[np.float32]
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    canvas: CanvasSample | None = None


def prepare_video(
    video: Path,
    key: str,
    target: Path,
    config: PrepareConfig,
    judge: SyncJudge | None = None,
    quality: QualityFilter | None = None,
    canvas: FaceCanvas | None = None,
) -> dict[str, Any]:
    """Write the samples of one video into the tar file ``target`` (atomically); returns what became of every stretch.

    Raises:
        MediaError: the video cannot be read, or has no sound.
    """
    open_media(video, need="audio").close()
    reader = VideoReader(video)
    speech = SpeechWindow(video, BACK_SAMPLES)
    told: list[dict[str, Any]] = []
    part = target.with_name("samples.part")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="pass-") as folder:
        watched = watch(reader, Path(folder) / "landmarks")
        stretches = plan_segments(watched.changes, watched.faces, config.segments)
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            taken = _take(reader, stretches, watched.landmarks(), canvas)
            for stretch in stretches:
                line: dict[str, Any] = {"start": stretch.start, "stop": stretch.stop, "reason": stretch.reason}
                if not stretch.reason:
                    line |= _finish(next(taken), speech, tar, f"{key}_{stretch.start:06}", video, judge, quality)
                told.append(line)
    speech.close()
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
    return {"pixel_frames": watched.pixel_frames, "stretches": told}


def _take(
    reader: VideoReader, stretches: list[Stretch], landmarks: NDArray[np.float32], canvas: FaceCanvas | None
) -> Iterator[_Taken]:
    """The second pass: the pictures of the kept stretches, one segment in memory at a time."""
    wanted = iter([stretch for stretch in stretches if not stretch.reason])
    now = next(wanted, None)
    taken: _Taken | None = None
    aligner = OfficialAligner()
    for grid, frame in enumerate(on_grid(reader)):
        if now is None:
            return
        if grid < now.start:
            continue
        if taken is None:
            sample = None if canvas is None else CanvasSample(canvas)
            taken = _Taken(now, landmarks[now.start : now.stop], canvas=sample)
            aligner.reset()
        taken.pictures.append(aligner.step(frame.image, anchors_from_mesh(landmarks[grid])).picture)
        if taken.canvas is not None:
            taken.canvas.add(frame.image, landmarks[grid])
        if grid + 1 == now.stop:
            yield taken
            now, taken = next(wanted, None), None


def _finish(
    taken: _Taken,
    speech: SpeechWindow,
    tar: tarfile.TarFile,
    name: str,
    video: Path,
    judge: SyncJudge | None,
    quality: QualityFilter | None,
) -> dict[str, Any]:
    """Judge a segment, and write it where it passes; what the report says about it."""
    stretch, said, reason = taken.stretch, {"name": name, "reason": "", "late_frames": 0}, ""
    samples = _sound(speech, stretch, 0)
    if samples is None:
        return said | {"reason": "no sound"}
    if quality is not None:
        pictures = [taken.pictures[i] for i in (0, len(taken.pictures) // 2, -1)]
        score = quality.score(pictures)
        said |= {"quality": round(score, 3)}
        if not score >= quality.minimum:
            return said | {"reason": f"{quality.name} below {quality.minimum:g}"}
    if judge is not None:
        measure = judge.judge(SegmentView(pictures=taken.pictures, landmarks=taken.landmarks, samples=samples))
        said |= {"confidence": round(measure.confidence, 3), "late_frames": measure.late_frames}
        reason = _out_of_sync(judge, measure)
        samples = None if reason else _sound(speech, stretch, measure.late_frames)
    if samples is None:
        return said | {"reason": reason or "no sound after offset correction"}
    about = {"source": video.name, "start_pixel_frames": stretch.start, "pixel_frames": stretch.pixel_frames}
    about |= {key: said[key] for key in ("late_frames", "confidence", "quality") if key in said}
    if taken.canvas is not None:
        _add_canvas(tar, name, taken.canvas, samples)
    else:
        _add(tar, f"{name}.mp4", silent_mp4(taken.pictures))
        _add(tar, f"{name}.wav", wav_bytes(samples))
        _add(tar, f"{name}.txt", PROMPT.encode())
    _add(tar, f"{name}.json", json.dumps(about, ensure_ascii=False).encode())
    return said


def _out_of_sync(judge: SyncJudge, measure: SyncMeasure) -> str:
    if not measure.confidence >= judge.minimum:
        return f"{judge.name} confidence below {judge.minimum:g}"
    if abs(measure.late_frames) >= judge.max_shift:
        return f"offset of {judge.max_shift} frames or more"
    return ""


def _sound(speech: SpeechWindow, stretch: Stretch, late_frames: int) -> NDArray[np.float32] | None:
    """The speech of a stretch, 640 samples per frame, taken from so much later; None where it does not reach.

    A file's sound may end a codec frame before its picture does: up to 100 ms are completed with silence.
    """
    first = (stretch.start + late_frames) * SAMPLES_PER_MODEL_FRAME
    last = (stretch.stop + late_frames) * SAMPLES_PER_MODEL_FRAME
    if first < 0:
        return None
    samples = speech.read(first, last)
    missing = last - first - len(samples)
    return None if missing > SPEECH_RATE // 10 else np.pad(samples, (0, missing))


# ------------------------------------------------------------------- files of a sample


def silent_mp4(pictures: list[NDArray[np.uint8]]) -> bytes:
    """H.264 of aligned pictures [512, 512, 3], 25 fps, in memory; the sound is a file of its own."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        options = {"crf": _CRF, "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=MODEL_FPS, options=options)
        stream.width = stream.height = ALIGNED_PX
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, MODEL_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return memory.getvalue()


def wav_bytes(samples: NDArray[np.float32]) -> bytes:
    """16-bit mono WAV at 16 kHz."""
    memory = io.BytesIO()
    with wave.open(memory, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(SPEECH_RATE)
        audio.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return memory.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without time or owner: the same samples give the same file."""
    about = tarfile.TarInfo(name)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def _add_canvas(tar: tarfile.TarFile, name: str, canvas: CanvasSample, samples: NDArray[np.float32]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{name}.npz"
        canvas.save(target, samples)
        # The textures first: whoever sees the .npz has both.
        for file in (target.with_suffix(".tex.npy"), target):
            _add(tar, file.name, file.read_bytes())
