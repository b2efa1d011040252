"""The official sizes behind `LipSync`: what has to lie in their folder, whether it fits in memory, how it is loaded.

    lipstream pull lipforcing-14b                                    # the files, into ~/.cache/lipstream
    lipsync = LipSync.from_pretrained("lipforcing-14b", device="cuda")
    lipsync("talk.mp4", "speech.wav", "out.mp4")                     # the same stages as for the small model

A folder holds the student (a file of `STUDENT_FILES`, or a model folder `student/` made by `lipstream convert`), the
codecs, the speech network and the prompt: its embedding, or the text encoder that makes it once. Files are mapped, not
read, until a network needs them; the preflight comes before all of that.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lipstream.checkpoints.convert import Assembled, assemble
from lipstream.checkpoints.encoders import (
    load_prompt_embedding,
    load_prompt_encoder,
    load_prompt_tokenizer,
    load_speech_features,
    save_prompt_embedding,
)
from lipstream.checkpoints.hub import read_folder_config
from lipstream.devices import free_bytes, usable_device
from lipstream.engines import ReadSpeech, Rows
from lipstream.faces.crop import CropCompositor
from lipstream.faces.mouth_mask import MouthMask, mouth_mask
from lipstream.fullsize import FullSizeModel, VideoDecoder, VideoEncoder
from lipstream.fullsize_session import CropObserver, CropSession
from lipstream.manner import Manner
from lipstream.memory import MemoryNeed, MemoryRequest, check_memory, memory_need
from lipstream.models.audio import SAMPLES_PER_ROW
from lipstream.models.dit_config import DiTConfig
from lipstream.models.text import PROMPT, PromptEmbedding
from lipstream.models.wav2vec_features import SpeechFeatures
from lipstream.options import Silence

log = logging.getLogger(__name__)

STUDENT_FOLDER = "student"
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
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    decoder: Decoder = "tae"
    mask: str | os.PathLike[str] | None = None
    memory_bytes: int | None = None


class FullSizeEngine:
    """A loaded full-size model; see `lipstream.engines.Engine`."""

    silences: tuple[Silence, ...] = ("model", "source")

    def __init__(self, model: FullSizeModel, features: SpeechFeatures) -> None:
        self.model, self.features = model, features
        self._compositor = CropCompositor(model.mask)

    @classmethod
    def load(
        cls, folder: Path, options: FullSizeOptions, on_memory: Callable[[MemoryNeed], None] | None = None
    ) -> FullSizeEngine:
        """Check all files and the memory, then load.

        Args:
            on_memory: told what the model takes, before anything is loaded.

        Raises:
            ValueError: a file is missing or does not fit, or the memory is not enough; one line with the fix.
        """
        files = _Files(folder)
        device = usable_device(options.device)
        mask = _mask(files, options)
        student = files.student()
        codecs = [assemble([files.need(VAE_FILE)], kind="wan-vae")]
        if options.decoder == "tae":
            codecs.append(assemble([files.need(TAE_FILE)], kind="tae"))
        speech = files.need(SPEECH_FOLDER)
        files.check_prompt()
        request = MemoryRequest(
            config=DiTConfig.from_dict(student.config),
            dtype=options.dtype,
            decoder=options.decoder,
            speech_bytes=sum(path.stat().st_size for path in speech.glob("*.safetensors")),
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

        def placed(network: nn.Module) -> Any:
            return network.eval().requires_grad_(False).to(device, options.dtype)

        dit: Any = placed(student.load())
        dit.fuse_projections()
        encoder: VideoEncoder = placed(codecs[0].load())
        decoder: VideoDecoder = placed(codecs[1].load()) if len(codecs) > 1 else encoder  # type: ignore[assignment]
        features = load_speech_features(speech).to(device)
        model = FullSizeModel(dit, encoder, decoder, mask, text=prompt.padded())
        log.info(
            "%s: %.0f M parameters, %s, %s, mask %s, decoder %s, attention %s",
            folder, sum(p.numel() for p in dit.parameters()) / 1e6, device, options.dtype, mask.name, options.decoder,
            dit.backend,
        )  # fmt: skip
        return cls(model, features)

    def observer(self) -> CropObserver:
        """See `Engine`."""
        return CropObserver()

    def session(self, time_base: Fraction, rows: Rows, seed: int, manner: Manner) -> CropSession:
        """See `Engine`."""
        if manner.strength != 1:
            raise ValueError(f"a full-size model has no strength (got {manner.strength}): its mouths are pictures")
        return CropSession(self.model, self._compositor, time_base, rows, seed, manner)

    def rows(self, read: ReadSpeech) -> FileRows:
        """See `Engine`; the official features look at the whole file."""
        return FileRows(self.features, read)


class FileRows:
    """Official feature rows of a whole file, computed when the first ones are asked for.

    They are kept in main memory (43 kB a frame), not on the device. Rows behind the end of the speech, which fill up
    the last chunk, repeat the last one.
    """

    def __init__(self, features: SpeechFeatures, read: ReadSpeech) -> None:
        self._features, self._read = features, read
        self._rows: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, feature_dim] of model frames."""
        if self._rows is None:
            self._rows = self._features(*self._whole())[0].cpu()
        return self._rows[torch.arange(start, stop).clamp_max(len(self._rows) - 1)]

    def _whole(self) -> tuple[Tensor, int]:
        """All samples [1, n] and how many rows they give."""
        parts: list[np.ndarray[Any, Any]] = []
        while len(block := self._read(60 * 16_000)):
            parts.append(block)
        samples = torch.from_numpy(np.concatenate(parts))[None]
        device = next(self._features.parameters()).device
        return samples.to(device), math.ceil(samples.shape[1] / SAMPLES_PER_ROW)


