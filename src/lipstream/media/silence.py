"""Where a speech is silent, frame by frame, with a bounded look-ahead: level against noise floor, with hysteresis.

Levels are measured per model frame (40 ms) between 100 Hz and 4 kHz, where voices are. The floor is the 10th percentile
of the past three seconds and the next half; silence is what lies near it and well below the loud parts, for at least a
quarter of a second. It is known half a second ahead, at the beginning after four seconds of samples. Steady noise or a
hum under the speech only raises the floor. Music that is as loud as the speech counts as speech: nothing happens then.

    >>> ears = SpeechEars(reader.read)
    >>> ears.read(16_000)            # samples for the speech encoder, passed on as they are
    >>> ears.quiet(0, 9)             # [9] float32, 1 = silent, with soft borders
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lipstream.media.timeline import SAMPLES_PER_MODEL_FRAME, SPEECH_RATE

Float = NDArray[np.float32]

NOTHING_DB = -62.0  # full scale: below it, there is no speech anywhere
LOUD_BELOW_DB = 32.0  # so far below the loud parts it may be speech ...
FLOOR_ABOVE_DB = 7.0  # ... if it is so far above the floor ...
LEAST_BELOW_DB = 14.0  # ... and what is nearer than this to the loud parts always is
HYSTERESIS_DB = 3.0  # louder than the threshold by so much ends a silence
FLOOR_PAST, FLOOR_AHEAD = 75, 12  # model frames
FIRST_AHEAD = 100  # at the beginning, how loud the loud parts are is learned from four seconds
LOUDNESS_FADES_DB = 0.02  # per model frame: half a dB a second
QUIETEST_SPEECH_DB = -40.0  # loud parts are taken to be at least so loud
SHORTEST = 7  # model frames of silence that count
OPENING = (0.0, 0.15, 0.35, 0.6, 0.85)  # the last frames before speech: lips part a fifth of a second before it sounds
CLOSING = (0.3, 0.65)  # and the first ones after it
_BLOCK = 25 * SAMPLES_PER_MODEL_FRAME
_BAND_HZ = (100.0, 4000.0)


def levels_db(samples: Float) -> NDArray[np.float64]:
    """Level of each whole model frame in dB of full scale, within the band of voices: [n * 640] -> [n]."""
    frames = samples.reshape(-1, SAMPLES_PER_MODEL_FRAME).astype(np.float64)
    window = np.hanning(SAMPLES_PER_MODEL_FRAME)
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    hertz = np.fft.rfftfreq(SAMPLES_PER_MODEL_FRAME, 1 / SPEECH_RATE)
    band = (hertz >= _BAND_HZ[0]) & (hertz <= _BAND_HZ[1])
    mean_square = 2 * power[:, band].sum(axis=1) / (SAMPLES_PER_MODEL_FRAME * (window**2).sum())
    return np.asarray(10 * np.log10(mean_square + 1e-12))


class SpeechEars:
    """Passes samples on to whoever reads them, and knows a little ahead of that where they are silent.

    Args:
        read: ``read(samples)`` gives the next samples (mono, 16 kHz), fewer at the end of the speech.
    """

    def __init__(self, read: Callable[[int], Float]) -> None:
        self._source = read
        self._unread = np.zeros(0, np.float32)  # heard, but not passed on yet
        self._rest = np.zeros(0, np.float32)  # heard, less than a model frame
        self._ended = False
        self._levels: list[float] = []  # of model frames from _first on
        self._first = 0
        self._silent: list[bool] = []  # of model frames from _silent_first on
        self._silent_first = 0
        self._decided = 0  # model frames below this are known to be silent or not
        self._run = 0  # silent frames in a row that end at _decided
        self._last_silent = True
        self._loud: float | None = None  # level of the loud parts, dB
        self._spoken = 0  # model frames with speech

    @property
    def mute(self) -> bool:
        """Whether all that was asked for so far (at least something) is silent."""
        return self._decided > 0 and not self._spoken

    def read(self, samples: int) -> Float:
        """The next samples of the speech, fewer at its end."""
        while len(self._unread) < samples and not self._ended:
            self._hear()
        piece, self._unread = self._unread[:samples], self._unread[samples:]
        return piece

    def quiet(self, start: int, stop: int) -> Float:
        """How silent model frames start .. stop are, [stop - start] in 0..1; frames before are forgotten."""
        raw = self._raw(start - len(CLOSING), stop + len(OPENING))
        result = np.zeros(stop - start, np.float32)
        for i in range(stop - start):
            at = i + len(CLOSING)
            if not raw[at]:
                continue
            share = 1.0
            for distance, closing in enumerate(CLOSING, 1):
                if not raw[at - distance : at].all():
                    share = min(share, closing)
                    break
            for distance, opening in enumerate(OPENING, 1):
                if not raw[at + 1 : at + 1 + distance].all():
                    share = min(share, opening)
                    break
            result[i] = share
        return result

    def _raw(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether model frames are silent; before the beginning as the first one, after the end: silent."""
        while self._decided < stop + SHORTEST and (self._decided < self._end or not self._ended):
            self._decide()
        first = self._silent_first
        flags = [
            self._silent[i - first] if i >= first and i - first < len(self._silent) else True
            for i in range(start, stop)
        ]
        if start < 0 and self._silent and first == 0:
            flags[: min(-start, len(flags))] = [self._silent[0]] * min(-start, len(flags))
        drop = max(0, start - first)
        del self._silent[:drop]
        self._silent_first += drop
        return np.array(flags, np.bool_)

    @property
    def _end(self) -> int:
        """Model frames whose level is known."""
        return self._first + len(self._levels)

    def _decide(self) -> None:
        """Decide one more frame, and turn the frames before it silent once there are enough of them."""
        at = self._decided
        while self._end <= at + FLOOR_AHEAD and not self._ended:
            self._hear()
        if at >= self._end:
            return
        if self._loud is None:
            while self._end < FIRST_AHEAD and not self._ended:
                self._hear()
            self._loud = float(np.percentile(self._levels[:FIRST_AHEAD], 92))
        window = np.array(self._levels[max(0, at - FLOOR_PAST - self._first) : at + FLOOR_AHEAD + 1 - self._first])
        floor, loud = np.percentile(window, (10, 92))
        self._loud = loud = max(loud, self._loud - LOUDNESS_FADES_DB, QUIETEST_SPEECH_DB)
        limit = min(max(floor + FLOOR_ABOVE_DB, loud - LOUD_BELOW_DB), loud - LEAST_BELOW_DB)
        level = self._levels[at - self._first]
        silent = level < max(limit + (HYSTERESIS_DB if self._last_silent else 0.0), NOTHING_DB)
        self._last_silent = silent
        self._spoken += not silent
        self._run = self._run + 1 if silent else 0
        self._silent.append(silent and self._run >= SHORTEST)
        if self._run == SHORTEST:  # the frames before it belong to the same silence
            for back in range(2, min(SHORTEST, len(self._silent)) + 1):
                self._silent[-back] = True
        self._decided += 1
        drop = max(0, at - FLOOR_PAST - self._first)
        del self._levels[:drop]
        self._first += drop

    def _hear(self) -> None:
        block = self._source(_BLOCK)
        if not len(block):
            self._ended = True
            if len(self._rest):
                block_end = np.pad(self._rest, (0, SAMPLES_PER_MODEL_FRAME - len(self._rest)))
                self._levels += levels_db(block_end).tolist()
                self._rest = self._rest[:0]
            return
        self._unread = np.concatenate([self._unread, block])
        heard = np.concatenate([self._rest, block])
        whole = len(heard) // SAMPLES_PER_MODEL_FRAME * SAMPLES_PER_MODEL_FRAME
        self._levels += levels_db(heard[:whole]).tolist()
        self._rest = heard[whole:].copy()
