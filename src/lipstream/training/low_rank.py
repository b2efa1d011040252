"""Low-rank updates (LoRA, Hu et al. 2021) of a small transformer: live while it trains, plain weights afterwards.

W becomes W + B A, with B zero at first: the network starts as it was. What is frozen keeps the general ability; the
update is too small to learn a clip by heart. torch's own parametrizations carry it, so that `lipstream personalize`
needs no further package; the adapters of the large sizes (files of their own, merged by name) are
`lipstream.checkpoints.lora`'s.

    add_low_rank(dit, rank=16, whole=("audio_cond_projs",))    # only the factors and these modules move now
    merge_low_rank(dit)                                        # names and shapes as before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipstream.models.dit import DiT
from lipstream.models.dit_block import Block


class LowRank(nn.Module):
    """Weight [out, in] -> weight + B A, with A [rank, in] random and B [out, rank] zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated weight, in float32 under autocast, too: what is merged later is what was trained."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.b @ self.a


def low_rank_maps(model: DiT) -> Iterator[nn.Linear]:
    """The maps that get factors: q, k, v, o of self attention and both of the feed-forward, of every block."""
    for block in model.blocks:
        assert isinstance(block, Block)
        attention = block.self_attn
        for part in (attention.q, attention.k, attention.v, attention.o, block.ffn[0], block.ffn[2]):
            assert isinstance(part, nn.Linear)
            yield part


def add_low_rank(model: DiT, rank: int, whole: Sequence[str] = ()) -> None:
    """Freeze a network but for new factors and for the modules named in ``whole``, in place.

    Raises:
        ValueError: the rank is not positive, or the network has factors already.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if any(parametrize.is_parametrized(part) for part in low_rank_maps(model)):
        raise ValueError("this network has low-rank factors already; merge them first")
    model.requires_grad_(False)
    for part in low_rank_maps(model):
        parametrize.register_parametrization(part, "weight", LowRank(part.weight, rank))
    for name in whole:
        model.get_submodule(name).requires_grad_(True)


def merge_low_rank(model: DiT) -> None:
    """Make plain weights of the updated ones, in place."""
    for part in low_rank_maps(model):
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
    model.requires_grad_(False)
