"""The lines of per_image.csv, and what summary.json says of the methods and the data."""

import numpy as np
import pandas as pd

from ..fingerprints import config_of, weights_digest
from . import metrics
from .statistics import UNKNOWN


def describe_method(method):
    """What summary.json says of a method; `weights` (None without torch components) is how a model card finds it."""
    return {
        "class": type(method.pipeline).__name__,
        "weights": weights_digest(method.pipeline) if hasattr(method.pipeline, "components") else None,
        "config": config_of(method.pipeline),
        "call_kwargs": method.call_kwargs,
    }


def image_table(method, rows, healthy_rows, measured):
    """A line per image of one method; `measured`: {index of the row: its numbers}."""
    lines = []
    parts = ("dataset", rows, method.answers), ("healthy", healthy_rows, method.healthy_answers)
    for part, part_rows, answers in parts:
        for i, (row, answer) in enumerate(zip(part_rows, answers, strict=True)):
            own = {k: v for k, v in row.items() if k not in ("truth", "group", "height", "width")}
            numbers = measured.get(i, UNKNOWN) if part == "dataset" else UNKNOWN
            line = {"method": method.name, "part": part, **own, "score": float(answer["score"]), **numbers}
            lines.append({**line, **kept_outside(method, answer, row), "seconds": float(answer["seconds"])})
    return pd.DataFrame(lines)


def kept_outside(method, answer, row):
    """How well the counterfactual kept what is outside the true region (everything, if there is none)."""
    image, counterfactual = (method.restore(answer[key], row) for key in ("image", "counterfactual"))
    small = min(image.shape) < 2 * metrics.SSIM_RADIUS + 1
    return {
        "psnr_outside": metrics.psnr(counterfactual, image, outside=row["truth"]),
        "ssim_outside": np.nan if small else metrics.ssim(counterfactual, image, outside=row["truth"]),
    }


def counts(rows, seen, healthy_rows):
    patients, healthy_patients = {r["group"] for r in rows}, {r["group"] for r in healthy_rows}
    return {
        "n_images": len(rows),
        "n_patients": len(patients),
        "n_with_region": len(seen),
        "n_patients_with_region": len({r["group"] for r in seen}),
        "n_healthy": len(healthy_rows),
        "n_healthy_patients": len(healthy_patients),
        "n_patients_in_both": len(patients & healthy_patients),
    }
