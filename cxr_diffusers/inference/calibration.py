"""Calibration of a model on validation images: threshold of the map, healthy scores, and the range of its errors."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..data.images import height_and_width
from ..data.rows import readable_images, rows_with_region
from ..evaluation.masks import pixel_quantiles
from ..evaluation.predictions import load_prediction, save_prediction
from ..files import remove_dead, write_file
from ..fingerprints import fingerprint, image_digest
from ..hub.loading import CHECKPOINTS, is_hub_name, load_pipeline, read_index, shipped_folder
from ..pipelines.cxr_images import restore_map
from ..processes import process_state, quiet
from .out_of_distribution import ReferenceErrors, denoising_errors, has_denoiser, keep_errors
from .reference_scores import ReferenceScores, keep_scores, readable_healthy, reference_scores

UNFINISHED = ".calibration"  # in a model's folder: results of single images, deleted at the end
LOWEST = 2e-5  # threshold, about one step of a map in 16 bits: 0 means no threshold
# of the pixels of healthy maps, for `detect --threshold healthy:Q`; closer together where maps rise steeply
QUANTILES = (
    *(0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985),
    *(0.99, 0.9925, 0.995, 0.996, 0.997, 0.998, 0.9985, 0.999, 0.9995, 0.9999),
)
TRAINING_IMAGES = 100  # healthy validation images, and as many diseased ones, after a training


@dataclass
class Calibration:
    """What `calibrate_model` measured.

    map_threshold: the map value that a share of `quantile` of the healthy images' pixels stays below. scores: of the
    healthy images, with quantiles of their maps. errors: of the healthy and diseased images; None for a model without a
    denoising network. failed: {path: error} of the images that were left out.
    """

    map_threshold: float
    quantile: float
    scores: ReferenceScores
    errors: ReferenceErrors | None
    failed: dict[str, str]


def calibrate_model(
    model: Path | str,
    healthy: Dataset,
    data: str,
    *,
    diseased: Dataset | None = None,
    quantile: float = 0.95,
    batch_size: int = 8,
    pipeline: DiffusionPipeline | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure a model on validation images and write the results into its folder.

    Written are `map_threshold` in model_index.json (with its quantile and the number of images as `_map_threshold`),
    healthy_scores.json (also by view, if the views are known, and with quantiles of the healthy maps), and
    denoising_errors.json for a diffusion model, from which images are recognised that do not look like the training
    images. The same images give the same files. An interrupted calibration continues where it stopped; the files in
    the folder change only at the end. Images that cannot be read, or of a single value, are left out and logged.

    Args:
        model: the folder of a pipeline.
        healthy: rows with an "image" and, if known, "view": validation images, which the model was not trained on.
        data: a description of the healthy images.
        diseased: likewise, of diseased images: they are as much like the training images as the healthy ones.
        quantile: in (0, 1); of the pixels of all healthy maps, without the bars around images that are not square.
        batch_size: images a call.
        pipeline: the opened model, on its device; None: it is opened here.

    Raises:
        ValueError: a model on the Hub or one that is shipped with the package, no healthy image, an image in `healthy`
            that is not healthy, or a quantile outside (0, 1).
        FileNotFoundError: no pipeline in the folder.
    """
    folder = check_own_folder(model)
    if not 0 < quantile < 1:
        raise ValueError(f"expected a quantile between 0 and 1, got {quantile}")
    healthy, failed = readable_healthy(healthy, data)
    if diseased is not None:
        diseased, failed_diseased = readable_images(diseased)
        failed |= failed_diseased
    remove_dead(folder)
    if pipeline is None:
        pipeline = load_pipeline(folder).to(process_state().device)
    run: dict[str, Any] = dict(batch_size=batch_size, progress=progress)
    with quiet(pipeline):
        results = compute_once(folder, healthy, maps_and_scores, pipeline, "calibrate: maps of healthy images", **run)
        errors = measure_errors(folder, healthy, diseased, pipeline, data, **run) if has_denoiser(pipeline) else None
    maps = [result["map"] for result in results]
    threshold, *values = thresholds_at([quantile, *QUANTILES], maps)
    scores = reference_scores(pipeline, healthy, data, [float(result["score"]) for result in results])
    scores = replace(scores, map_quantiles={f"{q:g}": value for q, value in zip(QUANTILES, values, strict=True)})

    keep_scores(scores, folder)
    if errors is not None:
        keep_errors(errors, folder)
    write_threshold(folder, threshold, quantile=quantile, images=len(healthy), data=data)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return Calibration(threshold, quantile, scores, errors, failed)


