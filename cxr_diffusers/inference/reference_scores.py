"""Anomaly scores of healthy images, stored with a model or measured on one's own data, to compare a score with.

With a model, quantiles of the healthy images' maps are stored, too.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..data.rows import column_of, readable_images, rows_with_region
from ..files import as_json, cache_folder, write_file
from ..fingerprints import COUNTERFACTUAL_ONLY, fingerprint, image_digest, weights_digest
from ..hub.loading import hub_file, is_hub_name
from ..processes import quiet

SCORES_FILE = "healthy_scores.json"  # in a model's folder
DIGITS = 6  # of a score, decimals; scores that do not differ in them are equal


@dataclass
class ReferenceScores:
    """Scores of images that are known to be healthy.

    data: a description of the images. call: all settings of the calls that gave the scores. scores: one an image,
    sorted, to `DIGITS` decimals. weights: `weights_digest` of the model. by_view: {view: sorted scores} of the images
    whose view is known. map_quantiles: {quantile: map value} of the pixels of all their maps, rising; {} where only
    scores were measured.
    """

    data: str
    call: dict
    scores: list[float]
    weights: str = ""
    by_view: dict[str, list[float]] = field(default_factory=dict)
    map_quantiles: dict[str, float] = field(default_factory=dict)

    def fits(self, pipeline: DiffusionPipeline, call_kwargs: Mapping) -> bool:
        """True if a call of `pipeline` with `call_kwargs` has the settings and weights of the calls measured here.

        Settings that change only the counterfactual may differ.
        """
        calls = (pipeline.current_settings(self.call), pipeline.settings(**call_kwargs))
        measured, call = ({k: v for k, v in as_json(c).items() if k not in COUNTERFACTUAL_ONLY} for c in calls)
        return call == measured and self.weights == weights_digest(pipeline)

    def share_below(self, score: float, view: str | None = None) -> tuple[int, int]:
        """(number of healthy images with a lower score, number of healthy images).

        Args:
            view: compare with the images of this view only; all of them if it is None, or if none has this view.
        """
        scores, score = self.by_view.get(view or "", self.scores), round(float(score), DIGITS)
        return sum(s < score for s in scores), len(scores)

    def p_value(self, score: float, view: str | None = None) -> float:
        """Conformal p-value (1 + number of healthy scores >= `score`) / (n + 1): the image itself counts as one."""
        below, count = self.share_below(score, view)
        return (1 + count - below) / (count + 1)

    def map_value(self, quantile: float) -> float:
        """The map value that a share of `quantile` of the healthy images' pixels stays below.

        Exact at the stored quantiles, linear between them.

        Raises:
            ValueError: a quantile below the lowest stored one or above the highest.
        """
        quantiles = [float(q) for q in self.map_quantiles]
        if not quantiles[0] <= quantile <= quantiles[-1]:
            raise ValueError(
                f"expected a quantile from {quantiles[0]:g} to {quantiles[-1]:g}, the range that was measured on "
                f"{self.data}, got {quantile:g}"
            )
        return float(np.interp(quantile, quantiles, list(self.map_quantiles.values())))

    def headline(self, score: float, view: str | None = None) -> str:
        """Rank of a score among healthy images, such as "higher than 31 of 37 healthy images (p = .18)"."""
        below, count = self.share_below(score, view)
        return f"higher than {below} of {count} healthy images (p = {short_number(self.p_value(score, view))})"


def short_number(p: float) -> str:
    """0.026 -> ".026": two significant digits, without the zero before the point."""
    return f"{p:.2g}".removeprefix("0") or "0"


def check_healthy(dataset: Dataset, data: str) -> None:
    """Raise ValueError if there is no image, or an image of another class than healthy (0).

    Images without a label, such as those of a plain folder, are healthy by the user's word.
    """
    if len(dataset) == 0:
        raise ValueError(f"expected at least one healthy image, got none in {data}")
    others = sum(label not in (0, -1, None) for label in column_of(dataset, "label"))
    if others:
        names = " or ".join(dataset.features["label"].names[1:])
        raise ValueError(
            f"expected healthy images alone in {data}, got {others} that are {names}: leave these out (of a folder, "
            "give its subfolder of healthy images; with `chexpert`, `classes=[]`)"
        )


def readable_healthy(dataset: Dataset, data: str) -> tuple[Dataset, dict[str, str]]:
    """`readable_images` of healthy images; ValueError as of `check_healthy`, or if none of them can be read.

    Images with a true region are left out, too: of a label from a report and a radiologist's box, one is wrong.
    """
    check_healthy(dataset, data)
    readable, failed = readable_images(dataset)
    marked = rows_with_region(readable, range(len(readable)))
    if marked:
        paths = column_of(readable, "path")
        failed |= {str(paths[i]): f"{paths[i]}: labelled healthy, but it has a true region" for i in marked}
        readable = readable.select(sorted(set(range(len(readable))) - set(marked)))
    if not len(readable):
        raise ValueError(f"expected healthy images with contrast in {data}, got none: {next(iter(failed.values()))}")
    return readable, failed


def reference_scores(
    pipeline: DiffusionPipeline, dataset: Dataset, data: str, scores: list[float], call_kwargs: dict | None = None
) -> ReferenceScores:
    """`ReferenceScores` of the images of `dataset`, given their `scores` in the order of its rows."""
    scores, by_view = [round(float(score), DIGITS) for score in scores], {}
    views = dataset["view"] if "view" in dataset.column_names else []
    for view in sorted({view for view in views if view}):
        by_view[view] = sorted(score for score, other in zip(scores, views, strict=True) if other == view)
    settings = as_json(pipeline.settings(**(call_kwargs or {})))
    return ReferenceScores(data, settings, sorted(scores), weights_digest(pipeline), by_view)


def measure_scores(
    pipeline: DiffusionPipeline,
    dataset: Dataset,
    data: str,
    *,
    call_kwargs: dict | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> ReferenceScores:
    """Run a pipeline over healthy images.

    Args:
        dataset: rows with an "image".
        data: a description of the images, for the reader of a figure.
        call_kwargs: arguments of the call that differ from the model's own settings.
        progress: `progress(done, total)` after each batch; None: a bar on the terminal.

    Raises:
        ValueError: no image, or an image with another label than healthy (0).
    """
    check_healthy(dataset, data)
    call, scores = dict(call_kwargs or {}), []
    with quiet(pipeline), tqdm(total=len(dataset), desc="healthy images", disable=progress is not None) as bar:
        for first in range(0, len(dataset), batch_size):
            batch = [dataset[i]["image"] for i in range(first, min(first + batch_size, len(dataset)))]
            scores += pipeline(batch, output_type="np", **call).anomaly_score.tolist()
            bar.update(len(batch))
            if progress is not None:
                progress(len(scores), len(dataset))
    return reference_scores(pipeline, dataset, data, scores, call)


def keep_scores(reference: ReferenceScores, folder: Path | str) -> None:
    """Write the scores into a model's folder."""
    write_file(Path(folder) / SCORES_FILE, (json.dumps(asdict(reference), indent=1) + "\n").encode())


