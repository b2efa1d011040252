"""Rows of the official speech features, without the network: their number, and what the audio pack makes of them."""

from __future__ import annotations

import torch

from golden_model import vectors
from lipstream.models.audio_pack import AudioPack
from lipstream.models.wav2vec_features import normalise, rows_for, training_rows_for


def test_row_rules() -> None:
    cases = {(640, 1): 1, (641, 1): 2, (1, 9): 9, (64_000, 93): 100, (49_877, 69): 78, (49_877, 81): 81}
    assert {case: rows_for(*case) for case in cases} == cases
    assert [training_rows_for(frames) for frames in (30, 81, 200)] == [81, 81, 200]


def test_golden_normalisation() -> None:
    data = vectors("audio_features")
    normalised = normalise(data["in.waveform"][None])
    torch.testing.assert_close(normalised[:, ::16], data["out.normalised_waveform_every16"], atol=1e-5, rtol=0)


def test_audio_pack_takes_the_golden_rows() -> None:
    """Spec anchor 5: 81 rows are 21 latent frames; frame k sees rows 4k - 3 ... 4k, frame 0 row 0 four times."""
    data = vectors("audio_features")
    pack = AudioPack(128, 32).requires_grad_(False)
    prefix = "weights.audio_proj."
    pack.load_state_dict({key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)})
    tokens = pack(data["out.B.audio_embedding"])
    torch.testing.assert_close(tokens, data["out.pack.tokens_21x32"], atol=1e-5, rtol=0)
    table = torch.tensor([[max(0, 4 * k - 3 + j) for j in range(4)] for k in range(21)])
    assert torch.equal(table, data["out.pack.row_index_table"])
