"""Key maps of wav2vec2 files: the Hub's names <-> those of `SpeechFeatures` (`network.` and `transformers`' names).

The public file belongs to a speech recogniser: its names begin with `wav2vec2.`, its head is no part of the features,
and the positional convolution's weight norm has torch's old names. A file that `transformers` saved of the bare model
has no prefix and may have the new names. All of these are the same tensors; nothing else is taken.

    PUBLIC.to_ours("wav2vec2.masked_spec_embed")       # "network.masked_spec_embed"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lipstream.checkpoints.keys import KeyMap
from lipstream.models.wav2vec_features import FLAVOURS, Wav2VecConfig

RECOGNISER_HEAD = frozenset({"lm_head.weight", "lm_head.bias"})
OURS = "network."
_LAYER = "encoder.layers.{i}."
_NAMES = (
    "masked_spec_embed",
    "feature_extractor.conv_layers.{i}.conv.weight",
    "feature_extractor.conv_layers.{i}.layer_norm.{wb}",
    "feature_projection.layer_norm.{wb}",
    "feature_projection.projection.{wb}",
    "encoder.pos_conv_embed.conv.bias",
    "encoder.layer_norm.{wb}",
    *(f"{_LAYER}attention.{part}_proj.{{wb}}" for part in ("q", "k", "v", "out")),
    *(f"{_LAYER}{part}.{{wb}}" for part in ("layer_norm", "final_layer_norm")),
    *(f"{_LAYER}feed_forward.{part}.{{wb}}" for part in ("intermediate_dense", "output_dense")),
)
_WEIGHT_NORM = "encoder.pos_conv_embed.conv."
_OLD, _NEW = ("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")


def _key_map(name: str, prefix: str, norm: tuple[str, str]) -> KeyMap:
    plain = ((prefix + key, OURS + key) for key in _NAMES)
    normed = ((prefix + _WEIGHT_NORM + a, OURS + _WEIGHT_NORM + b) for a, b in zip(norm, _NEW, strict=True))
    return KeyMap(name, (*plain, *normed))


PUBLIC = _key_map("recogniser", "wav2vec2.", _OLD)
FORMATS = (
    PUBLIC,
    _key_map("recogniser, new norm", "wav2vec2.", _NEW),
    _key_map("bare, old norm", "", _OLD),
    _key_map("bare", "", _NEW),
    _key_map("lipstream", OURS, _NEW),
)


def official_config() -> dict[str, Any]:
    """Sizes of wav2vec2-base-960h: shapes do not tell heads and strides, and loading is strict."""
    return asdict(FLAVOURS["official"])


def hub_config(path: Path) -> Mapping[str, Any] | None:
    """Sizes by the config.json of a Hub folder; None where there is none (`lipstream pull` fetches weights alone).

    Raises:
        ValueError: not readable, or another kind of network.
    """
    about = path / "config.json"
    if not about.is_file():
        return None
    try:
        data = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about}: not readable JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{about}: holds no configuration")
    return asdict(Wav2VecConfig.from_hub(data))
