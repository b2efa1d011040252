"""Utterances to distil the speech encoder on: recorded voices, talking videos and synthesised speech with labels.

`lipstream.training.speech.prepare_corpus` takes the folder that this writes. Recorded speech and videos teach how real
voices sound; synthesised speech says which sound is spoken when. More real voices helped unseen ones more than more
hours of a few (docs/pocket.md).

    python -m lipstream.training.speech_corpus OUT --recordings fr=FOLDER --videos GRID/s1 --synthetic-minutes 60 \
        --text prose.txt
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.data.synthetic.sentences import LANGUAGES, sentence
from lipstream.data.synthetic.visemes import Viseme, visemes_of
from lipstream.data.synthetic.voices import Cast, Speech, vary
from lipstream.media.opening import MediaError
from lipstream.media.speech import load_speech
from lipstream.training.codec import LEFT_OUT
from lipstream.training.speech import ARTICULATIONS

log = logging.getLogger(__name__)

SAMPLE_RATE = 16_000
LABEL_SAMPLES = 160  # a label every 10 ms
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".mp4")
MIN_SECONDS, MAX_SECONDS = 0.6, 20.0
TEACHER_SECONDS = 25.0  # whisper hears 30 s, and a copy may be played 15 % slower
# Mouth classes of the renderer -> what the encoder is asked to tell apart; all others keep their name.
MERGED = {"TDN": "td", "Y": "j", "AX": "ah", "ER": "ah", "OW": "ao", "UH": "uw", "UY": "yu"}
Labels = NDArray[np.int8]


def labels_of(visemes: Iterable[Viseme], samples: int) -> Labels:
    """Articulation index of every 10 ms, silence where nothing is said: [samples / 160]."""
    labels = np.full(samples // LABEL_SAMPLES, ARTICULATIONS.index("sil"), np.int8)
    for viseme in visemes:
        first, last = (round(t * SAMPLE_RATE / LABEL_SAMPLES) for t in (viseme.start_s, viseme.end_s))
        labels[max(0, first) : last] = ARTICULATIONS.index(MERGED.get(viseme.name, viseme.name.lower()))
    return labels


def write_utterance(folder: Path, name: str, samples: NDArray[np.float32], labels: Labels | None) -> None:
    """One file as `prepare_corpus` reads it, cut to what the teacher hears; ``labels`` None: unknown."""
    samples = samples[: int(TEACHER_SECONDS * SAMPLE_RATE)]
    known = len(samples) // LABEL_SAMPLES
    labels = np.full(known, -1, np.int8) if labels is None else labels[:known]
    wav = np.clip(samples * 32768, -32768, 32767).astype(np.int16)
    partial = folder / f"{name}.partial"
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, wav=wav, cls=labels)
    partial.replace(folder / f"{name}.npz")


def recorded(paths: Sequence[Path], seconds: float = 6.0) -> Iterator[NDArray[np.float32]]:
    """The speech of files, short ones joined with pauses until they last ``seconds``, long ones cut."""
    gathered: list[NDArray[np.float32]] = []
    for path in paths:
        try:
            speech = load_speech(path)
        except MediaError as error:  # collections of prompts hold empty files
            log.warning("skipped: %s", error)
            continue
        if len(speech) < MIN_SECONDS * SAMPLE_RATE or np.sqrt(np.mean(speech**2)) < 1e-3:
            continue
        for start in range(0, len(speech), int(MAX_SECONDS * SAMPLE_RATE)):
            gathered += [speech[start : start + int(MAX_SECONDS * SAMPLE_RATE)], np.zeros(2_400, np.float32)]
            if sum(map(len, gathered)) >= seconds * SAMPLE_RATE:
                yield np.concatenate(gathered)
                gathered = []
    if gathered:
        yield np.concatenate(gathered)


def read_sentences(text: Path) -> list[str]:
    """Sentences of 4 to 25 plain words of a text file; any prose will do."""
    whole = re.sub(r"\s+", " ", text.read_text(encoding="utf-8", errors="replace"))
    found = [s.strip() for s in re.split(r"(?<=[.!?]) ", whole)]
    return [s for s in found if re.fullmatch(r"[A-Za-z ,;:'()-]+[.!?]", s) and 4 <= len(s.split()) <= 25]


def synthesised(
    cast: Cast, rng: np.random.Generator, seconds: float, prose: Sequence[str]
) -> Iterator[tuple[str, Speech]]:
    """(voice, speech at 16 kHz) until ``seconds`` were spoken; English voices also read ``prose``."""
    said = 0.0
    while said < seconds:
        voice, factor = cast.draw(rng, LANGUAGES)
        own = not prose or voice.language != "en" or rng.random() < 0.3
        text = sentence(rng, voice.language) if own else prose[int(rng.integers(len(prose)))]
        try:
            speech = vary(voice.speak(text, float(rng.uniform(0.85, 1.2)), int(rng.integers(1 << 31))), factor)
        except RuntimeError as error:  # a voice that cannot say a sentence costs that sentence only
            log.warning("%s", error)
            continue
        said += len(speech.samples) / SAMPLE_RATE
        yield voice.name, speech


def build(
    out: Path,
    recordings: dict[str, Path],
    videos: Sequence[Path],
    synthetic_minutes: float,
    text: Path | None = None,
    leave_out: Sequence[str] = LEFT_OUT,
    seed: int = 0,
) -> int:
    """Write all utterances; returns how many. Speakers or clips of ``leave_out`` become the test split.

    Raises:
        ValueError: a folder that is missing or empty, or recordings in which nothing can be heard.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    count = 0
    for name, folder in recordings.items():
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"{folder}: no recordings ({', '.join(SUFFIXES)})")
        order = rng.permutation(len(paths))
        before = count
        for number, samples in enumerate(recorded([paths[i] for i in order])):
            write_utterance(out, f"train_recorded-{name}_{number:04d}", samples, None)
            count += 1
        if count == before:
            raise ValueError(f"{folder}: {len(paths)} recordings, and nothing can be heard in any of them")
    for folder in videos:
        clips = sorted(folder.glob("*.mp4"))
        if not clips:
            raise ValueError(f"{folder}: no .mp4 files")
        for path in clips:
            held = folder.name in leave_out or f"{folder.name}_{path.stem}" in leave_out
            name = f"{'test' if held else 'train'}_grid-{folder.name}_{path.stem}"
            try:
                write_utterance(out, name, load_speech(path), None)
            except MediaError as error:
                log.warning("skipped: %s", error)
                continue
            count += 1
    if synthetic_minutes > 0:
        prose = read_sentences(text) if text is not None else []
        for number, (voice, speech) in enumerate(synthesised(Cast(), rng, 60 * synthetic_minutes, prose)):
            labels = labels_of(visemes_of(speech.phonemes), len(speech.samples))
            write_utterance(out, f"train_{voice.replace('_', '-')}_{number:05d}", speech.samples, labels)
            count += 1
    return count


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recordings", nargs="*", default=[], metavar="NAME=FOLDER", help="folders of one voice each")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], help="folders of talking clips, one speaker each")
    parser.add_argument("--synthetic-minutes", type=float, default=60.0)
    parser.add_argument("--text", type=Path, help="English prose for the synthesised voices")
    parser.add_argument("--leave-out", nargs="*", default=LEFT_OUT, help="speakers or clips for testing")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    named = [entry.partition("=") for entry in a.recordings]
    if any(not folder for _, _, folder in named):
        parser.error("--recordings takes NAME=FOLDER")
    recordings = {name: Path(folder) for name, _, folder in named}
    try:
        count = build(a.out, recordings, a.videos, a.synthetic_minutes, a.text, a.leave_out, a.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    log.info("%d utterances in %s", count, a.out)


if __name__ == "__main__":
    main()
