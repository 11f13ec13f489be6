"""Boxes [x, y, w, h]: validation, tables of boxes, and scaling to the pixels of an image."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import PIL.TiffImagePlugin

from .dicom import integer, is_dicom, read_header
from .images import FORMATS, ORIENTATION, PIL_SUFFIXES, read_image
from .tables import brief, numbers, read_csv

COLUMNS = ("file", "x", "y", "w", "h")
UNITS = (("image_w", "image_h"), ("width", "height"))  # columns with the size of the image that the boxes were drawn on
MARGIN = 0.02  # share of a side by which a box may reach beyond its image: readers draw over the edge
SAME_SHAPE = 0.02
PREPARED = "prepare_settings.json"  # lies in a copy whose boxes count in its own pixels


def check_box(box: Iterable[Any], where: object) -> list[float]:
    """Four numbers -> [x, y, w, h] floats; ValueError naming `where` unless all are finite and there is an area."""
    try:
        values = [float(n) for n in box]
    except (TypeError, ValueError):
        values = []
    with np.errstate(over="ignore"):
        x, y, w, h = np.asarray(values if len(values) == 4 else [math.nan] * 4, np.float32)  # as they are stored
    if not (all(map(math.isfinite, (x, y, w, h))) and min(x, y) >= 0 and min(w, h) > 0):
        got = ", ".join(brief(n).strip("'") for n in box)
        raise ValueError(f"{where}: expected a box x, y, w, h in pixels, x, y >= 0 and w, h > 0, got [{got}]")
    return values


def check_in_pixels(boxes: Sequence[Sequence[float]], where: object) -> None:
    """ValueError naming `where` if all of some boxes lie in the first pixel: they are shares of an image's sides."""
    if len(boxes) and max(max(x + w, y + h) for x, y, w, h in boxes) <= 1:
        got = ", ".join(f"{n:g}" for n in boxes[0])
        raise ValueError(f"{where}: expected boxes x, y, w, h in pixels, got [{got}]: shares of the image's sides?")


def parse_boxes(text: object, where: object) -> list[list[float]]:
    """ "x y w h" a line (or separated by ";"), in pixels -> [[x, y, w, h]]; ValueError naming `where`."""
    boxes = []
    for line in str(text).replace(";", "\n").splitlines():
        cells = line.replace(",", " ").split()
        if len(cells) not in (0, 4):
            raise ValueError(f"{where}: expected boxes as `x y w h` in pixels, one a line, got {brief(line)}")
        if cells:
            boxes.append(check_box(cells, f"{where} (`x y w h`)"))
    check_in_pixels(boxes, where)
    return boxes


def read_boxes(path: Path | str) -> list[tuple[str, str, list[float], tuple[float, float] | None]]:
    """A table with columns file, x, y, w, h -> [(where, file as it stands there, box, unit)].

    `unit` is (width, height) of the image that a box was drawn on, if the table says so (`UNITS`), else None.

    Raises:
        ValueError: a missing column, a row with an invalid box, or boxes that do not count in pixels.
    """
    table = read_csv(path, COLUMNS)
    units = units_of(table, path)
    rows = []
    for (line, row), unit in zip(table.iterrows(), units, strict=True):
        where = f"{path}, line {line}"
        rows.append((where, row["file"], check_box([row[name] for name in "xywh"], where), unit))
    check_in_pixels([box for _, _, box, unit in rows if unit is None or max(unit) > 1], path)
    return rows


def units_of(table: pd.DataFrame, path: Path | str) -> list[tuple[float, float] | None]:
    """(width, height) of the image that each row's box was drawn on, or None where a table does not say it.

    Raises:
        ValueError: one of the two columns without the other, or a size that is not above 0.
    """
    pair = next((pair for pair in UNITS if set(pair) <= set(table.columns)), None)
    alone = [name for both in UNITS for name in both if name in table.columns]
    if pair is None and alone:
        choices = " or ".join(" and ".join(pair) for pair in UNITS)
        raise ValueError(f"{path}: expected the columns {choices}, or none of them, got {', '.join(alone)}")
    if pair is None:
        return [None] * len(table)
    widths, heights = (numbers(table, name, path) for name in pair)
    for line, w, h in zip(table.index, widths, heights, strict=True):
        if not (math.isnan(w) and math.isnan(h)) and not (0 < w < math.inf and 0 < h < math.inf):
            raise ValueError(f"{path}, line {line}: expected {pair[0]} and {pair[1]} above 0, got {w:g} and {h:g}")
    return [None if math.isnan(w) else (w, h) for w, h in zip(widths, heights, strict=True)]


def to_pixels(
    box: Sequence[float],
    unit: tuple[float, float] | None,
    size: tuple[int, int],
    image: Path,
    where: object,
) -> list[float]:
    """A box in pixels of a `unit`-sized image -> in pixels of the same image as it is now.

    Args:
        unit: (width, height) that the box counts in; None: as the image is.
        size: (width, height) of the image.
        image: its path, for the message.

    Raises:
        ValueError: the two sizes differ in their shape, or the box reaches beyond the image.
    """
    x, y, w, h = box
    if unit is not None and tuple(unit) != tuple(size):
        across, down = size[0] / unit[0], size[1] / unit[1]
        if abs(across / down - 1) > SAME_SHAPE:
            raise ValueError(
                f"{where}: boxes of an image of {unit[0]:g} x {unit[1]:g} pixels do not fit {image} of "
                f"{size[0]} x {size[1]}: it has another shape"
            )
        x, y, w, h = x * across, y * down, w * across, h * down
    if x + w > size[0] * (1 + MARGIN) + 1 or y + h > size[1] * (1 + MARGIN) + 1:
        raise ValueError(
            f"{where}: the box [{x:g}, {y:g}, {w:g}, {h:g}] reaches beyond its image {image} of "
            f"{size[0]} x {size[1]} pixels: does it count in pixels of another size?"
        )
    return [x, y, w, h]


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file, from its header; ValueError, naming it, where it has none."""
    try:
        suffix = path.suffix.lower()
        if suffix in PIL_SUFFIXES:
            PIL.Image.init()
            with PIL.Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                size = image.size
                if isinstance(image, PIL.TiffImagePlugin.TiffImageFile):  # whose `size` may be turned already
                    size = image.tag_v2[256], image.tag_v2[257]
                return size[::-1] if turned else size
        if suffix != ".npy" and is_dicom(path):
            header = read_header(path)
            return integer(header, "Columns"), integer(header, "Rows")
    except Exception:  # `read_image` raises the error that explains it
        pass
    return read_image(path).size
