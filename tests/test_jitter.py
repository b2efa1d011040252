"""The measure of trembling: nothing for what moves evenly, more for what trembles; a run that is a copy scores 1."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lipstream.evaluation import jitter
from lipstream.evaluation.jitter import measure_jitter, trembling


def test_even_movement_is_no_trembling_and_axes_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    places = np.arange(50.0)[:, None, None] * np.array([2.0, -1.0]) + rng.normal(size=(1, 9, 2))
    assert max(*trembling(places)[0], *trembling(places)[1]) < 1e-9
    places[..., 1] += 0.5 * rng.normal(size=(50, 9))
    (sideways, vertical), (_, typical) = trembling(places)
    assert sideways < 1e-9 and vertical == pytest.approx(0.5 * np.sqrt(1.5), rel=0.1) and 0 < typical < vertical


def test_frames_around_a_lost_face_do_not_count() -> None:
    places = np.zeros((20, 4, 2))
    places[10] = np.nan
    assert trembling(places) == ((0.0, 0.0), (0.0, 0.0))
    with pytest.raises(ValueError, match="nothing to measure"):
        trembling(np.full((5, 4, 2), np.nan))


def test_a_copy_scores_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"picture and sound")
    heard = []

    def copy(video: Path, audio: Path, output: Path) -> None:
        heard.append(audio)
        shutil.copy(video, output)

    def places(video: Path) -> np.ndarray:
        return np.random.default_rng(len(Path(video).read_bytes())).normal(size=(30, 5, 2))

    monkeypatch.setattr(jitter, "mouth_places", places)
    found = measure_jitter(copy, clip)
    assert heard == [clip] and found.name == "clip"
    assert found.ratio == found.typical_ratio == (pytest.approx(1), pytest.approx(1))
