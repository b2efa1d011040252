"""Chunk by chunk through a clip: the one loop used by the pipeline, live sessions, distillation and analysis.

Per chunk: call 1 at t = 0.999, renoise, call 2 at t = 0.769, and a clean pass at t = 0 that stores the keys
of the result for the chunks to come. The clean pass is a separate method: who is in a hurry shows the chunk
first and pays later; `step` pays first what is still owed, or joins it with its own first call. Nothing in here waits
for the device: a step only queues work.

    rollout = Rollout(model, batch=1, height=32, width=32, seed=0)
    for start in range(0, latent_frames, 3):
        x0 = rollout.step(conditions.slice(slice(start, start + 3)))
        ...                  # decode and show
        rollout.commit()     # optional; the next step would do it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipstream.diffusion.guidance import guided
from lipstream.diffusion.sampler import Noise, chunk_generator, few_step, generated_noise
from lipstream.diffusion.schedule import STUDENT_TIMES
from lipstream.models.dit import CleanPass, Conditions, DiT
from lipstream.streaming.kv_cache import KVCache, KVCacheSnapshot

#: Chunk number -> the noise of its calls; replaces the seeded noise (golden tests, training).
NoiseSource = Callable[[int], Noise]


@dataclass(frozen=True, kw_only=True)
class Owed:
    """A finished chunk whose clean pass has not been run."""

    x0: Tensor
    conditions: Conditions


@dataclass(frozen=True, kw_only=True)
class RolloutSnapshot:
    """All that a rollout knows between two steps; noise needs no state, it depends on (seed, chunk) only."""

    chunk: int
    owed: Owed | None
    cache: KVCacheSnapshot


class Rollout:
    """The causal student on one clip; see the module docstring.

    height, width: latent cells. guidance: audio guidance scale, of all calls or one for each; other than 1 runs a
    null-audio branch beside the conditional one over the same history. times: the calls' times and, last, the time of
    the clean pass.
    join_clean_pass: run an owed clean pass and the next chunk's first call as one pass over the weights, for
    throughput; same result within rounding, but a call of six latent frames where others have three.
    cache: replaces the model's own kind (another window, absolute positions).
    """

    def __init__(
        self,
        model: DiT,
        *,
        batch: int = 1,
        height: int,
        width: int,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        guidance: float | Sequence[float] = 1.0,
        times: tuple[float, ...] = STUDENT_TIMES,
        noise: NoiseSource | None = None,
        cache: KVCache | None = None,
        join_clean_pass: bool = False,
    ) -> None:
        if len(times) < 2:
            raise ValueError(f"times need at least one call and the clean pass, got {times}")
        calls = len(times) - 1
        scales = (guidance,) * calls if isinstance(guidance, float | int) else tuple(guidance)
        if len(scales) != calls:
            raise ValueError(f"{calls} calls take one guidance or {calls}, got {scales}")
        if join_clean_pass and scales[0] != 1.0:
            raise ValueError("a joined clean pass has one branch: use guidance 1 or join_clean_pass=False")
        self.model = model
        self.batch, self.height, self.width = batch, height, width
        self.dtype = model.dtype if dtype is None else dtype
        self.seed, self.guidance, self.times = seed, scales, times
        self.cache = model.make_cache(batch, height, width) if cache is None else cache
        self.chunk = 0  # number of the next chunk
        self.join_clean_pass = join_clean_pass
        model.prepare_rollout(self.cache, height, width)
        self._noise = noise
        self._owed: Owed | None = None

    @property
    def owes_clean_pass(self) -> bool:
        """Whether the last chunk's keys are still missing from the cache."""
        return self._owed is not None

    def step(self, conditions: Conditions, *, exit_call: int | None = None) -> Tensor:
        """Denoise the next chunk, x0 [B, C, T, H, W]; pays an owed clean pass first.

        exit_call ends the chunk after that call; under gradients only this last call is differentiable.
        """
        if not self.join_clean_pass or torch.is_grad_enabled():
            self.commit()
        frames = conditions.latent_frames
        if self._noise is None:
            shape = (self.batch, self.model.config.latent_channels, frames, self.height, self.width)
            generator = chunk_generator(self.seed, self.chunk)
            noise = generated_noise(generator, shape, self.dtype, self.model.device)
        else:
            noise = self._noise(self.chunk)
        branches = self._with_null_branch(conditions) if set(self.guidance) != {1.0} else None
        scales = iter(self.guidance)

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            scale = next(scales)
            if scale == 1.0 or branches is None:
                owed, self._owed = self._clean_pass(), None
                return self.model.predict(x, t, conditions, cache=self.cache, owed=owed).x0
            both = self.model.predict(x.repeat(2, 1, 1, 1, 1), t.repeat(2), branches, cache=self.cache).x0
            x_cond, x_null = both.chunk(2)
            return guided(x_cond, x_null, scale)

        x0 = few_step(denoise, noise, self.times[:-1], exit_call=exit_call)
        self._owed = Owed(x0=x0.detach(), conditions=conditions)
        self.chunk += 1
        return x0

    @torch.no_grad()
    def commit(self) -> None:
        """Run the owed clean pass, if any: keys of the result enter the cache, conditional, no gradient."""
        clean = self._clean_pass()
        if clean is not None:
            self.model.remember(clean, self.cache)
            self._owed = None

    def _clean_pass(self) -> CleanPass | None:
        if self._owed is None:
            return None
        x0 = self._owed.x0
        t = torch.full((len(x0),), self.times[-1], dtype=torch.float64, device=x0.device)
        return CleanPass(x0, t, self._owed.conditions)

    def snapshot(self) -> RolloutSnapshot:
        """An independent copy of the state between two steps."""
        return RolloutSnapshot(chunk=self.chunk, owed=self._owed, cache=self.cache.snapshot())

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Go back to a snapshot of an equally shaped rollout."""
        self.cache.restore(snapshot.cache)
        self.chunk, self._owed = snapshot.chunk, snapshot.owed

    def reset(self) -> None:
        """Begin a new clip."""
        self.cache.reset()
        self.chunk, self._owed = 0, None

    def _with_null_branch(self, conditions: Conditions) -> Conditions:
        """Rows [conditional B; null audio B]; text stays [B], its attention repeats it."""

        def twice(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x.repeat(2, *([1] * (x.ndim - 1)))

        null = self.model.null_audio(self.batch, conditions.latent_frames)
        audio = null if conditions.audio is None else conditions.audio
        return dataclasses.replace(
            conditions,
            reference=twice(conditions.reference),
            mask=twice(conditions.mask),
            masked_video=twice(conditions.masked_video),
            ref_sequence=twice(conditions.ref_sequence),
            audio=torch.cat((audio.to(null.dtype), null)),
        )
