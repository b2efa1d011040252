"""The gate of the pocket SyncNet, and its figures of one video.

The gate asks, of people that were never trained on: does matched speech lie nearer than shifted speech (AUC, of clips
and of segments of 25 frames), is the curve's minimum at 0, how large is Sync-C of pairs that do not belong together
(other people's speech, and the time-reversed picture: its null distribution), and does it fall when a mouth's movement
is damaged.

    $ lipstream evaluate syncnet talk.mp4                    # Sync-C, Sync-D, offset
    $ lipstream evaluate syncnet --gate runs/samples/grid    # held-out clips of sample folders
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.canvas import FaceCanvas
from lipstream.faces.track import FaceTracker
from lipstream.media.reader import VideoReader
from lipstream.media.speech import load_speech
from lipstream.media.timeline import GridSampler
from lipstream.models.syncnet import LIP_FRAMES, MAX_SHIFT, SyncScore, reward_score
from lipstream.models.syncnet_pocket import SyncScorer, pose_free_fields
from lipstream.training.codec import LEFT_OUT
from lipstream.training.samples import Clip

SEGMENT_FRAMES = 25
SHORTEST_FRAMES = MAX_SHIFT + LIP_FRAMES  # of one score
TRAINED_SYNTHETIC = "_s0001_"  # `lipstream data synthesize --seed 1`, which the shipped network was trained on
WRONG_CLIPS = 10
NEAREST_WRONG = 2  # frames; one frame off sounds and looks alike


@dataclass(frozen=True)
class VideoSync:
    """Figures of one video; offset in pixel frames at 25 fps, positive if the speech is late."""

    confidence: float
    distance: float
    offset: int
    frames: int


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and 95 % quantile of Sync-C over clips."""

    mean: float
    sd: float
    q95: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None where there is nothing to summarise."""
        if not values:
            return None
        return cls(float(np.mean(values)), float(np.std(values)), float(np.quantile(values, 0.95)))


@dataclass(frozen=True)
class GateRow:
    """The gate's figures of a group of clips.

    Attributes:
        auc_clip, auc_segment: odds that matched speech is nearer than speech 2 ... 15 frames off.
        offset, offset_segment: median absolute offset of the curve's minimum, frames.
        within_one: share of clips whose minimum is at most one frame off.
        distance: mean Sync-D of matched pairs.
        matched, other, reversed: Sync-C of matched pairs, of other clips' speech, of the time-reversed picture.
        damaged: mean Sync-C under each of ``DAMAGES``.
    """

    clips: int
    auc_clip: float
    auc_segment: float
    offset: float
    offset_segment: float
    within_one: float
    distance: float
    matched: Spread | None
    other: Spread | None
    reversed: Spread | None
    damaged: dict[str, float]


def score_video(scorer: SyncScorer, video: Path) -> VideoSync:
    """Track a video of any frame rate on the 25 fps grid and score it against its own speech.

    Raises:
        ValueError: no speech, no face, or fewer than 20 frames.
    """
    reader = VideoReader(video)
    tracker, canvas = FaceTracker(), FaceCanvas()
    sampler: GridSampler[NDArray[np.float32] | None] = GridSampler(reader.time_base)
    found: list[NDArray[np.float32] | None] = []
    for frame in reader:
        face = tracker.step(frame.image)
        field = None if face is None else canvas.field(face.landmarks, canvas.align(face.landmarks))
        found += sampler.push(frame.pts, field)
    found += sampler.finish()
    seen = [f for f in found if f is not None]
    if not seen:
        raise ValueError(f"{video}: shows no face in any of its {len(found)} frames; use a video of a talking person")
    if len(found) < SHORTEST_FRAMES:
        raise ValueError(
            f"{video}: {len(found)} frames at 25 fps are too few for a score, which takes {SHORTEST_FRAMES}"
        )
    last, fields = seen[0], []
    for f in found:  # where no face was found the last one stays, as in training samples
        last = last if f is None else f
        fields.append(last)
    samples = torch.from_numpy(load_speech(video))
    score = scorer.score(pose_free_fields(scorer.codec, torch.from_numpy(np.stack(fields))), samples)
    return VideoSync(score.confidence.item(), score.distance.item(), int(score.offset), len(fields))


# --- The gate ---------------------------------------------------------------------------------------------------


def damages(fields: Tensor) -> dict[str, Tensor]:
    """Fields [F, 20, 20, 2] damaged more and more: weaker movement, noise of the main movement, white noise, blur."""
    mean = fields.mean(0)
    noise = torch.randn(fields.shape, generator=torch.Generator().manual_seed(0))
    wave = torch.randn(len(fields), 1, 1, 1, generator=torch.Generator().manual_seed(1))
    pattern = (fields - mean).flatten(1)
    main = torch.linalg.svd(pattern, full_matrices=False).Vh[0].view_as(mean) * pattern.norm() / len(fields) ** 0.5
    out = {"none": fields}
    out |= {f"scale {s}": mean + s * (fields - mean) for s in (0.5, 0.25, 0.1, 0.0)}
    out |= {f"jaw noise {s}": fields + s * wave * main for s in (0.25, 0.5, 1.0, 2.0)}
    out |= {f"noise {s} px": fields + s * noise for s in (0.5, 1.0, 2.0)}
    for width in (3, 7, 15):
        padded = torch.cat(
            [fields[:1].expand(width // 2, -1, -1, -1), fields, fields[-1:].expand(width // 2, -1, -1, -1)]
        )
        out[f"blur {width}"] = padded.unfold(0, width, 1).mean(-1)
    return out


class _Vectors:
    """Lip and speech vectors of one clip, and what has to be measured with its fields again."""

    def __init__(self, scorer: SyncScorer, clip: Clip) -> None:
        self.fields = pose_free_fields(scorer.codec, torch.from_numpy(clip.fields.astype(np.float32)))
        samples = torch.from_numpy(clip.speech.astype(np.float32) / 32768)
        self.features = scorer.hear(samples[None], len(clip))
        self.clip, self.network = clip, scorer.network
        self.lips = self.of(self.fields)
        self.speech = self.network.embed_speech(self.features)[0]

    def of(self, fields: Tensor) -> Tensor:
        """[n, d] of other fields [F, 20, 20, 2]."""
        return self.network.embed_lips(fields[None])[0]


def _nearness(v: _Vectors, width: int | None) -> tuple[list[float], list[float]]:
    """Minus the mean distance of matched and of shifted vectors, over whole clips or over pieces of ``width``."""
    matched: list[float] = []
    shifted: list[float] = []
    distances = torch.cdist(v.lips, v.speech)
    for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
        if 0 < abs(shift) < NEAREST_WRONG:
            continue
        line = -torch.diagonal(distances, shift)
        if width is None:
            means = line.mean()[None]
        elif len(line) < width:
            continue
        else:
            means = line.unfold(0, width, width // 2).mean(1)
        (matched if shift == 0 else shifted).extend(means.tolist())
    return matched, shifted


def auc(matched: Sequence[float], wrong: Sequence[float]) -> float:
    """Odds that a matched value is larger than a wrong one (a tie counts half)."""
    a, b = np.asarray(matched), np.sort(np.asarray(wrong))
    below, up_to = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
    return float((below + up_to).mean() / (2 * len(b)))


@torch.no_grad()
def measure_group(scorer: SyncScorer, clips: Sequence[Clip], others: Sequence[Clip]) -> GateRow:
    """The gate's figures of clips, with the speech of ``others`` (the same clip is left out) as the wrong one.

    Raises:
        ValueError: no clip has 20 frames.
    """
    every = [_Vectors(scorer, c) for c in clips if len(c) >= SHORTEST_FRAMES]
    if not every:
        raise ValueError(f"no clip of the gate has {SHORTEST_FRAMES} frames")
    strange = [_Vectors(scorer, c) for c in others if len(c) >= SHORTEST_FRAMES]
    whole = [_nearness(v, None) for v in every]
    width = SEGMENT_FRAMES - LIP_FRAMES + 1
    pieces = [_nearness(v, width) for v in every]
    own = [reward_score(v.lips, v.speech) for v in every]
    parts = [
        abs(int(reward_score(v.lips[s : s + width], v.speech[s : s + width]).offset))
        for v in every
        for s in range(0, len(v.lips) - width + 1, width // 2)
    ]
    wrong = [
        reward_score(v.lips, w.speech).confidence.item() for v in every for w in strange if w.clip.name != v.clip.name
    ]
    turned = [reward_score(v.of(v.fields.flip(0)), v.speech).confidence.item() for v in every]
    off = np.abs([int(score.offset) for score in own])
    return GateRow(
        clips=len(every),
        auc_clip=_auc_of(whole),
        auc_segment=_auc_of(pieces),
        offset=float(np.median(off)),
        offset_segment=float(np.median(parts)),
        within_one=float((off <= 1).mean()),
        distance=float(np.mean([score.distance.item() for score in own])),
        matched=Spread.of([score.confidence.item() for score in own]),
        other=Spread.of(wrong),
        reversed=Spread.of(turned),
        damaged=_damaged(every),
    )


def _auc_of(pairs: Sequence[tuple[list[float], list[float]]]) -> float:
    return auc([x for m, _ in pairs for x in m], [x for _, w in pairs for x in w])


def _damaged(every: Sequence[_Vectors]) -> dict[str, float]:
    """Mean confidence *at shift 0* (median of the curve minus its middle): it also falls with lag."""
    found: dict[str, list[float]] = {}
    for v in every:
        for name, fields in damages(v.fields).items():
            found.setdefault(name, []).append(_at_zero(reward_score(v.of(fields), v.speech)))
        for late in (1, 2, 4, 8):
            if len(v.speech) - late > MAX_SHIFT:
                found.setdefault(f"lag {late}", []).append(_at_zero(reward_score(v.lips[:-late], v.speech[late:])))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _at_zero(score: SyncScore) -> float:
    return (score.curve.median() - score.curve[MAX_SHIFT]).item()


def held_out(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Clips that were never trained on, by speaker: all but GRID s1's training clips, and synthetic seed 1.

    Raises:
        ValueError: there are none.
    """
    trained = [c for c in clips if c.speaker == "s1" and c.name not in LEFT_OUT]
    trained += [c for c in clips if TRAINED_SYNTHETIC in c.name]
    names = {c.name for c in trained}
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        if clip.name not in names:
            groups.setdefault(clip.speaker, []).append(clip)
    if not groups:
        raise ValueError(f"all {len(clips)} samples were trained on: the gate needs people that were not")
    return groups


