"""Training clips as latents and speech rows, and windows drawn from them: the data of all stages of the pocket model.

A clip is coded once per appearance (mirror, colours) with latents of every frame offset, and its speech in several
voices. :class:`Windows` draws what a stage trains on: a few latent frames, their speech, and what a take would have
seen of the source by then. Coding 700 clips takes minutes, so :func:`code_clips` can keep the result in a file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.canvas import FaceCanvas
from lipstream.inside import LipRuler
from lipstream.models.audio import SpeechEncoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec
from lipstream.training.codec import Sampler
from lipstream.training.samples import Clip
from lipstream.training.speech import augment

log = logging.getLogger(__name__)

CHUNK = 3
STEADY = 1 + 2 * CHUNK  # sink, previous chunk, current chunk
# A clip has to have room for another segment that begins at least so far from the target's.
APART_FRAMES = 6


def span_frames(latent_frames: int) -> int:
    """Pixel frames of so many latent frames: the first codes one, the others four."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


class Coded(NamedTuple):
    """One appearance variant of a clip as latents.

    Attributes:
        moving: [F - 3, K, g, g] float16, row t codes frames t .. t + 3.
        still: [F, K, g, g] float16, row t codes frame t four times.
        speech: [variants, F, D] float16 feature rows.
        opening: [F - 3] mean lip opening of the frames of each row of ``moving``, crop px.
        name: of the clip; the part before the first ``_`` names the speaker.
    """

    moving: Tensor
    still: Tensor
    speech: Tensor
    opening: Tensor
    name: str

    @property
    def speaker(self) -> str:
        return self.name.split("_")[0]

    @property
    def frames(self) -> int:
        return len(self.still)


@torch.no_grad()
def code_clip(codec: PocketCodec, sampler: Sampler, clip: Clip, speech: Tensor, plain: bool, ruler: LipRuler) -> Coded:
    """Latents of every frame offset of one clip under one appearance augmentation."""
    table, mirror = sampler.augmentation()
    if plain:
        table, mirror = np.repeat(np.linspace(0, 1, 256, dtype=np.float32)[:, None], 3, 1), False
    raw = clip.textures[:]
    textures = torch.from_numpy(np.stack([table[:, c][raw[..., c]] for c in range(3)], 1))
    fields = torch.from_numpy(clip.fields.astype(np.float32))
    if mirror:
        fields, textures = fields.flip(2) * torch.tensor([-1.0, 1.0]), textures.flip(-1)
    moving, still = (z.half() for z in codec.encode_sliding(fields, textures))
    opening = ruler.opening(fields).unfold(0, FRAMES_PER_LATENT, 1).mean(1)
    return Coded(moving, still, speech, opening, clip.name)


class Window(NamedTuple):
    """One training window of T latent frames; latents not yet pose-free.

    Attributes:
        target: [T, K, g, g]. speech: [T, 4, D].
        reference: [T, K, g, g] the same clip from another start (it may overlap the target).
        shut, wide: [K, g, g] the most closed and the widest of some latents of that other segment.
    """

    target: Tensor
    speech: Tensor
    reference: Tensor
    shut: Tensor
    wide: Tensor


class Windows:
    """Draws training windows from coded clips.

    Args:
        weights: of the clips.
        latent_frames: T of a window.
    """

    def __init__(
        self, coded: Sequence[Coded], weights: NDArray[np.float64], seed: int, latent_frames: int = STEADY
    ) -> None:
        span = span_frames(latent_frames)
        long_enough = [item.frames >= span + 2 * APART_FRAMES for item in coded]
        if not any(long_enough):
            raise ValueError(f"no clip has {span + 2 * APART_FRAMES} frames; {latent_frames} latent frames need that")
        self.coded = [item for item, keep in zip(coded, long_enough, strict=True) if keep]
        kept = weights[np.array(long_enough)]
        self.weights = kept / kept.sum()
        self.latent_frames = latent_frames
        self.rng = np.random.default_rng(seed)

    def draw(self, sink_apart: bool = False) -> Window:
        """A random window of a random clip.

        Args:
            sink_apart: the first latent frame lies anywhere before the others, as a stream's sink does.
        """
        rng, size = self.rng, FRAMES_PER_LATENT
        item = self.coded[int(rng.choice(len(self.coded), p=self.weights))]
        span = span_frames(self.latent_frames)
        start = int(rng.integers(0, max(1, item.frames - span)))
        other = self._elsewhere(start, item.frames, span)
        sink = int(rng.integers(0, start + 1)) if sink_apart else start
        speech = item.speech[int(rng.integers(len(item.speech)))]

        def rows(first: int, base: int) -> tuple[Tensor, Tensor]:
            moving = [min(base + 1 + size * i, item.frames - size) for i in range(self.latent_frames - 1)]
            latents = torch.cat([item.still[first : first + 1], item.moving[moving]]).float()
            audio = [speech[first].expand(size, -1), *(speech[m : m + size] for m in moving)]
            return latents, torch.stack(audio).float()

        target, audio = rows(sink, start)
        reference, _ = rows(other, other)
        # What a take has seen so far: between one latent and a whole other window.
        seen = other + rng.integers(0, span - size + 1, int(rng.integers(1, self.latent_frames + 1)))
        seen = np.minimum(seen, len(item.opening) - 1)
        order = seen[np.argsort(item.opening[seen].numpy())]
        shut, wide = (item.moving[int(order[end])].float() for end in (0, -1))
        return Window(target, audio, reference, shut, wide)

    def _elsewhere(self, start: int, frames: int, span: int) -> int:
        """The start of another segment; the two may overlap, but never lie frame on frame."""
        room = max(1, frames - span)
        for _ in range(20):
            other = int(self.rng.integers(0, room))
            if abs(other - start) >= APART_FRAMES:
                return other
        return start - APART_FRAMES if start >= APART_FRAMES else start + APART_FRAMES


