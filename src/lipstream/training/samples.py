"""Training samples: real or synthetic talking videos as canvases, shape fields and speech.

``prepare_video`` runs the product's own tracker and face canvas over a video, so that training sees exactly what
``lipstream sync`` will see. A sample is two files: ``NAME.npz`` (shape fields, validity, speech) and ``NAME.tex.npy``
(canvas textures, memory-mapped when read).

    python -m lipstream.training.samples OUT VIDEO...      # 25 fps videos with their own speech
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lipstream.faces.canvas import FaceCanvas

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """One talking clip at 25 fps.

    Attributes:
        name: file stem; the part before the first ``_`` names the speaker.
        fields: [F, 20, 20, 2] float16 shape fields, crop px.
        textures: [F, 160, 160, 3] uint8, memory-mapped.
        tracked: [F] bool, whether a face was found in the frame.
        speech: [samples] int16 mono 16 kHz, starting with frame 0.
    """

    name: str
    fields: NDArray[np.float16]
    textures: NDArray[np.uint8]
    tracked: NDArray[np.bool_]
    speech: NDArray[np.int16]

    @property
    def speaker(self) -> str:
        return self.name.split("_")[0]

    def __len__(self) -> int:
        return len(self.fields)


def prepare_video(video: Path, folder: Path, canvas: FaceCanvas) -> bool:
    """Write the sample of one 25 fps video; False (and nothing written) where too few frames show a face.

    Raises:
        ValueError: the video has another frame rate, so that its frames would not lie beside its speech.
    """
    # Imported here: training from prepared samples needs neither the face networks nor a video library.
    from lipstream.data.prepare.canvas_sample import CanvasSample
    from lipstream.faces.track import FaceTracker
    from lipstream.media.reader import VideoReader
    from lipstream.media.speech import load_speech

    target = folder / f"{video.parent.name}_{video.stem}.npz"
    if target.exists():
        return True
    tracker, sample = FaceTracker(), CanvasSample(canvas)
    reader = VideoReader(video)
    if abs(reader.fps - 25) > Fraction(1, 20):
        raise ValueError(
            f"{video}: {float(reader.fps):.2f} frames per second; samples are made of 25, convert it first "
            "or make them with lipstream prepare --format samples"
        )
    for frame in reader:
        face = tracker.step(frame.image)
        sample.add(frame.image, None if face is None else face.landmarks)
    if sum(sample.tracked) < 12:
        log.warning("%s: a face in %d of %d frames; skipped", video, sum(sample.tracked), len(sample.tracked))
        return False
    sample.save(target, load_speech(video))
    return True


def load_clips(folders: Iterable[Path], leave_out: Sequence[str] = ()) -> list[Clip]:
    """All samples of ``folders``, sorted by name, without the speakers or clips named in ``leave_out``.

    Raises:
        ValueError: a folder holds no samples.
    """
    clips: list[Clip] = []
    for folder in folders:
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise ValueError(f"{folder}: no samples; run python -m lipstream.training.samples {folder} VIDEO...")
        for path in paths:
            if path.stem in leave_out or path.stem.split("_")[0] in leave_out:
                continue
            data = np.load(path)
            textures = np.load(path.with_suffix(".tex.npy"), mmap_mode="r")
            clips.append(Clip(path.stem, data["field"], textures, data["ok"].astype(bool), data["wav"]))
    return clips


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("videos", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    canvas = FaceCanvas()
    for video in arguments.videos:
        prepare_video(video, arguments.out, canvas)


if __name__ == "__main__":
    main()
