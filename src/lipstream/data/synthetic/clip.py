"""One clip: choose a voice and words, let a person speak them, draw the frames and collect the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic.basis import HeadBasis
from lipstream.data.synthetic.identity import make_identity
from lipstream.data.synthetic.performance import perform
from lipstream.data.synthetic.renderer import Renderer
from lipstream.data.synthetic.scene import make_background, make_lights
from lipstream.data.synthetic.sentences import LANGUAGES, sentence
from lipstream.data.synthetic.visemes import CONTROLS, Phoneme, visemes_of
from lipstream.data.synthetic.voices import SAMPLE_RATE, Cast, Speech, vary

Floats = npt.NDArray[np.float32]
FRAME_RATE = 25


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished clip. T frames, S pixels, K landmarks."""

    frames: npt.NDArray[np.uint8]  # (T, S, S, 3) RGB
    samples: Floats  # (N,) mono 16 kHz
    truth: dict[str, Any]  # arrays of the .npz
    about: dict[str, Any]  # line of the manifest


def compose_speech(cast: Cast, rng: np.random.Generator, seconds: float) -> tuple[Speech, dict[str, str]]:
    """Sentences of one voice with pauses between them, cut to `seconds`."""
    voice, factor = cast.draw(rng, LANGUAGES)
    speed = float(rng.uniform(0.85, 1.2))
    pieces: list[Floats] = []
    phonemes: list[Phoneme] = []
    words: list[str] = []
    clock = 0.0
    pause = float(rng.uniform(0.0, 0.5))
    while clock < seconds:
        if pause > 0:
            pieces.append(np.zeros(int(pause * SAMPLE_RATE), np.float32))
            phonemes.append(Phoneme(symbol="_", start_s=clock, end_s=clock + len(pieces[-1]) / SAMPLE_RATE))
            clock += len(pieces[-1]) / SAMPLE_RATE
        text = sentence(rng, voice.language)
        said = vary(voice.speak(text, speed, int(rng.integers(1 << 30))), factor)
        phonemes += [replace(p, start_s=p.start_s + clock, end_s=p.end_s + clock) for p in said.phonemes]
        pieces.append(said.samples)
        words.append(text)
        clock += len(said.samples) / SAMPLE_RATE
        pause = float(rng.uniform(0.3, 1.0))
    samples = np.concatenate(pieces)[: round(seconds * SAMPLE_RATE)]
    samples = samples / (np.sqrt(np.mean(samples**2)) + 1e-6) * 10 ** (rng.uniform(-26, -18) / 20)
    samples = np.clip(samples + rng.normal(0, 10 ** (rng.uniform(-80, -55) / 20), len(samples)), -0.99, 0.99)
    phonemes = [replace(p, end_s=min(p.end_s, seconds)) for p in phonemes if p.start_s < seconds]
    about = {"voice": voice.name, "language": voice.language, "text": " ".join(words)}
    return Speech(samples=samples.astype(np.float32), sample_rate=SAMPLE_RATE, phonemes=phonemes), about


def mouth_boxes(landmarks: Floats, names: list[str]) -> Floats:
    """(T, 4) x0, y0, x1, y1 pixels: from under the nose to the chin, as wide as the jaw's inner part."""
    lips = landmarks[:, [i for i, name in enumerate(names) if name.startswith(("lip_", "mouth_"))]]
    nose, chin = landmarks[:, names.index("nose_base")], landmarks[:, names.index("chin")]
    low, high = lips.min(axis=1), lips.max(axis=1)
    margin = 0.25 * (high[:, 0] - low[:, 0])
    top = np.minimum(low[:, 1], 0.5 * (nose[:, 1] + low[:, 1]))
    return np.stack([low[:, 0] - margin, top, high[:, 0] + margin, np.maximum(chin[:, 1], high[:, 1])], 1).astype(
        np.float32
    )


def lip_opening(local: Floats, basis: HeadBasis) -> float:
    """Gap of the inner lips over the distance of the outer eye corners, both in the unposed head; 0 when closed."""
    mark = basis.landmarks
    eyes = np.linalg.norm(local[mark["eye_outer_left"]] - local[mark["eye_outer_right"]])
    gap = local[mark["lip_inner_upper_2"], 1] - local[mark["lip_inner_lower_2"], 1]
    return float(max(0.0, gap) / eyes)


def draw_clip(
    basis: HeadBasis, renderer: Renderer, speech: Speech, *, seed: int, frames: int, said: dict[str, str]
) -> Clip:
    """Let the person of `seed` speak for `frames` frames."""
    rng = np.random.default_rng([seed, 29])
    identity = make_identity(basis, seed)
    lights, size = make_lights(rng), renderer.size
    margin = max(4, size // 16)
    background = cv2.resize(make_background(rng, size), (size + 2 * margin,) * 2, interpolation=cv2.INTER_LINEAR)
    visemes = visemes_of(speech.phonemes)
    acting = perform(
        basis, identity, visemes, speech.samples, speech.sample_rate, frames=frames, rate=FRAME_RATE, rng=rng
    )
    names = sorted(basis.landmarks)
    marks = np.array([basis.landmarks[name] for name in names])
    strength = float(rng.choice([0.0, rng.uniform(0.5, 3.0)]))
    grain = rng.normal(0, 1, (size + 64, size + 64, 3)).astype(np.float32) * strength
    pictures, points, openings = [], [], []
    for i in range(frames):
        dx, dy = np.clip(np.round(acting.background_shift[i] * size), -margin, margin).astype(int) + margin
        behind = background[dy : dy + size, dx : dx + size].astype(np.float32)
        frame = renderer.render(identity, acting.expressions[i], acting.poses[i], lights, behind)
        gx, gy = rng.integers(0, 64, 2)
        image = frame.image
        if strength > 0:
            image = np.clip(image + grain[gy : gy + size, gx : gx + size], 0, 255).astype(np.uint8)
        pictures.append(image)
        points.append(frame.screen[marks])
        openings.append(lip_opening(frame.local, basis))
    landmarks = np.stack(points).astype(np.float32)
    truth = {
        "landmarks": landmarks,
        "landmark_names": np.array(names),
        "opening": np.array(openings, np.float32),
        "controls": acting.controls,
        "control_names": np.array(CONTROLS),
        "units": acting.expressions.astype(np.float16),
        "unit_names": np.array(basis.units),
        "pose": np.array([(p.yaw, p.pitch, p.roll) for p in acting.poses], np.float32),
        "mouth_box": mouth_boxes(landmarks, names),
        "phonemes": np.array([p.symbol for p in speech.phonemes]),
        "phoneme_times_s": np.array([(p.start_s, p.end_s) for p in speech.phonemes], np.float32).reshape(-1, 2),
        "visemes": np.array([v.name for v in visemes]),
        "viseme_times_s": np.array([(v.start_s, v.end_s) for v in visemes], np.float32).reshape(-1, 2),
        "frame_rate": np.array(FRAME_RATE),
    }
    about = {"seed": seed, "hair": identity.hair.style, **said, **{k: round(v, 3) for k, v in identity.traits.items()}}
    return Clip(frames=np.stack(pictures), samples=speech.samples, truth=truth, about=about)
