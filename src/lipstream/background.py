"""Run an iterator in a thread of its own, a few items ahead: the queues between the pipeline's stages.

Memory stays bounded (the queue is short), order stays the same, an exception comes out where the item would have, and
closing the consumer stops the producer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


class Ahead(Generic[T]):
    """Iterate ``source`` in a thread, at most ``depth`` items ahead. Use as a context manager.

    >>> with Ahead(frames, depth=24) as ahead:
    ...     for frame in ahead: ...
    """

    def __init__(self, source: Iterator[T], depth: int, name: str = "stage") -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._source = source
        self._queue: queue.Queue[T | _Failure | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lipstream-{name}", daemon=True)

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the producer and wait until it has left the source."""
        self._stopped.set()
        while self._thread.is_alive():
            try:  # make room for a blocked put
                self._queue.get(timeout=0.02)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            item = self._queue.get()
            if isinstance(item, _End):
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item

    def _put(self, item: T | _Failure | _End) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    break
            else:
                self._put(_End())
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(_Failure(error))
        finally:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
