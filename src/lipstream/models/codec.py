"""The pocket codec: four frames of a face <-> one latent frame of 10 x 10 cells, causal, streaming.

It takes the place of the Wan 2.1 VAE in the pocket flavour (spec section 1.7: 4x in time, first frame alone). Input is
not pixels of a crop but the two parts into which :mod:`lipstream.faces.canvas` splits a face, so a latent has

* ``shape_channels``: a fixed linear code (PCA) of the shape field of a cell over four frames, and
* ``texture_channels``: a fixed linear code (PCA) of a 16 x 16 px x 4 frame patch of the shape-free texture.

Encoding is one matrix product per part and needs no training. Decoding inverts the shape part the same way and lets a
small learned *painter* turn the texture part into colours and a gate for the mouth area, given the source's own
texture: where the gate is closed, the source's pixels (moved by the new shape) are the output.

Legend: B batch, F pixel frames (1 + 4n in the first call, then 4n), T latent frames, K latent channels, G grid cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.streaming import StreamingModule

FRAMES_PER_LATENT = 4
# The inside of the mouth on the canvas (its wide-open rest shape): centre and half axes of an ellipse, (x, y).
INSIDE_CENTRE_PX = (80.0, 69.5)
INSIDE_RADII_PX = (38.0, 16.0)


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Architecture of :class:`PocketCodec`.

    Attributes:
        grid: cells per side; ``cell_px`` canvas px and ``cell_field`` field samples per cell side.
        known_rows: rows above the upper lip, which tell the pose; everything below is the mouth mask.
        pose_rank: components of the known rows' shape that predict the hidden rows'. Three are free of speech (the
            lip gap that they predict correlates at most .15 with the real one); eight are not (.96).
        manifold_rank: components of the movements that a talking mouth makes; a generated one is kept to them.
        paint_rows, paint_cols: half-open cell ranges that the painter may change.
        trunk, quarter, half: painter widths at 1/16, 1/4 and 1/2 of the canvas resolution.
    """

    grid: int = 10
    cell_px: int = 16
    cell_field: int = 2
    shape_channels: int = 12
    texture_channels: int = 36
    known_rows: int = 3
    pose_rank: int = 3
    manifold_rank: int = 32
    paint_rows: tuple[int, int] = (2, 7)
    paint_cols: tuple[int, int] = (1, 9)
    trunk: int = 128
    quarter: int = 64
    half: int = 32

    @property
    def latent_channels(self) -> int:
        return self.shape_channels + self.texture_channels

    @property
    def shape_dim(self) -> int:
        return FRAMES_PER_LATENT * 2 * self.cell_field**2

    @property
    def texture_dim(self) -> int:
        return FRAMES_PER_LATENT * 3 * self.cell_px**2

    @property
    def paint_box_px(self) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) canvas px of the painted area."""
        (top, bottom), (left, right) = self.paint_rows, self.paint_cols
        return top * self.cell_px, bottom * self.cell_px, left * self.cell_px, right * self.cell_px


FLAVOURS: dict[str, CodecConfig] = {
    "test": CodecConfig(shape_channels=4, texture_channels=4, trunk=8, quarter=8, half=8),
    "pocket": CodecConfig(),
}


class Decoded(NamedTuple):
    """What the codec says about F frames.

    Attributes:
        fields: [B, F, grid * cell_field, grid * cell_field, 2] crop px.
        paint: [B, F, 3, h, w] in 0..1, the paint box only.
        gate: [B, F, h, w] in 0..1, how much of the paint replaces the moved source.
    """

    fields: Tensor
    paint: Tensor
    gate: Tensor


class LinearCode(nn.Module):
    """``code = (x - mean) @ basis / scale`` and its least-squares inverse; basis columns are orthonormal."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.eye(dim, channels))
        self.register_buffer("scale", torch.ones(channels))

    def encode(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., channels]"""
        code: Tensor = (x - self.mean) @ self.basis / self.scale
        return code

    def decode(self, code: Tensor) -> Tensor:
        """[..., channels] -> [..., dim]"""
        return (code * self.scale) @ self.basis.T + self.mean

    @torch.no_grad()
    def fit(self, x: Tensor) -> Tensor:
        """Principal components of rows ``x`` [N, dim]; returns the share of variance kept.

        The scale is std**0.5, normalised to unit mean variance: a compromise between whitening (every component
        equally hard to generate) and plain pixel loss (only the first ones matter). Measured in codec.md.
        """
        mean = x.mean(0)
        covariance = torch.cov((x - mean).T.double())
        values, vectors = torch.linalg.eigh(covariance)
        channels = self.basis.shape[1]
        kept = values.flip(0)[:channels].clamp_min(1e-12)
        self.mean.copy_(mean)
        self.basis.copy_(vectors.flip(1)[:, :channels])
        weight = kept.sqrt().sqrt()  # code std before normalisation
        self.scale.copy_(kept.sqrt() / (weight / weight.square().mean().sqrt()))
        share: Tensor = kept.sum() / values.sum()
        return share


class PoseCode(nn.Module):
    """What the rows above the mouth say about the shape of the hidden rows: how the head is turned, not what it says.

    A fixed linear map of low rank, fitted once: hidden shape codes = known shape codes @ ``known`` @ ``hidden``.
    """

    known: Tensor
    hidden: Tensor

    def __init__(self, known_dim: int, hidden_dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros(known_dim, rank))
        self.register_buffer("hidden", torch.zeros(rank, hidden_dim))

    def forward(self, known: Tensor) -> Tensor:
        """[N, known_dim] -> [N, hidden_dim]; differences matter, a constant part is left out."""
        out: Tensor = known @ self.known @ self.hidden
        return out

    @torch.no_grad()
    def fit(self, known: Tensor, hidden: Tensor) -> Tensor:
        """Regress ``hidden`` [N, dim] on the principal components of ``known``; returns the share explained."""
        centred, wanted = known - known.mean(0), hidden - hidden.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov(centred.T.double()))
        self.known.copy_(vectors.flip(1)[:, : self.known.shape[1]])
        self.hidden.copy_(torch.linalg.lstsq(centred @ self.known, wanted).solution)
        left = (wanted - self(centred)).square().sum()
        share: Tensor = 1 - left / wanted.square().sum()
        return share


class ResidualBlock(nn.Module):
    """SiLU-conv-SiLU-conv with a skip; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias if self.second.bias is not None else torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return out


