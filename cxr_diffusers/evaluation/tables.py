"""The rows of per_image.csv, and the description of methods and data in summary.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..fingerprints import config_of, weights_digest
from . import metrics
from .predictions import Method, Prediction
from .statistics import UNDEFINED
from .truth import INTERNAL, ImageSet, Row, has_region, is_shrunk


def describe_method(method: Method) -> dict[str, Any]:
    """A method in summary.json; a model card finds it by `weights` (None without torch components)."""
    return {
        "class": type(method.pipeline).__name__,
        "weights": weights_digest(method.pipeline) if hasattr(method.pipeline, "components") else None,
        "config": config_of(method.pipeline),
        "call_kwargs": method.call_kwargs,
    }


def image_table(
    method: Method,
    images: ImageSet,
    healthy: ImageSet,
    measured: Mapping[int, Mapping[str, float]],
    progress: bool = False,
) -> pd.DataFrame:
    """A row for each image of one method; `measured`: {index in the data set: its metrics}; `progress`: show a bar."""
    lines = []
    for part, of_part in (("dataset", images), ("healthy", healthy)):
        predictions = of_part.predictions[method.name]
        pairs = zip(of_part.rows, predictions, strict=True)
        hidden = not progress or not of_part.rows
        bar = tqdm(pairs, f"similarity, {method.name}", len(of_part.rows), disable=hidden)
        for i, (row, prediction) in enumerate(bar):
            own = {k: v for k, v in row.items() if k not in INTERNAL}
            numbers = measured.get(i, UNDEFINED) if part == "dataset" else UNDEFINED
            numbers = {column: numbers[column] for column in UNDEFINED}
            line = {"method": method.name, "part": part, **own, "score": float(prediction["score"]), **numbers}
            seconds = float(prediction["seconds"])
            lines.append({**line, **similarity_outside(method, prediction, row), "seconds": seconds})
    return pd.DataFrame(lines)


def similarity_outside(method: Method, prediction: Prediction, row: Row) -> dict[str, float]:
    """PSNR and SSIM of counterfactual and image outside the true region; of the whole image if there is none.

    What the pipeline did not see of the image (cut away by its `aspect`) does not count.
    """
    image, counterfactual = (method.restore(prediction[key], row) for key in ("image", "counterfactual"))
    outside = None if row["truth"] is None else row["truth"].mask()
    if method.option("aspect", "pad") in ("crop", "keep"):
        unseen = method.restore(np.ones_like(prediction["image"]), row) == 0
        outside = unseen if outside is None else outside | unseen
    small = min(image.shape) < 2 * metrics.SSIM_RADIUS + 1
    return {
        "psnr_outside": metrics.psnr(counterfactual, image, outside=outside),
        "ssim_outside": np.nan if small else metrics.ssim(counterfactual, image, outside=outside),
    }


def and_healthy(summary: Mapping[str, Any]) -> str:
    """The healthy images beside the data set in a sentence of summary.md or a model card; "" if there are none.

    The data set's own healthy images are not among them, so "0 healthy images" would be misread.
    """
    return f", and {n} healthy images beside them" if (n := summary["n_healthy"]) else ""


def counts(images: ImageSet, healthy: ImageSet) -> dict[str, Any]:
    """How many images and patients there are, and which images were left out."""
    patients, healthy_patients = ({row["group"] for row in part.rows} for part in (images, healthy))
    with_region = [row for row in images.rows if has_region(row)]
    failed = images.failed | healthy.failed
    return {
        "n_images": len(images.rows),
        "n_patients": len(patients),
        "n_with_region": len(with_region),
        "n_patients_with_region": len({row["group"] for row in with_region}),
        "n_contradicted": sum(row["contradicted"] for row in images.rows),
        "n_shrunk": sum(is_shrunk(row) for part in (images, healthy) for row in part.rows),
        "n_healthy": len(healthy.rows),
        "n_healthy_patients": len(healthy_patients),
        "n_patients_in_both": len(patients & healthy_patients),
        "n_failed": len(failed),
        "failed": failed,
    }