def run_gate(scorer: SyncScorer, clips: Sequence[Clip]) -> dict[str, GateRow]:
    """The gate's figures by speaker; wrong speech is other speakers', or other clips' where there is one speaker."""
    groups = held_out(clips)
    rows = {}
    for speaker, own in groups.items():
        others = [c for name, group in groups.items() if name != speaker or len(groups) == 1 for c in group]
        rows[speaker] = measure_group(scorer, own, others[:: max(1, len(others) // WRONG_CLIPS)])
    return rows


def gate_markdown(rows: dict[str, GateRow]) -> str:
    """Two tables: the gate, and what damage does to Sync-C at no shift."""
    lines = [
        "| speaker | clips | AUC clip | AUC 25 frames | offset, median | of 25 frames | within 1 | Sync-D |"
        " Sync-C | others' speech (95 %) | reversed (95 %) |",
        "|---|" + "---|" * 10,
    ]
    for name, r in rows.items():
        spreads = [_cell(r.matched), _cell(r.other, q95=True), _cell(r.reversed, q95=True)]
        lines.append(
            f"| {name} | {r.clips} | {r.auc_clip:.3f} | {r.auc_segment:.3f} | {r.offset:.1f} | {r.offset_segment:.1f} |"
            f" {r.within_one:.2f} | {r.distance:.3f} | {' | '.join(spreads)} |"
        )
    names = list(next(iter(rows.values())).damaged)
    lines += ["", f"| damage | {' | '.join(rows)} |", "|---|" + "---|" * len(rows)]
    for damage in names:
        cells = [f"{r.damaged[damage]:.3f}" if damage in r.damaged else "-" for r in rows.values()]
        lines.append(f"| {damage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(spread: Spread | None, q95: bool = False) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f} +- {spread.sd:.3f}" + (f" ({spread.q95:.3f})" if q95 else "")
