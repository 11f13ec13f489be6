"""Maps and scores -> metrics with bootstrap intervals, over the same replicates for all methods.

Each metric is a vector of 1 + R values: that of the images themselves, then one of each replicate of the bootstrap.
Vectors of the same replicates can be subtracted, which gives paired differences.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from . import metrics
from .controls import CHANCE, GATED, MEAN, Maps, mean_map_of
from .lazy import stored
from .masks import pixel_quantiles
from .predictions import Method
from .truth import Row, masks_of

METRICS = ("pixel_ap", "pixel_auroc", "hit")  # of one image
MASK_METRICS = ("dice", "iou")  # of one image's mask
MEANS = {"pixel_ap": "pixel_ap_mean", "pixel_auroc": "pixel_auroc_mean", "hit": "hit_rate"}  # others: the same name
POOLED = {"pixel_ap": "average_precision", "pixel_auroc": "auroc", "aupro": "aupro", "best_dice": "best_dice"}
SCORE_QUANTILE = 0.95  # of the healthy images' scores: an image above it is called abnormal
UNDEFINED = dict.fromkeys((*METRICS, *MASK_METRICS, "prevalence"), np.nan)

Samples = dict[str, np.ndarray]  # {metric: (1 + R,) values}
Intervals = dict[str, dict[str, dict[str, Any]]]  # {name: {metric: {value, low, high, undefined}}}


@dataclass
class Table:
    """Metrics of methods and controls over the same images and replicates.

    Attributes:
        samples: {name: {metric: (1 + R,) values}}.
        has_intervals: False where all images are of one patient, so that every replicate is the set itself.
    """

    samples: dict[str, Samples]
    has_intervals: bool = True

    def intervals(self) -> Intervals:
        """{name: {metric: {value, low, high, undefined}}}."""
        return {
            name: {metric: self._interval(values)._asdict() for metric, values in samples.items()}
            for name, samples in self.samples.items()
        }

    def _interval(self, values: np.ndarray) -> metrics.Interval:
        if self.has_intervals:
            return metrics.interval_of_samples(values[0], values[1:])
        return metrics.Interval(float(values[0]), float("nan"), float("nan"), 0)


@dataclass
class Measured:
    """The metrics of one method's or control's maps.

    Attributes:
        per_image: a dict of numbers for each image.
        samples: {metric: (1 + R,) values} over all images.
        strata: the same over the images of each stratum, {name: {metric: values}}.
        ranking: `metrics.Ranking` of all pixels pooled, for curves.
    """

    per_image: list[dict[str, Any]]
    samples: Samples
    strata: dict[str, Samples]
    ranking: metrics.Ranking


def replicate_weights(rows: Sequence[Row], n_bootstrap: int, seed: int) -> np.ndarray:
    """(1 + R, N) float64: each image once, then how often it counts in each replicate; see `patient_weights`."""
    weights = np.ones((1 + n_bootstrap, len(rows)))
    weights[1:] = metrics.patient_weights([row["group"] for row in rows], n_bootstrap, seed)
    return weights


def as_table(samples: dict[str, Samples], weights: np.ndarray) -> Table:
    """The `Table` of metrics over some replicates."""
    return Table(samples, has_intervals=bool((weights != 1).any()))


def measure(
    maps: Mapping[str, Maps],
    rows: Sequence[Row],
    methods: Sequence[Method],
    weights: np.ndarray,
    strata: Mapping[str, np.ndarray],
    folder: Path | None,
    progress: bool,
) -> dict[str, Measured]:
    """Measure methods and controls one after the other, so that only one's tables are in memory.

    Args:
        maps: {name: maps} at the resolution of the images; methods first.
        rows: of these images, all with a true region.
        methods: with their thresholds of Dice, IoU, sensitivity and specificity. The threshold of a control marks as
            many pixels as that of the first method.
        weights: `replicate_weights` of the rows.
        strata: {name: (N,) booleans}.
        folder: for temporary files, see `lazy.stored`; None: without them.
        progress: show a bar.
    """
    truths = masks_of(rows)
    measured: dict[str, Measured] = {}
    thresholds = {method.name: method.threshold for method in methods}
    shapes = [row["truth"].shape for row in rows]
    for name, each in tqdm(maps.items(), "measure", disable=not progress):
        with stored(each, shapes, folder) as own:
            if name in thresholds:
                threshold = thresholds[name]
            elif name == CHANCE or methods[0].threshold is None:  # a constant map cannot mark a part
                threshold = None
            else:
                threshold = pixel_quantiles(own, [1 - marked_share(measured[methods[0].name].per_image)])[0]
            measured[name] = measure_maps(own, truths, threshold, weights, strata)
    return measured


def marked_share(per_image: Sequence[Mapping[str, Any]]) -> float:
    """The share of pixels above the threshold, over all images."""
    marked = sum(n["true_positives"] + n["negatives"] - n["true_negatives"] for n in per_image)
    return marked / sum(n["positives"] + n["negatives"] for n in per_image)


def measure_maps(
    maps: Maps, truths: Maps, threshold: float | None, weights: np.ndarray, strata: Mapping[str, np.ndarray]
) -> Measured:
    """Measure the maps of one method or control; arguments as in `measure`."""
    per_image: list[dict[str, Any]] = []
    ranking = metrics.Ranking(maps, truths, on_image=lambda pixels: per_image.append(measure_image(pixels, threshold)))
    return Measured(
        per_image,
        sample(ranking, per_image, weights),
        {name: sample(ranking, per_image, weights, inside) for name, inside in strata.items()},
        ranking.pooled(),
    )


def measure_image(pixels: metrics.SortedScores, threshold: float | None) -> dict[str, Any]:
    """The metrics of one image, and the pixel counts of sensitivity and specificity; NaN without a threshold."""
    positives, n = len(pixels.positives), len(pixels.values)
    numbers: dict[str, Any] = {
        "pixel_ap": pixels.average_precision(),
        "pixel_auroc": pixels.auroc(),
        "hit": pixels.hit(),
        "prevalence": positives / n,
        "positives": positives,
        "negatives": n - positives,
    }
    if threshold is None:
        return numbers | dict.fromkeys((*MASK_METRICS, "true_positives", "true_negatives"), np.nan)
    true_positives, marked = pixels.count_above(threshold)
    numbers |= {"dice": pixels.dice(threshold), "iou": pixels.iou(threshold)}
    return numbers | {"true_positives": true_positives, "true_negatives": n - positives - (marked - true_positives)}


def sample(
    ranking: metrics.Ranking,
    per_image: Sequence[Mapping[str, Any]],
    weights: np.ndarray,
    inside: np.ndarray | None = None,
) -> Samples:
    """{metric: (1 + R,) values} of pixels and of the images' means; `inside` (N,) booleans: of these images alone."""
    pooled = ranking.measure(weights, inside=inside)
    samples = {metric: pooled[name] for metric, name in POOLED.items()}
    if inside is not None:
        weights = weights * inside
    column = {name: np.array([numbers[name] for numbers in per_image], np.float64) for name in per_image[0]}
    for name in (*METRICS, *MASK_METRICS):
        samples[MEANS.get(name, name)] = metrics.mean_of(column[name])(weights)
    if np.isnan(column["true_positives"]).any():
        undefined = np.full(len(weights), np.nan)
        return samples | {"pixel_sensitivity": undefined, "pixel_specificity": undefined}
    return samples | {
        "pixel_sensitivity": metrics.ratio_of(column["true_positives"], column["positives"])(weights),
        "pixel_specificity": metrics.ratio_of(column["true_negatives"], column["negatives"])(weights),
    }


