"""Train the pocket SyncNet: which stretch of speech belongs to which movement of the mouth.

InfoNCE over all vectors of a batch: for five frames of a mouth, the speech of the same frames has to be nearer than
that of other clips and than that of the same clip two frames or more away (hard negatives, counted once more in a
softmax of their own). Neighbours one frame away are left out: they sound alike. What identifies a person is taken
away (the mean of a stretch of fields) or made useless (size, noise, blur, mirror, pitch, microphone).

Held-out clips are those of ``LEFT_OUT``; ``lipstream evaluate syncnet --gate`` measures on them.

    python -m lipstream.training.syncnet RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors
    python -m lipstream.training.syncnet RUN ... --export syncnet.safetensors
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lipstream.checkpoints.networks import load_codec, save_syncnet
from lipstream.models.audio import SpeechEncoder, load_speech_encoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec
from lipstream.models.syncnet_pocket import FLAVOURS, PocketSyncNet, pose_free_fields
from lipstream.training.codec import LEFT_OUT
from lipstream.training.coded import speech_rows
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.samples import Clip, load_clips

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SyncTraining:
    """What the network is trained on.

    Attributes:
        batch, frames: clips a step, and frames of each.
        real_share: of the draws from real speakers, where both kinds are there.
        temperature: of the softmax over cosines.
        scales: range of a mouth's size.
        jitter, bias: largest noise of a frame and of a whole stretch, in deviations of each movement.
        blur_odds: share of stretches smoothed over three frames, as generated mouths are.
        beside: the mean is taken over a stretch longer by up to so many frames on either side.
        variants: voices and microphones of each clip's speech.
    """

    batch: int = 12
    frames: int = 40
    real_share: float = 0.5
    temperature: float = 0.08
    scales: tuple[float, float] = (0.6, 1.6)
    jitter: float = 0.15
    bias: float = 0.22
    blur_odds: float = 0.3
    beside: int = 40
    variants: int = 5


class Talk(NamedTuple):
    """One clip: movements [versions, F, movements] and speech features [variants, F, channels], both float16."""

    real: bool
    moves: Tensor
    speech: Tensor


@torch.no_grad()
def prepare(
    network: PocketSyncNet, codec: PocketCodec, encoder: SpeechEncoder, clips: Sequence[Clip], config: SyncTraining
) -> list[Talk]:
    """All clips at every place in a codec group and mirrored.

    Fits the network's movements to them (always the same ones for the same clips, so a resumed run agrees).

    Raises:
        ValueError: no clip has ``config.frames`` frames.
    """
    chosen = [clip for clip in clips if len(clip) >= config.frames]
    if not chosen:
        raise ValueError(f"no clip has {config.frames} frames: give longer samples")
    mirror = torch.tensor([-1.0, 1.0])
    fields = []
    for clip in chosen:
        tracked = torch.from_numpy(clip.fields.astype(np.float32))
        whole = torch.stack([pose_free_fields(codec, tracked, lead) for lead in range(FRAMES_PER_LATENT)])
        fields.append(torch.cat([whole, whole.flip(3) * mirror]).half())
    plain_and_mirrored = [q[::FRAMES_PER_LATENT].float() for q in fields]
    kept = network.fit(torch.cat([(q - q.mean(1, keepdim=True))[:, ::2].flatten(0, 1) for q in plain_and_mirrored]))
    log.info("%d clips; %d movements keep %.4f", len(chosen), network.config.movements, kept)
    speech = speech_rows(encoder, chosen, np.random.default_rng(2), config.variants)
    return [
        Talk(clip.speaker != "synth", network.movements(q.float()).half(), speech[clip.name])
        for clip, q in zip(chosen, fields, strict=True)
    ]


class SyncLoss:
    """The contrastive loss; one instance holds data and draws."""

    def __init__(self, network: PocketSyncNet, talks: Sequence[Talk], config: SyncTraining, seed: int) -> None:
        self.network, self.config = network, config
        kinds = [[t for t in talks if t.real], [t for t in talks if not t.real]]
        self.kinds = [kind for kind in kinds if kind]
        self.odds = [config.real_share, 1 - config.real_share] if len(self.kinds) == 2 else [1.0]
        self.rng = np.random.default_rng(seed)
        own = torch.cat([t.moves[0].float() - t.moves[0].float().mean(0) for t in talks])
        self.deviation = own.std(0)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Movements [B, F, movements] around their mean, and the speech [B, F, channels] of the same frames."""
        rng, frames = self.rng, self.config.frames
        moves, speech = [], []
        for _ in range(self.config.batch):
            kind = self.kinds[int(rng.choice(len(self.kinds), p=self.odds))]
            talk = kind[int(rng.integers(len(kind)))]
            whole = talk.moves[int(rng.integers(len(talk.moves)))].float()
            start = int(rng.integers(len(whole) - frames + 1))
            before, after = rng.integers(self.config.beside + 1, size=2)
            mean = whole[max(0, start - before) : start + frames + after].mean(0)
            moves.append(whole[start : start + frames] - mean)
            speech.append(talk.speech[int(rng.integers(len(talk.speech))), start : start + frames].float())
        return torch.stack(moves), torch.stack(speech)

    def damage(self, moves: Tensor) -> Tensor:
        """Movements [B, F, movements] as another mouth, tracker or generator would make them."""
        config, batch = self.config, len(moves)
        low, high = (math.log(s) for s in config.scales)
        moves = moves * torch.exp(low + (high - low) * torch.rand(batch, 1, 1))
        noise = config.jitter * torch.rand(batch, 1, 1) * torch.randn_like(moves)
        noise = noise + config.bias * torch.rand(batch, 1, 1) * torch.randn_like(moves[:, :1])
        moves = moves + self.deviation * noise
        wide = F.pad(moves.transpose(1, 2), (1, 1), mode="replicate").transpose(1, 2)
        smooth = (wide[:, :-2] + 2 * moves + wide[:, 2:]) / 4
        return torch.where(torch.rand(batch, 1, 1) < config.blur_odds, smooth, moves)

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        moves, speech = self.draw()
        lips, heard = self.network.embed_movements(self.damage(moves)), self.network.embed_speech(speech)
        return contrast(lips, heard, self.config.temperature)