class Painter(nn.Module):
    """Latents + the source's texture -> colours and gate of the paint box, one latent frame (four frames) a row."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        c, k = config, config.latent_channels
        self.stem = nn.Conv2d(3 * k, c.trunk, 3, padding=1)
        self.trunk = nn.Sequential(ResidualBlock(c.trunk), ResidualBlock(c.trunk))
        self.up_quarter = nn.Conv2d(c.trunk, FRAMES_PER_LATENT * c.quarter * 16, 1)
        self.see_quarter = nn.Conv2d(2 * 48, c.quarter, 1)
        self.quarter_blocks = nn.Sequential(*(ResidualBlock(c.quarter) for _ in range(3)))
        self.up_half = nn.Conv2d(c.quarter, c.half * 4, 1)
        self.see_half = nn.Conv2d(2 * 12, c.half, 1)
        self.half_blocks = nn.Sequential(ResidualBlock(c.half), ResidualBlock(c.half))
        self.head = nn.Conv2d(c.half, 4 * 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:  # paint starts as the linear texture, and mostly shown
            nn.init.zeros_(self.head.bias)
            self.head.bias.data[12:].fill_(1.0)

    def forward(self, cells: Tensor, coded: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """cells [N, 3K, gh, gw]; coded, source [N*4, 3, h, w] in 0..1 -> paint [N*4, 3, h, w], gate [N*4, h, w]."""
        frames = FRAMES_PER_LATENT
        x = self.trunk(self.stem(cells.to(self.stem.weight.dtype)))
        x = F.pixel_shuffle(self.up_quarter(F.silu(x)), 4)
        x = rearrange(x, "n (f c) h w -> (n f) c h w", f=frames)
        seen = torch.cat([coded, source], 1).to(x.dtype)
        x = self.quarter_blocks(x + self.see_quarter(F.pixel_unshuffle(seen, 4)))
        x = F.pixel_shuffle(self.up_half(F.silu(x)), 2)
        x = self.half_blocks(x + self.see_half(F.pixel_unshuffle(seen, 2)))
        x = F.pixel_shuffle(self.head(F.silu(x)), 2).float()
        return coded + x[:, :3], torch.sigmoid(x[:, 3])


@dataclass
class CodecState:
    """What a stream remembers: whether the lone first frame came, and the last latent frame decoded."""

    encoded: bool = False
    previous: Tensor | None = None  # [B, K, grid, grid]


class PocketCodec(StreamingModule[CodecState]):
    """See the module docstring. Weights: two fitted :class:`LinearCode` and the trained painter."""

    manifold: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.shape = LinearCode(config.shape_dim, config.shape_channels)
        self.texture = LinearCode(config.texture_dim, config.texture_channels)
        known = config.known_rows * config.grid * config.shape_channels
        whole = config.grid**2 * config.shape_channels
        self.pose = PoseCode(known, whole - known, config.pose_rank)
        self.register_buffer("manifold", torch.eye(config.manifold_rank, whole))
        self.painter = Painter(config)

    def _init_state(self, batch: int) -> CodecState:
        return CodecState()

    def mouth_mask(self) -> Tensor:
        """[1, 1, 1, grid, grid]: 1 = regenerate."""
        mask = torch.zeros(1, 1, 1, self.config.grid, self.config.grid)
        mask[..., self.config.known_rows :, :] = 1
        return mask

    def split_shape(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Shape codes of the known and of the hidden rows: z [N, K, g, g] -> [N, known], [N, hidden]."""
        shape = z[:, : self.config.shape_channels]
        rows = self.config.known_rows
        return shape[:, :, :rows].flatten(1), shape[:, :, rows:].flatten(1)

    def posed(self, z: Tensor) -> Tensor:
        """The part of z [N, K, g, g] that pose explains: hidden shape codes from the known ones, zero elsewhere."""
        rows, channels = self.config.known_rows, self.config.shape_channels
        out = torch.zeros_like(z)
        hidden = self.pose(self.split_shape(z)[0])
        out[:, :channels, rows:] = rearrange(hidden, "n (k y x) -> n k y x", k=channels, x=self.config.grid)
        return out

    def pose_free(self, z: Tensor) -> Tensor:
        """z [N, K, g, g] without the turning of the head, known rows zero: what the diffusion transformer works on.

        The known rows themselves must not be shown to it. Landmarks of nose and cheeks move with the lips (eight
        components of them predict the lip gap with r = .96), and a model that may read the answer does not listen.
        """
        return self.split_pose(z)[0]

    def split_pose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z as (:meth:`pose_free`, :meth:`posed`); their sum is z in the hidden rows."""
        posed = self.posed(z)
        free = z - posed
        free[:, :, : self.config.known_rows] = 0
        return free, posed

    def as_mouths_move(self, difference: Tensor) -> Tensor:
        """The part of a difference of pose-free latents [N, K, g, g] whose shape a talking mouth makes; texture stays.

        What a small network leaves of noise in a shape, and guidance doubles, shows as wavy lips. Of the movements of
        real and synthetic mouths 32 components hold 99 %.
        """
        channels = self.config.shape_channels
        shape = difference[:, :channels].flatten(1) @ self.manifold.T @ self.manifold
        shape = shape.unflatten(1, (channels, *difference.shape[2:]))  # type: ignore[no-untyped-call]
        return torch.cat([shape, difference[:, channels:]], 1)

    # ------------------------------------------------------------------ encode

    def shape_cells(self, fields: Tensor) -> Tensor:
        """[N, 4, g*s, g*s, 2] -> [N, g, g, shape_dim]"""
        s = self.config.cell_field
        return rearrange(fields, "n f (gy y) (gx x) d -> n gy gx (f d y x)", y=s, x=s)

    def texture_cells(self, textures: Tensor) -> Tensor:
        """[N, 4, 3, H, W] in 0..1 -> [N, g, g, texture_dim]"""
        p = self.config.cell_px
        return rearrange(textures, "n f c (gy y) (gx x) -> n gy gx (f c y x)", y=p, x=p)

    def encode(self, fields: Tensor, textures: Tensor) -> Tensor:
        """Code frames.

        Args:
            fields: [B, F, g*s, g*s, 2] crop px.
            textures: [B, F, 3, H, W] in 0..1.

        Returns:
            [B, K, T, grid, grid]; T = 1 + (F - 1) / 4 in a stream's first call, F / 4 later.

        Raises:
            ValueError: F does not make whole latent frames.
        """
        state = self.state_or_fresh(fields.shape[0])
        first = not state.encoded
        state.encoded = True
        groups_f, groups_t = _grouped(fields, first), _grouped(textures, first)
        batch = fields.shape[0]
        z = self.encode_groups(groups_f.flatten(0, 1), groups_t.flatten(0, 1))
        return rearrange(z, "(b t) k h w -> b k t h w", b=batch)

    def encode_groups(self, fields: Tensor, textures: Tensor) -> Tensor:
        """Code whole groups: [N, 4, ...] each -> [N, K, grid, grid]."""
        shape = self.shape.encode(self.shape_cells(fields))
        texture = self.texture.encode(self.texture_cells(textures))
        return rearrange(torch.cat([shape, texture], -1), "n h w k -> n k h w").contiguous()

    def encode_sliding(self, fields: Tensor, textures: Tensor) -> tuple[Tensor, Tensor]:
        """Code a clip at every frame offset at once; equals :meth:`encode_groups` of all its groups.

        The codes are linear, so a group's code is the sum of its frames' parts: each frame is projected once.

        Args:
            fields: [F, g*s, g*s, 2]. textures: [F, 3, H, W] in 0..1.

        Returns:
            moving [F - 3, K, g, g] (row t: frames t .. t + 3) and still [F, K, g, g] (row t: frame t four times).
        """
        s, p, frames = self.config.cell_field, self.config.cell_px, FRAMES_PER_LATENT
        shape = rearrange(fields, "n (gy y) (gx x) d -> n gy gx (d y x)", y=s, x=s)
        texture = rearrange(textures, "n c (gy y) (gx x) -> n gy gx (c y x)", y=p, x=p)
        moving, still = [], []
        for code, cells in ((self.shape, shape), (self.texture, texture)):
            basis = rearrange(code.basis, "(f r) k -> f r k", f=frames)
            parts = torch.einsum("n y x r, f r k -> f n k y x", cells, basis)
            offset = (code.mean @ code.basis)[:, None, None]
            count = len(cells) - frames + 1
            moving.append((sum(parts[f, f : f + count] for f in range(frames)) - offset) / code.scale[:, None, None])
            still.append((parts.sum(0) - offset) / code.scale[:, None, None])
        return torch.cat(moving, 1), torch.cat(still, 1)

    # ------------------------------------------------------------------ decode

    def decode_fields(self, z: Tensor) -> Tensor:
        """[N, K, grid, grid] -> shape fields [N, 4, g*s, g*s, 2]."""
        s = self.config.cell_field
        cells = self.shape.decode(rearrange(z[:, : self.config.shape_channels], "n k h w -> n h w k"))
        return rearrange(cells, "n gy gx (f d y x) -> n f (gy y) (gx x) d", f=FRAMES_PER_LATENT, d=2, y=s, x=s)

    def still(self, z: Tensor) -> Tensor:
        """z [N, K, g, g] without the movement of the shape within its four frames; texture stays.

        What is shown again and again (a closed mouth) would otherwise repeat the movement that it was taken from.
        """
        mean = self.decode_fields(z).mean(1, keepdim=True).expand(-1, FRAMES_PER_LATENT, -1, -1, -1)
        shape = rearrange(self.shape.encode(self.shape_cells(mean)), "n h w k -> n k h w")
        return torch.cat([shape, z[:, self.config.shape_channels :]], 1)

    def decode_texture(self, z: Tensor) -> Tensor:
        """[N, K, grid, grid] -> linear texture of the paint box [N, 4, 3, h, w] (no painter)."""
        (top, bottom), (left, right) = self.config.paint_rows, self.config.paint_cols
        codes = z[:, self.config.shape_channels :, top:bottom, left:right]
        cells = self.texture.decode(rearrange(codes, "n k h w -> n h w k"))
        p = self.config.cell_px
        return rearrange(cells, "n gy gx (f c y x) -> n f c (gy y) (gx x)", f=FRAMES_PER_LATENT, c=3, y=p, x=p)

    def paint(self, z: Tensor, previous: Tensor, source_z: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Paint groups.

        Args:
            z, previous, source_z: [N, K, grid, grid]: these frames, the latent frame before, the source's own.
            source: [N, 4, 3, h, w] in 0..1, the source's texture in the paint box.

        Returns:
            paint [N, 4, 3, h, w] and gate [N, 4, h, w]; the gate is zero on lips and skin.
        """
        (top, bottom), (left, right) = self.config.paint_rows, self.config.paint_cols
        cells = torch.cat([z, previous, source_z], 1)[:, :, top:bottom, left:right]
        coded = self.decode_texture(z).flatten(0, 1)
        paint, gate = self.painter(cells, coded, source.flatten(0, 1))
        gate = gate * self.inside_window(gate)
        n = z.shape[0]
        return rearrange(paint, "(n f) c h w -> n f c h w", n=n), rearrange(gate, "(n f) h w -> n f h w", n=n)

    def decode(self, z: Tensor, source_z: Tensor, source_textures: Tensor) -> Decoded:
        """Latents -> what the compositor needs.

        Args:
            z, source_z: [B, K, T, grid, grid] generated and source latents.
            source_textures: [B, F, 3, H, W] in 0..1, the source frames' canvas textures.
        """
        state = self.state_or_fresh(z.shape[0])
        first = state.previous is None
        before = z[:, :, 0] if state.previous is None else state.previous
        previous = torch.cat([before[:, :, None], z[:, :, :-1]], 2)
        state.previous = z[:, :, -1].clone()
        top, bottom, left, right = self.config.paint_box_px
        source = _grouped(source_textures[..., top:bottom, left:right], first).flatten(0, 1)
        groups = [rearrange(q, "b k t h w -> (b t) k h w") for q in (z, previous, source_z)]
        paint, gate = self.paint(groups[0], groups[1], groups[2], source)
        batch = z.shape[0]
        parts = (self.decode_fields(groups[0]), paint, gate)
        fields, paint, gate = (_ungrouped(rearrange(q, "(b t) ... -> b t ...", b=batch), first) for q in parts)
        return Decoded(fields, paint.clamp(0, 1), gate)

    def inside_window(self, like: Tensor) -> Tensor:
        """[h, w] factor that keeps the gate to the inside of the mouth; lips and skin are always the source's own."""
        top, bottom, left, right = self.config.paint_box_px
        y = torch.arange(top, bottom, device=like.device, dtype=like.dtype) + 0.5
        x = torch.arange(left, right, device=like.device, dtype=like.dtype) + 0.5
        (cx, cy), (rx, ry) = INSIDE_CENTRE_PX, INSIDE_RADII_PX
        distance = (((x - cx) / rx).square()[None] + ((y - cy) / ry).square()[:, None]).sqrt()
        u = ((1.3 - distance) / 0.3).clamp(0, 1)
        return u * u * (3 - 2 * u)


