"""Which encoder writes a picture, how finely, and what it is told about its colours.

8-bit pictures become H.264, deeper ones H.265 (Main 10 and Main 12 play nearly everywhere, High 10 H.264 hardly
anywhere). Four presets, coarse to exact; "lossless" decodes to the very planes that were written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import av
from av.sidedata.sidedata import SideData

from lipstream.media.planes import bit_depth

Quality = Literal["draft", "good", "best", "lossless"]

# quality -> (crf, preset); x265 is several times slower at the same preset and finer at the same crf
PRESETS: dict[str, dict[Quality, tuple[int, str]]] = {
    "libx264": {
        "draft": (26, "ultrafast"),
        "good": (16, "veryfast"),
        "best": (12, "slow"),
        "lossless": (0, "veryfast"),
    },
    "libx265": {
        "draft": (28, "ultrafast"),
        "good": (18, "superfast"),
        "best": (14, "medium"),
        "lossless": (0, "superfast"),
    },
}


@dataclass(frozen=True, kw_only=True)
class HdrTags:
    """What a display is told about high dynamic range, in the encoder's own words.

    Attributes:
        mastering: "G(x,y)B(x,y)R(x,y)WP(x,y)L(max,min)", chromaticities in 1/50000, luminance in 1/10000 cd/m2.
        light: "largest,average" content light level in cd/m2.
    """

    mastering: str | None = None
    light: str | None = None


def hdr_tags(frame: av.VideoFrame) -> HdrTags:
    """The static HDR metadata of a decoded frame."""
    mastering = light = None
    data = frame.side_data.get("MASTERING_DISPLAY_METADATA")
    if isinstance(data, SideData):
        # AVMasteringDisplayMetadata: R, G, B (x, y), white (x, y), min, max luminance as rationals, then two flags.
        values = struct.unpack("=20i2i", bytes(memoryview(data))[:88])
        if values[20] and values[21]:

            def scaled(place: int, unit: int) -> int:
                return round(int(values[2 * place]) * unit / int(values[2 * place + 1]))

            xy = [scaled(place, 50_000) for place in range(8)]
            (rx, ry, gx, gy, bx, by, wx, wy), low, high = xy, scaled(8, 10_000), scaled(9, 10_000)
            mastering = f"G({gx},{gy})B({bx},{by})R({rx},{ry})WP({wx},{wy})L({high},{low})"
    data = frame.side_data.get("CONTENT_LIGHT_LEVEL")
    if isinstance(data, SideData):
        largest, average = struct.unpack("=2I", bytes(memoryview(data))[:8])
        light = f"{largest},{average}"
    return HdrTags(mastering=mastering, light=light)


def encoder_for(
    pix_fmt: str, quality: Quality, crf: int | None = None, preset: str | None = None, hdr: HdrTags | None = None
) -> tuple[str, dict[str, str]]:
    """The encoder's name and its options for pictures of a working format.

    Args:
        crf, preset: instead of the quality's own.
    """
    name = "libx264" if bit_depth(pix_fmt) == 8 else "libx265"
    usual_crf, usual_preset = PRESETS[name][quality]
    options = {"preset": preset or usual_preset}
    if name == "libx264":
        if quality == "lossless":
            options["qp"] = "0"
        else:
            options["crf"] = str(usual_crf if crf is None else crf)
        return name, options
    told = ["log-level=error"]
    if quality == "lossless":
        told.append("lossless=1")
    else:
        options["crf"] = str(usual_crf if crf is None else crf)
    if hdr is not None and hdr.mastering is not None:
        told.append(f"master-display={hdr.mastering}")
    if hdr is not None and hdr.light is not None:
        told.append(f"max-cll={hdr.light}")
    if hdr is not None and (hdr.mastering or hdr.light):
        told.append("hdr10=1")
    options["x265-params"] = ":".join(told)
    return name, options
