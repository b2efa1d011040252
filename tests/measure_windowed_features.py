"""How far the windowed speech features are from the offline ones, by look-ahead and past.

    python tests/measure_windowed_features.py --flavour official --skip 10 --seconds 12 --speech FILE [--weights FOLDER]

Without a folder the weights are random (seed 0, initialisation of `transformers`). Such a network weighs distant speech
unlike a trained one: the figures below show that the mechanism works and what moves it, not what the released model
loses. Error: `wav2vec_windowed.relative_error` (0 equal, 1.4 unrelated), medians over the rows, after the first two
seconds unless said; "primed" with the 10 s before. Measured with that command (English speech, torch 2.13.0,
transformers 5.24.0, one CPU thread), 100 past rows, official size:

    look-ahead ms   error   p95     first 2 s   first 2 s, primed   cosine
                0   0.403   1.025   0.740       0.680               0.916
              200   0.396   1.022   0.731       0.680               0.920
              400   0.390   1.017   0.713       0.684               0.922
             1000   0.371   1.012   0.675       0.652               0.933
             2560   0.321   0.993   0.600       0.591               0.949

More than the cut context it is the statistics, which still move in a short stream and scale every row: primed with four
times the speech itself (8 s of it, 200 ms look-ahead, else the same) the error is 0.214, p95 0.267, cosine 0.976.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import lipstream
from lipstream.checkpoints.encoders import load_speech_features
from lipstream.media.speech import load_speech
from lipstream.models.audio import SAMPLE_RATE, SAMPLES_PER_ROW
from lipstream.models.wav2vec_features import FLAVOURS, SpeechFeatures, rows_for
from lipstream.models.wav2vec_windowed import WindowConfig, WindowedSpeechFeatures, agreement, relative_error

DEMO = Path(lipstream.__file__).parent / "assets" / "demo" / "speech.m4a"
# (past rows, look-ahead rows)
WINDOWS = ((100, 0), (100, 5), (100, 10), (100, 25), (100, 64), (250, 64))
SETTLED_ROWS = 50  # statistics of the first two seconds are still moving


def main() -> None:
    """Print one line for each window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavour", choices=sorted(FLAVOURS), default="official")
    parser.add_argument("--weights", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--speech", type=Path, default=DEMO)
    parser.add_argument("--skip", type=float, default=0, help="seconds of the file to skip; they prime the statistics")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.weights is None:
        features = SpeechFeatures(FLAVOURS[arguments.flavour]).requires_grad_(False)
    else:
        features = load_speech_features(arguments.weights)
    whole = torch.from_numpy(load_speech(arguments.speech))[None]
    begin, length = (round(seconds * SAMPLE_RATE) for seconds in (arguments.skip, arguments.seconds))
    earlier, speech = whole[:, :begin], whole[:, begin : begin + length]
    print(f"{speech.shape[1] / SAMPLE_RATE:.2f} s of speech, {arguments.weights or 'random weights'}")
    offline = features(speech, rows_for(speech.shape[1], 1))
    print("past rows | look-ahead ms | error median | p95   | first 2 s | first 2 s, primed | cosine | ms per chunk")
    for past, lookahead in WINDOWS:
        live = WindowedSpeechFeatures(features, WindowConfig(past_rows=past, lookahead_rows=lookahead))
        clock = time.perf_counter()
        rows = live(speech)
        chunks = 1 + -(-(rows.shape[1] - live.window.first_rows) // live.window.hop_rows)
        milliseconds = 1000 * (time.perf_counter() - clock) / chunks
        error, settled = relative_error(rows, offline)[0], slice(SETTLED_ROWS, None)
        print(
            f"{past:9} | {live.window.lookahead_ms:13.0f} | {error[settled].median():12.3f} | "
            f"{error[settled].quantile(0.95):.3f} | {error[:SETTLED_ROWS].median():9.3f} | "
            f"{primed_error(live, earlier, speech, offline):17.3f} | "
            f"{agreement(rows, offline)[0, settled].median():.4f} | {milliseconds:12.0f}",
            flush=True,
        )


def primed_error(live: WindowedSpeechFeatures, earlier: Tensor, speech: Tensor, offline: Tensor) -> float:
    """Median error of the first two seconds if the stream's statistics begin with `earlier`."""
    if not earlier.shape[1]:
        return float("nan")
    needed_rows = SETTLED_ROWS + live.window.hop_rows + live.window.lookahead_rows
    with live.streaming(batch=1):
        live.prime(earlier)
        rows = live(speech[:, : needed_rows * SAMPLES_PER_ROW])[:, :SETTLED_ROWS]
    # The spread of the whole file is the measure here too.
    padded = torch.cat([rows, offline[:, SETTLED_ROWS:]], dim=1)
    return float(relative_error(padded, offline)[0, :SETTLED_ROWS].median())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
