"""CheXlocalize (Saporta et al. 2022): radiologists' segmentations of CheXpert's validation and test images."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from .images import list_images, read_image, to_grey
from .rows import png_cell, to_dataset

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
PATHOLOGIES = tuple(task for task in TASKS if task != DEVICES)  # a pacemaker is no disease
ALIASES = {"lung opacity": "Airspace Opacity"}


def load_chexlocalize(root, segmentations, *, tasks=PATHOLOGIES, frontal_only=True, size=None):
    """Images of CheXpert with CheXlocalize's segmentations -> data set whose masks are exact.

    Args:
        root: the folder of the split's images, e.g. CheXpert/test; or one above it.
        segmentations: the released JSON, e.g. CheXlocalize/gt_segmentations_test.json. It covers the images with at
            least one segmentation.
        tasks: the pathologies whose union is the mask: all but support devices, or e.g. ["Pleural Effusion"].
        frontal_only: leave lateral images out.
        size: shrink pictures and masks to this longer side, in pixels; larger ones stay as they are. `evaluate` takes
            half a minute for each picture of six million pixels; 512 are plenty for maps of 64 to 256.

    Returns:
        `datasets.Dataset` with columns image, label, patient, view, path, mask. The label is 1 where the mask has a
        pixel and -1 (unknown) elsewhere: what nobody segmented may still be ill (a fracture, say). An image without an
        entry has no mask.

    Raises:
        FileNotFoundError: an image of the JSON is not below `root`. ValueError: an unknown task, no such JSON.
        ImportError: pycocotools is not installed.
    """
    tasks, known = [task_named(task) for task in tasks], read_segmentations(segmentations)
    rows = []
    for path in tqdm(chexlocalize_images(root, known, frontal_only), "segmentations", leave=False):
        entry = known.get(cxr_id(path))
        mask = None if entry is None else decode(entry, tasks)
        row = {"image": path, "path": str(path), "patient": path.parts[-3]}
        row["label"] = 1 if mask is not None and mask.any() else -1
        if size is not None:
            row["image"] = shrink(to_grey(read_image(path)), size)
        if mask is not None:
            mask = shrink(PIL.Image.fromarray(mask.astype(np.uint8) * 255), size)
            # encoded at once: hundreds of masks of six million pixels are gigabytes
            row["mask"] = png_cell(mask.point(lambda value: 255 * (value > 127)))
        rows.append(row)
    return to_dataset(rows, ["healthy", "abnormal" if len(tasks) != 1 else tasks[0].lower()])


def shrink(image, size):
    """PIL image -> its longer side at most `size` pixels, averaging; None: as it is."""
    scale = 1 if size is None else size / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(round(side * scale), 1) for side in image.size], PIL.Image.Resampling.BOX)


def chexlocalize_images(root, segmentations, frontal_only=False):
    """Sorted paths of a split's images: all of the JSON's, and those beside them which have no entry.

    Args:
        root: see `load_chexlocalize`.
        segmentations: what `read_segmentations` returns.
    """
    images = [path for path in list_images(root) if len(path.parts) >= 3 and re.match(r"view\d+_", path.name)]
    known = {cxr_id(path): path for path in images}
    missing = sorted(set(segmentations) - set(known))
    if missing:
        raise FileNotFoundError(
            f"expected the images of {len(segmentations)} segmentations below {root}, not found: {len(missing)}, "
            f"the first one {missing[0].replace('_', '/', 2)}"
        )
    # a folder above holds other splits, too, of which these segmentations say nothing
    folders = {known[name].parents[2] for name in segmentations}
    chosen = [path for path in known.values() if path.parents[2] in folders]
    return sorted(path for path in chosen if not (frontal_only and "lateral" in path.stem))


def read_segmentations(path):
    """The released JSON -> {cxr_id: {task: {"size": [H, W], "counts": run lengths}}}.

    Raises:
        ValueError: another kind of file.
    """
    try:
        content = json.loads(Path(path).read_text())
        good = bool(content) and all({"size", "counts"} <= set(cell) for e in content.values() for cell in e.values())
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(
            f"{path}: expected segmentations as CheXlocalize releases them (gt_segmentations_val.json), "
            'that is {cxr_id: {task: {"size": [H, W], "counts": ...}}}'
        )
    return content


def cxr_id(path):
    """.../patient64541/study1/view1_frontal.jpg -> patient64541_study1_view1_frontal, CheXlocalize's name for it."""
    path = Path(path)
    return "_".join([*path.parts[-3:-1], path.stem])


def task_named(name):
    known = {task.lower(): task for task in TASKS} | ALIASES
    if str(name).lower() not in known:
        raise ValueError(f"unknown task {name!r}, expected some of {', '.join(TASKS)}")
    return known[str(name).lower()]


def decode(entry, tasks):
    """The union of some tasks' masks of an image -> (H, W) booleans; what has no entry is empty."""
    cells = [entry[task] for task in tasks if task in entry]
    if not cells:
        height, width = next(iter(entry.values()))["size"]
        return np.zeros((height, width), bool)
    masks = coco_masks()
    return masks.decode(masks.merge(cells)).astype(bool)


def area(entry, tasks):
    """The most pixels that any one of some tasks has in an image; 0: none has any."""
    cells = [entry[task] for task in tasks if task in entry]
    return int(max(coco_masks().area(cells), default=0)) if cells else 0


def encode(mask):
    """(H, W) booleans -> the run lengths that the released files hold."""
    cell = coco_masks().encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(map(int, cell["size"])), "counts": cell["counts"].decode()}


def coco_masks():
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("CheXlocalize's masks need pycocotools: pip install 'cxr_diffusers[chexlocalize]'") from None
    return mask
