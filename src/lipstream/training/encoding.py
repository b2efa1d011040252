"""The second half of an official sample: pictures, speech and prompt to what the networks read (spec 6.1 to 6.3).

`lipstream prepare` writes the first half (512 px pictures, sound, prompt); this adds, in the same folder,

    vae_latents_mask_all.pt     the first 81 frames, as they are and with the mouth taken out, bfloat16
    ref_latents.pt              the next 81 frames: another piece of the same take, so that nothing can be copied
    audio_emb_omniavatar.pt     a row of speech features for every frame of the sample, float32
    text_emb.pt                 the prompt's rows and zeros behind them
    encoded.json                settings and hashes; written last, so it marks the folder as finished

Run `lipstream data encode DATA`; `training.clips` reads the result. A sample is one job of `lipstream.batch`: what is
finished stays, a stopped run goes on, a changed file or setting is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.batch.jobs import Job, Worker
from lipstream.batch.run import file_stands
from lipstream.batch.state import Record
from lipstream.checkpoints.convert import assemble
from lipstream.checkpoints.encoders import load_prompt_embedding, load_speech_features, save_prompt_embedding
from lipstream.checkpoints.hashing import sha256_of
from lipstream.faces.mouth_mask import mouth_mask
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import SAMPLES_PER_MODEL_FRAME
from lipstream.models.pixels import masked, normalised
from lipstream.models.text import PromptEmbedding
from lipstream.models.wan_vae import WanVAE, two_step_masked_latents
from lipstream.models.wav2vec_features import SpeechFeatures, normalise, training_rows_for
from lipstream.training.clips import AUDIO, LATENTS, REFERENCE, SPEECH, TEXT
from lipstream.training.coded import span_frames

VIDEO, PROMPT_TEXT, DONE = "sub_clip.mp4", "prompt.txt", "encoded.json"
EMPTY = "empty.safetensors"
Masking = Literal["one-pass", "two-step"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is made.

    Attributes:
        latent_frames: of a clip; as many again are its reference.
        size: of the pictures, px.
        mask: "built-in", or the path of mask.png.
        masking: one-pass: all frames without their mouth, as inference does it. two-step: as the authors' own cached
            data, on which their weights were trained (spec 6.3).
        dtype: of the video encoder.
    """

    latent_frames: int = 21
    size: int = 512
    mask: str = "built-in"
    masking: Masking = "one-pass"
    dtype: str = "bfloat16"

    @property
    def pixel_frames(self) -> int:
        """Of a clip."""
        return span_frames(self.latent_frames)


@dataclass(frozen=True, kw_only=True)
class EncodeFactory:
    """Makes a worker: loads the encoders and returns the function that encodes one sample folder.

    Attributes:
        vae, speech: files of the video encoder and of the speech features.
        prompts: prompt -> file with its embedding.
        gpus: with device "cuda", worker i takes GPU i modulo this many (0: leave the device as it is).
    """

    config: EncodeConfig
    vae: Path
    speech: Path
    prompts: Mapping[str, Path]
    device: str = "cpu"
    gpus: int = 0

    def __call__(self, number: int) -> Worker:
        """Load; every worker process does it once."""
        name = f"cuda:{number % self.gpus}" if self.device == "cuda" and self.gpus else self.device
        device = torch.device(name)
        vae = assemble([self.vae], kind="wan-vae").load(getattr(torch, self.config.dtype)).to(device)
        assert isinstance(vae, WanVAE)
        encoder = SampleEncoder(self.config, vae.requires_grad_(False), load_speech_features(self.speech).to(device))
        prompts = {prompt: load_prompt_embedding(path) for prompt, path in self.prompts.items()}

        def work(job: Job, target: Path) -> dict[str, Any]:
            return encode_folder(job.payload, target, encoder, prompts)

        return work


