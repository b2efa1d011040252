"""Files of the encoders that condition the official networks: wav2vec2, UMT5 with its tokenizer, SyncNet.

Everything is read from where it lies on disk, never from a hub, and strictly: missing, unknown and misshapen tensors
are listed and refused. Pickles are opened with `weights_only`.

    features = load_speech_features(folder)                       # wav2vec2-base-960h/
    encoder = load_prompt_encoder("models_t5_umt5-xxl-enc-bf16.pth")
    embedding = encoder.embed(PROMPT, load_prompt_tokenizer("google/umt5-xxl"))
    save_prompt_embedding(embedding, path)                        # 11 GB are not needed again
    network = load_syncnet("syncnet_v2.model")
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lipstream.checkpoints.convert import assemble
from lipstream.checkpoints.hashing import sha256_of
from lipstream.checkpoints.hub import is_model_folder, read_folder_config
from lipstream.checkpoints.mapping import load_mapped
from lipstream.models.syncnet import SyncNet
from lipstream.models.text import FLAVOURS as TEXTS
from lipstream.models.text import PromptEmbedding, PromptEncoder, PromptTokenizer, TextConfig
from lipstream.models.wav2vec_features import Attention, SpeechFeatures

EMBEDDING_FORMAT = "lipstream prompt embedding 1"
# Names under which the official scripts keep an embedding in a dictionary, in their order of search.
OFFICIAL_EMBEDDING_NAMES = ("context", "text_emb", "prompt_emb")


def load_speech_features(path: Path | str, attention: Attention = "sdpa") -> SpeechFeatures:
    """The official speech features, float32, without gradients.

    Args:
        path: a Hub-style folder (model.safetensors and, unless the network is wav2vec2-base-960h itself, its
            config.json), a .safetensors file, or what `lipstream convert` made of them.

    Raises:
        ValueError: a file is missing or damaged, another kind of network, or tensors that do not fit.
    """
    features = assemble([Path(path)], kind="wav2vec2").load(torch.float32)
    assert isinstance(features, SpeechFeatures)
    features.use_attention(attention)
    return features.requires_grad_(False)


def load_prompt_encoder(path: Path | str, config: TextConfig | None = None) -> PromptEncoder:
    """The prompt encoder of Wan's `.pth` file in the file's own dtype (bf16); the memory is the file itself, mapped.

    The file's SHA-256 is taken on the way, which reads all of it once; a converted folder says whose it is.

    Args:
        path: the file, or what `lipstream convert` made of it.
        config: default: what the shapes say.

    Raises:
        ValueError: the file is missing or damaged, or its tensors do not fit.
    """
    path = Path(path)
    encoder = assemble([path], kind="umt5", config=None if config is None else asdict(config)).load()
    assert isinstance(encoder, PromptEncoder)
    if is_model_folder(path):
        encoder.weights_sha256 = next((s.sha256 for s in read_folder_config(path).provenance.sources), "")
    elif path.is_file():
        encoder.weights_sha256 = sha256_of(path)
    return encoder.requires_grad_(False)


def load_prompt_tokenizer(folder: Path | str, config: TextConfig = TEXTS["official"]) -> PromptTokenizer:
    """The tokenizer of a folder with UMT5's tokenizer.json.

    Raises:
        ValueError: no such file, or another tokenizer.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; give the folder of google/umt5-xxl")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ValueError("reading a prompt needs: pip install tokenizers") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    return PromptTokenizer(tokenizer, config.text_rows)


def save_prompt_embedding(embedding: PromptEmbedding, path: Path | str) -> None:
    """Write an embedding (8 KB a token at the official size); appears at `path` all at once."""
    path = Path(path)
    metadata = {
        "format": EMBEDDING_FORMAT,
        "prompt": embedding.prompt,
        "encoder_sha256": embedding.encoder,
        "text_rows": str(embedding.text_rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({"rows": embedding.rows.detach().cpu().contiguous()}, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors writes for the owner only
    partial.replace(path)


def load_prompt_embedding(path: Path | str) -> PromptEmbedding:
    """Inverse of :func:`save_prompt_embedding`.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    path = Path(path)
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != EMBEDDING_FORMAT or set(tensors) != {"rows"}:
        raise ValueError(f"{path}: not a prompt embedding of lipstream; write one with save_prompt_embedding")
    return PromptEmbedding(
        prompt=metadata["prompt"],
        rows=tensors["rows"],
        encoder=metadata["encoder_sha256"],
        text_rows=int(metadata["text_rows"]),
    )


def load_official_prompt_embedding(path: Path | str, prompt: str) -> PromptEmbedding:
    """An embedding as the official scripts keep it: a `.pt` of a tensor [512, d] or [1, 512, d], bare or in a dict.

    The file does not say whose embedding it is, so `prompt` is taken on trust; rows of zeros at its end are dropped.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    path = Path(path)
    stored = _unpickle(path)
    if isinstance(stored, Mapping):
        named = [stored[name] for name in OFFICIAL_EMBEDDING_NAMES if name in stored]
        stored = next(iter(named or stored.values()), None)
    if not isinstance(stored, Tensor) or stored.ndim not in (2, 3) or (stored.ndim == 3 and len(stored) != 1):
        raise ValueError(f"{path}: holds no tensor [512, width] or [1, 512, width]")
    rows = stored.reshape(stored.shape[-2:])
    used = rows.ne(0).any(1).nonzero().flatten()
    if not len(used):
        raise ValueError(f"{path}: all rows are zero; the embedding of the empty prompt is not (it has one row)")
    return PromptEmbedding(prompt=prompt, rows=rows[: int(used[-1]) + 1].clone(), text_rows=len(rows))


def load_syncnet(path: Path | str) -> SyncNet:
    """SyncNet of `syncnet_v2.model` or of what `lipstream convert` made of it: float32, evaluation mode, no gradients.

    The batch norms' counters may be missing, as they are in the public file: they have no effect.

    Raises:
        ValueError: the file is missing or damaged, or its tensors do not fit.
    """
    network = assemble([Path(path)], kind="syncnet").load(torch.float32)
    assert isinstance(network, SyncNet)
    return network.requires_grad_(False)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_mapped(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable weights file ({reason})") from error
