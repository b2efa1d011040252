"""The samples of all videos to a data set: WebDataset shards, the official folders, or pocket training samples.

Every file appears complete under its name or not at all, and what is there is not written again: packing continues
after a kill. `index.jsonl` lists the samples; `summary.json` says what was dropped and why.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lipstream.batch.jobs import Job
from lipstream.batch.state import Record
from lipstream.data.prepare.work import Format
from lipstream.media.timeline import MODEL_FPS

OFFICIAL_NAMES = {"mp4": "sub_clip.mp4", "wav": "audio.wav", "txt": "prompt.txt", "json": "about.json"}


def names_of(record: Record) -> list[str]:
    """The samples that a finished video gave."""
    stretches = record.result.get("stretches", [])
    return [line["name"] for line in stretches if line.get("name") and not line["reason"]]


def packed_names(out: Path, form: Format) -> set[str]:
    """Samples that are in the data set already."""
    if form == "webdataset":
        return {name.split(".")[0] for shard in _shards(out) for name in _members(shard)}
    if form == "folders":
        return {path.name for path in (out / "samples").glob("[!.]*")}
    return {path.stem for path in out.glob("[!.]*.npz")}


def pack(
    jobs: Sequence[Job],
    out: Path,
    form: Format,
    shard_samples: int = 256,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Move the samples of finished videos (tar files at the jobs' outputs) into the data set.

    Args:
        versions: hash of each video by the key of its samples; samples of another version of it leave the data set.

    Raises:
        ValueError: shard_samples is not positive.
    """
    if shard_samples < 1:
        raise ValueError(f"a shard must hold at least 1 sample, got {shard_samples}")
    out.mkdir(parents=True, exist_ok=True)
    for left in [*out.glob(".*.part"), *(out / "samples").glob(".*.part"), *(out / "shards").glob(".*.part")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    tars = [job.output for job in jobs if job.output.exists()]
    _drop(out, form, _outdated(out, form, {**(versions or {}), **_versions(tars)}))
    there = packed_names(out, form)
    if form == "webdataset":
        _pack_shards(tars, out / "shards", there, shard_samples)
    else:
        for name, members in _samples(tars, there):
            (_place_folder if form == "folders" else _place_canvas)(out, name, members)
    _write_index(out, form)
    for tar in tars:
        tar.unlink()


def _versions(tars: Iterable[Path]) -> dict[str, str]:
    """The same of samples that wait in tar files: a killed run may have left no record of them."""
    return {
        line["name"].rpartition("_")[0]: line["source_sha256"]
        for tar in tars
        for line in _told(tar)
        if "source_sha256" in line
    }


def _outdated(out: Path, form: Format, versions: Mapping[str, str]) -> set[str]:
    """Samples that were cut from another version of their video than the one at hand now."""
    found = set()
    for line in _abouts(out, form) if versions else ():
        name: str = line["name"]
        now = versions.get(name.rpartition("_")[0])
        if now is not None and line.get("source_sha256") != now:
            found.add(name)
    return found


def _drop(out: Path, form: Format, names: set[str]) -> None:
    """Take samples out of the data set; shards that held them are written again under their names."""
    if form == "webdataset":
        for shard in _shards(out):
            if names.isdisjoint(name.split(".")[0] for name in _members(shard)):
                continue
            part = shard.with_name(f".{shard.name}.part")
            with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as new:
                for name, members in _samples([shard], names):
                    _add_sample(new, name, members)
            if _members(part):
                _name(part, shard)
            else:
                part.unlink()
                shard.unlink()
    for name in names if form == "folders" else ():
        gone = out / "samples" / f".{name}.part"
        os.replace(out / "samples" / name, gone)
        shutil.rmtree(gone)
    for name in names if form == "samples" else ():
        for suffix in ("npz", "tex.npy", "json"):  # the .npz, which makes the sample exist, first
            (out / f"{name}.{suffix}").unlink(missing_ok=True)


Members = list[tuple[str, bytes]]  # (suffix, content)


def _samples(tars: Iterable[Path], there: set[str]) -> Iterator[tuple[str, Members]]:
    """(name, files) of all samples that are not in the data set, in order."""
    for path in tars:
        with tarfile.open(path) as tar:
            name, members = "", Members()
            for member in tar:
                stem, suffix = member.name.split(".", 1)
                if stem != name and members:
                    yield name, members
                    members = []
                name = stem
                stream = tar.extractfile(member)
                if name not in there and stream is not None:
                    members.append((suffix, stream.read()))
            if members:
                yield name, members


def _pack_shards(tars: Iterable[Path], folder: Path, there: set[str], shard_samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(shard.stem) for shard in folder.glob("[!.]*.tar")), default=-1) + 1
    samples = _samples(tars, there)
    held = next(samples, None)
    while held is not None:
        target = folder / f"{number:06}.tar"
        part = target.with_name(f".{target.name}.part")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as shard:
            count = 0
            while held is not None and count < shard_samples:
                _add_sample(shard, *held)
                count += 1
                held = next(samples, None)
        _name(part, target)
        number += 1


