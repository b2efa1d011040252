"""Key map of wav2vec2 files: the Hub's names <-> those of `transformers`' Wav2Vec2Model on a present torch.

The public file belongs to a speech recogniser: its names begin with `wav2vec2.`, its head is no part of the features,
and the positional convolution's weight norm has torch's old names. A file that `transformers` saved of the bare model
has no prefix and may have the new names. All of these are the same tensors; nothing else is taken.
"""

from __future__ import annotations

from collections.abc import Iterable

PREFIX = "wav2vec2."
RECOGNISER_HEAD = frozenset({"lm_head.weight", "lm_head.bias"})
# (name in the public file, name in the network)
WEIGHT_NORM: tuple[tuple[str, str], ...] = (
    ("encoder.pos_conv_embed.conv.weight_g", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    ("encoder.pos_conv_embed.conv.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
)


def network_name(key: str) -> str | None:
    """Name in the network of a tensor of a file; None for the recogniser's head."""
    if key in RECOGNISER_HEAD:
        return None
    bare = key.removeprefix(PREFIX)
    return dict(WEIGHT_NORM).get(bare, bare)


def public_name(name: str) -> str:
    """Name in the public file of a tensor of the network."""
    return PREFIX + {ours: theirs for theirs, ours in WEIGHT_NORM}.get(name, name)


def wav2vec2_names(keys: Iterable[str]) -> dict[str, str]:
    """Name in the file -> name in the network, without the recogniser's head.

    Raises:
        ValueError: two tensors of the file are the same tensor of the network.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for key in keys:
        name = network_name(key)
        if name is None:
            continue
        if name in taken:
            raise ValueError(f"{taken[name]} and {key} are both {name}")
        names[key], taken[name] = name, key
    return names
