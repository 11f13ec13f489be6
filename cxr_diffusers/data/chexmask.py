"""CheXmask (Gaggion et al. 2024): lung and heart masks of the radiographs of five public data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from .boxes import image_size
from .images import without_suffix
from .limits import check_pixel_count
from .rows import png_cell
from .run_lengths import decode_runs, mask_image
from .tables import columns_of, missing_columns, numbers, path_of, read_csv

ORGANS = ("Right Lung", "Left Lung", "Heart")
LUNGS = ORGANS[:2]
# the column that names an image: ChestX-ray14, CheXpert, MIMIC-CXR-JPG, PadChest, VinDr-CXR
NAMES = ("Image Index", "Path", "dicom_id", "ImageID", "image_id")
QUALITY = "Dice RCA (Mean)"


def load_chexmask(
    csv: Path | str,
    images: Mapping[str, Any],
    *,
    organs: Sequence[str] = LUNGS,
    min_quality: float = 0.7,
) -> datasets.Dataset:
    """Another data set with CheXmask's masks in place of its own; images without a mask are left out.

    Masks of both lungs, two separate pieces, are what `training/train_lung_segmenter.py` learns from.

    Args:
        csv: the table of the data set, e.g. OriginalResolution/ChestX-Ray8.csv for ChestX-ray14.
        images: the data set, `name` of a loader and its keywords, e.g. {"name": "nih", "root": "/data/nih"}. Rows are
            joined by the name of the image file (for CheXpert by patient, study and view). Images may be smaller than
            the originals, not of another shape.
        organs: whose union is the mask: some of "Right Lung", "Left Lung", "Heart".
        min_quality: least "Dice RCA (Mean)", the estimated Dice coefficient of a row's masks; its authors advise 0.7.

    Returns:
        `datasets.Dataset` with the columns of the other one, and mask (white on black, as large as its image).

    Raises:
        FileNotFoundError: no such table. ValueError: a missing column, an unknown organ or loader, run lengths that
            leave their mask, a mask of another shape than its image, or no image with a mask.

    Source: Gaggion et al., Scientific Data 11 (2024) 511; PhysioNet chexmask-cxr-segmentation-data 1.0.0.
    """
    from . import build_dataset

    csv = Path(csv)
    wrong = [organ for organ in organs if organ not in ORGANS]
    if wrong or not organs or isinstance(organs, str):
        raise ValueError(f"expected `organs` a list of some of {', '.join(ORGANS)}, got {organs!r}")
    if not isinstance(images, Mapping) or "name" not in images:
        raise ValueError(f"expected `images` a data set, as {{name: nih, root: /data/nih}}, got {images!r}")
    if not csv.is_file():
        raise FileNotFoundError(f"expected a table of CheXmask, no file {csv}")
    dataset = build_dataset(**images)
    column = next((name for name in NAMES if name in columns_of(csv)), None)
    if column is None:
        missing_columns([NAMES[0]], columns_of(csv), csv)
    parts = 3 if column == "Path" else 1
    keys = [key_of(path, parts) for path in dataset["path"][:]]
    rows = read_rows(csv, str(column), parts, set(keys), organs, min_quality)
    kept = [i for i, key in enumerate(keys) if key in rows]
    if not kept:
        raise ValueError(f"{csv}: no mask of quality {min_quality:g} or more for any of {len(dataset)} images")
    paths, cells = dataset["path"][:], []
    for i in tqdm(kept, desc="masks", unit="image", leave=False, delay=2):
        where, runs, height, width = rows[keys[i]]
        masks = [decode_runs(text, height, width, where=where, first=1) for text in runs]
        cells.append(png_cell(mask_image(np.logical_or.reduce(masks), image_size(Path(paths[i])), where)))
    dataset = dataset.select(kept)
    if "mask" in dataset.column_names:
        dataset = dataset.remove_columns("mask")
    return dataset.add_column("mask", cells, feature=datasets.Image())


def key_of(path: str | PurePosixPath, parts: int) -> str:
    """The last `parts` components of a path without the suffix of an image file: the name that tables are joined by."""
    return "/".join(without_suffix(str(path)).parts[-parts:])


def read_rows(
    csv: Path, column: str, parts: int, keys: set[str], organs: Sequence[str], min_quality: float = 0.0
) -> dict[str, tuple[str, list[str], int, int]]:
    """Rows of a CheXmask table -> {key: (where, run lengths of the organs, height, width)}.

    Args:
        column: which names the image. parts: see `key_of`.
        keys: of the images to read; the others' rows never take up memory, the table has gigabytes.

    Raises:
        ValueError: a missing column, an invalid size, or a second row of an image.
    """
    needed = [column, QUALITY, *organs, "Height", "Width"]
    table = read_csv(
        csv,
        needed,
        only=set(needed).__contains__,
        keep=lambda row: key_of(row.get(column, "").strip().replace("\\", "/"), parts) in keys,
    )
    quality, heights, widths = (numbers(table, name, csv) for name in (QUALITY, "Height", "Width"))
    rows: dict[str, tuple[str, list[str], int, int]] = {}
    for line, row in zip(table.index, table.to_dict("records"), strict=True):
        where, height, width = f"{csv}, line {line}", heights[line], widths[line]
        if not quality[line] >= min_quality:
            continue
        try:
            height, width = int(height), int(width)
            check_pixel_count(width, height)
        except ValueError as error:  # NaN has no whole number
            raise ValueError(f"{where}: columns Height and Width: {error}") from None
        key = key_of(path_of(row[column], where), parts)
        if key in rows:
            raise ValueError(f"{where}: expected one row an image, got a second one of {key}")
        rows[key] = (where, [row[organ] for organ in organs], height, width)
    return rows
