"""CheXpert, as downloaded: healthy, a disease, and if wanted any other finding."""

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import pandas as pd
from datasets import Dataset
from tqdm.auto import tqdm

from ..files import stamp_of
from .boxes import image_size, to_pixels
from .boxes import read_boxes as read_box_table
from .rows import columns_to_dataset
from .selection import Selection, select_rows
from .tables import brief, is_file, missing_columns, numbers, path_of, read_csv

NO_FINDING = "No Finding"
FINDINGS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
)  # not "Support Devices": a pacemaker is not a disease, and CheXpert's labeller gives it to healthy chests as well
LABELS = (NO_FINDING, *FINDINGS, "Support Devices")
PLUS_COLUMNS = {
    "path_to_image": "Path",
    "frontal_lateral": "Frontal/Lateral",
    "ap_pa": "AP/PA",
    "deid_patient_id": "patient",
}
SPLITS = ("train", "valid", "test")
IMPRESSION = "impression"
# paths with forward slashes whose parts begin and end with a letter or digit: no "..", nothing to strip
PLAIN_PATH = re.compile(r"(?:\w(?:[\w. -]*\w)?/)*\w(?:[\w. -]*\w)?")


def load_chexpert(
    root: Path | str,
    *,
    split: str = "train",
    classes: Sequence[str] = ("Pleural Effusion",),
    other: bool = False,
    frontal_only: bool = True,
    views: Sequence[str] | None = None,
    uncertain: str = "ignore",
    boxes: Path | str | None = None,
    report_section: str = IMPRESSION,
    check_files: bool = True,
    **selection: Unpack[Selection],
) -> Dataset:
    """CheXpert -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    Healthy is `No Finding` = 1 where no finding is 1: a row that contradicts itself is one of that finding. Of several
    named diseases the first named counts. Blank is 0.

    Args:
        root: the downloaded folder (CheXpert-v1.0, CheXpert-v1.0-small, the four "batch" folders, a copy made by
            `prepare`, any name) or the folder around it. CheXpert Plus is recognised by `df_chexpert_plus*.csv`; its
            images lie in `train/`, `PNG/train/` or `PNG/PNG/train/`, its labels in `[chexbert_labels/]*_fixed.json`.
        split: the CSV: "train" reads train.csv, "valid" valid.csv.
        classes: names of CheXpert's label columns, case does not matter.
        other: whether rows that are neither healthy nor named are kept as a class of their own: some other finding = 1,
            or a finding that has no column (emphysema, say), so that all are blank, `No Finding` too. Rows with
            nothing but uncertain findings or support devices are left out.
        frontal_only: leave lateral images out.
        views: e.g. ("PA", ""); "" is an unknown view. None keeps all.
        uncertain: what -1 means: "positive" 1, "negative" 0, "ignore": a row that is uncertain about a named disease,
            and has no other one of them, is left out.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`. A copy by `prepare`
            gives the same rows as its source.
        boxes: CSV with columns file, x, y, w, h (and image_w, image_h where they count in pixels of an image of another
            size); None: `boxes.csv` in `root` or beside it, if there is one.
        report_section: for CheXpert Plus only: the section of the report whose CheXbert labels count, "impression",
            "report" or "findings" (of which users report `No Finding` = 1 wherever the section is empty).
        check_files: look whether every image exists.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes if there are any.

    Raises:
        FileNotFoundError: no CSV, or an image of it (its line and path are named).
        ValueError: a missing column, an unknown class or option, a cell that is not a label or path, an invalid
            box, or one that belongs to no image or reaches beyond it.
    """
    csv = find_csv(root, split)
    if report_section != IMPRESSION and not is_plus(csv):
        raise ValueError(f"expected CheXpert Plus for `report_section` {report_section!r}, got {csv}")
    table = read_table(csv, split, report_section)
    names, keys = [_column_of(name) for name in classes], set(table["key"])
    missing_columns([NO_FINDING, *names], table.columns, csv)
    table["label"] = label_rows(table, names, other, uncertain)
    table = table[table["label"] >= 0]
    if frontal_only:
        table = table[table["frontal"]]
    if views is not None:
        table = table[table["view"].isin(_checked_views(views))]
    table = select_rows(table, **selection)
    files = locate_images(csv, table["Path"], table["line"], check_files)
    boxes_by_key = read_boxes(csv, keys, {split}, boxes)
    columns = {"image": files, "path": files, **{name: table[name] for name in ("label", "patient", "view")}}
    if boxes_by_key:
        rows = zip(files, table["key"], strict=True)
        columns["boxes"] = [_pixels(file, boxes_by_key.get(key, [])) for file, key in rows]
    class_names = ["healthy", *(name.lower() for name in names), *(["other finding"] if other else [])]
    return columns_to_dataset(columns, class_names)


