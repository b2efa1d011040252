"""Stretches of a source that nothing changed, taken over packet by packet; what lies between them is encoded.

The unit is the closed group: from one IDR picture to the next, shown in one piece. If every frame of it was left as it
was, its packets are the source's own, bit for bit. If not, all its frames are encoded, those before the first change
decoded once more from the packets that were kept for that. The encoder's parameter sets have a number of their own and
lie in the header beside the source's; each of its stretches begins with an IDR picture. Memory holds one group of
packets, never its pictures.

    >>> splice = Splice(reader, new_encoder)
    >>> for frame, changed in frames: packets += splice.write(frame, unchanged=not changed)
    >>> packets += splice.finish()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias, cast

import av
from av.video.codeccontext import VideoCodecContext

from lipstream.media.h264 import (
    IDR,
    OTHER_SETS,
    PICTURE_SET,
    SEQUENCE_SET,
    ParameterSets,
    joined_header,
    read_header,
    read_sequence,
    units,
    unused_number,
    with_lengths,
)
from lipstream.media.opening import open_media, picture_stream
from lipstream.media.planes import bit_depth
from lipstream.media.reader import SourceFrame, VideoReader

VideoPacket: TypeAlias = "av.Packet[av.VideoStream]"

MAX_GROUP_BYTES = 64 * 1024 * 1024
MAX_GROUP_FRAMES = 3000  # two minutes at 25 frames/s
PROFILES = {66: "baseline", 77: "main"}  # those less than what the encoder would choose


class NotCopyable(ValueError):  # noqa: N818 - a property of the source, no error
    """Why no stretch of a source can be taken over: half a sentence about the source, "it is ..."."""


@dataclass(kw_only=True)
class Group:
    """The pictures from one IDR to the next.

    Attributes:
        packets: in the order of decoding; empty where the group cannot be taken over.
        pts: of its frames as they are shown.
        problem: why it cannot be taken over, or "".
    """

    packets: list[VideoPacket] = field(default_factory=list, repr=False)
    pts: list[int] = field(default_factory=list, repr=False)
    problem: str = ""


class SourceGroups:
    """The groups of a source in order, one in memory at a time.

    Attributes:
        sets: its parameter sets.
        reorder_depth: by how many frames decoding runs ahead of showing, as its header says.
        in_band: it says its parameter sets in packets, too.

    Raises:
        NotCopyable: it is not 8-bit H.264 in MP4, MOV or Matroska, or is not given out as it is stored.
    """

    def __init__(self, like: VideoReader) -> None:
        self._container = open_media(like.path, need="video")
        try:
            stream = picture_stream(self._container)
            assert stream is not None  # open_media made sure
            self._context = stream.codec_context
            self.sets = _copyable(like, self._container.format.name, self._context)
            self.reorder_depth = self._context.reorder_depth
            self._known = {*self.sets.sequence, *self.sets.picture}
            self.in_band = False
            self._foreign = ""  # why nothing from here on can be taken over
            self._packets = self._container.demux(stream)
            self._first = self._next_idr()  # the picture that begins the next group
        except BaseException:
            self._container.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()

    def at(self, pts: int, depth: int) -> Group | None:
        """The group that begins with the frame shown at `pts`, if one does; those before it are passed over.

        Args:
            depth: how many frames the result's decoding times run ahead.
        """
        while self._first is not None and self._first.pts is not None and self._first.pts <= pts:
            begins = self._first.pts == pts
            group = self._read_group(self._first, depth)
            if begins:
                return group
        return None

    def decoded(self, group: Group, count: int) -> Iterator[av.VideoFrame]:
        """The first frames of a group as they are shown."""
        self._context.flush_buffers()
        given = 0
        for packet in (*group.packets, None):
            try:
                frames = self._context.decode(packet)
            except av.InvalidDataError:
                continue  # the reader passed over it, too
            for frame in frames:
                yield frame
                given += 1
                if given == count:
                    return

    def _read_group(self, first: VideoPacket, depth: int) -> Group:
        group, size = Group(packets=[first]), first.size
        self._first = None
        while (packet := self._read()) is not None:
            if self._is_idr(packet):
                self._first = packet
                break
            group.packets.append(packet)
            size += packet.size
            if size > MAX_GROUP_BYTES or len(group.packets) > MAX_GROUP_FRAMES:
                # The next one may be gigabytes away: nothing after it is looked at.
                problem = f"a group of pictures is too long (over {len(group.packets) - 1} frames)"
                return Group(problem=problem)
        problem = self._foreign or _order_problem(group.packets, self._first, depth)
        if problem:
            return Group(problem=problem)
        group.pts = sorted(packet.pts for packet in group.packets if packet.pts is not None)
        return group

    def _next_idr(self) -> VideoPacket | None:
        while (packet := self._read()) is not None:
            if self._is_idr(packet):
                return packet
        return None

    def _read(self) -> VideoPacket | None:
        try:
            while True:
                packet = next(self._packets)
                if packet.size:
                    return packet
        except (StopIteration, av.FFmpegError, OSError):
            return None  # what is damaged is for the reader to say

    def _is_idr(self, packet: VideoPacket) -> bool:
        """Whether a packet begins a group; notes what makes it and all after it unfit."""
        idr, changes = False, packet.has_sidedata("new_extradata")
        try:
            for kind, unit in units(bytes(packet)):
                idr = idr or kind == IDR
                if kind in (SEQUENCE_SET, PICTURE_SET):
                    self.in_band, changes = True, changes or bytes(unit) not in self._known
                changes = changes or kind in OTHER_SETS
        except ValueError as error:
            self._foreign = str(error)
        if changes:
            self._foreign = "it changes its parameter sets on the way"
        return idr


def _copyable(like: VideoReader, container: str, context: VideoCodecContext) -> ParameterSets:
    """The parameter sets of a source whose packets can stand in the result; NotCopyable says why not."""
    if not container.startswith(("mov", "matroska")):
        raise NotCopyable(f"it lies in {container}, not in MP4, MOV or Matroska")
    name, form = context.codec.canonical_name, context.format
    stored = "unknown" if form is None else form.name
    if name != "h264" or form is None or any(component.bits != 8 for component in form.components):
        raise NotCopyable(f"it is {name} ({stored}), not 8-bit H.264")
    if like.interlaced:
        raise NotCopyable("it is deinterlaced")
    if stored != like.pix_fmt or bit_depth(like.pix_fmt) != 8:
        raise NotCopyable(f"it is stored as {stored} and written as {like.pix_fmt}")
    try:
        sets = read_header(context.extradata)
        encoder_options(sets, context.reorder_depth)
    except ValueError as error:
        raise NotCopyable(str(error)) from None
    return sets


def encoder_options(sets: ParameterSets, reorder_depth: int) -> dict[str, str]:
    """What libx264 is told so that its stretches stand beside others with these parameter sets.

    It holds as many frames as they do, reorders them no further and has their profile, where it can: where these
    change, a decoder may throw away what it has not shown yet (H.264, C.4.4), and OpenH264 does.

    Raises:
        ValueError: the sets are damaged, leave no number, or are those of lossless pictures.
    """
    if len(sets.sequence) > 30 or len(sets.picture) > 250:
        raise ValueError("it has too many parameter sets")
    told_by = [read_sequence(unit) for unit in sets.sequence]
    if any(sequence.lossless for sequence in told_by):
        # FFmpeg 8.1 decodes lossless stretches beside others wrongly.
        raise ValueError("it is lossless")
    frames = max(sequence.buffered_frames for sequence in told_by)
    told = [f"sps-id={unused_number(sets)}", "annexb=0"]
    if frames == 0:
        told.append("keyint=1")
    else:
        told.append(f"dpb-size={frames}")
        if frames < 2 or reorder_depth < 1:
            told.append("bframes=0")
        elif frames < 4 or reorder_depth < 2:
            told.append("b-pyramid=none")
        if frames < 5:
            told.append("ref=1")  # the slower presets would hold five
    profile = PROFILES.get(max(unit[1] for unit in sets.sequence))
    return {"x264-params": ":".join(told)} | ({"profile": profile} if profile else {})


def _order_problem(packets: list[VideoPacket], after: VideoPacket | None, depth: int) -> str:
    """Why packets cannot stand in the result as they are, or ""."""
    pts = [packet.pts for packet in packets if packet.pts is not None]
    if len(pts) != len(packets) or any(packet.is_discard or packet.is_corrupt for packet in packets):
        return "some of its frames are hidden or damaged"
    if min(pts) != pts[0] or len(set(pts)) != len(pts):
        return "frames are shown before the IDR picture that they follow"
    if after is not None and (after.pts is None or after.pts <= max(pts)):
        return "its groups of pictures overlap"
    rank = {value: place for place, value in enumerate(sorted(pts))}
    if max(place - rank[value] for place, value in enumerate(pts)) > depth:
        return "its frames are reordered further than its header says"
    return ""


class Splice:
    """The picture of a result: encoded where something changed, the source's packets elsewhere.

    Args:
        like: the source.
        new_encoder: makes an opened libx264 encoder for pictures of the source with the options it is given, besides
            its own; the first call's is the one that the output stream belongs to.

    Attributes:
        header: avcC with the parameter sets of both.
        copied_frames: how many frames were taken over so far.
        problem: why the last group that could not be taken over, changed or not, could not; or "".

    Raises:
        NotCopyable: nothing of this source can be taken over.
    """

    def __init__(self, like: VideoReader, new_encoder: Callable[[dict[str, str]], VideoCodecContext]) -> None:
        self._like = like
        self._source = SourceGroups(like)
        try:
            self._options = encoder_options(self._source.sets, self._source.reorder_depth)
            self._new_encoder = new_encoder
            self._encoder: VideoCodecContext | None = new_encoder(self._options)
            self._sets = read_header(self._encoder.extradata)
        except BaseException:
            self._source.close()
            raise
        self.header = joined_header(self._source.sets, self._sets)
        self.copied_frames, self.problem = 0, ""
        self._begun = self._encoding = False
        self._begins_stretch = True  # whether the encoder's next packet is its first
        self._depth = max(self._source.reorder_depth, self._encoder.reorder_depth)
        self._clock: deque[int] = deque()  # decoding times of the next packets
        self._group: Group | None = None  # that frames are in or come to
        self._held: list[tuple[int, int]] = []  # (pts, duration) of its frames, none changed, none written yet

    def write(self, frame: SourceFrame, *, unchanged: bool) -> list[VideoPacket]:
        """Take the next frame; the packets that are ready, in the order of decoding, with decoding times."""
        self._tick(frame)
        # A damaged frame was concealed with pictures that will not stand before it in the result.
        unchanged = unchanged and not frame.stored.is_corrupt
        if not self._held:
            self._group = self._source.at(frame.pts, self._depth)
            self.problem = self._group.problem if self._group and self._group.problem else self.problem
        group = self._group
        if unchanged and group is not None and group.pts and group.pts[len(self._held)] == frame.pts:
            self._held.append((frame.pts, frame.duration_pts))
            return self._copied(group) if len(self._held) == len(group.pts) else []
        packets = self._given_up()
        return packets + self._encoded(frame.stored, frame.pts, frame.duration_pts)

    def finish(self) -> list[VideoPacket]:
        """No more frames: the rest."""
        packets = self._given_up() + self._flushed()
        self.close()
        return packets

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()

    @property
    def waiting(self) -> bool:
        """Whether frames were taken whose packets are not decided yet."""
        return bool(self._held)

    def _tick(self, frame: SourceFrame) -> None:
        """Decoding times are the frames' own, so many frames later as the source or the encoder may reorder them by.

        So they increase across all stretches, and no packet is decoded after it is shown.
        """
        if not self._begun:
            self._begun = True
            step = max(round(1 / (self._like.fps * self._like.time_base)), 1)
            self._clock.extend(frame.pts - step * ahead for ahead in range(self._depth, 0, -1))
        self._clock.append(frame.pts)

    def _timed(self, packets: list[VideoPacket]) -> list[VideoPacket]:
        for packet in packets:
            packet.dts = self._clock.popleft()
            assert packet.pts is not None and packet.dts <= packet.pts
        return packets

    def _copied(self, group: Group) -> list[VideoPacket]:
        packets = self._flushed() + self._timed(group.packets)
        self.copied_frames += len(group.packets)
        self._group, self._held = None, []
        return packets

    def _given_up(self) -> list[VideoPacket]:
        """Something changed in the group: its frames before that are decoded again and encoded."""
        group, held = self._group, self._held
        self._group, self._held = None, []
        if group is None or not held:
            return []
        packets: list[VideoPacket] = []
        for (pts, duration), stored in zip(held, self._source.decoded(group, len(held)), strict=True):
            if stored.pts != pts:
                raise RuntimeError(f"{self._like.path}: frame at {pts} was decoded again as the one at {stored.pts}")
            packets += self._encoded(stored, pts, duration)
        return packets

    def _encoded(self, stored: av.VideoFrame, pts: int, duration: int) -> list[VideoPacket]:
        if self._encoder is None:
            self._encoder = self._new_encoder(self._options)
            if read_header(self._encoder.extradata) != self._sets:
                raise RuntimeError(f"{self._like.path}: the encoder changed its parameter sets; nothing is kept")
        self._encoding = True
        for_encoder(stored, pts, self._like.time_base, duration)
        return self._encoder_packets(stored)

    def _encoder_packets(self, stored: av.VideoFrame | None) -> list[VideoPacket]:
        assert self._encoder is not None
        packets = self._encoder.encode(stored)
        if packets and self._begins_stretch and self._source.in_band:
            # Who reads parameter sets from packets may read them from there alone.
            packets[0] = _with_units(packets[0], (*self._sets.sequence, *self._sets.picture))
        self._begins_stretch = self._begins_stretch and not packets
        return self._timed(packets)

    def _flushed(self) -> list[VideoPacket]:
        """The end of an encoded stretch; the next one begins with a new encoder, which a flushed one cannot be."""
        if self._encoder is None or not self._encoding:
            return []
        packets = self._encoder_packets(None)
        self._encoder, self._encoding, self._begins_stretch = None, False, True
        return packets


def _with_units(packet: VideoPacket, first: Sequence[bytes]) -> VideoPacket:
    """A packet that begins with further units."""
    whole = cast(VideoPacket, av.Packet(with_lengths(first) + bytes(packet)))
    whole.pts, whole.dts, whole.time_base = packet.pts, packet.dts, packet.time_base
    whole.duration, whole.is_keyframe = packet.duration, packet.is_keyframe
    return whole


def for_encoder(stored: av.VideoFrame, pts: int, time_base: Fraction, duration_pts: int) -> av.VideoFrame:
    """The frame as an encoder takes it: with the sequence's times, and free to become any kind of picture."""
    stored.pts, stored.time_base, stored.duration = pts, time_base, duration_pts
    stored.pict_type = av.video.frame.PictureType.NONE
    return stored
