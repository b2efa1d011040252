"""Write a data set of synthetic clips: resumable, deterministic per seed, one new person per clip.

Per clip: `ID.mp4` (25 fps H.264 with AAC), `ID.wav` (16 kHz mono PCM, the authoritative sound), `ID.npz` (ground
truth) and `ID.json` (one line of the manifest). Run `lipstream data synthesize --hours H --seed S OUT`.
"""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic.requirements import check_requirements

_CRF = "14"
_SAMPLE_RATE = 16000
_FRAME_RATE = 25
_MANIFEST_EVERY = 20  # clips: the list is nearly current even while a run goes on


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """What to generate."""

    hours: float
    seed: int
    size: int = 256  # pixels
    clip_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not self.hours > 0:
            raise ValueError(f"hours must be positive, got {self.hours}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size must be an even number of at least 16 pixels, got {self.size}")
        if not 0.2 <= self.clip_seconds <= 60:
            raise ValueError(f"clip seconds must lie between 0.2 and 60, got {self.clip_seconds}")

    @property
    def clips(self) -> int:
        """Number of clips."""
        return max(1, round(self.hours * 3600 / self.clip_seconds))

    @property
    def pixel_frames(self) -> int:
        """Frames of each clip."""
        return max(1, round(self.clip_seconds * _FRAME_RATE))


def clip_name(seed: int, index: int) -> str:
    """File stem of a clip, e.g. `s0001_000042`."""
    return f"s{seed:04d}_{index:06d}"


def _write_wav(path: Path, samples: npt.NDArray[np.float32]) -> None:
    with wave.open(str(path), "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(_SAMPLE_RATE)
        audio.writeframes((samples * 32767).round().astype("<i2").tobytes())


def _write_mp4(path: Path, frames: npt.NDArray[np.uint8], samples: npt.NDArray[np.float32]) -> None:
    """H.264 and AAC in one file, both starting at time 0."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": _CRF, "preset": "veryfast", "threads": "1"}
        video = container.add_stream("libx264", rate=_FRAME_RATE, options=options)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        audio = container.add_stream("aac", rate=_SAMPLE_RATE, layout="mono")
        audio.bit_rate = 96000
        for i, image in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = i, Fraction(1, _FRAME_RATE)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        for start in range(0, len(samples), 1024):
            block = samples[None, start : start + 1024]
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = _SAMPLE_RATE, start, Fraction(1, _SAMPLE_RATE)
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def _finish(part: Path) -> None:
    os.replace(part, part.with_name(part.name.removesuffix(".part")))


def synthesize(config: SynthesisConfig, folder: Path) -> Iterator[tuple[str, bool]]:
    """Generate all clips into `folder`; yields (name, True if drawn now or False if it was there already)."""
    check_requirements()
    # Heavy imports wait until the requirements are known to be there.
    from lipstream.data.synthetic.basis import load_basis
    from lipstream.data.synthetic.clip import compose_speech, draw_clip
    from lipstream.data.synthetic.renderer import Renderer
    from lipstream.data.synthetic.voices import Cast

    folder.mkdir(parents=True, exist_ok=True)
    basis, cast = load_basis(), Cast()
    renderer = Renderer(basis, config.size)
    _write_card(config, folder)
    for index in range(config.clips):
        name = clip_name(config.seed, index)
        if index % _MANIFEST_EVERY == 0:
            _write_manifest(folder)
        if (folder / f"{name}.json").exists():
            yield name, False
            continue
        seed = config.seed * 1_000_003 + index
        speech, said = compose_speech(cast, np.random.default_rng([seed, 7]), config.pixel_frames / _FRAME_RATE)
        clip = draw_clip(basis, renderer, speech, seed=seed, frames=config.pixel_frames, said=said)
        parts = {kind: folder / f"{name}.{kind}.part" for kind in ("mp4", "wav", "npz", "json")}
        _write_mp4(parts["mp4"], clip.frames, clip.samples)
        _write_wav(parts["wav"], clip.samples)
        with parts["npz"].open("wb") as file:
            np.savez_compressed(file, **clip.truth)
        line = {"id": name, "pixel_frames": config.pixel_frames, "size": config.size, **clip.about}
        parts["json"].write_text(json.dumps(line, ensure_ascii=False) + "\n")
        # The mp4 appears only after its companions, the json last: it marks the clip as finished.
        for kind in ("wav", "npz", "mp4", "json"):
            _finish(parts[kind])
        yield name, True
    _write_manifest(folder)


def _write_manifest(folder: Path) -> None:
    lines = [path.read_text() for path in sorted(folder.glob("s*_*.json"))]
    part = folder / "manifest.jsonl.part"
    part.write_text("".join(lines))
    _finish(part)


def _write_card(config: SynthesisConfig, folder: Path) -> None:
    """The data set card."""
    command = f"lipstream data synthesize --hours {config.hours:g} --seed {config.seed} OUT"
    command += f" --size {config.size} --clip-seconds {config.clip_seconds:g}"
    part = folder / "README.md.part"
    part.write_text(
        f"""# Synthetic talking heads (lipstream)

{config.clips} clips of {config.pixel_frames} frames at {_FRAME_RATE} fps, {config.size} x {config.size} pixels,
seed {config.seed}; one new person per clip. No real person appears or speaks. Made by
`{command}`.

Per clip: `ID.mp4`, `ID.wav` (16 kHz mono, starts with the first frame), `ID.npz` (landmarks in pixels, lip opening
over the distance of the outer eye corners, control curves, facial units, phonemes and visemes with times, mouth
box), `ID.json`. `manifest.jsonl` lists the finished clips.

Sources: head geometry from MakeHuman (CC0); voices hibari-tts (Apache-2.0), flite (BSD style), espeak-ng (a GPL-3
program whose output is not covered by its licence). The pictures are rule-based cartoons: mouth shapes follow fixed
rules, skin is stylised, there are no glasses, no hands and no real rooms.
"""
    )
    _finish(part)
