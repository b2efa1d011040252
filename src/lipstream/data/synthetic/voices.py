"""Speech with phoneme times from three families of voices: hibari (neural), flite and espeak-ng.

Each `Voice.speak` returns mono samples and timed phonemes. Variety comes from the voices, their parameters and
`vary`, which plays a voice faster or slower so that pitch, formants and tempo move together.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import wave
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.signal import resample_poly

from lipstream.data.synthetic.visemes import Phoneme

Floats = npt.NDArray[np.float32]

SAMPLE_RATE = 16000
_HIBARI_FRAME_S, _HIBARI_LABEL_DELAY_S = 0.025, 0.045  # measured: its labels follow the sound by 40-50 ms


@dataclass(frozen=True, kw_only=True)
class Speech:
    """Mono speech and what is said when."""

    samples: Floats
    sample_rate: int
    phonemes: list[Phoneme] = field(default_factory=list)


class Voice(ABC):
    """Something that can speak."""

    name: str
    language: str = "en"

    @abstractmethod
    def speak(self, text: str, speed: float, seed: int) -> Speech:
        """Say a sentence; `speed` 1 is the natural rate."""


class FliteVoice(Voice):
    """One of flite's built-in voices, run as a child process."""

    def __init__(self, name: str) -> None:
        self.name, self._flite = f"flite-{name}", name

    def speak(self, text: str, speed: float, seed: int) -> Speech:
        """See `Voice.speak`; flite has no random part."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            stretch = f"duration_stretch={1 / speed:.3f}"
            command = ["flite", "-voice", self._flite, "--setf", stretch, "-psdur", "-t", text, "-o", str(path)]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            with wave.open(str(path)) as audio:
                rate = audio.getframerate()
                samples = np.frombuffer(audio.readframes(audio.getnframes()), np.int16) / np.float32(32768)
        phonemes, start = [], 0.0
        for symbol, end in re.findall(r"(\S+):([\d.]+)", said.stdout):
            phonemes.append(Phoneme(symbol=symbol, start_s=start, end_s=float(end), alphabet="arpabet"))
            start = float(end)
        if not phonemes:
            raise RuntimeError(f"flite printed no phoneme times for {text!r}")
        return Speech(samples=samples.astype(np.float32), sample_rate=rate, phonemes=phonemes)


class EspeakVoice(Voice):
    """An espeak-ng voice such as `en-us+f3`, with its own pitch and intonation (0..100); see `espeak_child`."""

    def __init__(self, variant: str, language: str, pitch: int, spread: int) -> None:
        self.name, self.language = f"espeak-{variant}", language
        self._variant, self._pitch, self._spread = variant, pitch, spread

    def speak(self, text: str, speed: float, seed: int) -> Speech:
        """See `Voice.speak`; espeak-ng has no random part of its own choosing."""
        numbers = [str(round(165 * speed)), str(self._pitch), str(self._spread)]
        child = [sys.executable, "-I", "-S", str(Path(__file__).with_name("espeak_child.py")), self._variant, *numbers]
        said = subprocess.run(child, input=text.encode(), capture_output=True)
        if said.returncode != 0:
            raise RuntimeError(f"espeak-ng failed on {text!r}: {said.stderr.decode('utf8', 'replace').strip()}")
        samples = (np.frombuffer(said.stdout, np.int16) / np.float32(32768)).astype(np.float32)
        timing = json.loads(said.stderr)
        rate, events = int(timing["sample_rate"]), timing["events"]
        edges = [at for _, at in events[1:]] + [len(samples) / rate]
        phonemes = [Phoneme(symbol=s, start_s=a, end_s=b) for (s, a), b in zip(events, edges, strict=True)]
        return Speech(samples=samples, sample_rate=rate, phonemes=phonemes)


class HibariVoice(Voice):
    """The neural voice `hibari-tts`; the durations of its sounds are read from an inner node of its network."""

    name = "hibari"

    def __init__(self) -> None:
        import onnx
        import onnxruntime
        from hibari import Hibari, dsp

        self._front, self._dsp = Hibari(), dsp
        model = onnx.load(self._front.model_path)
        node = next(n for n in model.graph.node if n.name == "/Round")
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)

    def speak(self, text: str, speed: float, seed: int) -> Speech:
        """See `Voice.speak`; the noise part of the voice follows `seed`."""
        pieces: list[Floats] = []
        phonemes: list[Phoneme] = []
        rate, offset = 24000, -_HIBARI_LABEL_DELAY_S
        for spoken in self._front.phonemize(text):
            symbols = "".join(mark for mark in spoken if mark in self._front.vocab)
            ids = self._front.ids(symbols)
            feed = {"ids": np.array([ids], np.int64), "speed": np.array([speed], np.float32)}
            *parts, frames = self._session.run(None, feed)
            wave_form = self._dsp.synth(*(part[0] for part in parts), np.random.default_rng(seed))
            edges = np.concatenate([[0.0], np.cumsum(frames.reshape(-1) * _HIBARI_FRAME_S)]) + offset
            if len(edges) != len(symbols) + 3:
                raise RuntimeError(f"hibari gave {len(edges) - 1} durations for {len(symbols) + 2} symbols")
            edges = np.maximum(edges, 0)
            for mark, start, end in zip(f"_{symbols}_", edges[:-1], edges[1:], strict=True):
                phonemes.append(Phoneme(symbol=mark, start_s=float(start), end_s=float(end)))
            pieces.append(np.asarray(wave_form, np.float32))
            offset += len(wave_form) / rate
        return Speech(samples=np.concatenate(pieces), sample_rate=rate, phonemes=phonemes)


def vary(speech: Speech, factor: float) -> Speech:
    """Play `factor` times faster (pitch and formants rise too) and resample to 16 kHz."""
    source = round(speech.sample_rate * factor / 100) * 100
    common = gcd(source, SAMPLE_RATE)
    samples = resample_poly(speech.samples, SAMPLE_RATE // common, source // common).astype(np.float32)
    scale = speech.sample_rate / source
    phonemes = [replace(p, start_s=p.start_s * scale, end_s=p.end_s * scale) for p in speech.phonemes]
    return Speech(samples=samples, sample_rate=SAMPLE_RATE, phonemes=phonemes)


class Cast:
    """All voices at hand; `draw` picks one with random parameters."""

    def __init__(self) -> None:
        self._hibari = HibariVoice()

    def draw(self, rng: np.random.Generator, languages: tuple[str, ...]) -> tuple[Voice, float]:
        """A voice and its `vary` factor."""
        kind = rng.random()
        if kind < 0.38:
            return self._hibari, float(rng.uniform(0.76, 1.12))
        if kind < 0.66:
            speaker = str(rng.choice(["slt", "rms", "awb", "kal16"], p=[0.35, 0.3, 0.25, 0.1]))
            return FliteVoice(speaker), float(rng.uniform(0.85, 1.18))
        language = "en" if rng.random() < 0.35 else str(rng.choice(languages))
        base = str(rng.choice(["en-us", "en"])) if language == "en" else language
        tail = str(rng.choice(["", "+m1", "+m2", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5"]))
        pitch, spread = int(rng.integers(25, 75)), int(rng.integers(30, 75))
        return EspeakVoice(base + tail, language, pitch, spread), float(rng.uniform(0.88, 1.14))
