"""Masks that are stored as run lengths: pairs of numbers, a start and a length."""

from typing import Literal

import numpy as np
import PIL.Image

from .images import shrink_mask
from .tables import brief

SAME_SHAPE = 0.02  # relative difference of the aspect ratios that counts as rounding


def decode_runs(
    text: str,
    height: int,
    width: int,
    *,
    where: str,
    order: Literal["C", "F"] = "C",
    first: int = 0,
    relative: bool = False,
) -> np.ndarray:
    """ "start length start length ..." -> (height, width) booleans, true inside a run; blank or "-1" is an empty mask.

    Args:
        where: place of the text, for messages.
        order: "C": pixels are counted along rows, "F": along columns.
        first: number of the first pixel, 0 or 1.
        relative: whether a start counts from the end of the run before it.

    Raises:
        ValueError: something other than pairs of whole numbers, or a run outside the mask.
    """
    cells = str(text).split()
    if cells in ([], ["-1"]):
        return np.zeros((height, width), bool)
    try:
        numbers = np.array([int(cell) for cell in cells], dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: expected run lengths, got {brief(text)}") from None
    if len(numbers) % 2 or numbers.min() < 0:
        raise ValueError(f"{where}: expected run lengths as pairs of start and length, got {brief(text)}")
    misfit = ValueError(f"{where}: its run lengths do not fit a mask of {width} x {height} pixels")
    if numbers.max() > height * width:
        raise misfit
    starts, lengths = numbers[::2] - first, numbers[1::2]
    if relative:
        starts = np.cumsum(starts) + np.cumsum(lengths) - lengths
    ends = starts + lengths
    if starts.min() < 0 or ends.max() > height * width:
        raise misfit
    steps = np.zeros(height * width + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return (np.cumsum(steps[:-1]) > 0).reshape((height, width), order=order)


def mask_image(mask: np.ndarray, size: tuple[int, int], where: str) -> PIL.Image.Image:
    """(H, W) booleans -> PIL "L" of 0 / 255 and of `size` (width, height), resized by `images.shrink_mask`.

    Raises:
        ValueError: `size` has another shape, so that it is not the same image at another resolution.
    """
    height, width = mask.shape
    if abs(size[0] / size[1] * height / width - 1) > SAME_SHAPE:
        raise ValueError(f"{where}: expected an image of the shape of its mask, {width} x {height}, got {size}")
    image = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
    return shrink_mask(image, size)
