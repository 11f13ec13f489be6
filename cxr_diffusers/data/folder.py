"""Image files that are not a named data set: a folder per class, or a CSV with a column of paths."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from .boxes import image_size, parse_boxes, read_boxes, to_pixels
from .dicom import patient_and_view
from .images import list_images, without_suffix
from .rows import read_mask, to_dataset
from .tables import brief, existing_file, is_file, missing_columns, path_of, read_csv

MASK_ENDING = "_mask"
MASK_FOLDER = "masks"
UNLABELLED = -1


def load_folder(
    root: Path | str, *, classes: Sequence[str] = ("healthy", "diseased"), patient_pattern: str | None = None
) -> Dataset:
    """A folder of images (png, jpg, bmp, tif, npy, DICOM) -> data set.

    Label: the class whose name a folder between `root` and the file (or `root` itself) has; case does not matter.
    Without class folders all images are unlabelled: label -1, which `datasets.ClassLabel` reads as "missing".
    Mask: NAME_mask.* beside the image, or NAME.* or NAME_mask.* in a folder masks/ with the same subfolders as `root`;
    values above 0 are inside (of a JPEG, above half its maximum).
    Boxes: NAME.txt beside the image (one box "x y w h" in each line, in pixels), or boxes.csv in `root` (columns file,
    x, y, w, h, and image_w, image_h if the boxes are in pixels of an image of another size).
    Patient: DICOM's PatientID; else the first group of `patient_pattern`, searched in the path below `root`; else the
    first folder below the class (or below `root`); else the path below `root`, so that each file is its own patient.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, and boxes and mask if there are any.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: no image, a file outside the class folders, several splits at once, a mask of another size, or a
            mask or box that belongs to no image or reaches beyond it.
    """
    root = Path(root)
    images, masks = images_and_masks(root, list_images(root))
    if not images:
        raise ValueError(f"no image below {root}")
    labels = [_label_of(path, root, classes) for path in images]
    if max(labels) >= 0:
        _check_labels(root, images, labels, classes)
    boxes = box_rows(root, images)
    rows = []
    for path, label in zip(images, labels, strict=True):
        patient, view = patient_and_view(path)
        mask = masks.get(path)
        rows.append(
            {
                "image": path,
                "label": label,
                "patient": patient or _patient_of(path, root, classes, patient_pattern),
                "view": view,
                "path": str(path),
                "boxes": _pixels(boxes.get(path, []), path) if boxes else None,
                "mask": read_mask(mask, path) if mask else None,
            }
        )
    return to_dataset(rows, classes)


def load_table(
    csv: Path | str,
    *,
    image: str = "file",
    label: str = "label",
    classes: Sequence[str] = ("healthy", "diseased"),
    mask: str | None = None,
    patient: str | None = None,
    view: str | None = None,
    boxes: str | None = None,
    keep: Sequence[str] = (),
    where: Mapping[str, object] | None = None,
    root: Path | str | None = None,
) -> Dataset:
    """A CSV with a column of image paths -> data set.

    Args:
        image, mask, patient, view, boxes: names of columns; all but `image` may be None. Boxes are "x,y,w,h", several
            separated by ";". Without a patient column, or where it is blank, every file is its own patient.
        label: name of a column of class names or ids; or one class, for all rows.
        keep: names of further columns to keep, as text, for example for `evaluate`'s strata.
        where: {column: value, or list of values}: only the rows with these, e.g. {"split": "train"}.
        root: the folder that the paths are relative to, also `csv` itself if no such file exists; None: the CSV's.

    Raises:
        FileNotFoundError: the CSV, or a file that it names (with its line).
        ValueError: a missing column, an unknown class, a mask of another size, an invalid box, a second row of an
            image, or a path with "..".
    """
    csv = Path(csv)
    if root and not csv.is_file():
        csv = Path(root) / csv
    if not csv.is_file():
        raise FileNotFoundError(f"no such CSV: {csv}")
    root = Path(root) if root else csv.parent
    table = read_csv(csv)
    where = where or {}
    missing_columns([name for name in (image, mask, patient, view, boxes, *keep, *where) if name], table.columns, csv)
    if label not in table.columns and label not in classes:
        raise ValueError(
            f"{csv}: `label` {label!r} is neither a column ({', '.join(table.columns)}) nor one of {classes}"
        )
    for name, value in where.items():
        values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
        table = table[table[name].isin([str(each) for each in values])]
    rows: list[dict] = []
    lines: dict[Path, int] = {}
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        place = f"{csv}, line {index}"
        file = existing_file(root, row[image], place)
        if lines.setdefault(file, index) != index:
            raise ValueError(f"{place}: expected one row an image, got {brief(row[image])} in line {lines[file]}, too")
        own_view = row[view].strip().upper() if view else ""
        rows.append(
            {
                "image": file,
                "label": _class_id(row.get(label, label), classes, place),
                "patient": (row[patient].strip() if patient else "") or identity(file, root),
                "view": own_view if own_view in ("PA", "AP") else "",
                "path": str(file),
                "boxes": _pixels([(place, b, None) for b in parse_boxes(row[boxes], place)], file) if boxes else None,
                "mask": read_mask(existing_file(root, row[mask], place), file) if mask and row[mask].strip() else None,
            }
        )
    dataset = to_dataset(rows, classes)
    for name in keep:
        dataset = dataset.add_column(name, table[name].tolist())
    return dataset


def identity(file: Path, root: Path) -> str:
    """The path of a file below `root`, without suffix: the patient of an image whose patient is unknown."""
    relative = file.relative_to(root) if root in file.parents else file
    return without_suffix(relative).as_posix()


def images_and_masks(root: Path, files: Iterable[Path]) -> tuple[list[Path], dict[Path, Path]]:
    """(images, {image: its mask}) among the files below `root`.

    Raises:
        ValueError: a mask that belongs to no image, or two masks of one image.
    """
    tree = root / MASK_FOLDER
    images: dict[str, list[Path]] = {}
    claims: list[tuple[Path, list[str]]] = []  # masks, each with the possible names of its image
    for file in files:
        if tree in file.parents:
            name = identity(file, tree)
            claims.append((file, [name, name.removesuffix(MASK_ENDING)]))
        elif (name := identity(file, root)).endswith(MASK_ENDING):
            claims.append((file, [name.removesuffix(MASK_ENDING)]))
        else:
            images.setdefault(name, []).append(file)
    masks: dict[Path, Path] = {}
    for file, names in claims:
        match = next((name for name in names if name in images), None)
        if match is None:
            raise ValueError(f"{file}: a mask that belongs to no image below {root}")
        for image in images[match]:
            if image in masks:
                raise ValueError(f"{image} has two masks, {masks[image]} and {file}")
            masks[image] = file
    return sorted(image for same in images.values() for image in same), masks


def _label_of(path, root, classes):
    names = [name.lower() for name in classes]
    folders = [root.resolve().name, *path.relative_to(root).parts[:-1]]
    return next((names.index(folder.lower()) for folder in reversed(folders) if folder.lower() in names), UNLABELLED)


def _check_labels(root, images, labels, classes):
    outside = next((i for i, label in zip(images, labels, strict=True) if label == UNLABELLED), None)
    if outside:
        raise ValueError(f"expected every image of {root} in a folder {' or '.join(classes)}, got {outside}")
    splits = {path.relative_to(root).parts[0].lower() for path in images}
    splits &= {"train", "training", "test", "testing", "val", "valid", "validation"}
    if len(splits) > 1:
        raise ValueError(f"{root} holds {', '.join(sorted(splits))}: give one of these folders, they must not be mixed")


def _patient_of(path, root, classes, pattern):
    relative = path.relative_to(root)
    if pattern:
        return group_of(pattern, relative.as_posix())
    names = [name.lower() for name in classes]
    folders = list(relative.parts[:-1])
    for i, folder in enumerate(folders):
        if folder.lower() in names:
            folders = folders[i + 1 :]
            break
    return folders[0] if folders else identity(path, root)


def group_of(pattern: str, text: str) -> str:
    """The first group of a `patient_pattern` in a text; ValueError without a match, or for an invalid pattern."""
    try:
        match = re.search(pattern, text)
    except re.error as error:
        raise ValueError(f"expected `patient_pattern` a regular expression, got {pattern!r}: {error}") from None
    if not match or not match.groups() or match.group(1) is None:
        raise ValueError(f"`patient_pattern` {pattern!r} matches no group in {text}")
    return match.group(1)


def box_rows(root: Path, images: Sequence[Path]) -> dict[Path, list[tuple]]:
    """{image: [(place, box, unit)]} of boxes.csv and of the .txt files beside the images; {} without any box.

    `place` is the file (and line) of a box, for error messages; `unit` as `to_pixels` takes it.

    Raises:
        ValueError: a row or file with invalid boxes, or with boxes that belong to no image.
    """
    boxes: dict[Path, list[tuple]] = {}
    members = set(images)
    if (root / "boxes.csv").is_file():
        for where, file, box, unit in read_boxes(root / "boxes.csv"):
            image = root / path_of(file, where, absolute=True)
            if image not in members:
                raise ValueError(f"{where}: a box of {brief(file)}, which is no image below {root}")
            boxes.setdefault(image, []).append((where, box, unit))
    texts = {text_of(image): image for image in images}
    for text in sorted({text for folder in {i.parent for i in images} for text in folder.glob("*.txt")} - set(texts)):
        if _holds_boxes(text):
            raise ValueError(f"{text}: boxes that belong to no image")
    for text, image in texts.items():
        if is_file(text):
            content = text.read_text(errors="surrogateescape")
            boxes[image] = [(text, box, None) for box in parse_boxes(content, text)]
    return boxes


def text_of(image: Path) -> Path:
    """NAME.txt beside an image, the file of its boxes if it exists."""
    return image.with_name(f"{without_suffix(image).name}.txt")


def _pixels(rows, image):
    try:
        size = image_size(image) if rows else None
    except (ValueError, OSError):  # raised again when its row is used
        return []
    return [to_pixels(box, unit, size, image, where) for where, box, unit in rows]


def _holds_boxes(text):
    try:
        return bool(parse_boxes(text.read_text(), text))
    except (ValueError, OSError):
        return False


def _class_id(value, classes, where):
    names = [name.lower() for name in classes]
    if str(value).lower() in names:
        return names.index(str(value).lower())
    if str(value) in map(str, range(len(classes))):
        return int(value)
    raise ValueError(
        f"{where}: expected a label of {', '.join(classes)} (or 0..{len(classes) - 1}), got {brief(value)}"
    )
