"""Contact sheet: evenly spaced frames of a video as one picture, the source's row above the result's where given.

>>> write_contact_sheet("sheet.png", result="out.mp4", source="talk.mp4")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from lipstream.media.opening import MediaError
from lipstream.media.reader import VideoReader
from lipstream.media.timeline import bounce_index

GAP = 4  # pixels between the tiles
PAPER = 255
INK = (60, 60, 60)
LABEL = 18  # pixels of the line with the time under each column


def contact_sheet(
    result: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    columns: int = 6,
    rows: int = 2,
    tile_height: int = 192,
) -> NDArray[np.uint8]:
    """Draw the sheet, RGB uint8 [H, W, 3].

    Args:
        result: the video to look at.
        source: what it was made from; frame n stands above frame n of the result. A source that is shorter than the
            result was played forwards and backwards, and is shown like that.
        columns: frames per row.
        rows: rows of frames (pairs of rows with a source).
        tile_height: height of one frame in pixels.
    """
    if columns < 1 or rows < 1 or tile_height < 1:
        raise ValueError(f"columns {columns}, rows {rows} and tile_height {tile_height} must be positive")
    total = sum(1 for _ in VideoReader(result))
    wanted = evenly_spaced(total, columns * rows)
    below = _tiles(result, wanted, tile_height)
    lines = [below]
    if source is not None:
        length = sum(1 for _ in VideoReader(source))
        lines.insert(0, _tiles(source, [bounce_index(index, length) for index in wanted], tile_height))
    blocks = []
    for start in range(0, len(wanted), columns):
        bands = [_band([image for image, _ in tiles[start : start + columns]], columns) for tiles in lines]
        times = [time for _, time in below[start : start + columns]]
        blocks += [*bands, _labels(times, below[0][0].shape[1], bands[0].shape[1])]
    width = max(block.shape[1] for block in blocks)
    padded = [np.pad(b, ((0, GAP), (0, width - b.shape[1]), (0, 0)), constant_values=PAPER) for b in blocks]
    return np.pad(np.concatenate(padded), ((GAP, 0), (GAP, 0), (0, 0)), constant_values=PAPER)


def write_contact_sheet(
    path: str | os.PathLike[str],
    *,
    result: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    columns: int = 6,
    rows: int = 2,
) -> None:
    """Draw the sheet into a PNG file, which appears only when it is complete."""
    sheet = contact_sheet(result, source=source, columns=columns, rows=rows)
    done, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    if not done:
        raise MediaError(path, "the picture could not be encoded", "report this as a bug")
    target = Path(path)
    try:
        number, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise MediaError(path, f"cannot be written ({error.strerror})", "choose another folder") from error
    try:
        with os.fdopen(number, "wb") as stream:
            stream.write(png.tobytes())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` frame indices, each in the middle of its equal share of `total` frames."""
    count = min(count, total)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def _tiles(path: str | os.PathLike[str], wanted: Sequence[int], height: int) -> list[tuple[NDArray[np.uint8], float]]:
    """The wanted frames [height, w, 3] with their times in seconds; one pass, only these are kept."""
    found: dict[int, tuple[NDArray[np.uint8], float]] = {}
    needed, last = set(wanted), max(wanted)
    start: float | None = None
    for frame in VideoReader(path):
        start = frame.seconds if start is None else start
        if frame.index in needed:
            width = max(round(frame.size[0] * height / frame.size[1]), 1)
            tile = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
            found[frame.index] = np.asarray(tile, np.uint8), frame.seconds - start
        if frame.index == last:
            break
    return [found[index] for index in wanted]


def _band(images: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """One row of equal tiles with gaps, filled up with paper to `columns`."""
    blank = np.full_like(images[0], PAPER)
    row = np.stack([*images, *[blank] * (columns - len(images))])
    spaced = np.pad(row, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=PAPER)
    return np.asarray(rearrange(spaced, "n h w c -> h (n w) c"), np.uint8)


def _labels(times: Sequence[float], tile_width: int, width: int) -> NDArray[np.uint8]:
    """A line [LABEL, width, 3] with the time of each column."""
    line = np.full((LABEL, width, 3), PAPER, np.uint8)
    for column, time in enumerate(times):
        place = (column * (tile_width + GAP) + 2, LABEL - 5)
        cv2.putText(line, f"{time:.2f} s", place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, INK, 1, cv2.LINE_AA)
    return line
