"""Names and sizes of `syncnet_v2.model`: its names are ours, and it lacks the batch norms' counters.

infer_syncnet(specs)        # widths of the two towers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lipstream.checkpoints.keys import KeyMap
from lipstream.checkpoints.sources import TensorSource, from_tensors, join
from lipstream.checkpoints.strict import TensorSpec
from lipstream.models.syncnet import SyncNetConfig

COUNTER = ".num_batches_tracked"  # of batch norms; without effect, and older than syncnet_v2.model
_CONVOLUTIONS = (0, 4, 8, 11, 14, 18)
_GROUPS = ("netcnnlip", "netcnnaud", "netfclip", "netfcaud")
_PARTS = ("{wb}", "running_mean", "running_var", "num_batches_tracked")
SYNCNET = KeyMap("syncnet", tuple((f"{g}.{{i}}.{p}", f"{g}.{{i}}.{p}") for g in _GROUPS for p in _PARTS))


def infer_syncnet(specs: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """Widths of both towers from their tensors.

    Raises:
        ValueError: it is no SyncNet.
    """

    def widths(names: list[str]) -> list[int]:
        missing = [name for name in names if name not in specs]
        if missing:
            raise ValueError(f"no tensor {missing[0]}: not a SyncNet")
        return [specs[name].shape[0] for name in names]

    lip, audio = (widths([f"{tower}.{at}.weight" for at in _CONVOLUTIONS]) for tower in ("netcnnlip", "netcnnaud"))
    hidden, vector = widths(["netfclip.0.weight", "netfclip.3.weight"])
    return asdict(SyncNetConfig(lip_channels=_six(lip), audio_channels=_six(audio), hidden=hidden, vector=vector))


def _six(widths: list[int]) -> tuple[int, int, int, int, int, int]:
    a, b, c, d, e, f = widths
    return a, b, c, d, e, f


def with_counters(source: TensorSource, needed: Mapping[str, TensorSpec]) -> TensorSource:
    """The source with zeros for the counters that it does not have."""
    absent = [name for name in needed if name.endswith(COUNTER) and name not in source.specs]
    if not absent:
        return source
    counters = {name: torch.zeros(needed[name].shape, dtype=needed[name].dtype) for name in absent}
    return join([source, from_tensors(counters, "counters")], label=source.label)
