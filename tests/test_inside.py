"""The inside of the mouth: rulers agree with landmarks, memories come from the source and nearest first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipstream.diffusion.rollout import Rollout
from lipstream.faces.canvas import INNER_LIP_CORNERS, INNER_LIP_PAIRS, FaceCanvas
from lipstream.inside import LipRuler, MouthInside
from lipstream.models.dit import Conditions
from lipstream.mouth import PRESSED_PX, CanvasFrame, MouthModel, Take, bent
from lipstream.pipeline import folder_of
from tiny import tiny_mouth_model


@pytest.fixture(scope="module")
def canvas() -> FaceCanvas:
    return FaceCanvas()


def rest_face(canvas: FaceCanvas) -> np.ndarray:
    points = np.zeros((468, 3))
    points[canvas.ids, :2] = canvas._rest_points
    points[canvas.rigid_ids, :2] = canvas._rigid_points
    return points


def shape(canvas: FaceCanvas, drop: float = 0.0, pull: float = 0.0) -> torch.Tensor:
    """Shape field of the rest face (open by 17 px) with everything below the lips' middle moved and corners pulled."""
    points = rest_face(canvas)
    middle = (points[13, 1] + points[14, 1]) / 2
    below = canvas.ids[points[canvas.ids, 1] > middle + 1]
    points[below, 1] += drop
    centre = points[canvas.ids, 0].mean()
    points[canvas.ids, 0] += pull * (points[canvas.ids, 0] - centre) / 20
    return torch.from_numpy(canvas.field(points, canvas.align(points)))


def test_rulers_agree_with_landmarks(canvas: FaceCanvas) -> None:
    ruler, points = LipRuler(canvas), rest_face(canvas)
    opening = np.mean([points[b, 1] - points[a, 1] for a, b in INNER_LIP_PAIRS])
    width = points[INNER_LIP_CORNERS[1], 0] - points[INNER_LIP_CORNERS[0], 0]
    for drop in (-15.0, -8.0, 0.0, 5.0):
        assert float(ruler.opening(shape(canvas, drop))) == pytest.approx(opening + drop, abs=0.8)
    assert float(ruler.width(shape(canvas))) == pytest.approx(width, abs=0.5)
    assert float(ruler.width(shape(canvas, pull=2.0))) > width + 1.0


def texture(value: float) -> torch.Tensor:
    return torch.full((3, 4, 6), value)


def test_nothing_is_shown_before_the_source_has_opened_its_mouth(canvas: FaceCanvas) -> None:
    inside = MouthInside(LipRuler(canvas))
    for _ in range(5):
        inside.see(shape(canvas, -16.5), texture(0.1))
    own, share = inside.show(shape(canvas, -8.0))
    assert own is None and share == 1.0
    assert inside.show(shape(canvas, -16.5))[1] == pytest.approx(0.0, abs=0.02)


def test_nearest_opening_is_shown(canvas: FaceCanvas) -> None:
    inside = MouthInside(LipRuler(canvas))
    for drop in (-16.5, -16.5, -13.0, -9.0, -3.0):
        inside.see(shape(canvas, drop), texture(-drop))
    shown = [inside.show(shape(canvas, drop))[0] for drop in (-13.2, -3.5, -9.3)]
    assert [float(q[0, 0, 0]) for q in shown if q is not None] == [13.0, 3.0, 9.0]


def test_a_face_whose_closed_lips_read_open_is_measured_from_there(canvas: FaceCanvas) -> None:
    inside = MouthInside(LipRuler(canvas))
    for _ in range(10):  # this person's lips are closed at 4 px
        inside.see(shape(canvas, -13.5), texture(0.0))
    assert inside.show(shape(canvas, -13.5)) == (None, pytest.approx(0.0, abs=0.05))
    inside.see(shape(canvas, -9.0), texture(1.0))
    own, share = inside.show(shape(canvas, -9.0))
    assert own is not None and float(own.mean()) == 1.0 and share > 0.9


def test_a_memory_is_a_copy_and_is_replaced_in_time(canvas: FaceCanvas) -> None:
    inside, frame = MouthInside(LipRuler(canvas)), texture(1.0)
    inside.see(shape(canvas, -16.5), texture(0.0))
    inside.see(shape(canvas, -5.0), frame)
    frame.fill_(9.0)
    own, _ = inside.show(shape(canvas, -5.0))
    assert own is not None and float(own.mean()) == 1.0
    for _ in range(251):
        inside.see(shape(canvas, -5.0), texture(2.0))
    own, _ = inside.show(shape(canvas, -9.0))  # far enough that the newer memory of the same kind takes over
    assert own is not None and float(own.mean()) in (1.0, 2.0)
    assert any(float(m.texture.mean()) == 2.0 for m in inside._memories.values())


