"""`lipstream doctor`: check what the lip-sync needs on this machine and say how to put right what is missing.

$ lipstream doctor          # exit status 1 if a check failed
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lipstream.cli.common import EXIT_FAILED, EXIT_OK, add_verbose, silence_tflite, size_text
from lipstream.cli.demo import demo_files

REINSTALL = "install lipstream again: pip install --force-reinstall --no-deps lipstream"
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 9)
DISK_WARN, DISK_FAIL = 1_000_000_000, 100_000_000  # bytes
WEIGHTS = ("codec.safetensors", "dit.safetensors", "speech.safetensors")
REAL_TIME = 25.0  # frames per second
SPEED_FRAMES = 75  # 3 s of video: enough to leave the first chunk's warm-up behind
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "off": "dim"}
EXTRAS = {  # what cannot be done without them; a test compares the names with pyproject.toml
    "synth": "lipstream data synthesize: synthetic people (also needs the programs flite and espeak-ng)",
    "full": "the official sizes (1.3B, 14B) and their text encoder",
    "hub": "uploading model folders",
    "analysis": "the figures of lipstream analyze",
    "train": "LoRA training of the official sizes",
    "ray": "lipstream batch --ray: many machines",
}
LANGUAGES = (
    "any is taken: no text, only sounds. Learned from an English teacher, real voices in English, Spanish, French, "
    "Italian and Russian, synthetic ones in some 40 languages; measured on English only. Official sizes: an English "
    "encoder (wav2vec2-base-960h)"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check; `fix` is empty when all is well. `off`: not installed, and not needed for `sync`."""

    name: str
    status: Literal["ok", "warn", "fail", "off"]
    detail: str
    fix: str = ""


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the main parser's sub-parsers."""
    about = (
        "Check Python, torch, codecs, face networks, weights, disk, optional parts; measure the speed on the demo clip."
    )
    parser = subparsers.add_parser("doctor", help="check this machine and measure its speed", description=about)
    parser.add_argument("--no-speed", action="store_true", help="leave out the measured run (a few seconds)")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `lipstream doctor`; returns the exit status."""
    silence_tflite()
    table = Table("check", "status", "found", "fix", title="lipstream doctor")
    findings = list(examine(speed=not args.no_speed))
    for finding in findings:
        status = f"[{STYLES[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, status, finding.detail, finding.fix)
    console = Console()
    if not console.is_terminal:  # whole lines in a log, whatever its width
        console.width = 240
    console.print(table)
    return EXIT_FAILED if any(f.status == "fail" for f in findings) else EXIT_OK


def examine(*, speed: bool = True) -> Iterator[Finding]:
    """All checks in order; one that breaks is a failed check, the others go on."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", check_python),
        ("torch", check_torch),
        ("codecs", check_codecs),
        ("faces", check_faces),
        ("weights", check_weights),
        ("disk", check_disk),
        ("extras", check_extras),
        ("languages", check_languages),
    ]
    if speed:
        checks.append(("speed", check_speed))
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation can raise anything; the table has to show it
            detail = f"{type(error).__name__}: {error}".split("\n")[0]
            yield Finding(name=name, status="fail", detail=detail, fix=REINSTALL)


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    good = sys.version_info[:2] >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding(name="python", status="ok" if good else "fail", detail=detail, fix="" if good else f"use >= {oldest}")


def check_torch() -> Iterator[Finding]:
    """Version, threads, and whether the CPU multiplies bf16 itself."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    good = version >= OLDEST_TORCH
    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    fix = "" if good else f"pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'"
    yield Finding(name="torch", status="ok" if good else "fail", detail=detail, fix=fix)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = [name for name in ("amx_bf16", "avx512_bf16") if flags.get(name)]
    yield Finding(name="bf16", status="ok", detail=", ".join(native) or "not in this CPU's instructions; float32 runs")


def check_codecs() -> Iterator[Finding]:
    """PyAV and the encoders that the writer uses."""
    import av
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    missing = []
    for name in ("libx264", "aac"):
        try:
            Codec(name, "w")
        except UnknownCodecError:
            missing.append(name)
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    detail = f"PyAV {av.__version__}, libavcodec {libavcodec}, libx264 and aac"
    if missing:
        fix = "use the PyAV wheel: pip install --force-reinstall --only-binary av av"
        yield Finding(name="codecs", status="fail", detail=f"no encoder {', '.join(missing)}", fix=fix)
    else:
        yield Finding(name="codecs", status="ok", detail=detail)


def check_faces() -> Iterator[Finding]:
    """The two face networks load and find the demo clip's face."""
    from lipstream.faces.track import FaceTracker
    from lipstream.media.reader import VideoReader

    with demo_files() as (clip, _):
        picture = next(iter(VideoReader(clip))).image
    if FaceTracker().step(picture) is None:
        yield Finding(name="faces", status="fail", detail="no face found in the demo clip", fix=REINSTALL)
    else:
        yield Finding(name="faces", status="ok", detail="detector and mesh load and find the demo's face")


