"""A hand-made teacher whose trade-off is known: guidance adds mouth motion inside a band of times, roughness outside.

Without guidance the mouth follows two fifths of the true motion under a tremor of its own; the null branch lacks a
fifth of the motion inside the band, and has less roughness outside of it. So guidance raises the lip gap's correlation
inside the band only and costs fidelity outside. What the "network" needs of a clip travels in its conditions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipstream.analysis.trajectory import AnalysisClip
from lipstream.diffusion.teacher import Network, teacher_times
from lipstream.models.codec import PocketCodec
from lipstream.models.dit import Conditions


def made_clips(codec: PocketCodec, count: int = 6, latent_frames: int = 15) -> list[AnalysisClip]:
    """Clips with one direction of motion each, and the conditions that `made_teacher` reads."""
    clips = []
    config = codec.config
    for index in range(count):
        generator = torch.Generator().manual_seed(index)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator)

        still, direction = draw(config.latent_channels, 1, 10, 10), draw(config.latent_channels, 1, 10, 10)
        motion, tremor = (draw(1, latent_frames, 1, 1) * direction for _ in range(2))
        conditions = Conditions(
            reference=(still + 0.4 * motion + 0.5 * tremor)[None],
            mask=codec.mouth_mask(),
            masked_video=motion[None],
            ref_sequence=draw(1, config.latent_channels, latent_frames, 10, 10),
            audio=torch.zeros(1, latent_frames, 1),
        )
        speech = torch.zeros(latent_frames, 4, 2)
        clips.append(AnalysisClip(name=f"made_{index}", target=still + motion, conditions=conditions, speech=speech))
    return clips


def made_teacher(steps: tuple[int, int], *, gain: float = 1.0, calls: list[float] | None = None) -> Network:
    """The network; `steps` is the band, `gain` = 0 makes guidance useless; `calls` collects the times asked for."""
    times = teacher_times()
    high, low = times[steps[0]] + 1e-6, times[steps[1]] - 1e-6

    def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        if calls is not None:
            calls.append(float(t[0]))
        plain = conditions.reference
        if conditions.audio is not None:
            return plain
        inside = float(low <= float(t[0]) <= high)
        return plain - gain * (0.2 * inside * conditions.masked_video + 0.1 * (1 - inside) * conditions.ref_sequence)

    return network