def test_openings_bend_towards_their_limits() -> None:
    openings = np.linspace(-10, 30, 401)
    kept = np.array([bent(float(opening), 10.0) for opening in openings])
    assert np.all(np.diff(kept) >= 0) and kept.max() < 10.0 + 1e-9 and kept.min() >= -PRESSED_PX - 1e-9
    untouched = (openings >= 0) & (openings <= 7)
    np.testing.assert_allclose(kept[untouched], openings[untouched])


def test_a_take_never_opens_much_wider_than_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mouth_model()

    def wild(self: Rollout, conditions: Conditions, **_: object) -> torch.Tensor:
        self.chunk += 1
        return torch.full_like(conditions.ref_sequence, 1e3)

    monkeypatch.setattr(Rollout, "step", wild)
    take, field = Take(model), np.zeros((20, 20, 2), np.float32)
    frames = [CanvasFrame(field, np.full((160, 160, 3), 90, np.uint8))] * 9
    mouths = take.step(frames, torch.zeros(9, model.dit.config.audio_dim))
    source = float(model.ruler.opening(torch.from_numpy(field)))
    made = [float(model.ruler.opening(torch.from_numpy(mouth.field))) for mouth in mouths]
    assert max(abs(opening - source) for opening in made) < 40  # 1000 times the codes would be hundreds of pixels


def test_a_renewed_memory_is_what_is_shown(canvas: FaceCanvas) -> None:
    inside = MouthInside(LipRuler(canvas))
    inside.see(shape(canvas, -16.5), texture(0.0))
    for frame in range(600):
        inside.see(shape(canvas, -5.0), texture(float(frame)))
        own, _ = inside.show(shape(canvas, -5.0))
        assert own is not None and frame - float(own.mean()) <= 251


def test_memories_are_measured_anew_when_the_lips_turn_out_to_close_further(canvas: FaceCanvas) -> None:
    inside = MouthInside(LipRuler(canvas))
    for drop, value in ((-8.0, 1.0), (-3.0, 2.0)):  # a source that starts with an open mouth
        inside.see(shape(canvas, drop), texture(value))
    for _ in range(8):
        inside.see(shape(canvas, -17.0), texture(0.0))
    for drop, value in ((-8.0, 1.0), (-3.0, 2.0)):
        own, share = inside.show(shape(canvas, drop))
        assert own is not None and float(own.mean()) == value and share == 1.0
    for cell, memory in inside._memories.items():
        assert cell == inside._cell(memory.opening, memory.width)


def test_movements_are_evened_without_lag_and_the_end_of_a_chunk_stays() -> None:
    take = Take(tiny_mouth_model())
    moves = torch.zeros(21, 20, 20, 2)
    moves[:] = 0.5 * torch.arange(21.0)[:, None, None, None]  # a steady movement is nothing to even out
    moves[5] += 4
    moves[15] -= 4
    even = torch.cat([take._even(moves[:9]), take._even(moves[9:])])[:, 3, 4, 1]
    expected = 0.5 * torch.arange(21.0)
    expected[4:7] += torch.tensor([1.0, 2.0, 1.0])
    expected[14:17] -= torch.tensor([1.0, 2.0, 1.0])
    torch.testing.assert_close(even, expected)
    moves[8] += 4  # the last of the first chunk: nobody knows the next yet
    take = Take(tiny_mouth_model())
    first, second = take._even(moves[:9]), take._even(moves[9:])
    assert torch.equal(first[8], moves[8]) and torch.allclose(second[0], moves[9] + 1)


def test_closed_lips_do_not_repeat_the_movement_that_they_were_taken_from() -> None:
    """The real networks: a made-up codec has no closed mouths."""
    model = MouthModel.load(folder_of("pocket"))
    gaping, texture = model.canvas.gaping_field(), np.full((160, 160, 3), 120, np.uint8)
    widths = (-12, -15, -17, -16, -13, -9, -9, -9, -9)  # the canvas' own mouth is open by 17 px
    views = [CanvasFrame(width * gaping, texture) for width in (*widths, *[-9] * 12)]
    take = Take(model)
    rows = torch.zeros(21, model.speech.config.width)
    take.step(views[:9], rows[:9], np.ones(9, np.float32))
    closed = torch.from_numpy(
        np.stack([mouth.field for mouth in take.step(views[9:], rows[9:], np.ones(12, np.float32))])
    )
    openings = model.ruler.opening(closed)
    assert openings.min() > 0 and openings.max() < 1.5
    assert float(np.ptp(closed.numpy(), axis=0).max()) < 0.1
