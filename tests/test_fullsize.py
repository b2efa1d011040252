"""The full-size take on tiny networks: what enters the DiT, chunking, precomputed latents, snapshots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from golden_model import random_model
from lipstream.diffusion.rollout import Rollout
from lipstream.faces.mouth_mask import built_in_mask
from lipstream.fullsize import (
    FullSizeModel,
    FullSizeTake,
    SourceLatents,
    VideoDecoder,
    VideoEncoder,
    masked,
    normalised,
)
from lipstream.models.dit import FLAVOURS, Conditions
from lipstream.streaming import StreamingModule

SIZE, CELLS, FRAMES = 64, 8, 33  # three chunks
TEST = FLAVOURS["test"]


@dataclass
class LinearState:
    """The last latent frames that were encoded and decoded."""

    encoded: Tensor | None = None
    decoded: Tensor | None = None


class LinearCodec(StreamingModule[LinearState]):
    """Means of 8 x 8 pixels and of 1, 4, 4, ... frames, mixed with the latent frame before: linear and causal."""

    def __init__(self, pixel_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        super().__init__()
        self.pixel_range = pixel_range
        torch.manual_seed(3)
        self.up = torch.nn.Parameter(torch.randn(TEST.latent_channels, 3), requires_grad=False)

    def _init_state(self, batch: int) -> LinearState:
        return LinearState()

    def encode(self, video: Tensor) -> Tensor:
        state = self.state_or_fresh(len(video))
        assert video.min() >= self.pixel_range[0] and video.max() <= self.pixel_range[1]
        cells = video.unflatten(3, (-1, 8)).unflatten(5, (-1, 8)).mean((4, 6))
        latents, at = [], 0
        while at < cells.shape[2]:
            step = 1 if state.encoded is None else 4
            new = torch.einsum("bchw,kc->bkhw", cells[:, :, at : at + step].mean(2), self.up)
            state.encoded = new if state.encoded is None else new + 0.5 * state.encoded
            latents.append(state.encoded)
            at += step
        assert at == cells.shape[2]
        return torch.stack(latents, 2)

    def decode(self, latents: Tensor) -> Tensor:
        state, frames = self.state_or_fresh(len(latents)), []
        for latent in latents.unbind(2):
            before = latent if state.decoded is None else state.decoded
            mixed = torch.einsum("bkhw,kc->bchw", latent + 0.5 * before, self.up).tanh()
            picture = mixed.repeat_interleave(8, 2).repeat_interleave(8, 3)
            frames += [picture * share for share in ([1.0] if state.decoded is None else [0.4, 0.6, 0.8, 1.0])]
            state.decoded = latent
        low, high = self.pixel_range
        return torch.stack(frames, 2) * (high - low) / 2 + (high + low) / 2


def make_model(pixel_range: tuple[float, float] = (-1.0, 1.0), guidance: float = 1.0) -> FullSizeModel:
    torch.manual_seed(5)
    text = torch.randn(1, 3, TEST.text_dim)
    codec = LinearCodec(pixel_range)
    return FullSizeModel(random_model(TEST), codec, codec, built_in_mask(), text=text, size=SIZE, guidance=guidance)


def crops(count: int = FRAMES, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))


def rows(count: int = FRAMES) -> Tensor:
    return torch.randn(count, TEST.audio_dim, generator=torch.Generator().manual_seed(1))


def run(take: FullSizeTake, frames: list[np.ndarray], speech: Tensor) -> np.ndarray:
    out, at = [], 0
    while at < len(frames):
        step = take.next_pixel_frames
        out += take.step(frames[at : at + step], speech[at : at + step])
        at += step
    return np.stack(out)


def one_shot_conditions(model: FullSizeModel) -> Conditions:
    """The whole clip's conditions, made by hand and in one go."""
    video = torch.from_numpy(np.stack(crops())).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    hidden = video.clone()
    hidden[..., torch.from_numpy(model.mask.pixel_keep(SIZE)) == 0] = 0.0
    codec = LinearCodec()
    with torch.inference_mode():
        source = codec.stream_view(1).encode(video)
        return Conditions(
            reference=source[:, :, :1],
            mask=torch.from_numpy(model.mask.latent_regenerate(CELLS, CELLS))[None, None, None],
            masked_video=codec.stream_view(1).encode(hidden),
            ref_sequence=source,
            audio=model.dit.pack_audio(rows()[None]),
            text=model.text,
        )


