"""A data set in the making: which videos, what was asked for, and how its parts come together.

plan = plan(videos, out, factory, settings)
plan.begin(); run_jobs(plan.jobs, ..., standing=plan.stands); plan.finish(records, 256, skipped)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lipstream.batch.jobs import Job
from lipstream.batch.manifest import VIDEO_SUFFIXES
from lipstream.batch.run import BatchConfig, file_stands
from lipstream.batch.state import Record
from lipstream.data.prepare.pack import names_of, pack, packed_names, summarise, write_summary
from lipstream.data.prepare.work import Format, PrepareFactory
from lipstream.media.opening import MediaError, open_media

SETTINGS = "prepare.json"


@dataclass(frozen=True)
class DatasetPlan:
    """The jobs of a data set and what it is made with."""

    jobs: list[Job]
    out: Path
    form: Format
    settings: dict[str, str]

    def config(self, retries: int) -> BatchConfig:
        """How its batch runs. Files in its own working folder are its own: none is a stranger's."""
        return BatchConfig(retries=retries, force=True)

    def begin(self) -> None:
        """Write the settings down, so that no run mixes others in."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")

    def stands(self, job: Job, record: Record) -> bool:
        """Whether a video is finished: its samples wait in its tar file, or are in the data set."""
        return file_stands(job, record) or self._packed.issuperset(names_of(record))

    def finish(self, records: Mapping[str, Record], shard_samples: int, skipped: Sequence[str]) -> dict[str, Any]:
        """Put the samples of finished videos into the data set; what became of everything, also in summary.json."""
        done = [record for record in records.values() if record.state == "done" and "sha256" in record.result]
        versions = {record.about["key"]: record.result["sha256"] for record in done}
        pack(self.jobs, self.out, self.form, shard_samples, versions)
        folder = self.out / "videos"
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        told = summarise(records, skipped)
        write_summary(self.out, told)
        return told

    @cached_property
    def _packed(self) -> set[str]:
        return packed_names(self.out, self.form)


def plan(videos: Sequence[Path], out: Path, factory: PrepareFactory, filters: str) -> DatasetPlan:
    """The data set of these videos; `filters` describes the filters as text.

    Raises:
        ValueError: no videos, or a folder that was made with other settings.
    """
    files = find_videos(videos)
    settings = {"format": factory.config.format, "segments": str(factory.config.segments), "filters": filters}
    known = out / SETTINGS
    if known.exists() and json.loads(known.read_text()) != settings:
        raise ValueError(f"{out}: was made with other settings ({known}); repeat them or choose another folder")
    jobs = [
        Job(
            id=str(file.absolute()),
            output=out / "videos" / f"{_key(file)}.tar",
            payload=file,
            inputs=(file,),
            about={"key": _key(file), "video": str(file)},
        )
        for file in files
    ]
    return DatasetPlan(jobs, out, factory.config.format, settings)


def find_videos(paths: Sequence[Path]) -> list[Path]:
    """Videos among files and in folders, each once, in order.

    Raises:
        ValueError: a path does not exist, or there are none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            found |= {p.resolve(): p for p in inside if p.resolve() not in found}
        elif path.is_file():
            found.setdefault(path.resolve(), path)
        else:
            raise ValueError(f"{path}: no such file or folder; check the name")
    if not found:
        raise ValueError(f"{paths[0]}: holds no videos ({', '.join(VIDEO_SUFFIXES)}); name another folder")
    return list(found.values())


def check_videos(jobs: Sequence[Job]) -> dict[str, str]:
    """What is wrong with the videos, by opening each; empty if nothing is."""
    wrong = {}
    for job in jobs:
        try:
            open_media(job.payload, need="video").close()
            open_media(job.payload, need="audio").close()
        except MediaError as error:
            wrong[job.id] = str(error)
    return wrong


def skipped_steps(factory: PrepareFactory) -> list[str]:
    """Steps of the paper's pipeline that a run leaves out, and what they would need."""
    steps = []
    if factory.sync is None or factory.sync() is None:
        steps.append("A/V offset correction and sync filter: no SyncNet given (--syncnet FILE or pocket)")
    quality = None if factory.quality is None else factory.quality()
    if quality is None:
        steps.append("picture quality filter: none chosen (--quality)")
    else:
        steps.append(
            f"HyperIQA quality filter: its network and weights are not part of lipstream; used: {quality.name}"
        )
    return steps


def _key(video: Path) -> str:
    """The name of a video's samples: its stem and a hash of where it lies, without `_`, which ends a speaker's name."""
    stem = re.sub(r"[^A-Za-z0-9-]+", "-", video.stem).strip("-") or "video"
    return f"{stem[:60]}-{hashlib.sha256(str(video.resolve()).encode()).hexdigest()[:6]}"
