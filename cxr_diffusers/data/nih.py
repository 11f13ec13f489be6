"""NIH ChestX-ray14, as downloaded: healthy, a disease, and if wanted any other finding."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Unpack

import datasets
import numpy as np
import pandas as pd

from .boxes import PREPARED, check_box, image_size, to_pixels
from .findings import class_id, class_names, match_names
from .image_files import FRONTAL, check_views
from .rows import to_dataset
from .selection import Selection, select_rows
from .tables import brief, check_encodable, in_words, numbers, path_of, read_csv

NO_FINDING = "No Finding"
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
# CheXpert's names, and the boxes' own
ALIASES = {"pleural effusion": "Effusion", "pleural thickening": "Pleural_Thickening", "infiltrate": "Infiltration"}
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOXES = "BBox_List_2017.csv"
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
ORIGINAL = ("OriginalImage[Width", "Height]")  # columns of the tables whose boxes count in the download's pixels
SIDE = 1024  # of every image of the download
SUFFIXES = (".png", ".jpg", ".jpeg")


def load_nih(
    root: Path | str,
    *,
    split: str = "train",
    classes: Sequence[str] = ("Effusion",),
    other: bool = False,
    views: Sequence[str] | None = None,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """ChestX-ray14 -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    Healthy is the label "No Finding" alone; a row with several of the named diseases belongs to the first named.

    Args:
        root: the folder with `Data_Entry_2017*.csv`; images lie in images/ or images_001/images/, images_002/ ...
        split: "train" (train_val_list.txt) or "test" (test_list.txt), which share no patient; "all" reads every row.
        classes: names of findings, in any case; CheXpert's name "Pleural Effusion" also works.
        other: whether rows with other findings only are kept as a class of their own.
        views: e.g. ["PA"], of "PA", "AP" and "" (unknown); None keeps all.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes of the `classes` if
        BBox_List_2017.csv is present, in pixels of the image. The list counts in pixels of the 1024 x 1024 originals:
        for a smaller copy with the official table (the one with the original sizes) its boxes are scaled.

    Raises:
        FileNotFoundError: no CSV, no list of the split, or an image (its line and name are given).
        ValueError: a missing column, an unknown class or option, or an invalid box, belongs to no row of the table
            or reaches beyond its image.
    """
    root, views = Path(root), check_views(views)
    csv = find_csv(root)
    table = read_table(csv)
    names, keys = match_names(classes, FINDINGS, ALIASES), set(table["key"])
    table["label"] = label_rows(table["Finding Labels"], names, other)
    table = table[(table["label"] >= 0) & table["key"].isin(_names_of(root, split, table))]
    table["view"] = table["View Position"].where(table["View Position"].isin(FRONTAL), "")
    if views is not None:
        table = table[table["view"].isin(views)]
    table = select_rows(table, **selection)
    files, boxes, unit = index_images(root), read_boxes(root, keys), box_unit(root, table)
    rows = []
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        file = files.get(row["key"])
        if file is None:
            raise FileNotFoundError(f"{csv}, line {index}: no image {row['Image Index']} below {root}")
        rows.append({name: row[name] for name in ("label", "patient", "view")} | {"image": file, "path": str(file)})
        if boxes:
            own = [(where, box) for where, finding, box in boxes.get(file.stem, []) if _finding(finding) in names]
            size = image_size(file) if own else (0, 0)
            rows[-1]["boxes"] = [to_pixels(box, unit, size, file, where) for where, box in own]
    as_named = [
        name.lower() if name.lower() in ALIASES else finding.lower()
        for name, finding in zip(classes, names, strict=True)
    ]
    return to_dataset(rows, class_names(as_named, other))


def label_rows(findings: Iterable[str], classes: Sequence[str], other: bool = False) -> np.ndarray:
    """("Effusion|Mass", ...) -> (N,) class ids, -1 for rows that belong to no class."""
    names_of_rows = [{name.strip() for name in str(text).split("|")} for text in findings]
    labels = [
        class_id(names & set(FINDINGS), classes, healthy=NO_FINDING in names, other=other) for names in names_of_rows
    ]
    return np.array(labels, dtype=int)


def find_csv(root: Path | str) -> Path:
    """`Data_Entry_2017*.csv` of `root`, the newest version of several; FileNotFoundError."""
    files = sorted(Path(root).glob("Data_Entry_2017*.csv"))
    if not files:
        raise FileNotFoundError(f"expected Data_Entry_2017*.csv in {root}")
    return files[-1]


def read_table(csv: Path | str) -> pd.DataFrame:
    """Data_Entry CSV -> its table, with columns patient and key; its index is the line of each row."""
    table = read_csv(csv, COLUMNS)
    patients = numbers(table, "Patient ID", csv)
    for line, name, patient in zip(table.index, table["Image Index"], patients, strict=True):
        if len(path_of(name, f"{csv}, line {line}").parts) > 1:
            raise ValueError(f"{csv}, line {line}: expected the name of a file, got the path {brief(name)}")
        if not 0 <= patient < 1e9 or patient % 1:
            raise ValueError(f"{csv}, line {line}: expected a whole number in column 'Patient ID', got {patient:g}")
    table["patient"] = patients.map(lambda number: f"nih{int(number):05d}")
    table["key"] = table["Image Index"].map(lambda name: Path(name.strip()).stem)
    return table


def index_images(root: Path | str) -> dict[str, Path]:
    """{stem: path} of all images in images/, images_001/, images_001/images/, ..."""
    folders = [f for pattern in ("images*", "images*/images") for f in sorted(Path(root).glob(pattern)) if f.is_dir()]
    paths = [path for folder in folders for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.stem: path for path in sorted(paths, reverse=True) if path.suffix.lower() in SUFFIXES}


def read_boxes(root: Path | str, keys: Collection[str]) -> dict[str, list[tuple[str, str, list[float]]]]:
    """BBox_List_2017.csv -> {stem: [(where, finding as spelled there, [x, y, w, h])]}; {} without such a file.

    Its header calls the columns "Bbox [x", "y", "w", "h]" and adds three empty ones, so they are read by position.

    Args:
        keys: stems of all images of the table.

    Raises:
        ValueError: a row with an unknown finding, an invalid box, or an image that is not one of `keys`.
    """
    path = Path(root) / BOXES
    boxes: dict[str, list[tuple[str, str, list[float]]]] = {}
    table = read_csv(path) if path.is_file() else None
    if table is not None and len(table.columns) < 6:
        raise ValueError(f"{path}: expected the columns {BOX_HEADER}, got {in_words(table.columns)}")
    for line, row in () if table is None else zip(table.index, table.to_numpy(), strict=True):
        where = f"{path}, line {line}"
        stem = Path(path_of(row[0], where).name).stem
        if stem not in keys:
            raise ValueError(f"{where}: a box of {brief(row[0])}, which is no image of the table")
        _finding(row[1].strip(), f"{where}: ")
        boxes.setdefault(stem, []).append((where, row[1].strip(), check_box(row[2:6], where)))
    return boxes


def box_unit(root: Path | str, table: pd.DataFrame) -> tuple[int, int] | None:
    """(width, height) of the images that the boxes of a table count in; None: in pixels of the images as stored."""
    official = set(ORIGINAL) <= set(table.columns) and not (Path(root) / PREPARED).is_file()
    return (SIDE, SIDE) if official else None


def _finding(name, where=""):
    spelling = {finding.lower(): finding for finding in FINDINGS} | ALIASES
    if str(name).lower() not in spelling:
        raise ValueError(f"{where}unknown class {brief(name)}, expected some of {', '.join(FINDINGS)}")
    return spelling[str(name).lower()]


def _names_of(root, split, table):
    """Stems of a split's images."""
    if split == "all":
        return set(table["key"])
    if split not in LISTS:
        raise ValueError(f"expected `split` train, test or all, got {split!r}")
    path = root / LISTS[split]
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, the images of split {split!r}; `split='all'` does without")
    names = path.read_text(errors="surrogateescape").split()
    check_encodable(names, path)
    return {Path(name).stem for name in names}
