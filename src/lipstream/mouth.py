"""The model side of lip-sync: face canvases and speech in, generated mouths out, one chunk at a time.

:class:`MouthModel` holds the networks of a flavour (codec, DiT, speech encoder); :class:`Take` is one uninterrupted
stretch of one face with all its state (codec history, KV cache, audio pack). The pipeline pulls files through a take,
a live session pushes frames into one; both call :meth:`Take.step` with 9 pixel frames first and 12 after that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from lipstream.checkpoints.networks import load_codec, load_dit
from lipstream.diffusion.rollout import Rollout
from lipstream.diffusion.schedule import T_MAX
from lipstream.faces.canvas import CANVAS_PX, FaceCanvas, Float, outline_weight
from lipstream.inside import LipRuler, MouthInside
from lipstream.media.timeline import CHUNK_PIXEL_FRAMES, FIRST_CHUNK_PIXEL_FRAMES
from lipstream.models.audio import SpeechEncoder, load_speech_encoder
from lipstream.models.codec import FRAMES_PER_LATENT, Decoded, PocketCodec
from lipstream.models.dit import Conditions, DiT

# One call and the clean pass. The paper's second call (t = 0.769) makes a large network's mouths finer; the lips of
# this small one follow the speech a little less after it, and a third of the work is saved (docs/recipe.md).
TIMES = (T_MAX, 0.0)
OFFSET_RATE = 0.04  # per pixel frame: a time constant of one second
WIDEST_FACTOR, WIDEST_PX = 1.2, 7.0  # how far beyond the source's widest opening (crop px) a generated one may go
SHUT_PX = 0.6  # opening of closed lips as the ruler reads it
PRESSED_PX = 3.0  # and how far lips press beyond its most closed one
REFERENCE_RATE = 0.12  # of the running mean per latent frame (0.16 s): a time constant of 1.3 s


@dataclass(frozen=True)
class CanvasFrame:
    """One source frame as the codec sees it: shape field [20, 20, 2] and texture [160, 160, 3] uint8."""

    field: Float
    texture: NDArray[np.uint8]


@dataclass(frozen=True)
class Mouth:
    """A generated mouth for one pixel frame.

    Attributes:
        field: [20, 20, 2] target shape field, crop px.
        paint: [160, 160, 3] uint8 canvas; only where ``gate`` > 0 does it matter.
        gate: [160, 160] float32 in 0..1.
    """

    field: Float
    paint: NDArray[np.uint8]
    gate: Float


class MouthModel:
    """The networks of one flavour, ready for inference.

    Args:
        guidance: audio guidance of the last call; calls before it have none.
        times: of the calls and, last, of the clean pass.
        dtype: of the DiT and the painter; bfloat16 is about twice as fast where the CPU has it.
    """

    def __init__(
        self,
        dit: DiT,
        codec: PocketCodec,
        speech: SpeechEncoder,
        guidance: float,
        dtype: torch.dtype = torch.float32,
        times: tuple[float, ...] = TIMES,
    ) -> None:
        self.dit = dit.eval().requires_grad_(False).to(dtype)
        self.codec = codec.eval().requires_grad_(False)
        self.codec.painter.to(dtype)
        self.speech = speech.eval().requires_grad_(False)
        self.guidance, self.times = guidance, times
        self.canvas = FaceCanvas()
        self.ruler = LipRuler(self.canvas)
        self.gaping = torch.from_numpy(self.canvas.gaping_field())
        self.dtype = dtype

    @property
    def guidance_of_calls(self) -> tuple[float, ...]:
        """Audio guidance of each call of a chunk."""
        return (*[1.0] * (len(self.times) - 2), self.guidance)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> MouthModel:
        """Read ``dit.safetensors``, ``codec.safetensors`` and ``speech.safetensors`` of a flavour's folder."""
        dit, guidance = load_dit(folder / "dit.safetensors")
        codec = load_codec(folder / "codec.safetensors")
        return cls(dit, codec, load_speech_encoder(folder / "speech.safetensors"), guidance, dtype)


