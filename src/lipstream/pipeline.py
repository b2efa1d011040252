"""Video file + speech file -> video file: the composition of the stages, nothing else.

from lipstream import LipSync
lipsync = LipSync.from_pretrained("pocket")
report = lipsync("talk.mp4", "speech.wav", "out.mp4")        # a file, or
for frame in lipsync.stream("talk.mp4", "speech.wav"):        # frames as they are made; the same frames
    show(frame.frame.image)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from lipstream.background import Ahead
from lipstream.casting import Cast, Choice, no_speaker, speakers_of
from lipstream.checkpoints.artefacts import MODELS, default_folder
from lipstream.engines import CanvasEngine, Engine
from lipstream.media.bounce import BouncingReader
from lipstream.media.isolated import IsolatedReader
from lipstream.media.mix import mixed_sound
from lipstream.media.opening import MediaError
from lipstream.media.plan import Plan
from lipstream.media.probe import probe
from lipstream.media.reader import VideoReader
from lipstream.media.speech import SpeechReader, count_speech_samples
from lipstream.media.writer import VideoWriter
from lipstream.memory import MemoryNeed
from lipstream.mouth import MouthModel
from lipstream.options import SyncOptions
from lipstream.session import SyncedFrame
from lipstream.voices import Looked, Voices

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
BUILT_IN = ("pocket",)
_AHEAD = 16  # frames between two stages, and what they may take
_AHEAD_BYTES = 96 * 1024 * 1024
# A picture's RGB is kept from the tracker to the compositor; of a larger one it is made again instead.
_KEPT_IMAGE_PIXELS = 2_100_000


@dataclass(frozen=True)
class Progress:
    """How far a run is. ``total_frames`` and ``seconds_left`` are None while the source's length is unknown."""

    stage: str
    done_frames: int
    total_frames: int | None
    fps: float
    seconds_left: float | None


@dataclass(frozen=True)
class SyncReport:
    """What a run did.

    Attributes:
        passed_through: half-open ranges of frames that were left as they were because no face was found.
        stage_seconds: busy wall time of each stage (they overlap).
        first_frame_seconds: from the start of the run to its first finished frame.
        speakers: whose lips moved, and why theirs.
        copied_frames: how many frames were taken over from the source without encoding (option `copy_unchanged`).
    """

    output: Path
    frames: int
    synced_frames: int
    passed_through: tuple[tuple[int, int], ...]
    seconds: float
    stage_seconds: dict[str, float]
    model: str
    first_frame_seconds: float
    speakers: tuple[Choice, ...] = ()
    copied_frames: int = 0

    @property
    def fps(self) -> float:
        return self.frames / max(self.seconds, 1e-9)


