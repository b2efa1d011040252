"""The pocket SyncNet: how well a face's movement and speech agree, for heads and voices that it never met.

The official network (:mod:`lipstream.models.syncnet`) sees pixels and needs thousands of people. This one sees what
people share: how the pose-free shape field (``PocketCodec.pose_free``) moves around its own mean, and speech as
features that carry from voice to voice. Its vectors have unit length and lie close where lips and speech belong
together, so the official scorers apply. Figures of the two networks cannot be compared.

    scorer = SyncScorer(network, codec, encoder)
    scorer.confidence(scorer.decode(latents), rows)                # [B], higher is better: the reward of distillation
    scorer.score(pose_free_fields(codec, fields), samples)         # Sync-C, Sync-D, offset and curve of one video

Legend: B batch, F pixel frames (25 fps), K latent channels, T latent frames, d vector length; n = F - 4 vectors,
vector i from frames i ... i + 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.models.audio import SAMPLES_PER_ROW, SpeechEncoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec
from lipstream.models.syncnet import LIP_FRAMES, SyncScore, reward_score

FIELD_SIDE = 20  # samples of a shape field
MOUTH_ROW = 6  # field rows above it tell the pose and are zero in pose-free latents
FIRST_KERNEL = 3  # two convolutions see the five frames of a vector together


@dataclass(frozen=True, kw_only=True)
class PocketSyncNetConfig:
    """Sizes of the two towers.

    Attributes:
        speech_channels: length of a row of the streaming speech encoder. Rows beat log-mel spectra on people that
            were not trained on (see the model card).
        movements: principal movements of the mouth that the lip tower is given.
    """

    speech_channels: int = 256
    movements: int = 32
    width: int = 128
    vector: int = 64
    dropout: float = 0.1


FLAVOURS: dict[str, PocketSyncNetConfig] = {
    "test": PocketSyncNetConfig(speech_channels=16, movements=4, width=24, vector=8, dropout=0.0),
    "pocket": PocketSyncNetConfig(),
}


class _Tower(nn.Module):
    """[B, F, channels] -> unit vectors [B, F - 4, d]."""

    def __init__(self, channels: int, config: PocketSyncNetConfig) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Linear(channels, width)
        self.first = nn.Conv1d(width, width, FIRST_KERNEL)
        self.second = nn.Conv1d(width, width, LIP_FRAMES - FIRST_KERNEL + 1)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(config.dropout),
            nn.Linear(width, config.vector),
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(self.dropout(x))).transpose(1, 2)
        x = F.gelu(self.second(F.gelu(self.first(x)))).transpose(1, 2)
        return F.normalize(self.head(x), dim=-1)


class PocketSyncNet(nn.Module):
    """Both towers, and the fixed linear map from shape fields to movements (fitted once, see ``fit``)."""

    basis: Tensor

    def __init__(self, config: PocketSyncNetConfig) -> None:
        super().__init__()
        self.config = config
        mouth = (FIELD_SIDE - MOUTH_ROW) * FIELD_SIDE * 2
        self.register_buffer("basis", torch.eye(mouth, config.movements))
        self.lips = _Tower(config.movements, config)
        self.speech = _Tower(config.speech_channels, config)

    def forward(self, fields: Tensor, speech: Tensor) -> tuple[Tensor, Tensor]:
        """Pose-free fields [B, F, 20, 20, 2] and speech features [B, F, channels] -> vectors [B, n, d] each."""
        return self.embed_lips(fields), self.embed_speech(speech)

    def movements(self, fields: Tensor) -> Tensor:
        """Pose-free fields [..., 20, 20, 2], crop px -> principal movements [..., movements], half whitened."""
        if fields.shape[-3:] != (FIELD_SIDE, FIELD_SIDE, 2):
            raise ValueError(f"fields must be [..., {FIELD_SIDE}, {FIELD_SIDE}, 2], got {list(fields.shape)}")
        out: Tensor = fields[..., MOUTH_ROW:, :, :].flatten(-3) @ self.basis
        return out

    def embed_lips(self, fields: Tensor) -> Tensor:
        """[B, F, 20, 20, 2] -> [B, n, d]. Only movement around the piece's own mean counts, so a face's form does not.

        Raises:
            ValueError: fields of another shape, or fewer than five frames.
        """
        moves = self.movements(fields)
        return self.embed_movements(moves - moves.mean(1, keepdim=True))

    def embed_movements(self, moves: Tensor) -> Tensor:
        """Movements around their mean [B, F, movements] -> [B, n, d]."""
        _check_frames(moves)
        out: Tensor = self.lips(moves)
        return out

    def embed_speech(self, speech: Tensor) -> Tensor:
        """[B, F, channels] -> [B, n, d]."""
        _check_frames(speech)
        out: Tensor = self.speech(speech)
        return out

    @torch.no_grad()
    def fit(self, fields: Tensor) -> float:
        """Take the principal movements of fields [N, 20, 20, 2] that are relative to their clips' means.

        Returns the share of movement kept. Components are half whitened, so that small movements count too.
        """
        rows = fields[:, MOUTH_ROW:].flatten(1)
        values, vectors = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
        kept = values.flip(0)[: self.config.movements].clamp_min(1e-8)
        self.basis.copy_(vectors.flip(1)[:, : self.config.movements] * kept**-0.25)
        return float(kept.sum() / values.sum())


def _check_frames(x: Tensor) -> None:
    if x.ndim != 3 or x.shape[1] < LIP_FRAMES:
        raise ValueError(f"SyncNet takes [batch, at least {LIP_FRAMES} frames, channels], got {list(x.shape)}")


@torch.no_grad()
def pose_free_fields(codec: PocketCodec, fields: Tensor, lead: int = FRAMES_PER_LATENT - 1) -> Tensor:
    """Tracked shape fields as the codec gives them back without pose: [F, 20, 20, 2] -> [F, 20, 20, 2].

    Args:
        lead: repeats of the first frame before it, 0 ... 3. Three make the groups of a stream (the first frame alone);
            the others are for training, which has to know every place in a group.
    """
    frames, size = len(fields), FRAMES_PER_LATENT
    tail = -(frames + lead) % size
    padded = torch.cat([fields[:1].expand(lead, -1, -1, -1), fields, fields[-1:].expand(tail, -1, -1, -1)])
    cells = codec.shape.encode(codec.shape_cells(rearrange(padded, "(t f) y x d -> t f y x d", f=size)))
    # The texture has no part in the shape: its channels stay empty.
    z = F.pad(rearrange(cells, "t y x k -> t k y x"), (0, 0, 0, 0, 0, codec.config.texture_channels))
    return codec.decode_fields(codec.pose_free(z)).flatten(0, 1)[lead : lead + frames]


class SyncScorer:
    """Scores lips and speech with a trained network; no gradients.

    Args:
        encoder: the speech encoder whose rows the network was trained on.
    """

    def __init__(self, network: PocketSyncNet, codec: PocketCodec, encoder: SpeechEncoder) -> None:
        heard, rows = network.config.speech_channels, encoder.config.width
        if heard != rows:
            raise ValueError(f"this SyncNet hears {heard} channels, the speech encoder gives {rows}")
        self.network, self.codec, self.encoder = network.eval(), codec, encoder

    @torch.no_grad()
    def hear(self, samples: Tensor, frames: int) -> Tensor:
        """Speech [B, samples] in -1..1 at 16 kHz -> the features of that many pixel frames, [B, frames, channels]."""
        # Rows look ahead: what follows the last frame is heard where it is known.
        wanted = frames * SAMPLES_PER_ROW + self.encoder.config.lookahead_samples
        rows: Tensor = self.encoder(F.pad(samples, (0, max(0, wanted - samples.shape[1])))[:, :wanted])
        return rows[:, :frames]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pose-free latents [B, K, T, g, g] in whole groups -> fields [B, 4 T, 20, 20, 2]."""
        fields = self.codec.decode_fields(rearrange(latents, "b k t h w -> (b t) k h w"))
        return rearrange(fields, "(b t) f y x d -> b (t f) y x d", b=len(latents))

    @torch.no_grad()
    def scores(self, fields: Tensor, speech: Tensor) -> SyncScore:
        """Pose-free fields [B, F, 20, 20, 2] and features [B, F, channels] -> one score a row.

        Reward variant: only overlapping positions count. The evaluation variant's zero vectors lie nearer to unit
        vectors than wrong speech does, which would bend the curve's ends.

        Raises:
            ValueError: fewer than 20 frames, or fields and speech of unequal length.
        """
        if fields.shape[:2] != speech.shape[:2]:
            raise ValueError(f"fields {list(fields.shape[:2])} and speech {list(speech.shape[:2])} differ in length")
        lips, heard = self.network(fields, speech)
        each = [reward_score(a, b) for a, b in zip(lips, heard, strict=True)]
        return SyncScore(*(torch.stack(values) for values in zip(*each, strict=True)))

    def confidence(self, fields: Tensor, speech: Tensor) -> Tensor:
        """Sync-C of each row, [B]: fields [B, F, 20, 20, 2], and features [B, F, channels] or samples [B, samples]."""
        if speech.ndim == 2:
            speech = self.hear(speech, fields.shape[1])
        return self.scores(fields, speech).confidence

    def score(self, fields: Tensor, samples: Tensor) -> SyncScore:
        """Score of one clip: pose-free fields [F, 20, 20, 2] and its speech [samples]."""
        found = self.scores(fields[None], self.hear(samples[None], len(fields)))
        return SyncScore(*(value[0] for value in found))
