"""Mouth fidelity and synchronisation of x0 predictions, at the pocket scale and at full size.

A metric set is a callable: predictions [N, K, T, g, g] and the clip -> {name: [N] numbers}. It says which of its
names stand for synchronisation and for the fidelity error (lower is better, as LPIPS is), and what it lacks.

Pocket scale, all against the clip's own latents:

* `mouth_error`: mean of `shape_error` and `texture_error`, root mean square errors in the mouth cells over those of
  the clip's average latent. 0 is the truth, 1 is as wrong as the clip's average mouth standing still.
* `sharp_space`, `sharp_time`: energy of the Laplacian of the decoded texture (within cells: no cell borders), and of
  the second time difference of the decoded shape, over the truth's. Below 1 smeared, above 1 rough or trembling.
* `gap_r`, `gap_amplitude`: correlation of the lip gap with the truth's, and the ratio of their deviations.
* `confidence`: a SyncNet's, where one is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lipstream.analysis.trajectory import AnalysisClip
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec, inner_lip_distance

#: Latents [N, K, T, g, g] and their speech rows [N, T, 4, D] -> confidence [N].
SyncScore = Callable[[Tensor, Tensor], Tensor]
#: Two sets of mouth crops [F, 3, h, w] in 0..1 -> one number (LPIPS, say).
FrameDistance = Callable[[Tensor, Tensor], Tensor]


class Metrics(Protocol):
    """A metric set; see the module docstring."""

    sync: str  # the name of the metric that stands for synchronisation
    error: str  # and for the fidelity error
    missing: tuple[str, ...]  # what could not be measured, in words

    def __call__(self, x0: Tensor, clip: AnalysisClip) -> dict[str, Tensor]:
        """Score predictions [N, K, T, g, g] of a clip: {name: [N]}."""
        ...


class PocketMetrics:
    """Metrics of the pocket codec's latents.

    Args:
        score: a pocket SyncNet's confidence; without one the lip gap's correlation stands for synchronisation.
    """

    error = "mouth_error"

    def __init__(self, codec: PocketCodec, score: SyncScore | None = None) -> None:
        self.codec, self.score = codec, score
        self._edges = laplacian_form(codec)
        self.sync = "gap_r" if score is None else "confidence"
        self.missing: tuple[str, ...] = ("SyncNet confidence (no scorer given)",) if score is None else ()

    @torch.no_grad()
    def __call__(self, x0: Tensor, clip: AnalysisClip) -> dict[str, Tensor]:
        """Score predictions [N, K, T, g, g] of a clip."""
        true = clip.target[None].float()
        still = true.mean(2, keepdim=True).expand_as(true)
        shapes, true_shapes = self._shapes(x0), self._shapes(true)
        textures, true_textures, still_textures = (self._textures(q) for q in (x0, true, still))
        gap, true_gap = inner_lip_distance(shapes), inner_lip_distance(true_shapes)
        mouths = (self._mouth(q) for q in (shapes, true_shapes, self._shapes(still)))
        shape_error = _relative_error(*mouths)
        texture_error = _relative_error(
            *(q * self.codec.texture.scale for q in (textures, true_textures, still_textures))
        )
        found = {
            "mouth_error": (shape_error + texture_error) / 2,
            "shape_error": shape_error,
            "texture_error": texture_error,
            "sharp_space": _ratio(self._edge_energy(textures), self._edge_energy(true_textures)),
            "sharp_time": _ratio(_tremble(self._mouth(shapes)), _tremble(self._mouth(true_shapes))),
            "gap_r": pearson(gap, true_gap),
            "gap_amplitude": _ratio(gap.std(1), true_gap.std(1)),
        }
        if self.score is not None:
            found["confidence"] = self.score(x0, clip.speech[None].expand(len(x0), -1, -1, -1)).float()
        return found

    def _shapes(self, z: Tensor) -> Tensor:
        """Latents [N, K, T, g, g] -> shape fields [N, F, 2g, 2g, 2], the lone first frame once."""
        fields = self.codec.decode_fields(rearrange(z, "n k t h w -> (n t) k h w"))
        return rearrange(fields, "(n t) f ... -> n (t f) ...", n=len(z))[:, FRAMES_PER_LATENT - 1 :]

    def _textures(self, z: Tensor) -> Tensor:
        """Texture codes of the mouth cells [N, T, cells, K]; times the scale, their distances are those of pixels."""
        config = self.codec.config
        (_, bottom), (left, right) = config.paint_rows, config.paint_cols
        cells = z[:, config.shape_channels :, :, config.known_rows : bottom, left:right].float()
        return rearrange(cells, "n k t y x -> n t (y x) k")

    def _edge_energy(self, codes: Tensor) -> Tensor:
        """Mean square of the decoded texture's Laplacian, [N, T, cells, K] -> [N]."""
        ones = F.pad(codes, (0, 1), value=1.0)
        return torch.einsum("...i, ij, ...j -> ...", ones, self._edges, ones).flatten(1).mean(1)

    def _mouth(self, fields: Tensor) -> Tensor:
        """The field samples of the hidden rows within the paint box's columns."""
        config = self.codec.config
        (_, bottom), (left, right) = config.paint_rows, config.paint_cols
        s = config.cell_field
        return fields[:, :, config.known_rows * s : bottom * s, left * s : right * s]