def check_own_folder(model: Path | str) -> Path:
    """The folder of a model that may be changed.

    Raises:
        ValueError: a model on the Hub, or shipped with the package. FileNotFoundError: no pipeline there.
    """
    shipped = shipped_folder(model) or Path(model).resolve().parent == CHECKPOINTS.resolve()
    if shipped or is_hub_name(model):
        raise ValueError(
            f"expected a model of your own in a folder, got {model}, which is "
            f"{'shipped with the package' if shipped else 'on the Hub'}: save a copy first "
            f"(load_pipeline({str(model)!r}).save_pretrained(FOLDER)) and calibrate that"
        )
    read_index(model)
    return Path(model)


def compute_once(
    folder: Path,
    dataset: Dataset,
    compute: Callable[[Any, list], list[dict]],
    pipeline: Any,
    description: str,
    *,
    batch_size: int,
    progress: bool,
) -> list[dict]:
    """`compute(pipeline, images)`: a dict of arrays for each image of `dataset`, computed once and stored in `folder`.

    Args:
        description: of the progress bar.
    """
    key = f"{compute.__name__} {fingerprint(pipeline, {}, 0)}"
    files = [folder / UNFINISHED / f"{image_digest(key, row)}.npz" for row in dataset]
    missing = [i for i, file in enumerate(files) if not file.is_file()]
    done = len(files) - len(missing)
    with tqdm(total=len(files), initial=done, desc=description, unit="image", disable=not progress) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for i, result in zip(batch, compute(pipeline, [dataset[i]["image"] for i in batch]), strict=True):
                save_prediction(result, files[i])
            bar.update(len(batch))
    return [load_prediction(file) for file in files]


def measure_errors(
    folder: Path, healthy: Dataset, diseased: Dataset | None, pipeline: Any, data: str, **run: Any
) -> ReferenceErrors | None:
    """`ReferenceErrors` of the healthy and, if there are any, the diseased images; `run` as of `compute_once`."""
    features = []
    for dataset, name in ((healthy, "healthy"), (diseased, "diseased")):
        if dataset is not None and len(dataset):
            results = compute_once(folder, dataset, errors_of, pipeline, f"calibrate: errors of {name} images", **run)
            features.append(np.stack([result["errors"] for result in results]))
    return ReferenceErrors.of(pipeline, data, *features)


def maps_and_scores(pipeline: Any, images: list) -> list[dict]:
    """Score, and map at the model's resolution without the bars, of each image."""
    output = pipeline(images, output_type="np")
    maps = [unpad(m, image, pipeline.config["aspect"]) for m, image in zip(output.anomaly_map, images, strict=True)]
    return [{"map": m, "score": score} for m, score in zip(maps, output.anomaly_score, strict=True)]


def errors_of(pipeline: Any, images: list) -> list[dict]:
    """Denoising errors of each image."""
    return [{"errors": errors} for errors in denoising_errors(pipeline, images)]


def thresholds_at(quantiles: list[float], maps: list[np.ndarray]) -> list[float]:
    """The quantiles of all pixels of the maps, to five decimals and at least `LOWEST`."""
    return [max(LOWEST, round(float(value), 5)) for value in pixel_quantiles(maps, quantiles)]


def unpad(anomaly_map: np.ndarray, image: Any, aspect: str) -> np.ndarray:
    """The part of a square map that shows the image, its longer side as long as the square's."""
    if aspect == "keep":
        return anomaly_map
    height, width = height_and_width(image)
    scale = max(anomaly_map.shape) / max(height, width)
    return restore_map(anomaly_map, max(1, round(height * scale)), max(1, round(width * scale)), aspect)


def write_threshold(folder: Path, threshold: float, **origin: Any) -> None:
    """Write `map_threshold` and `_map_threshold`, the values of `origin`, into model_index.json."""
    # diffusers ignores keys with an underscore
    index = read_index(folder) | {"map_threshold": threshold, "_map_threshold": origin}
    write_file(folder / "model_index.json", (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def calibrate_trained(folder: Path | str, dataset: Dataset, name: str) -> list[Path]:
    """`calibrate_model` for a trained model, and for its best one (`best`) if there is one.

    Args:
        folder: of the training.
        dataset: validation images; `TRAINING_IMAGES` healthy ones at most are used, and as many diseased ones.
        name: of the data set.

    Returns:
        the folders of the calibrated models; [] if no validation image is healthy.
    """
    labels = np.array(dataset["label"])
    labels[rows_with_region(dataset, np.flatnonzero(labels == 0))] = -1
    healthy, diseased = (dataset.select(spread(np.flatnonzero(rows))) for rows in (labels == 0, labels > 0))
    if not len(healthy):
        return []
    folders = [path for path in (Path(folder), Path(folder, "best")) if (path / "model_index.json").is_file()]
    for path in folders:
        calibrate_model(path, healthy, f"{len(healthy)} healthy validation images ({name})", diseased=diseased)
    return folders


def spread(rows: np.ndarray) -> np.ndarray:
    """At most `TRAINING_IMAGES` of these, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(TRAINING_IMAGES, len(rows))).round().astype(int)]