class SampleEncoder:
    """The two networks that look at a sample, and the mask between them."""

    def __init__(self, config: EncodeConfig, vae: WanVAE, features: SpeechFeatures) -> None:
        self.config, self.vae, self.features = config, vae, features
        self.device = next(vae.parameters()).device
        self.kept = torch.from_numpy(mouth_mask(config.mask).pixel_keep(config.size)).to(self.device)

    @torch.inference_mode()
    def latents(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Pictures [F, size, size, 3] -> [C, T, H, W] bfloat16."""
        return self.vae.encode(normalised(pictures, self.device))[0].bfloat16().cpu()

    @torch.inference_mode()
    def masked_latents(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """The same without the mouth."""
        video = normalised(pictures, self.device)
        hidden = masked(video, self.kept)
        two_step = self.config.masking == "two-step"
        found = two_step_masked_latents(self.vae, video, hidden) if two_step else self.vae.encode(hidden)
        return found[0].bfloat16().cpu()

    @torch.inference_mode()
    def speech_rows(self, samples: NDArray[np.float32], pixel_frames: int) -> Tensor:
        """Speech of so many frames -> [at least pixel_frames, feature_dim] float32, as the official training has it."""
        heard = torch.from_numpy(samples)[None].to(self.device)
        return self.features.rows(normalise(heard), training_rows_for(pixel_frames))[0].float().cpu()


def encode_folder(
    folder: Path, target: Path, encoder: SampleEncoder, prompts: Mapping[str, PromptEmbedding]
) -> dict[str, Any]:
    """Encode one sample folder; ``target`` (encoded.json) comes last. Every file appears complete or not at all.

    Raises:
        ValueError: a file is missing, of another size, or too short; or the prompt has no embedding.
    """
    config = encoder.config
    pictures = _pictures(folder / VIDEO, config)
    prompt = read_prompt(folder)
    if prompt not in prompts:
        raise ValueError(f"{folder / PROMPT_TEXT}: the prompt '{prompt}' was not embedded; run the command again")
    count, frames = config.pixel_frames, len(pictures)
    samples = load_speech(folder / SPEECH)
    wanted = frames * SAMPLES_PER_MODEL_FRAME
    samples = np.pad(samples[:wanted], (0, max(0, wanted - len(samples))))
    clip = pictures[:count]
    parts: dict[str, Callable[[], Any]] = {
        LATENTS: lambda: {"input_latents": encoder.latents(clip), "masked_latents": encoder.masked_latents(clip)},
        REFERENCE: lambda: {"ref_sequence_latents": encoder.latents(pictures[count : 2 * count])},
        AUDIO: lambda: {"audio_emb": encoder.speech_rows(samples, frames)},
        TEXT: lambda: prompts[prompt].padded().clone(),
    }
    (folder / DONE).unlink(missing_ok=True)  # from here on the old parts are replaced one by one
    for name, make in parts.items():
        part = target.with_name(name)  # in the hidden folder beside
        torch.save(make(), part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, folder / name)
    said = {"pixel_frames": frames, "prompt": prompt, "settings": asdict(config)}
    part = target.with_name("done.part")
    part.write_text(json.dumps(said, indent=1) + "\n")
    os.replace(part, target)
    return {"pixel_frames": frames}


def _pictures(path: Path, config: EncodeConfig) -> list[NDArray[np.uint8]]:
    pictures = [frame.image for frame in VideoReader(path)]
    shape = (config.size, config.size, 3)
    if any(picture.shape != shape for picture in pictures):
        raise ValueError(
            f"{path}: pictures of {pictures[0].shape[1]} x {pictures[0].shape[0]}, needed is {config.size}"
        )
    if len(pictures) < 2 * config.pixel_frames:
        raise ValueError(
            f"{path}: {len(pictures)} frames; {config.pixel_frames} and as many for the reference are needed, or the "
            f"network would be shown what it has to make: `lipstream prepare --min-frames {2 * config.pixel_frames}`"
        )
    return pictures


def read_prompt(folder: Path) -> str:
    """The prompt of a sample folder.

    Raises:
        ValueError: it has none.
    """
    path = folder / PROMPT_TEXT
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `lipstream prepare --format folders` writes it")
    return path.read_text(encoding="utf-8").strip()


# ------------------------------------------------------------------------------------------- what there is to do


def encode_jobs(folders: Sequence[Path], config: EncodeConfig) -> list[Job]:
    """A job for each sample folder; a changed picture, sound, prompt or setting makes it be done again."""
    return [
        Job(
            id=str(folder),
            output=folder / DONE,
            payload=folder,
            wish=repr(asdict(config)),
            inputs=tuple(folder / name for name in (VIDEO, SPEECH, PROMPT_TEXT)),
            about={"sample": folder.name},
        )
        for folder in folders
    ]


def encoded_stands(job: Job, record: Record) -> bool:
    """Whether a sample that was encoded still is: the mark is the run's own, and no file is gone."""
    return file_stands(job, record) and all(
        (job.payload / name).is_file() for name in (LATENTS, REFERENCE, AUDIO, TEXT)
    )


@dataclass
class Prompts:
    """Embeddings in a folder, found by what they say of themselves; missing ones are made once.

    Attributes:
        embed: prompt -> embedding; None: there is no text encoder, so every prompt must be there.
    """

    folder: Path
    embed: Callable[[str], PromptEmbedding] | None = None
    known: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add(sorted(self.folder.glob("*.safetensors")))

    def add(self, files: Iterable[Path]) -> None:
        """Take embeddings that somebody has.

        Raises:
            ValueError: a file that holds none.
        """
        for file in files:
            self.known[load_prompt_embedding(file).prompt] = file

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """Prompts, and the empty one, that are not there yet."""
        return [prompt for prompt in dict.fromkeys(["", *wanted]) if prompt not in self.known]

    def complete(self, wanted: Iterable[str]) -> dict[str, Path]:
        """Embeddings of all these prompts and of the empty one, which training shows in place of a dropped prompt.

        Raises:
            ValueError: one is missing, and there is nothing to make it with.
        """
        for prompt in self.missing(wanted):
            if self.embed is None:
                raise ValueError(
                    f"the prompt '{prompt}' has no embedding: give the text encoder (--text, --tokenizer), or its "
                    "embedding from a machine that has it (--prompts)"
                )
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
            path = self.folder / (f"{digest}.safetensors" if prompt else EMPTY)
            save_prompt_embedding(self.embed(prompt), path)
            self.known[prompt] = path
        return {prompt: self.known[prompt] for prompt in dict.fromkeys(["", *wanted])}


def weights_of(paths: Iterable[Path]) -> str:
    """What all samples of a run share besides the settings: the weights, by their content."""
    files = [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    return " ".join(sha256_of(file)[:16] for file in files)
