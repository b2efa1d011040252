"""Small scenes for tests: people of the renderer who move as told, to be put together with numpy.

>>> actor = Actor(seed=3, size=256)
>>> image = actor.draw(opening=0.1, yaw=0.3)        # [256, 256, 3] uint8 on the actor's own background
>>> image, alpha = actor.cut_out(opening=0.1)        # the same with its coverage, to lay over something else
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lipstream.data.synthetic.basis import HeadBasis
from lipstream.data.synthetic.identity import make_identity
from lipstream.data.synthetic.performance import Mouth, Style
from lipstream.data.synthetic.renderer import Pose, Renderer
from lipstream.data.synthetic.scene import make_background, make_lights

Image = npt.NDArray[np.uint8]
STYLE = Style(amplitude=1.0, asymmetry=0.0, smile=0.05, loudness=0.0)


class Actor:
    """A person of the renderer.

    Args:
        seed: chooses the person, the light and the background.
        size: px of the square pictures.
    """

    def __init__(self, basis: HeadBasis, seed: int, size: int) -> None:
        rng = np.random.default_rng([seed, 29])
        self._renderer = Renderer(basis, size)
        self._identity = make_identity(basis, seed)
        self._mouth = Mouth(basis, self._identity)
        self._lights = make_lights(rng)
        self._background = make_background(rng, size)
        self._basis = basis

    def draw(
        self, *, opening: float = 0.0, yaw: float = 0.0, pitch: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> Image:
        """One picture [size, size, 3]; opening in eye distances (0 is closed), angles in radians, shift in dm."""
        return self.cut_out(opening=opening, yaw=yaw, pitch=pitch, shift=shift)[0]

    def cut_out(
        self, *, opening: float = 0.0, yaw: float = 0.0, pitch: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[Image, npt.NDArray[np.float32]]:
        """The picture, and how much of each pixel is the person, [size, size] in 0..1."""
        closed = 1.0 if opening <= 0 else 0.0
        control = np.array([opening, closed, 0, 0.1, 0.1 * (opening > 0), 0.2 * (opening > 0), 0, 0], np.float64)
        units = self._mouth.units(control, STYLE).astype(np.float32)
        pose = Pose(yaw=yaw, pitch=pitch, body_yaw=0.15 * yaw, shift=shift, zoom=0.3)
        frame = self._renderer.render(self._identity, units, pose, self._lights, self._background)
        return frame.image, self._renderer.coverage()
