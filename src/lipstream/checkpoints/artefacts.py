"""What `lipstream pull` knows: the released files with size, SHA-256, place and licence. Data; needs no torch.

Hashes are as far as they are known: of most files the public sources give the first 16 digits, of the student also
the last 21, of some nothing. What is not known is empty and said so, never guessed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NON_COMMERCIAL = "non-commercial research only"
HF = "https://huggingface.co/{repo}/resolve/main/{path}"
GITHUB = "https://raw.githubusercontent.com/{repo}/main/{path}"


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One released file.

    Attributes:
        name: path in the model's download folder.
        what: what it is for.
        bytes: exact size; None = not known.
        about_bytes: rough size where the exact one is not known.
        sha256_start, sha256_end: known digits of the hash ("" = unknown).
        repo, path, revision: where it is published; the revision as far as it is known.
        url: a pattern with {repo} and {path}; "" = not published as a single file.
        hint: how to get it where there is no url.
    """

    name: str
    what: str
    bytes: int | None = None
    about_bytes: int | None = None
    sha256_start: str = ""
    sha256_end: str = ""
    licence: str
    repo: str
    path: str
    revision: str = ""
    url: str = HF
    hint: str = ""

    @property
    def address(self) -> str:
        """Where to download it, or ""."""
        return self.url.format(repo=self.repo, path=self.path)

    @property
    def non_commercial(self) -> bool:
        """Whether its licence must be accepted by name."""
        return self.licence == NON_COMMERCIAL

    @property
    def expected_bytes(self) -> int:
        """Size for planning; 0 = unknown."""
        return self.bytes or self.about_bytes or 0

    @property
    def known(self) -> str:
        """What a copy can be checked against, in words."""
        digits = len(self.sha256_start) + len(self.sha256_end)
        size = "size" if self.bytes is not None else ""
        sha256 = f"{digits} of 64 hash digits" if digits else ""
        return " and ".join(filter(None, (size, sha256))) or "nothing"


_LIPFORCING: dict[str, Any] = {"repo": "JinhyukJang/lipforcing", "revision": "49f1f15b", "licence": "Apache-2.0"}
_WAN: dict[str, Any] = {"repo": "Wan-AI/Wan2.1-T2V-14B", "revision": "a064a6c7", "licence": "Apache-2.0"}
_BUFFALO: dict[str, Any] = {
    "licence": NON_COMMERCIAL,
    "repo": "deepinsight/insightface",
    "url": "",
    "hint": "it comes in InsightFace's model pack buffalo_l; unpack that and use --from-folder",
}


def _umt5(file: str, size: int) -> Artefact:
    path = f"google/umt5-xxl/{file}"
    return Artefact(name=path, path=path, what="tokenizer of the prompt", bytes=size, **_WAN)


MODELS: dict[str, tuple[Artefact, ...]] = {
    "lipforcing-14b": (
        Artefact(
            name="lipforcing_14b.pth", path="lipforcing_14b.pth", what="the causal student",
            bytes=28_588_528_943, sha256_start="ea9f111f374a208a", sha256_end="cda72c727a93cd43e4307", **_LIPFORCING,
        ),
        Artefact(
            name="teacher/omniavatar_ls_14b.pt", path="teacher/omniavatar_ls_14b.pt",
            what="adapter of the teacher (needs Wan2.1-T2V-14B too)",
            about_bytes=1_200_000_000, **_LIPFORCING,
        ),
        Artefact(
            name="Wan2.1_VAE.pth", path="Wan2.1_VAE.pth", what="video autoencoder", bytes=507_609_880,
            sha256_start="38071ab59bd94681", **_WAN,
        ),
        Artefact(
            name="models_t5_umt5-xxl-enc-bf16.pth", path="models_t5_umt5-xxl-enc-bf16.pth",
            what="text encoder (needed once)", bytes=11_361_920_418,
            sha256_start="7cace0da2b446bbb", **_WAN,
        ),
        _umt5("tokenizer.json", 16_837_417),
        _umt5("spiece.model", 4_548_313),
        _umt5("tokenizer_config.json", 61_728),
        _umt5("special_tokens_map.json", 6_623),
        Artefact(
            name="wav2vec2-base-960h/model.safetensors", path="model.safetensors", what="speech features",
            bytes=377_607_901, sha256_start="8aa76ab2243c8174", licence="Apache-2.0",
            repo="facebook/wav2vec2-base-960h", revision="22aad52d",
        ),
        Artefact(
            name="taew2_1.pth", path="taew2_1.pth", what="fast video autoencoder", bytes=22_678_901,
            sha256_start="d26151e76cdc2c94", licence="MIT", repo="madebyollin/taehv", revision="093b9189", url=GITHUB,
        ),
        Artefact(
            name="mask.png", path="latentsync/utils/mask.png", what="mouth mask of the parity mode", bytes=1_871,
            sha256_start="aa233251b9ff5691", licence="Apache-2.0", repo="bytedance/LatentSync", revision="a229c394",
            url=GITHUB,
        ),
        Artefact(
            name="buffalo_l/det_10g.onnx", path="det_10g.onnx", what="face detector of the parity mode",
            sha256_start="5838f7fe053675b1", **_BUFFALO,
        ),
        Artefact(
            name="buffalo_l/2d106det.onnx", path="2d106det.onnx", what="face landmarks of the parity mode",
            sha256_start="f001b856447c4138", **_BUFFALO,
        ),
    ),
}  # fmt: skip


def artefacts_of(model: str) -> tuple[Artefact, ...]:
    """The files of a model.

    Raises:
        ValueError: no such model; the names are listed.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model '{model}': files are known for {', '.join(MODELS)}")
    return MODELS[model]


def default_folder(model: str) -> Path:
    """Where a model's files go and are looked for: the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lipstream" / model
