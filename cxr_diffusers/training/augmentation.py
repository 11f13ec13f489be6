"""Random changes of position and exposure for training images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def augment(
    images: torch.Tensor,
    degrees: float = 0.0,
    zoom: float = 0.0,
    shift: float = 0.0,
    gamma: float = 0.0,
    contrast: float = 0.0,
    clip: float = 0.0,
    data_range: Sequence[float] = (-1.0, 1.0),
) -> torch.Tensor:
    """(B, C, H, W) in `data_range` -> the same, each image randomly rotated, zoomed, shifted and exposed.

    Images are not mirrored: a mirrored chest would be a rare finding (situs inversus), not a healthy image.

    Args:
        degrees: rotation, uniform in +- degrees.
        zoom: scale, uniform in 1 +- zoom.
        shift: translation along each axis, uniform in +- shift of the side. New pixels repeat the border.
        clip: share of the grey scale that is clipped at each end, uniform in 0..clip; the rest is stretched.
        gamma: exposure, v -> v ** exp(u) on [0, 1] with u uniform in +- gamma.
        contrast: v -> v + u (s(v) - v) on [0, 1] with s(v) = 3 v^2 - 2 v^3 and u uniform in +- contrast (at most 1).
    """
    batch, device = len(images), images.device

    def uniform(limit):
        return (torch.rand(batch, device=device) * 2 - 1) * limit

    angle, scale = uniform(math.radians(degrees)), 1 + uniform(zoom)
    # affine_grid maps [-1, 1], so a shift by the whole side is 2
    x, y = uniform(2 * shift), uniform(2 * shift)
    rows = (
        torch.stack([scale * angle.cos(), -scale * angle.sin(), x]),
        torch.stack([scale * angle.sin(), scale * angle.cos(), y]),
    )
    theta = torch.stack(rows).permute(2, 0, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
    if gamma or contrast or clip:
        low, high = data_range
        values = ((images - low) / (high - low)).clamp(0, 1)
        if clip:
            dark, bright = (torch.rand(2, batch, device=device) * clip)[:, :, None, None, None]
            values = ((values - dark) / (1 - dark - bright)).clamp(0, 1)
        if gamma:
            values = values ** uniform(gamma).exp()[:, None, None, None]
        if contrast:
            values = values + uniform(contrast)[:, None, None, None] * (values**2 * (3 - 2 * values) - values)
        images = values * (high - low) + low
    return images
