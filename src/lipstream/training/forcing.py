"""Stage 1, diffusion forcing: the causal student learns to denoise every chunk at its own noise level (paper, 3).

Loss: squared error of the x0 prediction at t drawn per chunk from the student's own times {0.999, 0.769, 0}. A training
window is what the rolling cache shows at inference (spec 2.1): the sink, the previous chunk and the current chunk at
rotary positions 0..6, or the first chunk alone, or the first two. The reference sequence begins at another time of the
same clip (it may overlap the target, never frame on frame), and all latents are pose-free (nothing of the target's face
is shown), so that the only thing that can tell the mouth is the speech.

    python -m lipstream.training.forcing RUN --samples DIR... --codec codec.safetensors --speech speech.safetensors
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lipstream.checkpoints.networks import load_codec, load_dit
from lipstream.diffusion.schedule import STUDENT_TIMES, add_noise
from lipstream.faces.canvas import FaceCanvas
from lipstream.inside import LipRuler
from lipstream.models.audio import SpeechEncoder, load_speech_encoder
from lipstream.models.codec import FRAMES_PER_LATENT, PocketCodec, inner_lip_distance
from lipstream.models.dit import FLAVOURS, Conditions, DiT
from lipstream.training.codec import LEFT_OUT, Sampler
from lipstream.training.loop import Loop, LoopConfig, Trainee
from lipstream.training.samples import Clip, load_clips
from lipstream.training.speech import augment

log = logging.getLogger(__name__)

CHUNK = 3
STEADY = 1 + 2 * CHUNK  # sink, previous chunk, current chunk
# A clip has to have room for another segment that begins at least so far from the target's.
APART_FRAMES = 6
SHORTEST_FRAMES = 1 + FRAMES_PER_LATENT * (STEADY - 1) + 2 * APART_FRAMES


@dataclass(frozen=True, kw_only=True)
class ForcingConfig:
    """What stage 1 trains on.

    Attributes:
        time_odds: odds of the three student times for the current chunk.
        drop_audio: share of windows without speech (the null branch of guidance).
        shape_weight, gap_weight: weights of the shape field's and of the lip gap's error beside the texture's.
        averaged_odds: share of windows whose reference sequence is averaged over time.
        solo_odds, second_odds: share of windows that are a stream's first chunk alone, and its first two chunks.
        versions: appearance (and speech) variants kept of every clip.
        speech_dropout: share of the speech features that are blanked, each by itself. One man's voice is most of the
            real speech; without it the lips of people who were not trained on follow their own speech less.
    """

    batch: int = 16
    time_odds: tuple[float, float, float] = (0.5, 0.35, 0.15)
    drop_audio: float = 0.1
    shape_weight: float = 2.0
    gap_weight: float = 1.0
    versions: int = 2
    averaged_odds: float = 0.6
    speech_dropout: float = 0.25
    solo_odds: float = 0.15
    second_odds: float = 0.1


class Coded(NamedTuple):
    """One appearance variant of a clip as latents.

    Attributes:
        moving: [F - 3, K, g, g] float16, row t codes frames t .. t + 3.
        still: [F, K, g, g] float16, row t codes frame t four times.
        speech: [variants, F, D] float16 feature rows.
        opening: [F - 3] mean lip opening of the frames of each row of ``moving``, crop px.
    """

    moving: Tensor
    still: Tensor
    speech: Tensor
    opening: Tensor
    clip: Clip


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
    return Coded(moving, still, speech, opening, clip)


class Window(NamedTuple):
    """One training window; latents not yet pose-free.

    Attributes:
        target: [7, K, g, g]. speech: [7, 4, D].
        reference: [7, K, g, g] the same clip from another start (it may overlap the target).
        shut, wide: [K, g, g] the most closed and the widest of some latents of that other segment.
    """

    target: Tensor
    speech: Tensor
    reference: Tensor
    shut: Tensor
    wide: Tensor


class Windows:
    """Draws training windows from coded clips."""

    def __init__(self, coded: Sequence[Coded], weights: NDArray[np.float64], config: ForcingConfig, seed: int) -> None:
        self.coded, self.config = list(coded), config
        self.weights = weights / weights.sum()
        self.rng = np.random.default_rng(seed)

    def kind(self) -> int:
        """A window kind: 0 the first chunk alone, 1 the first two, 2 the steady window."""
        solo, second = self.config.solo_odds, self.config.second_odds
        return int(self.rng.choice(3, p=[solo, second, 1 - solo - second]))

    def draw(self, kind: int) -> Window:
        """A random window of a random clip."""
        rng, size = self.rng, FRAMES_PER_LATENT
        item = self.coded[int(rng.choice(len(self.coded), p=self.weights))]
        frames = len(item.clip)
        span = 1 + size * (STEADY - 1)  # frames of sink (adjacent or not) + two chunks
        start = int(rng.integers(0, max(1, frames - span)))
        other = self._elsewhere(start, frames, span)
        sink = 0 if kind < 2 else int(rng.integers(0, start + 1))
        speech = item.speech[int(rng.integers(len(item.speech)))]

        def rows(first: int, base: int) -> tuple[Tensor, Tensor]:
            moving = [min(base + 1 + size * i, frames - size) for i in range(STEADY - 1)]
            latents = torch.cat([item.still[first : first + 1], item.moving[moving]]).float()
            audio = [speech[first].expand(size, -1), *(speech[m : m + size] for m in moving)]
            return latents, torch.stack(audio).float()

        target, audio = rows(start if kind < 2 else sink, start)
        reference, _ = rows(other, other)
        # What a take has seen so far: between one latent and a whole other window.
        seen = other + rng.integers(0, span - size + 1, int(rng.integers(1, STEADY + 1)))
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


def window_layout(kind: int) -> tuple[list[int], Tensor]:
    """Latent frames of a window kind and which may see which ([n, n] bool).

    0: the first chunk alone; 1: the first two chunks; 2: sink, previous and current chunk.
    """
    chunk_of = {0: [0] * CHUNK, 1: [0] * CHUNK + [1] * CHUNK, 2: [0] + [1] * CHUNK + [2] * CHUNK}[kind]
    group = torch.tensor(chunk_of)
    return list(range(len(chunk_of))), group[:, None] >= group[None]


class ForcingLoss:
    """Stage-1 loss on random windows; one instance holds data and draws."""

    def __init__(self, model: DiT, codec: PocketCodec, windows: Windows) -> None:
        self.model, self.codec, self.windows = model, codec, windows
        self.config = windows.config
        c = codec.config
        self.mask = codec.mouth_mask()
        weight = torch.zeros(c.latent_channels, c.grid, c.grid)
        scale = codec.shape.scale.square()
        lips = torch.full((c.grid, c.grid), 0.35)
        lips[3:8, 2:8] = 1.0
        weight[: c.shape_channels] = (scale / scale.mean())[:, None, None] * lips * self.config.shape_weight
        (top, bottom), (left, right) = c.paint_rows, c.paint_cols
        weight[c.shape_channels :, top:bottom, left:right] = 1.0
        self.weight = weight * self.mask[0, 0]

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = self.windows.rng
        kind = self.windows.kind()  # one layout a step: static shapes, no padding
        rows = [self.windows.draw(kind) for _ in range(self.config.batch)]
        frames, visible = window_layout(kind)
        n = len(frames)
        target = self._pose_free(torch.stack([r.target for r in rows]))[:, :, :n]
        reference = self._references(torch.stack([r.reference for r in rows]))[:, :, :n]
        shut, wide = (
            self._pose_free(torch.stack(q)[:, None]) for q in zip(*((r.shut, r.wide) for r in rows), strict=True)
        )
        speech = torch.stack([r.speech[:n] for r in rows])
        silent = torch.from_numpy(generator.random(len(rows)) < self.config.drop_audio)
        speech = F.dropout(speech, self.config.speech_dropout)
        speech[silent] = 0
        t = self._times(kind, len(rows))
        noisy = add_noise(target, torch.randn_like(target), t)
        x0 = self.predict(self.model, noisy, t, speech, (shut, wide, reference), visible)
        return self._loss(x0, target, reference, t, kind)

    def predict(
        self, model: DiT, noisy: Tensor, t: Tensor, speech: Tensor, seen: tuple[Tensor, Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """x0 [B, K, T, g, g] of noisy latents at times t [B, T]; all that ``lipstream.mouth`` gives the network.

        Args:
            speech: [B, T, 4, D].
            seen: of the source, pose-free: most closed and widest mouth [B, K, 1, g, g], reference sequence.
            visible: [T, T] bool.
        """
        shut, wide, reference = seen
        with torch.autocast("cpu", torch.bfloat16):
            conditions = Conditions(
                reference=shut,
                mask=self.mask,
                masked_video=wide.expand_as(noisy),
                ref_sequence=reference,
                audio=model.audio_proj.join(speech),
            )
            x0: Tensor = model(noisy, t, conditions, frame_mask=visible)
        return x0.float()

    def _pose_free(self, z: Tensor) -> Tensor:
        """[B, T, K, g, g] -> pose-free [B, K, T, g, g]."""
        batch = z.shape[0]
        return rearrange(self.codec.pose_free(z.flatten(0, 1)), "(b t) k h w -> b k t h w", b=batch)

    def _references(self, z: Tensor) -> Tensor:
        """Reference sequences [B, T, K, g, g] -> pose-free [B, K, T, g, g], most of them averaged over time.

        At inference the reference sequence is the source's running average (see ``lipstream.mouth``).
        """
        moving = self._pose_free(z)
        still = torch.from_numpy(self.windows.rng.random(len(moving)) < self.config.averaged_odds)
        return torch.where(still[:, None, None, None, None], moving.mean(2, keepdim=True), moving)

    def _times(self, kind: int, batch: int) -> Tensor:
        odds = torch.tensor(self.config.time_odds)
        chunks = 1 if kind == 0 else 2
        drawn = torch.tensor(STUDENT_TIMES, dtype=torch.float64)[torch.multinomial(odds, batch * chunks, True)]
        t = drawn.view(batch, chunks).repeat_interleave(CHUNK, 1)
        if kind == 2:
            t = torch.cat([torch.zeros(batch, 1, dtype=torch.float64), t], 1)
        return t

    def lip_gap(self, z: Tensor) -> Tensor:
        """Inner lip distance of each frame, crop px: z [B, K, T, g, g] -> [B, T, 4]."""
        batch = z.shape[0]
        fields = self.codec.decode_fields(rearrange(z, "b k t h w -> (b t) k h w"))
        return rearrange(inner_lip_distance(fields), "(b t) f -> b t f", b=batch)

    def _loss(
        self, x0: Tensor, target: Tensor, reference: Tensor, t: Tensor, kind: int
    ) -> tuple[Tensor, dict[str, float]]:
        counted = torch.ones_like(t, dtype=torch.float32)
        if kind == 2:
            counted[:, 0] = 0  # the sink is context
        weight = self.weight[None, :, None] * counted[:, None, :, None, None]
        error = ((x0 - target).square() * weight).sum((1, 3, 4)) / self.weight.sum()
        gap = (self.lip_gap(x0) - self.lip_gap(target)).square().mean(-1) / 9.0  # lips part by a few crop px
        loss = ((error + self.config.gap_weight * gap * counted).sum()) / counted.sum()
        noisy = (t > 0.9) & (counted > 0)
        copied = ((reference - target).square() * weight).sum((1, 3, 4)) / self.weight.sum()
        metrics = {}
        if noisy.any():
            metrics = {
                "first_call": error[noisy].mean().item(),
                "copying": copied[noisy].mean().item(),
                "gap": gap[noisy].mean().sqrt().item() * 3,
            }
        return loss, metrics


class Listening:
    """How far the lips of clips that were never trained on follow their speech: correlation of the lip gap, by speaker.

    One prediction from noise per chunk, behind the clip's own past (so it is an upper bound of what a rollout gives);
    the reference sequence is the mean of the clip's other half.
    """

    def __init__(self, loss: ForcingLoss, coded: Sequence[Coded]) -> None:
        self.loss, self.coded = loss, coded

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for item in self.coded:
            got, wanted = self._gaps(model, item)
            r = np.corrcoef(got.numpy(), wanted.numpy())[0, 1]
            found.setdefault(item.clip.speaker, []).append(float(r))
        return {f"r_{speaker}": round(float(np.mean(values)), 4) for speaker, values in found.items()}

    def _gaps(self, model: nn.Module, item: Coded) -> tuple[Tensor, Tensor]:
        """Lip gap [frames] of the predictions and of the clip."""
        size, codec = FRAMES_PER_LATENT, self.loss.codec
        chunk_frames = CHUNK * size
        starts = torch.arange(chunk_frames, len(item.clip) - chunk_frames, chunk_frames)
        moving = starts[:, None] - chunk_frames + size * torch.arange(2 * CHUNK)  # previous and current chunk
        target = torch.cat([item.still[:1].expand(len(starts), -1, -1, -1)[:, None], item.moving[moving]], 1).float()
        first = item.speech[0, :1].expand(len(starts), size, -1)[:, None]
        speech = torch.cat([first, item.speech[0][moving[..., None] + torch.arange(size)]], 1).float()
        half = len(item.moving) // 2
        halves = [codec.pose_free(h.float()).mean(0) for h in (item.moving[half:], item.moving[:half])]
        reference = torch.stack([halves[int(s >= half)] for s in starts])[:, :, None].expand(-1, -1, STEADY, -1, -1)
        seen = item.moving[::FRAMES_PER_LATENT].float()
        order = item.opening[::FRAMES_PER_LATENT].argsort()
        shut, wide = (codec.pose_free(seen[order[end]][None])[:, :, None] for end in (0, -1))
        z = self.loss._pose_free(target)
        t = torch.zeros(len(starts), STEADY, dtype=torch.float64)
        t[:, -CHUNK:] = STUDENT_TIMES[0]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        assert isinstance(model, DiT)
        shut = shut.expand(len(z), -1, -1, -1, -1)
        x0 = self.loss.predict(model, add_noise(z, noise, t), t, speech, (shut, wide, reference), window_layout(2)[1])
        gaps = (self.loss.lip_gap(q[:, :, -CHUNK:]).flatten() for q in (x0, z))
        return next(gaps), next(gaps)


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
    codec: PocketCodec, clips: Sequence[Clip], encoder: SpeechEncoder, config: ForcingConfig
) -> tuple[list[Coded], NDArray[np.float64]]:
    """All clips that are long enough in ``config.versions`` appearances, with the draw weight of each."""
    sampler = Sampler(clips, seed=1)
    long_enough = [len(c) >= SHORTEST_FRAMES for c in sampler.clips]
    chosen = [c for c, keep in zip(sampler.clips, long_enough, strict=True) if keep]
    weights = [float(w) for w, keep in zip(sampler.weights, long_enough, strict=True) if keep]
    rows = speech_rows(encoder, chosen, np.random.default_rng(2))
    log.info("speech rows of %d clips", len(rows))
    ruler = LipRuler(FaceCanvas())
    coded = [
        code_clip(codec, sampler, clip, rows[clip.name], plain=version == 0, ruler=ruler)
        for version in range(config.versions)
        for clip in chosen
    ]
    log.info("%d coded clips, %d latent frames", len(coded), sum(len(c.moving) for c in coded))
    return coded, np.array(weights * config.versions)


def train(
    run: Path,
    samples: Sequence[Path],
    codec: PocketCodec,
    encoder: SpeechEncoder,
    loop: LoopConfig,
    config: ForcingConfig | None = None,
    flavour: str = "pocket",
    start_from: Path | None = None,
) -> DiT:
    """Stage 1 on prepared samples; resumes from ``run``, else goes on from a weights file. Returns the averaged model.

    Clips of ``LEFT_OUT`` among the samples are not trained on; every time the run is saved, ``metrics.jsonl`` tells how
    well their lips follow (:class:`Listening`).
    """
    config = config or ForcingConfig()
    clips = load_clips(samples)
    held = [c for c in clips if c.name in LEFT_OUT or c.speaker in LEFT_OUT]
    held_names = {c.name for c in held}
    coded, weights = code_clips(codec, [c for c in clips if c.name not in held_names], encoder, config)
    model = DiT(FLAVOURS[flavour])
    if start_from is not None:
        model.load_state_dict(load_dit(start_from)[0].state_dict())
    windows = Windows(coded, weights, config, seed=10)
    loss = ForcingLoss(model, codec, windows)
    trainer = Loop([Trainee(model=model, loss=loss)], loop, run)
    windows.rng = np.random.default_rng(trainer.step + 10)  # a resumed run goes on to new draws
    evaluate = None
    if held:
        listening = Listening(loss, code_clips(codec, held, encoder, replace(config, versions=1))[0])

        def evaluate(models: dict[str, nn.Module]) -> dict[str, float]:
            return listening(models["model"])

    trained = trainer.run(evaluate)["model"]
    assert isinstance(trained, DiT)
    return trained


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=Path, nargs="+", required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--start-from", type=Path, metavar="DIT", help="weights to go on from where RUN is new")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(
        arguments.run,
        arguments.samples,
        load_codec(arguments.codec),
        load_speech_encoder(arguments.speech),
        LoopConfig(steps=arguments.steps, lr=arguments.lr),
        ForcingConfig(batch=arguments.batch),
        start_from=arguments.start_from,
    )


if __name__ == "__main__":
    main()
