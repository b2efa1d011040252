"""An output file that appears under its name when it is complete, or not at all.

Where the system can (Linux, most file systems), the unfinished file has no name, so that even a killed process leaves
nothing behind. Elsewhere it has a temporary name in the same folder, which is removed on any failure but a kill.

    >>> file = AtomicFile(Path("out.mp4")); write(file.name); file.commit()
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import suppress
from pathlib import Path

# What says that a file system knows no nameless files; anything else (no space, no permission) is a real failure.
_UNKNOWN = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS}


class AtomicFile:
    """An unfinished file: `commit` gives it its name, `discard` removes it.

    Attributes:
        name: where to write; empty from the start, and there for reading back.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        flag = getattr(os, "O_TMPFILE", None)
        if flag is not None and os.path.isdir("/proc/self/fd"):
            try:
                self._handle = os.open(path.parent, flag | os.O_RDWR, 0o666)
            except OSError as error:
                if error.errno not in _UNKNOWN or not path.parent.is_dir():
                    raise
        self._nameless = self._handle is not None
        if self._nameless:
            # The child of a fork has another number here; ours is written by this process alone.
            self.name = f"/proc/{os.getpid()}/fd/{self._handle}"
        else:
            self.name = self._named()

    def commit(self) -> None:
        """Sync to disk, then give the file its name; the one that had it before is replaced in one step."""
        if self._handle is None:
            with open(self.name, "rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(self.name, self._path)
            return
        os.fsync(self._handle)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # linkat follows /proc's link to the nameless file only where a folder is given; it does not replace.
            part = f".{_short(self._path.name)}.{os.getpid()}.{self._handle}.part"
            os.link(self.name, part, src_dir_fd=folder, dst_dir_fd=folder)
            try:
                os.replace(part, self._path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(part, dir_fd=folder)
                raise
        finally:
            os.close(folder)
        self._close()

    def discard(self) -> None:
        """Throw the file away; whatever had its name before stays."""
        if self._handle is None and not self._nameless:
            with suppress(OSError):
                os.unlink(self.name)
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def _named(self) -> str:
        prefix = f".{_short(self._path.stem)}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=self._path.parent)
        os.close(handle)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        return name


def _short(name: str) -> str:
    """The beginning of a name: file systems count its bytes (255 at most), and a temporary one has more to say."""
    return os.fsencode(name)[:100].decode("utf-8", "ignore")
