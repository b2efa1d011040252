"""What a batch of lip-syncs is asked for: a CSV or JSON-lines manifest, or a folder of videos and one of speech.

Columns `video`, `audio` and `output`, and any field of `SyncOptions`; relative paths count from the manifest's folder.
Column `voices` holds what `--voice` takes, several with ; between them: right=b.wav; who.png=c.wav

    video,audio,output,length,crf
    talk.mp4,hello.wav,out/hello.mp4,,
    talk.mp4,bye.wav,out/bye.mp4,loop,18
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lipstream.batch.columns import ColumnError, field_names, read_fields
from lipstream.media.opening import MediaError, open_media
from lipstream.media.writer import MUXERS
from lipstream.options import SyncOptions
from lipstream.speaker import parse_speaker

PATHS = ("video", "audio", "output")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One lip-sync: two files in, one out, by their full names. `line` of the manifest, 0 for items of folders."""

    video: Path
    audio: Path
    output: Path
    options: SyncOptions = field(default_factory=SyncOptions)
    line: int = field(default=0, compare=False)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All files that it reads: also the other voices, and the pictures that name speakers."""
        pictures = [parse_speaker(who).path for who in (self.options.speaker, *(who for who, _ in self.options.voices))]
        return (self.video, *self.sounds, *(picture for picture in pictures if picture is not None))

    @property
    def sounds(self) -> tuple[Path, ...]:
        """The speech of every voice, the main one first."""
        return (self.audio, *(Path(file) for _, file in self.options.voices))


class ManifestError(ValueError):
    """A manifest that cannot be used: the first problem in one line, all of them in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)


def read_manifest(path: Path) -> list[Item]:
    """The items of a manifest, in its order.

    Raises:
        ManifestError: with line, column, value and fix of everything that is wrong.
    """
    problems: list[str] = []
    items: list[Item] = []
    outputs: dict[str, int] = {}
    for line, row in _rows(path):
        unknown = _unknown(row)
        if unknown:
            problems.append(f"{path}: line {line}: {unknown}")
            continue
        try:
            item = _item(path.parent.absolute(), line, row)
        except ColumnError as error:
            problems.append(f"{path}: line {line}, column {error.column}: {error.problem}")
            continue
        except ValueError as error:
            problems.append(f"{path}: line {line}: {error}")
            continue
        key = os.path.abspath(item.output)
        if key in outputs:
            text = f"'{row['output']}' is the output of line {outputs[key]} already; name another"
            problems.append(f"{path}: line {line}, column output: {text}")
            continue
        outputs[key] = line
        items.append(item)
    for item in _reused(items):
        text = f"'{item.output}' is an input too; name another file"
        problems.append(f"{path}: line {item.line}, column output: {text}")
    if problems:
        raise ManifestError(problems)
    if not items:
        raise ManifestError([f"{path}: holds no items; give it a line for each, with {', '.join(PATHS)}"])
    return items


def pair_folders(videos: Path, audios: Path, out: Path, options: SyncOptions | None = None) -> list[Item]:
    """Items of two folders: files of the same stem belong together. One speech for all: give the file itself.

    Raises:
        ManifestError: a video without a speech or the other way round, two of one stem, a result in an input's place.
    """
    problems: list[str] = []
    videos, audios, out = videos.absolute(), audios.absolute(), out.absolute()
    pictures = _by_stem(videos, VIDEO_SUFFIXES, problems)
    speech = dict.fromkeys(pictures, audios) if audios.is_file() else _by_stem(audios, AUDIO_SUFFIXES, problems)
    for stem in sorted(pictures.keys() ^ speech.keys()):
        here, there = (pictures, audios) if stem in pictures else (speech, videos)
        problems.append(f"{here[stem]}: {there} has no file named {stem}.*; add it or take this one away")
    if not pictures and not problems:
        problems.append(f"{videos}: holds no videos ({', '.join(VIDEO_SUFFIXES)}); name another folder")
    if problems:
        raise ManifestError(problems)
    options = options or SyncOptions()
    items = [
        Item(video=pictures[stem], audio=speech[stem], output=out / f"{stem}{_suffix(pictures[stem])}", options=options)
        for stem in sorted(pictures)
    ]
    eaten = _reused(items)
    if eaten:
        raise ManifestError([f"{item.output}: is an input too; name another folder for the results" for item in eaten])
    return items


