"""CheXpert, as downloaded: healthy, a disease, and if wanted any other finding."""

import json
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .rows import missing_columns, to_dataset
from .selection import select_rows

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
)  # not "Support Devices": a pacemaker is no disease, and CheXpert's labeller gives it to healthy chests as well
PLUS_COLUMNS = {
    "path_to_image": "Path",
    "frontal_lateral": "Frontal/Lateral",
    "ap_pa": "AP/PA",
    "deid_patient_id": "patient",
}
SPLITS = ("train", "valid", "test")


def load_chexpert(
    root,
    *,
    split="train",
    classes=("Pleural Effusion",),
    other=False,
    frontal_only=True,
    views=None,
    uncertain="ignore",
    per_class=None,
    seed=0,
    one_per_patient=False,
    holdout=0.0,
    part="train",
    holdout_seed=0,
    boxes=None,
    report_section="impression",
    check_files=True,
):
    """CheXpert -> data set with labels 0 healthy, 1.. `classes`, and with `other` a last class "other finding".

    Healthy is `No Finding` = 1; a named disease = 1 wins over it, the first named over the second. Blank is 0.

    Args:
        root: the downloaded folder (CheXpert-v1.0, CheXpert-v1.0-small, the four "batch" folders, a copy made by
            `prepare`, any name) or the folder around it. CheXpert Plus is recognised by `df_chexpert_plus*.csv`; its
            images lie in `train/`, `PNG/train/` or `PNG/PNG/train/`, its labels in `[chexbert_labels/]*_fixed.json`.
        split: the CSV: "train" reads train.csv, "valid" valid.csv.
        classes: names of CheXpert's label columns, case does not matter.
        other: whether rows that are neither healthy nor named are kept as a class of their own: some other finding = 1,
            or no column at all for what was found (emphysema, say), so that all are blank, `No Finding` too. Rows with
            nothing but uncertain findings or support devices are left out.
        frontal_only: leave lateral images out.
        views: e.g. ("PA", ""); "" is an unknown view. None keeps all.
        uncertain: what -1 means: "positive" 1, "negative" 0, "ignore": a row that is uncertain about a named disease,
            and has no other one of them, is left out.
        per_class, seed, one_per_patient, holdout, part, holdout_seed: see `selection.select_rows`. A copy made by
            `prepare` gives the same rows as its source.
        boxes: CSV with columns file, x, y, w, h; None: `boxes.csv` in `root` or beside it, if there is one.
        report_section: for CheXpert Plus, the report section whose CheXbert labels count: "impression", "report" or
            "findings" (of which users report `No Finding` = 1 wherever the section is empty).
        check_files: look whether every image exists.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes if there are any.

    Raises:
        FileNotFoundError: no CSV, or an image of it (its line and path are named).
        ValueError: a missing column, an unknown class or option.
    """
    csv = find_csv(root, split)
    table = read_table(csv, split, report_section)
    names = [_column_of(name) for name in classes]
    missing_columns([NO_FINDING, *names], table.columns, csv)
    table["label"] = label_rows(table, names, other, uncertain)
    table = table[table["label"] >= 0]
    if frontal_only:
        table = table[table["frontal"]]
    if views is not None:
        table = table[table["view"].isin(_checked_views(views))]
    table = select_rows(
        table,
        per_class=per_class,
        seed=seed,
        one_per_patient=one_per_patient,
        holdout=holdout,
        part=part,
        holdout_seed=holdout_seed,
    )
    files = locate_images(csv, table, check_files)
    known_boxes = read_boxes(csv, boxes)
    rows = [
        {"image": file, "label": row.label, "patient": row.patient, "view": row.view, "path": str(file)}
        | ({"boxes": known_boxes.get(row.key, [])} if known_boxes else {})
        for file, row in zip(files, table.itertuples(), strict=True)
    ]
    return to_dataset(rows, ["healthy", *(name.lower() for name in names), *(["other finding"] if other else [])])