class _Files:
    """A model's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompt = folder / PROMPT_FILE

    def need(self, name: str) -> Path:
        """A file or folder that has to be there."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(f"{path}: no such file; `lipstream pull lipforcing-14b --folder {self.folder}` fetches it")
        return path

    def student(self) -> Assembled:
        """The student, opened and checked but not loaded."""
        converted = self.folder / STUDENT_FOLDER
        if converted.is_dir():
            about = read_folder_config(converted)
            if about.kind != "student":
                raise ValueError(f"{converted}: holds a {about.kind}; `sync` runs a student")
            return assemble([converted], kind=about.kind, config=about.config)
        found = [self.folder / name for name in STUDENT_FILES if (self.folder / name).exists()]
        if len(found) != 1:
            names = ", ".join((f"{STUDENT_FOLDER}/", *STUDENT_FILES))
            what = "no student" if not found else f"{len(found)} students"
            raise ValueError(f"{self.folder}: {what} in it; it must hold one of {names}")
        return assemble(found, kind="student")

    def check_prompt(self) -> None:
        """There is an embedding, or all that makes one: files, and main memory, where the text encoder runs."""
        if self.prompt.is_file():
            return
        if not (self.folder / TEXT_FILE).is_file():
            raise ValueError(
                f"{self.prompt}: no prompt embedding, and no {TEXT_FILE} to make it with; pull that file once, or copy "
                "the embedding from a machine that has it"
            )
        self.need(TOKENIZER_FOLDER)
        size, free = (self.folder / TEXT_FILE).stat().st_size, free_bytes(torch.device("cpu"))
        if free is not None and size > free:
            raise ValueError(
                f"not enough memory to embed the prompt: {size / 1e9:.1f} GB are needed once, {free / 1e9:.1f} GB are "
                f"free; make {PROMPT_FILE} on a larger machine and copy it here"
            )

    def embedding(self) -> PromptEmbedding:
        """The prompt's embedding from its file; the first time, the text encoder makes it and it is kept."""
        if self.prompt.is_file():
            return load_prompt_embedding(self.prompt)
        tokenizer = load_prompt_tokenizer(self.need(TOKENIZER_FOLDER))
        log.info("embedding the prompt '%s': once, it is kept in %s", PROMPT, self.prompt)
        embedding = load_prompt_encoder(self.folder / TEXT_FILE).embed(PROMPT, tokenizer)
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