def shift_pitch(samples: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Speech with pitch and formants times ``factor`` and unchanged timing (FFmpeg: resample, then stretch back)."""
    graph = av.filter.Graph()
    nodes = [
        graph.add_abuffer(format="flt", sample_rate=16_000, layout="mono", time_base=Fraction(1, 16_000)),
        graph.add("asetrate", str(round(16_000 * factor))),
        graph.add("aresample", "16000"),
        graph.add("atempo", f"{1 / factor:.6f}"),
        graph.add("aformat", "sample_fmts=flt:sample_rates=16000:channel_layouts=mono"),
        graph.add("abuffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None], np.float32), format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
    graph.push(frame)
    graph.push(None)
    parts: list[NDArray[np.float32]] = []
    while True:
        try:
            parts.append(graph.pull().to_ndarray()[0])
        except (av.BlockingIOError, av.EOFError):
            break
    shifted = np.concatenate([np.zeros(800, np.float32), *parts, np.zeros(len(samples), np.float32)])
    lead = int(np.interp(factor, [0.8, 1.0, 1.3, 1.6], [80, -60, -280, -400]))  # atempo's own delay, measured
    return shifted[800 + lead : 800 + lead + len(samples)]


@torch.no_grad()
def speech_rows(
    encoder: SpeechEncoder, clips: Sequence[Clip], rng: np.random.Generator, variants: int = 4
) -> dict[str, Tensor]:
    """Feature rows [variants, F, D] float16 of every clip: clean, then damaged and pitch-shifted versions of it.

    One man speaks most of the real clips; without other pitches the model would learn his voice.
    """
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    rows: dict[str, Tensor] = {}
    for clip in clips:
        frames = len(clip)
        speech = np.zeros(frames * 640 + encoder.config.lookahead_samples, np.float32)
        known = clip.speech[: len(speech)].astype(np.float32) / 32768
        speech[: len(known)] = known
        factors = [float(np.exp(rng.uniform(np.log(0.8), np.log(1.6)))) for _ in range(variants - 1)]
        waves = torch.from_numpy(np.stack([speech, *(shift_pitch(speech, f) for f in factors)]))
        waves[1:] = augment(waves, generator)[1:]
        rows[clip.name] = encoder(waves)[:, :frames].half()
    return rows


def code_clips(
    codec: PocketCodec, clips: Sequence[Clip], encoder: SpeechEncoder, versions: int, cache: Path | None = None
) -> tuple[list[Coded], NDArray[np.float64]]:
    """All clips in so many appearances, with the draw weight of each.

    Args:
        cache: a folder that keeps the result (about 2 MB a clip and version); it is read, mapped, the next time that
            the same clips are coded with the same networks.
    """
    stored = None if cache is None else cache / f"{_digest(codec, encoder, clips, versions)}.pt"
    sampler = Sampler(clips, seed=1)
    weights = np.tile(sampler.weights, versions)
    if stored is not None and stored.exists():
        items = torch.load(stored, weights_only=True, mmap=True)
        log.info("%s: %d coded clips", stored, len(items))
        return [Coded(**item) for item in items], weights
    rows = speech_rows(encoder, sampler.clips, np.random.default_rng(2))
    log.info("speech rows of %d clips", len(rows))
    ruler = LipRuler(FaceCanvas())
    coded = [
        code_clip(codec, sampler, clip, rows[clip.name], plain=version == 0, ruler=ruler)
        for version in range(versions)
        for clip in sampler.clips
    ]
    log.info("%d coded clips, %d latent frames", len(coded), sum(len(c.moving) for c in coded))
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_suffix(".tmp")
        torch.save([item._asdict() for item in coded], temporary)
        temporary.replace(stored)
    return coded, weights


def _digest(codec: PocketCodec, encoder: SpeechEncoder, clips: Sequence[Clip], versions: int) -> str:
    """Names what a coding depends on."""
    digest = hashlib.sha256(f"{versions} {[(clip.name, len(clip)) for clip in clips]}".encode())
    for network in (codec, encoder):
        for name, value in network.state_dict().items():
            if not name.startswith("painter."):  # it only decodes
                digest.update(name.encode() + value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