def label_rows(table, classes, other=False, uncertain="ignore"):
    """Table with CheXpert's label columns -> (N,) class ids, -1 for rows that belong to no class."""
    if uncertain not in ("ignore", "positive", "negative"):
        raise ValueError(f"expected `uncertain` ignore, positive or negative, got {uncertain!r}")
    found = [name for name in FINDINGS if name in table.columns]
    positive = (table[found] == 1) | ((table[found] == -1) & (uncertain == "positive"))
    label = np.full(len(table), -1)
    if other:
        devices = table.get("Support Devices", pd.Series(0.0, index=table.index)) == 1
        # not healthy, and no column says why: the finding has none (emphysema, fibrosis, hernia)
        unnamed = ~positive.any(axis=1) & ~(table[found] == -1).any(axis=1) & ~devices
        label[positive.any(axis=1) | unnamed] = len(classes) + 1
    label[table[NO_FINDING] == 1] = 0
    for i, name in reversed(list(enumerate(classes, start=1))):
        label[positive[name]] = i
    if uncertain == "ignore":
        label[(table[classes] == -1).any(axis=1) & ~positive[classes].any(axis=1)] = -1
    return label


def find_csv(root, split="train"):
    """The CSV of a split in `root`, or in one folder below it."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of CheXpert, got {root}")
    patterns = [f"{split}.csv", f"*/{split}.csv", "df_chexpert_plus*.csv", "*/df_chexpert_plus*.csv"]
    found = next((hits for pattern in patterns if (hits := sorted(root.glob(pattern)))), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{root} holds several data sets: give one of {', '.join(str(csv.parent) for csv in found)}")
    tables = sorted(path.name for path in root.glob("*.csv"))
    raise FileNotFoundError(f"expected {split}.csv in {root} or one folder below, found {tables or 'no CSV'}")


def is_plus(csv):
    """Whether a CSV is CheXpert Plus's."""
    return Path(csv).name.startswith("df_chexpert_plus")


def read_table(csv, split="train", report_section="impression"):
    """CSV -> table: the label columns, and Path, key, frontal, view, patient, line.

    `key` names an image whatever the data set's folder or file type is called: train/patient00001/study1/view1_frontal.
    """
    if is_plus(csv):
        table = _read_plus(csv, split, report_section)
    else:
        table = pd.read_csv(csv)
        missing_columns(["Path"], table.columns, csv)
        table["line"] = table.index + 2
    parts = table["Path"].map(parts_from_split)
    table["key"] = parts.map(lambda p: str(PurePosixPath(*p).with_suffix("")))
    if "patient" not in table:
        table["patient"] = table["key"].map(_patient_of)
    if "Frontal/Lateral" in table:
        table["frontal"] = table["Frontal/Lateral"].astype(str).str.lower().str.startswith("frontal")
    else:
        table["frontal"] = ~table["key"].str.contains("lateral", case=False)
    view = table["AP/PA"].astype(str).str.upper() if "AP/PA" in table else pd.Series("", index=table.index)
    table["view"] = view.where(view.isin(["AP", "PA"]), "")
    return table


def locate_images(csv, table, check_files=True, missing_ok=False):
    """Path of every row's image, whatever the data set's folder is called now; FileNotFoundError names the row.

    With `missing_ok`, None for an image that is not there.
    """
    layouts = _layouts(Path(csv).parent)
    files, layout = [], None
    bar = tqdm(table.itertuples(), total=len(table), desc="checking images", unit="file", leave=False, delay=2)
    for row in bar:
        if layout and not check_files:
            files.append(_place(layout, row.Path))
            continue
        # the layout of the row before is almost always this row's as well
        hit = next((c for c in [layout, *layouts] if c and _place(c, row.Path).is_file()), None)
        if hit is None and not missing_ok:
            tried = _place(layout or layouts[0], row.Path)
            raise FileNotFoundError(
                f"{csv}, line {row.line}: no image {row.Path} (looked for {tried} and {len(layouts) - 1} more)"
            )
        files.append(_place(hit, row.Path) if hit else None)
        layout = hit or layout
    return files


