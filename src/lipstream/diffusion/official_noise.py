"""The noise of the official inference script, for parity runs only (spec section 3, trap 6).

One generator, seeded once, on the device and in the dtype of the latents: one draw for the first calls of the whole
clip, then one draw per chunk for its renoising. Results therefore depend on the clip's length, the device type and
torch's version, and chunks must be asked for in order. Our own noise (`sampler.generated_noise`) depends on (seed,
chunk) only.

    noise = OfficialNoise((1, 16, length.latent_frames, 64, 64), seed=42, dtype=torch.bfloat16, device="cuda")
    rollout = Rollout(model, height=64, width=64, noise=noise)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipstream.diffusion.lengths import CHUNK_LATENT_FRAMES
from lipstream.diffusion.sampler import Noise

OFFICIAL_SEED = 42


class OfficialNoise:
    """A `NoiseSource` of one clip.

    Args:
        shape: [B, C, T, H, W] of the whole clip's latents.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        seed: int = OFFICIAL_SEED,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._clip = torch.randn(shape, generator=self._generator, dtype=dtype, device=device)
        self._next_renoise = 0

    def __call__(self, chunk: int) -> Noise:
        """The noise of a chunk's calls; call 0 may be asked for again, later calls in order of chunks only."""
        start = chunk * CHUNK_LATENT_FRAMES
        first = self._clip[:, :, start : start + CHUNK_LATENT_FRAMES]
        if first.shape[2] != CHUNK_LATENT_FRAMES:
            raise ValueError(f"chunk {chunk} lies beyond the clip's {self._clip.shape[2]} latent frames")

        def draw(call: int) -> Tensor:
            if call == 0:
                return first
            if chunk != self._next_renoise:
                raise ValueError(f"the official noise comes in order: chunk {self._next_renoise} is next, not {chunk}")
            self._next_renoise += 1
            return torch.randn(first.shape, generator=self._generator, dtype=first.dtype, device=self._generator.device)

        return draw