def label_rows(
    table: pd.DataFrame, classes: Sequence[str], other: bool = False, uncertain: str = "ignore"
) -> np.ndarray:
    """Table with CheXpert's label columns -> (N,) class ids, -1 for rows that belong to no class."""
    if uncertain not in ("ignore", "positive", "negative"):
        raise ValueError(f"expected `uncertain` ignore, positive or negative, got {uncertain!r}")
    findings = [name for name in FINDINGS if name in table.columns]
    positive = (table[findings] == 1) | ((table[findings] == -1) & (uncertain == "positive"))
    label = np.full(len(table), -1)
    if other:
        devices = table.get("Support Devices", pd.Series(0.0, index=table.index)) == 1
        # not healthy, and no column says why: the finding has none (emphysema, fibrosis, hernia)
        unnamed = ~positive.any(axis=1) & ~(table[findings] == -1).any(axis=1) & ~devices
        label[positive.any(axis=1) | unnamed] = len(classes) + 1
    label[(table[NO_FINDING] == 1) & ~positive.any(axis=1)] = 0
    for i, name in reversed(list(enumerate(classes, start=1))):
        label[positive[name]] = i
    if uncertain == "ignore":
        label[(table[classes] == -1).any(axis=1) & ~positive[classes].any(axis=1)] = -1
    return label


def find_csv(root: Path | str, split: str = "train") -> Path:
    """The CSV of a split in `root`, or in one folder below it."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of CheXpert, got {root}")
    patterns = [f"{split}.csv", f"*/{split}.csv", "df_chexpert_plus*.csv", "*/df_chexpert_plus*.csv"]
    csvs: list[Path] = next((hits for pattern in patterns if (hits := sorted(root.glob(pattern)))), [])
    if len(csvs) == 1:
        return csvs[0]
    if csvs:
        raise ValueError(f"{root} holds several data sets: give one of {', '.join(str(csv.parent) for csv in csvs)}")
    tables = sorted(path.name for path in root.glob("*.csv"))
    raise FileNotFoundError(f"expected {split}.csv in {root} or one folder below, got {tables or 'no CSV'}")


def is_plus(csv: Path | str) -> bool:
    """Whether a CSV is CheXpert Plus's."""
    return Path(csv).name.startswith("df_chexpert_plus")


def read_table(csv: Path | str, split: str = "train", report_section: str = IMPRESSION) -> pd.DataFrame:
    """CSV -> table: the label columns, and Path, key, frontal, view, patient, line.

    `key` names an image whatever the data set's folder or file type is called: train/patient00001/study1/view1_frontal.
    """
    if is_plus(csv):
        table = _read_plus(csv, split, report_section)
    else:
        table = read_csv(csv, ["Path"])
        for name in LABELS:
            if name in table:
                table[name] = check_labels(numbers(table, name, csv), name, csv)
        table["line"] = table.index
    paths = clean_paths(table["Path"], table["line"], csv)
    table["Path"] = pd.Series(paths, index=table.index, dtype=object)
    table["key"] = pd.Series([key_of(path) for path in paths], index=table.index, dtype=object)
    own = table["key"].map(_patient_of)
    table["patient"] = table["patient"].where(table["patient"] != "", own) if "patient" in table else own
    if "Frontal/Lateral" in table:
        table["frontal"] = table["Frontal/Lateral"].astype(str).str.lower().str.startswith("frontal")
    else:
        table["frontal"] = are_frontal(table["key"])
    view = table["AP/PA"].astype(str).str.upper() if "AP/PA" in table else pd.Series("", index=table.index)
    table["view"] = view.where(view.isin(["AP", "PA"]), "")
    return table


