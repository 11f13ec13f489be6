"""CheXlocalize (Saporta et al. 2022): radiologists' segmentations of CheXpert's validation and test images."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from .boxes import image_size
from .images import list_images, read_image, to_grey, with_lost_regions
from .limits import check_pixel_count
from .rows import png_cell, to_dataset
from .tables import brief

DEVICES = "Support Devices"
TASKS = (  # as the released files spell them; "Airspace Opacity" is CheXpert's "Lung Opacity"
    "Airspace Opacity",
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Lung Lesion",
    "Pleural Effusion",
    "Pneumothorax",
    DEVICES,
)
PATHOLOGIES = tuple(task for task in TASKS if task != DEVICES)  # a pacemaker is not a disease
ALIASES = {"lung opacity": "Airspace Opacity"}


def load_chexlocalize(
    root: Path | str,
    segmentations: Path | str,
    *,
    tasks: Sequence[str] = PATHOLOGIES,
    frontal_only: bool = True,
    size: int | None = None,
) -> datasets.Dataset:
    """Images of CheXpert with CheXlocalize's segmentations -> data set whose masks are exact.

    Args:
        root: the folder of the split's images, e.g. CheXpert/test; or one above it.
        segmentations: the released JSON, e.g. CheXlocalize/gt_segmentations_test.json. It covers the images with at
            least one segmentation.
        tasks: the pathologies whose union is the mask: all but support devices, or e.g. ["Pleural Effusion"].
        frontal_only: leave lateral images out.
        size: shrink images and masks to this longer side, in pixels; smaller ones keep their size. `evaluate` takes
            half a minute for each image of six million pixels; 512 is enough for maps of 64 to 256 pixels.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, mask. The label is 1 where the mask has a
        pixel and -1 (unknown) otherwise: an image without segmentations may still show another disease, such as a
        fracture. An image without an entry has no mask.

    Raises:
        FileNotFoundError: an image of the JSON is not below `root`. ValueError: an unknown task, a `size` below
            8, no such JSON, or masks of another size than their images.
        ImportError: pycocotools is not installed.
    """
    if size is not None and size < 8:
        raise ValueError(f"expected `size` of 8 pixels or more, got {size}")
    tasks, entries = [task_named(task) for task in tasks], read_segmentations(segmentations)
    rows = []
    for path in tqdm(chexlocalize_images(root, entries, frontal_only), "segmentations", leave=False):
        entry = entries.get(cxr_id(path))
        if entry is not None:
            expected, (width, height) = next(iter(entry.values()))["size"], image_size(path)
            if [height, width] != expected:
                got = f"got {[height, width]}: {path}"
                raise ValueError(f"expected an image of its segmentation's size {expected}, {got}")
        mask = None if entry is None else decode(entry, tasks)
        row = {"image": path, "path": str(path), "patient": path.parts[-3]}
        row["label"] = 1 if mask is not None and mask.any() else -1
        if size is not None:
            row["image"] = shrink(to_grey(read_image(path)), size)
        if mask is not None:
            small = np.asarray(shrink(PIL.Image.fromarray(mask.astype(np.uint8) * 255), size)) > 127
            # encoded immediately: hundreds of masks of six million pixels are gigabytes
            row["mask"] = png_cell(PIL.Image.fromarray(with_lost_regions(small, mask).astype(np.uint8) * 255))
        rows.append(row)
    return to_dataset(rows, ["healthy", "abnormal" if len(tasks) != 1 else tasks[0].lower()])


def shrink(image: PIL.Image.Image, size: int | None) -> PIL.Image.Image:
    """PIL image -> its longer side at most `size` pixels, by averaging; None: unchanged."""
    scale = 1 if size is None else size / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(round(side * scale), 1) for side in image.size], PIL.Image.Resampling.BOX)


def chexlocalize_images(root: Path | str, segmentations: Mapping[str, Any], frontal_only: bool = False) -> list[Path]:
    """Sorted paths of a split's images: those with an entry in the JSON, and the others in the same folders.

    Args:
        root: see `load_chexlocalize`.
        segmentations: the result of `read_segmentations`.
    """
    images = [path for path in list_images(root) if len(path.parts) >= 3 and re.match(r"view\d+_", path.name)]
    paths = {cxr_id(path): path for path in images}
    missing = sorted(set(segmentations) - set(paths))
    if missing:
        raise FileNotFoundError(
            f"expected the images of {len(segmentations)} segmentations below {root}, missing: {len(missing)}, "
            f"the first one {missing[0].replace('_', '/', 2)}"
        )
    # the parent folder may hold other splits, which these segmentations do not cover
    folders = {paths[name].parents[2] for name in segmentations}
    chosen = [path for path in paths.values() if path.parents[2] in folders]
    return sorted(path for path in chosen if not (frontal_only and "lateral" in path.stem))


def read_segmentations(path: Path | str) -> dict[str, Any]:
    """The released JSON -> {cxr_id: {task: {"size": [H, W], "counts": run lengths}}}.

    Every cell is checked here, because pycocotools hangs for minutes or crashes on run lengths that do not fill their
    mask.

    Raises:
        ValueError: another JSON, or a cell whose run lengths do not fit its size.
    """
    try:
        content = json.loads(Path(path).read_text())
        good = bool(content) and all({"size", "counts"} <= set(cell) for e in content.values() for cell in e.values())
        good = good and all(content.values())
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(
            f"{path}: expected segmentations as CheXlocalize releases them (gt_segmentations_val.json), "
            'that is {cxr_id: {task: {"size": [H, W], "counts": ...}}}'
        )
    for name, entry in content.items():
        first = next(iter(entry.values()))["size"]
        for task, cell in entry.items():
            where = f"{path}: {brief(name)}, {brief(task)}"
            check_cell(cell, where)
            if cell["size"] != first:
                raise ValueError(f"{where}: expected the size {first} of the image's other masks, got {cell['size']}")
    return content


def check_cell(cell: Mapping[str, Any], where: str) -> None:
    """ValueError unless a cell has the size of an image and run lengths that fill it exactly."""
    size, counts = cell["size"], cell["counts"]
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
        raise ValueError(f"{where}: expected a size [height, width], got {brief(size)}")
    try:
        check_pixel_count(size[1], size[0])
        lengths = run_lengths(counts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if (lengths < 0).any() or lengths.sum() != size[0] * size[1]:
        raise ValueError(f"{where}: its run lengths do not fill {size[0]} x {size[1]} pixels")


def run_lengths(counts: Any) -> np.ndarray:
    """COCO's text of run lengths -> (N,) int64, alternately outside and inside; ValueError if the text is invalid.

    Five bits a letter, the lowest first; the sixth is set if more follow, the fifth of the last is the sign. From the
    fourth number on, each is the difference to the one before the last.
    """
    if not isinstance(counts, str) or not counts:
        raise ValueError(f"expected run lengths as a text, got {brief(counts)}")
    letters = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    last = (letters & 32) == 0
    starts = np.flatnonzero(np.r_[True, last[:-1]])
    places = np.arange(len(letters)) - np.repeat(starts, np.diff(np.r_[starts, len(letters)]))
    if letters.min() < 0 or letters.max() > 63 or not last[-1] or places.max() > 6:
        raise ValueError("its text of run lengths is invalid")
    numbers = np.add.reduceat((letters & 31) << 5 * places, starts)
    numbers -= np.where(letters[last] & 16, 1 << 5 * (places[last] + 1), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def cxr_id(path: Path | str) -> str:
    """.../patient64541/study1/view1_frontal.jpg -> patient64541_study1_view1_frontal, CheXlocalize's name for it."""
    path = Path(path)
    return "_".join([*path.parts[-3:-1], path.stem])


