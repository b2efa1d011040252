"""The official sizes behind `LipSync`: what has to lie in their folder, whether it fits in memory, how it is loaded.

    lipstream pull lipforcing-14b                                    # the files, into ~/.cache/lipstream
    lipsync = LipSync.from_pretrained("lipforcing-14b", device="cuda")
    lipsync("talk.mp4", "speech.wav", "out.mp4")                     # the same stages as for the small model

A folder holds the student, the codecs, the speech network and the prompt: its embedding, or the text encoder that makes
it once. Each network is the official file, or what `lipstream convert` made of it in a folder of its kind's name
(`student/`, `wan-vae/`, `tae/`, `wav2vec2/`, `umt5/`). Files are mapped, not read, until a network needs them; the
preflight comes before all of that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from lipstream.checkpoints.convert import Assembled, assemble
from lipstream.checkpoints.encoders import (
    load_prompt_embedding,
    load_prompt_encoder,
    load_prompt_tokenizer,
    save_prompt_embedding,
)
from lipstream.devices import free_bytes, usable_device
from lipstream.diffusion.lengths import CHUNK_LATENT_FRAMES
from lipstream.engines import Observes, ReadSpeech, Rows
from lipstream.faces.crop import CropCompositor
from lipstream.faces.mouth_mask import MouthMask, mouth_mask
from lipstream.fullsize import FullSizeModel, VideoDecoder
from lipstream.fullsize_session import CropObserver, CropSession
from lipstream.fullsize_speech import FileRows, WindowedRows
from lipstream.manner import Manner
from lipstream.media.bounce import BouncingReader
from lipstream.media.reader import VideoReader
from lipstream.media.timeline import Fit, Length
from lipstream.memory import MemoryNeed, MemoryRequest, check_memory, memory_need
from lipstream.models.dit import DiT
from lipstream.models.dit_config import DiTConfig
from lipstream.models.text import PROMPT, PromptEmbedding
from lipstream.models.wan_vae import WanVAE
from lipstream.models.wav2vec_features import SpeechFeatures
from lipstream.models.wav2vec_windowed import WindowConfig
from lipstream.options import Silence, SyncOptions
from lipstream.session import TakeSession

log = logging.getLogger(__name__)

STUDENT_FILES = ("lipforcing_14b.pth", "lipforcing_1.3b.pth")
VAE_FILE, TAE_FILE, SPEECH_FOLDER, MASK_FILE = "Wan2.1_VAE.pth", "taew2_1.pth", "wav2vec2-base-960h", "mask.png"
TEXT_FILE, TOKENIZER_FOLDER, PROMPT_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl", "prompt.safetensors"

Decoder = Literal["tae", "wan"]
DECODERS = get_args(Decoder)


@dataclass(frozen=True, kw_only=True)
class FullSizeOptions:
    """How a full-size model runs.

    Attributes:
        device: torch device.
        dtype: of the DiT and the codecs.
        decoder: "tae" is what the release decodes with, "wan" is slower and a little finer.
        mask: "built-in", a file, or None: the folder's `mask.png`.
        memory_bytes: what may be used; None asks the device.
        window: hear speech as it comes, only so far ahead; None: the whole file first.
        parity: load what `fullsize_parity.ParityEngine` needs.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    decoder: Decoder = "tae"
    mask: str | os.PathLike[str] | None = None
    memory_bytes: int | None = None
    window: WindowConfig | None = None
    parity: bool = False

    def __post_init__(self) -> None:
        if self.parity and self.window is not None:
            raise ValueError("parity hears the whole speech first, so it has no look-ahead: give only one of the two")
        if self.parity and self.mask == "built-in":
            raise ValueError(
                "parity needs the official mask: leave the mask out (the model's mask.png) or name its file"
            )


