"""Key maps and sizes of the official image codecs: `Wan2.1_VAE.pth`, its diffusers twin, and `taew2_1.pth`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lipstream.checkpoints.keys import KeyMap
from lipstream.checkpoints.keys_wan_vae import official_to_diffusers
from lipstream.checkpoints.sources import TensorSource
from lipstream.checkpoints.strict import TensorSpec
from lipstream.models.tae import TAE, TAE_FLAVOURS, TAEConfig
from lipstream.models.wan_vae import WAN_VAE_FLAVOURS, WanVAEConfig

_DOWNSAMPLES = "encoder.downsamples."


def _tae_names() -> list[str]:
    with torch.device("meta"):
        return list(TAE(TAE_FLAVOURS["official"]).state_dict())


_VAE_NAMES = official_to_diffusers(WAN_VAE_FLAVOURS["official"])
VAE_OFFICIAL = KeyMap("wan", tuple((name, name) for name in _VAE_NAMES))
VAE_DIFFUSERS = KeyMap("diffusers", tuple((theirs, ours) for ours, theirs in _VAE_NAMES.items()))
TAE_OFFICIAL = KeyMap("taehv", tuple((name, name) for name in _tae_names()))


def infer_vae(specs: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """Sizes of a Wan VAE from its tensors.

    Raises:
        ValueError: it is none.
    """
    first = specs.get("encoder.conv1.weight")
    parts = {int(name[len(_DOWNSAMPLES) :].split(".")[0]) for name in specs if name.startswith(_DOWNSAMPLES)}
    if first is None or not parts:
        raise ValueError("no tensor encoder.conv1.weight or encoder.downsamples.*: not a Wan VAE")
    levels = len(WanVAEConfig(width=8).multipliers)
    blocks = (max(parts) + 1 - (levels - 1)) // levels
    return WanVAEConfig(width=first.shape[0], blocks_per_level=blocks).to_dict()


def trim_grown_channels(source: TensorSource, needed: Mapping[str, TensorSpec]) -> TensorSource:
    """The source without the surplus output channels of the TAE's growing layers; all else unchanged.

    Files of the TAE's family share weights between temporal rates: a layer that can make more frames of one than this
    network asks of it has more output channels, and only the last ones are used. Only whole multiples of the needed
    channels are trimmed; anything else is left for the strict check to refuse.
    """
    specs = dict(source.specs)
    for name in (f"decoder.{at}.conv.weight" for at in (7, 13, 19)):
        if name in specs and name in needed:
            held, wanted = specs[name].shape[0], needed[name].shape[0]
            if held > wanted and held % wanted == 0:
                specs[name] = TensorSpec((wanted, *specs[name].shape[1:]), specs[name].dtype)

    def read(name: str) -> torch.Tensor:
        return source.read(name)[-specs[name].shape[0] :] if specs[name] != source.specs[name] else source.read(name)

    return source if specs == source.specs else dataclasses.replace(source, specs=specs, read=read)


def infer_tae(specs: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """Sizes of a TAE from its tensors.

    Raises:
        ValueError: it is none.
    """
    convolutions = ("encoder.0", "decoder.1", "decoder.8", "decoder.14", "decoder.20", "encoder.17")
    missing = [name for name in convolutions if f"{name}.weight" not in specs]
    if missing:
        raise ValueError(f"no tensor {missing[0]}.weight: not a TAE of the Wan 2.1 family")
    width, *decoder, latent = (specs[f"{name}.weight"].shape[0] for name in convolutions)
    widths = (decoder[0], decoder[1], decoder[2], decoder[3])
    return TAEConfig(encoder_width=width, decoder_widths=widths, latent_channels=latent).to_dict()
