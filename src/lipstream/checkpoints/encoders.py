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
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lipstream.checkpoints.hashing import sha256_of
from lipstream.checkpoints.keys_umt5 import UMT5_TIED, umt5_names
from lipstream.checkpoints.keys_wav2vec2 import wav2vec2_names
from lipstream.checkpoints.mapping import load_mapped
from lipstream.models.syncnet import FLAVOURS as SYNCNETS
from lipstream.models.syncnet import SyncNet, SyncNetConfig
from lipstream.models.text import FLAVOURS as TEXTS
from lipstream.models.text import PromptEmbedding, PromptEncoder, PromptTokenizer, TextConfig
from lipstream.models.wav2vec_features import FLAVOURS as SPEECH
from lipstream.models.wav2vec_features import Attention, SpeechFeatures, Wav2VecConfig

EMBEDDING_FORMAT = "lipstream prompt embedding 1"
# Names under which the official scripts keep an embedding in a dictionary, in their order of search.
OFFICIAL_EMBEDDING_NAMES = ("context", "text_emb", "prompt_emb")
COUNTER = ".num_batches_tracked"  # of batch norms; without effect, and older than syncnet_v2.model
SHOWN = 8  # differences in a message


def load_speech_features(folder: Path | str, attention: Attention = "sdpa") -> SpeechFeatures:
    """The official speech features of a Hub-style folder, float32, without gradients.

    The folder holds model.safetensors and, unless the network is wav2vec2-base-960h itself, its config.json.

    Raises:
        ValueError: a file is missing or damaged, another kind of network, or tensors that do not fit.
    """
    folder = Path(folder)
    path, about = folder / "model.safetensors", folder / "config.json"
    # `lipstream pull` fetches the weights alone; loading is strict, so another network is not taken for this one.
    config = Wav2VecConfig.from_hub(_read_json(about)) if about.exists() else SPEECH["official"]
    tensors = _read_safetensors(path)[0]
    names = wav2vec2_names(tensors)
    with torch.device("meta"):
        features = SpeechFeatures(config, attention)
    _fill(features.network, {names[key]: tensors[key].float() for key in names}, path)
    return features.eval().requires_grad_(False)


def load_prompt_encoder(path: Path | str, config: TextConfig = TEXTS["official"]) -> PromptEncoder:
    """The prompt encoder of Wan's `.pth` file in the file's own dtype (bf16); the memory is the file itself, mapped.

    The file's SHA-256 is taken on the way, which reads all of it once.

    Raises:
        ValueError: the file is missing or damaged, or its tensors do not fit.
    """
    path = Path(path)
    tensors = _read_pickle(path)
    names = umt5_names(config.layers)
    with torch.device("meta"):
        encoder = PromptEncoder(config)
    renamed = {names.get(key, key): tensor for key, tensor in tensors.items()}
    network = encoder.network
    _fill(network, renamed, path, tied=UMT5_TIED)
    network.set_input_embeddings(network.shared)
    encoder.weights_sha256 = sha256_of(path)
    return encoder.eval().requires_grad_(False)


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


def load_syncnet(path: Path | str, config: SyncNetConfig = SYNCNETS["official"]) -> SyncNet:
    """SyncNet of `syncnet_v2.model`, float32, in evaluation mode and without gradients.

    The batch norms' counters may be missing, as they are in the public file: they have no effect.

    Raises:
        ValueError: the file is missing or damaged, or its tensors do not fit.
    """
    path = Path(path)
    tensors = _read_pickle(path)
    network = SyncNet(config)
    counters = {key: value for key, value in network.state_dict().items() if key.endswith(COUNTER)}
    _fill(network, counters | tensors, path)
    return network.eval().requires_grad_(False)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, tied: Mapping[str, str] | None = None) -> None:
    """Make `tensors` the state of a module, without a copy; names of `tied` are second names of other tensors.

    Raises:
        ValueError: names or shapes differ; the differences are listed.
    """
    needed = {name: tensor for name, tensor in module.state_dict().items() if name not in (tied or {})}
    problems = [f"missing {name}" for name in sorted(needed.keys() - tensors.keys())]
    problems += [f"unknown {name}" for name in sorted(tensors.keys() - needed.keys())]
    for name in sorted(needed.keys() & tensors.keys()):
        found, wanted = list(tensors[name].shape), list(needed[name].shape)
        if found != wanted:
            problems.append(f"{name} is {found}, the network needs {wanted}")
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{path} does not fit the network: {'; '.join(problems[:SHOWN])}{more}")
    aliases = {alias: tensors[name] for alias, name in (tied or {}).items()}
    module.load_state_dict({**tensors, **aliases}, strict=True, assign=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a folder with config.json and model.safetensors")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds no configuration")
    return data


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


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A file of named tensors."""
    stored = _unpickle(path)
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{path}: holds no dictionary of tensors")
    return dict(stored)


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_mapped(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable weights file ({reason})") from error
