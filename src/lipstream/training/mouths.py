"""What every stage of the pocket model trains on and is judged by: batches of mouths, the network's view, the error.

Teacher (`lipstream.training.teacher`), stage 1 (`forcing`) and stage 2 (`distill`) share this, so that they differ only
in their noise levels, attention and losses. All latents are pose-free: nothing of the target's face is shown, so that
the only thing that can tell the mouth is the speech.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lipstream.diffusion.guidance import null_conditions
from lipstream.models.codec import PocketCodec, inner_lip_distance
from lipstream.models.dit import Conditions, DiT
from lipstream.training.coded import Windows
from lipstream.training.task import Errors

GAP_PX = 3.0  # lips part by a few crop px: the unit of the lip gap's error


@dataclass(frozen=True, kw_only=True)
class MouthConfig:
    """What all stages share.

    Attributes:
        drop_audio: share of windows without speech (the null branch of guidance).
        shape_weight, gap_weight: weights of the shape field's and of the lip gap's error beside the texture's.
        averaged_odds: share of windows whose reference sequence is averaged over time, as it is at inference.
        versions: appearance (and speech) variants kept of every clip.
        speech_dropout: share of the speech features that are blanked, each by itself. One man's voice is most of the
            real speech; without it the lips of people who were not trained on follow their own speech less.
    """

    batch: int = 16
    drop_audio: float = 0.1
    shape_weight: float = 2.0
    gap_weight: float = 1.0
    averaged_odds: float = 0.6
    versions: int = 2
    speech_dropout: float = 0.25


class Seen(NamedTuple):
    """What a take knows of the source, pose-free.

    Attributes:
        shut, wide: [B, K, 1, g, g] its most closed and its widest mouth.
        reference: [B, K, T, g, g] its sequence, mostly averaged over time.
    """

    shut: Tensor
    wide: Tensor
    reference: Tensor


class Batch(NamedTuple):
    """Windows as a stage uses them.

    Attributes:
        target: [B, K, T, g, g] pose-free.
        speech: [B, T, 4, D] rows as the network is given them: damaged, some silent.
        heard: the same rows whole.
        seen: of the source.
    """

    target: Tensor
    speech: Tensor
    heard: Tensor
    seen: Seen

    @property
    def reference(self) -> Tensor:
        """The reference sequence, [B, K, T, g, g]."""
        return self.seen.reference


class MouthTask:
    """Batches from windows, and the error of a prediction: the `task.Task` of the pocket model."""

    def __init__(self, codec: PocketCodec, windows: Windows, config: MouthConfig) -> None:
        self.codec, self.windows, self.config = codec, windows, config
        c = codec.config
        self.mask = codec.mouth_mask()
        weight = torch.zeros(c.latent_channels, c.grid, c.grid)
        scale = codec.shape.scale.square()
        lips = torch.full((c.grid, c.grid), 0.35)
        lips[3:8, 2:8] = 1.0
        weight[: c.shape_channels] = (scale / scale.mean())[:, None, None] * lips * config.shape_weight
        (top, bottom), (left, right) = c.paint_rows, c.paint_cols
        weight[c.shape_channels :, top:bottom, left:right] = 1.0
        self.weight = weight * self.mask[0, 0]

    @property
    def rng(self) -> np.random.Generator:
        """Draws windows, and whatever else a stage draws."""
        return self.windows.rng

    @rng.setter
    def rng(self, rng: np.random.Generator) -> None:
        self.windows.rng = rng

    def batch(self, latent_frames: int, sink_apart: bool = False) -> Batch:
        """A batch of windows of the first ``latent_frames``; speech is damaged, some of it missing."""
        rows = [self.windows.draw(sink_apart) for _ in range(self.config.batch)]
        target, speech, reference, shut, wide = (torch.stack(parts) for parts in zip(*rows, strict=True))
        parts = target[:, :latent_frames], speech[:, :latent_frames], reference[:, :latent_frames]
        batch = self.whole(*parts, shut, wide)
        damaged = F.dropout(batch.heard, self.config.speech_dropout)
        damaged[torch.from_numpy(self.windows.rng.random(len(rows)) < self.config.drop_audio)] = 0
        return batch._replace(speech=damaged)

    def whole(self, target: Tensor, speech: Tensor, reference: Tensor, shut: Tensor, wide: Tensor) -> Batch:
        """Stacked windows [B, ...] with all of their speech; references averaged as often as the configuration says."""
        return Batch(
            self.pose_free(target),
            speech,
            speech,
            Seen(self.pose_free(shut[:, None]), self.pose_free(wide[:, None]), self._references(reference)),
        )

    def conditions(self, model: DiT, batch: Batch, *, null: bool = False) -> Conditions:
        """All that ``lipstream.mouth`` gives the network; speech goes through its audio pack, ``null`` is silence."""
        seen = batch.seen
        conditions = Conditions(
            reference=seen.shut,
            mask=self.mask,
            masked_video=seen.wide.expand_as(seen.reference),
            ref_sequence=seen.reference,
            audio=model.audio_proj.join(batch.speech),
        )
        return null_conditions(conditions, "audio") if null else conditions

    def pose_free(self, z: Tensor) -> Tensor:
        """[B, T, K, g, g] -> pose-free [B, K, T, g, g]."""
        batch = z.shape[0]
        return rearrange(self.codec.pose_free(z.flatten(0, 1)), "(b t) k h w -> b k t h w", b=batch)

    def _references(self, z: Tensor) -> Tensor:
        """Reference sequences [B, T, K, g, g] -> pose-free [B, K, T, g, g], most of them averaged over time.

        At inference the reference sequence is the source's running average (see ``lipstream.mouth``).
        """
        moving = self.pose_free(z)
        still = torch.from_numpy(self.windows.rng.random(len(moving)) < self.config.averaged_odds)
        return torch.where(still[:, None, None, None, None], moving.mean(2, keepdim=True), moving)

    def fields(self, z: Tensor) -> Tensor:
        """Shape fields [B, T, 4, 20, 20, 2] of latents [B, K, T, g, g]."""
        return rearrange(
            self.codec.decode_fields(rearrange(z, "b k t h w -> (b t) k h w")), "(b t) ... -> b t ...", b=len(z)
        )

    def lip_gap(self, z: Tensor) -> Tensor:
        """Inner lip distance of each frame, crop px: z [B, K, T, g, g] -> [B, T, 4]."""
        return inner_lip_distance(self.fields(z))

    def errors(self, x0: Tensor, target: Tensor) -> Errors:
        """How far x0 [B, K, T, g, g] lies from the target."""
        latent = ((x0 - target).square() * self.weight[None, :, None]).sum((1, 3, 4)) / self.weight.sum()
        gap = (self.lip_gap(x0) - self.lip_gap(target)).square().mean(-1)
        return Errors(latent + self.config.gap_weight * gap / GAP_PX**2, latent, gap)