def task_named(name: Any) -> str:
    tasks = {task.lower(): task for task in TASKS} | ALIASES
    if str(name).lower() not in tasks:
        raise ValueError(f"unknown task {name!r}, expected some of {', '.join(TASKS)}")
    return tasks[str(name).lower()]


def decode(entry: Mapping[str, Any], tasks: Sequence[str]) -> np.ndarray:
    """The union of some tasks' masks of an image -> (H, W) booleans; a task without an entry is empty."""
    cells = [entry[task] for task in tasks if task in entry]
    if not cells:
        height, width = next(iter(entry.values()))["size"]
        return np.zeros((height, width), bool)
    masks = coco_masks()
    return masks.decode(masks.merge(cells)).astype(bool)


def area(entry: Mapping[str, Any], tasks: Sequence[str]) -> int:
    """The most pixels that any one of some tasks has in an image; 0: all are empty."""
    cells = [entry[task] for task in tasks if task in entry]
    return int(max(coco_masks().area(cells), default=0)) if cells else 0


def encode(mask: np.ndarray) -> dict[str, Any]:
    """(H, W) booleans -> the run lengths in the format of the released files."""
    cell = coco_masks().encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(map(int, cell["size"])), "counts": cell["counts"].decode()}


def coco_masks() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("CheXlocalize's masks need pycocotools: pip install 'cxr_diffusers[chexlocalize]'") from None
    return mask
