"""Tiny networks of the pocket kind (milliseconds, random weights) for tests of what stands on them."""

from __future__ import annotations

import torch

from lipstream.models.audio import SpeechEncoder, speech_config
from lipstream.models.codec import FLAVOURS as CODECS
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import DiT, DiTConfig
from lipstream.mouth import MouthModel


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
