"""Train the pocket codec: fit the two linear codes, then the painter (stands in for the Wan VAE's training).

The painter sees a *source* group and the latents of a *target* group of the same person from another time, and must
give the target's texture; so it learns to keep the source's skin (gate closed) and to paint what only the target
shows. The loss is taken on the canvas, weighted by how much picture area a canvas pixel covers in the target.

    python -m lipstream.training.codec RUN --samples DIR... --steps 3000
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.faces.canvas import FaceCanvas
from lipstream.models.codec import FLAVOURS, FRAMES_PER_LATENT, PocketCodec
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.samples import Clip, load_clips

log = logging.getLogger(__name__)

# Kept for testing: two GRID speakers, and every 48th clip of the third.
LEFT_OUT = (
    "s26",
    "s31",
    "s1_bbal6n",
    "s1_bgwb4n",
    "s1_bwig2p",
    "s1_lbwy7s",
    "s1_lrie1a",
    "s1_pbao8n",
    "s1_pgby4n",
    "s1_prwx7s",
    "s1_sbiazn",
    "s1_srbu7s",
)
# Paint costs a little everywhere, so that skin stays the source's and only what it cannot show is painted.
GATE_COST = 0.015
SHARE = {"s1": 0.45}  # of the draws; all other clips share the rest, so that one man does not dominate


class Groups(NamedTuple):
    """Four-frame groups: fields [N, 4, 20, 20, 2] and textures [N, 4, 3, 160, 160] in 0..1."""

    fields: Tensor
    textures: Tensor


class Sampler:
    """Draws groups from clips with appearance augmentation shared by all groups of one draw."""

    def __init__(self, clips: Sequence[Clip], seed: int, share: dict[str, float] | None = None) -> None:
        self.clips = [clip for clip in clips if len(clip) >= 3 * FRAMES_PER_LATENT]
        if not self.clips:
            raise ValueError("no clip is long enough to train on")
        self.rng = np.random.default_rng(seed)
        share = SHARE if share is None else share
        counts = {s: sum(c.speaker == s for c in self.clips) for s in {c.speaker for c in self.clips}}
        rest = sum(n for s, n in counts.items() if s not in share)
        named = sum(v for s, v in share.items() if s in counts)
        weights = np.array(
            [
                share[c.speaker] / counts[c.speaker] if c.speaker in share else (1 - named) / max(rest, 1)
                for c in self.clips
            ]
        )
        self.weights = weights / weights.sum()

    def clip(self) -> Clip:
        return self.clips[int(self.rng.choice(len(self.clips), p=self.weights))]

    def starts(self, clip: Clip, count: int) -> list[int]:
        """Random group starts whose four frames all show the face (after 50 tries: any)."""
        found: list[int] = []
        for _ in range(50 * count):
            start = int(self.rng.integers(0, len(clip) - FRAMES_PER_LATENT + 1))
            if clip.tracked[start : start + FRAMES_PER_LATENT].all():
                found.append(start)
            if len(found) == count:
                return found
        return found + [0] * (count - len(found))

    def augmentation(self) -> tuple[NDArray[np.float32], bool]:
        """A colour table [256, 3] and whether to mirror."""
        rng = self.rng
        levels = np.arange(256, dtype=np.float32)[:, None] / 255
        table = levels ** rng.uniform(0.7, 1.4) * rng.uniform(0.8, 1.15, 3)
        if rng.random() < 0.2:
            table = (table - 0.5) * rng.uniform(0.6, 1.0) + 0.5
        if rng.random() < 0.1:
            table = table[:, rng.permutation(3)]
        return np.clip(table, 0, 1).astype(np.float32), bool(rng.random() < 0.5)

    def read(
        self, clip: Clip, starts: Sequence[int], table: NDArray[np.float32], mirror: bool, still: Sequence[bool]
    ) -> Groups:
        """Groups of one clip; ``still`` ones repeat their last frame, as a stream's first group does."""
        index = [
            [s + FRAMES_PER_LATENT - 1] * FRAMES_PER_LATENT if q else list(range(s, s + FRAMES_PER_LATENT))
            for s, q in zip(starts, still, strict=True)
        ]
        raw = np.stack([clip.textures[i] for i in index])
        colour = np.stack([table[:, c][raw[..., c]] for c in range(3)], 2)
        fields = torch.from_numpy(np.stack([clip.fields[i] for i in index]).astype(np.float32))
        textures = torch.from_numpy(colour)
        if mirror:
            fields = fields.flip(3) * torch.tensor([-1.0, 1.0])
            textures = textures.flip(-1)
        return Groups(fields, textures)


