"""Helpers of the golden tests: the tiny network, its vectors and the polarity of its mask."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from lipstream.models.dit import Conditions, DiT, DiTConfig

FOLDER = Path(__file__).parent / "golden"
GOLDEN_CONFIG = DiTConfig(
    dim=256, ffn_dim=128, num_heads=2, num_layers=6, text_dim=64, audio_dim=80, audio_blocks=(2, 3)
)


@cache
def vectors(name: str) -> dict[str, Tensor]:
    """Tensors of one golden file."""
    return load(lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes()))


def golden_model() -> DiT:
    """The tiny network with the reference's weights, loaded strictly."""
    model = DiT(GOLDEN_CONFIG)
    model.load_state_dict({key: value.float() for key, value in vectors("dit_weights").items()}, strict=True)
    return model.requires_grad_(False)


def golden_conditions(data: dict[str, Tensor], model: DiT) -> Conditions:
    """Conditions of a golden case; the stored mask is 1 = keep."""
    return Conditions(
        reference=data["in.ref_latent"],
        mask=(1 - data["in.mask"])[None, None, None],
        masked_video=data["in.masked_video"],
        ref_sequence=data["in.ref_sequence"],
        audio=model.pack_audio(data["in.audio_emb"]),
        text=data["in.text_embeds"],
    )


def random_model(config: DiTConfig, seed: int = 0) -> DiT:
    """A network whose head is not zero, so that its output says something."""
    torch.manual_seed(seed)
    model = DiT(config).requires_grad_(False)
    torch.nn.init.normal_(model.head.head.weight, std=0.2)
    return model


def random_conditions(
    config: DiTConfig, batch: int, latent_frames: int, height: int, width: int, seed: int = 1
) -> Conditions:
    """Normal latents, a mask of the lower half, audio rows and text if the network reads any."""
    torch.manual_seed(seed)
    c = config.latent_channels
    mask = torch.zeros(1, 1, 1, height, width)
    mask[..., height // 2 :, :] = 1
    return Conditions(
        reference=torch.randn(batch, c, 1, height, width),
        mask=mask,
        masked_video=torch.randn(batch, c, latent_frames, height, width),
        ref_sequence=torch.randn(batch, c, latent_frames, height, width),
        audio=torch.randn(batch, latent_frames, config.audio_hidden),
        text=torch.randn(batch, config.text_len, config.text_dim) if config.text_dim else None,
    )


def assert_close(ours: Tensor, golden: Tensor, relative: float) -> None:
    """Largest difference relative to the largest golden value; latents are stored with every fourth channel."""
    if ours.shape != golden.shape:
        ours = ours[:, ::4]
    assert ours.shape == golden.shape
    error = (ours - golden).abs().max() / golden.abs().max()
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
