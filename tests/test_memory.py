"""The memory preflight: its parts against the networks themselves, and what it says when there is too little."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from lipstream.memory import MemoryRequest, check_memory, dit_parameters, memory_need
from lipstream.models.dit import FLAVOURS, DiT
from lipstream.streaming import StreamingModule

FULL = MemoryRequest(config=FLAVOURS["14b"])


def test_anchor_1_parameters() -> None:
    """Spec section 10."""
    assert dit_parameters(FLAVOURS["14b"]) == 14_294_081_696
    assert dit_parameters(FLAVOURS["1.3b"]) == 1_421_383_840
    for name in ("test", "pocket"):
        model = DiT(FLAVOURS[name])
        assert dit_parameters(FLAVOURS[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("flavour", "cells"), [("test", 8), ("pocket", 10), ("1.3b", 32)])
def test_cache_is_the_caches_own(flavour: str, cells: int) -> None:
    config = FLAVOURS[flavour]
    with torch.device("meta"):
        cache = DiT(config).to(torch.bfloat16).make_cache(1, cells, cells)
    held = sum(buffer.nbytes for buffers in (cache._keys, cache._values) for buffer in buffers)
    assert memory_need(MemoryRequest(config=config, size=8 * cells)).kv_cache == held


def test_known_sizes() -> None:
    """Spec 2.3: 5.47 and 1.23 GiB of keys and values; 4.6: about 37 GB at 14B with a given prompt."""
    need = memory_need(FULL)
    assert need.kv_cache / 2**30 == pytest.approx(5.47, abs=0.01)
    assert memory_need(dataclasses.replace(FULL, config=FLAVOURS["1.3b"])).kv_cache / 2**30 == pytest.approx(
        1.23, abs=0.01
    )
    assert 36e9 < memory_need(dataclasses.replace(FULL, encode_latent_frames=1)).total < need.total < 41e9
    assert need.total == sum(count for _, count in need.table())
    assert need.table()[0][0] == "weights"


def test_what_grows_with_what() -> None:
    need, twice = memory_need(FULL), memory_need(dataclasses.replace(FULL, takes=2))
    assert twice.weights == need.weights and twice.kv_cache == 2 * need.kv_cache
    wide = memory_need(dataclasses.replace(FULL, dtype=torch.float32))
    assert wide.total == 2 * need.total
    small = memory_need(dataclasses.replace(FULL, size=256))
    assert small.kv_cache * 4 == need.kv_cache and small.codec_state * 4 == need.codec_state


def test_enough_is_silent_and_too_little_is_explained() -> None:
    need = memory_need(FULL)
    check_memory(need, int(need.total * 1.06))
    with pytest.raises(
        ValueError, match=r"42\.2 GB are needed .*28\.9 GB, for weights.* 24\.0 GB are free; .*smaller model"
    ):
        check_memory(need, 24_000_000_000)
    wide = dataclasses.replace(FULL, dtype=torch.float32, decoder="wan")
    with pytest.raises(ValueError, match="choose dtype bfloat16 and it fits"):
        check_memory(memory_need(wide), 80_000_000_000)
    with pytest.raises(ValueError, match="bfloat16, decode with the tiny decoder and it fits"):
        check_memory(memory_need(wide), 42_500_000_000)
    with pytest.raises(ValueError) as caught:
        check_memory(need, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "name", "flavours"), [("wan_vae", "WanVAE", "WAN_VAE_FLAVOURS"), ("tae", "TAE", "TAE_FLAVOURS")]
)
def test_codec_states_are_the_codecs_own(module: str, name: str, flavours: str) -> None:
    """Parameters and numbers per pixel, counted on the meta device."""
    pytest.importorskip(f"lipstream.models.{module}")
    codecs: Any = importlib.import_module(f"lipstream.models.{module}")
    from lipstream.memory import _CODECS

    expected, size = _CODECS["wan" if name == "WanVAE" else "tae"], 64
    with torch.device("meta"), torch.inference_mode():
        codec = getattr(codecs, name)(getattr(codecs, flavours)["official"])
        assert sum(p.numel() for p in codec.parameters()) == expected.parameters
        encoder, decoder = codec.stream_view(1), codec.stream_view(1)
        encoder.encode(torch.empty(1, 3, 9, size, size))
        decoder.decode(torch.empty(1, 16, 3, size // 8, size // 8))
    assert _held(encoder) == pytest.approx(expected.encoder_state * size**2, rel=0.01)
    assert _held(decoder) == pytest.approx(expected.decoder_state * size**2, rel=0.01)


def _held(module: StreamingModule[Any]) -> int:
    """Numbers in the states of all layers."""

    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        if dataclasses.is_dataclass(value):
            return sum(count(getattr(value, field.name)) for field in dataclasses.fields(value))
        return sum(map(count, value)) if isinstance(value, (list, tuple)) else 0

    return sum(count(state) for state in module.snapshot().values())
