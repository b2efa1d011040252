"""What `lipstream bench` runs: a flavour's networks with shipped or random weights, and random input for them.

The codec and the speech features differ from flavour to flavour; `Codec` and `BenchParts.rows` are the two small
adapters that hide it. A part that is not there stays None and its figures are "not measured".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lipstream.devices import free_bytes
from lipstream.diffusion.lengths import CHUNK_LATENT_FRAMES
from lipstream.diffusion.schedule import STUDENT_TIMES
from lipstream.evaluation.costs import DiTCosts
from lipstream.media.timeline import CHUNK_PIXEL_FRAMES, FIRST_CHUNK_PIXEL_FRAMES, MODEL_FPS, SPEECH_RATE
from lipstream.memory import dit_parameters
from lipstream.models.audio import SpeechEncoder
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import FLAVOURS, Conditions, DiT, DiTConfig
from lipstream.models.tae import TAE, TAE_FLAVOURS
from lipstream.models.wan_vae import WAN_VAE_FLAVOURS, WanVAE
from lipstream.streaming.kv_cache import TextMemory

PIXELS_PER_CELL = 8
PROMPT_ROWS = 30  # length of a usual prompt in tokens


class Codec(Protocol):
    """Pixels to latents and back, with its own memory between chunks."""

    def source(self, pixel_frames: int) -> Any:
        """Random input for one chunk, in memory."""
        ...

    def encode(self, source: Any) -> Tensor:
        """Latents [1, C, T, H, W] of the source: what the conditions are made of."""
        ...

    def decode(self, x0: Tensor, source: Any, latents: Tensor) -> Tensor:
        """Pictures of a generated chunk, on the codec's device."""
        ...


