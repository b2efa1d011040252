"""SyncNet scorers as judges of training data: the official network where its file is given, or the pocket one.

judge = open_sync("official", Path("syncnet_v2.model"))
judge.judge(segment).late_frames
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.checkpoints.encoders import load_syncnet
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

PAPER_MINIMUM = 3.0  # Lip Forcing, training data: clips below it are removed
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
    """The pocket SyncNet (`models.syncnet_pocket`) on shape fields; its scale is its own."""

    name, max_shift = "pocket SyncNet", MAX_SHIFT

    def __init__(self, scorer: Any, pose_free: Callable[..., Tensor], minimum: float) -> None:
        self.scorer, self.pose_free, self.minimum, self._canvas = scorer, pose_free, minimum, FaceCanvas()

    def judge(self, segment: SegmentView) -> SyncMeasure:
        """Score one segment."""
        fields = torch.from_numpy(np.stack([self._field(face) for face in segment.landmarks]))
        with torch.inference_mode():
            score = self.scorer.score(self.pose_free(self.scorer.codec, fields), torch.from_numpy(segment.samples))
        return SyncMeasure(
            confidence=float(score.confidence), distance=float(score.distance), late_frames=int(score.offset)
        )

    def _field(self, landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._canvas.field(landmarks, self._canvas.align(landmarks))


def kind_of(file: Path | None) -> str:
    """The kind of scorer that a file (the official network) or a model folder (the pocket one) holds."""
    return "none" if file is None else "pocket" if file.is_dir() else "official"


def open_sync(kind: str, file: Path | None = None, minimum: float | None = None) -> SyncJudge | None:
    """The judge of a kind: "official" (its file), "pocket" (a model folder), or "none".

    Raises:
        ValueError: an unknown kind, or missing files.
    """
    if kind == "none":
        return None
    if file is None:
        raise ValueError(f"the {kind} SyncNet needs its file: give --syncnet FILE")
    if kind == "official":
        network = load_syncnet(file)
        return OfficialSync(network) if minimum is None else OfficialSync(network, minimum)
    if kind == "pocket":
        if minimum is None:
            raise ValueError("the pocket SyncNet has its own scale: say what to keep with --min-sync")
        try:
            load = import_module("lipstream.checkpoints.networks").load_sync_scorer
            pose_free = import_module("lipstream.models.syncnet_pocket").pose_free_fields
        except (ImportError, AttributeError):
            raise ValueError("this version of lipstream has no pocket SyncNet; give syncnet_v2.model") from None
        return PocketSync(load(file), pose_free, minimum)
    raise ValueError(f"unknown sync scorer '{kind}'; use official, pocket or none")
