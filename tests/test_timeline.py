"""The clock: property tests of the pure integer arithmetic, streaming against whole."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipstream.media.timeline import (
    SAMPLES_PER_MODEL_FRAME,
    SPEECH_RATE,
    Fit,
    GridSampler,
    Length,
    Timeline,
    bounce_index,
    bounce_pts,
    chunk_of,
    chunk_plan,
    fill_pts,
    model_frame_at,
)

settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

time_bases = st.sampled_from([Fraction(1, 25), Fraction(1001, 30000), Fraction(1, 1000), Fraction(1, 90000)])
gaps = st.lists(st.integers(min_value=1, max_value=5), min_size=0, max_size=40)


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    time_base = draw(time_bases)
    unit = max(round(Fraction(1, 60) / time_base), 1)
    pts = [draw(st.integers(min_value=-1000, max_value=100_000))]
    for gap in draw(gaps):
        pts.append(pts[-1] + gap * unit)
    samples = draw(st.integers(min_value=0, max_value=6 * SPEECH_RATE))
    return Timeline(pts=pts, time_base=time_base, last_duration_pts=unit, speech_samples=samples)


def at_rate(fps: Fraction, frames: int, samples: int) -> Timeline:
    return Timeline(pts=range(frames), time_base=1 / fps, last_duration_pts=1, speech_samples=samples)


@pytest.mark.parametrize(
    "fps,seconds,frames",
    [(Fraction(25), 2, 50), (Fraction(24), 2, 48), (Fraction(60), 2, 119), (Fraction(30000, 1001), 10, 300)],
)
def test_cut_to_the_speech(fps: Fraction, seconds: int, frames: int) -> None:
    timeline = at_rate(fps, 1000, seconds * SPEECH_RATE)
    assert timeline.output_frames == frames
    assert not timeline.fills


def test_equal_lengths_keep_every_frame() -> None:
    for extra in (-700, 0, 700):  # 44 ms either way: container ends differ that much
        assert at_rate(Fraction(25), 50, 2 * SPEECH_RATE + extra).output_frames == 50


def test_25_fps_is_the_identity() -> None:
    timeline = at_rate(Fraction(25), 100, 4 * SPEECH_RATE)
    assert [timeline.model_frame(k) for k in range(100)] == list(range(100))
    assert [timeline.shown_at(i) for i in range(100)] == list(range(100))
    assert timeline.model_frames == 100


def test_bounce_order_and_times() -> None:
    assert [bounce_index(k, 4) for k in range(12)] == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1]
    assert [bounce_pts(k, [10, 11, 14], 1) for k in range(6)] == [10, 11, 14, 17, 18, 19]
    assert [bounce_pts(k, [5], 2) for k in range(3)] == [5, 7, 9]
    with pytest.raises(ValueError, match="-1"):
        bounce_index(-1, 3)


@pytest.mark.parametrize(
    "length,fit,samples,frames,order",
    [
        ("bounce", "audio", 10, 10, [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]),
        ("loop", "audio", 10, 10, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]),
        ("freeze", "audio", 10, 10, [0, 1, 2, 3, 3, 3, 3, 3, 3, 3]),
        ("cut", "audio", 10, 4, [0, 1, 2, 3]),
        ("silence", "video", 10, 4, [0, 1, 2, 3]),
        ("cut", "video", 10, 4, [0, 1, 2, 3]),
        ("silence", "video", 2, 4, [0, 1, 2, 3]),
        ("cut", "video", 2, 2, [0, 1]),
        ("loop", "audio", 2, 2, [0, 1]),
    ],
)
def test_ways_of_filling(length: Length, fit: Fit, samples: int, frames: int, order: list[int]) -> None:
    timeline = Timeline(
        pts=[5, 6, 7, 8], time_base=Fraction(1, 25), last_duration_pts=1, speech_samples=samples * 640,
        length=length, fit=fit,
    )  # fmt: skip
    assert timeline.output_frames == frames
    assert [timeline.source_index(k) for k in range(frames)] == order
    assert [timeline.output_pts(k) for k in range(frames)] == list(range(5, 5 + frames))
    assert timeline.output_seconds == Fraction(frames, 25)


def test_filling_keeps_uneven_times() -> None:
    assert [fill_pts(k, [10, 11, 14], 2, "loop") for k in range(7)] == [10, 11, 14, 16, 17, 20, 22]
    assert [fill_pts(k, [10, 11, 14], 2, "freeze") for k in range(6)] == [10, 11, 14, 16, 18, 20]
    # A last frame of one tick is not repeated ninety thousand times a second.
    short = Timeline(pts=[0], time_base=Fraction(1, 90_000), last_duration_pts=1, speech_samples=SPEECH_RATE)
    assert short.output_frames == 236  # frames of 1/240 s that begin before the last half model frame


@given(timelines())
def test_every_output_frame_has_its_place(timeline: Timeline) -> None:
    count = timeline.output_frames
    assert count >= 1
    pts = [timeline.output_pts(k) for k in range(count)]
    assert all(b > a for a, b in pairwise(pts))
    assert pts[: len(timeline.pts)] == list(timeline.pts[:count])
    speech = Fraction(timeline.speech_samples, SPEECH_RATE)
    if timeline.fills:
        assert count >= len(timeline.pts)
        # no room for one more frame
        assert (timeline.output_pts(count) - pts[0]) * timeline.time_base + Fraction(1, 50) > speech
    else:
        assert count <= len(timeline.pts)
    served = [timeline.model_frame(k) for k in range(count)]
    assert served == sorted(served) and served[0] == 0
    assert timeline.model_frames == served[-1] + 1


@given(timelines())
def test_nearest_and_last_begun(timeline: Timeline) -> None:
    origin = timeline.pts[0]
    count = timeline.output_frames
    times = [(timeline.output_pts(k) - origin) * timeline.time_base for k in range(count)]
    for k, time in enumerate(times):
        assert abs(time - Fraction(timeline.model_frame(k), 25)) <= Fraction(1, 50)
    for i in range(timeline.model_frames):
        begun = [k for k, time in enumerate(times) if time <= Fraction(i, 25)]
        assert timeline.shown_at(i) == begun[-1]


@given(timelines())
def test_streaming_sampler_equals_the_plan(timeline: Timeline) -> None:
    sampler: GridSampler[int] = GridSampler(timeline.time_base)
    shown: list[int] = []
    for k in range(timeline.output_frames):
        shown += sampler.push(timeline.output_pts(k), k)
    shown += sampler.finish()
    # The last frames may begin after the grid frame nearest to them, never more than one frame is in question.
    assert len(shown) >= timeline.model_frames
    expected = [timeline.shown_at(i) for i in range(timeline.model_frames)]
    assert shown[: timeline.model_frames] == expected
    assert len(shown) - timeline.model_frames <= 1


@given(st.integers(min_value=1, max_value=500))
def test_chunks_cover_every_model_frame_once(frames: int) -> None:
    spans = chunk_plan(frames)
    assert [s.stop - s.start for s in spans] == [9] + [12] * (len(spans) - 1)
    covered = [i for s in spans for i in range(s.start, s.start + s.valid)]
    assert covered == list(range(frames))
    assert all(s.valid >= 1 and chunk_of(s.start) == chunk_of(s.stop - 1) == s.index for s in spans)
    assert spans[0].samples == (0, 9 * SAMPLES_PER_MODEL_FRAME)


def test_halfway_goes_to_the_earlier_model_frame() -> None:
    assert [model_frame_at(p, Fraction(1, 50)) for p in range(5)] == [0, 0, 1, 1, 2]


def test_bad_timelines_name_the_problem() -> None:
    with pytest.raises(ValueError, match="increase"):
        at_rate(Fraction(25), 1, 0).__class__(
            pts=[0, 0], time_base=Fraction(1, 25), last_duration_pts=1, speech_samples=0
        )
    with pytest.raises(ValueError, match="-5"):
        at_rate(Fraction(25), 1, -5)
    with pytest.raises(ValueError, match="0"):
        chunk_plan(0)
