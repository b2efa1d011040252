"""Which room may import which: downwards only (CONTRIBUTING.md, "Rooms")."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lipstream"

# Top floor first: a room may import what stands below it in this list, and nothing above. Modules that lie in no folder
# are rooms of their own. A new room is put in its place here; that is where its place is decided.
ROOMS = (
    "cli", "serving",
    "personal",  # evaluation and training of one person
    "batch.syncing",  # the lip-sync as a batch's work; the rest of `batch` knows no pipeline and lies far below
    "analysis",  # looks at trained networks with the samples and windows of training
    "evaluation",  # measures what all rooms below make; its SyncNet gate needs to know what training left out
    "training",
    "contact", "pipeline", "provenance",
    "fullsize_parity", "fullsize_engine", "fullsize_session", "fullsize_speech", "fullsize",
    "voices", "engines", "casting", "beginning", "session", "mouth", "inside", "manner",
    "memory", "devices", "background",
    "data",  # `prepare` runs as jobs
    "batch",  # jobs, workers, reports; a manifest's columns are the options
    "checkpoints",
    "faces",
    "options",
    "speaker", "diffusion", "models", "streaming", "media",
)  # fmt: skip
# Rooms whose list is short, and is to stay so.
ONLY = {
    "media": set(),
    "streaming": set(),
    "models": {"streaming"},
    "diffusion": {"models", "streaming"},
    "faces": {"media"},
    "checkpoints": {"models", "__version__"},
    "batch": {"media", "options", "speaker"},
    "data": {"batch", "checkpoints", "faces", "media", "options"},
}


def room_of(module: str) -> str:
    """`lipstream.batch.syncing` -> its room."""
    parts = module.split(".")[1:]
    return "batch.syncing" if parts[:2] == ["batch", "syncing"] else parts[0]


def imports() -> Iterator[tuple[str, str, Path]]:
    """(room, imported room, file) of every import inside the package, also of those inside functions."""
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE.parent).with_suffix("")
        room = room_of(".".join(place.parts))
        if room == "__init__":  # the public names
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                inside = [f"{node.module}.{name.name}" for name in node.names]
                found = inside if node.module in ("lipstream", "lipstream.batch") else [node.module or ""]
            for module in found:
                if module.startswith("lipstream.") and room_of(module) != room:
                    yield room, room_of(module), path.relative_to(PACKAGE)


def test_imports_go_downwards() -> None:
    assert len(set(ROOMS)) == len(ROOMS)
    for room, other, path in imports():
        if other == "__version__":
            continue
        assert {room, other} <= set(ROOMS), f"{path}: give {room} and {other} their places in ROOMS"
        assert ROOMS.index(room) < ROOMS.index(other), f"{path}: {room} must not import {other}, which stands above it"


@pytest.mark.parametrize("room", ONLY)
def test_low_rooms_import_little(room: str) -> None:
    found = {other: path for importer, other, path in imports() if importer == room}
    assert found.keys() <= ONLY[room], {other: str(path) for other, path in found.items() if other not in ONLY[room]}


def test_every_room_has_its_place() -> None:
    there = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    there = {name for name in there if not name.startswith("_") and name not in ("assets", "py")}
    assert there <= set(ROOMS), f"put {sorted(there - set(ROOMS))} in its place in ROOMS"
