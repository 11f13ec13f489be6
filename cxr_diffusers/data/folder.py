"""Image files that are not a named data set: a folder per class, or a CSV with a column of paths."""

import re
from pathlib import Path

import pandas as pd

from .images import dicom_header, is_dicom, list_images
from .rows import missing_columns, parse_boxes, read_mask, to_dataset

MASK_ENDING = "_mask"
MASK_FOLDER = "masks"
UNLABELLED = -1


def load_folder(root, *, classes=("healthy", "diseased"), patient_pattern=None):
    """A folder of images (png, jpg, bmp, tif, npy, DICOM) -> data set.

    Label: the folder between `root` and the file (or `root` itself) that is called as a class; case does not matter. A
    folder without any such name is unlabelled: label -1, which `datasets.ClassLabel` reads as "missing".
    Mask: NAME_mask.* beside the image, or masks/ with the same tree below `root`; anything above 0 is inside.
    Boxes: NAME.txt beside the image ("x y w h" a line, in pixels), or boxes.csv in `root` (file, x, y, w, h).
    Patient: DICOM's PatientID; else the first group of `patient_pattern`, searched in the path below `root`; else the
    first folder below the class (or below `root`); else the file's own name, that is, every file is its own patient.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes and mask if there are any.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: no image, a file outside the class folders, several splits at once, a mask of another size.
    """
    root = Path(root)
    images, masks = _images_and_masks(root)
    if not images:
        raise ValueError(f"no image below {root}")
    labels = [_label_of(path, root, classes) for path in images]
    if max(labels) >= 0:
        _check_labels(root, images, labels, classes)
    boxes = _boxes_of(root, images)
    rows = []
    for path, label in zip(images, labels, strict=True):
        patient, view = dicom_header(path) if is_dicom(path) else ("", "")
        mask = masks.get(path)
        rows.append(
            {
                "image": path,
                "label": label,
                "patient": patient or _patient_of(path, root, classes, patient_pattern),
                "view": view,
                "path": str(path),
                "boxes": boxes.get(path, []) if boxes else None,
                "mask": read_mask(mask, path) if mask else None,
            }
        )
    return to_dataset(rows, classes)


def load_table(
    csv,
    *,
    image="file",
    label="label",
    classes=("healthy", "diseased"),
    mask=None,
    patient=None,
    view=None,
    boxes=None,
    keep=(),
    where=None,
    root=None,
):
    """A CSV with a column of image paths -> data set.

    Args:
        image, mask, patient, view, boxes: names of columns; all but `image` may be None. Boxes are "x,y,w,h", several
            separated by ";". Without a patient column every file is its own patient.
        label: name of a column of class names or ids, or the one class that all rows have.
        keep: names of further columns to keep, as text, to report by (`evaluate`'s strata).
        where: {column: value}: only the rows that have it, e.g. {"split": "train"}.
        root: what the paths are relative to, the CSV's own too if it is not found as it stands; None: the CSV's folder.

    Raises:
        FileNotFoundError: the CSV, or a file that it names (with its line).
        ValueError: a missing column, an unknown class, a mask of another size.
    """
    csv = Path(csv)
    if root and not csv.is_file():
        csv = Path(root) / csv
    if not csv.is_file():
        raise FileNotFoundError(f"no such CSV: {csv}")
    root = Path(root) if root else csv.parent
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    where = where or {}
    missing_columns([name for name in (image, mask, patient, view, boxes, *keep, *where) if name], table.columns, csv)
    if label not in table.columns and label not in classes:
        raise ValueError(
            f"{csv}: `label` {label!r} is neither a column ({', '.join(table.columns)}) nor one of {classes}"
        )
    for name, value in where.items():
        table = table[table[name] == str(value)]
    rows = []
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        place = f"{csv}, line {index + 2}"
        file = _existing(root / row[image], place)
        own_view = row[view].upper() if view else ""
        rows.append(
            {
                "image": file,
                "label": _class_id(row.get(label, label), classes, place),
                "patient": row[patient] if patient else file.stem,
                "view": own_view if own_view in ("PA", "AP") else "",
                "path": str(file),
                "boxes": parse_boxes(row[boxes], place) if boxes else None,
                "mask": read_mask(_existing(root / row[mask], place), file) if mask and row[mask] else None,
            }
        )
    dataset = to_dataset(rows, classes)
    for name in keep:
        dataset = dataset.add_column(name, table[name].tolist())
    return dataset


def _images_and_masks(root):
    """(images, {image: its mask}); a mask without its image is an image of its own."""
    files = list_images(root)
    tree = root / MASK_FOLDER
    in_tree = {f.relative_to(tree).with_suffix("").as_posix(): f for f in files if tree in f.parents}
    beside = {f.with_suffix(""): f for f in files if f.stem.endswith(MASK_ENDING)}
    images, masks = [], {}
    for file in files:
        if tree in file.parents:
            continue
        name = file.with_suffix("") if file.suffix else file
        mask = beside.get(name.with_name(name.name + MASK_ENDING)) or in_tree.get(name.relative_to(root).as_posix())
        if mask:
            masks[file] = mask
        images.append(file)
    used = set(masks.values())
    return [file for file in images if file not in used], masks


def _label_of(path, root, classes):
    names = [name.lower() for name in classes]
    folders = [root.resolve().name, *path.relative_to(root).parts[:-1]]
    return next((names.index(folder.lower()) for folder in reversed(folders) if folder.lower() in names), UNLABELLED)


def _check_labels(root, images, labels, classes):
    outside = next((i for i, label in zip(images, labels, strict=True) if label == UNLABELLED), None)
    if outside:
        raise ValueError(f"expected every image of {root} in a folder called {' or '.join(classes)}, got {outside}")
    splits = {path.relative_to(root).parts[0].lower() for path in images}
    splits &= {"train", "training", "test", "testing", "val", "valid", "validation"}
    if len(splits) > 1:
        raise ValueError(f"{root} holds {', '.join(sorted(splits))}: give one of these folders, they must not be mixed")


def _patient_of(path, root, classes, pattern):
    relative = path.relative_to(root)
    if pattern:
        match = re.search(pattern, relative.as_posix())
        if not match or not match.groups():
            raise ValueError(f"`patient_pattern` {pattern!r} finds no group in {relative.as_posix()}")
        return match.group(1)
    names = [name.lower() for name in classes]
    folders = list(relative.parts[:-1])
    for i, folder in enumerate(folders):
        if folder.lower() in names:
            folders = folders[i + 1 :]
            break
    return folders[0] if folders else path.stem


def _boxes_of(root, images):
    """{image: boxes} of boxes.csv and of the .txt files beside the images; {} if there are none at all."""
    boxes = {}
    if (root / "boxes.csv").is_file():
        table = pd.read_csv(root / "boxes.csv")
        missing_columns(["file", "x", "y", "w", "h"], table.columns, root / "boxes.csv")
        for row in table.itertuples():
            boxes.setdefault(root / row.file, []).append([row.x, row.y, row.w, row.h])
    for image in images:
        text = image.with_suffix(".txt")
        if text.is_file():
            boxes[image] = parse_boxes(text.read_text(), text)
    return boxes


def _existing(path, where):
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no file {path}")
    return path


def _class_id(value, classes, where):
    names = [name.lower() for name in classes]
    if str(value).lower() in names:
        return names.index(str(value).lower())
    if str(value) in map(str, range(len(classes))):
        return int(value)
    raise ValueError(f"{where}: expected a label of {', '.join(classes)} (or 0..{len(classes) - 1}), got {value!r}")
