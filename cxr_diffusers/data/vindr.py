"""VinDr-CXR and VinDr-PCXR (children), as downloaded from PhysioNet: DICOM files, boxes around findings.

VinDr-CXR: train labelled by three radiologists an image, test by their consensus. VinDr-PCXR: one radiologist an image.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Unpack

import datasets
import pandas as pd

from .boxes import PREPARED, check_box, check_in_pixels, image_size, to_pixels, units_of
from .dicom import is_dicom
from .findings import check_other, match_names
from .image_files import files_to_dataset
from .images import SUFFIXES
from .selection import Selection, select_rows
from .tables import brief, check_encodable, missing_columns, numbers, path_of, read_csv

NO_FINDING = "No finding"
SPLITS = ("train", "test")
READERS = ("rad_id", "rad_ID")  # the two spellings of the radiologist's column
CORNERS = ("x_min", "y_min", "x_max", "y_max")


def load_vindr(
    root: Path | str,
    *,
    splits: Sequence[str] = ("train",),
    classes: Sequence[str] | None = None,
    other: bool = False,
    votes: int = 2,
    boxes: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """VinDr-CXR -> data set: without labels, to train a prior, or 0 healthy, 1.. `classes`, last "other finding".

    A finding of an image counts where `votes` of its radiologists agree (2 of 3). Where a table has one row an image,
    as the consensus of the test split, that row decides.

    Args:
        root: the downloaded folder: train/ and test/ with IMAGE_ID.dicom, annotations/image_labels_SPLIT.csv and
            annotations/annotations_SPLIT.csv (Kaggle's train.csv in `root` replaces both). Or a copy by `prepare`.
        splits: the splits to read, merged into one data set.
        classes: names of findings, in any case; the first named takes precedence. None: no labels, no table is read.
        other: with `classes`, whether images with another finding only are kept as a class of their own.
        votes: number of radiologists who must agree.
        boxes: whether to read the boxes of the named findings (of all, without `classes`) that have enough votes, of
            every radiologist, in pixels of the image. For a copy of another size than the DICOM originals, the table of
            boxes must have columns width and height, the size that its boxes count in; a copy by `prepare` has them.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`. The patients are not
            published: each image counts as a patient.

    Returns:
        `datasets.Dataset` with columns image (DICOM files are decoded on access), label, patient, view (unknown), path,
        and boxes if requested.

    Raises:
        FileNotFoundError: no folder of a split, or no table where one is needed.
        ValueError: an unknown split or class, `other` without `classes`, an image without labels, or a box that is
            invalid, belongs to no image or reaches beyond it.
    """
    check_splits(splits)
    check_other(other, classes)
    if votes < 1:
        raise ValueError(f"expected `votes` of 1 or more, got {votes}")
    tables = [_read_split(Path(root), split, classes, other, votes, boxes) for split in splits]
    return _to_dataset(Path(root), pd.concat(tables, ignore_index=True), classes, other, boxes, selection)


def load_vindr_pcxr(
    root: Path | str,
    *,
    splits: Sequence[str] = ("train",),
    classes: Sequence[str] | None = None,
    other: bool = False,
    boxes: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """VinDr-PCXR, children up to ten years -> data set as `load_vindr` makes of VinDr-CXR.

    Healthy is an image with the disease label "No finding" and without any local finding.

    Args:
        root: the downloaded folder: train/ and test/ with IMAGE_ID.dicom, image_labels_SPLIT.csv with the diseases and
            annotations_SPLIT.csv with the local findings and their boxes.
        classes: names of diseases ("Pneumonia", "Brocho-pneumonia", as spelled in the table) or of local findings
            ("Other opacity"), in any case; the first named takes precedence. None: no labels, no table is read.
        boxes: whether to read the boxes of the named local findings, in pixels of the image. A disease has no boxes of
            its own: where `classes` names one, and without `classes`, those of all local findings are read.
        splits, other, selection: as of `load_vindr`.

    Returns, Raises: as `load_vindr`.

    Source: Pham et al., Scientific Data 10 (2023) 240; PhysioNet vindr-pcxr 1.0.0.
    """
    check_splits(splits)
    check_other(other, classes)
    tables = [_read_pcxr_split(Path(root), split, classes, other, boxes) for split in splits]
    return _to_dataset(Path(root), pd.concat(tables, ignore_index=True), classes, other, boxes, selection)


def check_splits(splits: Sequence[str]) -> None:
    """ValueError unless `splits` is a list of one or more of `SPLITS`."""
    if not splits or isinstance(splits, str) or any(split not in SPLITS for split in splits):
        raise ValueError(f"expected `splits` a list of {' and '.join(SPLITS)}, got {splits!r}")


def _to_dataset(root, table, classes, other, boxes, selection):
    table = select_rows(table[table["label"] >= 0], **selection)
    names = ["radiograph"] if classes is None else ["healthy", *(name.lower() for name in classes)]
    rows = [
        {"image": r["file"], "label": r["label"], "patient": r["key"], "path": str(r["file"])}
        | ({"boxes": _pixels(root, r["file"], r["boxes"])} if boxes else {})
        for r in table.to_dict("records")
    ]
    return files_to_dataset(rows, [*names, *(["other finding"] if other else [])])


def _read_split(root, split, classes, other, votes, boxes):
    files = index_images(root, split)
    labels = None if classes is None else label_images(vote(read_labels(root, split), votes), classes, other)
    rows_of_boxes = read_boxes(root, split, files, votes, classes) if boxes else {}
    return _table(root, split, files, labels, rows_of_boxes)


def _read_pcxr_split(root, split, classes, other, boxes):
    files = index_images(root, split)
    labels, boxed = None, classes
    if classes is not None:
        diseases, findings = vote(read_labels(root, split), 1), read_findings(root, split)
        labels = label_images(join_labels(diseases, findings), classes, other)
        local = {name.lower() for name in findings.columns}
        boxed = classes if all(str(name).lower() in local for name in classes) else None
    return _table(root, split, files, labels, read_boxes(root, split, files, 1, boxed) if boxes else {})


def _table(root, split, files, labels, rows_of_boxes):
    """A row an image: file, key, patient, label (0 where `labels` is None), boxes."""
    missing = [] if labels is None else sorted(files.keys() - labels.keys())
    if missing:
        raise ValueError(f"{root}: no labels of {split} image {missing[0]} and {len(missing) - 1} more")
    rows = [
        {"file": file, "key": key, "patient": key, "label": labels[key] if labels else 0}
        | {"boxes": rows_of_boxes.get(key, [])}
        for key, file in files.items()
    ]
    return pd.DataFrame(rows, columns=["file", "key", "patient", "label", "boxes"])


def index_images(root: Path, split: str) -> dict[str, Path]:
    """{image id: path} of the folder of a split; FileNotFoundError if it does not exist or has no image."""
    folder = Path(root) / split
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise ValueError(f"{files[path.stem]} and {path} are the same image {path.stem}: remove one")
            files[path.stem] = path
    check_encodable(files, folder)
    if not files:
        raise FileNotFoundError(f"expected VinDr's images as {folder}/IMAGE_ID.dicom")
    return files


def find_table(root: Path, split: str, name: str) -> Path:
    """annotations/NAME_SPLIT.csv or NAME_SPLIT.csv of `root`, or Kaggle's train.csv; FileNotFoundError."""
    places = [Path(root) / "annotations" / f"{name}_{split}.csv", Path(root) / f"{name}_{split}.csv"]
    places += [Path(root) / "train.csv"] if split == "train" else []
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"expected VinDr's table {places[0]} or {places[1]}")
    return path


def read_labels(root: Path, split: str) -> pd.DataFrame:
    """Table of 0 and 1: a row for (image_id, reader), a column a finding, named as in the file.

    Raises:
        FileNotFoundError, ValueError: as `load_vindr`.
    """
    csv = find_table(root, split, "image_labels")
    table = read_table(csv)
    reader = next((name for name in READERS if name in table), None)
    table["reader"] = table[reader] if reader else "consensus"
    if "class_name" in table:  # a row a box, as Kaggle's
        table = table.assign(present=1)
        return table.pivot_table(
            index=["image_id", "reader"], columns="class_name", values="present", aggfunc="max", fill_value=0
        )
    missing_columns([NO_FINDING], table.columns, csv)
    table = table.drop(columns=[reader] if reader else [])
    for name in table.columns.drop(["image_id", "reader"]):
        values = numbers(table, name, csv)
        wrong = values.index[~values.isin([0, 1])]
        if len(wrong):
            raise ValueError(f"{csv}, line {wrong[0]}: expected 0 or 1 in column {name!r}, got {values[wrong[0]]:g}")
        table[name] = values.astype(int)
    return table.set_index(["image_id", "reader"])


def read_findings(root: Path, split: str) -> pd.DataFrame:
    """annotations_SPLIT.csv -> booleans: a row for image_id, a column a local finding ("No finding" left out)."""
    csv = find_table(root, split, "annotations")
    table = read_table(csv)
    missing_columns(["class_name"], table.columns, csv)
    table = table[table["class_name"] != NO_FINDING]
    return pd.crosstab(table["image_id"], table["class_name"]) > 0


def join_labels(diseases: pd.DataFrame, findings: pd.DataFrame) -> pd.DataFrame:
    """Booleans by image_id: diseases and local findings; "No finding" only where neither table has one."""
    findings = findings.reindex(diseases.index, fill_value=False)
    both = diseases.join(findings[[name for name in findings.columns if name not in diseases.columns]])
    both[NO_FINDING] &= ~both.drop(columns=NO_FINDING).any(axis=1)
    return both


def read_table(csv: Path) -> pd.DataFrame:
    """One of VinDr's tables; its index is the line of each row. ValueError if an image_id is not a file name."""
    table = read_csv(csv, ["image_id"])
    for line, key in table["image_id"].items():
        if len(path_of(key, f"{csv}, line {line}").parts) > 1:
            raise ValueError(f"{csv}, line {line}: expected the name of an image, got the path {brief(key)}")
    return table


def vote(labels: pd.DataFrame, votes: int = 2) -> pd.DataFrame:
    """Table of `read_labels` -> booleans by image_id: at least `votes` readers agree, or all where there are fewer."""
    count = labels.groupby("image_id").sum()
    readers = labels.groupby("image_id").size().clip(upper=votes)
    return count.ge(readers, axis=0)


def label_images(voted: pd.DataFrame, classes: Sequence[str], other: bool = False) -> dict[str, int]:
    """Booleans, a row for image_id and a column a finding -> {image id: class id, -1 to leave it out}."""
    names = match_names(classes, [name for name in voted.columns if name != NO_FINDING])
    label, diseased = pd.Series(-1, index=voted.index), voted.drop(columns=NO_FINDING).any(axis=1)
    if other:
        label[diseased] = len(names) + 1
    label[voted[NO_FINDING] & ~diseased] = 0  # with `votes` 1, one radiologist may see what another does not
    for i, name in reversed(list(enumerate(names, start=1))):
        label[voted[name]] = i
    return label.to_dict()


def read_boxes(
    root: Path, split: str, images: Collection[str], votes: int = 2, classes: Sequence[str] | None = None
) -> dict[str, list[tuple[str, list[float], Any]]]:
    """annotations_SPLIT.csv -> {image id: [(where, [x, y, w, h], unit)]} of the findings with enough votes.

    `unit` is (width, height) that a box counts in, where the table says so, else None.

    Args:
        images: ids of the images of the split.
        classes: names of findings, in any case; None: all.

    Raises:
        ValueError: a row with an invalid box, or whose image is neither among `images` nor in the table of labels.
    """
    csv = find_table(root, split, "annotations")
    table = read_table(csv)
    missing_columns(["class_name", *CORNERS], table.columns, csv)
    reader = next((name for name in READERS if name in table), None)
    readers = table.groupby("image_id")[reader].nunique() if reader else pd.Series(1, index=table["image_id"].unique())
    table = table[table["class_name"] != NO_FINDING].copy()
    table["row"] = list(zip(rows_of(table, csv), units_of(table, csv), strict=True))
    check_images(table, csv, root, split, images)
    table = table[table["row"].map(lambda row: row[0] is not None).astype(bool)]
    if classes is not None:
        table = table[table["class_name"].str.lower().isin([str(name).lower() for name in classes])]
    boxes: dict[str, list[tuple[str, list[float], Any]]] = {}
    for (image, _), rows in table.groupby(["image_id", "class_name"], sort=False):
        if (rows[reader].nunique() if reader else 1) >= min(votes, readers[image]):
            boxes.setdefault(image, []).extend((f"{csv}, line {line}", *row) for line, row in rows["row"].items())
    return boxes


def check_images(table: pd.DataFrame, csv: Path, root: Path, split: str, images: Collection[str]) -> None:
    """ValueError naming the first row of boxes whose image is neither among `images` nor in the table of labels."""
    unknown = set(table["image_id"]) - set(images)
    if unknown:
        try:
            unknown -= set(read_table(find_table(root, split, "image_labels"))["image_id"])
        except FileNotFoundError:
            pass
    line = next((line for line, key in table["image_id"].items() if key in unknown), None)
    if line is not None:
        key = brief(table.at[line, "image_id"])
        raise ValueError(f"{csv}, line {line}: a box of {key}, which is no image of {split}")


def rows_of(table: pd.DataFrame, csv: Path) -> list[list[float] | None]:
    """[[x, y, w, h]] of a table of corners, None for a row without a box; ValueError naming a row with a wrong one."""
    corners = pd.DataFrame({name: numbers(table, name, csv) for name in CORNERS})
    boxes: list[list[float] | None] = []
    for line, (x0, y0, x1, y1) in zip(table.index, corners.to_numpy(), strict=True):
        if pd.isna([x0, y0, x1, y1]).all() and all(not str(table.at[line, name]).strip() for name in CORNERS):
            boxes.append(None)
        else:
            boxes.append(check_box([x0, y0, x1 - x0, y1 - y0], f"{csv}, line {line}"))
    check_in_pixels([box for box in boxes if box is not None], csv)
    return boxes


def check_unit(root: Path, image: Path, unit: tuple[float, float] | None, where: str) -> None:
    """ValueError where the scale of a box is unknown: the image is a copy of its DICOM original, of any size."""
    if unit is None and not is_dicom(image) and not (Path(root) / PREPARED).is_file():
        raise ValueError(
            f"{where}: {image} is no DICOM original, and nothing says which size the boxes count in: "
            "expected columns width and height in the table"
        )


def _pixels(root, image, rows):
    size = image_size(image) if rows else None
    for where, _, unit in rows:
        check_unit(root, image, unit, where)
    return [to_pixels(box, unit, size, image, where) for where, box, unit in rows]
