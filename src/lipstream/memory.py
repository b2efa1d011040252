"""How much memory the full-size networks need, told before anything is loaded (spec section 4.6, performance.md).

A pure function of plain numbers; nothing is allocated or measured. With b bytes per number, L layers, D width, S tokens
per latent frame, P = size x size pixels of the crop:

    weights      = b x parameters of DiT and codecs (the text encoder runs once, in main memory, before the rest)
    K/V cache    = b x 2 L x (7 S) D          (window of 7 latent frames, sink and own chunk included)
    text K/V     = b x 2 L x 512 D
    codec state  = b x P x (2 x encoder's + decoder's numbers per pixel)        two encode streams, one decode stream
    activations  = b x max(20 x 3 S D, encoder's or decoder's numbers per pixel x P)      the stages take turns

The numbers per pixel, and the 20 token tensors, are counts of live tensors, taken by running the networks on the meta
device in chunks of 12 frames (tests/test_memory.py counts parameters, caches and states again, not the peaks). Kernels'
own workspace comes on top, for which `check_memory` keeps a margin. No figure here was measured on a GPU.

    need = memory_need(MemoryRequest(config=FLAVOURS["14b"], dtype=torch.bfloat16))
    check_memory(need, available_bytes)          # ValueError: what is needed, what is there, what would help
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lipstream.diffusion.lengths import CHUNK_LATENT_FRAMES
from lipstream.models.dit_config import DiTConfig

Codec = Literal["wan", "tae"]
SPEECH_BYTES = 377_607_901  # wav2vec2-base, float32

MARGIN = 0.05  # for workspace and fragmentation: a choice, not a measurement
_PARTS = ("weights", "speech", "kv_cache", "text_kv", "codec_state", "activations")
_TOKEN_TENSORS = 20  # alive at once in a block; counted: 18.5 at 1.3b, 13.6 at 14b


@dataclass(frozen=True)
class _CodecSize:
    """Parameters, and numbers per crop pixel: kept between chunks and alive at the peak of a chunk of 12 frames.

    The encoder's peak is that of passes of one latent frame and of a whole chunk.
    """

    parameters: int
    encoder_state: int
    encoder_peak: tuple[int, int]
    decoder_state: int
    decoder_peak: int


_CODECS: dict[Codec, _CodecSize] = {
    "wan": _CodecSize(126_892_531, 1404, (3745, 6762), 2365, 4317),
    "tae": _CodecSize(11_315_539, 63, (1608, 1608), 84, 1622),
}


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """What is to be run.

    Attributes:
        dtype: of DiT and codecs.
        size: of the crop, px.
        speech_bytes: of the speech network.
        encode_latent_frames: that the encoder takes a pass: 1 (parity) or a chunk.
        guided: audio guidance runs two branches through the DiT.
        takes: how many streams share the weights.
    """

    config: DiTConfig
    dtype: torch.dtype = torch.bfloat16
    size: int = 512
    encoder: Codec = "wan"
    decoder: Codec = "tae"
    speech_bytes: int = 0
    encode_latent_frames: int = CHUNK_LATENT_FRAMES
    guided: bool = False
    takes: int = 1


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes of each part."""

    request: MemoryRequest
    weights: int
    speech: int
    kv_cache: int
    text_kv: int
    codec_state: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(getattr(self, name) for name in _PARTS)

    def table(self) -> list[tuple[str, int]]:
        """(part, bytes), largest first, without empty ones: what a preflight prints."""
        rows = [(name.replace("_", " "), getattr(self, name)) for name in _PARTS if getattr(self, name)]
        return sorted(rows, key=lambda row: -row[1])


def dit_parameters(config: DiTConfig) -> int:
    """Parameters of `models.dit.DiT`, from its config alone."""
    d = config.dim

    def linear(inside: int, outside: int) -> int:
        return inside * outside + outside

    attention = 4 * linear(d, d) + 2 * d  # two norms
    block = attention + linear(d, config.ffn_dim) + linear(config.ffn_dim, d) + 6 * d
    if config.text_dim:
        block += attention + 2 * d
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    embeddings = linear(config.in_channels * patch, d) + linear(config.freq_dim, d) + linear(d, d) + linear(d, 6 * d)
    if config.text_dim:
        embeddings += linear(config.text_dim, d) + linear(d, d)
    head = linear(d, config.latent_channels * patch) + 2 * d
    first, last = config.audio_blocks
    audio = linear(4 * config.audio_dim, config.audio_hidden) + 2 * config.audio_hidden
    audio += (last - first + 1) * linear(config.audio_hidden, d)
    return config.num_layers * block + embeddings + head + audio


