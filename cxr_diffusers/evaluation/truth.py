"""Size, label, patient, view and true region of the images to evaluate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.images import height_and_width
from ..data.rows import each_row
from .grid import RESOLUTION, measured_size, shrink_mask
from .lazy import Lazy
from .metrics import box_mask
from .predictions import Predictions

# entries of a `Row` that are not in the tables
INTERNAL = ("group", "height", "width", "full_size", "truth", "contradicted")

Row = dict[str, Any]  # path, patient, label, view, the strata, and the entries `INTERNAL`; see `describe_row`


class Region:
    """A true region: (H, W) booleans, kept in one bit a pixel.

    Attributes:
        shape: (H, W).
        size: number of true pixels.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.shape, self.size = mask.shape, int(mask.sum())
        self._bits = np.packbits(mask)

    def mask(self) -> np.ndarray:
        """(H, W) booleans."""
        height, width = self.shape
        return np.unpackbits(self._bits, count=height * width).view(bool).reshape(self.shape)


@dataclass
class ImageSet:
    """Images to evaluate, those of the data set or the healthy ones.

    Attributes:
        dataset: rows with `image`.
        rows: `describe_row` of each.
        failed: {path: error} of the images that were left out.
        predictions: {method: its predictions of these images}.
    """

    dataset: Any
    rows: list[Row]
    failed: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)


def open_images(
    dataset: Any, strata: Iterable[str] = (), resolution: int = RESOLUTION, healthy: bool = False
) -> ImageSet:
    """Describe the images of a data set; broken ones and those of a single value are logged, counted and left out.

    Args:
        dataset: sequence of rows with `image` and, where they are known, `label`, `patient`, `view`, `path`, `mask`,
            `boxes`.
        strata: names of further columns to keep.
        resolution: see `measured_size`.
        healthy: whether the images are healthy by the user's word, with or without a label; those with a true region
            are then left out, too.

    Raises:
        ValueError: a mask of another size than its image, or no image that can be read and has contrast.
    """
    strata = tuple(strata)
    rows, kept = [], []
    failed: dict[str, str] = {}
    unnamed = "healthy row" if healthy else "row"  # names differ: images without a patient are grouped by them
    for i, row in each_row(dataset, failed, unnamed=unnamed):
        described = describe_row(row, row.get("path") or f"{unnamed} {i}", strata, resolution)
        if healthy and has_region(described):
            failed[described["path"]] = f"{described['path']}: labelled healthy, but it has a true region"
            continue
        if healthy:
            described["label"] = 0
        rows.append(described)
        kept.append(i)
    if failed and not rows:
        raise ValueError(f"expected images with contrast, got {len(failed)} without: {next(iter(failed.values()))}")
    return ImageSet(Lazy(len(kept), lambda i: dataset[kept[i]]) if failed else dataset, rows, failed)


def describe_row(row: Mapping[str, Any], path: str, strata: Sequence[str], resolution: int) -> Row:
    """What the evaluation needs to know of an image, without its pixels.

    `height` and `width` are those at which it is measured, see `measured_size`, `full_size` is its own (height, width);
    `truth` is a `Region` of the former, None where it is unknown; `group` is the unit of the bootstrap: the patient, or
    the path of an image without one; `label` is None where the data set does not give it, and where it says healthy of
    an image with a true region (`contradicted`): a label from a report, say, and a radiologist's box.
    """
    full_size = height_and_width(row["image"])
    height, width = measured_size(*full_size, resolution)
    truth = true_region(row, full_size, (height, width))
    contradicted = row.get("label") == 0 and truth is not None and truth.size > 0
    patient = row.get("patient")
    patient = "" if patient is None or patient != patient else str(patient)  # NaN: a cell that is empty; 0 is a patient
    return {
        "path": path,
        "patient": patient,
        "group": patient or path,
        "label": None if row.get("label") == -1 or contradicted else row.get("label"),
        "contradicted": contradicted,
        "view": row.get("view") or "",
        "height": height,
        "width": width,
        "full_size": full_size,
        "truth": truth,
        **{name: str(row[name]) for name in strata},
    }


def is_shrunk(row: Row) -> bool:
    """Whether an image is measured on a coarser grid than its own."""
    return (row["height"], row["width"]) != row["full_size"]


def true_region(row: Mapping[str, Any], full_size: tuple[int, int], size: tuple[int, int]) -> Region | None:
    """The mask if there is one, else the union of the boxes, else None.

    Args:
        row: `mask` is a PIL image, `boxes` are in pixels of the image.
        full_size: (height, width) of the image.
        size: of the region.

    Raises:
        ValueError: a mask of another size than its image, or one with values above 0 but none above 127.
    """
    if row.get("mask") is not None:
        values = np.asarray(row["mask"].convert("L"))
        if 0 < values.max() <= 127:
            raise ValueError(f"expected a mask of 0 and 255, got values up to {values.max()}: {row.get('path')}")
        mask = values > 127
        if mask.shape != full_size:
            raise ValueError(f"expected a mask of the image's size {full_size}, got {mask.shape}: {row.get('path')}")
    elif row.get("boxes"):
        mask = box_mask(row["boxes"], *full_size)
    else:
        return None
    return Region(mask if size == full_size else shrink_mask(mask, *size))


def has_region(row: Row) -> bool:
    """Whether an image has a true region of at least one pixel."""
    return row["truth"] is not None and row["truth"].size > 0


def masks_of(rows: Sequence[Row]) -> Lazy[np.ndarray]:
    """The (H, W) true region of each of these images, all of which have one."""
    return Lazy(len(rows), lambda i: rows[i]["truth"].mask())
