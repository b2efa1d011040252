"""`lipstream bench`: how fast a flavour runs on this machine, with definitions that can be compared.

- live FPS: pixel in to pixel out, chunks 3 and later: encode, audio, the calls, clean pass, decode, copy to the host.
- prepared FPS: the same with the source's latents given.
- core FPS, only where the codec is missing: audio pack, calls, clean pass and copying the latents.
- TTFF (time to first frame): from the first chunk's input in memory to its frames in host memory, warm; the clean pass
  is outside, decode and copy inside. The cold start, weights included, is given beside it.
- The stage table gives each stage's median and what it achieves. Every figure that this machine or version cannot give
  is None, printed as "not measured".

Wall time is what counts on an idle machine; CPU seconds stand beside it for machines that do other work, too.

    report = bench(BenchConfig(model="1.3b", layers=2, chunks=5, starts=3))
"""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lipstream.devices import usable_device
from lipstream.diffusion.rollout import Rollout
from lipstream.diffusion.sampler import Noise, chunk_generator, generated_noise
from lipstream.evaluation.bench_parts import BenchParts, Codec, load_parts, pixel_frames_of
from lipstream.media.timeline import CHUNK_PIXEL_FRAMES, MODEL_FPS
from lipstream.models.attention import Backend, available_backends, choose_backend
from lipstream.options import OptionError

STEADY_CHUNK = 2  # the third chunk is the first whose window is full


def stage_names(calls: int) -> tuple[str, ...]:
    """Names of a chunk's stages, in their order."""
    return ("encode", "audio", *(f"call {number}" for number in range(1, calls + 1)), "clean", "decode", "copy")


STAGES = stage_names(2)
DEADLINE_SECONDS = CHUNK_PIXEL_FRAMES / MODEL_FPS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure.

    Attributes:
        size: side of the picture in pixels; None is the flavour's own.
        chunks: length of a run; the first two are not counted.
        starts: repetitions of the first chunk.
        layers: only so many blocks.
        join_clean_pass: run the clean pass with the next chunk's first call.
    """

    model: str = "pocket"
    device: str = "cpu"
    dtype: str = "bfloat16"
    size: int | None = None
    chunks: int = 12
    starts: int = 20
    layers: int | None = None
    attention: Backend = "auto"
    compile: bool = False
    join_clean_pass: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.chunks <= STEADY_CHUNK:
            raise OptionError("chunks", self.chunks, f"must be at least {STEADY_CHUNK + 1}: the first two do not count")
        if self.starts < 1:
            raise OptionError("starts", self.starts, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """One row of the table; None where the stage was not measured."""

    stage: str
    median_seconds: float | None
    cpu_seconds: float | None
    flops: int | None
    flops_per_second: float | None
    flops_per_cpu_second: float | None


@dataclass(frozen=True, kw_only=True)
class SpeedFigures:
    """Chunks 3 and later of one run."""

    fps: float
    chunk_median_seconds: float
    chunk_p99_seconds: float
    chunks: int
    late_chunks: int  # slower than the 0.48 s that they show


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All figures; `as_dict` is what --json writes."""

    config: BenchConfig
    machine: dict[str, Any]
    weights: str
    attention: str
    notes: list[str]
    live: SpeedFigures | None
    prepared: SpeedFigures | None
    core: SpeedFigures | None
    ttff_median_seconds: float | None
    ttff_p99_seconds: float | None
    first_chunk_core_median_seconds: float | None  # the same without a codec, where it is missing
    first_chunk_core_p99_seconds: float | None
    starts: int
    load_seconds: float
    cold_start_seconds: float
    stages: list[StageFigures]
    dit_rate: float  # operations per second of the best calls; CPU seconds on a CPU
    linear_rate: float  # of the linear maps alone, in the same run
    chunk_flops: int
    chunk_flops_to_reference: float
    memory_bytes: dict[str, int | None]

    @property
    def dit_to_linears(self) -> float:
        """The DiT's rate over that of its own linear maps."""
        return self.dit_rate / self.linear_rate

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"dit_to_linears": self.dit_to_linears}


