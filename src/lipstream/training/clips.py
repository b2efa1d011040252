"""Official sample folders as the data of the three stages: the `task.Task` of the real sizes (spec 6.1).

A list names one folder a line. Of each folder are read:

    vae_latents_mask_all.pt     input_latents, masked_latents [C, T, H, W]: the source and the source without its mouth
    ref_latents.pt              ref_sequence_latents [C, T, H, W]: another segment of the same video
    audio_emb_omniavatar.pt     audio_emb [N, audio_dim]: rows at 25 per second, at least 1 + 4 (T - 1)
    text_emb.pt                 [1, L, text_dim]: the prompt
    audio.wav                   the speech itself, for the reward of stage 2 only

    clips = Clips(read_list(path), ClipShape.of(FLAVOURS["14b"], latent_frames=21))
    task = ClipTask(clips, built_in_mask(), ClipConfig(batch=2))

Shapes: B batch, C latent channels, T latent frames, H x W latent cells. Nothing in a file is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lipstream.checkpoints.encoders import load_official_prompt_embedding, load_prompt_embedding
from lipstream.checkpoints.mapping import load_mapped
from lipstream.diffusion.guidance import DropMode, null_conditions
from lipstream.faces.mouth_mask import MouthMask
from lipstream.media.speech import load_speech
from lipstream.models.dit import Conditions, DiT, DiTConfig
from lipstream.models.mfcc import mfcc
from lipstream.models.syncnet import SAMPLES_PER_PICTURE, SyncNet, audio_windows, prepare_frames, reward_score
from lipstream.models.tae import TAE
from lipstream.training.coded import span_frames
from lipstream.training.distill import Reward
from lipstream.training.task import Errors

LATENTS, REFERENCE, AUDIO = "vae_latents_mask_all.pt", "ref_latents.pt", "audio_emb_omniavatar.pt"
TEXT, SPEECH = "text_emb.pt", "audio.wav"
OFFICIAL_CELLS = (64, 64)  # of 512 x 512 px
SHOWN = 8  # problems in a message


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """What the numbers in a folder have to look like.

    Attributes:
        cells: latent height and width.
        latent_frames: that a clip has at least; later ones are not used.
    """

    latent_channels: int
    latent_frames: int
    audio_dim: int
    text_dim: int
    text_len: int
    cells: tuple[int, int] = OFFICIAL_CELLS

    @classmethod
    def of(cls, config: DiTConfig, latent_frames: int, cells: tuple[int, int] = OFFICIAL_CELLS) -> ClipShape:
        """What a network takes."""
        return cls(
            latent_channels=config.latent_channels, latent_frames=latent_frames, audio_dim=config.audio_dim,
            text_dim=config.text_dim, text_len=config.text_len, cells=cells,
        )  # fmt: skip


def read_list(path: Path) -> list[Path]:
    """The folders that a list names, one a line; relative ones lie beside the list.

    Raises:
        ValueError: no such list, or an empty one.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list of sample folders")
    folders = [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not folders:
        raise ValueError(f"{path}: names no sample folder")
    return folders


class Clip(NamedTuple):
    """One sample: latents [C, T, H, W], audio rows [1 + 4 (T - 1), audio_dim], text rows [L, text_dim]."""

    source: Tensor
    masked: Tensor
    reference: Tensor
    audio: Tensor
    text: Tensor


class Clips:
    """Sample folders, read when asked for.

    Args:
        zero_reference: give zeros where a folder has no ref_latents.pt, as the official loader does.
        speech: audio.wav is needed, too.
    """

    def __init__(
        self, folders: Sequence[Path], shape: ClipShape, *, zero_reference: bool = False, speech: bool = False
    ) -> None:
        self.folders, self.shape = list(folders), shape
        self.zero_reference, self.speech = zero_reference, speech

    def __len__(self) -> int:
        return len(self.folders)

    def usable(self, skip_damaged: bool = False) -> tuple[Clips, list[str]]:
        """These clips without the folders that lack something, and what they lack; reads the files' heads only.

        Raises:
            ValueError: there are such folders and they are not to be skipped, or nothing is left.
        """
        problems = {folder: self.problems(folder) for folder in self.folders}
        bad = [problem for found in problems.values() for problem in found]
        good = [folder for folder, found in problems.items() if not found]
        if bad and (not skip_damaged or not good):
            more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            fix = "encode them again, or leave them out with --skip-damaged" if good else "none is left"
            count = f"{len(problems) - len(good)} of {len(problems)} sample folders cannot be used"
            raise ValueError(f"{count}: {'; '.join(bad[:SHOWN])}{more}: {fix}")
        return Clips(good, self.shape, zero_reference=self.zero_reference, speech=self.speech), bad

    def problems(self, folder: Path) -> list[str]:
        """What is missing or misshapen in a folder, each with its file and shape."""
        if not folder.is_dir():
            return [f"{folder}: no such folder"]
        found = []
        for read in (self._latents, self._reference, self._audio, self._text, self._speech):
            try:
                read(folder)
            except ValueError as error:
                found.append(str(error))
        return found

    def load(self, number: int) -> Clip:
        """One sample, float32.

        Raises:
            ValueError: a file is missing or misshapen, or the reference gives the target away.
        """
        folder = self.folders[number]
        (source, masked), reference = self._latents(folder), self._reference(folder)
        if torch.equal(source, reference):
            raise ValueError(
                f"{folder}: {REFERENCE} is the target itself, so that a network would learn to copy it (spec 6.3); cut "
                "clips of at least 162 frames and take the reference from the 81 after the target"
            )
        parts = source, masked, reference, self._audio(folder), self._text(folder)
        return Clip(*(part.float() for part in parts))

    def samples(self, number: int) -> Tensor:
        """The speech of a sample, float32 at 16 kHz, as long as its pictures: [640 (1 + 4 (T - 1))]."""
        wanted = span_frames(self.shape.latent_frames) * SAMPLES_PER_PICTURE
        found = torch.from_numpy(load_speech(self._speech(self.folders[number])))[:wanted]
        return F.pad(found, (0, wanted - len(found)))

    def _latents(self, folder: Path) -> tuple[Tensor, Tensor]:
        stored = _tensors(folder / LATENTS, ("input_latents", "masked_latents"))
        source, masked = (self._latent(stored[name], folder / LATENTS, name) for name in stored)
        return source, masked

    def _reference(self, folder: Path) -> Tensor:
        path, name = folder / REFERENCE, "ref_sequence_latents"
        if self.zero_reference and not path.exists():
            return torch.zeros(self.shape.latent_channels, self.shape.latent_frames, *self.shape.cells)
        return self._latent(_tensors(path, (name,))[name], path, name)

    def _latent(self, tensor: Tensor, path: Path, name: str) -> Tensor:
        shape = self.shape
        wanted = [shape.latent_channels, shape.latent_frames, *shape.cells]
        fits = tensor.ndim == 4 and tensor.shape[1] >= wanted[1]
        if not fits or [*tensor[:, : wanted[1]].shape] != wanted:
            needed = f"[{wanted[0]}, at least {wanted[1]}, {wanted[2]}, {wanted[3]}]"
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, needed is {needed}")
        return tensor[:, : wanted[1]]

    def _audio(self, folder: Path) -> Tensor:
        path, rows = folder / AUDIO, span_frames(self.shape.latent_frames)
        found = _tensors(path, ("audio_emb",))["audio_emb"]
        if found.ndim != 2 or len(found) < rows or found.shape[1] != self.shape.audio_dim:
            needed = f"[at least {rows}, {self.shape.audio_dim}]"
            raise ValueError(f"{path}: audio_emb is {list(found.shape)}, needed is {needed}")
        return found[:rows]

    def _text(self, folder: Path) -> Tensor:
        path = folder / TEXT
        rows = load_official_prompt_embedding(path, "").rows
        if rows.shape[1] != self.shape.text_dim or len(rows) > self.shape.text_len:
            needed = f"[at most {self.shape.text_len}, {self.shape.text_dim}]"
            raise ValueError(f"{path}: the prompt is {list(rows.shape)}, needed is {needed}")
        return rows

    def _speech(self, folder: Path) -> Path:
        if self.speech and not (folder / SPEECH).is_file():
            raise ValueError(f"{folder / SPEECH}: no such file; the reward needs the speech itself")
        return folder / SPEECH


def cells_of(folder: Path) -> tuple[int, int]:
    """Latent height and width of a sample.

    Raises:
        ValueError: no latents there.
    """
    tensor = _tensors(folder / LATENTS, ("input_latents",))["input_latents"]
    if tensor.ndim != 4:
        raise ValueError(f"{folder / LATENTS}: input_latents is {list(tensor.shape)}, needed is [C, T, H, W]")
    return tensor.shape[2], tensor.shape[3]


def _tensors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Named tensors of a file, mapped."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        stored = load_mapped(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not readable ({str(error).splitlines()[0] if str(error) else 'cut off'})") from error
    found = {name: stored[name] for name in names if name in stored} if isinstance(stored, Mapping) else {}
    missing = [name for name in names if not isinstance(found.get(name), Tensor)]
    if missing:
        raise ValueError(f"{path}: holds no tensor {missing[0]}")
    return found


