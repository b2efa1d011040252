"""Names of the Wan 2.1 VAE's tensors: the official file's (ours) <-> diffusers' `AutoencoderKLWan`.

names = official_to_diffusers(config)     # one entry a tensor, bijective; shapes are the same on both sides
"""

from __future__ import annotations

from lipstream.models.wan_vae import WanVAEConfig

# Inside a residual block: official -> diffusers.
_BLOCK = {
    "residual.0.gamma": "norm1.gamma",
    "residual.2.weight": "conv1.weight",
    "residual.2.bias": "conv1.bias",
    "residual.3.gamma": "norm2.gamma",
    "residual.6.weight": "conv2.weight",
    "residual.6.bias": "conv2.bias",
}
_SHORTCUT = {"shortcut.weight": "conv_shortcut.weight", "shortcut.bias": "conv_shortcut.bias"}
_ATTENTION = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
_RESAMPLE = ("resample.1.weight", "resample.1.bias")
_TIME = ("time_conv.weight", "time_conv.bias")
# Outside of the levels, the same for every size.
_ENDS = {
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.2": "encoder.conv_out",
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.2": "decoder.conv_out",
}


def official_to_diffusers(config: WanVAEConfig) -> dict[str, str]:
    """The diffusers name of every tensor of the official file."""
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _ENDS.items() for kind in ("weight", "bias")}
    for half in ("encoder", "decoder"):
        names[f"{half}.head.0.gamma"] = f"{half}.norm_out.gamma"
        for at, place in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            parts = {part: part for part in _ATTENTION} if at == 1 else _BLOCK
            names |= _under(f"{half}.middle.{at}", f"{half}.mid_block.{place}", parts)
    return names | _encoder_levels(config) | _decoder_levels(config)


def diffusers_to_official(config: WanVAEConfig) -> dict[str, str]:
    """Inverse of :func:`official_to_diffusers`."""
    return {theirs: ours for ours, theirs in official_to_diffusers(config).items()}


def _encoder_levels(config: WanVAEConfig) -> dict[str, str]:
    """Both sides number the layers of all levels through; only the parts of a block differ."""
    names: dict[str, str] = {}
    at, before = 0, config.channels[0]
    for level, width in enumerate(config.channels):
        for _ in range(config.blocks_per_level):
            parts = _BLOCK | (_SHORTCUT if before != width else {})
            names |= _under(f"encoder.downsamples.{at}", f"encoder.down_blocks.{at}", parts)
            at, before = at + 1, width
        if level < len(config.temporal):
            names |= _under(
                f"encoder.downsamples.{at}", f"encoder.down_blocks.{at}", _resampling(config.temporal[level])
            )
            at += 1
    return names


def _decoder_levels(config: WanVAEConfig) -> dict[str, str]:
    """diffusers gathers a level's blocks and its up-sampler under one number."""
    names: dict[str, str] = {}
    widths, temporal = config.channels[::-1], config.temporal[::-1]
    at, before = 0, widths[0]
    for level, width in enumerate(widths):
        for block in range(config.blocks_per_level + 1):
            parts = _BLOCK | (_SHORTCUT if before != width else {})
            names |= _under(f"decoder.upsamples.{at}", f"decoder.up_blocks.{level}.resnets.{block}", parts)
            at, before = at + 1, width
        if level < len(temporal):
            names |= _under(
                f"decoder.upsamples.{at}", f"decoder.up_blocks.{level}.upsamplers.0", _resampling(temporal[level])
            )
            at, before = at + 1, width // 2
    return names


def _resampling(temporal: bool) -> dict[str, str]:
    return {part: part for part in _RESAMPLE + (_TIME if temporal else ())}


def _under(ours: str, theirs: str, parts: dict[str, str]) -> dict[str, str]:
    """Names of `parts` below a prefix on each side."""
    return {f"{ours}.{part}": f"{theirs}.{other}" for part, other in parts.items()}
