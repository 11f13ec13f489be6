"""VinDr-CXR, as downloaded: 18,000 DICOM files, train labelled by three readers each, test by their consensus."""

from pathlib import Path

import pandas as pd

from .boxes import PREPARED, check_box, image_size, to_pixels, units_of
from .dicom import is_dicom
from .images import SUFFIXES
from .rows import to_dataset
from .selection import select_rows
from .tables import brief, check_encodable, missing_columns, numbers, path_of, read_csv

NO_FINDING = "No finding"
SPLITS = ("train", "test")
READERS = ("rad_id", "rad_ID")  # the boxes' table writes it one way, the labels' the other
CORNERS = ("x_min", "y_min", "x_max", "y_max")


def load_vindr(
    root,
    *,
    splits=("train",),
    classes=None,
    other=False,
    votes=2,
    boxes=False,
    per_class=None,
    seed=0,
    holdout=0.0,
    part="train",
    holdout_seed=0,
):
    """VinDr-CXR -> data set: without labels, as a prior wants it, or 0 healthy, 1.. `classes`, last "other finding".

    A reader's finding counts where `votes` readers of an image agree (2 of 3); where there is one row an image, as in
    the test split's consensus, that row decides.

    Args:
        root: the downloaded folder: train/ and test/ with IMAGE_ID.dicom, annotations/image_labels_SPLIT.csv and
            annotations/annotations_SPLIT.csv (Kaggle's train.csv in `root` serves for both). Or a copy by `prepare`.
        splits: which to read; both are merged for a prior.
        classes: names of findings, case does not matter, the first named wins; None: no labels, and no CSV is read.
        other: whether images with another finding only are kept as a class of their own.
        votes: readers who must agree.
        boxes: whether to give the readers' boxes of the named findings (of all, without `classes`) that were voted for,
            every reader's, in pixels of the image. For a copy of another size than the DICOM originals, the boxes'
            table must have columns width and height, the size that its boxes count in; one by `prepare` has.
        per_class, seed, holdout, part, holdout_seed: see `selection.select_rows`. Nothing tells which images are of one
            patient, so each image is its own.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view (unknown), path, and boxes if asked for.

    Raises:
        FileNotFoundError: no folder of a split, or no CSV where one is needed. ValueError: an unknown split or class,
            an image without labels, or a box that is none, belongs to no image or reaches beyond it.
    """
    root = Path(root)
    wrong = [split for split in splits if split not in SPLITS]
    if wrong or not splits or isinstance(splits, str):
        raise ValueError(f"expected `splits` a list of {' and '.join(SPLITS)}, got {splits!r}")
    tables = [_read_split(root, split, classes, other, votes, boxes) for split in splits]
    table = pd.concat(tables, ignore_index=True)
    table = table[table["label"] >= 0]
    table = select_rows(table, per_class=per_class, seed=seed, holdout=holdout, part=part, holdout_seed=holdout_seed)
    names = ["radiograph"] if classes is None else ["healthy", *(name.lower() for name in classes)]
    rows = [
        {"image": r["file"], "label": r["label"], "patient": r["key"], "path": str(r["file"])}
        | ({"boxes": _pixels(root, r["file"], r["boxes"])} if boxes else {})
        for r in table.to_dict("records")
    ]
    return to_dataset(rows, [*names, *(["other finding"] if other and classes is not None else [])])


def _read_split(root, split, classes, other, votes, boxes):
    files = index_images(root, split)
    if classes is None:
        label = dict.fromkeys(files, 0)
    else:
        voted = vote(read_labels(root, split), votes)
        label = label_images(voted, classes, other)
        missing = sorted(files.keys() - label.keys())
        if missing:
            raise ValueError(f"{root}: no labels of {split} image {missing[0]} and {len(missing) - 1} more")
    rows_of_boxes = read_boxes(root, split, files, votes, classes) if boxes else {}
    rows = [
        {"file": file, "key": key, "patient": key, "label": label[key], "boxes": rows_of_boxes.get(key, [])}
        for key, file in files.items()
    ]
    return pd.DataFrame(rows, columns=["file", "key", "patient", "label", "boxes"])


def index_images(root, split):
    """{image id: path} of a split's folder; FileNotFoundError without it, or with no image in it."""
    folder = Path(root) / split
    files = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in files:
                raise ValueError(f"{files[path.stem]} and {path} are the same image {path.stem}: remove one")
            files[path.stem] = path
    check_encodable(files, folder)
    if not files:
        raise FileNotFoundError(f"expected VinDr-CXR's images as {folder}/IMAGE_ID.dicom")
    return files


