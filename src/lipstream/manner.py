"""How a mouth is to speak: how far it moves, and what it does while the speech is silent.

>>> Manner(strength=1.2, silence="close", quiet=silence.quiet)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lipstream.options import Silence

#: How silent the speech is in model frames start .. stop: [stop - start] float32 in 0..1.
Quiet = Callable[[int, int], NDArray[np.float32]]


def never_quiet(start: int, stop: int) -> NDArray[np.float32]:
    """Speech throughout."""
    return np.zeros(stop - start, np.float32)


@dataclass(frozen=True, kw_only=True)
class Manner:
    """See the module.

    Attributes:
        strength: movement of the lips around the closed mouth; 1 is as the model has it.
        silence: "close" shuts the lips, "source" shows the source's own mouth, "model" leaves it to the model.
        quiet: where the speech is silent; never asked for "model".
    """

    strength: float = 1.0
    silence: Silence = "model"
    quiet: Quiet = never_quiet


PLAIN = Manner()
