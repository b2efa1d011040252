"""SyncNet scorers as judges of training data: the official network where its file is given, or the pocket one.

judge = open_sync("syncnet_v2.model")       # or "pocket"
judge.judge(segment).late_frames
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.checkpoints.encoders import load_syncnet
from lipstream.checkpoints.networks import load_sync_scorer
from lipstream.data.prepare.filters import SegmentView, SyncJudge, SyncMeasure
from lipstream.faces.canvas import FaceCanvas
from lipstream.models.mfcc import mfcc
from lipstream.models.syncnet import (
    LIP_FRAMES,
    MAX_SHIFT,
    SyncNet,
    audio_windows,
    evaluation_score,
    evaluation_windows,
    prepare_frames,
)
from lipstream.models.syncnet_pocket import SyncScorer, pose_free_fields

PAPER_MINIMUM = 3.0  # Lip Forcing, training data: clips below it are removed
# In 95 of 100 clips of its card (drawn people, GRID), other people's speech stays below .155 to .227.
POCKET_MINIMUM = 0.2
BLOCK_FRAMES = 32


@dataclass(frozen=True)
class OfficialSync:
    """Sync-C of `syncnet_v2.model` on the whole aligned picture, as the paper's reward sees it.

    The public evaluation looks at its own detector's crop instead: its figures may differ (not measured).
    """

    network: SyncNet
    minimum: float = PAPER_MINIMUM
    name: str = "SyncNet"
    max_shift: int = MAX_SHIFT

    def judge(self, segment: SegmentView) -> SyncMeasure:
        """Score one segment."""
        count = evaluation_windows(len(segment.pictures), len(segment.samples))
        with torch.inference_mode():
            lips = self._lips(segment)[:count]
            speech = self.network.embed_speech(audio_windows(mfcc(torch.from_numpy(segment.samples))))[:count]
            score = evaluation_score(lips, speech)
        # The evaluation's offset is positive where the picture is late.
        return SyncMeasure(
            confidence=float(score.confidence), distance=float(score.distance), late_frames=-int(score.offset)
        )

    def _lips(self, segment: SegmentView) -> Tensor:
        """[f - 4, d], in blocks: a segment at once would take 3 GB."""
        vectors = []
        last = len(segment.pictures) - LIP_FRAMES + 1
        for start in range(0, last, BLOCK_FRAMES):
            stop = min(start + BLOCK_FRAMES, last) + LIP_FRAMES - 1
            pictures = torch.from_numpy(np.stack(segment.pictures[start:stop])).permute(0, 3, 1, 2)
            vectors.append(self.network.embed_lips(prepare_frames(pictures)[None])[0])
        return torch.cat(vectors)


class PocketSync:
    """The pocket SyncNet on shape fields; its scale is its own (unit vectors)."""

    name, max_shift = "pocket SyncNet", MAX_SHIFT

    def __init__(self, scorer: SyncScorer, minimum: float = POCKET_MINIMUM) -> None:
        self.scorer, self.minimum, self._canvas = scorer, minimum, FaceCanvas()

    def judge(self, segment: SegmentView) -> SyncMeasure:
        """Score one segment."""
        fields = torch.from_numpy(np.stack([self._field(face) for face in segment.landmarks]))
        score = self.scorer.score(pose_free_fields(self.scorer.codec, fields), torch.from_numpy(segment.samples))
        # The reward's offset is positive where the speech is late.
        return SyncMeasure(
            confidence=float(score.confidence), distance=float(score.distance), late_frames=int(score.offset)
        )

    def _field(self, landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._canvas.field(landmarks, self._canvas.align(landmarks))


def open_sync(file: str | None, minimum: float | None = None) -> SyncJudge | None:
    """The judge of a file (`syncnet_v2.model`), of "pocket" or a folder like it, or None for None.

    Raises:
        ValueError: missing or damaged files.
    """
    if file is None:
        return None
    if file == "pocket" or Path(file).is_dir():
        folder = Path(str(files("lipstream") / "assets" / "pocket")) if file == "pocket" else Path(file)
        if not (folder / "syncnet.safetensors").is_file():
            raise ValueError(f"{folder}: holds no syncnet.safetensors; name syncnet_v2.model or pocket")
        return PocketSync(load_sync_scorer(folder), POCKET_MINIMUM if minimum is None else minimum)
    return OfficialSync(load_syncnet(file), PAPER_MINIMUM if minimum is None else minimum)
