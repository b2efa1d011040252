"""Speech with phoneme times from three families of voices: hibari (neural), flite and espeak-ng.

Each `Voice.speak` returns mono samples and timed phonemes. Variety comes from the voices, their parameters and
`vary`, which plays a voice faster or slower so that pitch, formants and tempo move together.
"""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
import tempfile
import wave
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.signal import resample_poly

from lipstream.data.synthetic.visemes import Phoneme

Floats = npt.NDArray[np.float32]
log = logging.getLogger(__name__)

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
                samples = np.frombuffer(audio.readframes(audio.getnframes()), np.int16).astype(np.float32) / 32768
        phonemes, start = [], 0.0
        for symbol, end in re.findall(r"(\S+):([\d.]+)", said.stdout):
            phonemes.append(Phoneme(symbol=symbol, start_s=start, end_s=float(end), alphabet="arpabet"))
            start = float(end)
        if not phonemes:
            raise RuntimeError(f"flite printed no phoneme times for {text!r}")
        return Speech(samples=samples, sample_rate=rate, phonemes=phonemes)


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]  # noqa: RUF012


class _Event(ctypes.Structure):
    _fields_ = [  # noqa: RUF012
        ("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("id", _EventId),
    ]  # fmt: skip


class Espeak:
    """The espeak-ng library of the system (one per process)."""

    _RETRIEVAL, _PHONEME_EVENTS, _PHONEME_IPA, _UTF8, _PHONEME = 1, 1, 2, 1, 7
    _RATE, _PITCH, _RANGE = 1, 3, 4

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self.sample_rate = int(self._library.espeak_Initialize(2, 0, None, self._PHONEME_EVENTS | self._PHONEME_IPA))
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng could not be initialised: are its data files installed?")
        self._chunks: list[Floats] = []
        self._events: list[tuple[str, float]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = kind(self._receive)  # kept alive as long as the library may call it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if count > 0 and samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float32) / 32768)
        i = 0
        while events[i].type != 0:
            if events[i].type == self._PHONEME:
                name = events[i].id.string.decode("utf8", "ignore")
                self._events.append((name, events[i].audio_position / 1000))
            i += 1
        return 0

    def say(self, text: str, voice: str, *, rate: int, pitch: int, spread: int) -> Speech:
        """Speak with a voice name such as `en-us+f3`; rate in words per minute, pitch and spread 0..100."""
        self._chunks, self._events = [], []
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng knows no voice {voice!r}")
        for parameter, value in ((self._RATE, rate), (self._PITCH, pitch), (self._RANGE, spread)):
            self._library.espeak_SetParameter(parameter, value, 0)
        raw = text.encode()
        self._library.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.float32)
        edges = [at for _, at in self._events[1:]] + [len(samples) / self.sample_rate]
        phonemes = [Phoneme(symbol=s, start_s=a, end_s=b) for (s, a), b in zip(self._events, edges, strict=True)]
        return Speech(samples=samples, sample_rate=self.sample_rate, phonemes=phonemes)


class EspeakVoice(Voice):
    """An espeak-ng voice with its own pitch and intonation."""

    def __init__(self, library: Espeak, variant: str, language: str, pitch: int, spread: int) -> None:
        self.name, self.language = f"espeak-{variant}", language
        self._library, self._variant, self._pitch, self._spread = library, variant, pitch, spread

    def speak(self, text: str, speed: float, seed: int) -> Speech:
        """See `Voice.speak`; espeak-ng has no random part."""
        return self._library.say(text, self._variant, rate=round(165 * speed), pitch=self._pitch, spread=self._spread)


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
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

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
            for mark, start, end in zip(f"_{symbols}_", np.maximum(edges[:-1], 0), np.maximum(edges[1:], 0), strict=True):
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
        self._hibari, self._espeak = HibariVoice(), Espeak()

    def draw(self, rng: np.random.Generator, languages: tuple[str, ...]) -> tuple[Voice, float]:
        """A voice and its `vary` factor."""
        kind = rng.random()
        if kind < 0.38:
            return self._hibari, float(rng.uniform(0.76, 1.12))
        if kind < 0.66:
            return FliteVoice(str(rng.choice(["slt", "rms", "awb", "kal16"], p=[0.35, 0.3, 0.25, 0.1]))), float(rng.uniform(0.85, 1.18))
        language = "en" if rng.random() < 0.35 else str(rng.choice(languages))
        base = str(rng.choice(["en-us", "en-gb"])) if language == "en" else language
        tail = str(rng.choice(["", "+m1", "+m2", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5"]))
        pitch, spread = int(rng.integers(25, 75)), int(rng.integers(30, 75))
        return EspeakVoice(self._espeak, base + tail, language, pitch, spread), float(rng.uniform(0.88, 1.14))
