"""MIMIC-CXR-JPG 2.1, as downloaded from PhysioNet: JPEG files, labels of each study read from its report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import datasets
import pandas as pd

from .chexpert import FINDINGS, LABELS, NO_FINDING, check_labels, label_rows
from .findings import class_names, match_names
from .image_files import FRONTAL, check_views, files_to_dataset, select_files
from .selection import Selection
from .tables import brief, missing_columns, numbers, path_of, read_csv

SPLITS = ("train", "validate", "test")
# name of a labeller -> how its table is called
TABLES = {
    "chexpert": "mimic-cxr-*-chexpert.csv",
    "negbio": "mimic-cxr-*-negbio.csv",
    "radiologist": "mimic-cxr-*-test-set-labeled.csv",
}
RENAMED = {"Airspace Opacity": "Lung Opacity", "No Findings": NO_FINDING}  # of the radiologist's table


def load_mimic_cxr(
    root: Path | str,
    *,
    split: str = "train",
    labels: Literal["chexpert", "negbio", "radiologist"] = "chexpert",
    classes: Sequence[str] = ("Pleural Effusion",),
    other: bool = False,
    frontal_only: bool = True,
    views: Sequence[str] | None = None,
    uncertain: Literal["ignore", "positive", "negative"] = "ignore",
    skip_missing: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """MIMIC-CXR-JPG -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    All images of a study have the labels of its report. Healthy is `No Finding` = 1 without a finding = 1;
    of several named diseases the first named counts. Studies that the labeller gave no row are left out.

    Args:
        root: the folder with files/p10/p10000032/s50414267/DICOM_ID.jpg and mimic-cxr-2.0.0-metadata.csv.gz, -split
            and -chexpert or -negbio (as downloaded, or unpacked to .csv).
        split: "train", "validate" or "test", the official split, which shares no patient; "all" reads every image.
        labels: the labeller: "chexpert", "negbio", or "radiologist", the manual labels of the test set's reports
            (mimic-cxr-2.1.0-test-set-labeled.csv).
        classes: names of label columns, in any case.
        other: keep images with other findings as a class of their own; a study whose labels are all blank counts as one
            (its report names a finding that has no column).
        frontal_only: keep images with ViewPosition PA or AP only; a blank one may be a lateral image.
        views: e.g. ["PA"], of "PA", "AP" and "" (unknown or lateral: with `frontal_only` false); None keeps all.
        uncertain: meaning of the label -1, as of `load_chexpert`.
        skip_missing: leave images out that are not there, for a partial download; a warning counts them.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`.

    Returns:
        `datasets.Dataset` with columns image, label, patient (p and the subject's number), view, path.

    Raises:
        FileNotFoundError: a missing table, or an image of it (its line and path are named).
        ValueError: a missing column, an unknown class, split or labeller, or a cell that is not a number or file name.

    Source: Johnson et al., MIMIC-CXR-JPG 2.1.0, PhysioNet, doi 10.13026/jsn5-t979.
    """
    root = Path(root)
    names, views = match_names(classes, FINDINGS), check_views(views, frontal_only=frontal_only)
    table = read_images(root, split).merge(read_labels(root, labels, names), on=["subject", "study"], how="left")
    table = table[table["labelled"].notna()]
    table["label"] = label_rows(table, names, other, uncertain)
    table = table[table["label"] >= 0]
    if frontal_only:
        table = table[table["view"] != ""]
    if views is not None:
        table = table[table["view"].isin(views)]
    table = select_files(
        table,
        lambda row: [root / f"{row.key}.jpg", root / f"{row.key}.png"],
        skip_missing,
        **selection,
    )
    rows = [
        {"image": row["file"], "label": row["label"], "patient": row["patient"], "view": row["view"]}
        | {"path": str(row["file"])}
        for row in table.to_dict("records")
    ]
    return files_to_dataset(rows, class_names(names, other))


def find_table(root: Path, pattern: str) -> Path:
    """The newest file of a pattern in `root`, packed (.gz) or not; FileNotFoundError."""
    files = sorted([*root.glob(pattern), *root.glob(f"{pattern}.gz")])
    if not files:
        raise FileNotFoundError(f"expected MIMIC-CXR-JPG's table {pattern}.gz in {root}")
    return files[-1]


def read_images(root: Path, split: str = "train") -> pd.DataFrame:
    """Metadata and split -> a row an image: subject, study, patient, view, key (path without suffix), where.

    Raises:
        FileNotFoundError, ValueError: as `load_mimic_cxr`.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"expected `split` {', '.join(SPLITS)} or all, got {split!r}")
    csv = find_table(root, "mimic-cxr-*-metadata.csv")
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    table = read_csv(csv, columns, only=columns.__contains__)
    table["where"] = [f"{csv}, line {line}" for line in table.index]
    table = with_ids(table, csv, ["subject", "study"])
    for where, name in zip(table["where"], table["dicom_id"], strict=True):
        if len(path_of(name, where).parts) > 1:
            raise ValueError(f"{where}: expected the name of a file, got the path {brief(name)}")
    if split != "all":
        parts_csv = find_table(root, "mimic-cxr-*-split.csv")
        parts = read_csv(parts_csv, ["dicom_id", "split"], only=["dicom_id", "split"].__contains__)
        table = table[table["dicom_id"].isin(set(parts.loc[parts["split"].str.strip() == split, "dicom_id"]))]
    view = table["ViewPosition"].str.strip().str.upper()
    table["view"] = view.where(view.isin(FRONTAL), "")
    table["patient"] = [f"p{subject}" for subject in table["subject"]]
    table["key"] = [
        f"files/p{str(row.subject)[:2]}/p{row.subject}/s{row.study}/{row.dicom_id.strip()}"
        for row in table.itertuples()
    ]
    return table.reset_index(drop=True)


def read_labels(root: Path, labels: str, names: Sequence[str] = ()) -> pd.DataFrame:
    """The table of a labeller -> a row a study: subject, study, labelled (true), and label columns of 1, 0, -1, NaN.

    Raises:
        FileNotFoundError, ValueError: as `load_mimic_cxr`.
    """
    if labels not in TABLES:
        raise ValueError(f"expected `labels` {', '.join(TABLES)}, got {labels!r}")
    csv = find_table(root, TABLES[labels])
    table = read_csv(csv, ["study_id"]).rename(columns=RENAMED)
    missing_columns([NO_FINDING, *names], table.columns, csv)
    if "subject_id" not in table.columns:  # the radiologist's table has studies only
        studies = read_images(root, "all").drop_duplicates("study").set_index("study")["subject"]
        table = with_ids(table, csv, ["study"])
        table["subject"] = table["study"].map(studies)
    else:
        table = with_ids(table, csv, ["subject", "study"])
    columns = [name for name in LABELS if name in table.columns]
    for name in columns:
        table[name] = check_labels(numbers(table, name, csv), name, csv)
    twice = table.index[table.duplicated(["subject", "study"])]
    if len(twice):
        raise ValueError(
            f"{csv}, line {twice[0]}: expected one row a study, got a second one of {table['study'][twice[0]]}"
        )
    return table[["subject", "study", *columns]].assign(labelled=True)


def with_ids(table: pd.DataFrame, csv: Path, names: Sequence[str]) -> pd.DataFrame:
    """The table with columns `names` of whole numbers, from NAME_id; ValueError naming a line with another value."""
    ids: dict[str, Any] = {}
    for name in names:
        values = numbers(table, f"{name}_id", csv)
        wrong = values.index[~((values > 0) & (values < 1e12) & (values % 1 == 0))]
        if len(wrong):
            got = brief(table.at[wrong[0], f"{name}_id"])
            raise ValueError(f"{csv}, line {wrong[0]}: expected a whole number in column '{name}_id', got {got}")
        ids[name] = values.astype("int64")
    return table.assign(**ids)
