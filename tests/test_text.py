"""Prompt rows: key map and mathematics of Wan's UMT5 file, padding, cleaning, tokenizer, embedding files."""

from __future__ import annotations

import hashlib
import math
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lipstream.checkpoints.encoders import (
    load_official_prompt_embedding,
    load_prompt_embedding,
    load_prompt_encoder,
    load_prompt_tokenizer,
    save_prompt_embedding,
)
from lipstream.checkpoints.keys_umt5 import FORMATS, TIED, WAN
from lipstream.models.dit_config import FLAVOURS as DITS
from lipstream.models.text import (
    FLAVOURS,
    NEGATIVE_PROMPT,
    PROMPT,
    PromptEmbedding,
    PromptEncoder,
    PromptTokenizer,
    clean_prompt,
)

TEST = FLAVOURS["test"]
OFFICIAL_FILE_BYTES = 11_361_920_418  # models_t5_umt5-xxl-enc-bf16.pth, spec section 0.1


def official_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the `test` size under the official file's names; no key map is involved."""
    generator = torch.Generator().manual_seed(seed)
    c = TEST
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (c.vocabulary, c.dim), "norm.weight": (c.dim,)}
    for i in range(c.layers):
        block = f"blocks.{i}."
        shapes |= {f"{block}attn.{name}.weight": (c.dim, c.dim) for name in "qkvo"}
        shapes |= {f"{block}norm1.weight": (c.dim,), f"{block}norm2.weight": (c.dim,)}
        shapes |= {f"{block}ffn.{name}.weight": (c.ffn, c.dim) for name in ("gate.0", "fc1")}
        shapes |= {f"{block}ffn.fc2.weight": (c.dim, c.ffn)}
        shapes |= {f"{block}pos_embedding.embedding.weight": (c.buckets, c.heads)}
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def independent_rows(tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The encoder written out from its description (spec section 1.7), on the official names: [n, d]."""
    c = TEST
    n, head_dim = len(ids), c.dim // c.heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors[name]

    def bucket(offset: int) -> int:
        half = c.buckets // 2
        base, distance, exact = (half if offset > 0 else 0), abs(offset), half // 2
        if distance < exact:
            return base + distance
        grown = exact + int(math.log(distance / exact) / math.log(c.max_distance / exact) * (half - exact))
        return base + min(grown, half - 1)

    buckets = torch.tensor([[bucket(key - query) for key in range(n)] for query in range(n)])
    x = tensors["token_embedding.weight"][ids]
    for i in range(c.layers):
        block = f"blocks.{i}."
        h = norm(x, block + "norm1.weight")
        q, k, v = ((h @ tensors[f"{block}attn.{a}.weight"].T).view(n, c.heads, head_dim) for a in "qkv")
        bias = tensors[block + "pos_embedding.embedding.weight"][buckets]  # [query, key, head], no scaling anywhere
        weights = (torch.einsum("qhd,khd->qkh", q, k) + bias).softmax(1)
        mixed = torch.einsum("qkh,khd->qhd", weights, v).reshape(n, c.dim)
        x = x + mixed @ tensors[block + "attn.o.weight"].T
        h = norm(x, block + "norm2.weight")
        g = h @ tensors[block + "ffn.gate.0.weight"].T
        gate = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        x = x + (gate * (h @ tensors[block + "ffn.fc1.weight"].T)) @ tensors[block + "ffn.fc2.weight"].T
    return norm(x, "norm.weight")


def tokenizer_folder(folder: Path) -> Path:
    """A small tokenizer.json made like UMT5's: pieces of words, </s> appended, <pad> 0, </s> 1."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁person", "▁talking", "▁", *"abcdefghijklmnopqrstuvwxyz<>&"]
    model = tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=20)  # what a stored tokenizer.json asks for must not matter
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    path = tmp_path / "models_t5.pth"
    torch.save(official_tensors(), path)
    return path