def fit_codes(codec: PocketCodec, sampler: Sampler, clips: int = 400, groups: int = 4) -> dict[str, float]:
    """Fit both linear codes on random groups; returns the shares of variance kept."""
    (top, bottom), (left, right) = codec.config.paint_rows, codec.config.paint_cols
    shapes, textures = [], []
    for _ in range(clips):
        clip = sampler.clip()
        table, mirror = sampler.augmentation()
        drawn = sampler.read(clip, sampler.starts(clip, groups), table, mirror, [False] * (groups - 1) + [True])
        shapes.append(codec.shape_cells(drawn.fields)[:, 2:].flatten(0, 2))
        textures.append(codec.texture_cells(drawn.textures)[:, top:bottom, left:right].flatten(0, 2))
    return {
        "shape_variance_kept": codec.shape.fit(torch.cat(shapes)).item(),
        "texture_variance_kept": codec.texture.fit(torch.cat(textures)).item(),
    }


def fit_pose(codec: PocketCodec, clips: Sequence[Clip]) -> float:
    """Fit the codec's pose code on every eighth frame, each clip relative to its own mean; returns the share explained.

    The mean is taken out per clip, so that only movement counts and not how people differ.
    """
    known, hidden = [], []
    for clip in clips:
        fields = torch.from_numpy(clip.fields[::8][clip.tracked[::8]].astype(np.float32))
        if len(fields) < 3:
            continue
        groups = repeat(fields, "n y x d -> n f y x d", f=FRAMES_PER_LATENT)
        cells = codec.shape.encode(codec.shape_cells(groups))
        above, below = codec.split_shape(rearrange(cells, "n y x k -> n k y x"))
        known.append(above - above.mean(0))
        hidden.append(below - below.mean(0))
    return codec.pose.fit(torch.cat(known), torch.cat(hidden)).item()


@torch.no_grad()
def fit_manifold(codec: PocketCodec, clips: Sequence[Clip]) -> float:
    """Fit how mouths move: principal components of pose-free shapes, each clip relative to its mean; the share kept.

    Needs the pose code. Only groups whose four frames all show the face count; clips count alike.

    Raises:
        ValueError: fewer groups than components.
    """
    moved = []
    for clip in clips:
        fields = torch.from_numpy(clip.fields.astype(np.float32))
        count = len(fields) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
        tracked = clip.tracked[:count].reshape(-1, FRAMES_PER_LATENT).all(1)
        groups = rearrange(fields[:count], "(n f) y x d -> n f y x d", f=FRAMES_PER_LATENT)[torch.from_numpy(tracked)]
        if len(groups) < 2:
            continue
        cells = codec.shape.encode(codec.shape_cells(groups))
        z = F.pad(rearrange(cells, "n y x k -> n k y x"), (0, 0, 0, 0, 0, codec.config.texture_channels))
        shape = codec.pose_free(z)[:, : codec.config.shape_channels]
        moved.append((shape - shape.mean(0)).flatten(1) / len(shape) ** 0.5)
    rank, found = codec.config.manifold_rank, sum(map(len, moved))
    if found < rank:
        raise ValueError(f"{found} groups of four frames with a face are too few for {rank} components")
    rows = torch.cat(moved)
    values, vectors = torch.linalg.eigh((rows.T @ rows).double())
    codec.manifold.copy_(vectors.flip(1)[:, :rank].T)
    return float(values.flip(0)[:rank].sum() / values.sum())


