"""PadChest, as downloaded: 16-bit PNG files, and findings of each report in one large table."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import datasets
import pandas as pd

from .findings import class_id, class_names, match_names
from .image_files import check_views, files_to_dataset, select_files
from .selection import Selection
from .tables import brief, path_of, read_csv

TABLE = "PADCHEST_chest_x_ray_images_labels_160K*.csv"
COLUMNS = ("ImageID", "PatientID", "Projection", "Labels")
OPTIONAL = ("ImageDir", "MethodLabel", "PhotometricInterpretation_DICOM")
NORMAL = "normal"
NO_FINDINGS = (NORMAL, "unchanged", "exclude", "suboptimal study")  # labels that name no finding
VIEWS = {"PA": "PA", "AP": "AP", "AP_HORIZONTAL": "AP"}  # Projection of frontal images -> view


def load_padchest(
    root: Path | str,
    *,
    classes: Sequence[str] = ("pleural effusion",),
    other: bool = False,
    frontal_only: bool = True,
    views: Sequence[str] | None = None,
    physician_only: bool = False,
    skip_missing: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """PadChest -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    Healthy is the label "normal" alone. A row with several of the named findings belongs to the first named. Rows
    labelled "exclude" or "suboptimal study" are left out, and so are rows with neither a finding nor "normal" (no
    label, or "unchanged" alone). PadChest has no official split: use `holdout`.

    Args:
        root: the folder with PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz (or .csv); images lie in
            ImageDir/ImageID (0/ to 54/, the unpacked archives), in images/, or beside the table.
        classes: labels as the table has them, in any case. A finding's more specific labels are not included:
            "pleural effusion" is not "loculated pleural effusion".
        other: keep images with other findings only as a class of their own.
        frontal_only: keep Projection PA, AP and AP_horizontal (lying, view "AP") only.
        views: e.g. ["PA"], of "PA", "AP" and "" (all other projections: with `frontal_only` false); None keeps
            all.
        physician_only: keep rows labelled by physicians (MethodLabel), 27 % of the reports.
        skip_missing: leave rows out whose image is not there; a warning counts them. Some files of the table are
            missing in the download.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path. Images are decoded on access; those whose
        PhotometricInterpretation_DICOM is MONOCHROME1 are stored as negatives and are inverted.

    Raises:
        FileNotFoundError: no table, or an image of it (its line and path are named).
        ValueError: a missing column, an unknown class, Labels that are no list of texts, or a path with "..".

    Source: Bustos et al., PadChest, Medical Image Analysis 66 (2020) 101797.
    """
    root, views = Path(root), check_views(views, frontal_only=frontal_only)
    csv = find_table(root)
    table = read_csv(csv, COLUMNS, only={*COLUMNS, *OPTIONAL}.__contains__)
    table["where"] = [f"{csv}, line {line}" for line in table.index]
    table["labels"] = pd.Series(
        [parse_labels(cell, where) for cell, where in zip(table["Labels"], table["where"], strict=True)],
        index=table.index,
        dtype=object,
    )
    vocabulary = sorted({name for labels in table["labels"] for name in labels} - set(NO_FINDINGS))
    names = match_names(classes, vocabulary)
    table["label"] = [label_of(labels, names, other) for labels in table["labels"]]
    table["view"] = table["Projection"].str.strip().str.upper().map(VIEWS).fillna("")
    table = table[table["label"] >= 0]
    if physician_only:
        table = table[method_of(table, csv) == "physician"]
    if frontal_only:
        table = table[table["view"] != ""]
    if views is not None:
        table = table[table["view"].isin(views)]
    table["folder"] = table["ImageDir"].str.strip() if "ImageDir" in table else ""
    table["key"] = [str(path_of(cell, where)) for cell, where in zip(table["ImageID"], table["where"], strict=True)]
    for folder, where in zip(table["folder"], table["where"], strict=True):
        if folder:
            path_of(folder, where)
    table["patient"] = [patient_of(cell, where) for cell, where in zip(table["PatientID"], table["where"], strict=True)]
    table = select_files(
        table,
        lambda row: [root / row.folder / row.key, root / "images" / row.key, root / row.key],
        skip_missing,
        **selection,
    )
    rows = [
        {"image": row["file"], "label": row["label"], "patient": row["patient"], "view": row["view"]}
        | {"path": str(row["file"])}
        | {"negative": str(row.get("PhotometricInterpretation_DICOM", "")).strip() == "MONOCHROME1"}
        for row in table.to_dict("records")
    ]
    return files_to_dataset(rows, class_names(names, other))


def find_table(root: Path) -> Path:
    """The table of PadChest in `root`, packed (.gz) or not; FileNotFoundError."""
    files = sorted([*root.glob(TABLE), *root.glob(f"{TABLE}.gz")])
    if not files:
        raise FileNotFoundError(f"expected PadChest's table {TABLE}.gz in {root}")
    return files[-1]


def parse_labels(text: str, where: str) -> list[str]:
    """ "['COPD signs', 'pleural effusion ']" -> ["copd signs", "pleural effusion"]; a blank cell -> [].

    Raises:
        ValueError: something other than a list of texts, naming `where`.
    """
    if str(text).strip().lower() in ("", "nan"):
        return []
    try:
        labels = ast.literal_eval(str(text).strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{where}: expected a list of labels, as ['normal'], got {brief(text)}")
    return [label.strip().lower() for label in labels if label.strip()]


def label_of(labels: Sequence[str], classes: Sequence[str], other: bool = False) -> int:
    """Class of a row's labels, see `findings.class_id`; -1 for "exclude" and "suboptimal study"."""
    if {"exclude", "suboptimal study"} & set(labels):
        return -1
    return class_id(set(labels) - set(NO_FINDINGS), classes, healthy=set(labels) == {NORMAL}, other=other)


def method_of(table: pd.DataFrame, csv: Path) -> pd.Series:
    """MethodLabel of each row in lower case; ValueError where there is no such column."""
    if "MethodLabel" not in table:
        raise ValueError(f"{csv}: expected column 'MethodLabel' for `physician_only`")
    return table["MethodLabel"].str.strip().str.lower()


def patient_of(cell: str, where: str) -> str:
    """A patient's identifier; ValueError where it is blank: rows without one could not be kept together."""
    if not str(cell).strip():
        raise ValueError(f"{where}: expected a patient in column 'PatientID', got a blank cell")
    return str(cell).strip()