def test_official_file_gives_the_rows_of_its_description(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("loading opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    encoder = load_prompt_encoder(file, TEST)
    for ids in ([1], [3, 4, 5, 1], [*range(2, 13), 1]):
        rows = encoder(torch.tensor([ids]))[0]
        torch.testing.assert_close(rows, independent_rows(official_tensors(), ids), atol=1e-4, rtol=0)
    assert not any(p.is_meta or p.requires_grad for p in encoder.parameters())
    assert encoder.network.encoder.embed_tokens.weight is encoder.network.shared.weight


def test_padded_and_masked_stock_call_gives_the_same_rows(file: Path) -> None:
    """The official way: 512 tokens, a mask, rows behind the prompt set to zero."""
    encoder = load_prompt_encoder(file, TEST)
    ids = [3, 4, 5, 1]
    embedding = encoder.embed(PROMPT, lambda _: ids)
    padded = torch.zeros(1, TEST.text_rows, dtype=torch.long)
    padded[0, : len(ids)] = torch.tensor(ids)
    mask = torch.arange(TEST.text_rows)[None] < len(ids)
    stock = encoder.network(input_ids=padded, attention_mask=mask.long()).last_hidden_state
    stock = torch.where(mask[..., None], stock, 0.0)
    torch.testing.assert_close(embedding.padded(), stock, atol=1e-4, rtol=0)


def test_rows_behind_the_prompt_are_exact_zeros_and_the_negative_prompt_is_not(file: Path, tmp_path: Path) -> None:
    encoder = load_prompt_encoder(file, TEST)
    tokenize = load_prompt_tokenizer(tokenizer_folder(tmp_path), TEST)
    embedding, negative = encoder.embed(PROMPT, tokenize), encoder.embed(NEGATIVE_PROMPT, tokenize)
    assert embedding.padded().shape == (1, TEST.text_rows, TEST.dim)
    assert tokenize(PROMPT) == [3, 4, 5, 1] and torch.count_nonzero(embedding.padded()[:, 4:]) == 0
    assert tokenize(NEGATIVE_PROMPT) == [1] and negative.rows.shape == (1, TEST.dim)
    assert negative.rows.abs().max() > 0.1
    assert embedding.encoder == hashlib.sha256(file.read_bytes()).hexdigest()
    assert FLAVOURS["official"].text_rows == DITS["14b"].text_len and FLAVOURS["official"].dim == DITS["14b"].text_dim


def test_key_map_is_a_bijection_of_the_official_size() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        state = PromptEncoder(FLAVOURS["official"]).state_dict()
    names = state.keys() - TIED.keys()
    assert len(names) == 242
    for key_map in FORMATS:
        keys = {str(key_map.to_foreign(name)) for name in names}
        assert len(keys) == 242 and {key_map.to_ours(key) for key in keys} == names
    numbers = sum(state[name].numel() for name in names)
    assert numbers == 5_680_910_336
    assert 0 < OFFICIAL_FILE_BYTES - 2 * numbers < 512 * 242  # bf16 and what a .pth adds to each tensor
    assert all(WAN.to_ours(key) for key in official_tensors())


def test_bad_files_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tensors, path = official_tensors(), tmp_path / "t5.pth"
    with pytest.raises(ValueError, match="no such file"):
        load_prompt_encoder(path, TEST)
    renamed = {("blocks.0.attn.x.weight" if k == "blocks.0.attn.q.weight" else k): v for k, v in tensors.items()}
    for stored, text in (
        (renamed, r"1 missing: \S+block.0.layer.0.SelfAttention.q.weight; 1 unknown: blocks.0.attn.x.weight"),
        (tensors | {"norm.weight": torch.zeros(3)}, r"final_layer_norm.weight is \[3\], the network needs \[16\]"),
        ([1, 2], "holds no named tensors"),
    ):
        torch.save(stored, path)
        with pytest.raises(ValueError, match=text):
            load_prompt_encoder(path, TEST)
    torch.save({"norm.weight": path}, path)  # a pickle that would have to run code
    with pytest.raises(ValueError, match="it holds more than tensors"):
        load_prompt_encoder(path, TEST)


def test_bf16_file_stays_bf16(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tensors = {name: tensor.bfloat16() for name, tensor in official_tensors().items()}
    torch.save(tensors, tmp_path / "t5.pth")
    rows = load_prompt_encoder(tmp_path / "t5.pth", TEST)(torch.tensor([[3, 4, 1]]))[0]
    assert rows.dtype == torch.bfloat16
    exact = independent_rows({name: tensor.float() for name, tensor in tensors.items()}, [3, 4, 1])
    assert (rows.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [(PROMPT, PROMPT), ("", ""), ("  a \t person\r\n\ntalking ", PROMPT), ("50% of <it>", "50% of <it>")],
)
def test_plain_prompts_need_no_cleaner(prompt: str, cleaned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["caf\u00e9", "salt & pepper", "bell\x07"])
def test_other_prompts_are_never_passed_on_uncleaned(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match="pip install ftfy"):
        clean_prompt(prompt)


def test_entities_are_resolved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text))
    assert clean_prompt("a &amp;amp;lt;  b &eacute;") == "a &lt; b \u00e9"


def test_cleaner_mends_unicode_and_entities() -> None:
    ftfy = pytest.importorskip("ftfy")
    assert clean_prompt("caf\u00c3\u00a9 &amp;amp; tea\u00a0 now") == "caf\u00e9 & tea now"
    for prompt in (PROMPT, "  a \t person\r\n\ntalking ", "".join(map(chr, range(32, 127))).replace("&", "")):
        assert " ".join(ftfy.fix_text(prompt).split()) == clean_prompt(prompt)


def test_tokenizer_is_bounded_and_checked(tmp_path: Path) -> None:
    tokenizers: Any = pytest.importorskip("tokenizers")
    tokenize = load_prompt_tokenizer(tokenizer_folder(tmp_path), TEST)
    ids = tokenize("talking " * 50)
    assert len(ids) == TEST.text_rows and ids[-1] == 1 and 1 not in ids[:-1]
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="google/umt5-xxl"):
        PromptTokenizer(other)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        load_prompt_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such tokenizer"):
        load_prompt_tokenizer(tmp_path / "absent")


