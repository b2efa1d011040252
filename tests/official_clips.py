"""Sample folders as the official tools write them, with made-up numbers: the data of stages at the `test` size."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch

from lipstream.models.dit import FLAVOURS, DiTConfig
from lipstream.training.clips import Clips, ClipShape

CONFIG = FLAVOURS["test"]
CELLS = (8, 8)
LATENT_FRAMES = 6
ROWS = 1 + 4 * (LATENT_FRAMES - 1)


def write_clip(folder: Path, seed: int = 0, latent_frames: int = LATENT_FRAMES, config: DiTConfig = CONFIG) -> Path:
    """One folder. The mouth of the target follows the first audio number, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rows = 1 + 4 * (latent_frames - 1)
    audio = draw(rows + 3, config.audio_dim)
    shape = (config.latent_channels, latent_frames, *CELLS)
    source = 0.3 * draw(config.latent_channels, 1, *CELLS).expand(shape).clone()
    source[:, :, 4:] += audio[:rows:4, 0][None, :, None, None]
    masked = source.clone()
    masked[:, :, 4:] = 0
    latents = {"input_latents": source.bfloat16(), "masked_latents": masked.bfloat16()}
    torch.save(latents, folder / "vae_latents_mask_all.pt")
    torch.save({"ref_sequence_latents": (0.3 * draw(*shape)).bfloat16()}, folder / "ref_latents.pt")
    torch.save({"audio_emb": audio, "fps": 25}, folder / "audio_emb_omniavatar.pt")
    text = torch.zeros(1, config.text_len, config.text_dim)
    text[:, :2] = draw(2, config.text_dim)
    torch.save(text, folder / "text_emb.pt")
    with wave.open(str(folder / "audio.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((3000 * draw(rows * 640).numpy()).astype(np.int16).tobytes())
    return folder


def write_list(folder: Path, count: int = 2) -> Path:
    """So many folders and the list of them."""
    names = [write_clip(folder / f"clip_{i}", seed=i).name for i in range(count)]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    return folder / "list.txt"


def write_empty_prompt(path: Path) -> Path:
    """One row and zeros, as the official encoding of the empty prompt has them."""
    rows = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    rows[0, 0] = torch.randn(CONFIG.text_dim, generator=torch.Generator().manual_seed(9))
    torch.save(rows, path)
    return path


def shape_of_clips() -> ClipShape:
    return ClipShape.of(CONFIG, LATENT_FRAMES, CELLS)


def written_clips(folder: Path, count: int = 2, speech: bool = False) -> Clips:
    """Clips that were just written."""
    return Clips([write_clip(folder / f"clip_{i}", seed=i) for i in range(count)], shape_of_clips(), speech=speech)