def _add_sample(tar: tarfile.TarFile, name: str, members: Members) -> None:
    for suffix, content in members:
        about = tarfile.TarInfo(f"{name}.{suffix}")
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))


def _place_folder(out: Path, name: str, members: Members) -> None:
    """The official layout: a folder for each sample."""
    part = out / "samples" / f".{name}.part"
    part.mkdir(parents=True)
    for suffix, content in members:
        (part / OFFICIAL_NAMES[suffix]).write_bytes(content)
    os.replace(part, part.with_name(name))


def _place_canvas(out: Path, name: str, members: Members) -> None:
    """The pocket layout: the .npz last, since it makes the sample exist."""
    for suffix, content in sorted(members, key=lambda member: member[0] == "npz"):
        part = out / f".{name}.{suffix}.part"
        part.write_bytes(content)
        _name(part, out / f"{name}.{suffix}")


def unpack(out: Path) -> None:
    """Lay the samples of a data set's shards down as the official folders, beside the shards.

    What is there as it is in the shards stays; what is there in another version, or no longer in them, is replaced.
    Folders that `lipstream prepare` did not make (their description names no source) are not touched.
    """
    place = out / "samples"
    place.mkdir(exist_ok=True)
    for left in place.glob(".*.part"):
        shutil.rmtree(left)
    now = {line.pop("name"): line for line in _abouts(out, "webdataset")}
    for line in _abouts(out, "folders"):
        name = line.pop("name")
        made_here = name in now or "source_sha256" in line
        if made_here and line != {key: value for key, value in now.get(name, {}).items() if key != "shard"}:
            _drop(out, "folders", {name})
    for name, members in _samples(_shards(out), packed_names(out, "folders")):
        _place_folder(out, name, members)


def _abouts(out: Path, form: Format) -> Iterator[dict[str, Any]]:
    """Name and description of every sample of the data set."""
    if form == "webdataset":
        for shard in _shards(out):
            for line in _told(shard):
                yield {"name": line.pop("name"), "shard": f"shards/{shard.name}"} | line
    elif form == "folders":
        for path in sorted((out / "samples").glob("[!.]*/about.json")):
            yield {"name": path.parent.name} | json.loads(path.read_text())
    else:
        for path in sorted(out.glob("[!.]*.npz")):
            yield {"name": path.stem} | json.loads(path.with_suffix(".json").read_text())


def _told(path: Path) -> Iterator[dict[str, Any]]:
    """Name and description of every sample in a tar file."""
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.name.endswith(".json") else None
            if stream is not None:
                yield {"name": member.name.removesuffix(".json")} | json.load(stream)


def _write_index(out: Path, form: Format) -> None:
    lines = list(_abouts(out, form))
    if form == "folders":
        _write(out / "list.txt", "".join(f"{(out / 'samples' / line['name']).resolve()}\n" for line in lines))
    _write(out / "index.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def summarise(records: Mapping[str, Record], skipped: Sequence[str]) -> dict[str, Any]:
    """What became of all videos: counts and seconds, kept and dropped by reason; steps that were skipped."""
    stretches: Counter[str] = Counter()
    frames: Counter[str] = Counter()
    failed = {record.id: record.error for record in records.values() if record.state == "failed"}
    for record in records.values():
        for line in record.result.get("stretches", []) if record.state == "done" else []:
            stretches[line["reason"]] += 1
            frames[line["reason"]] += line["stop"] - line["start"]
    dropped = {
        reason: {"stretches": count, "seconds": frames[reason] / MODEL_FPS}
        for reason, count in stretches.most_common()
        if reason
    }
    return {
        "videos": sum(record.state == "done" for record in records.values()),
        "samples": stretches[""],
        "sample_seconds": frames[""] / MODEL_FPS,
        "dropped": dropped,
        "failed": failed,
        "skipped_steps": list(skipped),
    }


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """`summary.json` of a data set."""
    _write(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _shards(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("[!.]*.tar"))


def _members(shard: Path) -> list[str]:
    with tarfile.open(shard) as tar:
        return tar.getnames()


def _write(target: Path, text: str) -> None:
    part = target.with_name(f".{target.name}.part")
    part.write_text(text)
    _name(part, target)


def _name(part: Path, target: Path) -> None:
    """Sync a finished file to the disk and give it its name."""
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, target)
