"""The official chain, for comparison with the reference: the same pipeline and session with the reference's own rules.

    lipsync = LipSync.from_pretrained("lipforcing-14b", device="cuda", parity=True)
    lipsync("talk_25fps.mp4", "speech.wav", "out.mp4")

Rounded anchors and half-precision warps (`faces.official`), one draw of noise for the clip
(`diffusion.official_noise`), the official mask, float pictures pasted back as whole crops (`faces.official_paste`),
12 n - 3 frames of 25 a second, speech rows of the whole file. The VAE encodes one latent frame a pass in bfloat16, the
TAE decodes in float16.

What our own mode promises does not hold here: the result may be half a second shorter than the speech, timestamps other
than 25 fps and frames without a face are refused, cuts are not seen, the whole crop is touched. What is still not the
reference's: the anchors are those of our face mesh (InsightFace's model is non-commercial and not part of this; give
``anchors`` to bring it), the decoder of the source, and the encoder of the result, which encodes once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from lipstream.diffusion.lengths import official_length
from lipstream.diffusion.official_noise import OfficialNoise
from lipstream.engines import ReadSpeech, Rows
from lipstream.faces.composite import Patch
from lipstream.faces.mouth_mask import Float
from lipstream.faces.official import Aligned, OfficialAligner, anchors_from_mesh
from lipstream.faces.official_paste import OfficialCompositor
from lipstream.faces.track import FaceTrack, FaceTracker
from lipstream.fullsize import FullSizeModel, FullSizeTake
from lipstream.fullsize_engine import FullSizeEngine
from lipstream.fullsize_session import Crop
from lipstream.fullsize_speech import OfficialRows
from lipstream.manner import Manner
from lipstream.media.bounce import BouncingReader
from lipstream.media.opening import MediaError
from lipstream.media.reader import SourceFrame, VideoReader
from lipstream.media.timeline import MODEL_FPS, Fit, Length
from lipstream.models.wav2vec_features import SpeechFeatures
from lipstream.options import Silence, SyncOptions
from lipstream.session import Observed, TakeSession

log = logging.getLogger(__name__)

#: A frame [H, W, 3] uint8 RGB -> anchors [3, 2] (see `faces.official`), or None where no face shows.
Anchors = Callable[[NDArray[np.uint8]], NDArray[np.float64] | None]
_FPS_FIX = "bring it to constant 25 fps first (ffmpeg -i IN -r 25 OUT), or leave --parity out"


def check_source(path: str | os.PathLike[str]) -> None:
    """Refuse a video whose header tells another rate, before anything is loaded; `OfficialObserver` checks each frame.

    Raises:
        MediaError: other than about 25 fps.
    """
    fps = VideoReader(path).fps
    if abs(fps / MODEL_FPS - 1) > Fraction(1, 100):
        raise MediaError(
            path, f"has {float(fps):g} frames a second, the official chain takes every video as 25", _FPS_FIX
        )


class OfficialObserver:
    """First half: the official alignment of every frame.

    Args:
        name: of the video, for messages.
        anchors: where the face is; None: where our own mesh has it.
    """

    def __init__(self, name: str, anchors: Anchors | None = None) -> None:
        self._name, self._anchors = name, anchors
        self._aligner = OfficialAligner()
        self._first_pts: int | None = None

    @cached_property
    def _tracker(self) -> FaceTracker:
        return FaceTracker()

    def step(self, frame: SourceFrame) -> Observed[Aligned, Crop]:
        """Align the only face of one frame; frames come in order of time."""
        return self.look(frame, None if self._anchors else self._tracker.step(frame.image))

    def look(self, frame: SourceFrame, track: FaceTrack | None, cut: bool = False) -> Observed[Aligned, Crop]:
        """Align a face that somebody else tracked; cuts are nothing to the official chain.

        Raises:
            MediaError: it does not stand on the 25 fps grid, or shows no face.
        """
        self._first_pts = frame.pts if self._first_pts is None else self._first_pts
        place = (frame.pts - self._first_pts) * frame.time_base * MODEL_FPS
        if place != frame.index:
            raise MediaError(
                self._name,
                f"its frame {frame.index} stands at {float(place / MODEL_FPS):.3f} s, at 25 fps it would at "
                f"{frame.index / MODEL_FPS:.3f} s, and the official chain takes frames by their number",
                _FPS_FIX,
            )
        if self._anchors is not None:
            anchors = self._anchors(frame.image)
        else:
            anchors = None if track is None else anchors_from_mesh(track.landmarks)
        if anchors is None:
            raise MediaError(
                self._name,
                f"its frame {frame.index} ({frame.index / MODEL_FPS:.2f} s) shows no face, and the official chain "
                "drops such a clip",
                "cut it, or leave --parity out: such frames then stay as they are",
            )
        aligned = self._aligner.step(frame.image, anchors)
        return Observed(frame, aligned, aligned.picture, False)


class OfficialTake(FullSizeTake):
    """A take whose pictures stay what the decoder made: [size, size, 3] float32 in 0..1."""

    @torch.inference_mode()
    def step(self, crops: Sequence[Crop], speech: Tensor) -> list[Float]:  # type: ignore[override]
        """As `FullSizeTake.step`."""
        return list(rearrange(self.pictures(crops, speech), "f c h w -> f h w c").cpu().numpy())


class OfficialSession(TakeSession[Aligned, Crop, Float]):
    """Second half: one take for the whole clip, with the noise of the whole clip.

    Args:
        model: the networks.
        compositor: how pictures go back.
        time_base, rows: see :class:`TakeSession`; the rows tell the clip's length.
        seed: of all noise.
    """

    def __init__(
        self, model: FullSizeModel, compositor: OfficialCompositor, time_base: Fraction, rows: OfficialRows, seed: int
    ) -> None:
        super().__init__(time_base, rows)
        self._model, self._compositor, self._speech, self._seed = model, compositor, rows, seed

    def _new_take(self) -> OfficialTake:
        model = self._model
        latents = self._speech.length.latent_frames
        shape = (1, model.dit.config.latent_channels, latents, model.cells, model.cells)
        if model.device.type != "cuda" or model.dtype != torch.bfloat16:
            log.warning(
                "parity: noise is drawn on %s in %s; the official scripts draw it on CUDA in bfloat16, so their videos "
                "differ from this one", model.device.type, model.dtype,
            )  # fmt: skip
        noise = OfficialNoise(shape, seed=self._seed, dtype=model.dtype, device=model.device)
        return OfficialTake(model, noise=noise)

    def _patch(
        self, image: NDArray[np.uint8], face: Aligned, mouth: Float, after: Float | None, share: float, strength: float
    ) -> Patch | None:
        height, width = image.shape[:2]
        composed = self._compositor(image, mouth, face)
        return Patch((0, 0, width, height), composed, np.full((height, width), 255, np.uint8))


class ParityEngine(FullSizeEngine):
    """A loaded full-size model that runs as the reference does; see `lipstream.engines.Engine`.

    Args:
        anchors: makes the function that finds a face in the frames of one run; None: our mesh.
    """

    silences: tuple[Silence, ...] = ("model",)
    steadies = False  # the reference smooths in its own way

    def __init__(
        self, model: FullSizeModel, features: SpeechFeatures, anchors: Callable[[], Anchors] | None = None
    ) -> None:
        super().__init__(model, features)
        self._anchors = anchors
        self._official = OfficialCompositor(model.mask)

    @classmethod
    def refuses(cls, options: SyncOptions) -> str | None:
        """See `Engine`."""
        if options.voices:  # whole pictures are pasted back: the second would replace the first
            return "a parity run has one voice: leave out --voice"
        if options.strength != 1 or options.silence not in (None, *cls.silences):
            return "a parity run has the model's own mouths: leave out --strength and --silence"
        if (options.resolved_length, options.resolved_fit) != ("bounce", "audio"):
            return "a parity run has the official length: leave out --length and --fit"
        return None

    def frames(
        self, reader: VideoReader, speech_samples: int, length: Length = "bounce", fit: Fit = "audio"
    ) -> BouncingReader:
        """See `Engine`; 12 n - 3 frames, at least 9, whatever the video's and the speech's rest."""
        count = official_length(speech_samples, float_seconds=True).pixel_frames
        return BouncingReader(reader, speech_samples, frames=count)

    def observer(self, name: str = "the video") -> OfficialObserver:
        """See `Engine`."""
        return OfficialObserver(name, None if self._anchors is None else self._anchors())

    def rows(self, read: ReadSpeech) -> OfficialRows:
        """See `Engine`."""
        return OfficialRows(self.features, read)

    def session(self, time_base: Fraction, rows: Rows, seed: int, manner: Manner) -> OfficialSession:
        """See `Engine`; the rows are those of :meth:`rows`."""
        if not isinstance(rows, OfficialRows):
            raise ValueError("the official chain needs the official rows: they tell how long the clip is")
        return OfficialSession(self.model, self._official, time_base, rows, seed)