def kept_scores(model: Path | str) -> ReferenceScores | None:
    """The scores that `keep_scores` wrote into a model's folder, here or on the Hub; None if there are none."""
    path = model_file(model, SCORES_FILE)
    return None if path is None else ReferenceScores(**json.loads(path.read_text()))


def model_file(model: Path | str, name: str) -> Path | None:
    """The path of a file in a model's folder, here or on the Hub; None if it does not exist or cannot be fetched."""
    path = Path(model) / name
    if is_hub_name(model):
        try:
            path = hub_file(model, name)
        except (OSError, ValueError):  # no such file, or no connection
            return None
    return path if path.is_file() else None


def cached_scores(
    pipeline: DiffusionPipeline,
    dataset: Dataset,
    data: str,
    *,
    cache_dir: Path | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ReferenceScores:
    """`measure_scores`, once for a model, its settings, and these images and their views.

    The scores are stored, the images are not.

    Args:
        cache_dir: None: `healthy_scores` in the cache, see `files.cache_folder`.
    """
    key = hashlib.blake2b(fingerprint(pipeline, pipeline.settings(), 0).encode(), digest_size=16)
    for row in dataset:
        key.update(f"{image_digest('', row)} {row.get('view') or ''}".encode())
    folder = Path(cache_dir or cache_folder("healthy_scores")) / key.hexdigest()
    reference = kept_scores(folder)
    if reference is None:
        reference = measure_scores(pipeline, dataset, data, progress=progress)
        keep_scores(reference, folder)
    return replace(reference, data=data)
