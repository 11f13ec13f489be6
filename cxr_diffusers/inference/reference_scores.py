"""Scores of healthy images for comparison with an image's score: stored with a model, or measured on other data."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import as_json, cache_folder, write_file
from ..fingerprints import fingerprint, image_digest, weights_digest
from ..hub.loading import hub_file, is_hub_name
from ..processes import quiet

KEPT = "healthy_scores.json"  # in a model's folder


@dataclass
class ReferenceScores:
    """Scores of healthy images.

    data: description of the images. call: all settings of the pipeline's calls. scores: sorted, one for each image.
    weights: `weights_digest` of the model.
    """

    data: str
    call: dict
    scores: list[float]
    weights: str = ""

    def fits(self, pipeline: Any, call_kwargs: Mapping) -> bool:
        """Whether a call of `pipeline` with `call_kwargs` has the weights and settings of the reference's calls."""
        call = as_json(pipeline.current_settings(self.call))
        return call == as_json(pipeline.settings(**call_kwargs)) and self.weights == weights_digest(pipeline)

    def share_below(self, score: float) -> tuple[int, int]:
        """(number of healthy images with a lower score, number of healthy images)."""
        return sum(s < score for s in self.scores), len(self.scores)

    def p_value(self, score: float) -> float:
        """Conformal p-value (1 + number of healthy scores >= `score`) / (n + 1): the image itself counts as one."""
        below, count = self.share_below(score)
        return (1 + count - below) / (count + 1)

    def headline(self, score: float) -> str:
        """Rank of a score among healthy images, such as "higher than 31 of 37 healthy images (p = .18)"."""
        below, count = self.share_below(score)
        return f"higher than {below} of {count} healthy images (p = {self.p_value(score):.2g})".replace("0.", ".")


def measure_scores(
    pipeline: Any,
    dataset: Any,
    data: str,
    *,
    call_kwargs: Mapping | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], Any] | None = None,
) -> ReferenceScores:
    """Run a pipeline over healthy images.

    Args:
        dataset: a `datasets.Dataset` with the column "image".
        data: description of the images, for the caption of a figure.
        call_kwargs: arguments of the call that differ from the model's own settings.
        progress: `progress(images done, images)` after each batch; None: a bar on the terminal.

    Returns:
        `ReferenceScores`.

    Raises:
        ValueError: no image, or an image with another label than the first one (healthy).
    """
    if len(dataset) == 0:
        raise ValueError(f"expected at least one healthy image, got none in {data}")
    labels = dataset["label"] if "label" in dataset.column_names else []
    if any(label != 0 for label in labels):
        names = dataset.features["label"].names
        others = sum(label != 0 for label in labels)
        raise ValueError(f"expected healthy images alone in {data}, got {others} that are {' or '.join(names[1:])}")
    call, scores = dict(call_kwargs or {}), []
    with quiet(pipeline), tqdm(total=len(dataset), desc="healthy images", disable=progress is not None) as bar:
        for first in range(0, len(dataset), batch_size):
            batch = [dataset[i]["image"] for i in range(first, min(first + batch_size, len(dataset)))]
            scores += pipeline(batch, output_type="np", **call).anomaly_score.tolist()
            bar.update(len(batch))
            if progress is not None:
                progress(len(scores), len(dataset))
    settings, weights = as_json(pipeline.settings(**call)), weights_digest(pipeline)
    return ReferenceScores(data, settings, sorted(round(s, 6) for s in scores), weights)


def keep_scores(reference: ReferenceScores, folder: Path | str) -> None:
    """Write the scores into a model's folder."""
    write_file(Path(folder) / KEPT, (json.dumps(asdict(reference), indent=1) + "\n").encode())


def kept_scores(model: Path | str) -> ReferenceScores | None:
    """The scores that `keep_scores` wrote into a model's folder, local or on the Hub; None if there are none."""
    path = Path(model) / KEPT
    if is_hub_name(model):
        try:
            path = hub_file(model, KEPT)
        except (OSError, ValueError):  # no such file, or no connection
            return None
    return ReferenceScores(**json.loads(path.read_text())) if path.is_file() else None


def cached_scores(
    pipeline: Any,
    dataset: Any,
    data: str,
    *,
    cache_dir: Path | str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> ReferenceScores:
    """As `measure_scores`, but only once for the same model, settings and images; the cache holds scores only.

    Args:
        cache_dir: None: `healthy_scores` in the cache, see `files.cache_folder`.
    """
    key = hashlib.blake2b(fingerprint(pipeline, pipeline.settings(), 0).encode(), digest_size=16)
    for row in dataset:
        key.update(image_digest("", row).encode())
    folder = Path(cache_dir or cache_folder("healthy_scores")) / key.hexdigest()
    reference = kept_scores(folder)
    if reference is None:
        reference = measure_scores(pipeline, dataset, data, progress=progress)
        keep_scores(reference, folder)
    return replace(reference, data=data)
