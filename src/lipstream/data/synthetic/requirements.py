"""Check that everything the generator needs is installed, before any work starts."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil

_MODULES = ("numba", "scipy", "hibari", "onnx", "onnxruntime")


class MissingRequirementError(RuntimeError):
    """A package or system program is missing; the message is one line that says how to get it."""


def check_requirements() -> None:
    """Raise `MissingRequirementError` unless the `synth` extra, flite and espeak-ng are installed."""
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingRequirementError(f"synthetic heads need {', '.join(missing)}: run  pip install '.[synth]'")
    programs = [] if shutil.which("flite") else ["flite"]
    try:
        ctypes.CDLL("libespeak-ng.so.1")
    except OSError:
        programs.append("espeak-ng")
    if programs:
        raise MissingRequirementError(
            f"synthetic voices need {' and '.join(programs)}: run  apt-get install {' '.join(programs)}"
        )
