"""ChestX-Det, as downloaded: NIH radiographs with boxes and outlines of 13 findings, drawn by three radiologists."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import PIL.ImageDraw

from .boxes import check_box, image_size, to_pixels
from .findings import check_other, class_id, class_names, match_names
from .image_files import files_to_dataset, index_files, select_files
from .rows import png_cell
from .selection import Selection
from .tables import brief, path_of

FINDINGS = (
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "Diffuse Nodule",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Fracture",
    "Mass",
    "Nodule",
    "Pleural Thickening",
    "Pneumothorax",
)
ALIASES = {"pleural effusion": "Effusion"}
SPLITS = ("train", "test")
SIDE = 1024  # of every image of the download, in pixels; coordinates count in them
ABNORMAL = "abnormal"


def load_chestx_det(
    root: Path | str,
    *,
    split: str = "train",
    classes: Sequence[str] | None = None,
    other: bool = False,
    skip_missing: bool = False,
    **selection: Unpack[Selection],
) -> datasets.Dataset:
    """ChestX-Det -> data set with labels 0 healthy, 1.. `classes`, with boxes, and masks of the outlines.

    Healthy is an image in which none of the 13 findings is marked. An image with several of the named findings belongs
    to the first named.

    Args:
        root: the folder with ChestX_Det_train.json and ChestX_Det_test.json; the images lie in train_data/ and
            test_data/ (the unpacked archives), train/ and test/, or images/.
        split: "train" (3,025 images) or "test" (553).
        classes: names of findings, in any case; None: one class "abnormal", which has any of them.
        other: with `classes`, keep images with other findings only as a class of their own, without boxes and masks.
        skip_missing: leave images out that are not there; a warning counts them.
        selection: `per_class`, `holdout` and the other keywords of `selection.select_rows`. The patients are not
            published: each image counts as a patient.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view (unknown), path, boxes, mask: those of the named
        findings, in pixels of the image.

    Raises:
        FileNotFoundError: no JSON, or an image of it (its entry and path are named).
        ValueError: an unknown split or class, `other` without `classes`, or an entry that is not as documented.

    Source: Lian et al., IEEE Transactions on Medical Imaging 40 (2021) 2042, arXiv 2104.10326.
    """
    root = Path(root)
    check_other(other, classes)
    if split not in SPLITS:
        raise ValueError(f"expected `split` {' or '.join(SPLITS)}, got {split!r}")
    json_file = root / f"ChestX_Det_{split}.json"
    entries = read_entries(json_file)
    names = list(FINDINGS) if classes is None else match_names(classes, FINDINGS, ALIASES)
    table = pd.DataFrame({"where": list(entries), "key": [entry["file_name"] for entry in entries.values()]})
    table["patient"] = [Path(name).stem for name in table["key"]]
    labels = [class_id(entry["syms"], names, healthy=not entry["syms"], other=other) for entry in entries.values()]
    table["label"] = [min(label, 1) for label in labels] if classes is None else labels
    folders = [f"{split}_data", split, "images", "."]
    folder = next((root / name for name in folders if (root / name).is_dir()), root)
    index = index_files(folder)
    table = select_files(
        table[table["label"] >= 0],
        lambda row: [index.get(row.patient, folder / row.key)],
        skip_missing,
        **selection,
    )
    rows = [
        {"image": row["file"], "label": row["label"], "patient": row["patient"], "path": str(row["file"])}
        | regions_of(entries[row["where"]], names, row["file"], row["where"])
        for row in table.to_dict("records")
    ]
    names_or_any = [ABNORMAL] if classes is None else list(classes)
    return files_to_dataset(rows, class_names(names_or_any, other))


def read_entries(path: Path) -> dict[str, dict[str, Any]]:
    """The JSON of a split -> {place of an entry, for messages: {file_name, syms, boxes [x, y, w, h], polygons}}.

    Raises:
        FileNotFoundError, ValueError: as `load_chestx_det`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected ChestX-Det's annotations {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected ChestX-Det's annotations, a list of objects")
    entries, seen = {}, set()
    for number, entry in enumerate(content, start=1):
        where = f"{path}, entry {number}"
        entries[where] = check_entry(entry, where)
        if entries[where]["file_name"] in seen:
            raise ValueError(f"{where}: expected one entry an image, got a second one of {brief(entry['file_name'])}")
        seen.add(entries[where]["file_name"])
    return entries


def check_entry(entry: Any, where: str) -> dict[str, Any]:
    """An entry of the JSON, its boxes as [x, y, w, h]; ValueError naming `where` unless it is as documented."""
    try:
        name, findings, boxes, polygons = (entry[key] for key in ("file_name", "syms", "boxes", "polygons"))
        fits = len(findings) == len(boxes) == len(polygons)
        corners = [[float(value) for value in box] for box in boxes]
        outlines = [[(float(x), float(y)) for x, y in polygon] for polygon in polygons]
    except (TypeError, KeyError, ValueError):
        raise ValueError(
            f"{where}: expected file_name, syms, boxes [x1, y1, x2, y2] and polygons [[x, y], ...]"
        ) from None
    if not fits or any(len(box) != 4 for box in corners):
        raise ValueError(f"{where}: expected a box x1, y1, x2, y2 and a polygon for each of {len(findings)} findings")
    if any(not all(map(math.isfinite, point)) for outline in outlines for point in outline):
        raise ValueError(f"{where}: expected finite coordinates in its polygons")
    file = path_of(name, where)
    if len(file.parts) > 1:
        raise ValueError(f"{where}: expected the name of a file, got the path {brief(name)}")
    try:
        findings = match_names(findings, FINDINGS)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    boxes = [check_box([x0, y0, x1 - x0, y1 - y0], where) for x0, y0, x1, y1 in corners]
    return {"file_name": str(file), "syms": findings, "boxes": boxes, "polygons": outlines}


def regions_of(entry: dict[str, Any], names: Sequence[str], image: Path, where: str) -> dict[str, Any]:
    """{"boxes", "mask"} of an image: of those of its findings that are among `names`."""
    own = [i for i, finding in enumerate(entry["syms"]) if finding in names]
    if not own:
        return {"boxes": [], "mask": None}
    size = image_size(image)
    boxes = [to_pixels(entry["boxes"][i], (SIDE, SIDE), size, image, where) for i in own]
    mask = draw_polygons([entry["polygons"][i] for i in own], size)
    return {"boxes": boxes, "mask": png_cell(PIL.Image.fromarray(mask.astype(np.uint8) * 255))}


def draw_polygons(polygons: Sequence[Sequence[tuple[float, float]]], size: tuple[int, int]) -> np.ndarray:
    """Outlines in pixels of the 1024 px original -> their union, (H, W) booleans at `size` (width, height).

    The pixels of an outline belong to its region.
    """
    mask = PIL.Image.new("L", size)
    draw = PIL.ImageDraw.Draw(mask)
    for polygon in polygons:
        points = [(x * size[0] / SIDE, y * size[1] / SIDE) for x, y in polygon]
        if len(points) > 2:
            draw.polygon(points, fill=1, outline=1)
    return np.asarray(mask) > 0