def load_empty_prompt(path: Path) -> Tensor:
    """The encoding of the empty prompt, [1, L, text_dim]: a file of lipstream (.safetensors) or an official .pt.

    Raises:
        ValueError: no such file, or of another prompt.
    """
    if path.suffix != ".safetensors":
        return load_official_prompt_embedding(path, "").rows[None].float()
    embedding = load_prompt_embedding(path)
    if embedding.prompt:
        raise ValueError(f"{path}: is of the prompt '{embedding.prompt}', needed is the empty one")
    return embedding.rows[None].float()


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How clips are shown.

    Attributes:
        drop_text, drop_audio: share of clips with the empty prompt, and of clips without speech, drawn apart.
        mouth_weight: of the squared error inside the mask; 1 outside of it.
        guidance_drop: what the null branch of guidance lacks.
    """

    batch: int
    drop_text: float = 0.0
    drop_audio: float = 0.0
    mouth_weight: float = 1.0
    guidance_drop: DropMode = "text+audio"


class ClipBatch(NamedTuple):
    """A batch of clips.

    Attributes:
        target: [B, C, T, H, W] the source; its latent frame 0 is the reference frame.
        masked, reference: [B, C, T, H, W].
        audio: [B, 1 + 4 (T - 1), audio_dim], zeros where the speech is dropped.
        text: [B, L, text_dim].
        samples: [B, S] the speech itself, of all clips; empty where it was not asked for.
    """

    target: Tensor
    masked: Tensor
    reference: Tensor
    audio: Tensor
    text: Tensor
    samples: Tensor


class ClipTask:
    """Batches of clips, and the error of a prediction.

    Args:
        mask: what is regenerated, on every latent frame.
        empty_prompt: [1, L, text_dim]; needed where text is dropped.

    Raises:
        ValueError: text is to be dropped and there is no empty prompt.
    """

    def __init__(
        self,
        clips: Clips,
        mask: MouthMask,
        config: ClipConfig,
        *,
        empty_prompt: Tensor | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if empty_prompt is None and config.drop_text:
            raise ValueError("clips without text are shown the empty prompt: give its encoding (--empty-prompt)")
        if empty_prompt is not None and empty_prompt.shape[-1] != clips.shape.text_dim:
            raise ValueError(f"the empty prompt has rows of {empty_prompt.shape[-1]}, not {clips.shape.text_dim}")
        self.clips, self.config, self.device = clips, config, torch.device(device)
        self.rng = np.random.default_rng(seed)
        self.empty_prompt = None if empty_prompt is None else empty_prompt.to(self.device)
        cells = torch.from_numpy(mask.latent_regenerate(*clips.shape.cells)).to(self.device)
        self.mask = cells[None, None, None]
        self.weight = 1 + (config.mouth_weight - 1) * cells[None]

    def batch(self, latent_frames: int, sink_apart: bool = False) -> ClipBatch:
        """Clips drawn at random.

        Raises:
            ValueError: more latent frames than the clips have, or a sink that lies apart (they have one beginning).
        """
        if sink_apart or latent_frames > self.clips.shape.latent_frames:
            raise ValueError(
                f"clips have {self.clips.shape.latent_frames} latent frames from their beginning on, asked for are "
                f"{latent_frames}{' and a sink that lies apart' if sink_apart else ''}"
            )
        config, rng = self.config, self.rng
        numbers = rng.integers(len(self.clips), size=config.batch)
        no_text, no_audio = rng.random((2, config.batch)) < [[config.drop_text], [config.drop_audio]]
        loaded = [self.clips.load(int(number)) for number in numbers]
        source, masked, reference = (
            torch.stack([clip[part][:, :latent_frames] for clip in loaded]).to(self.device) for part in range(3)
        )
        audio = torch.stack([clip.audio[: span_frames(latent_frames)] for clip in loaded])
        audio[torch.from_numpy(no_audio)] = 0
        texts = [self._empty() if dropped else clip.text for clip, dropped in zip(loaded, no_text, strict=True)]
        longest = max(len(text) for text in texts)
        text = torch.stack([F.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
        samples = torch.zeros(config.batch, 0)
        if self.clips.speech:
            until = span_frames(latent_frames) * SAMPLES_PER_PICTURE
            samples = torch.stack([self.clips.samples(int(number))[:until] for number in numbers])
        return ClipBatch(
            source, masked, reference, audio.to(self.device), text.to(self.device), samples.to(self.device)
        )

    def _empty(self) -> Tensor:
        assert self.empty_prompt is not None
        return self.empty_prompt[0].cpu()

    def conditions(self, model: DiT, batch: ClipBatch, *, null: bool = False) -> Conditions:
        """All 65 channels' worth beside the noisy ones; ``null``: what `ClipConfig.guidance_drop` leaves.

        Raises:
            ValueError: the text is to be dropped and there is no empty prompt.
        """
        conditions = Conditions(
            reference=batch.target[:, :, :1],
            mask=self.mask,
            masked_video=batch.masked,
            ref_sequence=batch.reference,
            audio=None if null else model.pack_audio(batch.audio),
            text=batch.text,
        )
        return null_conditions(conditions, self.config.guidance_drop, self.empty_prompt) if null else conditions

    def errors(self, x0: Tensor, target: Tensor) -> Errors:
        """Mean weighted squared error of each latent frame."""
        latent = ((x0 - target).square() * self.weight[None, :, None]).mean((1, 3, 4))
        return Errors(latent, latent)


def sync_reward(tae: TAE, syncnet: SyncNet) -> Reward:
    """The reward of stage 2: SyncNet's confidence on the pictures that the tiny auto-encoder makes of x0 (spec 5.2)."""

    @torch.no_grad()
    def reward(z: Tensor, batch: ClipBatch) -> Tensor:
        found = []
        for latents, samples in zip(z, batch.samples, strict=True):
            video = tae.decode(latents[None])[0].float()
            pictures = (video * 255).to(torch.uint8).movedim(1, 0)  # [F, 3, H, W], truncated as in the release
            lips = syncnet.embed_lips(prepare_frames(pictures)[None])[0]
            windows = audio_windows(mfcc(samples.cpu())).to(lips)
            found.append(reward_score(lips, syncnet.embed_speech(windows)).confidence)
        return torch.stack(found)

    return reward
