"""Prompt embedding: the UMT5-XXL encoder of Wan 2.1 and the rows it gives the diffusion transformer (spec section 1.7).

Lip Forcing always uses one prompt, so the encoder (11 GB) is needed once at most: a `PromptEmbedding` holds its rows,
and `lipstream.checkpoints.encoders` keeps it in a file of 8 KB a token. The network is that of `transformers`.

    prompt -> cleaned -> tokens and </s>, at most 512 -> UMT5 (bf16) -> one row per token; exact zeros up to 512 rows

The diffusion transformer attends to the zero rows too: they are part of the condition. The negative prompt of guidance
is the *empty* prompt's embedding (one row, of </s>), neither zeros nor Wan's long negative text.

    encoder = load_prompt_encoder(path)                   # lipstream.checkpoints.encoders
    embedding = encoder.embed(PROMPT, load_prompt_tokenizer(folder))
    conditions = Conditions(text=embedding.padded(), ...)  # [1, 512, 4096]

Shapes: b batch, n tokens of the prompt, d width.
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.models.extras import require_transformers

PROMPT = "a person talking"
NEGATIVE_PROMPT = ""
TEXT_ROWS = 512
END_TOKEN = "</s>"

# Cleaning changes nothing but spaces in such a text, so the ftfy package is not needed for it.
_PLAIN = re.compile(r"[ -%'-~\t\r\n]*")  # printable ASCII without "&"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of a UMT5 encoder."""

    vocabulary: int = 256_384
    dim: int = 4096
    ffn: int = 10_240
    heads: int = 64
    layers: int = 24
    buckets: int = 32  # of relative positions, one table in each layer
    max_distance: int = 128
    norm_eps: float = 1e-6
    text_rows: int = TEXT_ROWS

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")


FLAVOURS: dict[str, TextConfig] = {
    "test": TextConfig(vocabulary=64, dim=16, ffn=24, heads=4, layers=2, text_rows=12),
    "official": TextConfig(),  # google/umt5-xxl, the encoder of Wan-AI/Wan2.1-T2V-14B
}


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's tokenizer sees it: broken Unicode mended, HTML entities resolved twice, spaces collapsed.

    Raises:
        ValueError: the prompt is more than plain ASCII and the ftfy package, which mends it, is missing.
    """
    if not _PLAIN.fullmatch(prompt):
        try:
            ftfy = importlib.import_module("ftfy")
        except ImportError as error:
            raise ValueError("a prompt with '&' or with letters beyond ASCII needs: pip install ftfy") from error
        prompt = html.unescape(html.unescape(str(ftfy.fix_text(prompt))))
    return re.sub(r"\s+", " ", prompt).strip()


class PromptTokenizer:
    """A `tokenizers.Tokenizer` with Wan's rules: cleaned text, </s> at the end, at most 512 tokens."""

    def __init__(self, tokenizer: Any, text_rows: int = TEXT_ROWS) -> None:
        """Takes the tokenizer over.

        Raises:
            ValueError: it does not end a text with </s>, so it is not UMT5's.
        """
        tokenizer.no_padding()
        tokenizer.enable_truncation(text_rows)
        self._tokenizer = tokenizer
        end = tokenizer.token_to_id(END_TOKEN)
        if end is None or tokenizer.encode("").ids != [end]:
            raise ValueError(f"the tokenizer does not end a text with {END_TOKEN}; take the one of google/umt5-xxl")

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of a prompt; the empty one is </s> alone."""
        ids: list[int] = self._tokenizer.encode(clean_prompt(prompt)).ids
        return ids


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptEmbedding:
    """What the diffusion transformer needs to know of a prompt.

    Attributes:
        prompt: as it was given.
        rows: [n, d], one for each token, </s> included.
        encoder: SHA-256 of the encoder's weights file; "" if unknown.
        text_rows: rows that the diffusion transformer expects.
    """

    prompt: str
    rows: Tensor
    encoder: str = ""
    text_rows: int = TEXT_ROWS

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or not 1 <= len(self.rows) <= self.text_rows:
            raise ValueError(f"a prompt has 1 to {self.text_rows} rows of equal width, got {list(self.rows.shape)}")

    def padded(self) -> Tensor:
        """[1, text_rows, d]: the rows, then exact zeros."""
        return F.pad(self.rows, (0, 0, 0, self.text_rows - len(self.rows)))[None]


class PromptEncoder(nn.Module):
    """UMT5 encoder; its tensors have the names of `transformers`' UMT5EncoderModel."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.network = _network(config)
        self.weights_sha256 = ""  # set by who loads them

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.network.shared.weight.device
        return device

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [b, n] -> [b, n, d]. No padding goes in: masked columns would not change a row."""
        rows: Tensor = self.network(input_ids=ids).last_hidden_state
        return rows

    @torch.no_grad()
    def embed(self, prompt: str, tokenize: Callable[[str], Sequence[int]]) -> PromptEmbedding:
        """Embed a prompt; rows stay on the encoder's device and in its dtype.

        Raises:
            ValueError: a token that the encoder does not have, or more tokens than rows.
        """
        ids = list(tokenize(prompt))
        if not 1 <= len(ids) <= self.config.text_rows or not 0 <= min(ids) <= max(ids) < self.config.vocabulary:
            raise ValueError(
                f"the tokenizer does not fit the encoder: {len(ids)} tokens up to number {max(ids, default=0)}, "
                f"at most {self.config.text_rows} below {self.config.vocabulary} are possible"
            )
        rows = self(torch.tensor([ids], device=self.device))
        return PromptEmbedding(
            prompt=prompt,
            rows=rearrange(rows, "1 n d -> n d"),
            encoder=self.weights_sha256,
            text_rows=self.config.text_rows,
        )


def _network(config: TextConfig) -> Any:
    """`transformers`' UMT5EncoderModel of these sizes, in evaluation mode."""
    transformers = require_transformers()
    hub = transformers.UMT5Config(
        vocab_size=config.vocabulary,
        d_model=config.dim,
        d_kv=config.dim // config.heads,
        d_ff=config.ffn,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.norm_eps,
        feed_forward_proj="gated-gelu",  # the tanh approximation
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    return transformers.UMT5EncoderModel(hub).eval()