def find_table(root, split, kind):
    """annotations/{kind}_{split}.csv of `root`, or Kaggle's train.csv; FileNotFoundError."""
    places = [Path(root) / "annotations" / f"{kind}_{split}.csv", Path(root) / f"{kind}_{split}.csv"]
    places += [Path(root) / "train.csv"] if split == "train" else []
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"expected VinDr-CXR's table {places[0]}")
    return found


def read_labels(root, split):
    """(image_id, reader) x finding -> 0 / 1; findings as the table's columns call them."""
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


def read_table(csv):
    """One of VinDr-CXR's tables, its index the line of each row; ValueError where an image's id is no file's name."""
    table = read_csv(csv, ["image_id"])
    for line, key in table["image_id"].items():
        if len(path_of(key, f"{csv}, line {line}").parts) > 1:
            raise ValueError(f"{csv}, line {line}: expected the name of an image, got the path {brief(key)}")
    return table


def vote(labels, votes=2):
    """(image_id, reader) x finding -> image_id x finding, booleans: at least `votes` readers, or all of fewer."""
    count = labels.groupby("image_id").sum()
    readers = labels.groupby("image_id").size().clip(upper=votes)
    return count.ge(readers, axis=0)


def label_images(voted, classes, other=False):
    """image_id x finding, booleans -> {image id: class id, -1 for none}."""
    known = {name.lower(): name for name in voted.columns}
    unknown = [name for name in classes if str(name).lower() not in known or str(name).lower() == NO_FINDING.lower()]
    if unknown:
        raise ValueError(f"unknown class {unknown[0]!r}, expected some of {', '.join(voted.columns)}")
    label = pd.Series(-1, index=voted.index)
    if other:
        label[voted.drop(columns=NO_FINDING).any(axis=1)] = len(classes) + 1
    label[voted[NO_FINDING]] = 0
    for i, name in reversed(list(enumerate(classes, start=1))):
        label[voted[known[str(name).lower()]]] = i
    return label.to_dict()


def read_boxes(root, split, images, votes=2, classes=None):
    """annotations_SPLIT.csv -> {image id: [(where, [x, y, w, h], unit)]} of the findings that were voted for.

    `unit` is (width, height) that a box counts in, where the table says so, else None.

    Args:
        images: ids of the images that there are.

    Raises:
        ValueError: a row whose box is none, or whose image is neither among `images` nor in the labels' table.
    """
    csv = find_table(root, split, "annotations")
    table = read_table(csv)
    missing_columns(["class_name", *CORNERS], table.columns, csv)
    reader = next((name for name in READERS if name in table), None)
    readers = table.groupby("image_id")[reader].nunique() if reader else pd.Series(1, index=table["image_id"].unique())
    table["row"] = list(zip(rows_of(table, csv), units_of(table, csv), strict=True))
    check_images(table, csv, root, split, images)
    table = table[table["row"].map(lambda row: row[0] is not None).astype(bool)]
    if classes is not None:
        table = table[table["class_name"].str.lower().isin([str(name).lower() for name in classes])]
    boxes = {}
    for (image, _), rows in table.groupby(["image_id", "class_name"], sort=False):
        if (rows[reader].nunique() if reader else 1) >= min(votes, readers[image]):
            boxes.setdefault(image, []).extend((f"{csv}, line {line}", *row) for line, row in rows["row"].items())
    return boxes


def check_images(table, csv, root, split, images):
    """ValueError naming the first row of boxes whose image is neither among `images` nor in the labels' table."""
    strangers = set(table["image_id"]) - set(images)
    if strangers:
        try:
            strangers -= set(read_table(find_table(root, split, "image_labels"))["image_id"])
        except FileNotFoundError:
            pass
    line = next((line for line, key in table["image_id"].items() if key in strangers), None)
    if line is not None:
        key = brief(table.at[line, "image_id"])
        raise ValueError(f"{csv}, line {line}: a box of {key}, which is no image of {split}")


def rows_of(table, csv):
    """[[x, y, w, h]] of a table of corners, None for a row without; ValueError naming a row whose box is none."""
    corners = pd.DataFrame({name: numbers(table, name, csv) for name in CORNERS})
    boxes = []
    for line, (x0, y0, x1, y1) in zip(table.index, corners.to_numpy(), strict=True):
        if pd.isna([x0, y0, x1, y1]).all() and all(not str(table.at[line, name]).strip() for name in CORNERS):
            boxes.append(None)
        else:
            boxes.append(check_box([x0, y0, x1 - x0, y1 - y0], f"{csv}, line {line}"))
    return boxes


def check_unit(root, image, unit, where):
    """ValueError where nothing says which pixels a box counts in: a copy of a DICOM original, of unknown scale."""
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
