"""Prepared samples -> analysis clips of the pocket flavour, and the pocket teacher as a network.

What the teacher is shown of a clip is what it is trained with (and what `lipstream.mouth` gives the student): the most
closed mouth as the reference, the widest mouth in place of the masked video, the average over time as the reference
sequence, all pose-free. A window has 15 latent frames (57 pixel frames: its first frame alone, then four at a time).

    network, scale = load_teacher(path)
    clips = pocket_clips(load_clips([folder]), codec, encoder, model)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lipstream.analysis.trajectory import AnalysisClip
from lipstream.checkpoints.networks import load_dit
from lipstream.diffusion.lengths import pixel_frames_of
from lipstream.diffusion.teacher import Network
from lipstream.faces.canvas import FaceCanvas
from lipstream.inside import LipRuler
from lipstream.models.audio import SpeechEncoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec
from lipstream.models.dit import Conditions, DiT
from lipstream.training.codec import Sampler
from lipstream.training.coded import Coded, code_clip, speech_rows
from lipstream.training.samples import Clip

WINDOW_LATENT_FRAMES = 15


def load_teacher(path: Path) -> tuple[DiT, float]:
    """The pocket teacher's network and the guidance scale it was stored with (1: none was); the one place to plug it.

    Raises:
        ValueError: no such file, or not a DiT that lipstream wrote.
    """
    model, scale = load_dit(path)
    return model.eval().requires_grad_(False), scale


def pocket_network(model: DiT) -> Network:
    """The network as it was trained: bidirectional over the window, bfloat16 products, float32 results."""

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x0: Tensor = model(x, t, conditions)
        return x0.float()

    return network


def pocket_clips(
    clips: Sequence[Clip],
    codec: PocketCodec,
    encoder: SpeechEncoder,
    model: DiT,
    *,
    latent_frames: int = WINDOW_LATENT_FRAMES,
    limit: int | None = None,
) -> list[AnalysisClip]:
    """The middle window of every clip that is long enough, at most `limit` of them.

    Raises:
        ValueError: fewer than two clips are long enough.
    """
    needed = pixel_frames_of(latent_frames)
    chosen = [clip for clip in clips if len(clip) >= needed][:limit]
    if len(chosen) < 2:
        raise ValueError(f"the analysis takes at least two clips of {needed} frames or more, got {len(chosen)}")
    rows = speech_rows(encoder, chosen, np.random.default_rng(0), variants=1)
    ruler, sampler = LipRuler(FaceCanvas()), Sampler(chosen, seed=0)
    coded = (code_clip(codec, sampler, clip, rows[clip.name], plain=True, ruler=ruler) for clip in chosen)
    return [analysis_clip(item, codec, model, latent_frames) for item in coded]


@torch.no_grad()
def analysis_clip(
    item: Coded, codec: PocketCodec, model: DiT, latent_frames: int = WINDOW_LATENT_FRAMES
) -> AnalysisClip:
    """The middle window of a coded clip, with the conditions that the teacher was trained with."""
    size = FRAMES_PER_LATENT
    start = (len(item.still) - pixel_frames_of(latent_frames)) // 2
    moving = start + 1 + size * torch.arange(latent_frames - 1)
    target = torch.cat([item.still[start : start + 1], item.moving[moving]]).float()
    speech = torch.cat(
        [
            item.speech[0, start].expand(1, size, -1),
            item.speech[0][moving[:, None] + torch.arange(size)],
        ]
    ).float()
    order = item.opening.argsort()
    shut, wide, average = (
        codec.pose_free(z[None].float())[:, :, None]
        for z in (item.moving[order[0]], item.moving[order[-1]], item.moving.float().mean(0))
    )
    conditions = Conditions(
        reference=shut,
        mask=codec.mouth_mask(),
        masked_video=wide.expand(-1, -1, latent_frames, -1, -1),
        ref_sequence=average.expand(-1, -1, latent_frames, -1, -1),
        audio=model.audio_proj.join(speech[None].to(model.dtype)).float(),
    )
    free = codec.pose_free(target).transpose(0, 1).contiguous()
    return AnalysisClip(name=item.name, target=free, conditions=conditions, speech=speech)
