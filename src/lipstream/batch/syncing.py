"""The lip-sync as a batch's work: one loaded model per worker process.

jobs = sync_jobs(items)
summary = run_jobs(jobs, scheduler, SyncFactory(model="pocket"), state)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipstream.batch.jobs import Job, Worker
from lipstream.batch.manifest import Item
from lipstream.options import SyncOptions

if TYPE_CHECKING:
    from lipstream.pipeline import SyncReport


def sync_jobs(items: Sequence[Item]) -> list[Job]:
    """The items as jobs; an item's name is its output as the manifest says it."""
    return [
        Job(
            id=str(item.output),
            output=item.output,
            payload=item,
            wish=_wish(item.options),
            inputs=item.inputs,
            about={"line": item.line, "video": str(item.video), "audio": str(item.audio), "output": str(item.output)},
        )
        for item in items
    ]


def _wish(options: SyncOptions) -> str:
    """The options that differ from their defaults: one that a later version adds changes nothing."""
    told = {field.name: getattr(options, field.name) for field in fields(options)}
    return repr({name: value for name, value in told.items() if value != getattr(SyncOptions(), name)})


# What of a model's loading changes its results; where it runs does not.
_MATTERS = ("model", "seed", "dtype", "decoder", "mask", "speech_lookahead", "parity")


def model_of(loading: Mapping[str, Any]) -> str:
    """What all items of a batch share, as text: with another model or seed they are done again."""
    told = {name: loading.get(name) for name in _MATTERS}
    # By identity: a seed or a look-ahead of 0 is something else than none.
    return " ".join(f"{name}={value}" for name, value in told.items() if value is not None and value is not False)


@dataclass(frozen=True, kw_only=True)
class SyncFactory:
    """Makes a worker: loads the model and returns the function that syncs one item.

    Attributes:
        loading: arguments of `LipSync.from_pretrained`; `dtype` by name.
        gpus: with device "cuda", worker i takes GPU i modulo this many (0: leave the device as it is).
    """

    loading: Mapping[str, Any] = field(default_factory=dict)
    gpus: int = 0

    def __call__(self, number: int) -> Worker:
        """Load; every worker process does it once."""
        import torch

        from lipstream.faces.detect import silence_tflite
        from lipstream.pipeline import LipSync

        silence_tflite()
        loading = dict(self.loading)
        if isinstance(loading.get("dtype"), str):
            loading["dtype"] = getattr(torch, loading["dtype"])
        if loading.get("device") == "cuda" and self.gpus:
            loading["device"] = f"cuda:{number % self.gpus}"
        lipsync = LipSync.from_pretrained(**loading)

        def work(job: Job, target: Path) -> dict[str, Any]:
            item = job.payload
            return _said(lipsync(item.video, item.audio, target, options=item.options))

        return work


def _said(report: SyncReport) -> dict[str, Any]:
    return {
        "frames": report.frames,
        "synced_frames": report.synced_frames,
        "passed_through": [list(span) for span in report.passed_through],
        "seconds": round(report.seconds, 3),
        "model": report.model,
        "speakers": [asdict(choice) for choice in report.speakers],
    }