@dataclass
class _Clock:
    """Busy time per stage and time to the first frame of one run, and who speaks in it."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    voices: Voices | None = None

    def add(self, stage: str, since: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - since


@dataclass(frozen=True)
class _Run:
    """The files of one run, opened, who speaks in it, and what it promises."""

    source: BouncingReader
    speeches: tuple[SpeechReader, ...]
    cast: Cast
    plan: Plan
    options: SyncOptions

    @classmethod
    def of(cls, engine: Engine, video: PathLike, audio: PathLike, options: SyncOptions) -> _Run:
        """Look at both files in a process of its own, then open them here."""
        problem = engine.refuses(options)
        if problem is not None:
            raise ValueError(problem)
        probed = probe(video, need="video")
        length, fit, delay_ms = options.resolved_length, options.resolved_fit, options.audio_delay_ms
        tracks = [(audio, options.audio_track), *((voice, None) for _, voice in options.voices)]
        samples = 0
        for sound, track in tracks:
            probe(sound, need="audio")
            count = count_speech_samples(sound, track, delay_ms)
            if not count:
                raise MediaError(sound, "its sound has no samples", "use a file with speech in it, and no larger delay")
            samples = max(samples, count)
        reader = IsolatedReader(video) if options.isolate else VideoReader(video)
        source = engine.frames(reader, samples, length, fit)
        return cls(
            source=source,
            speeches=tuple(SpeechReader(sound, track, delay_ms) for sound, track in tracks),
            cast=Cast(reader, speakers_of(options)),
            plan=Plan.of(probed, samples, length, fit, source.frames),
            options=options,
        )


class LipSync:
    """A loaded model, ready to sync any number of videos, one at a time."""

    def __init__(self, engine: Engine, name: str, seed: int = 0) -> None:
        self.engine, self.name, self.seed = engine, name, seed

    @classmethod
    def from_pretrained(
        cls,
        model: PathLike = "pocket",
        *,
        seed: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        decoder: str | None = None,
        mask: PathLike | None = None,
        memory_gb: float | None = None,
        speech_lookahead: float | None = None,
        parity: bool = False,
        on_memory: Callable[[MemoryNeed], None] | None = None,
    ) -> LipSync:
        """Load a model by name or from a folder.

        Args:
            model: "pocket" (inside the package), "lipforcing-14b" (what `lipstream pull` fetched), or a folder with the
                files of either kind.
            seed: of all noise; the same seed gives the same video. Default 0, with ``parity`` the official 42.
            threads: CPU threads of the networks; default 1, which leaves the other cores to the other stages.
            device: torch device of a full-size model; default "cpu".
            dtype: default bfloat16 where it is fast, else float32; bfloat16 at full size.
            decoder: of a full-size model, "tae" (default) or "wan".
            mask: of a full-size model, "built-in" or a file; default: the `mask.png` of its folder.
            memory_gb: what a full-size model may use; default: what is free.
            speech_lookahead: a full-size model hears speech as it comes and only so many seconds ahead (rounded up to
                0.04 s), an approximation for live use; default: the whole file first.
            parity: a full-size model runs as the official scripts do, see `lipstream.fullsize_parity`.
            on_memory: told what a full-size model takes, before it is checked and loaded.

        Raises:
            ValueError: unknown name, files that do not fit, not enough memory, or an option of another kind of model.
        """
        folder, name = folder_of(model), str(model)
        torch.set_num_threads(threads or 1)
        kind = engine_kind(model, parity)
        if kind is CanvasEngine:
            given = {
                "device": None if device == "cpu" else device, "decoder": decoder, "mask": mask, "memory_gb": memory_gb,
                "speech_lookahead": speech_lookahead, "parity": parity or None,
            }  # fmt: skip
            wrong = [option for option, value in given.items() if value is not None]
            if wrong:
                raise ValueError(f"model '{name}' has no option {', '.join(wrong)}: it runs on the CPU as it is")
            if dtype is None:
                dtype = torch.bfloat16 if _fast_bfloat16() else torch.float32
            log.info("model %s from %s, cpu, %s, %d thread(s)", name, folder, dtype, torch.get_num_threads())
            return cls(CanvasEngine(MouthModel.load(folder, dtype)), name, seed or 0)
        from lipstream.diffusion.official_noise import OFFICIAL_SEED
        from lipstream.fullsize_engine import DECODERS, FullSizeEngine, FullSizeOptions
        from lipstream.models.wav2vec_windowed import window_of

        if memory_gb is not None and not 0 < memory_gb < float("inf"):
            raise ValueError(f"memory must be a positive number of GB, got {memory_gb}")
        if decoder not in (None, *DECODERS):
            raise ValueError(f"unknown decoder '{decoder}': there are {', '.join(DECODERS)}")
        options = FullSizeOptions(
            device=device or "cpu",
            dtype=dtype or torch.bfloat16,
            decoder="wan" if decoder == "wan" else "tae",
            mask=mask,
            memory_bytes=None if memory_gb is None else int(memory_gb * 1e9),
            window=None if speech_lookahead is None else window_of(speech_lookahead),
            parity=parity,
        )
        if seed is None:
            seed = OFFICIAL_SEED if parity else 0
        assert issubclass(kind, FullSizeEngine)
        return cls(kind.load(folder, options, on_memory), name, seed)

    def __call__(
        self,
        video: PathLike,
        audio: PathLike,
        output: PathLike,
        *,
        options: SyncOptions | None = None,
        progress: Callable[[Progress], None] | None = None,
        on_plan: Callable[[Plan], None] | None = None,
    ) -> SyncReport:
        """Write ``video`` with lips that follow ``audio`` to ``output`` (atomically) and report.

        Args:
            options: what this run is told beyond its files; see :class:`SyncOptions`.
            progress: called for every finished frame.
            on_plan: told what the result will be, before work starts.

        Raises:
            MediaError: a file cannot be read or written, or the video shows no face at all.
            RuntimeError: the result is not what the plan promised; no file is left.
        """
        options = options or SyncOptions()
        clock = _Clock()
        run = _Run.of(self.engine, video, audio, options)
        if on_plan is not None:
            on_plan(run.plan)
        frames = synced = 0
        gaps: list[tuple[int, int]] = []
        with (
            mixed_sound((audio, options.audio_track), [voice for _, voice in options.voices]) as (sound, track),
            VideoWriter(
                output,
                like=run.source.reader,
                audio=sound,
                track=track,
                delay_ms=options.audio_delay_ms,
                quality=options.quality,
                crf=options.crf,
                carry=True,
                repeats=run.plan.timeline.fills,
                copy_unchanged=options.copy_unchanged,
            ) as writer,
            # Closed at once, also when writing fails: a kept traceback must not keep the threads running.
            closing(self._frames(run, progress, clock)) as made,
        ):
            for done in made:
                since = time.perf_counter()
                writer.write(done.frame, unchanged=not done.synced)
                clock.add("write", since)
                frames += 1
                synced += done.synced
                if not done.synced:
                    gaps = (
                        [*gaps[:-1], (gaps[-1][0], frames)]
                        if gaps and gaps[-1][1] == frames - 1
                        else [*gaps, (frames - 1, frames)]
                    )
            mute = clock.voices.mute if clock.voices else []
            if not synced and not (all(mute) and run.cast.anybody):
                raise no_speaker(video, frames, run.cast)
        for sound, silent in zip((audio, *(voice for _, voice in options.voices)), mute, strict=True):
            if silent:
                log.warning("%s: no speech in it, only silence or noise: the lips say nothing", sound)
        for speaker in run.cast.waiting():
            log.warning("%s: no face ever showed for speaker '%s': nobody says those words", video, speaker.text)
        seconds = time.perf_counter() - clock.started
        return SyncReport(
            output=Path(output),
            frames=frames,
            synced_frames=synced,
            passed_through=tuple(gaps),
            seconds=seconds,
            stage_seconds={k: round(v, 3) for k, v in clock.stages.items()},
            model=self.name,
            first_frame_seconds=clock.first or seconds,
            speakers=tuple(run.cast.choices),
            copied_frames=writer.copied_frames,
        )

    def stream(
        self,
        video: PathLike,
        audio: PathLike,
        *,
        options: SyncOptions | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[SyncedFrame]:
        """Frames of the result as they are made, equal to what :meth:`__call__` writes."""
        return self._frames(_Run.of(self.engine, video, audio, options or SyncOptions()), progress, _Clock())

    def _frames(
        self, run: _Run, progress: Callable[[Progress], None] | None, clock: _Clock
    ) -> Generator[SyncedFrame, None, None]:
        source, total = run.source, run.plan.frames
        ahead_frames = queue_frames(source.reader)
        reads = [speech.read for speech in run.speeches]
        session = Voices(self.engine, run.cast, reads, source.reader.time_base, self.seed, run.options)
        clock.voices = session

        def observed() -> Iterator[Looked]:
            for frame in chain(source, (None,)):  # None: there are no more
                since = time.perf_counter()
                looked = session.look_at_rest() if frame is None else session.look(frame)
                for shown in (frame, *(seen[0].frame for seen in looked)):
                    if shown is not None and shown.stored.width * shown.stored.height > _KEPT_IMAGE_PIXELS:
                        shown.forget_image()
                clock.add("faces", since)
                yield from looked

        def generated() -> Iterator[SyncedFrame]:
            with Ahead(observed(), ahead_frames, "faces") as ahead:
                for seen in ahead:
                    since = time.perf_counter()
                    ready = session.push(seen)
                    clock.add("mouths", since)
                    yield from ready
                yield from session.finish()

        done = 0
        with source.reader, Ahead(generated(), ahead_frames, "mouths") as frames:
            for frame in frames:
                if clock.first is None:
                    clock.first = time.perf_counter() - clock.started
                done += 1
                if progress is not None:
                    progress(_progress(done, total, clock.started))
                yield frame
        run.plan.check(source.reader.path, source.pts, source.given, done)


def queue_frames(reader: VideoReader) -> int:
    """How many frames may wait between two stages: few large ones."""
    return min(max(_AHEAD_BYTES // reader.frame_bytes, 2), _AHEAD)


def folder_of(model: PathLike) -> Path:
    """Where a model's files lie.

    Raises:
        ValueError: there are none.
    """
    if str(model) in BUILT_IN:
        return Path(__file__).parent / "assets" / str(model)
    folder = Path(model)
    if str(model) in MODELS and not folder.is_dir():
        folder = default_folder(str(model))
        if not folder.is_dir():
            raise ValueError(f"model '{model}' is not on this machine ({folder}); fetch it: lipstream pull {model}")
    if not folder.is_dir():
        names = ", ".join((*BUILT_IN, *MODELS))
        raise ValueError(f"unknown model '{model}': not a folder, and the known models are {names}")
    return folder


def engine_kind(model: PathLike, parity: bool = False) -> type[Engine]:
    """What kind of model that is: says what it refuses before anything is loaded.

    Raises:
        ValueError: there is none.
    """
    if (folder_of(model) / "codec.safetensors").exists():
        return CanvasEngine
    from lipstream.fullsize_engine import FullSizeEngine
    from lipstream.fullsize_parity import ParityEngine

    return ParityEngine if parity else FullSizeEngine


def _progress(done: int, total: int | None, started: float) -> Progress:
    fps = done / max(time.perf_counter() - started, 1e-6)
    left = None if total is None else max(0, total - done) / max(fps, 1e-6)
    return Progress("sync", done, total, fps, left)


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere it would be emulated and slow."""
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported())
