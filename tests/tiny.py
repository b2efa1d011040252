"""Tiny networks of the pocket kind (milliseconds, random weights) for tests of what stands on them."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.faces.canvas import FaceCanvas
from lipstream.inside import LipRuler
from lipstream.models.audio import SpeechEncoder, speech_config
from lipstream.models.codec import FLAVOURS as CODECS
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import DiT, DiTConfig
from lipstream.mouth import MouthModel
from lipstream.training.codec import Sampler
from lipstream.training.coded import Coded, code_clip
from lipstream.training.samples import Clip


def tiny_codec(seed: int = 0) -> PocketCodec:
    """A codec with random orthonormal codes, so that encode and decode are consistent."""
    torch.manual_seed(seed)
    codec = PocketCodec(CODECS["test"])
    for code in (codec.shape, codec.texture):
        code.basis.copy_(torch.linalg.qr(torch.randn_like(code.basis))[0])
    return codec.eval()


def tiny_dit(codec: PocketCodec, seed: int = 0) -> DiT:
    """A DiT for that codec whose head is not zero, so that its output depends on everything."""
    torch.manual_seed(seed)
    model = DiT(
        DiTConfig(
            dim=32,
            ffn_dim=48,
            num_heads=2,
            num_layers=2,
            latent_channels=codec.config.latent_channels,
            freq_dim=16,
            text_dim=0,
            audio_dim=16,
            audio_hidden=8,
            audio_blocks=(0, 1),
            prediction="reference_residual",
            input_gate=True,
            keep_known=True,
            active_tokens=((False,) * 5, *((True,) * 5 for _ in range(4))),
        )
    )
    torch.nn.init.normal_(model.head.head.weight, std=0.02)
    return model


def tiny_mouth_model(seed: int = 0, guidance: float = 1.0) -> MouthModel:
    """Everything that a take needs."""
    codec = tiny_codec(seed)
    torch.manual_seed(seed)
    return MouthModel(tiny_dit(codec, seed), codec, SpeechEncoder(speech_config("test")), guidance)


def made_up_clip(name: str = "synth_0", frames: int = 40, seed: int = 0) -> Clip:
    """A clip whose face swings slowly before noise that stands for speech."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(frames) / 3)[:, None, None, None]
    fields = (rng.normal(size=(1, 20, 20, 2)) + wave * rng.normal(size=(1, 20, 20, 2))).astype(np.float16)
    base = rng.integers(0, 200, (1, 160, 160, 3))
    textures = np.clip(base + 30 * wave + rng.integers(0, 5, (frames, 160, 160, 3)), 0, 255).astype(np.uint8)
    speech = rng.integers(-3000, 3000, frames * 640).astype(np.int16)
    return Clip(name, fields, textures, np.ones(frames, bool), speech)


def coded_clips(count: int, frames: int) -> list[Coded]:
    """Made-up clips as the latents of `tiny_codec`, with made-up speech rows in two voices."""
    codec = tiny_codec()
    clips = [made_up_clip(f"synth_{i}", frames, seed=i) for i in range(count)]
    sampler, ruler = Sampler(clips, seed=0), LipRuler(FaceCanvas())
    return [
        code_clip(codec, sampler, c, torch.randn(2, len(c), 16).half(), plain=i == 0, ruler=ruler)
        for i, c in enumerate(clips)
    ]


def assert_learns(model: nn.Module, loss: Callable[[int], tuple[Tensor, Any]], steps: int = 60) -> None:
    """Adam on ``loss`` takes at least a fifth off it."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(steps):
        value, _ = loss(step)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def write_noise(path: Path, samples: int) -> Path:
    """A sound file of 16 kHz noise."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.random.default_rng(0).normal(0, 3000, samples).astype("<i2").tobytes())
    return path
