"""SyncNet v2 (Chung and Zisserman 2016): how well lips and speech agree, as the paper's reward and metric use it.

Two towers turn five pictures and 200 ms of speech into vectors that lie close if they belong together. The network
has the names of `syncnet_v2.model`. Two scorers compare a clip's vectors (spec section 7, section 11 correction 7):

* `reward_score`: distillation reward, Lip Forcing stage 2. Only overlapping positions count.
* `evaluation_score`: Sync-C / Sync-D. The speech is surrounded by zero vectors, which enter the means.

Their figures are not comparable with each other; the sign of their offsets is opposite.

    network = load_syncnet(path)                              # lipstream.checkpoints.encoders
    lips = network.embed_lips(prepare_frames(frames)[None])[0]
    speech = network.embed_speech(audio_windows(mfcc(samples)))
    reward_score(lips, speech).confidence                     # the paper's sync-c, higher is better

Shapes: b batch, f pixel frames at 25 fps, n vectors (one per pixel frame), m MFCC frames (100 Hz), d vector length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.models.mfcc import mfcc_frames

LIP_FRAMES = 5
AUDIO_FRAMES = 20  # MFCC frames, the 200 ms of five pictures
AUDIO_FRAMES_PER_PICTURE = 4
SAMPLES_PER_PICTURE = 640
INPUT_PX = 224
MAX_SHIFT = 15  # pictures
DISTANCE_EPS = 1e-6
BLOCK_VECTORS = 32  # lip vectors made at once: the first layer needs 4.6 MB for each


@dataclass(frozen=True, kw_only=True)
class SyncNetConfig:
    """Widths of the two towers, from input to output; kernels and strides are fixed by the architecture."""

    lip_channels: tuple[int, int, int, int, int, int] = (96, 256, 256, 256, 256, 512)
    audio_channels: tuple[int, int, int, int, int, int] = (64, 192, 384, 256, 256, 512)
    hidden: int = 512
    vector: int = 1024


FLAVOURS: dict[str, SyncNetConfig] = {
    "test": SyncNetConfig(lip_channels=(4, 8, 8, 8, 8, 16), audio_channels=(8, 8, 16, 8, 8, 16), hidden=16, vector=24),
    "official": SyncNetConfig(),
}


class SyncNet(nn.Module):
    """Both towers. Use it in evaluation mode: its batch norms then hold fixed statistics."""

    def __init__(self, config: SyncNetConfig) -> None:
        super().__init__()
        self.config = config
        self.netcnnaud = _audio_tower(config.audio_channels)
        self.netfcaud = _head(config.audio_channels[-1], config.hidden, config.vector)
        self.netcnnlip = _lip_tower(config.lip_channels)
        self.netfclip = _head(config.lip_channels[-1], config.hidden, config.vector)

    def forward(self, pictures: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [b, 3, 5, 224, 224] and MFCC windows [b, 1, 13, 20] -> vectors [b, d] each."""
        return self.embed_lips(pictures)[:, 0], self.embed_speech(windows)

    def embed_lips(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, f, 224, 224] from `prepare_frames` -> [b, f - 4, d], vector i from pictures i ... i + 4.

        Only the first layer looks across time, so a clip goes through in long pieces and no picture five times.
        """
        if pictures.ndim != 5 or pictures.shape[2] < LIP_FRAMES or pictures.shape[3:] != (INPUT_PX, INPUT_PX):
            raise ValueError(f"pictures must be [b, 3, at least 5, 224, 224], got {list(pictures.shape)}")
        count, batch = pictures.shape[2] - LIP_FRAMES + 1, len(pictures)
        pieces = []
        for start in range(0, count, BLOCK_VECTORS):
            piece = pictures[:, :, start : min(start + BLOCK_VECTORS, count) + LIP_FRAMES - 1]
            hidden = rearrange(self.netcnnlip(piece), "b c n 1 1 -> (b n) c")
            pieces.append(rearrange(self.netfclip(hidden), "(b n) d -> b n d", b=batch))
        return torch.cat(pieces, dim=1)

    def embed_speech(self, windows: Tensor) -> Tensor:
        """MFCC windows [n, 1, 13, 20] from `audio_windows` -> [n, d]."""
        out: Tensor = self.netfcaud(self.netcnnaud(windows).flatten(1))
        return out


def _lip_tower(c: tuple[int, ...]) -> nn.Sequential:
    """[b, 3, f, 224, 224] -> [b, c, f - 4, 1, 1]; the positions in the sequence are the names in the file."""
    return nn.Sequential(
        nn.Conv3d(3, c[0], (5, 7, 7), stride=(1, 2, 2)), nn.BatchNorm3d(c[0]), nn.ReLU(),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
        nn.Conv3d(c[0], c[1], (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1)), nn.BatchNorm3d(c[1]), nn.ReLU(),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        *(
            layer
            for before, after in pairwise(c[1:5])
            for layer in (nn.Conv3d(before, after, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(after), nn.ReLU())
        ),
        nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
        nn.Conv3d(c[4], c[5], (1, 6, 6)), nn.BatchNorm3d(c[5]), nn.ReLU(),
    )  # fmt: skip


def _audio_tower(c: tuple[int, ...]) -> nn.Sequential:
    """[n, 1, 13, 20] -> [n, c, 1, 1]; the first pooling does nothing but count in the names."""
    return nn.Sequential(
        nn.Conv2d(1, c[0], 3, padding=1), nn.BatchNorm2d(c[0]), nn.ReLU(), nn.MaxPool2d(1),
        nn.Conv2d(c[0], c[1], 3, padding=1), nn.BatchNorm2d(c[1]), nn.ReLU(), nn.MaxPool2d(3, stride=(1, 2)),
        *(
            layer
            for before, after in pairwise(c[1:5])
            for layer in (nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
        ),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(c[4], c[5], (5, 4)), nn.BatchNorm2d(c[5]), nn.ReLU(),
    )  # fmt: skip


def _head(channels: int, hidden: int, vector: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, vector))


def prepare_frames(frames: Tensor) -> Tensor:
    """RGB pictures in 0..255 [f, 3, h, w] -> BGR [3, f, 224, 224] float32 in 0..255, the whole picture, no crop.

    Bilinear without antialiasing, as the reward has it; the public evaluation resizes with OpenCV after a JPEG.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise ValueError(f"frames must be [f, 3, h, w], got {list(frames.shape)}")
    resized = F.interpolate(frames.float(), size=(INPUT_PX, INPUT_PX), mode="bilinear", align_corners=False)
    return rearrange(resized.flip(1), "f c h w -> c f h w")