def bent(opening: float, limit: float) -> float:
    """An opening as it is, but bent smoothly towards ``limit`` above 0.7 of it, and towards -PRESSED_PX below zero."""
    knee = 0.7 * limit
    if opening > knee:
        return knee + (limit - knee) * math.tanh((opening - knee) / (limit - knee))
    return opening if opening >= 0 else PRESSED_PX * math.tanh(opening / PRESSED_PX)


def _straight(shape: Tensor, own: Tensor, lips: Tensor) -> Tensor:
    """A shape [20, 20, 2] whose lips stay where the source's ``own`` are from left to right; changed in place."""
    sideways = ((shape - own) * lips)[..., 0].sum() / lips.sum()
    shape[..., 0] -= lips[..., 0] * sideways
    return shape


class Take:
    """State of one face's uninterrupted stretch of video; see the module docstring.

    Args:
        seed: of all noise; chunk k's noise depends on (seed, k) only.
        strength: movement of the lips around the closed mouth; the limits of the opening stay.
    """

    def __init__(self, model: MouthModel, seed: int = 0, strength: float = 1.0) -> None:
        self.model, self._strength = model, strength
        grid = model.codec.config.grid
        self._codec = model.codec.stream_view(1)
        guidance = model.guidance_of_calls
        self._rollout = Rollout(
            model.dit, batch=1, height=grid, width=grid, seed=seed, times=model.times, guidance=guidance,
            join_clean_pass=guidance[0] == 1.0,
        )  # fmt: skip
        self._audio_pack = model.dit.audio_proj.stream_view(1)
        self._mask = model.codec.mouth_mask()
        self._shut: tuple[float, Tensor] | None = None  # opening (crop px) and pose-free latent [1, K, g, g]
        self._wide: tuple[float, Tensor] | None = None
        self._memory = MouthInside(model.ruler)
        self._move_before: Tensor | None = None  # [1, 20, 20, 2] generated minus resting shape of the last frame
        self._offset: Tensor | None = None  # [20, 20, 2] its constant part
        self._outline = torch.from_numpy(outline_weight())[..., None]
        self._average: Tensor | None = None  # [1, K, grid, grid] running mean of the source's latents

    @property
    def next_pixel_frames(self) -> int:
        """How many frames the next :meth:`step` takes."""
        return FIRST_CHUNK_PIXEL_FRAMES if self._rollout.chunk == 0 else CHUNK_PIXEL_FRAMES

    @torch.inference_mode()
    def step(self, frames: Sequence[CanvasFrame], speech: Tensor, quiet: Float | None = None) -> list[Mouth]:
        """Generate the mouths of one chunk.

        Args:
            frames: ``next_pixel_frames`` source frames.
            speech: [pixel frames, D] rows of the speech encoder for the same frames.
            quiet: [pixel frames] in 0..1, how far to close the lips, whatever the model says.

        Raises:
            ValueError: wrong number of frames or rows.
        """
        if len(frames) != self.next_pixel_frames or len(speech) != len(frames):
            raise ValueError(
                f"a step takes {self.next_pixel_frames} frames and rows, got {len(frames)} frames, {len(speech)} rows"
            )
        dtype = self.model.dtype
        fields = torch.from_numpy(np.stack([f.field for f in frames]))[None]
        textures = torch.from_numpy(np.stack([f.texture for f in frames]))
        textures = rearrange(textures, "f h w c -> 1 f c h w").float() / 255
        z = self._codec.encode(fields, textures)
        free, posed = (torch.stack(parts, 2) for parts in zip(*map(self._codec.split_pose, z.unbind(2)), strict=True))
        neutral = self._neutral(free)
        shut, wide = self._extremes(free, fields[0])
        conditions = Conditions(
            reference=shut.to(dtype),
            mask=self._mask.to(dtype),
            masked_video=wide.to(dtype).expand_as(neutral),
            ref_sequence=neutral.to(dtype),
            audio=self._audio_pack(speech.to(dtype)[None]),
        )
        generated = self._believable(self._rollout.step(conditions).float(), neutral)
        x0, resting_z = (torch.where(self._mask > 0, free + posed, z) for free in (generated, neutral))
        # Once the source has shown the inside of its mouth, the painter has nothing more to say.
        painted = None if self._memory.shown_any else self._codec.decode(x0, z, textures)
        resting = self._fields(resting_z)
        shapes = self._keep_outline(self._even(self._fields(x0) - resting), resting, fields[0])
        if quiet is not None and quiet.any():
            still = self._codec.still(shut[:, :, 0])[:, :, None]
            shapes = self._close(shapes, torch.where(self._mask > 0, still + posed, z), fields[0], quiet)
        paint, gate = self._inside(shapes, fields[0], textures[0], painted)
        return self._mouths(shapes, paint, gate)

    def _neutral(self, free: Tensor) -> Tensor:
        """The source's resting face, of its pose-free latents [1, K, T, g, g]: their average over the past seconds.

        It is what the model sees of the source (its reference sequence), and since an average hardly moves, the
        source's own words cannot shine through. Causal, latent frame by latent frame: chunking makes no difference.
        """
        neutral = []
        for frame in free.unbind(2):
            self._average = frame if self._average is None else self._average + REFERENCE_RATE * (frame - self._average)
            neutral.append(self._average)
        return torch.stack(neutral, 2)

    def _extremes(self, free: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        """The most closed and the widest mouth that the source has shown so far, pose-free [1, K, 1, g, g].

        They tell the model how this person's closed lips measure, and how far this mouth opens.
        """
        opening = self.model.ruler.opening(fields)
        groups = opening if self._rollout.chunk else torch.cat([opening[:1].expand(FRAMES_PER_LATENT - 1), opening])
        means = rearrange(groups, "(t f) -> t f", f=FRAMES_PER_LATENT).mean(1)
        for frame, value in zip(free.unbind(2), means.tolist(), strict=True):
            if self._shut is None or value < self._shut[0]:
                self._shut = value, frame
            if self._wide is None or value > self._wide[0]:
                self._wide = value, frame
        assert self._shut is not None and self._wide is not None
        return self._shut[1][:, :, None], self._wide[1][:, :, None]

    def _believable(self, generated: Tensor, neutral: Tensor) -> Tensor:
        """Keep pose-free latents [1, K, T, g, g] to movements that mouths make, and to what this mouth can do.

        Guidance makes timid mouths on strangers as large as real ones, and now and then one of them monstrous. So an
        opening bends towards a limit above the widest that the source has shown, and lips press only a little
        beyond the most closed. Latent frame by latent frame.
        """
        assert self._shut is not None and self._wide is not None
        codec, ruler, rest = self._codec, self.model.ruler, self._codec.still(self._shut[1])
        shape = codec.config.shape_channels
        closed, widest = (float(ruler.opening(codec.decode_fields(z)).mean()) for z in (rest, self._wide[1]))
        limit = max(WIDEST_FACTOR * (widest - closed), WIDEST_PX)
        kept = []
        for frame, own in zip(generated.unbind(2), neutral.unbind(2), strict=True):
            moved = own + codec.as_mouths_move(frame - own)
            opening = float(ruler.opening(codec.decode_fields(moved)).mean()) - closed
            gain = bent(self._strength * opening, limit) / opening if abs(opening) > 1e-3 else self._strength
            kept.append(torch.cat([torch.lerp(rest[:, :shape], moved[:, :shape], gain), moved[:, shape:]], 1))
        return torch.stack(kept, 2)

    def _fields(self, z: Tensor) -> Tensor:
        """Shape fields [F, 20, 20, 2] of the latents of the chunk just generated."""
        groups = self._codec.decode_fields(rearrange(z, "1 k t h w -> t k h w"))
        frames = groups.flatten(0, 1)
        return frames[FRAMES_PER_LATENT - 1 :] if self._rollout.chunk == 1 else frames  # the lone first frame

    def _even(self, moves: Tensor) -> Tensor:
        """Movements [F, 20, 20, 2] off the resting shape, each the mean of itself and its neighbours in time (1 2 1).

        From frame to frame networks tremble more than lips do, most where one latent frame meets the next. Symmetric,
        hence without lag. The last frame of a chunk, whose neighbour is not made yet, stays as it is.
        """
        before = moves[:0] if self._move_before is None else self._move_before
        self._move_before = moves[-1:].clone()
        known = torch.cat([before, moves])
        between = (known[:-2] + 2 * known[1:-1] + known[2:]) / 4
        even = moves.clone()
        even[len(moves) - 1 - len(between) : -1] = between
        return even

    def _keep_outline(self, moves: Tensor, resting: Tensor, source: Tensor) -> Tensor:
        """Hold the generated shape to the source's head: [F, 20, 20, 2] each, crop px.

        What is *constantly* different from the source's resting face in chin and jaw is taken out: how the jaw moves
        is the model's to say, how it is built is the source's. The lips keep their mean: a silent source must not keep
        a speaking mouth shut. And the lips stay where the source's are from left to right, which speech does not
        change but a turning head does. Causal, frame by frame.
        """
        kept = []
        lips = 1 - self._outline
        for move, rest, own in zip(moves, resting, source, strict=True):
            self._offset = move if self._offset is None else self._offset + OFFSET_RATE * (move - self._offset)
            shape = rest + move - self._outline * self._offset
            kept.append(_straight(shape, own, lips))
        return torch.stack(kept)

    def _close(self, shapes: Tensor, shut_z: Tensor, source: Tensor, quiet: Float) -> Tensor:
        """Shapes [F, 20, 20, 2] with the lips closed by ``quiet`` [F]: the source's most closed mouth in its own pose.

        A source that has never closed its mouth is closed beyond that, lip on lip.
        """
        lips = 1 - self._outline
        closed = torch.stack([_straight(c, own, lips) for c, own in zip(self._fields(shut_z), source, strict=True)])
        gap = (self.model.ruler.opening(closed) - SHUT_PX).clamp(min=0)
        closed = closed - gap[:, None, None, None] * self.model.gaping
        return torch.lerp(shapes, closed, torch.from_numpy(quiet)[:, None, None, None])

    def _inside(
        self, shapes: Tensor, source: Tensor, textures: Tensor, painted: Decoded | None
    ) -> tuple[Tensor, Tensor]:
        """Show this person's own teeth where the mouth opens (`lipstream.inside`).

        Before the source has opened its mouth once, the painter has its way. Gives paint [F, 3, h, w] and gate
        [F, h, w] of the paint box. Causal, frame by frame.
        """
        top, bottom, left, right = self.model.codec.config.paint_box_px
        window = self._codec.inside_window(shapes)
        paints, gates = [], []
        for i, shape in enumerate(shapes):
            self._memory.see(source[i], textures[i, :, top:bottom, left:right])
            own, share = self._memory.show(shape)
            if own is not None:
                paints.append(own)
                gates.append(share * window)
            else:
                assert painted is not None  # nothing has been shown yet
                paints.append(painted.paint[0, i])
                gates.append(painted.gate[0, i])
        return torch.stack(paints), torch.stack(gates)

    def commit(self) -> None:
        """Pay the clean pass now (between chunks) instead of at the start of the next step."""
        with torch.inference_mode():
            self._rollout.commit()

    def _mouths(self, fields: Tensor, paint: Tensor, gate: Tensor) -> list[Mouth]:
        top, bottom, left, right = self.model.codec.config.paint_box_px
        count = len(fields)
        canvas = np.zeros((count, CANVAS_PX, CANVAS_PX, 3), np.uint8)
        colours = (paint.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        canvas[:, top:bottom, left:right] = rearrange(colours, "f c h w -> f h w c").numpy()
        gates = np.zeros((count, CANVAS_PX, CANVAS_PX), np.float32)
        gates[:, top:bottom, left:right] = gate.numpy()
        shapes = fields.numpy()
        return [Mouth(shapes[i], canvas[i], gates[i]) for i in range(count)]
