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
    return array[np.ix_(*(centres(whole, n) for whole, n in zip(array.shape, (height, width), strict=True)))]


def centres(whole: int, n: int) -> np.ndarray:
    """(n,) the pixels of a side of `whole` pixels in which the centres of `n` larger pixels lie."""
    return ((np.arange(n) + 0.5) * whole / n).astype(int)


def shrink_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) booleans -> (height, width): `at_centres`, with as many 8-connected regions or fewer.

    Of a region that the grid would lose or break into pieces, every pixel that it touches is true.
    """
    sampled = at_centres(mask, height, width)
    if not mask.any():
        return sampled
    # only the box around all regions is searched for them
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    regions, count = ndimage.label(mask[top : bottom + 1, left : right + 1], EIGHT)
    rows, columns = centres(mask.shape[0], height), centres(mask.shape[1], width)
    inside = (rows >= top) & (rows <= bottom), (columns >= left) & (columns <= right)
    pieces, num_pieces = ndimage.label(sampled[np.ix_(*inside)], EIGHT)
    region_at = regions[np.ix_(rows[inside[0]] - top, columns[inside[1]] - left)]
    # of each region, the number of its pieces
    pairs = np.unique(region_at.astype(np.int64) * (num_pieces + 1) + pieces) // (num_pieces + 1)
    broken = np.bincount(pairs, minlength=count + 1) != 1
    broken[0] = False  # outside all regions
    y, x = broken[regions].nonzero()
    sampled[(y + top) * height // mask.shape[0], (x + left) * width // mask.shape[1]] = True
    return sampled