def inner_lip_distance(fields: Tensor) -> Tensor:
    """Vertical distance of the inner lips beyond the canvas' open rest mouth, crop px: [..., 20, 20, 2] -> [...]."""
    middle = fields[..., 9:11, 1].mean(-1)  # canvas columns 76 and 84
    return middle[..., 9:11].mean(-1) - middle[..., 6:8].mean(-1)  # canvas rows 80 and 56


def _grouped(frames: Tensor, first: bool) -> Tensor:
    """[B, F, ...] -> [B, T, 4, ...]; a stream's first frame makes a group of its own, repeated four times."""
    count = frames.shape[1]
    if (count - first) % FRAMES_PER_LATENT or count < 1:
        expected = "1 + 4n in the first call" if first else "4n after the first call"
        raise ValueError(f"the codec takes {expected}, got {count} pixel frames")
    head = [repeat(frames[:, :1], "b 1 ... -> b 1 f ...", f=FRAMES_PER_LATENT)] if first else []
    rest = frames[:, 1:] if first else frames
    tail = [rearrange(rest, "b (t f) ... -> b t f ...", f=FRAMES_PER_LATENT)] if rest.shape[1] else []
    return torch.cat(head + tail, 1)


def _ungrouped(groups: Tensor, first: bool) -> Tensor:
    """Inverse of :func:`_grouped`."""
    if not first:
        return groups.flatten(1, 2)
    return torch.cat([groups[:, 0, -1:], groups[:, 1:].flatten(1, 2)], 1)
