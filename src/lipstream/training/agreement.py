"""How well predicted mouths fit their speech, as a loss with a gradient: the teacher's StableSyncNet loss (spec 5.1).

The judge is the pocket SyncNet. It sees what the pipeline will show: movements that mouths make
(``PocketCodec.as_mouths_move``), so that nothing is won by shapes that are filtered out later. Judge results with
*another* SyncNet than the one that was trained on.

    agreement = Agreement(load_syncnet(file), task, weight=0.5)
    loss = loss + agreement(x0, batch, moving)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from einops import rearrange
from torch import Tensor

from lipstream.checkpoints.networks import load_syncnet
from lipstream.models.syncnet_pocket import PocketSyncNet
from lipstream.training.mouths import Batch, MouthTask

SYNC_WEIGHT = 0.5
LEAST_LATENT_FRAMES = 5  # 20 pixel frames: fewer say little


def add_agreement(parser: argparse.ArgumentParser) -> None:
    """Options of a stage that can have this loss."""
    parser.add_argument("--syncnet", type=Path, metavar="FILE", help="adds a loss: lips should fit the speech to it")
    parser.add_argument("--sync-weight", type=float, default=SYNC_WEIGHT, help=f"of that loss (default: {SYNC_WEIGHT})")


def read_agreement(arguments: argparse.Namespace) -> Callable[[MouthTask], Agreement] | None:
    """What the options of :func:`add_agreement` ask for, to be given a task; None without a SyncNet."""
    if arguments.syncnet is None:
        return None
    network = load_syncnet(arguments.syncnet)
    return lambda task: Agreement(network, task, arguments.sync_weight)


class Agreement:
    """``weight`` times 1 - cosine of the vectors of lips and speech."""

    def __init__(self, network: PocketSyncNet, task: MouthTask, weight: float) -> None:
        if weight <= 0:
            raise ValueError(f"the weight of a SyncNet loss must be positive, got {weight}")
        self.network, self.task, self.weight = network.eval().requires_grad_(False), task, weight

    def __call__(self, x0: Tensor, batch: Batch, frames: slice = slice(None)) -> Tensor:
        """Mean over the rows that were given speech, a scalar; 0 where there are none, or too few frames.

        Args:
            x0: [B, K, T, g, g] pose-free prediction.
            batch: of which it is.
            frames: latent frames that follow each other in time and are the network's own work.
        """
        kept = x0[:, :, frames]
        heard_rows = batch.speech.abs().amax((1, 2, 3)) > 0
        if kept.shape[2] < LEAST_LATENT_FRAMES or not heard_rows.any():
            return x0.new_zeros(())
        lips, speech = self.network(self._shown(kept, batch), batch.heard[:, frames].flatten(1, 2))
        agreement = (lips * speech).sum(-1).mean(1)
        loss: Tensor = self.weight * (1 - agreement[heard_rows].mean())
        return loss

    def _shown(self, x0: Tensor, batch: Batch) -> Tensor:
        """Shape fields [B, 4 T, 20, 20, 2] of what remains of a prediction on the screen."""
        resting = batch.reference.mean(2, keepdim=True).expand_as(x0)
        moved = self.task.codec.as_mouths_move(rearrange(x0 - resting, "b k t h w -> (b t) k h w"))
        shown = resting + rearrange(moved, "(b t) k h w -> b k t h w", b=len(x0))
        return self.task.fields(shown).flatten(1, 2)