@torch.inference_mode()
def test_conditions_are_the_hand_made_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    expected, seen = one_shot_conditions(model), []
    original = Rollout.step

    def spy(self: Rollout, conditions: Conditions) -> Tensor:
        seen.append(conditions)
        return original(self, conditions)

    monkeypatch.setattr(Rollout, "step", spy)
    run(FullSizeTake(model), crops(), rows())
    assert len(seen) == 3
    for chunk, got in enumerate(seen):
        part = expected.slice(slice(3 * chunk, 3 * chunk + 3))
        for name in ("reference", "mask", "masked_video", "ref_sequence", "audio"):
            torch.testing.assert_close(getattr(got, name), getattr(part, name), atol=1e-5, rtol=1e-5)
        assert got.text is model.text  # keys and values made once
    assert seen[2].reference.shape[2] == 1 and torch.equal(seen[2].reference, seen[0].ref_sequence[:, :, :1])


@torch.inference_mode()
def test_mask_polarity() -> None:
    """1 = regenerate for the DiT; masked pixels are 0.0 after normalisation; the forehead enters both streams alike."""
    model = make_model()
    mask = model.mask_cells[0, 0, 0]
    assert mask[6, 4] == 1 and mask[0].sum() == 0
    frames = normalised(crops(9), torch.device("cpu"))
    hidden = masked(frames, model.kept_pixels)
    assert (hidden[..., 48, 32] == 0).all() and torch.equal(hidden[..., 4, :], frames[..., 4, :])
    latents = FullSizeTake(model).encode(crops(9))
    assert torch.equal(latents.source[..., :2, :], latents.masked[..., :2, :])
    assert (latents.source - latents.masked)[:, :, 0][..., mask > 0].abs().max() > 0.01  # masked on frame 0 too
    other = crops(9)
    for crop in other:
        crop[model.mask.pixel_keep(SIZE) == 0] = 7
    assert torch.equal(FullSizeTake(model).encode(other).masked, latents.masked)  # no trace of the source's mouth


