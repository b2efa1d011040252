"""What `taew2_1.pth` needs before it loads: its names are ours, but growing layers may be larger than they are used.

The family's files share weights between temporal rates: a layer that can make more frames of one than this network
asks of it has more output channels, and only the last ones are used.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lipstream.models.tae import TAE, TemporalGrow


def trim_grown_channels(tensors: Mapping[str, Tensor], model: TAE) -> dict[str, Tensor]:
    """The tensors of a file with the surplus output channels of `TemporalGrow` layers left out; all else unchanged.

    Only whole multiples of the needed channels are trimmed; anything else is left for the strict loader to refuse.
    """
    trimmed = dict(tensors)
    for name, layer in model.named_modules():
        key = f"{name}.conv.weight"
        if isinstance(layer, TemporalGrow) and key in trimmed:
            needed, held = layer.conv.weight.shape[0], trimmed[key].shape[0]
            if held > needed and held % needed == 0:
                trimmed[key] = trimmed[key][-needed:]
    return trimmed
