"""The coarser grid on which large images are measured."""

from numbers import Integral
from typing import Any

import numpy as np
from scipy import ndimage

RESOLUTION = 1024  # pixels of the shorter side at which larger images are measured
EIGHT = np.ones((3, 3))  # neighbours of a pixel that belong to the same region


def measured_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The (height, width) at which an image is measured: a shorter side of at most `resolution`; 0: its full size."""
    shorter = min(height, width)
    if not 0 < resolution < shorter:
        return height, width
    return round(height * resolution / shorter), round(width * resolution / shorter)


def check_resolution(resolution: Any) -> None:
    """Raise ValueError unless `measured_size` takes it."""
    if isinstance(resolution, bool) or not isinstance(resolution, Integral) or resolution < 0:
        raise ValueError(
            f"expected a whole number of pixels, or 0 for every pixel, as `resolution`, got {resolution!r}"
        )


def at_centres(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) -> (height, width): each pixel of the coarser grid has the value at its centre."""
    rows, columns = (
        ((np.arange(n) + 0.5) * whole / n).astype(int) for n, whole in zip((height, width), array.shape, strict=True)
    )
    return array[np.ix_(rows, columns)]


def shrink_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) booleans -> (height, width): `at_centres`, with as many 8-connected regions or fewer.

    Of a region that the grid would lose or break into pieces, every pixel that it touches is true.
    """
    sampled = at_centres(mask, height, width)
    regions, _ = ndimage.label(mask, EIGHT)
    pieces, _ = ndimage.label(sampled, EIGHT)
    region_at = at_centres(regions, height, width)
    shrink = [n / whole for n, whole in zip((height, width), mask.shape, strict=True)]
    for number, place in enumerate(ndimage.find_objects(regions), 1):
        if len(np.unique(pieces[region_at == number])) != 1:
            own = (regions[place] == number).nonzero()
            sampled[tuple(((i + at.start) * f).astype(int) for i, at, f in zip(own, place, shrink, strict=True))] = True
    return sampled
