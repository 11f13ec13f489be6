"""What is known of each picture before anyone looks at it: size, label, patient, and the true region."""

import numpy as np

from ..data.images import picture_size
from .metrics import box_mask


def describe(dataset, strata=()):
    """A dict a row; `truth` is (H, W) booleans, or None where it is unknown, `group` what the bootstrap draws."""
    return [describe_row(row, i, strata) for i, row in enumerate(dataset)]


def describe_row(row, i, strata):
    path = row.get("path") or f"row {i}"
    height, width = picture_size(row["image"])
    return {
        "path": path,
        "patient": row.get("patient") or "",
        "group": row.get("patient") or path,
        "label": None if row.get("label") == -1 else row.get("label"),  # -1: the folder does not say
        "view": row.get("view") or "",
        "height": height,
        "width": width,
        "truth": true_region(row, height, width),
        **{name: str(row[name]) for name in strata},
    }


def true_region(row, height, width):
    """The mask if there is one, else the union of the boxes, else None."""
    if row.get("mask") is None:
        return box_mask(row["boxes"], height, width) if row.get("boxes") else None
    mask = np.asarray(row["mask"].convert("L")) > 127
    if mask.shape != (height, width):
        raise ValueError(
            f"expected a mask of the picture's size {(height, width)}, got {mask.shape}: {row.get('path')}"
        )
    return mask