def are_frontal(paths: Iterable[str]) -> list[bool]:
    """For each path or key of a CheXpert image, whether it does not name a lateral view."""
    return ["lateral" not in path.lower() for path in paths]


def check_labels(values: pd.Series, name: str, csv: Path | str) -> pd.Series:
    """The numbers of a label column; ValueError naming the first line that is neither 1, 0, -1 nor blank."""
    wrong = values.index[~(values.isin([1, 0, -1]) | values.isna())]
    if len(wrong):
        raise ValueError(f"{csv}, line {wrong[0]}: expected 1, 0, -1 or blank in {name!r}, got {values[wrong[0]]:g}")
    return values


def locate_images(
    csv: Path | str,
    paths: Sequence[str],
    lines: Sequence[int],
    check_files: bool = True,
    missing_ok: bool = False,
    stamps: dict[str, tuple[int, int]] | None = None,
) -> list[str | None]:
    """Path (a text) of every row's image, whatever the data set's folder is called; FileNotFoundError names the row.

    Args:
        paths: of the rows, as of `clean_paths`.
        lines: of the rows in the CSV.
        missing_ok: give None for an image that is not there.
        stamps: {path: `files.stamp_of` it} of the images that were looked at is added to it.
    """
    layouts = _layouts(Path(csv).parent)
    files: list[str | None] = []
    layout = None
    stamps = {} if stamps is None else stamps

    def is_file(path):
        stamp = stamp_of(path)
        if stamp:
            stamps[path] = stamp
        return bool(stamp)

    rows = zip(paths, lines, strict=True)
    for path, line in tqdm(rows, total=len(paths), desc="checking images", unit="file", leave=False, delay=2):
        # the layout of the row before is almost always this row's as well
        file = _place(layout, path) if layout else None
        if file is None or (check_files and not is_file(file)):
            hit = next((c for c in layouts if is_file(_place(c, path))), None)
            if hit is None and not missing_ok:
                tried = _place(layout or layouts[0], path)
                looked = f"looked for {brief(tried, 400)} and {len(layouts) - 1} more"
                raise FileNotFoundError(f"{csv}, line {line}: no image {brief(path)} ({looked})")
            file, layout = (_place(hit, path), hit) if hit else (None, layout)
        files.append(file)
    return files


def find_boxes(csv: Path | str, boxes: Path | str | None = None) -> Path | None:
    """The table of boxes that belongs to a CSV, if there is one."""
    around = (
        [Path(boxes)] if boxes is not None else [p / "boxes.csv" for p in (Path(csv).parent, Path(csv).parent.parent)]
    )
    return next((path for path in around if boxes is not None or path.is_file()), None)


def read_boxes(
    csv: Path | str, keys: Collection[str], splits: Collection[str], boxes: Path | str | None = None
) -> dict[str, list[tuple]]:
    """Boxes CSV (columns file, x, y, w, h) -> {key: [(where, box, unit)]}; {} where there is none.

    Args:
        keys: of the rows of the CSV.
        splits: those that `keys` cover; rows of others may belong to images that are not there.

    Raises:
        ValueError: a row with an invalid box, or that belongs neither to a row of the CSV nor to a file.
    """
    path = find_boxes(csv, boxes)
    rows_by_key: dict[str, list[tuple]] = {}
    for where, file, box, unit in read_box_table(path) if path else ():
        image = path_of(file, where)
        key, split = key_of(str(image)), from_split(str(image)).partition("/")[0]
        other = split in SPLITS and split not in splits
        if (
            key not in keys
            and not other
            and not any(os.path.isfile(_place(place, str(image))) for place in _layouts(Path(csv).parent))
        ):
            raise ValueError(f"{where}: a box of {brief(file)}, which is no image of {csv}")
        rows_by_key.setdefault(key, []).append((where, box, unit))
    return rows_by_key