class Clock:
    """Wall and CPU time of stages; on a GPU a mark waits for the device, so marks are set in runs of their own."""

    def __init__(self, device: torch.device, marking: bool) -> None:
        self._device = device
        self.marking = marking or device.type == "cpu"
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self._open: tuple[str, float, float] | None = None

    def now(self) -> float:
        """Seconds, when all queued work is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def begin(self, stage: str) -> None:
        """End the stage before and begin another; without marking, nothing."""
        if self.marking:
            self.end()
            self._open = (stage, self.now(), time.process_time())

    def end(self) -> None:
        """End the open stage, if any."""
        if self._open is not None:
            stage, wall, cpu = self._open
            self.wall.setdefault(stage, []).append(self.now() - wall)
            self.cpu.setdefault(stage, []).append(time.process_time() - cpu)
            self._open = None


@dataclass
class _Run:
    """One clip from its first chunk on."""

    parts: BenchParts
    config: BenchConfig
    clock: Clock
    prepared: list[tuple[Any, Tensor]] | None = None  # (source, latents) by chunk; None: encode in the loop
    rollout: Rollout = field(init=False)
    codec: Codec | None = field(init=False)

    def __post_init__(self) -> None:
        parts, device = self.parts, self.parts.model.device
        self.codec = None if parts.make_codec is None else parts.make_codec()
        self._rows = None if parts.make_rows is None else parts.make_rows()
        self._pack = parts.model.audio_proj.stream_view(1)
        shape = (1, parts.model.config.latent_channels, 3, parts.height, parts.width)

        def noise(chunk: int) -> Noise:
            draw = generated_noise(chunk_generator(self.config.seed, chunk), shape, parts.model.dtype, device)

            def marked(call: int) -> Tensor:
                self.clock.begin(f"call {call + 1}")
                return draw(call)

            return marked

        self.rollout = Rollout(
            parts.model, height=parts.height, width=parts.width, times=parts.times, guidance=parts.guidance,
            noise=noise,
            join_clean_pass=self.config.join_clean_pass,
        )  # fmt: skip

    def input(self, chunk: int) -> tuple[Any, Tensor]:
        """The chunk's source and speech features or a stand-in, in memory before the clock starts."""
        frames = pixel_frames_of(chunk)
        source = self.codec.source(frames) if self.codec is not None else None
        features = torch.randn(frames, self.parts.model.config.audio_dim, device=self.parts.model.device)
        return source, features.to(self.parts.model.dtype)

    def step(self, chunk: int, source: Any, features: Tensor) -> Tensor:
        """One chunk up to its frames in host memory; its clean pass is owed."""
        clock, dtype = self.clock, self.parts.model.dtype
        if self.prepared is not None:
            source, latents = self.prepared[chunk]
        else:
            assert self.codec is not None
            clock.begin("encode")
            latents = self.codec.encode(source)
        clock.begin("audio")
        if self._rows is not None:
            features = self._rows(pixel_frames_of(chunk)).to(dtype)
        conditions = self.parts.conditions(latents.to(dtype), self._pack(features[None]))
        x0 = self.rollout.step(conditions)
        frames = x0
        if self.codec is not None:
            clock.begin("decode")
            frames = self.codec.decode(x0, source, latents)
        clock.begin("copy")
        shown = frames.cpu()
        clock.end()
        return shown

    def commit(self) -> None:
        """The clean pass, unless it joins the next chunk."""
        if not self.config.join_clean_pass:
            self.clock.begin("clean")
            self.rollout.commit()
            self.clock.end()


