"""RSNA Pneumonia Detection Challenge (2018), as downloaded from Kaggle: DICOM files, boxes around lung opacities."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import datasets
import pandas as pd

from .boxes import check_box, image_size, to_pixels
from .findings import class_names
from .image_files import check_views, files_to_dataset, index_files, locate_files, read_headers, select_files
from .selection import Selection
from .tables import brief, path_of, read_csv

LABELS, CLASSES, IMAGES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv", "stage_2_train_images"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
NORMAL, OPACITY, NOT_NORMAL = "Normal", "Lung Opacity", "No Lung Opacity / Not Normal"
BOX = ("x", "y", "width", "height")
SIDE = 1024  # of every image of the download, in pixels; boxes count in them


def load_rsna(
    root: Path | str,
    *,
    other: bool = False,
    views: Sequence[str] | None = None,
    mapping: Path | str | None = None,
    skip_missing: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """RSNA Pneumonia -> data set with labels 0 healthy, 1 lung opacity, and with `other` 2 "other finding", and boxes.

    Healthy is the class "Normal" of stage_2_detailed_class_info.csv, lung opacity is Target 1, other finding is
    "No Lung Opacity / Not Normal". The test images of the challenge have no labels and are not read.

    Args:
        root: the folder with stage_2_train_labels.csv, stage_2_detailed_class_info.csv and
            stage_2_train_images/PATIENTID.dcm (or a copy of the images by `prepare`, at any size).
        other: keep the images that are not normal, but have no lung opacity, as a class of their own.
        views: e.g. ["PA"], of "PA", "AP" and "" (unknown), from the DICOM headers; None keeps all.
        mapping: RSNA's table of the NIH images that these are (pneumonia-challenge-dataset-mappings_2018.json); None:
            that file in `root`, if it is there. It gives the patients, named as `load_nih` names them. Without it every
            image is its own patient, although 26,684 images come from fewer people: a `holdout` may then share some.
        skip_missing: leave rows out whose image is not there; a warning counts them.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image (decoded on access), label, patient, view, path, boxes (x, y, w, h in
        pixels of the image).

    Raises:
        FileNotFoundError: a missing table, or an image of it (its line and path are named).
        ValueError: a missing column, a Target other than 0 and 1, an invalid box, tables that contradict each
            other, or an image that the mapping lacks.

    Source: Shih et al., Radiology: Artificial Intelligence 1 (2019) e180041.
    """
    root, views = Path(root), check_views(views)
    table, boxes = read_labels(root / LABELS)
    details = read_classes(root / CLASSES)
    table["label"] = [label_of(row, details, root / CLASSES, other) for row in table.itertuples()]
    table["patient"] = patients_of(table, root, mapping)
    table = table[table["label"] >= 0]
    images = root / IMAGES
    index = index_files(images)

    def candidates(row: Any) -> list[Path]:
        return [index.get(row.key, images / f"{row.key}.dcm")]

    if views is not None:
        table = locate_files(table, candidates, skip_missing)
        table = table[[view in views for _, view in read_headers(table["file"])]]
    table = select_files(
        table,
        candidates,
        skip_missing,
        **selection,
    )
    headers = read_headers(table["file"])
    rows = [
        {"image": row["file"], "label": row["label"], "patient": row["patient"], "view": view}
        | {"path": str(row["file"])}
        | {"boxes": boxes_of(row["file"], boxes.get(row["key"], []))}
        for row, (_, view) in zip(table.to_dict("records"), headers, strict=True)
    ]
    return files_to_dataset(rows, class_names([OPACITY], other))


def read_labels(csv: Path) -> tuple[pd.DataFrame, dict[str, list[tuple[str, list[float]]]]]:
    """stage_2_train_labels.csv -> (a row an image: key, target, where; {key: [(where, [x, y, w, h])]} in 1024 px).

    Raises:
        FileNotFoundError, ValueError: as `load_rsna`.
    """
    require(csv)
    table = read_csv(csv, ["patientId", *BOX, "Target"])
    images: dict[str, dict[str, Any]] = {}
    boxes: dict[str, list[tuple[str, list[float]]]] = {}
    for line, row in zip(table.index, table.to_dict("records"), strict=True):
        where, key = f"{csv}, line {line}", key_of(row["patientId"], f"{csv}, line {line}")
        target = {"0": 0, "1": 1}.get(row["Target"].strip())
        if target is None:
            raise ValueError(f"{where}: expected 0 or 1 in column 'Target', got {brief(row['Target'])}")
        if images.setdefault(key, {"key": key, "target": target, "where": where})["target"] != target:
            raise ValueError(f"{where}: expected the Target of the image's other rows, got {target}")
        cells = [row[name] for name in BOX]
        empty = not any(cell.strip() for cell in cells)
        if empty == bool(target):
            raise ValueError(f"{where}: expected a box where Target is 1 and none where it is 0, got Target {target}")
        if not empty:
            boxes.setdefault(key, []).append((where, check_box(cells, where)))
    return pd.DataFrame(list(images.values()), columns=["key", "target", "where"]), boxes


def read_classes(csv: Path) -> dict[str, str]:
    """stage_2_detailed_class_info.csv -> {key: class}; FileNotFoundError, ValueError as `load_rsna`."""
    require(csv)
    table = read_csv(csv, ["patientId", "class"])
    classes: dict[str, str] = {}
    for line, key, name in zip(table.index, table["patientId"], table["class"], strict=True):
        where, name = f"{csv}, line {line}", name.strip()
        if name not in (NORMAL, OPACITY, NOT_NORMAL):
            raise ValueError(f"{where}: expected {NORMAL}, {OPACITY} or {NOT_NORMAL!r}, got {brief(name)}")
        if classes.setdefault(key_of(key, where), name) != name:
            raise ValueError(f"{where}: expected one class an image, got {brief(name)} besides another one")
    return classes


def label_of(row: Any, classes: dict[str, str], csv: Path, other: bool) -> int:
    """Class id of an image, -1 to leave it out; ValueError where its two tables contradict each other."""
    name = classes.get(row.key)
    if name is None:
        raise ValueError(f"{row.where}: image {brief(row.key)} has no row in {csv}")
    if (name == OPACITY) != bool(row.target):
        raise ValueError(f"{row.where}: Target {row.target} contradicts the class {name!r} of {csv}")
    return {NORMAL: 0, OPACITY: 1, NOT_NORMAL: 2 if other else -1}[name]


def patients_of(table: pd.DataFrame, root: Path, mapping: Path | str | None = None) -> list[str]:
    """Patient of each row: of the NIH image that the mapping names, else the image's own key.

    Raises:
        FileNotFoundError, ValueError: as `load_rsna`.
    """
    path = Path(mapping) if mapping is not None else root / MAPPING
    if mapping is None and not path.is_file():
        return table["key"].tolist()
    require(path)
    try:
        entries = json.loads(path.read_text())
        patients = {str(entry["subset_img_id"]): int(str(entry["img_id"])[:8]) for entry in entries}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path}: expected RSNA's table of NIH images, a list of objects with subset_img_id and img_id"
        ) from None
    missing = [row for row in table.itertuples() if row.key not in patients]
    if missing:
        raise ValueError(f"{missing[0].where}: image {brief(missing[0].key)} is not in {path}")
    return [f"nih{patients[key]:05d}" for key in table["key"]]


def boxes_of(image: Path, boxes: Sequence[tuple[str, list[float]]]) -> list[list[float]]:
    """Boxes of the 1024 px original -> in pixels of the image, whatever its size."""
    size = image_size(image) if boxes else (0, 0)
    return [to_pixels(box, (SIDE, SIDE), size, image, where) for where, box in boxes]


def key_of(cell: str, where: str) -> str:
    """The name of an image; ValueError where it is blank or a path."""
    path = path_of(cell, where)
    if len(path.parts) > 1:
        raise ValueError(f"{where}: expected the name of an image, got the path {brief(cell)}")
    return str(path)


def require(path: Path) -> None:
    """FileNotFoundError unless there is such a file of RSNA's."""
    if not path.is_file():
        raise FileNotFoundError(f"expected RSNA's file {path}")