def clean_paths(cells: Iterable[str], lines: Iterable[int], csv: Path | str) -> list[str]:
    """Cells of a table -> paths with forward slashes, without spaces around them and parts that change nothing.

    Raises:
        ValueError: as of `tables.path_of`, a cell that is not a path inside the data set.
    """
    is_plain = PLAIN_PATH.fullmatch  # texts: 200,000 `PurePosixPath` take seconds
    rows = zip(cells, lines, strict=True)
    return [cell if is_plain(cell) else str(path_of(cell, f"{csv}, line {line}")) for cell, line in rows]


def key_of(path: str) -> str:
    """The name of an image whatever the data set's folder or file type is called; `path` as of `clean_paths`."""
    return os.path.splitext(from_split(path))[0]


def _pixels(image, rows):
    image = Path(image)
    if not rows or not is_file(image):
        return [box for _, box, _ in rows]
    size = image_size(image)
    return [to_pixels(box, unit, size, image, where) for where, box, unit in rows]


def _column_of(name):
    findings = {finding.lower(): finding for finding in FINDINGS}
    if str(name).lower() not in findings:
        raise ValueError(f"unknown class {name!r}, expected some of {', '.join(FINDINGS)}")
    return findings[name.lower()]


def _checked_views(views):
    wrong = [view for view in views if view not in ("AP", "PA", "")] if not isinstance(views, str) else [views]
    if wrong:
        raise ValueError(f"expected `views` a list of 'AP', 'PA' and '' (unknown), got {views!r}")
    return list(views)


def from_split(path: str) -> str:
    """A path of `clean_paths` from its split on: the data set's own name, whatever it is, is dropped."""
    first, _, rest = path.partition("/")
    return path if first in SPLITS or not rest else rest


def _patient_of(key):
    match = re.search(r"patient\d+", key)
    return match.group() if match else key


def _layouts(root):
    """(folder and slash, leading components dropped, suffix or None): where images can lie, likeliest first."""
    places = [(root, 1), (root, 0), (root.parent, 0), (root / "PNG", 0), (root / "PNG" / "PNG", 0)]
    # the full-size download: "CheXpert-v1.0 batch 2 (train 1)/patient00001/...", without train/
    places += [(folder, drop) for folder in sorted(root.parent.glob("*batch*")) for drop in (1, 2)]
    # CheXpert Plus writes .jpg where its files are .png
    return [(str(folder / "_")[:-1], drop, suffix) for suffix in (None, ".png") for folder, drop in places]


def _place(layout, path):
    """The path (a text) of a CSV's image, a path of `clean_paths`, in one of `_layouts`."""
    folder, drop, suffix = layout
    file = folder + "".join(path.split("/", drop)[drop:])
    return os.path.splitext(file)[0] + suffix if suffix else file


def _read_plus(csv, split, report_section):
    """CheXpert Plus: the images' table joined with the labels that CheXbert read from one section of the reports."""
    table = read_csv(csv, [*PLUS_COLUMNS, "split"], only=lambda name: name in (*PLUS_COLUMNS, "split"))
    table = table.rename(columns=PLUS_COLUMNS)
    table["line"] = table.index
    places = [Path(csv).parent / "chexbert_labels", Path(csv).parent]
    labels = next((p for place in places if (p := place / f"{report_section}_fixed.json").is_file()), None)
    if labels is None:
        raise FileNotFoundError(f"expected CheXpert Plus's labels as {places[0] / report_section}_fixed.json")
    labels = _read_labels(labels)
    table = table[table["split"] == split].merge(labels.drop_duplicates("Path"), on="Path", how="left")
    return table


def _read_labels(path):
    """A JSON object a line -> table with Path and label columns; ValueError naming an invalid line."""
    rows = []
    with open(path, errors="surrogateescape") as lines:
        for n, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                own = {k: float("nan") if v is None else float(v) for k, v in row.items() if k in LABELS}
                if not all(value in (1, 0, -1) or value != value for value in own.values()):
                    raise ValueError
                rows.append({"Path": str(row["path_to_image"]), **own})
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                raise ValueError(
                    f"{path}, line {n}: expected an object with path_to_image and labels of 1, 0, -1 or null"
                ) from None
    return pd.DataFrame(rows, columns=["Path", *[name for name in LABELS if any(name in row for row in rows)]])
