"""The SyncNet loss beside the others: it prefers lips of the right moment, and stages can have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipstream.models.codec import PocketCodec
from lipstream.models.syncnet_pocket import FLAVOURS, PocketSyncNet
from lipstream.training.agreement import Agreement
from lipstream.training.coded import Windows
from lipstream.training.forcing import ForcingConfig, ForcingLoss
from lipstream.training.mouths import Batch, MouthTask
from lipstream.training.teacher import SEGMENT, TeacherConfig, TeacherLoss
from tiny import coded_clips, tiny_codec, tiny_dit


@pytest.fixture(scope="module")
def codec() -> PocketCodec:
    return tiny_codec()


def task_of(codec: PocketCodec, config: ForcingConfig | TeacherConfig) -> MouthTask:
    windows = Windows(coded_clips(2, 80), np.ones(2), seed=0, latent_frames=SEGMENT)
    return MouthTask(codec, windows, config)


def judge(batch: Batch) -> PocketSyncNet:
    """A SyncNet of random weights that fits the batch's speech."""
    torch.manual_seed(0)
    config = FLAVOURS["test"].__class__(
        speech_channels=batch.heard.shape[-1], movements=4, width=24, vector=8, dropout=0.0
    )
    return PocketSyncNet(config)


def test_it_has_a_gradient_only_where_lips_are_shown_and_speech_was_given(codec: PocketCodec) -> None:
    task = task_of(codec, ForcingConfig(batch=3, drop_audio=0.0))
    batch = task.batch(SEGMENT)
    speech = batch.speech.clone()
    speech[1] = 0
    agreement = Agreement(judge(batch), task, weight=2.0)
    x0 = batch.target.clone().requires_grad_(True)
    loss = agreement(x0, batch._replace(speech=speech), slice(3, None))
    assert 0 < loss.item() < 4
    loss.backward()
    gradient = x0.grad
    assert gradient is not None and gradient[1].abs().max() == 0 and gradient[:, :, :3].abs().max() == 0
    assert gradient[0, : codec.config.shape_channels].abs().max() > 0
    assert gradient[:, codec.config.shape_channels :].abs().max() == 0  # texture has no part
    assert agreement(x0, batch, slice(SEGMENT - 3, None)).item() == 0  # too few frames
    assert agreement(x0, batch._replace(speech=torch.zeros_like(speech))).item() == 0
    with pytest.raises(ValueError, match="must be positive"):
        Agreement(judge(batch), task, weight=0.0)


def test_going_down_its_gradient_makes_lips_agree(codec: PocketCodec) -> None:
    task = task_of(codec, ForcingConfig(batch=2, drop_audio=0.0))
    batch = task.batch(SEGMENT)
    agreement = Agreement(judge(batch), task, weight=1.0)
    x0 = batch.target.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([x0], 0.03)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = agreement(x0, batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.003  # towers of random weights hardly listen


@pytest.mark.parametrize("stage", ["forcing", "teacher"])
def test_stages_add_it_to_their_own_loss(codec: PocketCodec, stage: str) -> None:
    found: list[tuple[float, float]] = []
    for weight in (None, 0.5):
        config = ForcingConfig(batch=4) if stage == "forcing" else TeacherConfig(batch=4)
        task, model = task_of(codec, config), tiny_dit(codec)
        beside = None if weight is None else Agreement(judge(task_of(codec, config).batch(SEGMENT)), task, weight)
        torch.manual_seed(0)
        loss: ForcingLoss[Batch] | TeacherLoss[Batch]
        if isinstance(config, ForcingConfig):
            loss = ForcingLoss(model, task, config, beside)
        else:
            loss = TeacherLoss(model, task, config, beside)
        values = [loss(step) for step in range(4)]  # forcing draws windows of several lengths
        found.append((sum(v.item() for v, _ in values), sum(metrics.get("beside", 0.0) for _, metrics in values)))
    (plain, none), (both, added) = found
    assert none == 0 and added > 0.1
    assert both == pytest.approx(plain + added, rel=1e-5)
