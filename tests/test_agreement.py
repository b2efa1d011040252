"""The SyncNet loss beside the others: it prefers lips of the right moment, and stages can have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lipstream.models.codec import PocketCodec
from lipstream.models.syncnet_pocket import FLAVOURS, PocketSyncNet
from lipstream.training.agreement import Agreement
from lipstream.training.coded import Windows
from lipstream.training.forcing import ForcingConfig, ForcingLoss
from lipstream.training.mouths import Batch, MouthTask
from lipstream.training.teacher import SEGMENT, TeacherConfig, TeacherLoss
from tiny import assert_learns, coded_clips, tiny_codec, tiny_dit


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
def test_stages_learn_with_it(codec: PocketCodec, stage: str) -> None:
    torch.manual_seed(0)
    seen: list[float] = []
    model = tiny_dit(codec)
    if stage == "forcing":
        task = task_of(codec, config := ForcingConfig(batch=4))
        beside = Agreement(judge(task.batch(SEGMENT)), task, weight=0.1)
        loss: ForcingLoss[Batch] | TeacherLoss[Batch] = ForcingLoss(model, task, config, beside)
    else:
        task = task_of(codec, config_ := TeacherConfig(batch=4))
        beside = Agreement(judge(task.batch(SEGMENT)), task, weight=0.1)
        loss = TeacherLoss(model, task, config_, beside)

    def watched(step: int) -> tuple[Tensor, dict[str, float]]:
        value, metrics = loss(step)
        seen.append(metrics["beside"])
        return value, metrics

    assert_learns(model, watched)
    assert max(seen) > 0
