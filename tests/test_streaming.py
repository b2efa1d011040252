"""The streaming contract and its property: any chunking gives what one call gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lipstream.models.dit import AudioPack
from lipstream.streaming import StreamingModule


@pytest.mark.parametrize("pieces", [[1, 4, 4, 4, 4, 4], [9, 12], [5, 8, 8], [21]])
def test_audio_pack_any_chunking(pieces: list[int]) -> None:
    torch.manual_seed(0)
    pack = AudioPack(6, 8).requires_grad_(False)
    features = torch.randn(2, 21, 6)
    whole = pack(features)
    assert whole.shape == (2, 6, 8)
    with pack.streaming(2):
        parts = [pack(piece) for piece in features.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert not pack.is_streaming and torch.equal(pack(features), whole)


def test_audio_pack_rows() -> None:
    """81 rows make 21 latent frames; frame 0 reads row 0 four times, frame k rows 4k-3 ... 4k."""
    pack = AudioPack(1, 4).requires_grad_(False)
    pack.proj.weight.copy_(torch.eye(4))
    pack.proj.bias.zero_()
    pack.norm_out = nn.Identity()  # type: ignore[assignment]
    out = pack(torch.arange(81.0).reshape(1, 81, 1))
    assert out.shape == (1, 21, 4)
    assert out[0, 0].tolist() == [0, 0, 0, 0] and out[0, 20].tolist() == [77, 78, 79, 80]


def test_audio_pack_refuses_ragged_rows() -> None:
    pack = AudioPack(2, 4)
    for rows in (0, 2, 4, 80):
        with pytest.raises(ValueError, match=f"got {rows}"):
            pack(torch.zeros(1, rows, 2))
    with pack.streaming(1):
        pack(torch.zeros(1, 5, 2))
        with pytest.raises(ValueError, match="got 5"):
            pack(torch.zeros(1, 5, 2))


@dataclass
class _SumState:
    total: Tensor
    history: list[int]


class _RunningSum(StreamingModule[_SumState]):
    def _init_state(self, batch: int) -> _SumState:
        return _SumState(torch.zeros(batch), [])

    def forward(self, x: Tensor) -> Tensor:
        state = self.state_or_fresh(len(x))
        out = state.total[:, None] + x.cumsum(1)
        state.total = out[:, -1]
        state.history.append(x.shape[1])
        return out


def test_snapshot_restore_reset_through_the_tree() -> None:
    tree = nn.Sequential(_RunningSum(), nn.Identity(), _RunningSum())

    class Container(StreamingModule[None]):
        def __init__(self) -> None:
            super().__init__()
            self.tree = tree

        def forward(self, x: Tensor) -> Tensor:
            return self.tree(x)

    stream, x = Container(), torch.randn(2, 12)
    whole = stream(x)
    with stream.streaming(2):
        first = stream(x[:, :5])
        saved = stream.snapshot()
        assert sorted(saved) == ["tree.0", "tree.2"]
        second = stream(x[:, 5:])
        torch.testing.assert_close(torch.cat((first, second), 1), whole)
        stream.restore(saved)
        assert torch.equal(stream(x[:, 5:]), second)
        stream.restore(saved)  # a snapshot can be used again: restoring copies it
        assert torch.equal(stream(x[:, 5:]), second)
        stream.reset(2)
        torch.testing.assert_close(stream(x), whole)
        with pytest.raises(ValueError, match="already"):
            stream.start_streaming(2)
        with pytest.raises(ValueError, match="other"):
            stream.restore({"other": None})
    assert not stream.is_streaming
