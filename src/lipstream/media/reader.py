"""Read a video frame by frame, in constant memory, with exact timestamps.

Frames keep their stored YUV planes (what the writer encodes) and offer an upright RGB picture (what models see).

    >>> with VideoReader("talk.mp4") as reader:
    ...     for frame in reader:
    ...         mouth = model(frame.image)
    ...         writer.write(replace_region(frame, mouth, box, alpha))
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain
from types import TracebackType
from typing import Any

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideData
from av.video.stream import VideoStream
from numpy.typing import NDArray

from lipstream.media.encoder import HdrTags, hdr_tags
from lipstream.media.opening import MediaError, open_media, picture_stream
from lipstream.media.planes import (
    CHROMA_SHIFT,
    Orientation,
    blend_box,
    copy_frame,
    is_full_range,
    luma_space,
    sample_bytes,
    to_rgb,
)

logger = logging.getLogger(__name__)

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class ColourTags:
    """Colour description as FFmpeg's integers (2 = unspecified; range: 0 unspecified, 1 limited, 2 full)."""

    range: int
    space: int
    primaries: int
    transfer: int


@dataclass(frozen=True, kw_only=True)
class SourceFrame:
    """One frame of a video.

    Attributes:
        index: place in the sequence being read, from 0.
        pts: timestamp in units of time_base.
        duration_pts: how long it shows (until the next frame of its sequence), same unit.
        stored: the decoded frame in its own YUV format, not turned.
        orientation: what turns stored pixels upright.
    """

    index: int
    pts: int
    duration_pts: int
    time_base: Fraction
    stored: av.VideoFrame = field(repr=False)
    orientation: Orientation = field(default_factory=Orientation)

    @property
    def seconds(self) -> float:
        """The timestamp in seconds."""
        return float(self.pts * self.time_base)

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """Upright RGB, uint8 [H, W, 3], contiguous; converted on first use."""
        return np.ascontiguousarray(self.orientation.upright(to_rgb(self.stored)), np.uint8)

    def forget_image(self) -> None:
        """Let go of the RGB picture; it is converted again when it is asked for."""
        self.__dict__.pop("image", None)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        width, height = self.stored.width, self.stored.height
        return (height, width) if self.orientation.transpose else (width, height)


def replace_region(
    frame: SourceFrame, rgb_patch: NDArray[np.generic], box: Box, alpha: NDArray[np.floating[Any]]
) -> SourceFrame:
    """A copy of a frame with a patch blended in; everything with alpha 0 stays bit-identical in the YUV planes.

    Args:
        frame: the source; it is not changed.
        rgb_patch: [h, w, 3] in 0..255, upright, uint8 or float.
        box: (x0, y0, x1, y1) of the patch in upright pixels; parts beyond the picture are ignored.
        alpha: [h, w] in 0..1; 1 takes the patch, 0 leaves the source.
    """
    x0, y0, x1, y1 = box
    if rgb_patch.shape != (y1 - y0, x1 - x0, 3) or alpha.shape != (y1 - y0, x1 - x0):
        raise ValueError(f"box {box} does not fit patch {rgb_patch.shape} and alpha {alpha.shape}")
    width, height = frame.size
    cx0, cy0, cx1, cy1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    changed = replace(frame, stored=copy_frame(frame.stored))
    inside = alpha[max(cy0 - y0, 0) : max(cy1 - y0, 0), max(cx0 - x0, 0) : max(cx1 - x0, 0)] > 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not rows.size:
        return changed
    # Only the part of the box that really changes is worked on.
    cx0, cx1 = cx0 + int(columns[0]), cx0 + int(columns[-1]) + 1
    cy0, cy1 = cy0 + int(rows[0]), cy0 + int(rows[-1]) + 1
    part = np.s_[cy0 - y0 : cy1 - y0, cx0 - x0 : cx1 - x0]
    turn = frame.orientation
    weight = np.clip(turn.stored(alpha[part]).astype(np.float32), 0, 1)
    left, top, _, _ = turn.stored_box((cx0, cy0, cx1, cy1), width, height)
    now = np.asarray(turn.stored(frame.image[cy0:cy1, cx0:cx1]), np.uint8)
    blend_box(changed.stored, turn.stored(rgb_patch[part]), now, weight, (left, top))
    return changed


def _lasting(frame: SourceFrame, duration_pts: int) -> SourceFrame:
    """The frame, showing for so long."""
    frame.stored.duration = duration_pts
    return replace(frame, duration_pts=duration_pts)