def check_weights() -> Iterator[Finding]:
    """Every weight file of the pocket model against `SHA256SUMS` beside it."""
    folder = Path(str(files("lipstream") / "assets" / "pocket"))
    present = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    expected = read_sums(folder / "SHA256SUMS")
    for name in sorted({*WEIGHTS, *present, *expected}):
        label = f"weights {name.removesuffix('.safetensors')}"
        if name not in present:
            yield Finding(name=label, status="fail", detail=f"{folder / name} is missing", fix=REINSTALL)
            continue
        digest = hashlib.sha256(present[name].read_bytes()).hexdigest()
        detail = f"{size_text(present[name].stat().st_size)}, SHA-256 {digest[:16]}"
        if name not in expected:
            yield Finding(name=label, status="warn", detail=f"{detail} (not in SHA256SUMS)", fix="run: make checksums")
        elif digest != expected[name]:
            yield Finding(name=label, status="fail", detail=f"{detail}, expected {expected[name][:16]}", fix=REINSTALL)
        else:
            yield Finding(name=label, status="ok", detail=detail)


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 of a file in the format of `sha256sum`; empty where there is none."""
    if not path.exists():
        return {}
    rows = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    return {name.lstrip("*").strip(): digest for digest, name in rows}


def check_disk() -> Iterator[Finding]:
    """Free space where the command runs (the result is written beside its final name)."""
    free = shutil.disk_usage(Path.cwd()).free
    status: Literal["ok", "warn", "fail"] = "ok" if free >= DISK_WARN else "warn" if free >= DISK_FAIL else "fail"
    fix = "" if status == "ok" else "free some space, or write the result to another disk"
    yield Finding(name="disk", status=status, detail=f"{size_text(free)} free in {Path.cwd()}", fix=fix)


def check_extras() -> Iterator[Finding]:
    """The optional parts: what each is for, and how to get what is missing."""
    for extra, what in EXTRAS.items():
        missing = [name for name in packages_of(extra) if not _installed(name)]
        if missing:
            # Brackets would be taken for a style.
            fix = f"in the clone: pip install -c constraints.txt '.\\[{extra}]'"
            detail = f"{what}; not installed: {', '.join(missing)}"
            yield Finding(name=f"extra {extra}", status="off", detail=detail, fix=fix)
        else:
            yield Finding(name=f"extra {extra}", status="ok", detail=what)


def packages_of(extra: str) -> list[str]:
    """The packages that an extra adds, as the installed package declares them."""
    found = []
    for line in metadata.requires("lipstream") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
        if name and re.search(rf"extra *== *['\"]{re.escape(extra)}['\"]", marker):
            found.append(name.group())
    return found


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_languages() -> Iterator[Finding]:
    """Which languages the speech encoders have heard."""
    yield Finding(name="languages", status="ok", detail=LANGUAGES)


def check_speed() -> Iterator[Finding]:
    """A measured run on the demo clip: load, first frame, and frames per second after it."""
    from lipstream.pipeline import LipSync

    began = time.perf_counter()
    lipsync = LipSync.from_pretrained("pocket")
    loaded = time.perf_counter()
    marks: list[float] = []
    with demo_files() as (clip, speech):
        for _ in lipsync.stream(clip, speech):
            marks.append(time.perf_counter())
            if len(marks) >= SPEED_FRAMES:
                break
    if len(marks) < 2:
        yield Finding(
            name="speed", status="fail", detail=f"{len(marks)} frames came out", fix="run `lipstream demo -v`"
        )
        return
    speed = (len(marks) - 1) / (marks[-1] - marks[0])
    detail = f"{speed:.1f} frames/s at 256x256 without encoding, first after {marks[0] - loaded:.2f} s"
    detail += f", model loaded in {loaded - began:.2f} s"
    slow = speed < REAL_TIME
    fix = "slower than the picture plays; close other programs, or take the time" if slow else ""
    yield Finding(name="speed", status="warn" if slow else "ok", detail=detail, fix=fix)
