"""The pocket flavour's networks on disk: which configuration goes with which file.

codec = load_codec(folder / "codec.safetensors")
dit, guidance = load_dit(folder / "dit.safetensors")
syncnet = load_syncnet(folder / "syncnet.safetensors")
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lipstream.checkpoints.files import load_module, read_config, save_module
from lipstream.models.audio import load_speech_encoder
from lipstream.models.codec import CodecConfig, PocketCodec
from lipstream.models.dit import DiT, DiTConfig
from lipstream.models.syncnet_pocket import PocketSyncNet, PocketSyncNetConfig, SyncScorer


def load_codec(path: Path) -> PocketCodec:
    """A codec with its fitted codes and trained painter."""
    stored = read_config(path)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    codec = PocketCodec(CodecConfig(**fields))
    load_module(codec, path)
    return codec


def save_codec(codec: PocketCodec, path: Path) -> None:
    """Inverse of :func:`load_codec`."""
    save_module(codec, asdict(codec.config), path)


def save_dit(model: DiT, guidance: float, path: Path) -> None:
    """Write a DiT and the audio guidance scale that it was tuned with."""
    config: dict[str, Any] = {**model.config.to_dict(), "guidance": guidance}
    save_module(model, config, path)


def load_dit(path: Path) -> tuple[DiT, float]:
    """Inverse of :func:`save_dit`: the network and its guidance scale."""
    config = read_config(path)
    guidance = float(config.pop("guidance", 1.0))
    model = DiT(DiTConfig.from_dict(config))
    load_module(model, path)
    return model, guidance


def save_syncnet(network: PocketSyncNet, path: Path) -> None:
    """Write the pocket SyncNet; the official one is read by ``lipstream.checkpoints.encoders``."""
    save_module(network, asdict(network.config), path)


def load_syncnet(path: Path) -> PocketSyncNet:
    """Inverse of :func:`save_syncnet`; in evaluation mode, without gradients."""
    network = PocketSyncNet(PocketSyncNetConfig(**read_config(path)))
    load_module(network, path)
    return network.eval().requires_grad_(False)


def load_sync_scorer(folder: Path, network: Path | None = None) -> SyncScorer:
    """The SyncNet of a model folder (or of a file), with the codec and the speech encoder of the folder."""
    return SyncScorer(
        load_syncnet(network or folder / "syncnet.safetensors"),
        load_codec(folder / "codec.safetensors").eval().requires_grad_(False),
        load_speech_encoder(folder / "speech.safetensors"),
    )