class AreaWeight(nn.Module):
    """Picture area (crop px^2) that each canvas pixel of the paint box covers under a shape field."""

    operator: Tensor
    rest: Tensor

    def __init__(self, canvas: FaceCanvas, box: tuple[int, int, int, int]) -> None:
        super().__init__()
        operator, rest = canvas.coarse_operator()
        self.register_buffer("operator", torch.from_numpy(operator))
        self.register_buffer("rest", torch.from_numpy(rest))
        self.box = box

    def forward(self, fields: Tensor) -> Tensor:
        """[N, 20, 20, 2] -> [N, h, w], clamped so that a closed mouth's inside still counts a little."""
        side = int(self.operator.shape[0] ** 0.5)
        moved = self.operator @ fields.flatten(1, 2)
        positions = self.rest + rearrange(moved, "n (y x) d -> n y x d", y=side)
        dy, dx = torch.gradient(positions, spacing=160 / side, dim=(1, 2))
        area = (dx[..., 0] * dy[..., 1] - dx[..., 1] * dy[..., 0]).clamp(0.03, 1.5)
        full = F.interpolate(area[:, None], scale_factor=160 // side, mode="bilinear")[:, 0]
        top, bottom, left, right = self.box
        return full[:, top:bottom, left:right]


def texture_loss(out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 of colours and of gradients at two scales: out, target [N, 3, h, w], weight [N, h, w]."""
    w = weight[:, None] / weight.mean()
    loss = ((out - target).abs() * w).mean()
    for scale in (1, 2):
        d, v = (out - target, w) if scale == 1 else (F.avg_pool2d(out - target, 2), F.avg_pool2d(w, 2))
        loss = loss + ((d[..., 1:] - d[..., :-1]).abs() * v[..., 1:]).mean() / scale
        loss = loss + ((d[..., 1:, :] - d[..., :-1, :]).abs() * v[..., 1:, :]).mean() / scale
    return loss


class PainterLoss:
    """The painter's training loss; one instance holds the data and the draws."""

    def __init__(self, codec: PocketCodec, sampler: Sampler, batch: int = 8) -> None:
        self.codec, self.sampler, self.batch = codec, sampler, batch
        self.box = codec.config.paint_box_px
        self.area = AreaWeight(FaceCanvas(), self.box)

    def draw(self) -> tuple[Groups, Groups, Groups]:
        """Target, previous and source groups of a batch."""
        sampler, size = self.sampler, FRAMES_PER_LATENT
        rows = []
        for _ in range(self.batch):
            clip = sampler.clip()
            table, mirror = sampler.augmentation()
            target, source = sampler.starts(clip, 2)
            first = bool(sampler.rng.random() < 0.1)
            before = target if first else max(0, target - size)
            rows.append(sampler.read(clip, [target, before, source], table, mirror, [first, first, first]))
        fields, textures = (torch.stack(q) for q in zip(*rows, strict=True))
        target_, before_, source_ = (Groups(fields[:, i], textures[:, i]) for i in range(3))
        return target_, before_, source_

    def _as_generated(self, z: Tensor, own: Tensor) -> Tensor:
        """Latents with the faults of generated ones, in half of the rows each.

        Noise; and textures drawn towards another mouth's, since a model that is unsure predicts the mean: what the
        inside of the mouth should look like has to be told from the shape then.
        """
        first = self.codec.config.shape_channels
        strength = (torch.rand(2, len(z), 1, 1, 1) < 0.5) * torch.rand(2, len(z), 1, 1, 1)
        texture = torch.lerp(z[:, first:], own[:, first:], 0.8 * strength[0])
        z = torch.cat([z[:, :first], texture], 1)
        return z + 0.25 * strength[1] * torch.randn_like(z)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        codec = self.codec
        target, before, source = self.draw()
        with torch.no_grad():
            z, previous, own = (codec.encode_groups(q.fields, q.textures) for q in (target, before, source))
            z, previous = self._as_generated(z, own), self._as_generated(previous, own)
            weight = self.area(target.fields.flatten(0, 1))
        top, bottom, left, right = self.box
        wanted, known = (q.textures[..., top:bottom, left:right] for q in (target, source))
        with torch.autocast("cpu", torch.bfloat16):
            paint, gate = codec.paint(z, previous, own, known)
        # Clamped as at inference: otherwise a nearly closed gate times absurd colours is a cheaper way to the target.
        out = known + gate[:, :, None] * (paint.clamp(0, 1) - known)
        loss = texture_loss(out.flatten(0, 1), wanted.flatten(0, 1), weight)
        loss = loss + 0.5 * texture_loss(paint.flatten(0, 1), wanted.flatten(0, 1), weight)
        error = ((out - wanted).square() * weight.view_as(gate)[:, :, None]).mean() / weight.mean()
        openness = gate.mean()
        metrics = {"psnr": -10 * error.log10().item(), "gate": openness.item()}
        # Charged by picture area: where a closed mouth hides the paint, showing it costs nothing.
        cost = (gate * weight.view_as(gate)).mean() / weight.mean()
        return loss + GATE_COST * cost, metrics


def train(run: Path, samples: Sequence[Path], loop: LoopConfig, flavour: str = "pocket", batch: int = 8) -> PocketCodec:
    """Fit and train; resumes from ``run``. Returns the averaged codec."""
    sampler = Sampler(load_clips(samples, LEFT_OUT), seed=0)
    codec = PocketCodec(FLAVOURS[flavour])
    fitted = run / "linear.pt"
    if fitted.exists():
        left = codec.load_state_dict(torch.load(fitted, weights_only=True), strict=False)
        unfit = [key for key in left.missing_keys if not key.startswith("painter.")]
        if unfit:
            raise ValueError(f"{fitted}: has no {', '.join(unfit)}, it is of an older version; use a new run folder")
    else:
        run.mkdir(parents=True, exist_ok=True)
        log.info("%s", fit_codes(codec, sampler))
        log.info("pose explains %.2f of the hidden rows' movement", fit_pose(codec, sampler.clips))
        log.info("the manifold keeps %.3f of the mouths' movement", fit_manifold(codec, sampler.clips))
        linear = {k: v for k, v in codec.state_dict().items() if not k.startswith("painter.")}
        torch.save(linear, fitted)
    codec = codec.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Loop([Trainee(model=codec, loss=PainterLoss(codec, sampler, batch))], loop, run)
    sampler.rng = np.random.default_rng(trainer.step + 1)  # a resumed run goes on to new draws
    trained = trainer.run()["model"]
    assert isinstance(trained, PocketCodec)
    return trained


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.run, arguments.samples, LoopConfig(steps=arguments.steps, lr=1.2e-3), batch=arguments.batch)


if __name__ == "__main__":
    main()
