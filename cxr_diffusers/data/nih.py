"""NIH ChestX-ray14, as downloaded: healthy, a disease, and if wanted any other finding."""

import csv as csv_files
from pathlib import Path

import numpy as np
import pandas as pd

from .rows import missing_columns, to_dataset
from .selection import select_rows

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
ALIASES = {"pleural effusion": "Effusion", "pleural thickening": "Pleural_Thickening"}  # CheXpert's names
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
BOXES = "BBox_List_2017.csv"


def load_nih(
    root,
    *,
    split="train",
    classes=("Effusion",),
    other=False,
    views=None,
    per_class=None,
    seed=0,
    one_per_patient=False,
    holdout=0.0,
    part="train",
    holdout_seed=0,
):
    """ChestX-ray14 -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    Healthy is the label "No Finding"; a row with several named diseases goes to the first named.

    Args:
        root: the folder with `Data_Entry_2017*.csv`; images lie in images/ or images_001/images/, images_002/ ...
        split: "train" (train_val_list.txt) or "test" (test_list.txt), which share no patient; "all" takes every row.
        classes: names of findings; CheXpert's "Pleural Effusion" is understood.
        views: e.g. ("PA",); None keeps both.
        per_class, seed, one_per_patient, holdout, part, holdout_seed: see `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes where BBox_List_2017.csv is there
        (in pixels of the 1024-px originals).

    Raises:
        FileNotFoundError: no CSV, no list of the split, or an image (its line and name are told).
        ValueError: a missing column, an unknown class or option.
    """
    root = Path(root)
    csv = find_csv(root)
    table = read_table(csv)
    names = [_finding(name) for name in classes]
    table["label"] = label_rows(table["Finding Labels"], names, other)
    table = table[(table["label"] >= 0) & table["Image Index"].isin(_names_of(root, split, table))]
    if views is not None:
        table = table[table["View Position"].isin(list(views))]
    table = select_rows(
        table,
        per_class=per_class,
        seed=seed,
        one_per_patient=one_per_patient,
        holdout=holdout,
        part=part,
        holdout_seed=holdout_seed,
    )
    files, boxes = index_images(root), read_boxes(root)
    rows = []
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        file = files.get(Path(row["Image Index"]).stem)
        if file is None:
            raise FileNotFoundError(f"{csv}, line {index + 2}: no image {row['Image Index']} below {root}")
        view = row["View Position"] if row["View Position"] in ("PA", "AP") else ""
        rows.append({"image": file, "label": row["label"], "patient": row["patient"], "view": view, "path": str(file)})
        if boxes:
            rows[-1]["boxes"] = boxes.get(file.stem, [])
    spoken = [name.lower() if name.lower() in ALIASES else _finding(name).lower() for name in classes]
    return to_dataset(rows, ["healthy", *spoken, *(["other finding"] if other else [])])


def label_rows(findings, classes, other=False):
    """("Effusion|Mass", ...) -> (N,) class ids, -1 for rows that belong to no class."""
    found = [set(str(text).split("|")) for text in findings]
    label = np.full(len(found), -1)
    for i, names in enumerate(found):
        named = [k for k, name in enumerate(classes, start=1) if name in names]
        if named:
            label[i] = named[0]
        elif NO_FINDING in names:
            label[i] = 0
        elif other and names & set(FINDINGS):
            label[i] = len(classes) + 1
    return label


def find_csv(root):
    """`Data_Entry_2017*.csv` of `root`: the newest version if there are two."""
    found = sorted(Path(root).glob("Data_Entry_2017*.csv"))
    if not found:
        raise FileNotFoundError(f"expected Data_Entry_2017*.csv in {root}")
    return found[-1]


def read_table(csv):
    """Data_Entry CSV -> its table, with columns patient and key."""
    table = pd.read_csv(csv)
    missing_columns(COLUMNS, table.columns, csv)
    table["patient"] = table["Patient ID"].map(lambda number: f"nih{int(number):05d}")
    table["key"] = table["Image Index"].map(lambda name: Path(name).stem)
    return table


def index_images(root):
    """{stem: path} of all images in images/, images_001/, images_001/images/, ..."""
    folders = [f for pattern in ("images*", "images*/images") for f in sorted(Path(root).glob(pattern)) if f.is_dir()]
    return {path.stem: path for folder in folders for path in folder.iterdir() if path.suffix in (".png", ".jpg")}


def read_boxes(root):
    """BBox_List_2017.csv -> {stem: [[x, y, w, h]]}; {} where it is not there.

    Its header calls the columns "Bbox [x", "y", "w", "h]" and adds three empty ones, so they are read by position.
    """
    path = Path(root) / BOXES
    boxes = {}
    if path.is_file():
        with open(path, newline="") as file:
            for name, _, *numbers in list(csv_files.reader(file))[1:]:
                boxes.setdefault(Path(name).stem, []).append([float(n) for n in numbers[:4]])
    return boxes


def _finding(name):
    known = {finding.lower(): finding for finding in FINDINGS} | ALIASES
    if str(name).lower() not in known:
        raise ValueError(f"unknown class {name!r}, expected some of {', '.join(FINDINGS)}")
    return known[name.lower()]


def _names_of(root, split, table):
    if split == "all":
        return set(table["Image Index"])
    if split not in LISTS:
        raise ValueError(f"expected `split` train, test or all, got {split!r}")
    path = root / LISTS[split]
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, the images of split {split!r}; `split='all'` does without")
    return set(path.read_text().split())
