"""The transformer's tensors in foreign checkpoints: the official student and teacher, Wan, diffusers, OmniAvatar.

Our names are the official ones, so that table only says which names exist. In diffusers' naming the two norms of a
block are numbered by their order of use: its affine `norm2` is Wan's `norm3` (Wan's `norm2` has no parameters).
"""

from __future__ import annotations

from collections.abc import Mapping

from lipstream.checkpoints.keys import KeyMap
from lipstream.checkpoints.strict import TensorSpec
from lipstream.models.dit_config import FLAVOURS, DiTConfig

# ours and official | diffusers
_BASE = (
    ("patch_embedding.{wb}", "patch_embedding.{wb}"),
    ("text_embedding.0.{wb}", "condition_embedder.text_embedder.linear_1.{wb}"),
    ("text_embedding.2.{wb}", "condition_embedder.text_embedder.linear_2.{wb}"),
    ("time_embedding.0.{wb}", "condition_embedder.time_embedder.linear_1.{wb}"),
    ("time_embedding.2.{wb}", "condition_embedder.time_embedder.linear_2.{wb}"),
    ("time_projection.1.{wb}", "condition_embedder.time_proj.{wb}"),
    *(
        row
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for row in (
            (f"blocks.{{i}}.{ours}.q.{{wb}}", f"blocks.{{i}}.{theirs}.to_q.{{wb}}"),
            (f"blocks.{{i}}.{ours}.k.{{wb}}", f"blocks.{{i}}.{theirs}.to_k.{{wb}}"),
            (f"blocks.{{i}}.{ours}.v.{{wb}}", f"blocks.{{i}}.{theirs}.to_v.{{wb}}"),
            (f"blocks.{{i}}.{ours}.o.{{wb}}", f"blocks.{{i}}.{theirs}.to_out.0.{{wb}}"),
            (f"blocks.{{i}}.{ours}.norm_q.weight", f"blocks.{{i}}.{theirs}.norm_q.weight"),
            (f"blocks.{{i}}.{ours}.norm_k.weight", f"blocks.{{i}}.{theirs}.norm_k.weight"),
        )
    ),
    ("blocks.{i}.norm3.{wb}", "blocks.{i}.norm2.{wb}"),
    ("blocks.{i}.ffn.0.{wb}", "blocks.{i}.ffn.net.0.proj.{wb}"),
    ("blocks.{i}.ffn.2.{wb}", "blocks.{i}.ffn.net.2.{wb}"),
    ("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
    ("head.head.{wb}", "proj_out.{wb}"),
    ("head.modulation", "scale_shift_table"),
)
_AUDIO = ("audio_proj.proj.{wb}", "audio_proj.norm_out.{wb}", "audio_cond_projs.{j}.{wb}")

OFFICIAL = KeyMap("official", tuple((name, name) for name in (*(ours for ours, _ in _BASE), *_AUDIO)))
DIFFUSERS = KeyMap("diffusers", tuple((theirs, ours) for ours, theirs in _BASE))
FORMATS = (OFFICIAL, DIFFUSERS)

# The tensors that OmniAvatar adds to Wan: a base checkpoint never has them, an adapter always brings them.
AUDIO_PREFIXES = ("audio_proj.", "audio_cond_projs.")
RELEASED = ("1.3b", "14b")
HEAD_DIM = 128  # of every Wan transformer; the file does not tell
FIRST_AUDIO_BLOCK = 2  # of every OmniAvatar transformer; the file does not tell


def infer_config(specs: Mapping[str, TensorSpec]) -> DiTConfig:
    """The configuration that a complete set of tensors (our names) was made with.

    The width tells the two released sizes, so that a file with a block too few is not taken for a smaller network.
    For others shapes tell all sizes; heads and the first audio block are the same in the whole family.

    Raises:
        ValueError: a tensor that the sizes are read from is missing, or has another rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in specs:
            raise ValueError(f"no tensor {name}: not a transformer of this family")
        if len(specs[name].shape) != rank:
            raise ValueError(f"{name} is {specs[name].shape}: not a transformer of this family")
        return specs[name].shape

    dim, _, *patch = shape("patch_embedding.weight", 5)
    for flavour in RELEASED:
        if FLAVOURS[flavour].dim == dim:
            return FLAVOURS[flavour]
    if dim % HEAD_DIM:
        raise ValueError(f"patch_embedding.weight is {dim} wide, which is not a multiple of {HEAD_DIM} (one head)")
    layers = _count(specs, "blocks.")
    audio_blocks = _count(specs, "audio_cond_projs.")
    audio_hidden, audio_rows = shape("audio_proj.proj.weight", 2)
    return DiTConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=dim // HEAD_DIM,
        num_layers=layers,
        latent_channels=shape("head.head.weight", 2)[0] // (patch[0] * patch[1] * patch[2]),
        patch=(patch[0], patch[1], patch[2]),
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        text_dim=shape("text_embedding.0.weight", 2)[1],
        audio_dim=audio_rows // 4,
        audio_hidden=audio_hidden,
        audio_blocks=(FIRST_AUDIO_BLOCK, FIRST_AUDIO_BLOCK + audio_blocks - 1),
    )


def _count(specs: Mapping[str, TensorSpec], prefix: str) -> int:
    """How many numbered modules there are, from the highest number."""
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in specs if name.startswith(prefix)]
    if not numbers:
        raise ValueError(f"no tensor {prefix}*: not a transformer of this family")
    return max(numbers) + 1