def check_inputs(items: list[Item]) -> dict[Item, str]:
    """What is wrong with the input files of items, by opening each; empty if nothing is."""
    wrong: dict[Item, str] = {}
    seen: dict[tuple[Path, str], str] = {}
    for item in items:
        for path, need in ((item.video, "video"), *((sound, "audio") for sound in item.sounds)):
            if (path, need) not in seen:
                try:
                    open_media(path, need="video" if need == "video" else "audio").close()
                    seen[path, need] = ""
                except MediaError as error:
                    seen[path, need] = str(error)
            if seen[path, need]:
                wrong.setdefault(item, seen[path, need])
    return wrong


def _suffix(video: Path) -> str:
    """The result's type: the video's own where it can be written."""
    suffix = video.suffix.lower()
    return suffix if suffix in MUXERS else ".mp4"


def _by_stem(folder: Path, suffixes: tuple[str, ...], problems: list[str]) -> dict[str, Path]:
    if not folder.is_dir():
        problems.append(f"{folder}: no such folder; check the name")
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.stem in found:
            problems.append(f"{path}: {found[path.stem].name} has the same stem; rename one or use a manifest")
            continue
        found[path.stem] = path
    return found


def _unknown(names: Iterable[Any]) -> str:
    """What is wrong with the columns' names; empty where nothing is."""
    columns = (*PATHS, *field_names(SyncOptions))
    unknown = [str(name) for name in names if name not in columns]
    return f"unknown column '{unknown[0]}'; known are {', '.join(columns)}" if unknown else ""


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of every item, blank lines left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ManifestError([f"{path}: is not UTF-8 text; save it as UTF-8"]) from None
    except OSError as error:
        raise ManifestError([f"{path}: cannot be read ({error.strerror}); check the name"]) from None
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _json_rows(path, text)
    else:
        raise ManifestError([f"{path}: a manifest ends in .csv or .jsonl, this one in '{suffix}'; rename it"])


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(text.splitlines(keepends=True), skipinitialspace=True)
    header: list[str] | None = None
    for cells in _parsed(path, reader):
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            missing = [name for name in PATHS if name not in header]
            if missing:
                found = ", ".join(header)
                text = f"has no column '{missing[0]}' (only {found}); name it in the first line"
                raise ManifestError([f"{path}: line {reader.line_num}: {text}"])
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise ManifestError(
                    [f"{path}: line {reader.line_num}: column '{twice[0]}' is named twice; take one away"]
                )
            unknown = _unknown(header)
            if unknown:
                raise ManifestError([f"{path}: line {reader.line_num}: {unknown}"])
            continue
        if len(cells) > len(header):
            raise ManifestError(
                [f"{path}: line {reader.line_num}: has {len(cells)} values for {len(header)} columns; quote commas"]
            )
        yield reader.line_num, dict(zip(header, cells, strict=False))


def _parsed(path: Path, reader: Any) -> Iterator[list[str]]:
    """The lines of a CSV reader, its errors with the line."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"cannot be read as CSV ({error}); check its quotes"
            raise ManifestError([f"{path}: line {reader.line_num}: {problem}"]) from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError([f"{path}: line {number}: is not JSON ({error}); one object per line"]) from None
        if not isinstance(row, dict):
            raise ManifestError([f'{path}: line {number}: is not an object; write {{"video": ...}}'])
        yield number, row


def _item(folder: Path, line: int, row: dict[str, Any]) -> Item:
    paths = {}
    for name in PATHS:
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ColumnError(name, "is empty; name a file")
        if not isinstance(value, str):
            raise ColumnError(name, f"'{value}' is not text; name a file")
        paths[name] = folder / value.strip()
    output = paths["output"]
    if output.suffix.lower() not in MUXERS:
        raise ColumnError("output", f"'{row['output']}' has no type that can be written; end it in {', '.join(MUXERS)}")
    for name in ("video", "audio"):
        if not paths[name].is_file():
            raise ColumnError(name, f"'{row[name]}' is not a file ({paths[name]}); check the name")
    return Item(**paths, options=_placed(folder, read_fields(SyncOptions, row)), line=line)


def _placed(folder: Path, options: SyncOptions) -> SyncOptions:
    """The options with the files that they name where the manifest means them."""

    def placed(column: str, name: str) -> str:
        if not (folder / name).is_file():
            raise ColumnError(column, f"'{name}' is not a file ({folder / name}); check the name")
        return str(folder / name)

    def person(column: str, who: str) -> str:
        picture = parse_speaker(who).path
        return who if picture is None else placed(column, str(picture))

    voices = tuple((person("voices", who), placed("voices", file)) for who, file in options.voices)
    return replace(options, speaker=person("speaker", options.speaker), voices=voices)


def _reused(items: list[Item]) -> list[Item]:
    """Items whose output is an input: the batch would eat its own sources."""
    inputs = {os.path.realpath(source) for item in items for source in item.inputs}
    return [item for item in items if os.path.realpath(item.output) in inputs]
