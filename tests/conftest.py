"""For every test: one thread per worker, and no time limit per example (machines differ in speed)."""

from __future__ import annotations

import cv2
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
cv2.setNumThreads(1)
settings.register_profile("lipstream", deadline=None)
settings.load_profile("lipstream")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many damaged files `test_hostile.py` reads."""
    parser.addoption("--fuzz", type=int, default=88, help="damaged media files to read (default: 88)")
