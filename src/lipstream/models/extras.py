"""Libraries that only some networks need, imported when such a network is built and not before.

transformers = require_transformers()
"""

from __future__ import annotations

import importlib
from typing import Any

OLDEST_TRANSFORMERS = 5


def require_transformers() -> Any:
    """The `transformers` package, which holds the networks of the official speech and text encoders.

    Raises:
        ValueError: it is not installed, or too old; the message names the command that helps.
    """
    fix = f"run  pip install 'transformers>={OLDEST_TRANSFORMERS}'"
    try:
        package = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"the official speech and text encoders need transformers: {fix}") from error
    version = str(package.__version__)
    if int(version.split(".")[0]) < OLDEST_TRANSFORMERS:
        raise ValueError(f"transformers {version} is too old for the official encoders: {fix}")
    return package
