"""OmniAvatar adapters: low-rank updates of a base Wan transformer, merged into it once.

An adapter holds `NAME.lora_A.weight` [rank, in] and `NAME.lora_B.weight` [out, rank] for q, k, v, o of both
attentions and both maps of the feed-forward, and whole tensors for what Wan has not (audio) or has smaller (the patch
kernel). W becomes W + alpha/rank B A. The precision of that sum matters: merged in bfloat16 (three roundings, as the
release does it for student and teacher) outputs differ visibly from merged in float32 and rounded once (the teacher
with live adapters), so it is chosen by name and recorded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lipstream.checkpoints.keys_dit import AUDIO_PREFIXES
from lipstream.checkpoints.sources import TensorSource
from lipstream.checkpoints.strict import CheckpointError, TensorSpec, cast, listed

Precision = Literal["fp32", "bf16"]
MERGE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATCH_KERNEL = "patch_embedding.weight"
_FACTOR = re.compile(r"(?P<target>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")  # .default: as PEFT writes it
_TARGET = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")


@dataclass(frozen=True)
class LoraConfig:
    """Rank and scale; the defaults are those of both OmniAvatar adapters (1.3B and 14B)."""

    rank: int = 128
    alpha: float = 64.0

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors, sorted: target weight -> names of its two factors; the other names are whole tensors."""

    source: TensorSource
    factors: Mapping[str, tuple[str, str]]
    whole: tuple[str, ...]


def is_adapter(source: TensorSource) -> bool:
    """Whether a source holds low-rank factors."""
    return any(_FACTOR.fullmatch(name) for name in source.specs)


def sort_adapter(source: TensorSource) -> Adapter:
    """Pair the factors.

    Raises:
        CheckpointError: a factor without its partner, or given twice.
    """
    found: dict[str, dict[str, str]] = {}
    whole = []
    for name in source.specs:
        match = _FACTOR.fullmatch(name)
        if match is None:
            whole.append(name)
            continue
        pair = found.setdefault(f"{match['target']}.weight", {})
        if match["factor"] in pair:
            raise CheckpointError(f"{source.label}: {pair[match['factor']]} and {name} are the same factor")
        pair[match["factor"]] = name
    lonely = sorted(name for pair in found.values() if len(pair) == 1 for name in pair.values())
    if lonely:
        raise CheckpointError(f"{source.label}: {len(lonely)} factors without their partner: {listed(lonely)}")
    return Adapter(source, {target: (pair["A"], pair["B"]) for target, pair in found.items()}, tuple(whole))


def merge_pair(weight: Tensor, a: Tensor, b: Tensor, scale: float, precision: Precision) -> Tensor:
    """W + scale B A in the given precision: [out, in], dtype of that precision.

    bf16 rounds the inputs, the product, its scaled value and the sum, as bfloat16 arithmetic does step by step.
    """
    dtype = MERGE_DTYPES[precision]
    product = b.to(dtype) @ a.to(dtype)
    return weight.to(dtype) + scale * product


def grow_patch_kernel(kernel: Tensor, channels: int, rest: Tensor | None = None) -> Tensor:
    """A patch kernel [D, c, 1, h, w] for more input channels: its own lead, the rest is zero or taken from ``rest``.

    Adapters of earlier stages (33 channels: no masked video; 49: no reference sequence) grow with zeros. A base Wan
    (16 channels) loaded into a fresh network keeps that network's own values (``rest``, [D, channels, 1, h, w]) there.

    Raises:
        CheckpointError: the kernel has more channels than the network.
    """
    if kernel.shape[1] > channels:
        raise CheckpointError(f"{PATCH_KERNEL} has {kernel.shape[1]} input channels, the network takes {channels}")
    if kernel.shape[1] == channels:
        return kernel
    shape = (kernel.shape[0], channels, *kernel.shape[2:])
    grown = kernel.new_zeros(shape) if rest is None else rest.to(kernel.dtype).clone()
    grown[:, : kernel.shape[1]] = kernel
    return grown