@torch.inference_mode()
def bench(config: BenchConfig, progress: Callable[[str], None] | None = None) -> BenchReport:
    """Measure; several minutes for a large model on a CPU.

    Raises:
        ValueError: a device that is not there, or parts that cannot be built (see `load_parts`).
    """
    tell = progress or (lambda _: None)
    device = usable_device(config.device)
    began = time.perf_counter()
    tell("building the networks")
    parts = load_parts(
        config.model, device=device, dtype=DTYPES[config.dtype], size=config.size, layers=config.layers,
        seed=config.seed,
    )  # fmt: skip
    if config.join_clean_pass and parts.guidance[0] != 1.0:
        raise ValueError(f"{config.model} runs with audio guidance {parts.guidance}: a clean pass cannot be joined")
    parts.model.backend = config.attention
    parts.model.fuse_projections()
    if config.compile:
        parts.model.compile_blocks()
    load_seconds = time.perf_counter() - began
    has_codec = parts.make_codec is not None

    tell("first frames")
    starts = [_start(parts, config, live=has_codec) for _ in range(config.starts + 1)]
    cold, (median, p99) = load_seconds + starts[0], (statistics.median(starts[1:]), _p99(starts[1:]))

    if config.compile or device.type != "cpu":
        tell("warming up")  # the third chunk is the first of its shapes: compilers and kernel choosers work on it
        short = dataclasses.replace(config, chunks=STEADY_CHUNK + 1)
        _speed(parts, short, _latents(parts, short), [])
    linears: list[float] = []
    live = None
    if has_codec:
        tell("live")
        live, stages = _speed(parts, config, None, linears)
    tell("prepared" if has_codec else "core")
    prepared, prepared_stages = _speed(parts, config, _latents(parts, config), linears)
    if not has_codec:
        stages = prepared_stages
    flops = _dit_flops(parts, config)
    chunk_flops, times = sum(flops.values()), stages.cpu if device.type == "cpu" else stages.wall
    reference = parts.costs.reference_chunk_flops() * (sum(_branches(parts)) + 1) / 3
    return BenchReport(
        config=config,
        machine=_machine(device),
        weights=parts.weights,
        attention=_attention(parts, config, device),
        notes=parts.notes,
        live=live,
        prepared=prepared if has_codec else None,
        core=None if has_codec else prepared,
        ttff_median_seconds=median if has_codec else None,
        ttff_p99_seconds=p99 if has_codec else None,
        first_chunk_core_median_seconds=None if has_codec else median,
        first_chunk_core_p99_seconds=None if has_codec else p99,
        starts=config.starts,
        load_seconds=load_seconds,
        cold_start_seconds=cold,
        stages=_table(parts, config, stages),
        dit_rate=chunk_flops / sum(min(times[stage]) for stage in flops),
        linear_rate=max(linears),
        chunk_flops=chunk_flops,
        chunk_flops_to_reference=chunk_flops / reference,
        memory_bytes=_memory(parts, device),
    )


def _attention(parts: BenchParts, config: BenchConfig, device: torch.device) -> str:
    """The self attention's backend in a steady chunk, and the others that there are."""
    q, k = (
        torch.empty(1, 1, frames * parts.costs.tokens_per_latent_frame, 8, dtype=parts.model.dtype, device=device)
        for frames in (parts.model.config.chunk_latent_frames, parts.model.config.window_latent_frames)
    )
    used = choose_backend(q, k) if config.attention == "auto" else config.attention
    return f"{used} (available: {', '.join(available_backends(device))})"


def _latents(parts: BenchParts, config: BenchConfig) -> list[tuple[Any, Tensor]]:
    """Sources and their latents, made before the clock starts."""
    model, codec = parts.model, None if parts.make_codec is None else parts.make_codec()
    found = []
    for chunk in range(config.chunks):
        if codec is None:
            shape = (1, model.config.latent_channels, 3, parts.height, parts.width)
            found.append((None, torch.randn(shape, device=model.device).to(model.dtype)))
        else:
            source = codec.source(pixel_frames_of(chunk))
            found.append((source, codec.encode(source)))
    return found


def _start(parts: BenchParts, config: BenchConfig, live: bool) -> float:
    """Seconds to the first chunk's frames in host memory."""
    clock = Clock(parts.model.device, marking=False)
    run = _Run(parts, config, clock, None if live else _latents(parts, config)[:1])
    source, features = run.input(0)
    began = clock.now()
    run.step(0, source, features)
    return clock.now() - began


def _speed(
    parts: BenchParts, config: BenchConfig, prepared: list[tuple[Any, Tensor]] | None, linears: list[float]
) -> tuple[SpeedFigures, Clock]:
    """Figures of the chunks, and the clock with their stages (of a second run on a GPU, where marks cost time).

    Between the chunks the linear maps are timed, so that both rates saw the same machine; they go to `linears`.
    """
    seconds: list[float] = []
    for marking in (False,) if parts.model.device.type == "cpu" else (False, True):
        clock = Clock(parts.model.device, marking)
        run = _Run(parts, config, clock, prepared)
        for chunk in range(config.chunks):
            if chunk == STEADY_CHUNK:
                clock.wall, clock.cpu = {}, {}
            source, features = run.input(chunk)
            began = clock.now()
            run.step(chunk, source, features)
            run.commit()
            if chunk >= STEADY_CHUNK and not marking:
                seconds.append(clock.now() - began)
                linears.append(_linear_rate(parts))
    return _figures(seconds), clock


