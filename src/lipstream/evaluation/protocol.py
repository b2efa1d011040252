"""Run the reversed protocol over a set of clips and report it: rows, means, JSON and a Markdown table.

>>> summary = run_set(LipSync.from_pretrained("pocket"), clips, wrong_audio=True)
>>> Path("sync.json").write_text(as_json(summary)); print(as_markdown(summary))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lipstream.evaluation.closure import Closure
from lipstream.evaluation.correlation import crossed
from lipstream.evaluation.reversed import ReversedResult, Synchroniser, mean, score_reversed, wrong_partners


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """Means of a set of clips; `failed` maps a clip's name to the one line that says why it has no row.

    Attributes:
        r, best_r, amplitude, sharpness: means of the results' figures.
        lag_pixel_frames: median lag of the correlation's peak.
        nothing_r, oracle_r, oracle_amplitude: means of the control rows.
        wrong_audio_r: mean of the wrong-audio row, NaN if it was not made.
        crossed_r: results against other clips' truths.
        beats_wrong_audio: clips whose own r is above their wrong-audio r, of those that have both.
        frames_off, lost_frames: sums over clips of wrong counts and of frames without a face.
    """

    rows: tuple[ReversedResult, ...]
    failed: dict[str, str]
    r: float
    best_r: float
    lag_pixel_frames: float
    amplitude: float
    sharpness: float
    nothing_r: float
    oracle_r: float
    oracle_amplitude: float
    wrong_audio_r: float
    crossed_r: float
    beats_wrong_audio: int
    frames_off: int
    lost_frames: int
    closure: Closure
    nothing_closure: Closure


def summarise(rows: Sequence[ReversedResult], failed: dict[str, str] | None = None) -> SetSummary:
    """Means over rows."""
    lags = [row.own.lag_pixel_frames for row in rows if row.own.lag_pixel_frames is not None]
    return SetSummary(
        rows=tuple(rows),
        failed=dict(failed or {}),
        r=mean([row.own.r for row in rows]),
        best_r=mean([row.own.best_r for row in rows]),
        lag_pixel_frames=float(np.median(lags)) if lags else math.nan,
        amplitude=mean([row.own.amplitude for row in rows]),
        sharpness=mean([row.sharpness for row in rows]),
        nothing_r=mean([row.nothing.r for row in rows]),
        oracle_r=mean([row.oracle.r for row in rows]),
        oracle_amplitude=mean([row.oracle.amplitude for row in rows]),
        wrong_audio_r=mean([row.wrong_audio_r for row in rows]),
        crossed_r=crossed([row.measured for row in rows], [row.truth for row in rows]),
        beats_wrong_audio=sum(row.wrong_audio_r is not None and row.own.r > row.wrong_audio_r for row in rows),
        frames_off=sum(abs(row.frames_off) for row in rows),
        lost_frames=sum(row.lost_frames for row in rows),
        closure=sum((row.closure for row in rows if row.closure), Closure()),
        nothing_closure=sum((row.nothing_closure for row in rows if row.nothing_closure), Closure()),
    )


def run_set(
    sync: Synchroniser,
    clips: Sequence[Path],
    *,
    wrong_audio: bool = False,
    progress: Callable[[str, ReversedResult | None], None] | None = None,
) -> SetSummary:
    """Score every clip; one that fails is reported in the summary and does not stop the set.

    Args:
        sync: what is measured.
        clips: 25 fps videos with their own speech.
        wrong_audio: also drive each clip with the next one's speech (twice the work).
        progress: called after each clip with its name and its row, None where it failed.
    """
    rows: list[ReversedResult] = []
    failed: dict[str, str] = {}
    partners = wrong_partners(clips) if wrong_audio else [None] * len(clips)
    for clip, partner in zip(clips, partners, strict=True):
        row = None
        try:
            row = score_reversed(sync, clip, wrong_audio=partner)
            rows.append(row)
        except (ValueError, OSError) as error:
            failed[str(clip)] = str(error)
        if progress is not None:
            progress(clip.name, row)
    return summarise(rows, failed)


def plain(value: Any, digits: int | None = 4) -> Any:
    """Numbers, lists and dictionaries of anything that a summary holds; NaN becomes None, as JSON wants.

    digits: decimals that are kept; None keeps all.
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits)
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return None
        return float(value) if digits is None else round(float(value), digits)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value if value is None or isinstance(value, str) else str(value)


def as_json(summary: SetSummary) -> str:
    """The whole summary, curves included."""
    shut = summary.closure
    shares = {"share": shut.share, "real": shut.share_real, "nothing": summary.nothing_closure.share}
    shares |= {"elsewhere": shut.elsewhere, "elsewhere_real": shut.elsewhere_real}
    return json.dumps(plain(asdict(summary) | {"closure_shares": shares}), indent=1)


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def as_markdown(summary: SetSummary) -> str:
    """A table of clips with the mean last, and a line each on closures, frames and failures."""
    head = "| clip | r | best r | lag | amplitude | sharpness | do nothing | wrong audio | real video |"
    lines = [head, "|" + " --- |" * 9]
    for row in summary.rows:
        own = (row.own.r, row.own.best_r, row.own.lag_pixel_frames, row.own.amplitude, row.sharpness)
        controls = (row.nothing.r, row.wrong_audio_r, row.oracle.r)
        lines.append(f"| {row.name} | " + " | ".join(map(_cell, (*own, *controls))) + " |")
    means = (summary.r, summary.best_r, summary.lag_pixel_frames, summary.amplitude, summary.sharpness)
    baselines = (summary.nothing_r, summary.wrong_audio_r, summary.oracle_r)
    lines.append(f"| **mean of {len(summary.rows)}** | " + " | ".join(map(_cell, (*means, *baselines))) + " |")
    lines.append("")
    lines.append(f"Against other clips' truths: r {_cell(summary.crossed_r)}. ")
    if summary.wrong_audio_r == summary.wrong_audio_r:
        lines[-1] += f"Own speech beats wrong speech in {summary.beats_wrong_audio} of {len(summary.rows)} clips. "
    lines[-1] += f"Frames off: {summary.frames_off}. Frames without a face in the results: {summary.lost_frames}."
    shut = summary.closure
    if shut.events:
        lines.append(
            f"p, b, m close the lips in {shut.share:.0%} of {shut.events} (real video {shut.share_real:.0%}, "
            f"do nothing {summary.nothing_closure.share:.0%}); open vowels are shut in {shut.elsewhere:.0%} "
            f"(real video {shut.elsewhere_real:.0%})."
        )
    lines += [f"FAILED {name}: {reason}" for name, reason in summary.failed.items()]
    return "\n".join(lines)
