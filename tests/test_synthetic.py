"""The synthetic heads: drawing is deterministic, lips obey the speech, runs resume, errors are one line."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from lipstream.cli import data as data_command
from lipstream.data.synthetic import requirements
from lipstream.data.synthetic.generate import SynthesisConfig, synthesize
from lipstream.data.synthetic.requirements import MissingRequirementError, check_requirements
from lipstream.data.synthetic.visemes import CURVE_RATE, Phoneme, classes_of, curves, visemes_of

SIZE, FRAMES = 48, 3


def _phonemes() -> list[Phoneme]:
    """ "Mama, papa" with a pause of 0.6 s in the middle."""
    symbols = ["_", "m", "ɑ", "m", "ɑ", "_", "p", "æ", "b", "æ", "_"]
    lengths = [0.3, 0.1, 0.2, 0.1, 0.25, 0.6, 0.1, 0.2, 0.1, 0.2, 0.35]
    edges = np.concatenate([[0.0], np.cumsum(lengths)])
    return [Phoneme(symbol=s, start_s=a, end_s=b) for s, a, b in zip(symbols, edges[:-1], edges[1:], strict=True)]


def test_symbols_become_mouth_classes() -> None:
    assert classes_of("m", "ipa") == ("PBM",)
    assert classes_of("dʒ", "ipa") == ("SH",)
    assert classes_of("aɪ", "ipa") == ("AA", "IH")
    assert classes_of("ˈ", "ipa") == ()
    assert classes_of("ow", "arpabet") == ("OW", "UW")
    assert classes_of(", ", "ipa") == ("sil",)


def test_curves_close_lips_on_bilabials_and_in_pauses_and_open_on_vowels() -> None:
    visemes = visemes_of(_phonemes())
    opening = curves(visemes, 2.5)[:, 0]
    for viseme in visemes:
        inside = opening[int(viseme.start_s * CURVE_RATE) : int(viseme.end_s * CURVE_RATE)]
        if viseme.name == "PBM":
            assert inside.min() < 1e-6
        elif viseme.name == "sil":
            assert np.abs(inside[len(inside) // 3 : -len(inside) // 3]).max() < 1e-6
        else:
            assert inside.max() > 0.12


def test_every_foreign_sentence_is_drawn() -> None:
    from lipstream.data.synthetic.sentences import LANGUAGES, sentence

    rng = np.random.default_rng(0)
    assert {"de", "fr", "es", "it", "pt", "hi"} <= set(LANGUAGES)
    assert all(len(sentence(rng, language)) > 5 for language in ("en", *LANGUAGES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hours": 0.0}, "hours"),
        ({"seed": -1}, "seed"),
        ({"size": 47}, "size"),
        ({"clip_seconds": 0.0}, "clip seconds"),
    ],
)
def test_bad_settings_are_named(change: dict[str, float], message: str) -> None:
    settings: dict[str, float] = {"hours": 1.0, "seed": 0, "size": 64, "clip_seconds": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**settings)  # type: ignore[arg-type]


def test_missing_extra_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(requirements, "_MODULES", ("a_module_that_is_not_there",))
    with pytest.raises(MissingRequirementError, match=r"pip install '\.\[synth\]'"):
        check_requirements()
    parser = argparse.ArgumentParser()
    data_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", "synthesize", "--hours", "0.1", "--seed", "1", str(tmp_path / "out")])
    assert data_command.run(args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install" in error
    assert not (tmp_path / "out").exists()


def test_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "_MODULES", ())
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    with pytest.raises(MissingRequirementError, match="apt-get install flite"):
        check_requirements()


def _numba_parts() -> None:
    pytest.importorskip("numba")
    pytest.importorskip("scipy")


def test_teeth_and_landmarks_lie_where_they_should() -> None:
    _numba_parts()
    from lipstream.data.synthetic.basis import load_basis

    basis = load_basis()
    at = {name: basis.vertices[vertex] for name, vertex in basis.landmarks.items()}
    assert at["chin"][1] < at["lip_outer_lower_2"][1] < at["lip_inner_lower_2"][1]
    assert at["lip_inner_upper_2"][1] < at["lip_outer_upper_2"][1] < at["nose_base"][1] < at["nose_tip"][1]
    assert at["mouth_corner_right"][0] < 0 < at["mouth_corner_left"][0]
    assert basis.triangles.max() < len(basis.vertices)


def test_solved_mouth_meets_the_wanted_opening_for_every_identity() -> None:
    _numba_parts()
    from lipstream.data.synthetic.basis import load_basis
    from lipstream.data.synthetic.clip import lip_opening
    from lipstream.data.synthetic.identity import make_identity
    from lipstream.data.synthetic.performance import Mouth, Style

    basis = load_basis()
    style = Style(amplitude=1.0, asymmetry=0.05, smile=0.1, loudness=0.2)
    for seed in range(3):
        identity = make_identity(basis, seed, strands=0.02)
        mouth = Mouth(basis, identity)
        for wanted, close in ((0.0, 1.0), (0.05, 0.0), (0.2, 0.0)):
            value = mouth.units(np.array([wanted, close, 0.2, 0.3, 0.1, 0.2, 0.0, 0.0]), style).astype(np.float32)
            moved = identity.vertices + np.tensordot(value, basis.unit_deltas, 1)
            assert lip_opening(moved, basis) == pytest.approx(wanted, abs=0.006)


def test_tiny_clip_is_deterministic_and_its_truth_is_consistent() -> None:
    _numba_parts()
    from lipstream.data.synthetic.basis import load_basis
    from lipstream.data.synthetic.clip import draw_clip
    from lipstream.data.synthetic.renderer import Renderer
    from lipstream.data.synthetic.voices import Speech

    basis = load_basis()
    samples = np.sin(np.arange(3200) / 9).astype(np.float32)
    speech = Speech(samples=samples, sample_rate=16000, phonemes=_phonemes())
    clips = [
        draw_clip(basis, Renderer(basis, SIZE), speech, seed=seed, frames=FRAMES, said={"voice": "none"})
        for seed in (3, 3, 4)
    ]
    assert clips[0].frames.shape == (FRAMES, SIZE, SIZE, 3)
    np.testing.assert_array_equal(clips[0].frames, clips[1].frames)
    assert np.abs(clips[0].frames.astype(int) - clips[2].frames).mean() > 3
    truth = clips[0].truth
    assert truth["opening"].max() < 0.01  # the speech begins with a pause
    landmarks, box = truth["landmarks"], truth["mouth_box"]
    assert ((landmarks > 0) & (landmarks < SIZE)).all()
    lips = landmarks[:, [name.startswith("lip_") for name in truth["landmark_names"]]]
    assert (lips >= box[:, None, :2] - 1e-3).all() and (lips <= box[:, None, 2:] + 1e-3).all()


def test_run_resumes_without_drawing_again(tmp_path: Path) -> None:
    _numba_parts()
    if importlib.util.find_spec("hibari") is None:
        pytest.skip("hibari-tts is not installed")
    try:
        check_requirements()
    except MissingRequirementError as missing:
        pytest.skip(str(missing))
    config = SynthesisConfig(hours=2 * 0.24 / 3600, seed=7, size=SIZE, clip_seconds=0.24)
    assert [new for _, new in synthesize(config, tmp_path)] == [True, True]
    first = (tmp_path / "s0007_000000.mp4").read_bytes()
    sound = (tmp_path / "s0007_000001.wav").read_bytes()
    (tmp_path / "s0007_000001.json").unlink()  # as if the run had been stopped before this clip was complete
    assert [new for _, new in synthesize(config, tmp_path)] == [False, True]
    assert (tmp_path / "s0007_000000.mp4").read_bytes() == first
    assert (tmp_path / "s0007_000001.wav").read_bytes() == sound
    assert not list(tmp_path.glob("*.part"))
    manifest = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in manifest] == ["s0007_000000", "s0007_000001"]
    assert "MakeHuman" in (tmp_path / "README.md").read_text()