def contrast(lips: Tensor, speech: Tensor, temperature: float) -> tuple[Tensor, dict[str, float]]:
    """InfoNCE, both ways, over the whole batch and once more within each clip: vectors [B, n, d] each."""
    batch, n = lips.shape[:2]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    beside = torch.where(lag.abs() == 1, -torch.inf, 0.0)
    inside = lips @ speech.transpose(1, 2) / temperature + beside  # [B, n, n]
    across = lips.flatten(0, 1) @ speech.flatten(0, 1).T / temperature
    across.view(batch, n, batch, n).diagonal(dim1=0, dim2=2).add_(beside[..., None])  # [n, n, batch]
    own, place = torch.arange(batch * n), torch.arange(n).repeat(batch)
    total = F.cross_entropy(across, own) + F.cross_entropy(across.T, own)
    hard = F.cross_entropy(inside.flatten(0, 1), place) + F.cross_entropy(inside.mT.flatten(0, 1), place)
    found = (inside.detach().argmax(2) == torch.arange(n)).float().mean()
    return (total + hard) / 2, {"across": total.item() / 2, "within": hard.item() / 2, "found": found.item()}


def train(
    run: Path,
    clips: Sequence[Clip],
    codec: PocketCodec,
    encoder: SpeechEncoder,
    loop: LoopConfig,
    config: SyncTraining | None = None,
    flavour: str = "pocket",
) -> PocketSyncNet:
    """Train on clips, without those of ``LEFT_OUT``; resumes from ``run``. Returns the averaged network.

    Raises:
        ValueError: no clip is left, or none is long enough.
    """
    config = config or SyncTraining()
    network = PocketSyncNet(FLAVOURS[flavour])
    known = [c for c in clips if c.name not in LEFT_OUT and c.speaker not in LEFT_OUT]
    loss = SyncLoss(network, prepare(network, codec, encoder, known, config), config, seed=0)
    trainer = Loop([Trainee(model=network, loss=loss)], loop, run)
    loss.rng = np.random.default_rng(trainer.step + 1)  # a resumed run goes on to new draws
    trained = trainer.run()["model"]
    assert isinstance(trained, PocketSyncNet)
    return trained


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the averaged network in half precision")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    network = train(
        arguments.run,
        load_clips(arguments.samples),
        load_codec(arguments.codec),
        load_speech_encoder(arguments.speech),
        LoopConfig(steps=arguments.steps, lr=arguments.lr, weight_decay=0.05),
    )
    if arguments.export is not None:
        save_syncnet(network, arguments.export)


if __name__ == "__main__":
    main()
