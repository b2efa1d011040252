"""The text memory's padding, merged exactly: n equal keys are one key whose logit is raised by log n.

A prompt of 30 rows stands in a context of 512 whose other rows are zeros. They are attended (spec 1.5), and after the
text embedding they are all the same, so that nine tenths of the text attention repeat one product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_padding(text: Tensor, text_len: int) -> tuple[Tensor, Tensor | None]:
    """Rows [B, K, text_dim] that stand for text [B, L, text_dim] padded with zeros to text_len, and their bias [K].

    A row counts as padding if it and all behind it are zero in every sample; bias None means that nothing was merged.

    Raises:
        ValueError: more than text_len rows.
    """
    missing = text_len - text.shape[1]
    if missing < 0:
        raise ValueError(f"text has {text.shape[1]} rows, the network takes {text_len}")
    used = text.shape[1]
    if not text.is_meta:
        filled = text.ne(0).any(dim=-1).any(dim=0).nonzero()
        used = int(filled.max()) + 1 if len(filled) else 0
    biases = repeated_key_bias(text_len - used, text.dtype)
    if len(biases) >= text_len - used:
        return F.pad(text, (0, 0, 0, missing)), None
    bias = torch.zeros(used + len(biases), dtype=text.dtype, device=text.device)
    bias[used:] = torch.tensor(biases, device=text.device)
    return F.pad(text[:, :used], (0, 0, 0, len(biases))), bias


def repeated_key_bias(count: int, dtype: torch.dtype) -> list[float]:
    """Biases b of the keys that stand for `count` equal ones: sum of exp(b) = count.

    One is enough in float32. Half precision knows log 500 to 1.5 % of the weight only: there a second key, 20 times
    lighter, stands for what the rounding left, and leaves less than 0.1 %.
    """
    if count == 0:
        return []
    if torch.finfo(dtype).eps < 1e-6:
        return [math.log(count)]
    coarse = float(torch.tensor(math.log(0.95 * count), dtype=dtype))
    rest = float(torch.tensor(math.log(count - math.exp(coarse)), dtype=dtype))
    return [coarse, rest]
