"""Manifest columns as fields of a frozen dataclass: any dataclass, so that a new option is a new column by itself.

>>> read_fields(SyncOptions, {"length": "loop", "crf": "18"})      # SyncOptions(length="loop", crf=18)
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lipstream.speaker import parse_voice

T = TypeVar("T")

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


class ColumnError(ValueError):
    """A value that its column cannot take: `column`, and `problem` with the fix."""

    def __init__(self, column: str, problem: str) -> None:
        self.column, self.problem = column, problem
        super().__init__(f"{column}: {problem}")


def field_names(kind: type[Any]) -> list[str]:
    """The columns that a dataclass gives."""
    return [field.name for field in dataclasses.fields(kind) if field.init]


def read_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance from column values: text as in CSV, or JSON values; empty text and null mean the default.

    Raises:
        ColumnError: a value of the wrong type.
        ValueError: what the dataclass itself says.
    """
    hints = get_type_hints(kind)
    given = {}
    for name in field_names(kind):
        value = values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            given[name] = convert(value, hints[name])
        except ValueError as error:
            raise ColumnError(name, str(error)) from None
    return kind(**given)


def convert(value: Any, hint: Any) -> Any:
    """One value as its type hint wants it: str, int, float, bool, Path, Literal, or one of several or None; pairs of
    text as `_pairs` reads them.

    Raises:
        ValueError: it is something else; says what is allowed.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        errors = []
        for kind in get_args(hint):
            if kind is not type(None):
                try:
                    return convert(value, kind)
                except ValueError as error:
                    errors.append(str(error))
        raise ValueError(" or ".join(errors))
    if origin is Literal:
        known = get_args(hint)
        found = [choice for choice in known if str(choice) == str(value).strip()]
        if not found:
            raise ValueError(f"'{value}' is unknown; use one of {', '.join(map(str, known))}")
        return found[0]
    if hint == tuple[tuple[str, str], ...]:
        return _pairs(value)
    return _plain(value, hint)


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """Text "WHO=FILE; WHO=FILE" as in CSV, or what JSON can say better: {"WHO": "FILE"}, or a list of "WHO=FILE"."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if not all(isinstance(text, str) and text.strip() for pair in pairs for text in pair):
            raise ValueError(f'\'{value}\' has an empty name or file; write {{"right": "b.wav"}}')
        return tuple((who.strip(), file.strip()) for who, file in pairs)
    parts = value.split(";") if isinstance(value, str) else value
    if not (isinstance(parts, list) and all(isinstance(part, str) for part in parts)):
        raise ValueError(f"'{value}' names no voices; write WHO=FILE, with ; between several")
    return tuple(parse_voice(part) for part in parts if part.strip())


def _plain(value: Any, hint: Any) -> Any:
    text = value.strip() if isinstance(value, str) else value
    if hint is bool:
        known = {True: True, False: False} | dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
        key = text.lower() if isinstance(text, str) else text
        if not isinstance(key, (str, bool)) or key not in known:
            raise ValueError(f"'{value}' is neither yes nor no; use true or false")
        return known[key]
    if hint in (int, float):
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise ValueError(f"'{value}' is not a number; use one")
        try:
            number = hint(text)
        except ValueError:
            wanted = "a whole number" if hint is int else "a number"
            raise ValueError(f"'{value}' is not {wanted}; use one") from None
        if hint is int and isinstance(text, float) and text != number:
            raise ValueError(f"'{value}' is not a whole number; use one")
        return number
    if hint in (str, Path):
        if not isinstance(text, str):
            raise ValueError(f"'{value}' is not text; put it in quotes")
        return hint(text)
    raise ValueError(f"'{value}' cannot be given in a manifest")