def grown_source(source: TensorSource, channels: int) -> TensorSource:
    """The same tensors with the patch kernel grown to ``channels`` (zeros); unchanged where it is wide enough."""
    spec = source.specs.get(PATCH_KERNEL)
    if spec is None or len(spec.shape) != 5 or spec.shape[1] >= channels:
        return source
    specs = dict(source.specs)
    specs[PATCH_KERNEL] = TensorSpec((spec.shape[0], channels, *spec.shape[2:]), spec.dtype)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        return grow_patch_kernel(tensor, channels) if name == PATCH_KERNEL else tensor

    return dataclasses.replace(source, specs=specs, read=read)


def merge_adapter(
    base: TensorSource,
    adapter: TensorSource,
    precision: Precision,
    *,
    channels: int | None = None,
    lora: LoraConfig | None = None,
    dtype: torch.dtype | None = None,
) -> TensorSource:
    """A base with its adapter merged; tensors are made when they are read, so memory holds one at a time.

    Args:
        base: tensors under our names.
        adapter: factors and whole tensors under our names.
        channels: input channels of the network; a smaller patch kernel is grown with zeros.
        lora: rank and scale.
        dtype: of all floating tensors of the result, rounded once; default: the base's with fp32, bfloat16 with bf16.

    Raises:
        CheckpointError: the adapter does not fit the base; everything that is wrong is listed.
    """
    lora = lora or LoraConfig()
    sorted_adapter = sort_adapter(adapter)
    _check_fit(base, sorted_adapter, lora)
    out_dtype = dtype or (torch.bfloat16 if precision == "bf16" else _base_dtype(base))
    origin = {**dict.fromkeys(base.specs, base), **dict.fromkeys(sorted_adapter.whole, adapter)}
    grown = {id(source): grown_source(source, channels) if channels else source for source in (base, adapter)}

    def read(name: str) -> Tensor:
        tensor = grown[id(origin[name])].read(name)
        if name in sorted_adapter.factors:
            a, b = (adapter.read(factor) for factor in sorted_adapter.factors[name])
            tensor = merge_pair(tensor, a, b, lora.scale, precision)
        return cast(tensor, out_dtype)

    specs = {}
    for name, source in origin.items():
        spec = grown[id(source)].specs[name]
        specs[name] = TensorSpec(spec.shape, out_dtype if spec.dtype.is_floating_point else spec.dtype)
    label = f"{base.label} with {adapter.label}"
    return TensorSource(label, specs, read, (*base.files, *adapter.files), base.wrapper)


def _base_dtype(base: TensorSource) -> torch.dtype:
    dtypes = {spec.dtype for spec in base.specs.values() if spec.dtype.is_floating_point}
    if len(dtypes) != 1:
        raise CheckpointError(f"{base.label}: floating tensors are of {len(dtypes)} dtypes; choose one for the result")
    return dtypes.pop()


def _check_fit(base: TensorSource, adapter: Adapter, lora: LoraConfig) -> None:
    """All targets of the base and no others, all shapes, and only such whole tensors as an adapter may bring."""
    targets = {name for name in base.specs if _TARGET.fullmatch(name)}
    problems = []
    missing, unknown = sorted(targets - adapter.factors.keys()), sorted(adapter.factors.keys() - targets)
    if missing:
        problems.append(f"{len(missing)} weights without factors: {listed(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} factors for no weight of {base.label}: {listed(unknown)}")
    misshapen = []
    for target in sorted(targets & adapter.factors.keys()):
        out_width, in_width = base.specs[target].shape[0], base.specs[target].shape[-1]
        names, needed = adapter.factors[target], ((lora.rank, in_width), (out_width, lora.rank))
        for name, shape in zip(names, needed, strict=True):
            if adapter.source.specs[name].shape != shape:
                misshapen.append(f"{name} is {list(adapter.source.specs[name].shape)}, not {list(shape)}")
    if misshapen:
        problems.append(f"{len(misshapen)} factors of another shape: {listed(misshapen)}")
    strange = sorted(
        name
        for name in adapter.whole
        if not name.startswith(AUDIO_PREFIXES) and not name.startswith("patch_embedding.")
    )
    if strange:
        problems.append(f"{len(strange)} tensors that an adapter does not bring: {listed(strange)}")
    if problems:
        raise CheckpointError(f"{adapter.source.label} does not fit {base.label}: {'; '.join(problems)}")