def strata_of(rows: Sequence[Row], strata: Iterable[str]) -> dict[str, np.ndarray]:
    """{"column = value": (N,) booleans} of each stratum; `view` is one where there are both AP and PA."""
    both_views = {"AP", "PA"} <= {row["view"] for row in rows}
    return {
        f"{column} = {value or 'unknown'}": np.array([row[column] == value for row in rows])
        for column in [*(["view"] if both_views else []), *strata]
        for value in sorted({row[column] for row in rows})
    }


def count_patients(rows: Sequence[Row], inside: np.ndarray) -> int:
    """The number of patients of the rows where `inside`, (N,) booleans, is true."""
    return len({row["group"] for row, ok in zip(rows, inside, strict=True) if ok})


def stratified(
    measured: Mapping[str, Measured],
    rows: Sequence[Row],
    methods: Sequence[str],
    weights: np.ndarray,
    strata: Mapping[str, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """The pixel metrics of each stratum, {"view = AP": {n_images, n_patients, rows, differences}}."""
    parts = {}
    for name, inside in strata.items():
        n_patients = count_patients(rows, inside)
        table = as_table({m: each.strata[name] for m, each in measured.items()}, weights)
        table.has_intervals &= n_patients > 1
        parts[name] = {
            "n_images": int(inside.sum()),
            "n_patients": n_patients,
            "rows": table.intervals(),
            "differences": differences([table], methods, list(measured)),
        }
    return parts


def score_thresholds(scores: Mapping[str, Sequence[float]], n_dataset: int) -> dict[str, float | None]:
    """{name: `SCORE_QUANTILE` of the healthy images' scores, which come last, or None without such images}."""
    return {
        name: float(np.quantile(values[n_dataset:], SCORE_QUANTILE)) if len(values) > n_dataset else None
        for name, values in scores.items()
    }


def image_rates(
    scores: Mapping[str, Sequence[float]],
    rows: Sequence[Row],
    thresholds: Mapping[str, float | None],
    n_bootstrap: int,
    seed: int,
) -> Table:
    """Sensitivity and specificity of the images at a threshold.

    Over the data set's own images: the healthy images that gave the threshold would have the specificity chosen.

    Args:
        scores: {name: at least as many scores as rows}.
        rows: those of the data set.
        thresholds: {name: threshold or None}; an image is called abnormal where its score is greater.
    """
    if not any(row["label"] is not None for row in rows):
        return Table({})
    weights = replicate_weights(rows, n_bootstrap, seed)
    abnormal = np.array([row["label"] not in (None, 0) for row in rows])
    healthy = np.array([row["label"] == 0 for row in rows])

    def rate(called: np.ndarray, images: np.ndarray) -> np.ndarray:
        values = metrics.ratio_of(called & images, images)(weights)
        if count_patients(rows, images) < 2:  # every replicate that has the patient has the same rate
            values[1:] = np.nan
        return values

    samples = {}
    for name, threshold in thresholds.items():
        if threshold is not None:
            called = np.asarray(scores[name][: len(rows)]) > threshold
            samples[name] = {
                "image_sensitivity": rate(called, abnormal),
                "image_specificity": rate(~called, healthy),
            }
    return as_table(samples, weights)


def image_level(scores: Mapping[str, Sequence[float]], rows: Sequence[Row], n_bootstrap: int, seed: int) -> Table:
    """AUROC and average precision of the images' scores, over the images whose label is known."""
    labelled = [i for i, row in enumerate(rows) if row["label"] is not None]
    if not labelled:
        return Table({})
    labels = [rows[i]["label"] for i in labelled]
    weights = replicate_weights([rows[i] for i in labelled], n_bootstrap, seed)
    samples = {}
    for name, values in scores.items():
        measured = metrics.measure_images([values[i] for i in labelled], labels, weights)
        samples[name] = {"image_auroc": measured["auroc"], "image_ap": measured["average_precision"]}
    return as_table(samples, weights)


def image_level_by_view(
    scores: Mapping[str, Sequence[float]], rows: Sequence[Row], n_bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    """`image_level` among the images of one view alone, {"AP": {n_images, n_healthy, rows}}; {} without both views.

    Sicker patients are imaged AP more often, so a score that detects the view appears to detect disease.
    """
    parts = {}
    for view in ("AP", "PA"):
        chosen = [i for i, row in enumerate(rows) if row["label"] is not None and row["view"] == view]
        if not chosen:
            return {}
        own_scores = {name: [values[i] for i in chosen] for name, values in scores.items()}
        parts[view] = {
            "n_images": len(chosen),
            "n_healthy": sum(rows[i]["label"] == 0 for i in chosen),
            "rows": image_level(own_scores, [rows[i] for i in chosen], n_bootstrap, seed).intervals(),
        }
    return parts


def intervals(tables: Iterable[Table]) -> Intervals:
    """The intervals of several tables as one, {name: {metric: {value, low, high, undefined}}}."""
    rows: Intervals = {}
    for table in tables:
        for name, numbers in table.intervals().items():
            rows.setdefault(name, {}).update(numbers)
    return rows


def differences(tables: Iterable[Table], methods: Sequence[str], names: Sequence[str]) -> Intervals:
    """Paired: each method minus each control, and the first method minus each other one; otherwise as `intervals`."""
    subtracted = []
    for table in tables:
        samples = table.samples
        paired = {
            f"{a} - {b}": {metric: values - samples[b][metric] for metric, values in samples[a].items()}
            for a, b in pairs(methods, names)
            if a in samples and b in samples
        }
        subtracted.append(Table(paired, table.has_intervals))
    return intervals(subtracted)


def pairs(methods: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of names to subtract: see `differences`."""
    others = [(methods[0], other) for other in methods[1:]]
    controls = [name for name in names if name not in methods]
    # the mean map of another method is not a control of this one
    return others + [
        (m, c)
        for m in methods
        for c in controls
        if not c.startswith(MEAN) or c.removesuffix(GATED) == mean_map_of(m, methods)
    ]
