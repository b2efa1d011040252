"""Speech rows of the full-size engine: whole file and window, against the features themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from lipstream.fullsize_speech import FileRows, WindowedRows
from lipstream.models.wav2vec_windowed import WindowConfig, WindowedSpeechFeatures, window_of
from wav2vec_networks import random_features

Read = Callable[[int], np.ndarray]


class Source:
    """A stream that remembers how much was asked of it, and never gives more than a second at once."""

    def __init__(self, samples: torch.Tensor) -> None:
        self.samples, self.given = samples[0].numpy(), 0

    def read(self, count: int) -> np.ndarray:
        part = self.samples[self.given : self.given + min(count, 16_000)]
        self.given += len(part)
        return part


def test_rows_of_a_file_are_the_offline_ones_and_the_last_one_is_held() -> None:
    features, samples = random_features(), torch.randn(1, 10_000) * 0.1
    parts = iter([samples[0, :4_000].numpy(), samples[0, 4_000:].numpy(), np.zeros(0, np.float32)])
    rows = FileRows(features, lambda count: next(parts))
    expected = features(samples, 16)[0]
    torch.testing.assert_close(rows(0, 9), expected[:9])
    torch.testing.assert_close(rows(9, 21), torch.cat([expected[9:], expected[-1:].expand(5, -1)]))


def test_windowed_rows_are_the_windows_and_no_more_is_heard_than_it_looks_ahead() -> None:
    features, samples, window = random_features(), torch.randn(1, 640 * 50 - 77) * 0.1, WindowConfig(lookahead_rows=3)
    expected = WindowedSpeechFeatures(features, window)(samples)[0]
    assert expected.shape[0] == 50
    source = Source(samples)
    rows = WindowedRows(features, source.read, window)
    for start, stop in ((0, 9), (9, 21), (21, 33)):
        torch.testing.assert_close(rows(start, stop), expected[start:stop], atol=1e-5, rtol=0)
        assert source.given == (stop + 3) * 640
    torch.testing.assert_close(rows(33, 45), expected[33:45], atol=1e-5, rtol=0)
    held = torch.cat([expected[45:], expected[-1:].expand(7, -1)])
    torch.testing.assert_close(rows(45, 57), held, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows(57, 69), expected[-1:].expand(12, -1), atol=1e-5, rtol=0)


def test_takes_may_begin_anywhere() -> None:
    """After a cut, chunks end within the window's: its own next end is waited for, rows of a gap are skipped."""
    features, samples, window = random_features(), torch.randn(1, 640 * 60) * 0.1, WindowConfig(lookahead_rows=2)
    expected, source = WindowedSpeechFeatures(features, window)(samples)[0], Source(samples)
    rows = WindowedRows(features, source.read, window)
    torch.testing.assert_close(rows(4, 13), expected[4:13], atol=1e-5, rtol=0)
    assert source.given == (21 + 2) * 640
    torch.testing.assert_close(rows(40, 52), expected[40:52], atol=1e-5, rtol=0)


def test_empty_speech_and_impossible_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="speech is empty"):
        WindowedRows(random_features(), lambda count: np.zeros(0, np.float32), WindowConfig())(0, 9)
    assert [window_of(seconds).lookahead_rows for seconds in (0, 0.04, 0.05, 0.2, 1)] == [0, 1, 2, 5, 25]
    for wrong in (-0.1, 61, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="look-ahead must be 0 to 60 seconds"):
            window_of(wrong)
    assert [WindowConfig().heard_rows(rows) for rows in (0, 1, 9, 10, 21, 22)] == [0, 14, 14, 26, 26, 38]
