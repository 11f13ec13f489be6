"""SIIM-ACR Pneumothorax Segmentation (2019), as downloaded from Kaggle: DICOM files and run-length masks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import datasets
import numpy as np
import pandas as pd

from .boxes import image_size
from .image_files import check_views, files_to_dataset, index_files, locate_files, read_headers
from .rows import png_cell
from .rsna import key_of
from .run_lengths import decode_runs, mask_image
from .selection import Selection, select_rows
from .tables import read_csv

TABLES = ("train-rle.csv", "stage_2_train.csv")
IMAGES = "dicom-images-train"
NAMES = ("no pneumothorax", "pneumothorax")
SIDE = 1024  # of every image and mask of the download, in pixels


def load_siim(
    root: Path | str,
    *,
    views: Sequence[str] | None = None,
    skip_missing: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """SIIM-ACR -> data set with labels 0 no pneumothorax, 1 pneumothorax, and the masks of pneumothoraces.

    Class 0 is not healthy: these images may show any other disease. Several rows of an image are united in one mask.

    Args:
        root: the folder with train-rle.csv (or stage_2_train.csv) and dicom-images-train/STUDY/SERIES/IMAGE.dcm, or
            images called IMAGE.dcm, IMAGE.png, ... in any folder below. Images without a row in the table are left out.
        views: e.g. ["PA"], of "PA", "AP" and "" (unknown), from the DICOM headers; None keeps all.
        skip_missing: leave rows out whose image is not there; a warning counts them.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`. The patient is the
            PatientID of the DICOM header, or the image's name for files of another type.

    Returns:
        `datasets.Dataset` with columns image (decoded on access), label, patient, view, path, mask (of class 1).

    Raises:
        FileNotFoundError: no table, or an image of it (its line and path are named).
        ValueError: a missing column, or run lengths that are invalid or leave the image.

    Source: Filice et al., Journal of Digital Imaging 33 (2020) 490.
    """
    root, views = Path(root), check_views(views)
    table, runs = read_runs(find_table(root))
    folder = root / IMAGES if (root / IMAGES).is_dir() else root
    index = index_files(folder)
    table = locate_files(table, lambda row: [index.get(row.key, folder / f"{row.key}.dcm")], skip_missing)
    headers = read_headers(table["file"])
    table["patient"] = [patient or key for (patient, _), key in zip(headers, table["key"], strict=True)]
    table["view"] = [view for _, view in headers]
    if views is not None:
        table = table[table["view"].isin(views)]
    table = select_rows(table, **selection)
    rows = [
        {"image": row["file"], "label": row["label"], "patient": row["patient"], "view": row["view"]}
        | {"path": str(row["file"])}
        | {"mask": mask_cell(row["file"], runs[row["key"]]) if row["label"] else None}
        for row in table.to_dict("records")
    ]
    return files_to_dataset(rows, NAMES)


def find_table(root: Path) -> Path:
    """train-rle.csv or stage_2_train.csv of `root`; FileNotFoundError."""
    path = next((root / name for name in TABLES if (root / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"expected SIIM-ACR's table {' or '.join(TABLES)} in {root}")
    return path


def read_runs(csv: Path) -> tuple[pd.DataFrame, dict[str, list[tuple[str, str]]]]:
    """The table -> (a row an image: key, label, where; {key: [(where, run lengths)]} of images with a mask).

    Run lengths are relative (a start counts from the end of the run before), and count pixels along columns.

    Raises:
        ValueError: a missing column, or an image with a mask in one row and none in another.
    """
    table = read_csv(csv, ["ImageId", "EncodedPixels"])  # the file's header is "ImageId, EncodedPixels"
    images: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[tuple[str, str]]] = {}
    for line, cell, text in zip(table.index, table["ImageId"], table["EncodedPixels"], strict=True):
        where = f"{csv}, line {line}"
        key, label = key_of(cell, where), int(text.strip() not in ("", "-1"))
        if images.setdefault(key, {"key": key, "label": label, "where": where})["label"] != label:
            raise ValueError(f"{where}: expected a mask in all rows of an image or in none, got both")
        if label:
            runs.setdefault(key, []).append((where, text))
    return pd.DataFrame(list(images.values()), columns=["key", "label", "where"]), runs


def mask_cell(image: Path, runs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The union of an image's masks, at the size of the image, as a cell of the column `mask`."""
    masks = [decode_runs(text, SIDE, SIDE, where=where, order="F", relative=True) for where, text in runs]
    return png_cell(mask_image(np.logical_or.reduce(masks), image_size(image), runs[0][0]))
