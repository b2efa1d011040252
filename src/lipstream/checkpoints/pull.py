"""Fetch released files: resume, mirrors, an offline folder; a file gets its name only when it was checked.

Everything happens in NAME.part beside the final name. A dropped connection is taken up again where it stopped
(HTTP Range; a server that ignores it starts over), a copy that is not what the table says is thrown away and the next
mirror asked. The SHA-256 of what was fetched is kept in SHA256SUMS, which later runs check against in full.

    pull(artefacts_of("lipforcing-14b"), folder, mirrors=["https://mirror.example/lipforcing"])
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lipstream.checkpoints.artefacts import Artefact
from lipstream.checkpoints.hashing import BLOCK_BYTES, Report, no_report, sha256_of

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
DISK_MARGIN_BYTES = 200_000_000
TIMEOUT_SECONDS = 60.0
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_READ_BYTES = 1 << 18


class PullError(ValueError):
    """A file that cannot be had; the message names it and every place that was tried."""


class _WrongFileError(Exception):
    """The content is not the released file."""


class _RefusedError(Exception):
    """This place has nothing for us; what another one sent stays."""


class _DroppedError(Exception):
    """The connection ended early; what came is in the part file."""


@dataclass(frozen=True)
class Retries:
    """How patient a download is: tries without a single new byte, and the first pause (it doubles, up to 30 s)."""

    tries: int = 6
    pause_seconds: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What became of a file: `there` already, `fetched`, `copied` from the offline folder, or `failed` (and why)."""

    artefact: Artefact
    status: Literal["there", "fetched", "copied", "failed"]
    sha256: str = ""
    problem: str = ""


def pull(
    artefacts: Sequence[Artefact],
    folder: Path,
    *,
    mirrors: Sequence[str] = (),
    from_folder: Path | None = None,
    report: Report = no_report,
    retries: Retries | None = None,
) -> Iterator[Outcome]:
    """Fetch files into ``folder``, one outcome each, in order; one that fails does not stop the others.

    Args:
        mirrors: tried before the published places: "https://host/folder" (the files by their names in the table) or
            a pattern like "https://host/{repo}/resolve/main/{path}".
        from_folder: take everything from here and ask nobody.

    Raises:
        PullError: not enough disk, or a mirror that is no http(s) address.
    """
    for mirror in mirrors:
        if not mirror.startswith(("http://", "https://")):
            raise PullError(f"mirror '{mirror}': must start with http:// or https://")
    check_disk(artefacts, folder)
    folder.mkdir(parents=True, exist_ok=True)
    sums = read_sums(folder)
    for artefact in artefacts:
        final = folder / artefact.name
        try:
            status: Literal["there", "fetched", "copied"] = "there"
            sha256 = _accept_existing(artefact, final, sums.get(artefact.name), report)
            if sha256 is None and from_folder is not None:
                status, sha256 = "copied", _copy(artefact, from_folder, final, report)
            elif sha256 is None:
                status, sha256 = "fetched", _fetch(artefact, final, mirrors, report, retries or Retries())
        except (PullError, OSError) as error:
            yield Outcome(artefact, "failed", problem=" ".join(str(error).split()))
            continue
        if sums.get(artefact.name) != sha256:
            sums[artefact.name] = sha256
            write_sums(folder, sums)
        yield Outcome(artefact, status, sha256)


def missing_bytes(artefacts: Sequence[Artefact], folder: Path) -> int:
    """How much is still to come, as far as sizes are known."""
    total = 0
    for artefact in artefacts:
        final = folder / artefact.name
        if not final.exists():
            part = _part(final)
            total += max(0, artefact.expected_bytes - (part.stat().st_size if part.exists() else 0))
    return total


def free_bytes(folder: Path) -> int:
    """Free disk where ``folder`` is or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_disk(artefacts: Sequence[Artefact], folder: Path) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        PullError: says how much is needed and how much is free.
    """
    needed, free = missing_bytes(artefacts, folder), free_bytes(folder)
    if needed and needed + DISK_MARGIN_BYTES > free:
        raise PullError(
            f"{folder}: {needed / 1e9:.1f} GB are still to come and {free / 1e9:.1f} GB are free; "
            "make room or choose another --folder"
        )


