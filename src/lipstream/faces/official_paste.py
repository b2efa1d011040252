"""The official compositing, number for number: generated crop -> its frame (spec section 4.4).

The whole 420 x 560 crop goes back through two resamplings and a soft border whose width follows the face's size. It
softens the upper face a little and truncates to 8 bit; it is here for comparison with the reference. `faces.crop` has
the paste-back that we recommend, which leaves every pixel outside of the mouth mask alone.

    out = OfficialCompositor(mask)(frame, generated, aligned)

Golden case ``face_alignment``. The authors' port restores in float32, as here; upstream LatentSync in half
precision.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from lipstream.faces.mouth_mask import Float, MouthMask
from lipstream.faces.official import ALIGNED_PX, CROP_HEIGHT, CROP_WIDTH, FILL, Aligned


class SoftBorder(NamedTuple):
    """The blend mask of one frame: weight [H, W], the eroded cover of the crop [H, W], and the numbers behind it."""

    weight: Float
    cover: Float
    area: float
    edge_px: int
    blur_px: int
    sigma: float


class OfficialCompositor:
    """Puts generated crops back into their frames.

    Args:
        mask: whose `blend_keep` brings the source back outside of the mouth; None composes the full face.
    """

    def __init__(self, mask: MouthMask | None) -> None:
        self._keep = None if mask is None else mask.blend_keep(ALIGNED_PX)[..., None]

    def __call__(self, frame: NDArray[np.uint8], generated: Float, aligned: Aligned) -> NDArray[np.uint8]:
        """The composed frame [H, W, 3] uint8.

        Args:
            frame: [H, W, 3] uint8 source.
            generated: [512, 512, 3] float32 in 0..1.
            aligned: the frame's crop and matrix.
        """
        face = generated
        if self._keep is not None:
            source = aligned.picture.astype(np.float32) / np.float32(255)
            face = generated * (1 - self._keep) + source * self._keep
        inverse = inverse_matrix(aligned.matrix)
        border = soft_border(inverse, frame.shape[0], frame.shape[1])
        restored = _restored(resized_crop(face), inverse, frame.shape[0], frame.shape[1])
        weight, cover = border.weight[..., None], border.cover[..., None]
        blended = weight * (cover * restored) + (1 - weight) * frame.astype(np.float32)
        return blended.clip(0, 255).astype(np.uint8)  # truncation is the reference's


def inverse_matrix(matrix: NDArray[np.float16]) -> Float:
    """Crop px -> source px, [2, 3] float32: the inverse of the rounded matrix."""
    return np.asarray(torch.linalg.inv(_square(torch.from_numpy(matrix).float()))[:2].numpy(), np.float32)


def resized_crop(face: Float) -> Tensor:
    """A composed picture [512, 512, 3] in 0..1 -> the crop [1, 3, 560, 420] in -1..1: bicubic, antialiased."""
    picture = rearrange(torch.from_numpy(face.astype(np.float32)), "h w c -> 1 c h w")
    crop = F.interpolate(picture, (CROP_HEIGHT, CROP_WIDTH), mode="bicubic", antialias=True, align_corners=False)
    return crop * 2 - 1


def soft_border(inverse: Float, height: int, width: int) -> SoftBorder:
    """The blend mask of a frame of that size; its edge is a twentieth of the side of the crop's area there."""
    ones = warp_to_frame(torch.ones(1, 1, CROP_HEIGHT, CROP_WIDTH), inverse, height, width)[0, 0]
    # A 2 x 2 erosion whose window reaches left and up; beyond the picture there is nothing to erode from.
    padded = F.pad(ones[None, None], (1, 0, 1, 0), value=float("inf"))
    cover: Float = (-F.max_pool2d(-padded, 2, stride=1))[0, 0].numpy()
    area = float(torch.from_numpy(cover).sum())
    edge = int(area**0.5) // 20
    blur, eroded = 2 * edge + 1, cover
    if edge:
        eroded = np.asarray(cv2.erode(cover, np.ones((2 * edge, 2 * edge), np.uint8)), np.float32)
    sigma = 0.3 * ((blur - 1) * 0.5 - 1) + 0.8
    weight = cv2.GaussianBlur(eroded, (blur, blur), sigma, borderType=cv2.BORDER_REFLECT_101)
    return SoftBorder(np.asarray(weight, np.float32), cover, area, edge, blur, sigma)


def warp_to_frame(crop: Tensor, inverse: Float, height: int, width: int) -> Tensor:
    """Bilinear warp of a crop [1, C, 560, 420] into a frame of height x width, zero outside, float32."""
    similarity = _square(torch.from_numpy(inverse))
    to_frame = _unit_matrix(height, width) @ (similarity @ torch.linalg.inv(_unit_matrix(CROP_HEIGHT, CROP_WIDTH)))
    grid = F.affine_grid(torch.linalg.inv(to_frame)[None, :2], [1, 1, height, width], align_corners=True)
    return F.grid_sample(crop, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _restored(crop: Tensor, inverse: Float, height: int, width: int) -> Float:
    """The crop in its frame's place, [H, W, 3] in 0..255.

    The reference fills with level 127 while colours are in -1..1: beyond the crop all is white. The border hides it.
    """
    cover = warp_to_frame(torch.ones(1, 1, CROP_HEIGHT, CROP_WIDTH), inverse, height, width)
    filled = warp_to_frame(crop, inverse, height, width) + (1 - cover) * FILL
    levels = (filled / 2 + 0.5).clamp(0, 1) * 255
    return np.asarray(rearrange(levels, "1 c h w -> h w c").numpy(), np.float32)


def _square(matrix: Tensor) -> Tensor:
    """[2, 3] -> [3, 3]."""
    return torch.cat((matrix, matrix.new_tensor([[0, 0, 1]])))


def _unit_matrix(height: int, width: int) -> Tensor:
    """Pixels -> -1..1, [3, 3] float32."""
    return torch.tensor([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]])
