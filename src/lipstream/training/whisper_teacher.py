"""The teacher of the speech encoder: the encoder of whisper-tiny.en in plain torch, from a CTranslate2 file.

Needed at training time only (`lipstream.training.speech`); nothing of it is shipped.

    features = WhisperTeacher(Path("model.bin"))(samples)       # [n] at 16 kHz -> [rows, 768]
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lipstream.models.audio import SAMPLE_RATE, SAMPLES_PER_ROW

Array = npt.NDArray[Any]


def read_ctranslate2(path: Path) -> dict[str, Array]:
    """All variables of a CTranslate2 `model.bin`, by name."""
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    variables: dict[str, Array] = {}
    with path.open("rb") as file:
        _unpack(file, "I")  # format version
        _name(file)  # model family
        _, count = _unpack(file, "II")
        for _ in range(count):
            name = _name(file)
            shape = _unpack(file, "I" * _unpack(file, "B")[0])
            kind, size = _unpack(file, "BI")
            variables[name] = np.frombuffer(file.read(size), types[kind]).reshape(shape)
    return variables


def _unpack(file: BinaryIO, layout: str) -> tuple[int, ...]:
    return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))


def _name(file: BinaryIO) -> str:
    return file.read(_unpack(file, "H")[0]).rstrip(b"\0").decode()


class WhisperTeacher:
    """The encoder of whisper-tiny.en in plain torch: samples [n] -> features [r, 768], two 20 ms steps a row."""

    heads, layers = 6, 4

    def __init__(self, path: Path) -> None:
        variables = read_ctranslate2(path)
        self.weights = {
            name.removeprefix("encoder/"): torch.from_numpy(value.astype(np.float32))
            for name, value in variables.items()
            if name.startswith("encoder/")
        }
        self.filters = _slaney_filters(80)

    def _mel(self, samples: Tensor) -> Tensor:
        spectrum = torch.stft(samples, 400, 160, window=torch.hann_window(400), return_complex=True)
        mel = (self.filters @ spectrum[:, :-1].abs().square()).clamp_min(1e-10).log10()
        return (mel.clamp_min(float(mel.max()) - 8.0) + 4.0) / 4.0

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}/gamma"], self.weights[f"{name}/beta"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}/weight"], self.weights.get(f"{name}/bias"))

    def _conv(self, x: Tensor, name: str, stride: int) -> Tensor:
        weight, bias = self.weights[f"{name}/weight"], self.weights[f"{name}/bias"]
        return F.gelu(F.conv1d(x, weight, bias, stride=stride, padding=1))

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Features of one utterance of at most 30 s; a last unfinished row is completed with silence."""
        samples = F.pad(samples, (0, -len(samples) % SAMPLES_PER_ROW))
        x = rearrange(self._conv(self._conv(self._mel(samples)[None], "conv1", 1), "conv2", 2), "1 c t -> 1 t c")
        x = x + self.weights["position_encodings/encodings"][: x.shape[1]]
        for layer in range(self.layers):
            name = f"layer_{layer}/self_attention"
            qkv = self._linear(self._norm(x, f"{name}/layer_norm"), f"{name}/linear_0")
            q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
            mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)")
            x = x + self._linear(mixed, f"{name}/linear_1")
            name = f"layer_{layer}/ffn"
            hidden = F.gelu(self._linear(self._norm(x, f"{name}/layer_norm"), f"{name}/linear_0"))
            x = x + self._linear(hidden, f"{name}/linear_1")
        return rearrange(self._norm(x, "layer_norm"), "1 (r two) c -> r (two c)", two=2)


def _slaney_filters(bands: int) -> Tensor:
    """The teacher's own mel filters (linear below 1 kHz, logarithmic above, unit area): [bands, 201]."""
    mel = np.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), bands + 2)
    corners = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))
    bins = np.linspace(0, SAMPLE_RATE / 2, 201)
    rising = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    weights = np.maximum(np.minimum(rising, falling), 0) * (2 / (corners[2:] - corners[:-2]))[:, None]
    return torch.from_numpy(weights).float()
