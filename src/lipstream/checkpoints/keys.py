"""Key maps: what a foreign checkpoint calls each tensor, as a table of name patterns that is read in both directions.

A pattern is a key with placeholders: `{i}` is a whole number, `{wb}` is `weight` or `bias`, and what a placeholder
matched on one side is put in on the other. A map is a bijection or it is wrong: two keys never get one name
(`KeyMap.rename` refuses), and there and back again is the same key (tested for every format).

    OFFICIAL = KeyMap("wan", (("blocks.{i}.ffn.0.{wb}", "blocks.{i}.ffn.0.{wb}"), ...))
    OFFICIAL.to_ours("blocks.7.ffn.0.bias")
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# What wrappers put in front of every key: the official causal student, the official teacher and critic, the
# training containers {"model": {"net": ...}} once flattened (as distributed checkpoints do).
WRAPPERS = ("_core.", "model.", "net.")

_PLACEHOLDERS = {"i": r"0|[1-9]\d*", "j": r"0|[1-9]\d*", "wb": "weight|bias"}


@dataclass(frozen=True)
class KeyMap:
    """Rows of (foreign pattern, our pattern); both sides of a row hold the same placeholders."""

    name: str
    rows: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            foreign, ours = (sorted(re.findall(r"\{(\w+)\}", pattern)) for pattern in row)
            if foreign != ours or len(set(ours)) != len(ours):
                raise ValueError(f"key map {self.name}: both sides of {row} need the same placeholders, each once")

    @cached_property
    def _inward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compile(foreign), ours) for foreign, ours in self.rows]

    @cached_property
    def _outward(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_compile(ours), foreign) for foreign, ours in self.rows]

    def to_ours(self, key: str) -> str | None:
        """Our name of a foreign key, or None if the map does not know it."""
        return _translate(key, self._inward)

    def to_foreign(self, key: str) -> str | None:
        """The foreign name of one of our keys, or None if the map does not know it."""
        return _translate(key, self._outward)

    def rename(self, keys: Iterable[str]) -> dict[str, str]:
        """Our name -> foreign key for all keys that the map knows.

        Raises:
            ValueError: two keys would get the same name.
        """
        renamed: dict[str, str] = {}
        for key in keys:
            ours = self.to_ours(key)
            if ours is None:
                continue
            if ours in renamed:
                raise ValueError(f"key map {self.name}: {renamed[ours]} and {key} would both become {ours}")
            renamed[ours] = key
        return renamed


def best_map(maps: Iterable[KeyMap], keys: Iterable[str]) -> KeyMap:
    """The map that knows most of the keys, the first among equals; what it does not know is for the strict check."""
    keys = list(keys)
    return max(maps, key=lambda m: sum(m.to_ours(key) is not None for key in keys))


def wrapper_of(keys: Iterable[str]) -> str:
    """What wrappers put in front of every one of the keys, outermost first ("" = nothing)."""
    keys, prefix = list(keys), ""
    while keys:
        found = next((w for w in WRAPPERS if all(key.startswith(prefix + w) for key in keys)), None)
        if found is None:
            break
        prefix += found
    return prefix


def _compile(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    for at in range(1, len(parts), 2):
        parts[at] = f"(?P<{parts[at]}>{_PLACEHOLDERS[parts[at]]})"
    for at in range(0, len(parts), 2):
        parts[at] = re.escape(parts[at])
    return re.compile("".join(parts))


def _translate(key: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in table:
        match = pattern.fullmatch(key)
        if match is not None:
            return target.format(**match.groupdict())
    return None
