"""Key maps: bijections with the right shapes, against a table written down here on its own and against diffusers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from golden_model import GOLDEN_CONFIG
from lipstream.checkpoints.keys import KeyMap, best_map, wrapper_of
from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES, DIFFUSERS, FORMATS, OFFICIAL, infer_config
from lipstream.checkpoints.kinds import KINDS, kind_named
from lipstream.checkpoints.strict import TensorSpec, specs_of
from lipstream.models.dit import FLAVOURS, DiT, DiTConfig

Shape = tuple[int, ...]


def specs_on_meta(config: DiTConfig) -> dict[str, TensorSpec]:
    with torch.device("meta"):
        return specs_of(DiT(config))


def official_table(dim: int, ffn: int, layers: int, audio: int) -> dict[str, Shape]:
    """Key names and shapes of the released files, as their specification lists them."""
    table: dict[str, Shape] = {"patch_embedding.weight": (dim, 65, 1, 2, 2), "patch_embedding.bias": (dim,)}

    def linear(name: str, out: int, into: int) -> None:
        table.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    linear("text_embedding.0", dim, 4096)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, 256)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        for attention in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                linear(f"blocks.{i}.{attention}.{letter}", dim, dim)
            table[f"blocks.{i}.{attention}.norm_q.weight"] = table[f"blocks.{i}.{attention}.norm_k.weight"] = (dim,)
        table[f"blocks.{i}.norm3.weight"] = table[f"blocks.{i}.norm3.bias"] = (dim,)
        linear(f"blocks.{i}.ffn.0", ffn, dim)
        linear(f"blocks.{i}.ffn.2", dim, ffn)
        table[f"blocks.{i}.modulation"] = (1, 6, dim)
    linear("head.head", 64, dim)
    table["head.modulation"] = (1, 2, dim)
    linear("audio_proj.proj", 32, 43008)
    table["audio_proj.norm_out.weight"] = table["audio_proj.norm_out.bias"] = (32,)
    for j in range(audio):
        linear(f"audio_cond_projs.{j}", dim, 32)
    return table


@pytest.mark.parametrize(
    ("flavour", "sizes", "tensors", "parameters"),
    [("1.3b", (1536, 8960, 30, 14), 857, 1_421_383_840), ("14b", (5120, 13824, 40, 19), 1137, 14_294_081_696)],
)
def test_released_sizes(flavour: str, sizes: tuple[int, int, int, int], tensors: int, parameters: int) -> None:
    with torch.device("meta"):
        model = DiT(FLAVOURS[flavour])
    table = official_table(*sizes)
    ours = specs_of(model)
    assert len(table) == len(ours) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {OFFICIAL.to_foreign(name): spec.shape for name, spec in ours.items()} == table
    assert sum(name.startswith("blocks.0.") for name in ours) == 27
    assert infer_config(ours) == FLAVOURS[flavour]


@pytest.mark.parametrize("flavour", ["1.3b", "14b"])
@pytest.mark.parametrize("key_map", FORMATS, ids=lambda m: m.name)
def test_there_and_back_again(key_map: KeyMap, flavour: str) -> None:
    names = [n for n in specs_on_meta(FLAVOURS[flavour]) if key_map is OFFICIAL or not n.startswith(AUDIO_PREFIXES)]
    foreign = [key_map.to_foreign(name) for name in names]
    assert None not in foreign and len(set(foreign)) == len(names)
    assert [key_map.to_ours(key) for key in foreign if key] == names
    assert key_map.rename(key for key in foreign if key) == dict(zip(names, foreign, strict=True))


def test_diffusers_has_no_audio_and_swaps_the_norms() -> None:
    assert DIFFUSERS.to_foreign("audio_proj.proj.weight") is None
    assert DIFFUSERS.to_ours("blocks.7.norm2.weight") == "blocks.7.norm3.weight"
    assert DIFFUSERS.to_ours("blocks.7.norm3.weight") is None
    # A block of a key is a number without leading zeros: other spellings would give two keys one name.
    assert DIFFUSERS.to_ours("blocks.07.norm2.weight") is None
    assert DIFFUSERS.to_ours("blocks.7.attn1.to_q.weight.weight") is None


def test_golden_key_examples() -> None:
    examples = {
        "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
        "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
        "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0.weight",
        "condition_embedder.text_embedder.linear_2.weight": "text_embedding.2.weight",
        "condition_embedder.time_proj.weight": "time_projection.1.weight",
        "proj_out.weight": "head.head.weight",
        "scale_shift_table": "head.modulation",
        "patch_embedding.weight": "patch_embedding.weight",
        "blocks.7.attn1.to_q.weight": "blocks.7.self_attn.q.weight",
        "blocks.7.attn1.to_out.0.bias": "blocks.7.self_attn.o.bias",
        "blocks.7.attn1.norm_k.weight": "blocks.7.self_attn.norm_k.weight",
        "blocks.7.attn2.to_v.weight": "blocks.7.cross_attn.v.weight",
        "blocks.7.attn2.norm_q.weight": "blocks.7.cross_attn.norm_q.weight",
        "blocks.7.norm2.weight": "blocks.7.norm3.weight",
        "blocks.7.norm2.bias": "blocks.7.norm3.bias",
        "blocks.7.ffn.net.0.proj.weight": "blocks.7.ffn.0.weight",
        "blocks.7.ffn.net.2.bias": "blocks.7.ffn.2.bias",
        "blocks.7.scale_shift_table": "blocks.7.modulation",
    }
    assert {key: DIFFUSERS.to_ours(key) for key in examples} == examples
    assert best_map(FORMATS, examples) is DIFFUSERS
    assert best_map(FORMATS, examples.values()) is OFFICIAL


def test_diffusers_own_transformer_has_these_keys_and_shapes() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of its own names")
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=65, out_channels=16, text_dim=64, freq_dim=256,
        ffn_dim=128, num_layers=2,
    )  # fmt: skip
    found = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    config = DiTConfig(dim=256, ffn_dim=128, num_heads=2, num_layers=2, text_dim=64, audio_blocks=(0, 0))
    ours = {n: s.shape for n, s in specs_on_meta(config).items() if not n.startswith(AUDIO_PREFIXES)}
    assert {DIFFUSERS.to_ours(key): shape for key, shape in found.items()} == ours


def test_a_map_must_be_a_bijection() -> None:
    with pytest.raises(ValueError, match="same placeholders"):
        KeyMap("bad", (("a.{i}", "b"),))
    merging = KeyMap("merging", (("a.{i}", "c.{i}"), ("b.{i}", "c.{i}")))
    with pytest.raises(ValueError, match=r"a\.1 and b\.1 would both become c\.1"):
        merging.rename(["a.1", "b.1"])


def test_wrappers() -> None:
    keys = ["head.modulation", "blocks.0.modulation"]
    for wrapper in ("", "_core.", "model.", "net.", "net._core.", "model.net._core."):
        assert wrapper_of(wrapper + key for key in keys) == wrapper
    assert wrapper_of(["_core.head.modulation", "blocks.0.modulation"]) == ""  # all or nothing: never half a file
    assert wrapper_of([]) == ""


def test_inferred_config_of_another_size() -> None:
    specs = specs_on_meta(GOLDEN_CONFIG)
    assert infer_config(specs) == GOLDEN_CONFIG

    def without(name: str) -> Mapping[str, TensorSpec]:
        return {key: spec for key, spec in specs.items() if key != name}

    for name in ("patch_embedding.weight", "head.head.weight", "audio_proj.proj.weight"):
        with pytest.raises(ValueError, match=name):
            infer_config(without(name))


def test_registry() -> None:
    assert {"student", "teacher"} <= KINDS.keys()
    assert all(kind.name == name for name, kind in KINDS.items())
    with pytest.raises(ValueError, match=r"unknown kind 'pupil': there are .*student, teacher"):
        kind_named("pupil")