def _figures(seconds: list[float]) -> SpeedFigures:
    return SpeedFigures(
        fps=CHUNK_PIXEL_FRAMES * len(seconds) / sum(seconds),
        chunk_median_seconds=statistics.median(seconds),
        chunk_p99_seconds=_p99(seconds),
        chunks=len(seconds),
        late_chunks=sum(second > DEADLINE_SECONDS for second in seconds),
    )


def _p99(values: list[float]) -> float:
    """The 99th percentile, of few values the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _dit_flops(parts: BenchParts, config: BenchConfig) -> dict[str, int]:
    """Operations of the DiT's stages in a steady chunk, guidance branches included."""
    costs, keys = parts.costs, parts.text_keys
    own, window = parts.model.config.chunk_latent_frames, parts.model.config.window_latent_frames
    call, clean = costs.call_flops(own, window, keys), costs.clean_flops(own, window, keys)
    calls = {f"call {number}": branches * call for number, branches in enumerate(_branches(parts), 1)}
    if config.join_clean_pass:
        return calls | {"call 1": calls["call 1"] + clean}
    return calls | {"clean": clean}


def _branches(parts: BenchParts) -> list[int]:
    """Of each call: a guided one has a second, without speech."""
    return [1 if scale == 1.0 else 2 for scale in parts.guidance]


def _table(parts: BenchParts, config: BenchConfig, clock: Clock) -> list[StageFigures]:
    flops: dict[str, int | None] = {**_dit_flops(parts, config), **_codec_flops(parts)}
    rows = []
    for stage in stage_names(len(parts.times) - 1):
        wall, cpu = (statistics.median(times[stage]) if stage in times else None for times in (clock.wall, clock.cpu))
        work = flops.get(stage) if wall is not None else None
        rows.append(
            StageFigures(
                stage=stage,
                median_seconds=wall,
                cpu_seconds=cpu,
                flops=work,
                flops_per_second=work / wall if work and wall else None,
                flops_per_cpu_second=work / cpu if work and cpu else None,
            )
        )
    return rows


def _codec_flops(parts: BenchParts) -> dict[str, int | None]:
    """Operations of a steady encode and decode, counted once by torch."""
    if parts.make_codec is None:
        return {}
    codec, counted = parts.make_codec(), {}
    for chunk in range(2):
        source = codec.source(pixel_frames_of(chunk))
        with FlopCounterMode(display=False) as encode:
            latents = codec.encode(source)
        with FlopCounterMode(display=False) as decode:
            codec.decode(latents.to(parts.model.dtype), source, latents)
        counted = {"encode": encode.get_total_flops() or None, "decode": decode.get_total_flops() or None}
    return counted


def _linear_rate(parts: BenchParts) -> float:
    """Operations per second (CPU seconds on a CPU) of one block's linear maps alone, on a chunk's rows."""
    model, config = parts.model, parts.model.config
    rows = config.chunk_latent_frames * parts.costs.tokens_per_latent_frame
    x = torch.randn(1, rows, config.dim, device=model.device).to(model.dtype)
    block: Any = model.blocks[0]
    maps = [block.self_attn.qkv, block.self_attn.o, block.ffn[0]]
    maps += [block.cross_attn.q, block.cross_attn.o] if config.text_dim else []
    wide = block.ffn[0](x)
    work = parts.costs.linear_flops(config.chunk_latent_frames) // config.num_layers
    repeats = max(1, 300_000_000 // work)
    now = time.process_time if model.device.type == "cpu" else Clock(model.device, marking=False).now
    began = now()
    for _ in range(repeats):
        for linear in maps:
            linear(x)
        block.ffn[2](wide)
    return repeats * work / (now() - began)


def _memory(parts: BenchParts, device: torch.device) -> dict[str, int | None]:
    cache = parts.model.make_cache(1, parts.height, parts.width)
    return {
        "dit_weights": sum(parameter.nbytes for parameter in parts.model.parameters()),
        "key_value_cache": cache.buffer_bytes,
        "key_value_cache_formula": parts.costs.cache_bytes(parts.model.dtype.itemsize),
        "text_keys_values": None if parts.text is None else sum(k.nbytes + v.nbytes for k, v in parts.text.layers),
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_on_gpu": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