def test_tokenizer_of_another_vocabulary_is_refused(file: Path) -> None:
    encoder = load_prompt_encoder(file, TEST)
    for ids in ([TEST.vocabulary, 1], [], [1] * 13):
        with pytest.raises(ValueError, match="does not fit the encoder"):
            encoder.embed(PROMPT, lambda _, ids=ids: ids)


def test_embedding_file_round_trip(tmp_path: Path) -> None:
    rows = torch.randn(4, 4096).bfloat16()
    path = tmp_path / "folder" / "prompt.safetensors"
    save_prompt_embedding(PromptEmbedding(prompt=PROMPT, rows=rows, encoder="ab12"), path)
    loaded = load_prompt_embedding(path)
    assert torch.equal(loaded.rows, rows) and loaded.rows.dtype == torch.bfloat16
    assert (loaded.prompt, loaded.encoder, loaded.padded().shape) == (PROMPT, "ab12", (1, 512, 4096))
    assert path.stat().st_size < 40_000 and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="no such file"):
        load_prompt_embedding(tmp_path / "absent")
    from safetensors.torch import save_file

    save_file({"rows": rows}, path)
    with pytest.raises(ValueError, match="not a prompt embedding"):
        load_prompt_embedding(path)


@pytest.mark.parametrize("wrap", ["bare", "batch", "context", "text_emb", "prompt_emb", "anything"])
def test_official_embedding_files_are_understood(wrap: str, tmp_path: Path) -> None:
    stored = torch.zeros(512, 16)
    stored[:5] = torch.randn(5, 16)
    content: object = stored if wrap == "bare" else stored[None] if wrap == "batch" else {wrap: stored[None]}
    torch.save(content, tmp_path / "text.pt")
    embedding = load_official_prompt_embedding(tmp_path / "text.pt", PROMPT)
    assert torch.equal(embedding.rows, stored[:5]) and torch.equal(embedding.padded()[0], stored)
    assert embedding.prompt == PROMPT and embedding.encoder == ""


def test_other_official_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    torch.save({"context": torch.zeros(512, 16)}, path)
    with pytest.raises(ValueError, match="all rows are zero"):
        load_official_prompt_embedding(path, PROMPT)
    torch.save(torch.zeros(2, 512, 16), path)
    with pytest.raises(ValueError, match="holds no tensor"):
        load_official_prompt_embedding(path, PROMPT)
    with pytest.raises(ValueError, match="1 to 512 rows"):
        PromptEmbedding(prompt="", rows=torch.zeros(513, 4))