class VideoReader:
    """The first video stream of a file. Iterating starts from the beginning each time.

    Attributes:
        width, height: upright size in pixels.
        fps: average frame rate.
        frames: number of frames if the file says so and means it, else None.
        duration_seconds: if the file says so, else None.
        time_base: unit of all pts.
        display_matrix: the rotation tag (9 integers) or None.
        orientation: the same as an operation on arrays.
        colour: colour tags.
        pix_fmt: format of the frames given out (what the writer encodes).
        hdr: static HDR metadata.
        interlaced: whether the file is interlaced; the frames given out are not.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1) -> None:
        self.path = os.fspath(path)
        self._threads = threads
        with open_media(path, need="video") as container:
            stream = self._stream(container)
            context = stream.codec_context
            self.time_base = Fraction(stream.time_base or Fraction(1, 90_000))
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            ticks = stream.duration
            self.duration_seconds: float | None = (
                float(ticks * self.time_base)
                if ticks is not None
                else (container.duration / 1_000_000 if container.duration is not None else None)
            )
            self.frames = self._frame_count(stream.frames)
            self.sample_aspect_ratio = stream.sample_aspect_ratio
            first = self._first_frame(container)
            self.stored_size = (first.width, first.height)
            self.pix_fmt = self._working_format(first)
            working = self._working_frame(first)
            self.colour = ColourTags(
                range=int(working.color_range),
                space=int(working.colorspace),
                primaries=int(context.color_primaries),
                transfer=int(context.color_trc),
            )
            self.display_matrix = display_matrix(first)
            self.orientation = Orientation.from_matrix(self.display_matrix)
            self.hdr: HdrTags = hdr_tags(first)
            self.interlaced = bool(first.interlaced_frame)
            self._say_what_changes(first, stream)
        turned = self.orientation.transpose
        self.width, self.height = self.stored_size[::-1] if turned else self.stored_size

    @property
    def frame_bytes(self) -> int:
        """What one stored frame takes in memory, at least."""
        return self.width * self.height * 3 * sample_bytes(self.pix_fmt) // 2

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing stays open between iterations here; see `isolated`."""

    def __iter__(self) -> Iterator[SourceFrame]:
        """All frames in order of time; pts always increase."""
        return self.read()

    def read(self, seek_pts: int | None = None) -> Iterator[SourceFrame]:
        """Frames from the start, or from the keyframe at or before seek_pts (their index then counts from there)."""
        step = max(round(1 / (self.fps * self.time_base)), 1)
        last: int | None = None
        with open_media(self.path, need="video") as container:
            if seek_pts is not None:
                container.seek(seek_pts, stream=self._stream(container), backward=True, any_frame=False)
            index = 0
            held: SourceFrame | None = None  # the containers' own durations are decoding times: the next frame tells
            for decoded in self._progressive(container) if self.interlaced else self._decode(container):
                pts = decoded.pts if decoded.pts is not None else (0 if last is None else last + step)
                if last is not None and pts <= last:
                    logger.warning("%s: frame %d repeats timestamp %d; moved by one tick", self.path, index, pts)
                    pts = last + 1
                last = pts
                if held is not None:
                    yield _lasting(held, pts - held.pts)
                held = self._frame(decoded, index, pts, decoded.duration or step)
                index += 1
            if held is not None:
                yield held
        if seek_pts is None and index == 0:
            raise MediaError(self.path, "its video stream has no readable frame", "copy or download it again")
        if seek_pts is None and self.frames is not None and index < self.frames:
            logger.warning("%s: announces %d frames, holds %d; truncated?", self.path, self.frames, index)

    def _frame(self, decoded: av.VideoFrame, index: int, pts: int, duration: int) -> SourceFrame:
        if (decoded.width, decoded.height) != self.stored_size:
            raise MediaError(
                self.path,
                f"changes its size from {self.stored_size} to {(decoded.width, decoded.height)}",
                "re-encode it to one size first",
            )
        return self._timed(self._working_frame(decoded), index, pts, duration)

    def _timed(self, stored: av.VideoFrame, index: int, pts: int, duration: int) -> SourceFrame:
        stored.pts, stored.time_base, stored.duration = pts, self.time_base, duration
        return SourceFrame(
            index=index,
            pts=pts,
            duration_pts=duration,
            time_base=self.time_base,
            stored=stored,
            orientation=self.orientation,
        )

    def _working_frame(self, decoded: av.VideoFrame) -> av.VideoFrame:
        """A decoded frame in the working format; its matrix stays, RGB pictures get one."""
        if decoded.format.name == self.pix_fmt:
            return decoded
        space = luma_space(decoded)
        full = decoded.format.is_rgb or is_full_range(decoded)
        target = 2 if self.pix_fmt.startswith("yuvj") or (full and not decoded.format.is_rgb) else 1
        stored = decoded.reformat(
            format=self.pix_fmt,
            src_colorspace=space,
            dst_colorspace=space,
            src_color_range=2 if full else 1,
            dst_color_range=target,
        )
        stored.colorspace = space if decoded.format.is_rgb else decoded.colorspace
        stored.color_range = target
        stored.color_primaries, stored.color_trc = decoded.color_primaries, decoded.color_trc
        return stored

    def _decode(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        stream = self._stream(container)
        stream.thread_count = self._threads
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                decoded = packet.decode()
            except (StopIteration, av.EOFError):
                return
            except av.InvalidDataError as error:
                # A damaged packet costs its own frames only: the others keep their timestamps.
                logger.warning("%s: damaged data skipped (%s)", self.path, error)
                continue
            except (av.FFmpegError, OSError) as error:
                raise MediaError(self.path, f"cannot be read further ({error})", "copy it again") from error
            yield from decoded

    def _progressive(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """Decoded frames without their comb: as many, at the same times."""
        graph: av.filter.Graph | None = None
        waiting: dict[Fraction, av.VideoFrame] = {}
        for decoded in chain(self._decode(container), [None]):
            if graph is None:
                if decoded is None:
                    return
                graph = _deinterlacer(self._stream(container), decoded)
            if decoded is not None:
                waiting[Fraction(decoded.pts or 0) * self.time_base] = decoded
            graph.push(decoded)
            while True:
                try:
                    frame = graph.pull()
                except (av.BlockingIOError, av.EOFError):
                    break
                assert isinstance(frame, av.VideoFrame)
                # The filter counts in half ticks and loses tags.
                like = waiting.pop(Fraction(frame.pts or 0) * Fraction(frame.time_base or 1), None)
                if like is None:
                    continue
                frame.pts, frame.time_base, frame.duration = like.pts, like.time_base, like.duration
                frame.color_range, frame.colorspace = like.color_range, like.colorspace
                frame.color_primaries, frame.color_trc = like.color_primaries, like.color_trc
                yield frame

    def _say_what_changes(self, first: av.VideoFrame, stream: VideoStream) -> None:
        """Warn about what the result cannot keep."""
        if any(c.is_alpha for c in first.format.components) or stream.metadata.get("alpha_mode") == "1":
            logger.warning("%s: has transparency; the result is opaque", self.path)
        if self.interlaced:
            logger.warning("%s: is interlaced; the result is deinterlaced, frame by frame", self.path)

    def _stream(self, container: av.container.InputContainer) -> VideoStream:
        stream = picture_stream(container)
        assert stream is not None  # open_media(need="video") made sure
        return stream

    def _first_frame(self, container: av.container.InputContainer) -> av.VideoFrame:
        for frame in self._decode(container):
            return frame
        raise MediaError(self.path, "its video stream has no readable frame", "copy or download it again")

    def _frame_count(self, announced: int) -> int | None:
        """The announced number of frames, unless an edit list hides some of them (duration and rate disagree)."""
        if not announced or self.duration_seconds is None:
            return announced or None
        shown = self.duration_seconds * self.fps
        return announced if abs(announced - shown) <= 1.5 + 0.01 * announced else None

    def _working_format(self, frame: av.VideoFrame) -> str:
        """The frame's own format where its planes can be edited, else the nearest one that can."""
        name = frame.format.name
        odd = frame.width % 2 or frame.height % 2
        if name in CHROMA_SHIFT and not (odd and CHROMA_SHIFT[name] != (0, 0)):
            return name
        grey_or_420 = "420" in name or "gray" in name or name.startswith(("nv", "p0"))
        chroma = "444" if odd else "420" if grey_or_420 else "422" if "422" in name or name[:2] == "p2" else "444"
        deepest = max(component.bits for component in frame.format.components)
        target = f"yuv{chroma}p" + ("" if deepest <= 8 else "10le" if deepest <= 10 else "12le")
        logger.info("%s: %s %dx%d is processed as %s", self.path, name, *self.stored_size, target)
        return target


def _deinterlacer(stream: VideoStream, first: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, name="in", time_base=stream.time_base
    )
    comb = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(comb)
    comb.link_to(sink)
    graph.configure()
    return graph


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The rotation tag of a decoded frame as 9 integers, or None where it has none or says upright."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, SideData):
        return None
    matrix = tuple(int(v) for v in np.frombuffer(memoryview(data), np.int32))
    return None if Orientation.from_matrix(matrix) == Orientation() else matrix
