"""H.264 as MP4 and Matroska hold it: the header with the parameter sets (avcC), and NAL units behind their length.

What is here is what `unchanged` needs to join stretches of two encoders in one stream: which numbers the parameter sets
of each have, one header with all of them, and the kinds of the units in a packet (ISO/IEC 14496-15, 5.3.3; H.264, 7.3).

>>> sets = read_header(stream.codec_context.extradata); sets.numbers    # {0}
>>> joined_header(sets, read_header(encoder.extradata))                 # bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

IDR, SEQUENCE_SET, PICTURE_SET = 5, 7, 8
OTHER_SETS = (13, 15)  # of extensions: depth and scalable layers, which nothing here knows
HIGH_PROFILES = (100, 110, 122, 244)  # their header goes on with the format of samples
LARGEST_NUMBER = 31  # of a sequence parameter set
_LENGTH_BYTES = 4
_WITH_FORMAT = (*HIGH_PROFILES, 44, 83, 86, 118, 128, 134, 135, 138, 139)
# Highest level_idc -> macroblocks that its decoders hold (H.264, table A-1).
_LEVELS = (
    (10, 396), (11, 900), (20, 2376), (21, 4752), (30, 8100), (31, 18_000), (32, 20_480), (41, 32_768), (42, 34_816),
    (50, 110_400), (52, 184_320), (62, 696_320),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParameterSets:
    """The content of an avcC header.

    Attributes:
        sequence, picture: NAL units, as they are.
        numbers: every id that one of them has.
    """

    sequence: tuple[bytes, ...]
    picture: tuple[bytes, ...]
    numbers: frozenset[int]


def read_header(data: bytes | None) -> ParameterSets:
    """Read an avcC header.

    Raises:
        ValueError: it is none, it holds no parameter sets, or lengths take other than four bytes.
    """
    if data is None or len(data) < 7 or data[0] != 1:
        raise ValueError("it has no avcC header")
    if (data[4] & 3) + 1 != _LENGTH_BYTES:
        raise ValueError(f"its units' lengths take {(data[4] & 3) + 1} bytes, not {_LENGTH_BYTES}")
    at, groups = 5, list[tuple[bytes, ...]]()
    for mask in (31, 255):
        if at >= len(data):
            raise ValueError("its avcC header is cut off")
        count, at, units = data[at] & mask, at + 1, list[bytes]()
        for _ in range(count):
            size = int.from_bytes(data[at : at + 2], "big")
            units.append(data[at + 2 : at + 2 + size])
            at += 2 + size
            if not size or at > len(data):
                raise ValueError("its avcC header is cut off")
        groups.append(tuple(units))
    sequence, picture = groups
    if not sequence or not picture or any(len(unit) < 5 for unit in sequence):
        raise ValueError("its avcC header holds no parameter sets")
    numbers = {_Bits(unit[4:]).unsigned() for unit in sequence} | {_Bits(unit[1:]).unsigned() for unit in picture}
    return ParameterSets(sequence=sequence, picture=picture, numbers=frozenset(numbers))


def joined_header(*sets: ParameterSets) -> bytes:
    """One avcC header with the parameter sets of all; it claims the highest profile and level among them."""
    sequence = [unit for one in sets for unit in one.sequence]
    picture = [unit for one in sets for unit in one.picture]
    highest = max(sequence, key=lambda unit: (unit[1], unit[3]))
    compatible = sequence[0][2]
    for unit in sequence[1:]:
        compatible &= unit[2]
    level = max(unit[3] for unit in sequence)
    header = bytes((1, highest[1], compatible, level, 0xFC | _LENGTH_BYTES - 1, 0xE0 | len(sequence)))
    header += b"".join(len(unit).to_bytes(2, "big") + unit for unit in sequence) + bytes((len(picture),))
    header += b"".join(len(unit).to_bytes(2, "big") + unit for unit in picture)
    if highest[1] in HIGH_PROFILES:
        bits = _Bits(highest[4:])
        bits.unsigned()
        chroma = bits.unsigned()
        header += bytes((0xFC | chroma, 0xF8, 0xF8, 0))  # 8 bits of luma and chroma, no further sets
    return header


def unused_number(sets: ParameterSets) -> int:
    """An id that no parameter set has.

    Raises:
        ValueError: all are taken.
    """
    for number in range(LARGEST_NUMBER + 1):
        if number not in sets.numbers:
            return number
    raise ValueError("its parameter sets take all numbers")


def units(packet: bytes) -> Iterator[tuple[int, memoryview]]:
    """The kind and the bytes of every NAL unit of a packet; ValueError where a length leads out of it."""
    view, at = memoryview(packet), 0
    while at < len(view):
        size = int.from_bytes(view[at : at + _LENGTH_BYTES], "big")
        at += _LENGTH_BYTES
        if not size or at + size > len(view):
            raise ValueError("a packet is damaged")
        yield view[at] & 31, view[at : at + size]
        at += size


def with_lengths(some: Sequence[bytes]) -> bytes:
    """NAL units as a packet holds them."""
    return b"".join(len(unit).to_bytes(_LENGTH_BYTES, "big") + unit for unit in some)


class _Bits:
    """The bits of a unit's content, in order (H.264, 7.2 and 9.1)."""

    def __init__(self, content: bytes) -> None:
        plain = content[:2048].replace(b"\0\0\3", b"\0\0")
        self._value, self._left = int.from_bytes(plain, "big"), 8 * len(plain)

    def take(self, count: int) -> int:
        """An unsigned number of so many bits."""
        self._left -= count
        if self._left < 0:
            raise ValueError("a parameter set is cut off")
        return self._value >> self._left & ((1 << count) - 1)

    def unsigned(self) -> int:
        """An unsigned Exp-Golomb number."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def signed(self) -> int:
        """A signed Exp-Golomb number."""
        code = self.unsigned()
        return (code + 1) // 2 if code % 2 else -(code // 2)


@dataclass(frozen=True, kw_only=True)
class SequenceInfo:
    """What a sequence parameter set says.

    Attributes:
        buffered_frames: how many frames a decoder holds (max_dec_frame_buffering).
        lossless: whether pictures may pass by the transform.
    """

    buffered_frames: int
    lossless: bool


def read_sequence(sequence: bytes) -> SequenceInfo:
    """Read a sequence parameter set (H.264, 7.3.2.1.1 and E.1.1).

    Raises:
        ValueError: it is damaged.
    """
    profile, constraints, level = sequence[1:4]
    bits = _Bits(sequence[4:])
    bits.unsigned()  # its number
    lossless = profile in _WITH_FORMAT and _format_is_lossless(bits)
    bits.unsigned()  # length of frame numbers
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.take(1)
        bits.signed()
        bits.signed()
        for _ in range(bits.unsigned()):
            bits.signed()
    bits.unsigned()  # reference frames
    bits.take(1)
    macroblocks = (bits.unsigned() + 1) * (bits.unsigned() + 1)
    if not bits.take(1):  # fields: the height is counted in pairs of rows
        macroblocks *= 2
        bits.take(1)
    bits.take(1)
    if bits.take(1):  # cropping
        for _ in range(4):
            bits.unsigned()
    frames = _stated_buffering(bits) if bits.take(1) else None
    if frames is None and constraints & 0x10 and profile in (44, 86, *HIGH_PROFILES):
        frames = 0  # pictures that refer to none
    if frames is None:
        if level == 11 and constraints & 0x10:  # level 1b
            level = 9
        limit = next((size for highest, size in _LEVELS if level <= highest), _LEVELS[-1][1])
        frames = min(limit // macroblocks, 16)
    return SequenceInfo(buffered_frames=frames, lossless=lossless)


def _format_is_lossless(bits: _Bits) -> bool:
    """Read over the format of samples and the scaling lists."""
    chroma = bits.unsigned()
    if chroma == 3:
        bits.take(1)
    bits.unsigned()
    bits.unsigned()
    lossless = bool(bits.take(1))
    if not bits.take(1):
        return lossless
    for place in range(12 if chroma == 3 else 8):  # scaling lists
        last = following = 8
        for _ in range((16 if place < 6 else 64) if bits.take(1) else 0):
            if following:
                following = (last + bits.signed()) % 256
                last = following or last
    return lossless


def _stated_buffering(bits: _Bits) -> int | None:
    """What the usability information says, None where it is silent."""
    if bits.take(1) and bits.take(8) == 255:
        bits.take(32)
    if bits.take(1):
        bits.take(1)
    if bits.take(1):
        bits.take(4)
        if bits.take(1):
            bits.take(24)
    if bits.take(1):
        bits.unsigned()
        bits.unsigned()
    if bits.take(1):
        bits.take(65)
    timed = False
    for _ in range(2):
        if bits.take(1):
            timed = True
            _skip_rates(bits)
    bits.take(timed)
    bits.take(1)
    if not bits.take(1):
        return None
    bits.take(1)
    for _ in range(5):
        bits.unsigned()
    return bits.unsigned()


def _skip_rates(bits: _Bits) -> None:
    count = bits.unsigned() + 1
    bits.take(8)
    for _ in range(count):
        bits.unsigned()
        bits.unsigned()
        bits.take(1)
    bits.take(20)
