"""Child process that speaks one text with espeak-ng: PCM on standard output, phoneme times as JSON on standard error.

A process of its own for every sentence: the library keeps random state from one call to the next, so speech in one
long process would depend on everything said before. Uses the standard library only and starts in about 30 ms.
Run: `python espeak_child.py VOICE RATE PITCH RANGE < text`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_RETRIEVAL, _PHONEME_EVENTS, _PHONEME_IPA, _UTF8 = 2, 1, 2, 1
_EVENT_END, _EVENT_PHONEME = 0, 7
_PARAMETERS = {"rate": 1, "pitch": 3, "range": 4}
_BUFFER_MS = 200


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


def main(voice: str, rate: str, pitch: str, spread: str) -> int:
    """Speak; returns 1 with a message when the voice is not known."""
    library = ctypes.CDLL("libespeak-ng.so.1")
    sample_rate = library.espeak_Initialize(_RETRIEVAL, _BUFFER_MS, None, _PHONEME_EVENTS | _PHONEME_IPA)
    pcm = bytearray()
    events: list[tuple[str, float]] = []

    def receive(samples: Any, count: int, reported: Any) -> int:
        if samples and count > 0:
            pcm.extend(ctypes.string_at(samples, 2 * count))
        i = 0
        while reported[i].type != _EVENT_END:
            if reported[i].type == _EVENT_PHONEME:
                events.append((reported[i].id.string.decode("utf8", "ignore"), reported[i].audio_position_ms / 1000))
            i += 1
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))
    callback = kind(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.stderr.write(f"espeak-ng knows no voice {voice!r}")
        return 1
    for name, value in (("rate", rate), ("pitch", pitch), ("range", spread)):
        library.espeak_SetParameter(_PARAMETERS[name], int(value), 0)
    text = sys.stdin.buffer.read()
    library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    sys.stdout.buffer.write(pcm)
    sys.stderr.write(json.dumps({"sample_rate": sample_rate, "events": events}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
