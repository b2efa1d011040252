"""Distillation of whisper-tiny.en into the pocket model's streaming speech encoder (`lipstream.models.audio`).

Not in the paper, which uses wav2vec2: this is how the shipped encoder was made. The teacher is a training-time
source only; nothing of it is shipped. Two steps, each safe to interrupt and to run again:

    from lipstream.training import speech
    speech.prepare_corpus(utterances, corpus, teacher_file)     # teacher features, once, at two pitches or more
    speech.train(speech.SpeechTraining(corpus=corpus, checkpoint=..., weights=...))

`utterances/` holds `<split>_<voice>_<number>.npz` (split: train or test) with `wav` int16 [n] at 16 kHz and `cls`
int8, an index into `ARTICULATIONS` for every 10 ms, -1 where unknown. Voices in `held_out` are kept for testing.

The rows have to carry what lips need, so besides the teacher's features three small heads, thrown away after
training, read from them: articulation class (closures count double), loudness and voicing. The input is augmented
(noise, babble, reverb, band limits, gain); the targets come from the clean audio.

Shapes: b batch, n samples, r rows (25 Hz), f teacher channels (two 20 ms steps of 384).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.models.audio import (
    SAMPLE_RATE,
    SAMPLES_PER_ROW,
    SpeechEncoder,
    SpeechEncoderConfig,
    load_speech_encoder,
    save_speech_encoder,
)
from lipstream.training.whisper_teacher import WhisperTeacher

logger = logging.getLogger(__name__)

CONSONANTS = ("sil", "pbm", "fv", "th", "td", "l", "sz", "sh", "r", "kg", "h", "w", "j")
VOWELS = ("iy", "ih", "eh", "ae", "aa", "ah", "ao", "uw", "yu")
ARTICULATIONS = CONSONANTS + VOWELS
LIP_WEIGHTS = {"pbm": 2.0, "fv": 2.0, "w": 1.5, "uw": 1.5, "yu": 1.5}
LABELS_PER_ROW = 4  # articulation labels come every 10 ms
PITCH_RANGE = 0.15
Array = npt.NDArray[Any]


# --- The corpus -------------------------------------------------------------------------------------------------


def prepare_corpus(utterances: Path, corpus: Path, teacher_file: Path, seed: int = 0) -> None:
    """Write each utterance's teacher features and labels at two pitches (test: one, real: four); skips what exists."""
    corpus.mkdir(parents=True, exist_ok=True)
    teacher = WhisperTeacher(teacher_file)
    for path in sorted(utterances.glob("*.npz")):
        copies = 1 if path.stem.startswith("test") else 4 if "_grid" in path.stem else 2
        # Seeded by name: an interrupted run gives the same corpus as an uninterrupted one.
        rng = np.random.default_rng([seed, *path.stem.encode()])
        for copy in range(copies):
            target = corpus / f"{path.stem}.{copy}.npz"
            if target.exists():
                continue
            with np.load(path) as file:
                wav, labels = file["wav"], file["cls"]
            spread = 0.0 if copies == 1 else PITCH_RANGE if copy else 0.03
            factor = round(100 * (1 + float(rng.uniform(-spread, spread))))
            partial = target.with_suffix(".partial.npz")
            np.savez(partial, allow_pickle=False, **_prepare(teacher, wav, labels, factor))
            partial.replace(target)


def _prepare(teacher: WhisperTeacher, wav: Array, labels: Array, speed_percent: int) -> dict[str, Array]:
    """One utterance played at `speed_percent` of its speed (pitch and formants move along), cut to whole rows."""
    samples = resample_poly(wav.astype(np.float32) / 32768, 100, speed_percent).astype(np.float32)
    rows = len(samples) // SAMPLES_PER_ROW
    samples = samples[: rows * SAMPLES_PER_ROW]
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher(torch.from_numpy(samples)).float()
    at = ((np.arange(rows * LABELS_PER_ROW) + 0.5) * speed_percent / 100).astype(int)
    return {
        "wav": (samples * 32767).clip(-32768, 32767).astype(np.int16),
        "features": features.numpy().astype(np.float16),
        "labels": labels[at.clip(max=len(labels) - 1)].reshape(rows, LABELS_PER_ROW).astype(np.int8),
        "prosody": prosody(samples).astype(np.float16),
    }