class FrameMetrics:
    """Full-size metrics: the mouth of decoded frames (paper: LPIPS and Sync-C).

    Args:
        decode: latents [N, K, T, h, w] -> frames [N, F, 3, H, W] in 0..1 (TAE or Wan VAE).
        mask: [H, W], 1 in the mouth region; its bounding box is what is compared.
        distance: LPIPS of crops; not a dependency (its package pulls in torchvision), so L1 stands in without it.
        score: SyncNet's confidence of latents.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        mask: Tensor,
        distance: FrameDistance | None = None,
        score: SyncScore | None = None,
    ) -> None:
        rows, columns = (mask.amax(axis).nonzero().flatten().tolist() for axis in (1, 0))
        if not rows:
            raise ValueError("the mouth mask is empty")
        self._box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        self.decode, self.distance, self.score = decode, distance, score
        self.error = "mouth_l1" if distance is None else "mouth_lpips"
        self.sync = "mouth_motion_r" if score is None else "confidence"
        lacking = {"LPIPS (no distance given)": distance, "SyncNet confidence (no scorer given)": score}
        self.missing = tuple(name for name, part in lacking.items() if part is None)
        self._true: tuple[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x0: Tensor, clip: AnalysisClip) -> dict[str, Tensor]:
        """Score predictions of a clip, one decoded at a time (a clip of frames is large)."""
        if self._true is None or self._true[0] != clip.name:
            self._true = clip.name, self._crops(clip.target[None])[0]
        true = self._true[1]
        found: dict[str, list[Tensor]] = {}
        for z in x0:
            crops = self._crops(z[None])[0]
            found.setdefault("mouth_l1", []).append((crops - true).abs().mean())
            # How much the mouth region moves, frame by frame: a stand-in where no SyncNet is at hand.
            motions = [q.diff(dim=0).abs().mean((1, 2, 3))[None] for q in (crops, true)]
            found.setdefault("mouth_motion_r", []).append(pearson(*motions)[0])
            if self.distance is not None:
                found.setdefault("mouth_lpips", []).append(self.distance(crops, true))
        stacked = {name: torch.stack(values).float() for name, values in found.items()}
        if self.score is not None:
            stacked["confidence"] = self.score(x0, clip.speech[None].expand(len(x0), -1, -1, -1)).float()
        return stacked

    def _crops(self, z: Tensor) -> Tensor:
        rows, columns = self._box
        return self.decode(z)[..., rows, columns].float()


def field_score(codec: PocketCodec, confidence: Callable[[Tensor, Tensor], Tensor]) -> SyncScore:
    """A `SyncScore` of a scorer that takes shape fields [B, F, 2g, 2g, 2] and speech rows [B, F, D] of a clip."""

    def score(latents: Tensor, speech: Tensor) -> Tensor:
        fields = codec.decode_fields(rearrange(latents, "n k t h w -> (n t) k h w"))
        lone = FRAMES_PER_LATENT - 1  # the first latent frame is one pixel frame, four times
        frames = rearrange(fields, "(n t) f ... -> n (t f) ...", n=len(latents))[:, lone:]
        return confidence(frames, rearrange(speech, "n t f d -> n (t f) d")[:, lone:])

    return score


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation along the last axis, [N, F] with [N or 1, F] -> [N]; NaN where a curve is constant."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norm > 1e-12, (a * b).sum(-1) / norm.clamp_min(1e-12), torch.nan).float()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return a / b.clamp_min(1e-8)


def _relative_error(a: Tensor, true: Tensor, still: Tensor) -> Tensor:
    """Root mean square error of [N, F, ...] over that of a still mouth, truth and still [1, F, ...]."""
    errors = [(q - true).square().flatten(1).mean(1).sqrt() for q in (a, still)]
    return _ratio(*errors)


def laplacian_form(codec: PocketCodec) -> Tensor:
    """[K + 1, K + 1] form E: mean square of the 3 x 3 Laplacian of a cell's grey texture = [code, 1] E [code, 1]^T.

    The code is linear, so that nothing need be decoded; the borders between cells are left out.
    """
    config, code = codec.config, codec.texture
    parts = torch.cat([(code.basis * code.scale).T, code.mean[None]])
    patches = rearrange(parts, "k (f c y x) -> k f c y x", f=FRAMES_PER_LATENT, c=3, y=config.cell_px).mean(2)
    kernel = parts.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(patches.flatten(0, 1)[:, None], kernel[None, None]).reshape(len(parts), -1)
    return edges @ edges.T / edges.shape[1]


def _tremble(fields: Tensor) -> Tensor:
    """Mean square of the second difference over time of [N, F, ...] -> [N]."""
    return fields.diff(n=2, dim=1).square().flatten(1).mean(1)
