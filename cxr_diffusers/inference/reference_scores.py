"""Scores of healthy images, to put a picture's score beside: kept with a model, or measured on one's own data."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from tqdm.auto import tqdm

from ..files import as_json, cache_folder, write_file
from ..fingerprints import fingerprint, picture_digest, weights_digest
from ..hub.loading import is_hub_name
from ..processes import quiet

KEPT = "healthy_scores.json"  # in a model's folder


@dataclass
class ReferenceScores:
    """Scores of images that are known to be healthy.

    data: what the images are, in words. call: all settings of the calls that gave them. scores: one an image, sorted.
    weights: `weights_digest` of the model that gave them.
    """

    data: str
    call: dict
    scores: list[float]
    weights: str = ""

    def fits(self, pipeline, call_kwargs):
        """True where a call of `pipeline` with `call_kwargs` means what the reference's calls meant."""
        call = as_json(pipeline.current_settings(self.call))
        return call == as_json(pipeline.settings(**call_kwargs)) and self.weights == weights_digest(pipeline)

    def share_below(self, score):
        """How many of the healthy images score less than `score`: (how many, of how many)."""
        return sum(s < score for s in self.scores), len(self.scores)


def measure_scores(pipeline, dataset, data, *, call_kwargs=None, batch_size=8, progress=None):
    """Run a pipeline over healthy images.

    Args:
        dataset: rows with an "image".
        data: what these images are, for the reader of a figure.
        call_kwargs: arguments of the call where they are not the model's own.
        progress: `progress(done, of)` after each batch; None: a bar on the terminal.

    Returns:
        `ReferenceScores`.

    Raises:
        ValueError: no image, or an image that is labelled otherwise (its label is not the first).
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


def keep_scores(reference, folder):
    """Write them beside a model."""
    write_file(Path(folder) / KEPT, (json.dumps(asdict(reference), indent=1) + "\n").encode())


def kept_scores(model):
    """What `keep_scores` wrote into a model's folder, here or (`publish` sends it along) on the Hub, or None."""
    path = Path(model) / KEPT
    if is_hub_name(model):
        try:
            path = Path(hf_hub_download(str(model), KEPT))
        except (OSError, ValueError):  # there is none, or nobody to ask for it
            return None
    return ReferenceScores(**json.loads(path.read_text())) if path.is_file() else None


def cached_scores(pipeline, dataset, data, *, cache_dir=None, progress=None):
    """As `measure_scores`, once for a model, its settings and these images: the scores, and no picture, are kept.

    Args:
        cache_dir: None: `healthy_scores` in the cache, see `files.cache_folder`.
    """
    key = hashlib.blake2b(fingerprint(pipeline, pipeline.settings(), 0).encode(), digest_size=16)
    for row in dataset:
        key.update(picture_digest("", row).encode())
    folder = Path(cache_dir or cache_folder("healthy_scores")) / key.hexdigest()
    found = kept_scores(folder)
    if found is None:
        found = measure_scores(pipeline, dataset, data, progress=progress)
        keep_scores(found, folder)
    return replace(found, data=data)
