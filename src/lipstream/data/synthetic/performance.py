"""How a person moves during a clip: lips from the speech, head, camera, eyes and brows from slow random motion.

Lip opening is exact: the facial units are linear, so the jaw (or the closing unit) is solved such that the gap
between the inner lips equals the wanted one for every identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic.basis import HeadBasis
from lipstream.data.synthetic.identity import Identity
from lipstream.data.synthetic.renderer import Pose
from lipstream.data.synthetic.visemes import CURVE_RATE, Viseme, curves

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Rng = np.random.Generator

_PRESSED_DM = 0.004  # closed lips overlap by this much, so that no light shines through
_WIDEST = 0.36  # eye distances


@dataclass(frozen=True, kw_only=True)
class Style:
    """Personal way of speaking."""

    amplitude: float
    asymmetry: float
    smile: float
    loudness: float  # how much the opening follows the loudness


@dataclass(frozen=True, kw_only=True)
class Performance:
    """One clip: T frames, U facial units, 8 controls."""

    expressions: Floats  # (T, U)
    poses: list[Pose]
    controls: Floats  # (T, 8), see visemes.CONTROLS
    background_shift: Floats  # (T, 2) pixels per frame height


def wander(rng: Rng, frames: int, rate: float, seconds: float, deviation: float) -> Array:
    """Smoothed Ornstein-Uhlenbeck motion with the given time constant and standard deviation."""
    decay = np.exp(-1 / (rate * seconds))
    kick = rng.normal(size=frames) * np.sqrt(1 - decay**2)
    value = np.empty(frames)
    value[0] = rng.normal()
    for i in range(1, frames):
        value[i] = decay * value[i - 1] + kick[i]
    kernel = np.hanning(max(5, int(rate * seconds * 0.8) | 1))
    kernel /= kernel.sum()
    smooth = np.convolve(np.pad(value, len(kernel) // 2, "edge"), kernel, "valid")[:frames]
    return np.asarray(smooth * deviation)


def _blinks(rng: Rng, frames: int, rate: float) -> Array:
    lid = np.zeros(frames)
    at = int(rng.uniform(0, 3) * rate)
    while at < frames:
        shape = np.array([0.5, 1.0, 0.7, 0.25])[: frames - at]
        lid[at : at + len(shape)] = np.maximum(lid[at : at + len(shape)], shape)
        at += int(rng.uniform(1.5, 5) * rate)
    return lid


class Mouth:
    """Solves facial units for wanted lip openings of one identity."""

    def __init__(self, basis: HeadBasis, identity: Identity) -> None:
        marks, units = basis.landmarks, basis.unit_deltas
        upper, lower = marks["lip_inner_upper_2"], marks["lip_inner_lower_2"]
        face = identity.vertices
        self.eye_distance_dm = float(np.linalg.norm(face[marks["eye_outer_left"]] - face[marks["eye_outer_right"]]))
        self._neutral = float(face[upper, 1] - face[lower, 1])
        self._gain = (units[:, upper, 1] - units[:, lower, 1]).astype(np.float64)
        self._unit = {name: i for i, name in enumerate(basis.units)}
        self.rest = np.zeros(len(basis.units))
        for name, amount in identity.rest_units.items():
            self.rest[self._unit[name]] = amount

    def units(self, control: Array, style: Style) -> Array:
        """(U,) facial units for one sample of the control curves."""
        opening, close, rounded, wide, up, low, labio, tongue = control
        value, unit = self.rest.copy(), self._unit
        free = 1 - np.clip(close, 0, 1)
        a = style.amplitude
        value[unit["mouthPucker"]] = 0.75 * rounded * min(a, 1.15)
        value[unit["mouthFunnel"]] = 0.45 * rounded * (0.35 + 2.0 * opening) * free
        for side, part in (("Left", 1 + style.asymmetry), ("Right", 1 - style.asymmetry)):
            value[unit[f"mouthSmile{side}"]] = np.clip((0.4 * wide * a + style.smile) * part, 0, 1)
            value[unit[f"mouthStretch{side}"]] = np.clip(0.4 * wide * a * part, 0, 1)
            value[unit[f"mouthUpperUp{side}"]] = np.clip(0.7 * up * free * part + 0.1 * labio, 0, 1)
            value[unit[f"mouthLowerDown{side}"]] = np.clip(0.8 * low * free * (1 - labio) * part, 0, 1)
            value[unit[f"mouthPress{side}"]] = np.clip(0.5 * (close - 0.6), 0, 1)
        value[unit["mouthRollLower"]] = np.clip(0.7 * labio + 0.2 * np.clip(close - 0.6, 0, 1), 0, 1)
        value[unit["mouthRollUpper"]] = 0.2 * np.clip(close - 0.6, 0, 1)
        value[unit["tongueOut"]] = 0.18 * tongue * free
        wanted = min(opening * a, _WIDEST) * self.eye_distance_dm - _PRESSED_DM * np.clip(close, 0, 1)
        jaw, closer = unit["jawOpen"], unit["mouthClose"]
        missing = wanted - self._neutral - float(self._gain @ value)
        if missing > 0:
            value[jaw] = min(1.15, missing / self._gain[jaw])
        else:
            value[closer] = min(1.0, missing / self._gain[closer])
        return value


def perform(
    basis: HeadBasis,
    identity: Identity,
    visemes: list[Viseme],
    samples: Floats,
    sample_rate: int,
    *,
    frames: int,
    rate: float,
    rng: Rng,
) -> Performance:
    """Motion of a clip whose frame i shows time i / rate."""
    style = Style(
        amplitude=float(rng.uniform(1.0, 1.75)),
        asymmetry=float(rng.normal(0, 0.07)),
        smile=float(np.clip(rng.normal(0.03, 0.08), 0, 0.3)),
        loudness=float(rng.uniform(0.1, 0.4)),
    )
    mouth = Mouth(basis, identity)
    curve = curves(visemes, frames / rate + 0.1)
    window = np.ones(int(0.06 * sample_rate)) / int(0.06 * sample_rate)
    loud = np.sqrt(np.convolve(samples.astype(np.float64) ** 2, window, "same") + 1e-10)
    loud /= np.percentile(loud, 92) + 1e-4
    at = np.arange(frames) / rate
    control = curve[np.minimum((at * CURVE_RATE).round().astype(int), len(curve) - 1)].copy()
    level = np.clip(loud[np.minimum((at * sample_rate).astype(int), len(loud) - 1)], 0, 1.3)
    control[:, 0] *= 1 - style.loudness + style.loudness * level
    calm = float(rng.choice([0.08, 0.4, 1.0, 1.5], p=[0.2, 0.25, 0.35, 0.2]))  # nearly still ... lively
    yaw = wander(rng, frames, rate, 0.9, calm * rng.uniform(0.06, 0.2)) + rng.normal(0, 0.12)
    pitch = wander(rng, frames, rate, 0.7, calm * rng.uniform(0.03, 0.08)) + rng.normal(0.0, 0.04)
    roll = wander(rng, frames, rate, 1.0, calm * rng.uniform(0.02, 0.06)) + rng.normal(0, 0.02)
    drift = np.stack(
        [wander(rng, frames, rate, 1.2, calm * 0.06), wander(rng, frames, rate, 1.2, calm * 0.03)], 1
    ) + rng.normal(0, 0.07, 2)
    zoom = rng.uniform(0.47, 0.61) / 1.8 * np.exp(wander(rng, frames, rate, 1.5, calm * 0.02))
    gaze = np.stack(
        [wander(rng, frames, rate, 0.5, 0.08) - 0.5 * yaw, wander(rng, frames, rate, 0.5, 0.05) + 0.3 * pitch], 1
    )
    brow, lid = np.clip(wander(rng, frames, rate, 0.6, 0.35), -0.15, 1), _blinks(rng, frames, rate)
    unit = {name: i for i, name in enumerate(basis.units)}
    expressions = np.zeros((frames, len(unit)), np.float32)
    for i in range(frames):
        value = mouth.units(control[i], style)
        value[unit["browInnerUp"]] += 0.5 * max(0.0, brow[i])
        for side in ("Left", "Right"):
            value[unit[f"browOuterUp{side}"]] += 0.4 * max(0.0, brow[i])
            value[unit[f"browDown{side}"]] += 0.4 * max(0.0, -brow[i])
            value[unit[f"eyeBlink{side}"]] = lid[i]
            value[unit[f"eyeWide{side}"]] *= 1 - lid[i]
        expressions[i] = value
    poses = [
        Pose(
            yaw=float(yaw[i]),
            pitch=float(pitch[i] + 0.03 * level[i] * min(1.0, calm)),  # stressed syllables come with a small nod
            roll=float(roll[i]),
            body_yaw=float(0.15 * yaw[i]),
            shift=(float(drift[i, 0]), float(drift[i, 1])),
            zoom=float(zoom[i]),
            gaze=(float(gaze[i, 0]), float(gaze[i, 1])),
        )
        for i in range(frames)
    ]
    pan = np.stack([wander(rng, frames, rate, 1.2, calm * 0.006), wander(rng, frames, rate, 1.2, calm * 0.004)], 1)
    return Performance(
        expressions=expressions,
        poses=poses,
        controls=control.astype(np.float32),
        background_shift=pan.astype(np.float32),
    )
