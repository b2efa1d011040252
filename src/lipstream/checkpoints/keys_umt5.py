"""Key map of `models_t5_umt5-xxl-enc-bf16.pth`: Wan's names of the UMT5 encoder <-> those of `transformers`.

`{i}` is the number of a layer. Both feed-forward inputs have one shape, so a swap of them would load without a
complaint: `tests/test_text.py` compares the outputs too.
"""

from __future__ import annotations

# (name in the file, name in transformers' UMT5EncoderModel)
UMT5_KEYS: tuple[tuple[str, str], ...] = (
    ("token_embedding.weight", "shared.weight"),
    ("blocks.{i}.norm1.weight", "encoder.block.{i}.layer.0.layer_norm.weight"),
    ("blocks.{i}.attn.q.weight", "encoder.block.{i}.layer.0.SelfAttention.q.weight"),
    ("blocks.{i}.attn.k.weight", "encoder.block.{i}.layer.0.SelfAttention.k.weight"),
    ("blocks.{i}.attn.v.weight", "encoder.block.{i}.layer.0.SelfAttention.v.weight"),
    ("blocks.{i}.attn.o.weight", "encoder.block.{i}.layer.0.SelfAttention.o.weight"),
    (
        "blocks.{i}.pos_embedding.embedding.weight",
        "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    ("blocks.{i}.norm2.weight", "encoder.block.{i}.layer.1.layer_norm.weight"),
    ("blocks.{i}.ffn.gate.0.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.{i}.ffn.fc1.weight", "encoder.block.{i}.layer.1.DenseReluDense.wi_1.weight"),
    ("blocks.{i}.ffn.fc2.weight", "encoder.block.{i}.layer.1.DenseReluDense.wo.weight"),
    ("norm.weight", "encoder.final_layer_norm.weight"),
)

# A second name that transformers gives the token embedding; never in a file of its own.
UMT5_TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def umt5_names(layers: int) -> dict[str, str]:
    """Name in the file -> name in the network, for an encoder of so many layers."""
    names = {}
    for official, ours in UMT5_KEYS:
        for layer in range(layers) if "{i}" in official else (0,):
            names[official.format(i=layer)] = ours.format(i=layer)
    return names