def prosody(samples: Array) -> Array:
    """[640 r] -> [r, 2]: loudness (about -1..1, log power of the row) and voicing (0..1, pitch autocorrelation)."""
    padded = np.pad(samples, (160, 160))
    windows = np.lib.stride_tricks.sliding_window_view(padded, SAMPLES_PER_ROW + 320)[::SAMPLES_PER_ROW]
    power = windows.astype(np.float64) ** 2
    loudness = (np.log10(power.mean(1) + 1e-8) + 4) / 3
    spectrum = np.abs(np.fft.rfft(windows * np.hanning(windows.shape[1]), 2048, axis=1)) ** 2
    correlation = np.fft.irfft(spectrum, axis=1)
    peak = correlation[:, SAMPLE_RATE // 400 : SAMPLE_RATE // 70].max(1) / (correlation[:, 0] + 1e-9)
    voicing = np.clip(peak, 0, 1) * (power.mean(1) > 1e-6)
    return np.stack([loudness, voicing], axis=1)


@dataclass
class Utterance:
    """One prepared utterance: samples int16 [640 r], targets [r, dims], labels [r, 4], prosody [r, 2]."""

    voice: str
    samples: Tensor
    targets: Tensor
    labels: Tensor
    prosody: Tensor

    @property
    def rows(self) -> int:
        """Its length in pixel frames."""
        return len(self.targets)


@dataclass(frozen=True)
class Projection:
    """Teacher features -> decorrelated targets: (x - mean) @ matrix; `inverse` leads back to features."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @staticmethod
    def fit(features: Tensor, dims: int) -> Projection:
        """PCA of standardised features [rows, f]; components are half whitened so that small ones count too."""
        mean, scale = features.mean(0), features.std(0) + 1e-4
        covariance = torch.cov(((features - mean) / scale).T)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0)[:dims].clamp_min(1e-6), vectors.flip(1)[:, :dims]
        gain = values**-0.25
        gain = gain / (values.sqrt().mean().sqrt())  # unit variance on average
        return Projection(mean, vectors / scale[:, None] * gain, (vectors / gain).T * scale)

    def __call__(self, features: Tensor) -> Tensor:
        """[..., f] -> [..., dims]."""
        return (features - self.mean) @ self.matrix


def load_corpus(
    corpus: Path, dims: int, held_out: Sequence[str]
) -> tuple[list[Utterance], list[Utterance], Projection]:
    """(training, test, projection); the projection is fitted to a part of the training features."""
    paths = sorted(corpus.glob("*.[0-9].npz"))
    if not paths:
        raise ValueError(f"no prepared utterances in {corpus}")
    voices = [path.stem.split("_")[1] for path in paths]
    is_test = [
        path.stem.startswith("test") or any(voice.startswith(name) for name in held_out)
        for path, voice in zip(paths, voices, strict=True)
    ]
    training_paths = [path for path, test in zip(paths, is_test, strict=True) if not test]
    sample = [torch.from_numpy(np.load(path)["features"][::2]).float() for path in training_paths[::4]]
    projection = Projection.fit(torch.cat(sample), dims)
    splits: tuple[list[Utterance], list[Utterance]] = ([], [])
    for path, voice, test in zip(paths, voices, is_test, strict=True):
        if test and not path.stem.endswith(".0"):
            continue  # the test set is heard at its own pitch
        with np.load(path) as file:
            targets = projection(torch.from_numpy(file["features"]).float())
            tensors = [torch.from_numpy(file[key]) for key in ("wav", "labels", "prosody")]
        splits[test].append(Utterance(voice, tensors[0], targets, tensors[1], tensors[2].float()))
    return *splits, projection


# --- Augmentation -----------------------------------------------------------------------------------------------


def augment(samples: Tensor, generator: torch.Generator) -> Tensor:
    """What a microphone may add to clean speech [b, n]: babble, noise, reverb, band limits, EQ, gain, clipping.

    Each row draws each kind of damage independently; the order is that of the real chain.
    """
    batch, length = samples.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, generator=generator)

    def chance(share: float) -> Tensor:
        return (torch.rand(batch, 1, generator=generator) < share).float()

    spectrum = torch.fft.rfft(samples, n=2 * length)
    bins = torch.linspace(0, SAMPLE_RATE / 2, spectrum.shape[1])
    # Reverb: exponentially decaying noise after a direct path, 0.1-0.5 s, direct to tail ratio 2 to 14 dB.
    tail_length = SAMPLE_RATE // 2
    seconds = torch.arange(tail_length) / SAMPLE_RATE
    tail = torch.randn(batch, tail_length, generator=generator) * torch.exp(-6.9 * seconds / uniform(0.1, 0.5))
    tail[:, :32] = 0
    tail = tail / tail.square().sum(1, keepdim=True).sqrt() * 10 ** (-uniform(2, 14) / 20) * chance(0.35)
    tail[:, 0] = 1
    response = torch.fft.rfft(tail, n=2 * length)
    # EQ: a tilt of up to 6 dB per octave band ratio and a broad resonance; telephone: 300-3400 Hz.
    octaves = torch.log2(bins.clamp_min(60) / 1000)
    decibels = uniform(-3, 3) * octaves * chance(0.5)
    decibels = decibels + uniform(-8, 8) * torch.exp(-((octaves - uniform(-2, 2.5)) ** 2)) * chance(0.5)
    low, high = uniform(150, 350), uniform(3_000, 4_500)
    cut = 1 / (1 + (low / bins.clamp_min(1)) ** 6) / (1 + (bins / high) ** 10)
    band = torch.where(chance(0.15) > 0, cut, torch.ones_like(cut))
    shape = 10 ** (decibels / 20) * band
    speech = torch.fft.irfft(spectrum * response * shape, n=2 * length)[:, :length]
    # Noise of a random colour (white to brown) and babble made of the other rows of the batch.
    noise_spectrum = torch.fft.rfft(torch.randn(batch, length, generator=generator))
    colour = torch.linspace(0, 1, noise_spectrum.shape[1]).clamp_min(0.005) ** -uniform(0, 1)
    noise = torch.fft.irfft(noise_spectrum * colour, n=length)
    babble = samples.roll(1, 0) + samples.roll(2, 0).flip(1) + 0.7 * samples.roll(3, 0)
    size = speech.square().mean(1, keepdim=True).sqrt() + 1e-5
    for disturbance, worst, best, share in ((noise, 3, 40, 0.6), (babble, 8, 25, 0.2)):
        level = disturbance.square().mean(1, keepdim=True).sqrt() + 1e-6
        speech = speech + disturbance / level * size * 10 ** (-uniform(worst, best) / 20) * chance(share)
    speech = speech / size * 10 ** (uniform(-38, -12) / 20)
    out: Tensor = speech.clamp(-1, 1)
    return out


# --- Training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpeechTraining:
    """What `train` needs."""

    corpus: Path
    checkpoint: Path
    weights: Path
    steps: int = 1_700
    batch: int = 12
    rows: int = 100
    target_dims: int = 160
    learning_rate: float = 1.5e-3
    warmup_steps: int = 60
    weight_decay: float = 0.02
    checkpoint_seconds: float = 120.0
    held_out: tuple[str, ...] = ("flite-awb", "espeak-sv", "espeak-hi", "espeak-fr")
    seed: int = 0
    start_from: Path | None = None  # an encoder to go on from; its heads are thrown away, so they start afresh


class Distiller(nn.Module):
    """The encoder and the heads that are thrown away after training."""

    def __init__(self, config: SpeechEncoderConfig, target_dims: int) -> None:
        super().__init__()
        self.encoder = SpeechEncoder(config)
        self.to_teacher = nn.Linear(config.width, target_dims)
        self.to_articulation = nn.Linear(config.width, len(ARTICULATIONS))
        self.to_prosody = nn.Linear(config.width, 2)
        weights = torch.tensor([LIP_WEIGHTS.get(name, 1.0) for name in ARTICULATIONS])
        self.register_buffer("class_weights", weights, persistent=False)
        self.class_weights: Tensor

    def forward(self, samples: Tensor, targets: Tensor, labels: Tensor, prosody_: Tensor) -> dict[str, Tensor]:
        """Losses of a batch; `samples` may be longer than the targets by the look-ahead."""
        rows = self.encoder(samples)[:, : targets.shape[1]]
        guess = self.to_teacher(rows).float()
        # A row may hold two articulations: its target is their mixture, weighted by what lips show of them.
        known = (labels >= 0).float()[..., None]
        share = F.one_hot(labels.clamp_min(0).long(), len(ARTICULATIONS)) * known
        share = share.sum(2) / LABELS_PER_ROW * self.class_weights
        log_probability = F.log_softmax(self.to_articulation(rows).float(), dim=-1)
        return {
            "teacher": F.mse_loss(guess, targets),
            "cosine": 1 - F.cosine_similarity(guess, targets, dim=-1).mean(),
            "articulation": -(share * log_probability).sum() / share.sum().clamp_min(1.0),
            "prosody": F.mse_loss(self.to_prosody(rows).float(), prosody_),
        }


LOSS_WEIGHTS = {"teacher": 1.0, "cosine": 0.5, "articulation": 0.3, "prosody": 0.5}


def batches(
    utterances: list[Utterance], settings: SpeechTraining, extra_rows: int, step: int
) -> Iterator[list[Tensor]]:
    """Endless batches from `step` on: utterances of evenly drawn kinds of voice, chained and cut to one length."""
    kinds = sorted({u.voice.split("-")[0] for u in utterances})
    groups = [[u for u in utterances if u.voice.split("-")[0] == kind] for kind in kinds]
    # Square root of each kind's hours: the one real speaker must not drown, nor rule.
    share = np.sqrt([sum(u.rows for u in group) for group in groups])
    while True:
        rng = np.random.default_rng([settings.seed, step])
        items = []
        for _ in range(settings.batch):
            chain: list[Utterance] = []
            while sum(u.rows for u in chain) < settings.rows + extra_rows + 25:
                group = groups[rng.choice(len(groups), p=share / share.sum())]
                chain.append(group[rng.integers(len(group))])
            begin = int(rng.integers(sum(u.rows for u in chain) - settings.rows - extra_rows + 1))
            sizes = [10 ** float(rng.uniform(-0.2, 0.2)) for _ in chain]
            samples = torch.cat([u.samples.float() / 32768 * g for u, g in zip(chain, sizes, strict=True)])
            end = begin + settings.rows
            cut = samples[begin * SAMPLES_PER_ROW : (end + extra_rows) * SAMPLES_PER_ROW]
            rows = [torch.cat([getattr(u, k) for u in chain])[begin:end] for k in ("targets", "labels", "prosody")]
            items.append([cut, *rows])
        yield [torch.stack(parts) for parts in zip(*items, strict=True)]
        step += 1


def train(settings: SpeechTraining, config: SpeechEncoderConfig, stop_at: float = math.inf) -> Distiller:
    """Train to `settings.steps`, resuming from the checkpoint if there is one; ends early at time `stop_at`.

    Writes `metrics.jsonl` and `last.pt` beside the checkpoint and, at the end, the encoder's weights.
    """
    settings.checkpoint.mkdir(parents=True, exist_ok=True)
    training, test, _ = load_corpus(settings.corpus, settings.target_dims, settings.held_out)
    logger.info("%d training utterances, %d test utterances", len(training), len(test))
    torch.manual_seed(settings.seed)
    model = Distiller(config, settings.target_dims)
    if settings.start_from is not None:
        model.encoder.load_state_dict(load_speech_encoder(settings.start_from).state_dict())
    optimiser = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, (0.9, 0.98), weight_decay=settings.weight_decay
    )
    last, step = settings.checkpoint / "last.pt", 0
    if last.exists():
        saved = torch.load(last, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
        logger.info("resumed at step %d", step)
    generator = torch.Generator()
    source = batches(training, settings, config.delay_rows, step)
    saved_at = time.monotonic()
    with (settings.checkpoint / "metrics.jsonl").open("a", buffering=1) as metrics:  # by lines
        while step < settings.steps and time.time() < stop_at:
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings)
            samples, targets, labels, prosody_ = next(source)
            # Seeded by step, like the batches: a resumed run equals an uninterrupted one.
            samples = augment(samples, generator.manual_seed(settings.seed + step))
            with torch.autocast("cpu", torch.bfloat16):
                losses = model(samples, targets, labels, prosody_)
            total = sum((LOSS_WEIGHTS[name] * value for name, value in losses.items()), torch.zeros(()))
            optimiser.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            if step % 20 == 0:
                row = {"step": step, "time": time.time(), **{k: round(v.item(), 4) for k, v in losses.items()}}
                metrics.write(json.dumps(row) + "\n")
            if time.monotonic() - saved_at > settings.checkpoint_seconds:
                _save(model, optimiser, step, last)
                saved_at = time.monotonic()
        _save(model, optimiser, step, last)
        report = evaluate(model, test)
        metrics.write(json.dumps({"step": step, "test": report}) + "\n")
    notes = {"teacher": "whisper-tiny.en encoder", "steps": str(step), "test": json.dumps(report)}
    save_speech_encoder(model.encoder, settings.weights, notes)
    return model


def schedule(step: int, settings: SpeechTraining) -> float:
    """Learning rate factor: linear warm-up, then half a cosine down to 2 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _save(model: Distiller, optimiser: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Replace the checkpoint in one go."""
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, partial)
    partial.replace(path)


# --- Measurement ------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: Distiller, test: list[Utterance]) -> dict[str, dict[str, float]]:
    """Per voice: cosine and R2 to the teacher's (projected) features, articulation accuracy, p/b/m recall."""
    model.eval()
    sums: dict[str, dict[str, float]] = {}
    for utterance in test:
        rows = model.encoder(utterance.samples.float()[None] / 32768)
        guess = model.to_teacher(rows)[0]
        error, size = (guess - utterance.targets).square().sum(), utterance.targets.square().sum()
        cosine = F.cosine_similarity(guess, utterance.targets, dim=-1).sum()
        classes = model.to_articulation(rows)[0].argmax(-1)
        # The label of a row is the articulation in its middle.
        truth = utterance.labels[:, LABELS_PER_ROW // 2].long()
        right, lips = (classes == truth), truth == ARTICULATIONS.index("pbm")
        voice = utterance.voice.split("+")[0]
        into = sums.setdefault(
            voice, dict.fromkeys(("rows", "cos", "err", "size", "known", "hit", "lips", "lip_hit"), 0.0)
        )
        counts = (
            utterance.rows,
            cosine,
            error,
            size,
            (truth >= 0).sum(),
            right.sum(),
            lips.sum(),
            (right & lips).sum(),
        )
        for key, value in zip(into, counts, strict=True):
            into[key] += float(value)
    model.train()
    report = {}
    for voice, s in sorted(sums.items()):
        report[voice] = {"cosine": s["cos"] / s["rows"], "r2": 1 - s["err"] / s["size"]}
        if s["known"]:
            report[voice] |= {"articulation": s["hit"] / s["known"], "pbm_recall": s["lip_hit"] / max(1.0, s["lips"])}
    return {voice: {key: round(value, 3) for key, value in figures.items()} for voice, figures in report.items()}
