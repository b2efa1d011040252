"""Tiny wav2vec2 networks for tests: the golden weights, and random ones."""

from __future__ import annotations

import torch
from torch import Tensor

from golden_model import vectors
from lipstream.checkpoints.keys import best_map
from lipstream.checkpoints.keys_wav2vec2 import FORMATS
from lipstream.models.wav2vec_features import FLAVOURS, Attention, SpeechFeatures


def golden_weights() -> dict[str, Tensor]:
    data = vectors("audio_features")
    return {key.removeprefix("weights.wav2vec."): value for key, value in data.items() if "weights.wav2vec." in key}


def golden_features(attention: Attention = "sdpa") -> SpeechFeatures:
    features = SpeechFeatures(FLAVOURS["test"], attention).requires_grad_(False)
    weights = golden_weights()
    names = best_map(FORMATS, weights).rename(weights)
    features.load_state_dict({ours: weights[key] for ours, key in names.items()})
    return features


def random_features(seed: int = 0) -> SpeechFeatures:
    """All parameters random, also those of the norms."""
    torch.manual_seed(seed)
    features = SpeechFeatures(FLAVOURS["test"]).requires_grad_(False)
    for parameter in features.network.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return features