def memory_need(request: MemoryRequest) -> MemoryNeed:
    """Bytes for weights, caches, states and activations; the formula is the module's."""
    config, per_number = request.config, request.dtype.itemsize
    cells = request.size // 8
    _, rows, columns = config.patch
    tokens = (cells // rows) * (cells // columns)
    if config.active_tokens is not None:
        tokens = sum(map(sum, config.active_tokens))
    encoder, decoder = _CODECS[request.encoder], _CODECS[request.decoder]
    codecs = encoder.parameters + (decoder.parameters if request.decoder != request.encoder else 0)
    pair = 2 * config.num_layers * config.dim
    pixels = request.size**2
    branches = 2 if request.guided else 1
    encoder_peak = encoder.encoder_peak[request.encode_latent_frames > 1]
    denoise = branches * _TOKEN_TENSORS * config.chunk_latent_frames * tokens * config.dim
    return MemoryNeed(
        request=request,
        weights=per_number * (dit_parameters(config) + codecs),
        speech=request.speech_bytes,
        kv_cache=per_number * request.takes * pair * config.window_latent_frames * tokens,
        text_kv=per_number * request.takes * pair * config.text_len if config.text_dim else 0,
        codec_state=per_number * request.takes * pixels * (2 * encoder.encoder_state + decoder.decoder_state),
        activations=per_number * max(denoise, pixels * encoder_peak, pixels * decoder.decoder_peak),
    )


@dataclass(frozen=True)
class MemoryRow:
    """What one size takes in one precision with one decoder, bytes; all but the weights grow with the crop."""

    model: str
    dtype: str
    decoder: Codec
    weights: int
    total: int


def memory_table(configs: Mapping[str, DiTConfig], size: int = 512) -> list[MemoryRow]:
    """Needs of official sizes in every precision and with both decoders, one stream, official speech network."""
    rows = []
    for name, config in configs.items():
        for dtype in (torch.bfloat16, torch.float32):
            for decoder in get_args(Codec):
                need = memory_need(
                    MemoryRequest(config=config, dtype=dtype, size=size, decoder=decoder, speech_bytes=SPEECH_BYTES)
                )
                rows.append(MemoryRow(name, str(dtype).removeprefix("torch."), decoder, need.weights, need.total))
    return rows


def check_memory(need: MemoryNeed, available: int, *, margin: float = MARGIN) -> None:
    """Refuse what cannot fit.

    Args:
        available: free bytes of the device.
        margin: share of the need that must be free beyond it.

    Raises:
        ValueError: one line that names the need, what is there, the largest part and the option that would help.
    """
    wanted = _with_margin(need, margin)
    if wanted <= available:
        return
    part, largest = need.table()[0]
    raise ValueError(
        f"not enough memory: about {_gb(wanted)} are needed (most of it, {_gb(largest)}, for {part}), {_gb(available)} "
        f"are free; {_advice(need.request, available, margin)}"
    )


def _with_margin(need: MemoryNeed, margin: float) -> int:
    return int(need.total * (1 + margin))


def _advice(request: MemoryRequest, available: int, margin: float) -> str:
    """The first option that makes it fit; else all of them together; else how far they are from it."""
    options: list[tuple[str, dict[str, Any]]] = []
    if request.dtype.itemsize > 2:
        options.append(("choose dtype bfloat16", {"dtype": torch.bfloat16}))
    if request.decoder != "tae":
        options.append(("decode with the tiny decoder", {"decoder": "tae"}))
    if request.guided:
        options.append(("switch guidance off", {"guided": False}))
    if request.takes > 1:
        options.append(("run one stream only", {"takes": 1}))
    gathered: list[str] = []
    for advice, change in options:
        alone = dataclasses.replace(request, **change)
        if _with_margin(memory_need(alone), margin) <= available:
            return f"{advice} and it fits"
    for advice, change in options:
        gathered.append(advice)
        request = dataclasses.replace(request, **change)
        if _with_margin(memory_need(request), margin) <= available:
            return f"{', '.join(gathered)} and it fits"
    least = _gb(_with_margin(memory_need(request), margin))
    return f"no option brings it below {least}: use a smaller model or a larger device"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
