"""From timed phonemes to eight articulatory curves.

Twenty-four mouth classes with targets and strengths are blended by dominance functions (Cohen and Massaro 1993); then
hard rules are applied: lips meet for p, b and m, the lower lip meets the teeth for f and v, pauses are closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CONTROLS = ("open", "close", "round", "wide", "up", "low", "labiodental", "tongue")
CURVE_RATE = 200  # samples of a curve per second
_OPEN, _CLOSE, _LABIO = 0, 1, 6

# Per class: inner-lip opening in eye distances (outer corners), then closure, rounding, spreading, upper lip raised,
# lower lip lowered, lip-to-teeth contact, tongue tip.
TARGETS: dict[str, tuple[float, ...]] = {
    "sil": (0.0, 1, 0, 0, 0, 0, 0, 0), "PBM": (0.0, 1, 0, 0, 0, 0, 0, 0), "FV": (0.03, 0, 0, 0.05, 0.35, 0, 1, 0),
    "TH": (0.075, 0, 0, 0.1, 0.15, 0.3, 0, 0.9), "TDN": (0.065, 0, 0, 0.12, 0.18, 0.35, 0, 0.45),
    "L": (0.10, 0, 0, 0.08, 0.15, 0.3, 0, 0.7), "SZ": (0.05, 0, 0.05, 0.35, 0.3, 0.45, 0, 0.1),
    "SH": (0.065, 0, 0.65, 0, 0.35, 0.45, 0, 0.1), "R": (0.07, 0, 0.5, 0, 0.1, 0.2, 0, 0.1),
    "KG": (0.09, 0, 0, 0.08, 0.1, 0.2, 0, 0), "H": (0.12, 0, 0, 0.05, 0.08, 0.15, 0, 0),
    "W": (0.03, 0, 0.95, 0, 0, 0, 0, 0), "Y": (0.06, 0, 0, 0.4, 0.15, 0.25, 0, 0.1),
    "IY": (0.075, 0, 0, 0.65, 0.25, 0.35, 0, 0.1), "IH": (0.10, 0, 0, 0.4, 0.18, 0.28, 0, 0),
    "EH": (0.17, 0, 0, 0.35, 0.2, 0.32, 0, 0), "AE": (0.24, 0, 0, 0.4, 0.25, 0.4, 0, 0),
    "AA": (0.28, 0, 0.05, 0, 0.15, 0.35, 0, 0), "AH": (0.18, 0, 0, 0.1, 0.12, 0.28, 0, 0),
    "AX": (0.10, 0, 0, 0.08, 0.08, 0.18, 0, 0), "AO": (0.21, 0, 0.5, 0, 0.1, 0.25, 0, 0),
    "OW": (0.13, 0, 0.78, 0, 0.05, 0.1, 0, 0), "UW": (0.05, 0, 0.95, 0, 0, 0.05, 0, 0),
    "UY": (0.05, 0, 0.85, 0, 0.05, 0.05, 0, 0.1), "UH": (0.09, 0, 0.55, 0, 0.08, 0.15, 0, 0),
    "ER": (0.10, 0, 0.42, 0, 0.1, 0.2, 0, 0),
}  # fmt: skip
_VOWEL_STRENGTH = (1.2, 1.2, 1.1, 1.1, 1, 1, 1.2, 0.8)
_STRENGTHS: dict[str, tuple[float, ...]] = {
    "sil": (0.8, 0.4, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5), "PBM": (0.5, 3, 0.35, 0.3, 1, 1, 1, 1),
    "FV": (1.0, 2, 0.35, 0.35, 1.5, 1.5, 3, 1), "TH": (0.9, 1.2, 0.3, 0.4, 0.8, 0.8, 1, 2),
    "TDN": (0.6, 1, 0.25, 0.35, 0.6, 0.6, 1, 1.2), "L": (0.6, 1, 0.25, 0.35, 0.6, 0.6, 1, 1.5),
    "SZ": (1.4, 1.2, 0.5, 0.9, 1, 1, 1, 1), "SH": (1.3, 1.2, 1.4, 0.8, 1, 1, 1, 1),
    "R": (0.7, 1, 0.9, 0.6, 0.5, 0.5, 1, 0.7), "KG": (0.5, 0.8, 0.2, 0.3, 0.5, 0.5, 1, 0.8),
    "H": (0.3, 0.6, 0.1, 0.2, 0.3, 0.3, 1, 0.4), "W": (1, 1.2, 1.8, 1.2, 0.8, 0.8, 1, 0.7),
    "Y": (0.8, 1, 0.8, 1.1, 0.6, 0.6, 1, 0.7),
}  # fmt: skip

_ARPABET: dict[str, tuple[str, ...]] = {}
_IPA: dict[str, tuple[str, ...]] = {}
for _class, _arpa, _ipa in (
    ("PBM", "p b m", "p b m ɓ ʙ"), ("FV", "f v", "f v ɱ"), ("TH", "th dh", "θ ð"),
    ("TDN", "t d n dx nx en", "t d n ɾ ʈ ɖ ɳ ɲ c ɟ ɗ"), ("L", "l el", "l ɫ ʎ ɭ ɬ"), ("SZ", "s z", "s z ʂ ʐ"),
    ("SH", "sh zh ch jh", "ʃ ʒ ʧ ʤ ɕ ʑ"), ("R", "r", "ɹ r ʁ ɻ ɽ"), ("KG", "k g ng", "k ɡ g ŋ x ɣ q χ ʔ ç"),
    ("H", "hh hv", "h ɦ ħ"), ("W", "w", "w β ʋ ʍ"), ("Y", "y", "j ɥ"), ("IY", "iy", "i ɨ"), ("IH", "ih ix", "ɪ ᵻ"),
    ("EH", "eh", "e ɛ"), ("AE", "ae", "æ"), ("AA", "aa", "a ɑ ɒ"), ("AH", "ah", "ʌ ɐ"), ("AX", "ax", "ə ᵊ ɘ"),
    ("AO", "ao", "ɔ"), ("OW", "", "o ɵ"), ("UW", "uw", "u ʉ"), ("UY", "", "y ø œ ʏ"), ("UH", "uh", "ʊ"),
    ("ER", "er axr", "ɜ ɝ ɚ"), ("sil", "pau sil ssil h#", ""),
):  # fmt: skip
    _ARPABET.update({symbol: (_class,) for symbol in _arpa.split()})
    _IPA.update({symbol: (_class,) for symbol in _ipa.split()})
_ARPABET |= {
    "ey": ("EH", "IY"), "ow": ("OW", "UW"), "oy": ("AO", "IY"), "ay": ("AA", "IY"), "aw": ("AA", "UW"),
}  # fmt: skip
# Capital letters are the diphthongs of the misaki alphabet, which hibari speaks.
_IPA |= {
    "A": ("EH", "IY"), "I": ("AA", "IY"), "W": ("AA", "UW"), "Y": ("AO", "IY"), "O": ("OW", "UW"), "Q": ("OW", "UW"),
    "T": ("TDN",), "tʃ": ("SH",), "dʒ": ("SH",),
}  # fmt: skip
_PAUSE_MARKS = set("_.,;:!?—… ")


@dataclass(frozen=True, kw_only=True)
class Phoneme:
    """One sound of the speech, in seconds of the clip."""

    symbol: str
    start_s: float
    end_s: float
    alphabet: str = "ipa"  # or "arpabet"


@dataclass(frozen=True, kw_only=True)
class Viseme:
    """One mouth class with its interval."""

    name: str
    start_s: float
    end_s: float


def classes_of(symbol: str, alphabet: str) -> tuple[str, ...]:
    """Mouth classes of a phoneme symbol; empty for stress and length marks."""
    if alphabet == "arpabet":
        return _ARPABET.get(symbol.lower(), ("AX",))
    if not symbol or all(mark in _PAUSE_MARKS for mark in symbol):
        return ("sil",)
    if symbol in _IPA:
        return _IPA[symbol]
    if symbol[:2] in ("tʃ", "dʒ"):
        return ("SH",)
    return tuple(name for mark in symbol for name in _IPA.get(mark, ()))


def visemes_of(phonemes: list[Phoneme]) -> list[Viseme]:
    """Mouth classes with times; marks without a class lend their time to the sound that follows."""
    found: list[Viseme] = []
    pending: float | None = None
    for phoneme in phonemes:
        names = classes_of(phoneme.symbol, phoneme.alphabet)
        start = phoneme.start_s if pending is None else pending
        if not names or (names == ("sil",) and phoneme.end_s - start < 0.12):
            pending = start
            continue
        pending = None
        edges = np.linspace(start, phoneme.end_s, len(names) + 1)
        found += [
            Viseme(name=n, start_s=float(a), end_s=float(b))
            for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)
        ]
    return found


def _plateau(t: Array, start: float, end: float, ramp: float) -> Array:
    """1 inside [start, end], cosine flanks of `ramp` seconds outside."""
    outside = np.clip(np.maximum(start - t, t - end) / ramp, 0, 1)
    return np.asarray(0.5 + 0.5 * np.cos(np.pi * outside))


def curves(visemes: list[Viseme], seconds: float) -> Array:
    """Control curves (T, 8) at `CURVE_RATE`; column 0 is the opening in eye distances."""
    t = np.arange(int(np.ceil(seconds * CURVE_RATE)) + 1) / CURVE_RATE
    rest = np.asarray(TARGETS["sil"])
    total = np.full((len(t), len(CONTROLS)), 0.02) * rest
    weight = np.full((len(t), len(CONTROLS)), 0.02)
    for v in visemes:
        length, centre = max(v.end_s - v.start_s, 0.03), (v.start_s + v.end_s) / 2
        reach = np.where(t < centre, max(0.045, 0.48 * length), max(0.040, 0.42 * length))
        strength = np.exp(-1.2 * np.abs(t - centre) / reach)
        if v.name == "sil":
            strength = _plateau(t, v.start_s, v.end_s, 0.06)
        part = strength[:, None] * np.asarray(_STRENGTHS.get(v.name, _VOWEL_STRENGTH))
        total += part * np.asarray(TARGETS[v.name])
        weight += part
    value = total / weight
    kernel = np.hanning(11)
    kernel /= kernel.sum()
    value = np.stack([np.convolve(np.pad(column, 5, "edge"), kernel, "valid") for column in value.T], axis=1)
    for v in visemes:
        length, centre = v.end_s - v.start_s, (v.start_s + v.end_s) / 2
        if v.name == "PBM":  # at 25 frames per second at least one frame must lie on the plateau
            half = max(length / 2, 0.028)
            shut = _plateau(t, centre - half, centre + half, 0.055)
        elif v.name == "sil" and length > 0.16:
            shut = _plateau(t, v.start_s + 0.07, v.end_s - 0.07, 0.07)
        elif v.name == "FV":
            touch = _plateau(t, centre - max(0.4 * length, 0.02), centre + max(0.4 * length, 0.02), 0.05)[:, None]
            aim = np.asarray(TARGETS["FV"])
            keep = [_OPEN, _CLOSE, 4, 5, _LABIO]
            value[:, keep] = value[:, keep] * (1 - touch) + aim[keep] * touch
            continue
        else:
            continue
        value[:, [_OPEN, 4, 5, _LABIO, 7]] *= (1 - shut)[:, None]
        value[:, _CLOSE] = np.maximum(value[:, _CLOSE], shut)
    return value