def read_boxes(csv, boxes=None):
    """Boxes CSV (columns file, x, y, w, h) -> {key: [[x, y, w, h]]}; {} where there is none."""
    if boxes is None:
        around = [Path(csv).parent / "boxes.csv", Path(csv).parent.parent / "boxes.csv"]
        boxes = next((path for path in around if path.is_file()), None)
    if boxes is None:
        return {}
    table = pd.read_csv(boxes)
    missing_columns(["file", "x", "y", "w", "h"], table.columns, boxes)
    known = {}
    for row in table.itertuples():
        key = str(PurePosixPath(*parts_from_split(row.file)).with_suffix(""))
        known.setdefault(key, []).append([row.x, row.y, row.w, row.h])
    return known


def _column_of(name):
    known = {finding.lower(): finding for finding in FINDINGS}
    if str(name).lower() not in known:
        raise ValueError(f"unknown class {name!r}, expected some of {', '.join(FINDINGS)}")
    return known[name.lower()]


def _checked_views(views):
    wrong = [view for view in views if view not in ("AP", "PA", "")] if not isinstance(views, str) else [views]
    if wrong:
        raise ValueError(f"expected `views` a list of 'AP', 'PA' and '' (unknown), got {views!r}")
    return list(views)


def parts_from_split(path):
    """Components of a CSV path from its split on: the data set's own name, whatever it is, is dropped."""
    parts = PurePosixPath(str(path).replace("\\", "/")).parts
    return parts if parts[0] in SPLITS or len(parts) == 1 else parts[1:]


def _patient_of(key):
    match = re.search(r"patient\d+", key)
    return match.group() if match else PurePosixPath(key).name


def _layouts(root):
    """(folder, leading components dropped, suffix or None): where images can lie, likeliest first."""
    places = [(root, 1), (root, 0), (root.parent, 0), (root / "PNG", 0), (root / "PNG" / "PNG", 0)]
    # the full-size download: "CheXpert-v1.0 batch 2 (train 1)/patient00001/...", without train/
    places += [(folder, drop) for folder in sorted(root.parent.glob("*batch*")) for drop in (1, 2)]
    # CheXpert Plus writes .jpg where its files are .png
    return [(folder, drop, suffix) for suffix in (None, ".png") for folder, drop in places]


def _place(layout, path):
    folder, drop, suffix = layout
    file = folder.joinpath(*PurePosixPath(str(path).replace("\\", "/")).parts[drop:])
    return file.with_suffix(suffix) if suffix else file


def _read_plus(csv, split, report_section):
    """CheXpert Plus: the images' table joined with the labels that CheXbert read from one section of the reports."""
    table = pd.read_csv(csv, usecols=lambda name: name in (*PLUS_COLUMNS, "split"))
    missing_columns([*PLUS_COLUMNS, "split"], table.columns, csv)
    table = table.rename(columns=PLUS_COLUMNS)
    table["line"] = table.index + 2
    places = [Path(csv).parent / "chexbert_labels", Path(csv).parent]
    labels = next((p for place in places if (p := place / f"{report_section}_fixed.json").is_file()), None)
    if labels is None:
        raise FileNotFoundError(f"expected CheXpert Plus's labels as {places[0] / report_section}_fixed.json")
    with open(labels) as lines:
        labels = pd.DataFrame([json.loads(line) for line in lines if line.strip()]).rename(columns=PLUS_COLUMNS)
    numbers = [name for name in labels.columns if name != "Path"]
    labels[numbers] = labels[numbers].astype(float)
    table = table[table["split"] == split].merge(labels.drop_duplicates("Path"), on="Path", how="left")
    return table