def verify(artefact: Artefact, path: Path, recorded: str | None = None, report: Report = no_report) -> str:
    """The SHA-256 of a file that is, as far as is known, the released one.

    Args:
        recorded: full hash noted when it was fetched.

    Raises:
        PullError: says what differs.
    """
    try:
        return _verify(artefact, path, recorded, report)
    except _WrongFileError as error:
        raise PullError(f"{path}: {error}") from error


def read_sums(folder: Path) -> dict[str, str]:
    """Hashes noted earlier, by name."""
    path = folder / SUMS
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines) if name}


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Note hashes, atomically, in the format of sha256sum."""
    part = folder / f"{SUMS}.part"
    part.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))
    part.replace(folder / SUMS)


def _part(final: Path) -> Path:
    return final.with_name(f"{final.name}.part")


def _verify(artefact: Artefact, path: Path, recorded: str | None, report: Report) -> str:
    size = path.stat().st_size
    if artefact.bytes is not None and size != artefact.bytes:
        raise _WrongFileError(f"has {size} bytes, the released file has {artefact.bytes}")
    sha256 = sha256_of(path, lambda done: report(f"check {artefact.name}", done, size))
    if not (sha256.startswith(artefact.sha256_start) and sha256.endswith(artefact.sha256_end)):
        known = f"{artefact.sha256_start}...{artefact.sha256_end}"
        raise _WrongFileError(f"is not the released file: its SHA-256 is {sha256}, not {known}")
    if recorded is not None and sha256 != recorded:
        raise _WrongFileError(f"has changed since it was fetched: its SHA-256 is {sha256}, not {recorded}")
    return sha256


def _accept_existing(artefact: Artefact, final: Path, recorded: str | None, report: Report) -> str | None:
    """The hash of a good file under the final name; a wrong one is moved aside, so that nobody takes it for good."""
    if not final.exists():
        return None
    try:
        return _verify(artefact, final, recorded, report)
    except _WrongFileError as error:
        aside = final.with_name(f"{final.name}.rejected")
        final.replace(aside)
        log.warning("%s %s; moved to %s", final, error, aside.name)
        return None


def _finish(part: Path, final: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(final)
    _tag(part).unlink(missing_ok=True)


def _copy(artefact: Artefact, source_folder: Path, final: Path, report: Report) -> str:
    places = [source_folder / name for name in (artefact.name, artefact.path, Path(artefact.name).name)]
    source = next((place for place in places if place.is_file()), None)
    if source is None:
        raise PullError(f"{artefact.name}: is not in {source_folder}")
    part, size = _part(final), source.stat().st_size
    if artefact.bytes is not None and size != artefact.bytes:
        raise PullError(f"{source}: has {size} bytes, the released file has {artefact.bytes}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as read, part.open("wb") as write:
            done = 0
            while block := read.read(BLOCK_BYTES):
                write.write(block)
                done += len(block)
                report(f"copy {artefact.name}", done, size)
        sha256 = _verify(artefact, part, None, report)
    except BaseException as error:
        _discard(part)
        if isinstance(error, _WrongFileError):
            raise PullError(f"{source}: {error}") from error
        raise
    _finish(part, final)
    return sha256


def addresses(artefact: Artefact, mirrors: Sequence[str]) -> list[str]:
    """Where to ask for a file, in order."""
    urls = []
    for mirror in mirrors:
        pattern = "{repo}" in mirror or "{path}" in mirror
        filled = mirror.replace("{repo}", artefact.repo).replace("{path}", artefact.path)
        urls.append(filled if pattern else f"{mirror.rstrip('/')}/{artefact.name}")
    return urls + ([artefact.address] if artefact.address else [])


def _fetch(artefact: Artefact, final: Path, mirrors: Sequence[str], report: Report, retries: Retries) -> str:
    urls, problems = addresses(artefact, mirrors), []
    if not urls:
        raise PullError(f"{artefact.name}: {artefact.hint}")
    final.parent.mkdir(parents=True, exist_ok=True)
    part = _part(final)
    for url in urls:
        # A part that an earlier place began may be the wrong one: then this place gets a second, fresh chance.
        for fresh in (not part.exists(), True):
            try:
                _download(artefact, url, part, report, retries)
                sha256 = _verify(artefact, part, None, report)
                _finish(part, final)
                return sha256
            except _WrongFileError as error:
                _discard(part)
                if fresh:
                    problems.append(f"{url} {error}")
                    break
            except (_RefusedError, _DroppedError, OSError, http.client.HTTPException) as error:
                problems.append(f"{url}: {str(error) or type(error).__name__}")
                break
    raise PullError(f"{artefact.name}: cannot be fetched: {'; '.join(problems)}")


def _download(artefact: Artefact, url: str, part: Path, report: Report, retries: Retries) -> None:
    """Ask until the file is complete or no byte comes for so many tries."""
    failures, pause = 0, retries.pause_seconds
    most = part.stat().st_size if part.exists() else 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _request(artefact, url, part, report)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in RETRY_STATUS:
                raise _RefusedError(f"answers {error.code} {error.reason}") from error
            reason: Exception = error
        except urllib.error.URLError as error:
            if isinstance(error.reason, socket.gaierror) and not before:
                raise _RefusedError("no such host, or no network") from error
            reason = error
        except (_DroppedError, OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise PullError(f"{part}: the disk is full; make room, the same command continues") from error
            reason = error
        after = part.stat().st_size if part.exists() else 0
        # More than ever before, not than last time: a server that starts over at every drop must not go on for ever.
        failures, pause = (0, retries.pause_seconds) if after > most else (failures + 1, pause)
        most = max(most, after)
        if failures >= retries.tries:
            raise _DroppedError(f"{reason or type(reason).__name__}, after {retries.tries} tries") from reason
        log.info("%s: %s at byte %d; trying again", url, reason or type(reason).__name__, after)
        time.sleep(pause)
        pause = min(30.0, 2 * pause)


def _request(artefact: Artefact, url: str, part: Path, report: Report) -> None:
    """One request: continue the part file where it ends, or start it."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "lipstream", "Accept-Encoding": "identity"}
    if start and not artefact.sha256_start:
        # Nothing would notice two versions joined together: continue only what the server says is the same.
        tag = _tag(part).read_text() if _tag(part).exists() else ""
        start = start if tag else 0
        headers |= {"If-Range": tag} if tag else {}
    if start and start == artefact.bytes:
        return
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        _discard(part)  # it is longer than the file: not a piece of it
        raise _DroppedError("the server has no bytes from there on") from error
    with response:
        start, total = _place(response, start)
        if artefact.bytes is not None and total is not None and total != artefact.bytes:
            raise _RefusedError(f"offers {total} bytes, the released file has {artefact.bytes}")
        _note_tag(part, response.headers.get("ETag", ""))
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            done = start
            while block := response.read(_READ_BYTES):
                file.write(block)
                done += len(block)
                report(f"fetch {artefact.name}", done, total or artefact.bytes)
                if artefact.bytes is not None and done > artefact.bytes:
                    raise _WrongFileError(f"sends more than the {artefact.bytes} bytes of the released file")
    whole = total if total is not None else artefact.bytes
    if whole is not None and done < whole:
        raise _DroppedError(f"ended at byte {done} of {whole}")


def _place(response: http.client.HTTPResponse, asked: int) -> tuple[int, int | None]:
    """(first byte that is sent, size of the whole file if told)."""
    length = response.headers.get("Content-Length", "")
    if response.status != 206:  # the whole file, also where a part was asked for
        return 0, int(length) if length.isdigit() else None
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(asked):
        raise _DroppedError(f"the server sent bytes {span or 'unknown'} instead of {asked}-")
    return asked, int(total) if total.isdigit() else None


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _note_tag(part: Path, tag: str) -> None:
    """Keep the server's mark of this version beside the part; a weak one says nothing about bytes."""
    if tag and not tag.startswith("W/"):
        _tag(part).write_text(tag)
    else:
        _tag(part).unlink(missing_ok=True)
