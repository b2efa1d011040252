"""What surrounds a head: colour helpers, lights and calm, room-like backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator


def linear_rgb(colour: npt.ArrayLike) -> Floats:
    """sRGB 0..255 to linear light 0..1."""
    value = np.asarray(colour, np.float64) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def noise_texture(rng: Rng, size: int, falloff: float) -> Floats:
    """Tiling (size, size) noise in 0..1 with a 1/f^falloff power spectrum."""
    freq = np.fft.fftfreq(size)
    radius = np.hypot(freq[:, None], freq[None])
    radius[0, 0] = 1
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) / radius ** (falloff / 2)).real
    return np.ascontiguousarray(np.clip(0.5 + 0.18 * (field - field.mean()) / field.std(), 0, 1).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Lights:
    """Key, fill and rim light, a sky/ground ambient term and the exposure that balances them."""

    directions: Floats  # (3, 3) towards the light
    colours: Floats  # (3, 3)
    sky: Floats
    ground: Floats
    exposure: float


def make_lights(rng: Rng) -> Lights:
    """Draw a plausible portrait lighting."""

    def towards(azimuth: float, elevation: float) -> list[float]:
        return [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]

    key = rng.choice([-1, 1]) * rng.uniform(0.1, 1.0)
    warm = rng.uniform(-0.10, 0.10)
    tint = np.array([1 + warm, 1.0, 1 - warm])
    directions = np.array(
        [
            towards(key, rng.uniform(0.15, 0.8)),
            towards(-key * rng.uniform(0.6, 1.4), rng.uniform(-0.1, 0.5)),
            towards(rng.choice([-1, 1]) * rng.uniform(2.0, 2.8), rng.uniform(0.0, 0.8)),
        ]
    )
    colours = np.stack(
        [tint * rng.uniform(0.7, 1.3), np.full(3, rng.uniform(0.08, 0.4)), np.full(3, rng.uniform(0.0, 0.45))]
    )
    ambient = rng.uniform(0.2, 0.45)
    sky, ground = tint[::-1] * ambient, np.array([1, 0.95, 0.9]) * ambient * rng.uniform(0.4, 0.8)
    facing = np.clip(directions @ np.array([0, 0.1, 0.99]), 0, 1)
    energy = float((colours * facing[:, None]).sum(0).mean() + 0.5 * (sky + ground).mean())
    return Lights(
        directions=directions.astype(np.float32),
        colours=colours.astype(np.float32),
        sky=sky.astype(np.float32),
        ground=ground.astype(np.float32),
        exposure=float(rng.uniform(0.75, 1.15)) / energy,
    )


def _muted(rng: Rng, low: float, high: float) -> Floats:
    """A low-saturation colour whose brightness lies between `low` and `high` (0..255)."""
    grey = rng.uniform(low, high)
    tint = rng.normal(0, 1, 3)
    return linear_rgb(np.clip(grey + rng.uniform(0.02, 0.14) * grey * (tint - tint.mean()), 4, 250))


def make_background(rng: Rng, size: int) -> Floats:
    """A blurred, room-like picture (size, size, 3) of reflectances, linear 0..1."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    wall, other = _muted(rng, 60, 215), _muted(rng, 50, 200)
    slope = np.clip(0.5 + rng.uniform(-1, 1) * (x - 0.5) + rng.uniform(-0.6, 0.6) * (y - 0.5), 0, 1)[..., None]
    image = wall * (1 - slope) + other * slope
    if rng.random() < 0.8:
        for _ in range(rng.integers(1, 9)):  # frames, shelves, doors, windows, lamps
            left, top = rng.uniform(-0.2, 1.0), rng.uniform(-0.2, 0.9)
            wide, tall = rng.uniform(0.06, 0.45), rng.uniform(0.06, 0.8)
            inside = (x > left) & (x < left + wide) & (y > top) & (y < top + tall)
            image[inside] = _muted(rng, 25, 240) * rng.uniform(0.6, 1.2)
    if rng.random() < 0.3:
        image[y > rng.uniform(0.6, 0.9)] = _muted(rng, 30, 150)
    blur = float(rng.choice([1.5, 3, 6, 10, 16])) * size / 256
    image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), max(0.4, blur), borderType=cv2.BORDER_REFLECT)
    grain = cv2.resize(noise_texture(rng, 32, 1.6), (size, size), interpolation=cv2.INTER_CUBIC)[..., None]
    return np.asarray(image * (0.85 + 0.3 * grain), np.float32)