@dataclass(kw_only=True)
class BenchParts:
    """Networks and input of one benchmark.

    Attributes:
        make_codec: a codec with a fresh memory, or None where the flavour's codec is not there.
        make_rows: gives a function that turns one chunk's speech into feature rows, or None where random rows stand
            in for them.
        notes: what the figures leave out or assume, one sentence each.
    """

    model: DiT
    height: int
    width: int
    times: tuple[float, ...]
    guidance: tuple[float, ...]
    weights: str
    text: TextMemory | None
    make_codec: Callable[[], Codec] | None
    make_rows: Callable[[], Callable[[int], Tensor]] | None
    notes: list[str]

    @property
    def costs(self) -> DiTCosts:
        """The DiT's formulas at this size."""
        return DiTCosts(self.model.config, self.model.tokens_per_latent_frame(self.height, self.width))

    @property
    def text_keys(self) -> int:
        """Keys that the text attention reads."""
        return 0 if self.text is None else self.text.layers[0][0].shape[2]

    def conditions(self, latents: Tensor, audio: Tensor) -> Conditions:
        """Conditions of one chunk: its latents serve as masked video and as reference sequence."""
        mask = torch.zeros(1, 1, 1, self.height, self.width, dtype=latents.dtype, device=latents.device)
        mask[..., self.height // 2 :, :] = 1
        return Conditions(
            reference=latents[:, :, :1],
            mask=mask,
            masked_video=latents * (1 - mask),
            ref_sequence=latents,
            audio=audio,
            text=self.text,
        )


def load_parts(
    flavour: str, *, device: torch.device, dtype: torch.dtype, size: int | None, layers: int | None, seed: int = 0
) -> BenchParts:
    """Build a flavour for the benchmark.

    Args:
        size: side of the square picture in pixels; None is the flavour's own.
        layers: only so many blocks, for a machine that cannot hold all.

    Raises:
        ValueError: no such flavour, a size that it cannot have, or not enough memory.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"unknown model {flavour!r}; known: {', '.join(FLAVOURS)}")
    torch.manual_seed(seed)
    if flavour == "pocket":
        return _pocket(device, dtype, size, layers)
    size = size or (64 if flavour == "test" else 512)
    if size % (2 * PIXELS_PER_CELL):
        raise ValueError(f"size must be a multiple of {2 * PIXELS_PER_CELL} pixels, got {size}")
    config, notes = _with_layers(FLAVOURS[flavour], layers)
    cells = size // PIXELS_PER_CELL
    _check_memory(config, cells, device, dtype)
    model = random_dit(config, device, dtype)
    text = torch.zeros(1, config.text_len, config.text_dim, dtype=dtype, device=device)
    text[:, :PROMPT_ROWS] = torch.randn(1, min(PROMPT_ROWS, config.text_len), config.text_dim)
    notes.append(f"prompt of {min(PROMPT_ROWS, config.text_len)} rows, its embedding given")
    notes.append("speech features are random rows: the speech encoder is not measured")
    make_codec = None if flavour == "test" else wan_codec(size, device, dtype, notes)
    return BenchParts(
        model=model, height=cells, width=cells, times=STUDENT_TIMES, guidance=(1.0, 1.0), weights="random",
        text=model.prepare_text(text), make_codec=make_codec, make_rows=None, notes=notes,
    )  # fmt: skip


def random_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """A DiT with random weights of a usual scale, made in place: speed does not depend on their values."""
    with torch.device("meta"):
        model = DiT(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        bound = 1 / math.sqrt(parameter.shape[-1] if parameter.ndim > 1 else parameter.numel())
        torch.nn.init.uniform_(parameter, -bound, bound)
    return model


def _with_layers(config: DiTConfig, layers: int | None) -> tuple[DiTConfig, list[str]]:
    if layers is None or layers == config.num_layers:
        return config, []
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"layers must be 1 to {config.num_layers}, got {layers}")
    first, last = (min(block, layers - 1) for block in config.audio_blocks)
    note = f"{layers} of {config.num_layers} layers: rates are those of the blocks, FPS is not the whole model's"
    return dataclasses.replace(config, num_layers=layers, audio_blocks=(first, last)), [note]


def _check_memory(config: DiTConfig, cells: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse before the machine does."""
    tokens = (cells // config.patch[1]) * (cells // config.patch[2])
    activations = 3 * tokens * (config.ffn_dim + 8 * config.dim) * dtype.itemsize
    need = dit_parameters(config) * dtype.itemsize + DiTCosts(config, tokens).cache_bytes(dtype.itemsize) + activations
    free = free_bytes(device)
    if free is not None and need > free:
        raise ValueError(
            f"needs about {need / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free: use --layers to run fewer blocks"
        )


# ------------------------------------------------------------------------ codecs


class PocketBenchCodec:
    """The pocket codec on random canvases."""

    def __init__(self, codec: PocketCodec) -> None:
        self._codec = codec.stream_view(1)

    def source(self, pixel_frames: int) -> Any:
        config = self._codec.config
        field, side = config.grid * config.cell_field, config.grid * config.cell_px
        device = self._codec.mouth_mask().device
        return (
            torch.randn(1, pixel_frames, field, field, 2, device=device),
            torch.rand(1, pixel_frames, 3, side, side, device=device),
        )

    def encode(self, source: Any) -> Tensor:
        latents: Tensor = self._codec.encode(*source)
        return latents

    def decode(self, x0: Tensor, source: Any, latents: Tensor) -> Tensor:
        decoded = self._codec.decode(x0.float(), latents, source[1])
        return (decoded.paint.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


class WanBenchCodec:
    """The official pair: the Wan VAE encodes source and masked source, the tiny auto-encoder decodes."""

    def __init__(self, vae: Any, tae: Any, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._source, self._masked, self._tae = vae.stream_view(1), vae.stream_view(1), tae.stream_view(1)
        self._size, self._device, self._dtype = size, device, dtype

    def source(self, pixel_frames: int) -> Any:
        shape = (1, 3, pixel_frames, self._size, self._size)
        return torch.rand(shape, device=self._device, dtype=self._dtype) * 2 - 1

    def encode(self, source: Any) -> Tensor:
        masked = source.clone()
        masked[..., self._size // 2 :, :] = 0
        self._masked.encode(masked)
        latents: Tensor = self._source.encode(source)
        return latents

    def decode(self, x0: Tensor, source: Any, latents: Tensor) -> Tensor:
        pictures: Tensor = self._tae.decode(x0.to(self._dtype))
        return (pictures.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def wan_codec(size: int, device: torch.device, dtype: torch.dtype, notes: list[str]) -> Callable[[], WanBenchCodec]:
    """Wan VAE encoder (a chunk a pass, as the product runs it) and TAE decoder with random weights."""
    vae = WanVAE(WAN_VAE_FLAVOURS["official"]).to(device, dtype).requires_grad_(False)
    vae.encode_latent_frames = CHUNK_LATENT_FRAMES
    tae = TAE(TAE_FLAVOURS["official"]).to(device, dtype).requires_grad_(False)
    notes.append("encode is two streams of the Wan VAE (source and masked source), decode is the TAE, random weights")
    return lambda: WanBenchCodec(vae, tae, size, device, dtype)


def _pocket(device: torch.device, dtype: torch.dtype, size: int | None, layers: int | None) -> BenchParts:
    from lipstream.mouth import MouthModel

    mouth = MouthModel.load(Path(__file__).parent.parent / "assets" / "pocket", dtype)
    side = mouth.codec.config.grid * mouth.codec.config.cell_px
    if size not in (None, side):
        raise ValueError(f"the pocket model has canvases of {side} pixels, size {size} is not for it")
    model, weights = mouth.dit.to(device), "shipped"
    config, notes = _with_layers(model.config, layers)
    if notes:
        model, weights = DiT(config).eval().requires_grad_(False).to(device, dtype), "random"
    notes.append("face tracking and compositing are not in these figures; `lipstream evaluate speed` has them")
    notes.append(f"{len(mouth.times) - 1} call a chunk; audio guidance {mouth.guidance}: it has two branches")
    codec = mouth.codec.to(device)
    speech = mouth.speech.to(device)
    return BenchParts(
        model=model, height=mouth.codec.config.grid, width=mouth.codec.config.grid, times=mouth.times,
        guidance=mouth.guidance_of_calls,
        weights=weights, text=None, make_codec=lambda: PocketBenchCodec(codec),
        make_rows=lambda: speech_rows(speech, device), notes=notes,
    )  # fmt: skip


def speech_rows(speech: SpeechEncoder, device: torch.device) -> Callable[[int], Tensor]:
    """Streaming feature rows of noise: rows(pixel frames) -> [pixel frames, D], the encoder's look-ahead read first."""
    encoder = speech.stream_view(1)
    kept = torch.zeros(0, encoder.config.width, device=device)

    def rows(pixel_frames: int) -> Tensor:
        nonlocal kept
        while len(kept) < pixel_frames:
            samples = torch.randn(1, pixel_frames * SPEECH_RATE // MODEL_FPS, device=device) * 0.1
            kept = torch.cat((kept, encoder(samples)[0]))
        found, kept = kept[:pixel_frames], kept[pixel_frames:]
        return found

    return rows


def pixel_frames_of(chunk: int) -> int:
    """Pixel frames of a chunk: 9, then 12."""
    return FIRST_CHUNK_PIXEL_FRAMES if chunk == 0 else CHUNK_PIXEL_FRAMES
