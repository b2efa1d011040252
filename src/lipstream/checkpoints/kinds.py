"""The registry of networks that have checkpoints: what builds them, and how foreign files name their tensors.

A new kind is a `Kind` in its `keys_*.py` and one line in `KINDS`:

    KINDS = _by_name(STUDENT, TEACHER, WAN_VAE)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lipstream.checkpoints import keys_umt5, keys_wav2vec2
from lipstream.checkpoints.keys import KeyMap, best_map
from lipstream.checkpoints.keys_codecs import (
    TAE_OFFICIAL,
    VAE_DIFFUSERS,
    VAE_OFFICIAL,
    infer_tae,
    infer_vae,
    trim_grown_channels,
)
from lipstream.checkpoints.keys_dit import FORMATS, infer_config
from lipstream.checkpoints.keys_syncnet import SYNCNET, infer_syncnet, with_counters
from lipstream.checkpoints.sources import TensorSource
from lipstream.checkpoints.strict import CheckpointError, TensorSpec
from lipstream.models.dit import DiT
from lipstream.models.dit_config import DiTConfig
from lipstream.models.syncnet import SyncNet, SyncNetConfig
from lipstream.models.tae import TAE, TAEConfig
from lipstream.models.text import PromptEncoder, TextConfig
from lipstream.models.wan_vae import WanVAE, WanVAEConfig
from lipstream.models.wav2vec_features import SpeechFeatures, Wav2VecConfig


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of network.

    Attributes:
        name: as `--kind` and config.json say it.
        build: network from its configuration as plain data; buffers that are not in the state must be made on a real
            device, since it is called under the meta device.
        infer: configuration as plain data from a complete set of tensors under our names.
        formats: key maps of foreign checkpoints, tried together: the one that knows most keys is taken.
        ignored: foreign keys that are left out knowingly (position tables, heads of other tasks).
        licence: of the released weights, recorded unless the caller knows better.
        tied: second names of parameters, which files do not hold -> the name that they do.
        fit: brings a source nearer to the needed tensors where the released file is known to differ without effect.
        describe: configuration by what lies in a foreign folder beside the tensors, where shapes do not tell all.
    """

    name: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    infer: Callable[[Mapping[str, TensorSpec]], Mapping[str, Any]]
    formats: tuple[KeyMap, ...]
    ignored: frozenset[str] = frozenset()
    licence: str = "unknown"
    tied: Mapping[str, str] = field(default_factory=dict)
    fit: Callable[[TensorSource, Mapping[str, TensorSpec]], TensorSource] = lambda source, needed: source
    describe: Callable[[Path], Mapping[str, Any] | None] = lambda path: None

    def in_our_names(self, source: TensorSource) -> tuple[TensorSource, KeyMap]:
        """The tensors of a foreign source under our names; unknown keys keep theirs, for the strict check to list."""
        keys = [key for key in source.specs if key not in self.ignored]
        key_map = best_map(self.formats, keys)
        renamed = key_map.rename(keys)
        known = set(renamed.values())
        strangers = {key: key for key in keys if key not in known}
        shadowed = sorted(strangers.keys() & renamed.keys())
        if shadowed:
            raise CheckpointError(f"{source.label}: {shadowed[0]} is there under two names")
        return source.renamed(renamed | strangers), key_map

    def share_known(self, source: TensorSource) -> float:
        """How much of a source this kind's key maps know, 0 ... 1."""
        keys = [key for key in source.specs if key not in self.ignored]
        known = max((sum(m.to_ours(key) is not None for key in keys) for m in self.formats), default=0)
        return known / max(1, len(keys))


def _by_name(*kinds: Kind) -> dict[str, Kind]:
    return {kind.name: kind for kind in kinds}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration after a trip through JSON: lists are tuples again."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _dit_kind(name: str) -> Kind:
    return Kind(
        name=name,
        build=lambda config: DiT(DiTConfig.from_dict(config)),
        infer=lambda specs: infer_config(specs).to_dict(),
        formats=FORMATS,
        licence="Apache-2.0",
    )


# One network; the name tells what it was trained to do (and the sampler how to run it).
STUDENT, TEACHER = _dit_kind("student"), _dit_kind("teacher")
WAN_VAE = Kind(
    name="wan-vae",
    build=lambda config: WanVAE(WanVAEConfig.from_dict(config)),
    infer=infer_vae,
    formats=(VAE_OFFICIAL, VAE_DIFFUSERS),
    licence="Apache-2.0",
)
TINY_AUTOENCODER = Kind(
    name="tae",
    build=lambda config: TAE(TAEConfig.from_dict(config)),
    infer=infer_tae,
    formats=(TAE_OFFICIAL,),
    licence="MIT",
    fit=trim_grown_channels,
)
SPEECH = Kind(
    name="wav2vec2",
    build=lambda config: SpeechFeatures(Wav2VecConfig(**_fields(config))),
    infer=lambda specs: keys_wav2vec2.official_config(),
    formats=keys_wav2vec2.FORMATS,
    ignored=keys_wav2vec2.RECOGNISER_HEAD,
    licence="Apache-2.0",
    describe=keys_wav2vec2.hub_config,
)
TEXT = Kind(
    name="umt5",
    build=lambda config: PromptEncoder(TextConfig(**config)),
    infer=keys_umt5.infer_umt5,
    formats=keys_umt5.FORMATS,
    licence="Apache-2.0",
    tied=keys_umt5.TIED,
)
SYNC = Kind(
    name="syncnet",
    build=lambda config: SyncNet(SyncNetConfig(**_fields(config))),
    infer=infer_syncnet,
    formats=(SYNCNET,),
    fit=with_counters,
)

KINDS = _by_name(STUDENT, TEACHER, WAN_VAE, TINY_AUTOENCODER, SPEECH, TEXT, SYNC)


def kind_named(name: str) -> Kind:
    """A kind by name.

    Raises:
        ValueError: there is none; the names are listed.
    """
    if name not in KINDS:
        raise ValueError(f"unknown kind '{name}': there are {', '.join(KINDS)}")
    return KINDS[name]
