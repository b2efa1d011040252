"""Rectified flow with shift 5, guidance, the two-step sampler and the chunk rollout."""

from lipstream.diffusion.rollout import Rollout, RolloutSnapshot
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise, renoise, velocity_from_x0, x0_from_velocity

__all__ = [
    "STUDENT_TIMES",
    "Rollout",
    "RolloutSnapshot",
    "add_noise",
    "renoise",
    "velocity_from_x0",
    "x0_from_velocity",
]
