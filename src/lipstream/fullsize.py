"""The model side of lip-sync at the official sizes: aligned 512 px crops and speech in, generated crops out.

What `mouth.Take` is for the canvas of the small model, `FullSizeTake` is for the networks of the paper (spec sections
1.2 and 4.2): one uninterrupted stretch of one face with all its state. The source is encoded twice, as it is and with
the mouth zeroed, by two streams over one set of weights; the two-step rollout makes new latents; a decoder makes
pixels of them. 9 pixel frames first, 12 after that.

    model = FullSizeModel(dit, WanVAE(...), TAE(...), mouth_mask("built-in"), text=prompt)
    take = FullSizeTake(model, seed=0)
    crops = take.step(crops, speech_rows)             # or stage by stage, each of which may run ahead:
    source = take.encode(crops)                       # latents of the next chunk; may also come prepared
    x0 = take.generate(source, speech_rows)
    frames = take.decode(x0)

Which codec encodes and which decodes is the caller's to say: the released pipeline encodes with the Wan VAE and decodes
with the tiny one. Both are seen through the protocols below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from lipstream.diffusion.lengths import PIXEL_FRAMES_PER_LATENT_FRAME, pixel_frames_of
from lipstream.diffusion.rollout import NoiseSource, Rollout, RolloutSnapshot
from lipstream.faces.mouth_mask import MouthMask
from lipstream.media.timeline import CHUNK_PIXEL_FRAMES, FIRST_CHUNK_PIXEL_FRAMES
from lipstream.models.dit import Conditions, DiT
from lipstream.models.pixels import masked, normalised
from lipstream.streaming.base import Snapshot

CELL_PX = 8  # pixels per latent cell


class CodecStream(Protocol):
    """What encoders and decoders share: a twin for each stream, whose state can be kept."""

    @property
    def pixel_range(self) -> tuple[float, float]:
        """Lowest and highest pixel value: (-1, 1) for the Wan VAE, (0, 1) for the tiny one."""
        ...

    def stream_view(self, batch: int, /) -> Self:
        """A streaming twin with the same weights and a state of its own."""
        ...

    def reset(self, batch: int, /) -> None: ...

    def snapshot(self) -> Snapshot: ...

    def restore(self, snapshot: Snapshot, /) -> None: ...


class VideoEncoder(CodecStream, Protocol):
    """Pixels -> latents, chunk by chunk."""

    def encode(self, video: Tensor, /) -> Tensor:
        """Next pixel frames [B, 3, F, H, W] in `pixel_range` -> [B, C, T, H/8, W/8] as the DiT reads them."""
        ...


class VideoDecoder(CodecStream, Protocol):
    """Latents -> pixels, chunk by chunk."""

    def decode(self, latents: Tensor, /) -> Tensor:
        """Next latent frames [B, C, T, H/8, W/8] -> [B, 3, F, H, W] in `pixel_range`."""
        ...


class FullSizeModel:
    """The networks of an official size, ready for inference. Dtypes and devices stay as they come.

    Args:
        text: prompt embedding [1, L, text_dim]; rows behind the prompt may be left out.
        size: of the square crops, px.
    """

    def __init__(
        self,
        dit: DiT,
        encoder: VideoEncoder,
        decoder: VideoDecoder,
        mask: MouthMask,
        *,
        text: Tensor | None,
        size: int = 512,
        guidance: float = 1.0,
    ) -> None:
        if size % (2 * CELL_PX):
            raise ValueError(f"the crop's size must be a multiple of {2 * CELL_PX} px, got {size}")
        self.dit = dit.eval().requires_grad_(False)
        self.encoder, self.decoder = encoder, decoder
        self.mask, self.size, self.guidance = mask, size, guidance
        self.cells = size // CELL_PX
        device = dit.device
        with torch.inference_mode():  # keys and values of the prompt, once for all takes
            self.text = None if text is None else dit.prepare_text(text.to(device, dit.dtype))
        cells = torch.from_numpy(mask.latent_regenerate(self.cells, self.cells))
        self.mask_cells = cells[None, None, None].to(device, dit.dtype)  # 1 = regenerate
        self.kept_pixels = torch.from_numpy(mask.pixel_keep(size)).to(device)  # 1 = keep

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the DiT."""
        return self.dit.dtype

    @property
    def device(self) -> torch.device:
        """Where the DiT runs; crops and latents are brought there."""
        return self.dit.device


@dataclass(frozen=True)
class SourceLatents:
    """A chunk of the source as the DiT sees it, [1, C, T, H, W] each: can be made ahead and kept.

    Attributes:
        source: of the crops as they are; the reference sequence, and in its first latent frame the reference.
        masked: of the crops with the mouth zeroed.
    """

    source: Tensor
    masked: Tensor

    @property
    def latent_frames(self) -> int:
        """T."""
        return self.source.shape[2]


@dataclass(frozen=True)
class TakeSnapshot:
    """All that a take knows between two chunks."""

    rollout: RolloutSnapshot
    codecs: tuple[Snapshot, Snapshot, Snapshot]
    audio: Snapshot
    reference: Tensor | None = field(repr=False)


