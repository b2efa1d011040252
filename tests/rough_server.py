"""A file server on 127.0.0.1 with the manners of the real world: it drops connections, ignores Range, spoils bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread


@dataclass
class Manners:
    """How the server behaves, and what it was asked.

    Attributes:
        drop_after: end every answer after so many bytes of it (None = never).
        drops: how many answers are cut before it behaves (None = for ever).
        ranges: answer Range with 206; else with the whole file.
        wrong_byte: spoil this byte of the file for so many answers that hold it.
        statuses: answer with these first.
    """

    files: dict[str, bytes]
    drop_after: int | None = None
    drops: int | None = None
    ranges: bool = True
    shift: int = 0  # send from this many bytes too far on
    wrong_byte: int | None = None
    etag: str | None = '"v1"'
    lengths: bool = True
    statuses: list[int] = field(default_factory=list)
    redirect: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    sent_bytes: int = 0


@contextmanager
def serve(manners: Manners) -> Iterator[str]:
    """Run the server; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(manners))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(manners: Manners) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            manners.asked.append((self.path, asked))
            content = manners.files.get(str(PurePosixPath(self.path)).lstrip("/"))
            if manners.statuses:
                self.send_error(manners.statuses.pop(0))
            elif manners.redirect is not None and not self.path.startswith("/real"):
                self.send_response(302)
                self.send_header("Location", f"{manners.redirect}{self.path}")
                self.end_headers()
            elif content is None:
                self.send_error(404)
            else:
                self._answer(bytearray(content), asked)

        def _answer(self, content: bytearray, asked: str | None) -> None:
            same = self.headers.get("If-Range") in (None, manners.etag)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and manners.ranges and same else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            if manners.wrong_byte is not None:
                content[manners.wrong_byte] ^= 1
            partial = bool(asked) and manners.ranges and same
            start += manners.shift if partial else 0
            body = bytes(content[start:])
            self.send_response(206 if partial else 200)
            if manners.etag:
                self.send_header("ETag", manners.etag)
            if partial:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if manners.lengths:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if manners.drop_after is not None and manners.drops != 0 and len(body) > manners.drop_after:
                body = body[: manners.drop_after]
                manners.drops = None if manners.drops is None else manners.drops - 1
            with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
                self.wfile.write(body)
            manners.sent_bytes += len(body)
            self.close_connection = True

    return Handler
