"""A folder of official files with random weights: what `LipSync.from_pretrained` takes for a full-size model.

python tests/official_files.py FOLDER --flavour 1.3b      # 4 GB; python tests/official_files.py FOLDER for the tiny one
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lipstream.checkpoints.encoders import save_prompt_embedding
from lipstream.checkpoints.keys_wav2vec2 import PUBLIC
from lipstream.models.dit import FLAVOURS, DiT, DiTConfig
from lipstream.models.tae import TAE, TAE_FLAVOURS
from lipstream.models.text import PROMPT, PromptEmbedding
from lipstream.models.wan_vae import WAN_VAE_FLAVOURS, WanVAE
from lipstream.models.wav2vec_features import FLAVOURS as SPEECH
from lipstream.models.wav2vec_features import HUB_NAMES, SpeechFeatures, Wav2VecConfig

TINY = DiTConfig(
    dim=128, ffn_dim=64, num_heads=1, num_layers=3, freq_dim=16, text_dim=12, audio_dim=SPEECH["test"].feature_dim,
    audio_hidden=8, audio_blocks=(2, 2),
)  # fmt: skip


def hub_config(config: Wav2VecConfig) -> dict[str, object]:
    """config.json of a wav2vec2 folder."""
    return {"model_type": "wav2vec2"} | {HUB_NAMES[field]: value for field, value in asdict(config).items()}


def random_weights(network: nn.Module, std: float = 0.02) -> nn.Module:
    """Small random numbers, so that pictures stay finite through any depth."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=std)
        elif "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
    return network.requires_grad_(False)


def write_official_folder(folder: Path, flavour: str = "test", seed: int = 0) -> Path:
    """All files that a full-size model needs, except the mask; "test" takes milliseconds, "1.3b" is the real size."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tiny = flavour == "test"
    size = "test" if tiny else "official"
    config = TINY if tiny else FLAVOURS[flavour]
    dit = random_weights(DiT(config)).to(torch.bfloat16)
    torch.save(dit.state_dict(), folder / ("lipforcing_14b.pth" if flavour == "14b" else "lipforcing_1.3b.pth"))
    torch.save(random_weights(WanVAE(WAN_VAE_FLAVOURS[size])).state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(random_weights(TAE(TAE_FLAVOURS[size])).half().state_dict(), folder / "taew2_1.pth")
    speech = SpeechFeatures(SPEECH[size])
    (folder / "wav2vec2-base-960h").mkdir(exist_ok=True)
    tensors = {str(PUBLIC.to_foreign(name)): t.contiguous() for name, t in speech.state_dict().items()}
    save_file(tensors, folder / "wav2vec2-base-960h" / "model.safetensors")
    (folder / "wav2vec2-base-960h" / "config.json").write_text(json.dumps(hub_config(SPEECH[size])))
    rows = torch.randn(5, config.text_dim).to(torch.bfloat16)
    save_prompt_embedding(
        PromptEmbedding(prompt=PROMPT, rows=rows, text_rows=config.text_len), folder / "prompt.safetensors"
    )
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flavour", default="test", choices=("test", "1.3b", "14b"))
    arguments = parser.parse_args()
    print(write_official_folder(arguments.folder, arguments.flavour))
