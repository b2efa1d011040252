"""Key maps of `models_t5_umt5-xxl-enc-bf16.pth`: Wan's and `transformers`' names <-> those of `PromptEncoder`.

Both feed-forward inputs have one shape, so a swap of them would load without a complaint: `tests/test_text.py` compares
the outputs too.

    WAN.to_ours("blocks.3.ffn.gate.0.weight")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lipstream.checkpoints.keys import KeyMap
from lipstream.checkpoints.strict import TensorSpec
from lipstream.models.text import FLAVOURS, TextConfig

OURS = "network."
_LAYER = "encoder.block.{i}.layer."
# (name in Wan's file, name in transformers' UMT5EncoderModel)
_ROWS: tuple[tuple[str, str], ...] = (
    ("token_embedding.weight", "shared.weight"),
    ("blocks.{i}.norm1.weight", f"{_LAYER}0.layer_norm.weight"),
    ("blocks.{i}.attn.q.weight", f"{_LAYER}0.SelfAttention.q.weight"),
    ("blocks.{i}.attn.k.weight", f"{_LAYER}0.SelfAttention.k.weight"),
    ("blocks.{i}.attn.v.weight", f"{_LAYER}0.SelfAttention.v.weight"),
    ("blocks.{i}.attn.o.weight", f"{_LAYER}0.SelfAttention.o.weight"),
    ("blocks.{i}.pos_embedding.embedding.weight", f"{_LAYER}0.SelfAttention.relative_attention_bias.weight"),
    ("blocks.{i}.norm2.weight", f"{_LAYER}1.layer_norm.weight"),
    ("blocks.{i}.ffn.gate.0.weight", f"{_LAYER}1.DenseReluDense.wi_0.weight"),
    ("blocks.{i}.ffn.fc1.weight", f"{_LAYER}1.DenseReluDense.wi_1.weight"),
    ("blocks.{i}.ffn.fc2.weight", f"{_LAYER}1.DenseReluDense.wo.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
)
WAN = KeyMap("wan", tuple((wan, OURS + ours) for wan, ours in _ROWS))
FORMATS = (
    WAN,
    KeyMap("transformers", tuple((ours, OURS + ours) for _, ours in _ROWS)),
    KeyMap("lipstream", tuple((OURS + ours, OURS + ours) for _, ours in _ROWS)),
)
# A second name that transformers gives the token embedding; never in a file of its own.
TIED = {f"{OURS}encoder.embed_tokens.weight": f"{OURS}shared.weight"}


def infer_umt5(specs: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """Sizes of an encoder from its tensors; the official width means the official size, whatever is missing.

    Raises:
        ValueError: it is none.
    """
    attention = f"{OURS}encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    gate = f"{OURS}encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    missing = [name for name in (f"{OURS}shared.weight", attention, gate) if name not in specs]
    if missing:
        raise ValueError(f"no tensor {missing[0]}: not a UMT5 encoder")
    (vocabulary, dim), (buckets, heads) = specs[f"{OURS}shared.weight"].shape, specs[attention].shape
    if dim == FLAVOURS["official"].dim:
        return asdict(FLAVOURS["official"])
    start = len(f"{OURS}encoder.block.")
    layers = 1 + max(int(name[start:].split(".")[0]) for name in specs if name.startswith(f"{OURS}encoder.block."))
    ffn = specs[gate].shape[0]
    return asdict(TextConfig(vocabulary=vocabulary, dim=dim, ffn=ffn, heads=heads, layers=layers, buckets=buckets))
