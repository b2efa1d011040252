"""Open a media file from a stranger: look at its first bytes, allow local files and plain containers only.

Playlists and concat scripts make FFmpeg open further files or the network; they are refused here by their content,
whatever the file is called. Size, streams, pixels and duration are capped. `probe` does a first look at a file in a
process of its own, where a damaged one can neither crash nor hang its caller.

    >>> with open_media("talk.mp4", need="video") as container: ...
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

# demuxer name -> how its files are called in messages
FORMATS = {
    "mov": "MP4/MOV",
    "matroska": "MKV/WebM",
    "avi": "AVI",
    "mpegts": "MPEG-TS",
    "wav": "WAV",
    "flac": "FLAC",
    "ogg": "Ogg",
    "mp3": "MP3",
    "aac": "AAC",
}
WHITELIST = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,wav,flac,ogg,mp3,aac"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may be at most; a server lowers these."""

    file_bytes: int = 200 * 10**9
    pixels: int = 8192 * 8192
    duration_seconds: int = 24 * 3600
    streams: int = 64


LIMITS = Limits()


class MediaError(ValueError):
    """A media file that cannot be used: the message names the file, the problem and the fix, in one line."""

    def __init__(self, path: str | os.PathLike[str], problem: str, fix: str) -> None:
        self.path, self.problem, self.fix = os.fspath(path), problem, fix
        super().__init__(f"{self.path}: {problem}; {fix}")


def sniff(head: bytes) -> str | None:
    """The demuxer for a file that starts with `head` (at least 400 bytes where the file has them), or None."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"):
        return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    for magic, name in ((b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3")):
        if head.startswith(magic):
            return name
    if head[:1] == b"\x47" and head[188:189] in (b"\x47", b""):
        return "mpegts"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:  # ADTS: sync word and layer 0
        return "aac"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06:
        return "mp3"
    return None


def check_file(path: str | os.PathLike[str], limits: Limits = LIMITS) -> str:
    """The demuxer name of an existing, readable, non-empty media file; MediaError for everything else."""
    file = Path(path)
    try:
        found = file.stat()
        if stat.S_ISDIR(found.st_mode):
            raise MediaError(path, "is a folder, not a media file", "name a file inside it")
        if not stat.S_ISREG(found.st_mode):  # a pipe or device would block, or never end
            raise MediaError(path, "is not a plain file", "copy it to a file first")
        if found.st_size > limits.file_bytes:
            size = f"{found.st_size / 1e9:.1f} GB"
            raise MediaError(path, f"is too large ({size})", f"give at most {limits.file_bytes / 1e9:.1f} GB")
        with file.open("rb") as stream:
            head = stream.read(4096)
    except FileNotFoundError:
        raise MediaError(path, "no such file", "check the name and the folder") from None
    except PermissionError:
        raise MediaError(path, "may not be read", "check its permissions") from None
    except MediaError:
        raise
    except ValueError:  # a zero byte in the name
        raise MediaError(repr(path), "is no file name", "check the name") from None
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror})", "check the disk and the name") from error
    if not head:
        raise MediaError(path, "is empty (0 bytes)", "copy or download it again")
    name = sniff(head)
    if name is None:
        kind = "text" if b"\0" not in head and _is_text(head) else "no known media format"
        raise MediaError(path, f"is not a video or audio file ({kind})", f"give one of {', '.join(FORMATS.values())}")
    return name


def _is_text(head: bytes) -> bool:
    try:
        head[:1024].decode("utf-8", errors="strict" if len(head) < 1024 else "ignore")
    except UnicodeDecodeError:
        return False
    return True


def open_media(
    path: str | os.PathLike[str], *, need: Literal["video", "audio"] | None = None, limits: Limits = LIMITS
) -> InputContainer:
    """Open a local media file for reading; a context manager that the caller closes.

    Args:
        path: the file; its name and suffix are not believed.
        need: the stream that must be present.
        limits: caps on what the file says of itself.

    Raises:
        MediaError: with the reason and what to do about it.
    """
    name = check_file(path, limits)
    options = {"format_whitelist": WHITELIST, "protocol_whitelist": "file"}
    try:
        # The explicit protocol keeps a colon in the name from choosing another one.
        container = av.open(f"file:{os.path.abspath(path)}", format=name, options=options)
    except (av.FFmpegError, OSError, ValueError) as error:
        problem = f"cannot be opened as {FORMATS[name]} ({_reason(error)}), probably truncated or damaged"
        raise MediaError(path, problem, "copy or download it again") from error
    try:
        _check_streams(path, container, need, limits)
    except BaseException:
        container.close()
        raise
    return container


def _check_streams(path: str | os.PathLike[str], container: InputContainer, need: str | None, limits: Limits) -> None:
    if len(container.streams) > limits.streams:
        count = len(container.streams)
        raise MediaError(path, f"has too many streams ({count})", f"keep at most {limits.streams} of them")
    length = (container.duration or 0) / 1_000_000
    if length > limits.duration_seconds:
        raise MediaError(path, f"says it lasts {length:.0f} s", f"cut it to at most {limits.duration_seconds} s")
    video = picture_stream(container)
    if need == "video" and video is None:
        raise MediaError(path, "has no video stream", "give a file with a picture")
    if need == "audio" and not sounds(container):
        raise MediaError(path, "has no audio stream", "give a file with speech")
    if need == "video" and video is not None and not 0 < video.width * video.height <= limits.pixels:
        size = f"{video.width}x{video.height}"
        raise MediaError(
            path, f"has a picture of an impossible size ({size})", f"scale it to at most {limits.pixels} pixels"
        )


def sounds(container: InputContainer) -> list[AudioStream]:
    """The sounds that can be decoded."""
    return [s for s in container.streams.audio if s.codec_context is not None and s.codec_context.sample_rate]


def sound_stream(path: str | os.PathLike[str], container: InputContainer, track: int | None = None) -> AudioStream:
    """One sound of a file: the one numbered `track` from 1, else the one marked as default, else the first.

    Raises:
        MediaError: there is no such track.
    """
    known = sounds(container)
    if track is None:
        marked = [s for s in known if s.disposition & Disposition.default]
        return (marked or known)[0]
    if not 1 <= track <= len(known):
        raise MediaError(path, f"has no audio track {track}", f"choose one of 1 to {len(known)}")
    return known[track - 1]


def picture_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that can be decoded and is not a cover picture."""
    for stream in container.streams.video:
        # An unknown codec leaves a stream without a decoder, and without a size.
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def seconds(ticks: int | None, time_base: Fraction | None) -> Fraction:
    """A timestamp in seconds; a missing one is 0."""
    return Fraction(0) if ticks is None or time_base is None else ticks * Fraction(time_base)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0]