def lip_window_indices(pixel_frames: int) -> Tensor:
    """Pictures behind each lip vector: [f - 4, 5]."""
    return torch.arange(pixel_frames).unfold(0, LIP_FRAMES, 1)


def audio_window_indices(frames: int) -> Tensor:
    """MFCC frames behind each speech vector: [n, 20]; window i begins with picture i."""
    if frames < AUDIO_FRAMES:
        raise ValueError(f"SyncNet needs at least {AUDIO_FRAMES} MFCC frames (3440 samples), got {frames}")
    return torch.arange(frames).unfold(0, AUDIO_FRAMES, AUDIO_FRAMES_PER_PICTURE)


def audio_windows(cepstra: Tensor) -> Tensor:
    """MFCC [13, m] -> windows [n, 1, 13, 20]."""
    return rearrange(cepstra[:, audio_window_indices(cepstra.shape[1])], "k n m -> n 1 k m")


def reward_windows(pixel_frames: int, samples: int) -> int:
    """Vectors that the reward compares: as many as both lips and speech have."""
    return min(pixel_frames - LIP_FRAMES + 1, _audio_window_count(samples))


def evaluation_windows(pixel_frames: int, samples: int) -> int:
    """Vectors that the public evaluation compares, one lip vector fewer than the reward.

    Raises:
        ValueError: five frames or fewer, for which it has no score.
    """
    frames = min(pixel_frames, samples // SAMPLES_PER_PICTURE)
    if frames <= LIP_FRAMES:
        raise ValueError(f"the evaluation needs more than {LIP_FRAMES} frames of picture and speech, got {frames}")
    return min(frames - LIP_FRAMES, _audio_window_count(samples))


def _audio_window_count(samples: int) -> int:
    return max(0, (mfcc_frames(samples) - AUDIO_FRAMES) // AUDIO_FRAMES_PER_PICTURE + 1)


class SyncScore(NamedTuple):
    """How well lips and speech agree.

    Attributes:
        confidence: [] median minus minimum of the curve (Sync-C).
        distance: [] minimum of the curve (Sync-D).
        offset: [] int64, where the minimum is. Reward: positive if the speech is late, counted in pictures.
            Evaluation: the same with the opposite sign.
        curve: [31] mean distance for each shift of the speech, -15 ... 15.
    """

    confidence: Tensor
    distance: Tensor
    offset: Tensor
    curve: Tensor


def reward_score(lips: Tensor, speech: Tensor) -> SyncScore:
    """Score of lip vectors [n, d] and speech vectors [n', d]; what one has more than the other is ignored.

    For shift s lip vector i is compared with speech vector i + s, where both exist.

    Raises:
        ValueError: fewer than 16 vectors, too few for a shift of 15.
    """
    _check_vectors(lips, speech)
    count = min(len(lips), len(speech))
    if count <= MAX_SHIFT:
        raise ValueError(f"the reward needs at least {MAX_SHIFT + 1} vectors of lips and speech, got {count}")
    lips, speech = lips[:count], speech[:count]
    curve = []
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        first, last = max(0, -shift), min(count, count - shift)
        curve.append(_distance(lips[first:last], speech[first + shift : last + shift]).mean())
    return _score(torch.stack(curve), sign=1)


def evaluation_score(lips: Tensor, speech: Tensor) -> SyncScore:
    """Sync-C, Sync-D and offset of lip vectors [n, d] and speech vectors [n', d], as the public evaluation has them."""
    return _score(evaluation_distances(lips, speech).mean(0), sign=-1)


def evaluation_distances(lips: Tensor, speech: Tensor) -> Tensor:
    """[n, 31] distance of lip vector i from speech vector i + s, a zero vector where the speech has none."""
    _check_vectors(lips, speech)
    count = min(len(lips), len(speech))
    padded = F.pad(speech[:count], (0, 0, MAX_SHIFT, MAX_SHIFT))
    around = padded.unfold(0, 2 * MAX_SHIFT + 1, 1)  # [n, d, 31]
    return _distance(lips[:count, None], rearrange(around, "n d s -> n s d"))


def _score(curve: Tensor, sign: int) -> SyncScore:
    distance, place = curve.min(0)
    confidence = curve.median() - distance  # of 31 values the 16th
    return SyncScore(confidence, distance, sign * (place - MAX_SHIFT), curve)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance over the last axis; the epsilon in every component is part of the published figures."""
    distance: Tensor = torch.linalg.vector_norm(a - b + DISTANCE_EPS, dim=-1)
    return distance


def _check_vectors(lips: Tensor, speech: Tensor) -> None:
    if lips.ndim != 2 or speech.ndim != 2 or lips.shape[1] != speech.shape[1] or not len(lips) or not len(speech):
        raise ValueError(f"vectors must be [n, d] with one d, got {list(lips.shape)} and {list(speech.shape)}")