@torch.inference_mode()
def test_chunked_equals_one_shot() -> None:
    model = make_model()
    conditions = one_shot_conditions(model)
    rollout = Rollout(model.dit, height=CELLS, width=CELLS, seed=4)
    x0 = torch.cat([rollout.step(conditions.slice(slice(s, s + 3))) for s in (0, 3, 6)], 2)
    video = LinearCodec().stream_view(1).decode(x0)
    whole = ((video[0].permute(1, 2, 3, 0) + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8).numpy()
    got = run(FullSizeTake(model, seed=4), crops(), rows())
    assert got.shape == whole.shape == (FRAMES, SIZE, SIZE, 3) and got.dtype == np.uint8
    difference = np.abs(got.astype(int) - whole)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # a rounding step of float32
    assert np.abs(got[0].astype(int) - got[-1]).mean() > 1  # first and last frame are not the same picture
    assert np.abs(got.astype(int) - run(FullSizeTake(model, seed=5), crops(), rows())).max() > 0


@torch.inference_mode()
def test_encoding_ahead_and_prepared_latents_change_nothing() -> None:
    model, frames, speech = make_model(), crops(), rows()
    take = FullSizeTake(model)
    expected = run(FullSizeTake(model), frames, speech)
    prepared = [take.encode(frames[:9]), take.encode(frames[9:21]), take.encode(frames[21:])]  # before the first call
    kept = FullSizeTake(model)
    out = []
    for latents, start in zip(prepared, (0, 9, 21), strict=True):
        copy = SourceLatents(latents.source.clone(), latents.masked.clone())
        out.append(kept.decode(kept.generate(copy, speech[start : start + kept.next_pixel_frames])))
        kept.commit()
    levels = (torch.cat(out) * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(levels, expected)


@torch.inference_mode()
def test_pixel_range_of_the_codec_does_not_show() -> None:
    """A codec with pictures in [0, 1] is asked in its own range. (Its latents differ, so only pixels are compared.)"""
    model = make_model((0.0, 1.0))
    take = FullSizeTake(model)
    video = (normalised(crops(9), torch.device("cpu")) + 1) / 2
    torch.testing.assert_close(take.encode(crops(9)).source, LinearCodec((0.0, 1.0)).stream_view(1).encode(video))
    latents = torch.randn(1, TEST.latent_channels, 3, CELLS, CELLS)
    unit, signed = (FullSizeTake(make_model(r)).decode(latents) for r in ((0.0, 1.0), (-1.0, 1.0)))
    torch.testing.assert_close(unit, signed)
    assert unit.shape == (9, 3, SIZE, SIZE) and unit.min() >= 0 and unit.max() <= 1


def test_snapshot_restore_reset() -> None:
    model, frames, speech = make_model(guidance=2.0), crops(), rows()
    take = FullSizeTake(model, seed=1)
    first = take.step(frames[:9], speech[:9])
    second = take.step(frames[9:21], speech[9:21])
    saved = take.snapshot()
    third = take.step(frames[21:], speech[21:])
    other = FullSizeTake(model, seed=1)
    other.restore(saved)
    assert other.next_pixel_frames == 12
    np.testing.assert_array_equal(other.step(frames[21:], speech[21:]), third)
    take.reset()
    assert take.next_pixel_frames == 9
    np.testing.assert_array_equal(
        [*take.step(frames[:9], speech[:9]), *take.step(frames[9:21], speech[9:21])], first + second
    )


def test_two_takes_share_weights_but_no_state() -> None:
    model, speech = make_model(), rows()
    a, b = FullSizeTake(model), FullSizeTake(model)
    alone = run(FullSizeTake(model), crops(), speech)
    out = []
    for start, stop in ((0, 9), (9, 21), (21, 33)):
        out += a.step(crops()[start:stop], speech[start:stop])
        b.step(crops(seed=7)[start:stop], speech[start:stop] + 1)
    np.testing.assert_array_equal(out, alone)
    assert a._source.up is model.encoder.up  # type: ignore[attr-defined]


def test_a_given_reference_stays() -> None:
    model = make_model()
    reference = torch.randn(1, TEST.latent_channels, 1, CELLS, CELLS)
    take = FullSizeTake(model, reference=reference)
    with torch.inference_mode():
        assert take.conditions(take.encode(crops(9)), rows(9)).reference is reference
    take.reset()
    with torch.inference_mode():
        assert take.conditions(take.encode(crops(9)), rows(9)).reference is reference


def test_wrong_input_is_named() -> None:
    model = make_model()
    take = FullSizeTake(model)
    with pytest.raises(ValueError, match="9 crops and rows, got 12 crops, 9 rows"):
        take.step(crops(12), rows(9))
    with pytest.raises(ValueError, match="64 x 64"):
        take.step([np.zeros((32, 32, 3), np.uint8)] * 9, rows(9))
    with pytest.raises(ValueError, match="9 rows of speech, got 12"):
        take.generate(take.encode(crops(9)), rows(12))
    with pytest.raises(ValueError, match="multiple of 16"):
        FullSizeModel(random_model(TEST), LinearCodec(), LinearCodec(), built_in_mask(), text=None, size=100)


def test_the_codec_fits_the_protocols() -> None:
    encoder: VideoEncoder = LinearCodec()
    decoder: VideoDecoder = LinearCodec((0.0, 1.0))
    assert encoder.pixel_range == (-1.0, 1.0) and decoder.pixel_range == (0.0, 1.0)