class FullSizeEngine:
    """A loaded full-size model; see `lipstream.engines.Engine`."""

    silences: tuple[Silence, ...] = ("model", "source", "close")
    steadies = True

    @classmethod
    def refuses(cls, options: SyncOptions) -> str | None:
        """See `Engine`."""
        if options.strength != 1:
            return (
                f"a full-size model has no strength (got {options.strength:g}): its mouths are pictures, nothing in "
                "them says how far lips moved; leave out --strength"
            )
        return None

    def __init__(self, model: FullSizeModel, features: SpeechFeatures, window: WindowConfig | None = None) -> None:
        self.model, self.features, self.window = model, features, window
        self._compositor = CropCompositor(model.mask)

    @classmethod
    def load(
        cls, folder: Path, options: FullSizeOptions, on_memory: Callable[[MemoryNeed], None] | None = None
    ) -> Self:
        """Check all files and the memory, then load.

        Args:
            on_memory: told what the model takes, before anything is loaded.

        Raises:
            ValueError: a file is missing or does not fit, or the memory is not enough; one line with the fix.
        """
        files = _Files(folder)
        device = usable_device(options.device)
        mask = _mask(files, options)
        student = files.part("student", *STUDENT_FILES)
        codecs = [files.part("wan-vae", VAE_FILE)]
        if options.decoder == "tae":
            codecs.append(files.part("tae", TAE_FILE))
        speech = files.part("wav2vec2", SPEECH_FOLDER)
        files.check_prompt()
        encode_latent_frames = 1 if options.parity else CHUNK_LATENT_FRAMES  # a pass; the reference takes one
        request = MemoryRequest(
            config=DiTConfig.from_dict(student.config),
            dtype=options.dtype,
            decoder=options.decoder,
            speech_bytes=sum(path.stat().st_size for path in speech.source.files),
            encode_latent_frames=encode_latent_frames,
        )
        need = memory_need(request)
        if on_memory is not None:
            on_memory(need)
        for part, count in need.table():
            log.info("memory: %s %.2f GB", part, count / 1e9)
        free = options.memory_bytes if options.memory_bytes is not None else free_bytes(device)
        if free is not None:
            check_memory(need, free)
        prompt = files.embedding()

        def placed(found: Assembled, dtype: torch.dtype) -> Any:
            return found.load().requires_grad_(False).to(device, dtype)

        dit: DiT = placed(student, options.dtype)
        dit.fuse_projections()
        encoder: WanVAE = placed(codecs[0], options.dtype)
        encoder.encode_latent_frames = encode_latent_frames
        # The reference decodes in float16 what it generated in bfloat16.
        half = options.parity and options.dtype == torch.bfloat16
        tae_dtype = torch.float16 if half else options.dtype
        decoder: VideoDecoder = placed(codecs[1], tae_dtype) if len(codecs) > 1 else encoder
        features: SpeechFeatures = placed(speech, torch.float32)
        features.use_attention("eager" if options.parity else "sdpa")
        model = FullSizeModel(dit, encoder, decoder, mask, text=prompt.padded())
        log.info(
            "%s: %.0f M parameters, %s, %s, mask %s, decoder %s, attention %s",
            folder, sum(p.numel() for p in dit.parameters()) / 1e6, device, options.dtype, mask.name, options.decoder,
            dit.backend,
        )  # fmt: skip
        engine = cls(model, features)
        engine.window = options.window
        return engine

    def frames(
        self, reader: VideoReader, speech_samples: int, length: Length = "bounce", fit: Fit = "audio"
    ) -> BouncingReader:
        """See `Engine`."""
        return BouncingReader(reader, speech_samples, length=length, fit=fit)

    def observer(self, name: str = "the video") -> Observes:
        """See `Engine`."""
        return CropObserver()

    def session(self, time_base: Fraction, rows: Rows, seed: int, manner: Manner) -> TakeSession[Any, Any, Any]:
        """See `Engine`."""
        return CropSession(self.model, self._compositor, time_base, rows, seed, manner)

    def rows(self, read: ReadSpeech) -> Rows:
        """See `Engine`; the official features look at the whole file, windowed ones only so far ahead."""
        return FileRows(self.features, read) if self.window is None else WindowedRows(self.features, read, self.window)


class _Files:
    """A model's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompt = folder / PROMPT_FILE

    def part(self, kind: str, *names: str) -> Assembled:
        """A network, opened and checked but not loaded: official files, or a folder that has the name of its kind."""
        there = [path for path in (self.folder / kind, *(self.folder / name for name in names)) if path.exists()]
        if not there:
            raise ValueError(
                f"{self.folder}: no {kind} in it, neither {' nor '.join(names)} nor {kind}/; `lipstream pull "
                f"lipforcing-14b --folder {self.folder}` fetches the files"
            )
        if len(there) > 1:
            found = " and ".join(path.name for path in there)
            raise ValueError(f"{self.folder}: {len(there)} of the kind {kind} in it, {found}; keep one of them")
        return assemble(there, kind=kind)

    @property
    def text(self) -> Path:
        """The text encoder: Wan's file, or what `convert` made of it."""
        converted = self.folder / "umt5"
        return converted if converted.is_dir() else self.folder / TEXT_FILE

    def check_prompt(self) -> None:
        """There is an embedding, or all that makes one: files, and main memory, where the text encoder runs."""
        if self.prompt.is_file():
            return
        if not self.text.exists():
            raise ValueError(
                f"{self.prompt}: no prompt embedding, and no {TEXT_FILE} to make it with; pull that file once, or copy "
                "the embedding from a machine that has it"
            )
        tokenizer = self.folder / TOKENIZER_FOLDER
        if not tokenizer.is_dir():
            raise ValueError(f"{tokenizer}: no such folder; `lipstream pull` fetches it")
        files = self.text.glob("*.safetensors") if self.text.is_dir() else [self.text]
        size, free = sum(file.stat().st_size for file in files), free_bytes(torch.device("cpu"))
        if free is not None and size > free:
            raise ValueError(
                f"not enough memory to embed the prompt: {size / 1e9:.1f} GB are needed once, {free / 1e9:.1f} GB are "
                f"free; make {PROMPT_FILE} on a larger machine and copy it here"
            )

    def embedding(self) -> PromptEmbedding:
        """The prompt's embedding from its file; the first time, the text encoder makes it and it is kept."""
        if self.prompt.is_file():
            return load_prompt_embedding(self.prompt)
        tokenizer = load_prompt_tokenizer(self.folder / TOKENIZER_FOLDER)
        log.info("embedding the prompt '%s': once, it is kept in %s", PROMPT, self.prompt)
        embedding = load_prompt_encoder(self.text).embed(PROMPT, tokenizer)
        save_prompt_embedding(embedding, self.prompt)
        return embedding


def _mask(files: _Files, options: FullSizeOptions) -> MouthMask:
    """The mask that was asked for; the folder's own where nothing was said."""
    if options.mask is not None:
        return mouth_mask(options.mask)
    path = files.folder / MASK_FILE
    if not path.exists():
        raise ValueError(
            f"{path}: no such mask; `lipstream pull` fetches it, --mask built-in takes ours of the same geometry"
        )
    return mouth_mask(path)
