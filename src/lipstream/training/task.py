"""What the losses of the three stages ask of their data: a task. They know nothing else of it.

`mouths.MouthTask` has the pocket model's windows, `clips.ClipTask` the official sample folders. A task draws batches,
says what a network is shown (with and without the driving speech) and how wrong a prediction is.

    x0 = predict(task, model, add_noise(batch.target, noise, t), t, batch)
    silent = predict(task, model, ..., null=True)         # the null branch of guidance

Shapes: B batch, C latent channels, T latent frames, H x W latent cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lipstream.models.dit import Conditions, DiT


class TaskBatch(Protocol):
    """What the losses use of a batch themselves."""

    @property
    def target(self) -> Tensor:
        """Clean latents [B, C, T, H, W]."""

    @property
    def reference(self) -> Tensor:
        """The reference sequence [B, C, T, H, W]: what a network that only copies would answer."""


BatchT = TypeVar("BatchT", bound=TaskBatch)


class Errors(NamedTuple):
    """How wrong a prediction is, per row and latent frame, [B, T].

    Attributes:
        loss: what is minimised.
        latent: weighted squared error of the latents.
        gap: squared error of the lip gap, crop px²; None where a task cannot tell it.
    """

    loss: Tensor
    latent: Tensor
    gap: Tensor | None = None

    def figures(self, chosen: Tensor, name: str) -> dict[str, float]:
        """Means over the chosen rows ([B] bool) or latent frames ([B, T]), for the log; nothing if there are none."""
        if not chosen.any():
            return {}
        found = {name: self.latent[chosen].mean().item()}
        if self.gap is not None:
            found["gap"] = self.gap[chosen].mean().sqrt().item()
        return found


class Task(Protocol[BatchT]):
    """A source of batches; see the module docstring.

    Attributes:
        rng: all draws of data and times; a stage sets it anew when it resumes.
        weight: of the elements' errors, [C or 1, H, W].
    """

    rng: np.random.Generator
    weight: Tensor

    def batch(self, latent_frames: int, sink_apart: bool = False) -> BatchT:
        """Windows of so many latent frames.

        Args:
            sink_apart: the first latent frame lies anywhere before the others, as a stream's sink does.
        """

    def conditions(self, model: DiT, batch: BatchT, *, null: bool = False) -> Conditions:
        """What the network is shown; ``null``: without what guidance is about (the speech, maybe the text)."""

    def errors(self, x0: Tensor, target: Tensor) -> Errors:
        """How far x0 lies from a target, both [B, C, T, H, W]."""


def predict(
    task: Task[BatchT], model: DiT, noisy: Tensor, t: Tensor, batch: BatchT, *, null: bool = False, **options: Any
) -> Tensor:
    """x0 [B, C, T, H, W], float32, of noisy latents at times t [B] or [B, T]; options go to the network."""
    with torch.autocast(noisy.device.type, torch.bfloat16):
        x0: Tensor = model(noisy, t, task.conditions(model, batch, null=null), **options)
    return x0.float()