class FullSizeTake:
    """State of one face's uninterrupted stretch of video; see the module docstring.

    Args:
        seed: of all noise; chunk k's noise depends on (seed, k) only.
        noise: replaces the seeded noise (parity runs, see `diffusion.official_noise`).
        reference: latents of an unmasked identity frame [1, C, 1, H, W]; default: the first frame of this take.
    """

    def __init__(
        self,
        model: FullSizeModel,
        seed: int = 0,
        *,
        noise: NoiseSource | None = None,
        reference: Tensor | None = None,
    ) -> None:
        self.model = model
        self._source, self._masked = model.encoder.stream_view(1), model.encoder.stream_view(1)
        self._decoder = model.decoder.stream_view(1)
        self._audio_pack = model.dit.audio_proj.stream_view(1)
        self._rollout = Rollout(
            model.dit, height=model.cells, width=model.cells, seed=seed, guidance=model.guidance, noise=noise
        )
        self._given_reference = reference
        self._reference = reference

    @property
    def next_pixel_frames(self) -> int:
        """How many frames the next :meth:`step` takes."""
        return FIRST_CHUNK_PIXEL_FRAMES if self._rollout.chunk == 0 else CHUNK_PIXEL_FRAMES

    @torch.inference_mode()
    def step(self, crops: Sequence[NDArray[np.uint8]], speech: Tensor) -> list[NDArray[np.uint8]]:
        """Generate one chunk.

        Args:
            crops: ``next_pixel_frames`` aligned crops [size, size, 3] uint8.
            speech: [pixel frames, audio_dim] feature rows of the same frames.

        Returns:
            As many crops, [size, size, 3] uint8.

        Raises:
            ValueError: wrong number or size of crops, wrong number of rows.
        """
        levels = (self.pictures(crops, speech) * 255 + 0.5).clamp(0, 255).to(torch.uint8)
        return list(rearrange(levels, "f c h w -> f h w c").cpu().numpy())

    def pictures(self, crops: Sequence[NDArray[np.uint8]], speech: Tensor) -> Tensor:
        """:meth:`step` without rounding: [F, 3, size, size] in 0..1, float32, on the decoder's device."""
        if len(crops) != self.next_pixel_frames or len(speech) != len(crops):
            raise ValueError(
                f"a step takes {self.next_pixel_frames} crops and rows, got {len(crops)} crops, {len(speech)} rows"
            )
        return self.decode(self.generate(self.encode(crops), speech))

    @torch.inference_mode()
    def encode(self, crops: Sequence[NDArray[np.uint8]]) -> SourceLatents:
        """Latents of the next crops; depends on the crops before alone, so it may run ahead of `generate`.

        Raises:
            ValueError: crops of another size.
        """
        size = self.model.size
        wrong = {crop.shape for crop in crops if crop.shape != (size, size, 3)}
        if wrong or not crops:
            raise ValueError(f"crops must be {size} x {size} x 3, got {sorted(wrong) if wrong else 'none'}")
        frames = normalised(crops, self.model.device)
        low, high = self.model.encoder.pixel_range

        def encoded(stream: VideoEncoder, video: Tensor) -> Tensor:
            return stream.encode((video + 1) * ((high - low) / 2) + low if (low, high) != (-1, 1) else video)

        source = encoded(self._source, frames)
        hidden = encoded(self._masked, masked(frames, self.model.kept_pixels))
        return SourceLatents(source.to(self.model.dtype), hidden.to(self.model.dtype))

    def conditions(self, latents: SourceLatents, speech: Tensor) -> Conditions:
        """All that steers the next chunk; advances the audio pack.

        Raises:
            ValueError: other than one row of speech per pixel frame of the latents.
        """
        rows = pixel_frames_of(latents.latent_frames)
        if self._rollout.chunk:  # the first latent frame of a take holds one pixel frame, all others four
            rows += PIXEL_FRAMES_PER_LATENT_FRAME - 1
        if len(speech) != rows:
            raise ValueError(f"{latents.latent_frames} latent frames take {rows} rows of speech, got {len(speech)}")
        if self._reference is None:
            self._reference = latents.source[:, :, :1]
        return Conditions(
            reference=self._reference,
            mask=self.model.mask_cells,
            masked_video=latents.masked,
            ref_sequence=latents.source,
            audio=self._audio_pack(speech.to(self.model.device, self.model.dtype)[None]),
            text=self.model.text,
        )

    @torch.inference_mode()
    def generate(self, latents: SourceLatents, speech: Tensor) -> Tensor:
        """Clean latents [1, C, T, H, W] of the next chunk."""
        return self._rollout.step(self.conditions(latents, speech))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [F, 3, size, size] in 0..1, float32, of the next clean latents: what parity compositing takes."""
        low, high = self.model.decoder.pixel_range
        video = self._decoder.decode(latents).float()
        return rearrange((video - low) / (high - low), "1 c f h w -> f c h w").clamp(0, 1)

    def commit(self) -> None:
        """Pay the clean pass now (between chunks) instead of at the start of the next step."""
        with torch.inference_mode():
            self._rollout.commit()

    def snapshot(self) -> TakeSnapshot:
        """An independent copy of the state between two chunks."""
        codecs = self._source.snapshot(), self._masked.snapshot(), self._decoder.snapshot()
        return TakeSnapshot(self._rollout.snapshot(), codecs, self._audio_pack.snapshot(), self._reference)

    def restore(self, snapshot: TakeSnapshot) -> None:
        """Go back to a snapshot of a take of an equal model."""
        self._rollout.restore(snapshot.rollout)
        for stream, state in zip((self._source, self._masked, self._decoder), snapshot.codecs, strict=True):
            stream.restore(state)
        self._audio_pack.restore(snapshot.audio)
        self._reference = snapshot.reference

    def reset(self) -> None:
        """Begin a new stretch of video with the same noise."""
        self._rollout.reset()
        for stream in (self._source, self._masked, self._decoder):
            stream.reset(1)
        self._audio_pack.reset(1)
        self._reference = self._given_reference
