"""Quality of counterfactuals: whether a judge calls them healthy, resemble healthy images, and keep the rest."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import metrics
from .controls import BLURRED, SPLIT, UNCHANGED
from .feature_distances import frechet_distance, kernel_distance_of
from .judge import HEALTHY, classify_images, is_its_own_judge
from .lazy import Lazy
from .masks import smooth_map
from .predictions import Predictions
from .truth import Row, has_region

SIMILARITIES = ("psnr_outside", "ssim_outside")
BLUR = 0.05  # sigma, as a fraction of the side: it destroys the evidence without treating the disease
SPLITS = 20  # halves of one set differ by chance: a mean over several

Metrics = dict[str, dict[str, Any]]  # {metric: {value, low, high, undefined}}
Calls = tuple[np.ndarray, np.ndarray]  # probabilities and features, see `classify_images`


def counterfactual_level(
    pipelines: Mapping[str, Any],
    predictions: Mapping[str, Predictions],
    rows: Sequence[Row],
    healthy_rows: Sequence[Row],
    per_image: pd.DataFrame,
    *,
    judge: Any = None,
    n_bootstrap: int,
    seed: int,
    progress: bool = False,
) -> dict[str, Any]:
    """The section "counterfactuals" of summary.json.

        psnr_outside, ssim_outside   of counterfactual and image, outside the true region, over the images with one
        flip_rate                    of the diseased images that the judge calls diseased (its most probable class is
                                     not 0), the share whose counterfactual it calls healthy
        p_healthy_moved              probability of class 0, counterfactual - image: mean over the diseased images
        p_healthy_moved_healthy      likewise over the healthy images, where it should not change
        kid, fid                     of the diseased images' counterfactuals to the healthy images, over the judge's
                                     features

    Diseased are the images of the data set with a label other than 0, or with a region where no label is known;
    healthy are those of label 0 or, if the data set has none, `healthy_rows`.

    Args:
        pipelines: {method: pipeline}.
        predictions: {method: its predictions of the data set, then of the healthy images}.
        rows, healthy_rows: `describe_row` of the data set and of the healthy images.
        per_image: the table of all methods; with a judge it gains p_healthy, p_healthy_counterfactual and flipped.
        judge: see `judge.check_judge`; None: only the similarity outside the true region.

    Returns:
        a dict with `rows` {name: {metric: {value, low, high, undefined}}}, `not_measured` {method: reason} and, with a
        judge, its classes, the numbers of diseased and healthy images, how many of the former it calls diseased, and
        its own AUROC on them.
    """
    everything = [*rows, *healthy_rows]
    weights = metrics.patient_weights([row["group"] for row in everything], n_bootstrap, seed)
    section: dict[str, Any] = {"rows": {}, "not_measured": {}}
    judged = {}
    for name, each in predictions.items():
        if without_counterfactual(each):
            section["not_measured"][name] = "it has no counterfactual"
            continue
        section["rows"][name] = similarity(per_image[per_image.method == name], rows, weights)
        if judge is not None and is_its_own_judge(pipelines[name], judge):
            section["not_measured"][name] = "the judge is its own classifier"
        elif judge is not None:
            judged[name] = each
    if not judged:
        return section
    return {**section, **judge_all(judged, section["rows"], everything, len(rows), per_image, judge, weights, progress)}


def joined(first: Predictions, second: Predictions) -> Predictions:
    """Two sequences of predictions as one."""
    n = len(first)
    return Predictions(n + len(second), lambda i, name: first.read(i, name) if i < n else second.read(i - n, name))


def images_of(predictions: Predictions, key: str) -> Lazy[np.ndarray]:
    """The images or counterfactuals of some predictions, (S, S) float32."""
    column = predictions.column(key)
    return Lazy(len(column), lambda i: column[i].astype(np.float32))


def without_counterfactual(predictions: Predictions) -> bool:
    """Whether every counterfactual is the image itself, as that of a method that makes none."""
    columns = (predictions.column(key) for key in ("image", "counterfactual"))
    return all(np.array_equal(image, counterfactual) for image, counterfactual in zip(*columns, strict=True))


def similarity(table: pd.DataFrame, rows: Sequence[Row], weights: np.ndarray) -> Metrics:
    """The means of PSNR and SSIM outside the true region, over the images that have one."""
    table = table[table.part == "dataset"]
    with_region = np.array([has_region(row) for row in rows])
    means = {}
    for name in SIMILARITIES:
        values = np.where(with_region, table[name].to_numpy(np.float64), np.nan)
        means[name] = mean_interval(values, [row["group"] for row in rows], weights[:, : len(rows)])
    return means


def judge_all(
    judged: Mapping[str, Predictions],
    metric_rows: dict[str, Metrics],
    rows: Sequence[Row],
    n_dataset: int,
    per_image: pd.DataFrame,
    judge: Any,
    weights: np.ndarray,
    progress: bool,
) -> dict[str, Any]:
    """The judge's part of the section; its metrics are added to `metric_rows` and to `per_image`."""
    diseased, healthy = diseased_and_healthy(rows, n_dataset)
    groups = [row["group"] for row in rows]
    section: dict[str, Any] = {
        "classes": getattr(judge, "class_names", []),
        "n_diseased": int(diseased.sum()),
        "n_healthy": int(healthy.sum()),
        "n_called_diseased": {},
        "judge_auroc": {},
    }
    for column in ("p_healthy", "p_healthy_counterfactual", "flipped"):
        per_image[column] = np.nan
    for position, (name, predictions) in enumerate(judged.items()):
        images = images_of(predictions, "image")
        before = classify_images(judge, images, progress=progress, desc=f"judge, {name}")
        versions: dict[str, Any] = {name: images_of(predictions, "counterfactual")}
        if position == 0:  # controls are made from the images as the first method returns them
            versions |= {UNCHANGED: None, BLURRED: blurred(images)}
        for version, changed in versions.items():
            after = before
            if changed is not None:
                after = classify_images(judge, changed, images, progress=progress, desc=version)
            means, flipped = compare_calls(before, after, diseased, healthy, groups, weights)
            metric_rows.setdefault(version, {}).update(means)
            if version == name:
                lines = per_image.index[per_image.method == name]
                per_image.loc[lines, "p_healthy"] = before[0][:, HEALTHY]
                per_image.loc[lines, "p_healthy_counterfactual"] = after[0][:, HEALTHY]
                per_image.loc[lines, "flipped"] = flipped
        if position == 0 and healthy.any():
            metric_rows[SPLIT] = split_in_two(
                before[1][healthy], [g for g, h in zip(groups, healthy, strict=True) if h]
            )
        section["n_called_diseased"][name] = int((diseased & (before[0].argmax(1) != HEALTHY)).sum())
        section["judge_auroc"][name] = judge_auroc(before[0], diseased, healthy)
    order = [*judged, *(name for name in metric_rows if name not in judged)]
    section["rows"] = {name: metric_rows[name] for name in order}
    return section


def blurred(images: Lazy[np.ndarray]) -> Lazy[np.ndarray]:
    """The images, smoothed by `BLUR`."""
    return Lazy(len(images), lambda i: smooth_map(images[i], BLUR * min(images[i].shape)))


def diseased_and_healthy(rows: Sequence[Row], n_dataset: int) -> tuple[np.ndarray, np.ndarray]:
    """Two (N,) masks: diseased images of the data set; its healthy ones or, without any, the healthy images."""
    in_dataset = np.arange(len(rows)) < n_dataset
    label = np.array([-1 if row["label"] is None else row["label"] for row in rows])
    abnormal = np.array([has_region(row) and not row["contradicted"] for row in rows])
    diseased = in_dataset & ((label > 0) | ((label == -1) & abnormal))
    own = in_dataset & (label == 0)
    return diseased, own if own.any() else ~in_dataset


def compare_calls(
    before: Calls,
    after: Calls,
    diseased: np.ndarray,
    healthy: np.ndarray,
    groups: Sequence[Any],
    weights: np.ndarray,
) -> tuple[Metrics, np.ndarray]:
    """The judge's calls of images and of their counterfactuals -> metrics, and (N,) 1 flipped, 0 not, or NaN."""
    called = before[0].argmax(1) != HEALTHY
    flipped = np.where(diseased & called, after[0].argmax(1) == HEALTHY, np.nan)
    moved = after[0][:, HEALTHY] - before[0][:, HEALTHY]
    both = np.concatenate([after[1][diseased], before[1][healthy]])
    chosen = np.concatenate([np.flatnonzero(diseased), np.flatnonzero(healthy)])
    side = np.arange(len(chosen)) < diseased.sum()
    measured = {
        "flip_rate": mean_interval(flipped, groups, weights),
        "p_healthy_moved": mean_interval(np.where(diseased, moved, np.nan), groups, weights),
        "p_healthy_moved_healthy": mean_interval(np.where(healthy, moved, np.nan), groups, weights),
    }
    if side.any() and not side.all():
        distance = kernel_distance_of(both, side, ~side, [groups[i] for i in chosen])
        measured["kid"] = interval(distance, weights[:, chosen])
        measured["fid"] = without_interval(frechet_distance(both[side], both[~side]))
    return measured, flipped


def split_in_two(features: np.ndarray, groups: Sequence[Any]) -> Metrics:
    """Healthy against healthy: mean distances of random halves, split by patient, which no method can improve on."""
    patients, member = np.unique(groups, return_inverse=True)
    kids, fids = [], []
    for seed in range(SPLITS):
        first = np.random.default_rng(seed).permutation(len(patients)) < len(patients) // 2
        half = first[member]
        statistic = kernel_distance_of(features, half, ~half, groups)
        kids.append(statistic(np.ones((1, len(groups))))[0])
        fids.append(frechet_distance(features[half], features[~half]))
    return {"kid": without_interval(np.mean(kids)), "fid": without_interval(np.mean(fids))}


def judge_auroc(probabilities: np.ndarray, diseased: np.ndarray, healthy: np.ndarray) -> float:
    """The judge's own AUROC, diseased against healthy images."""
    labelled = diseased | healthy
    return metrics.image_auroc(1 - probabilities[labelled, HEALTHY], diseased[labelled])


def interval(statistic: metrics.Statistic, weights: np.ndarray) -> dict[str, Any]:
    """`metrics.interval_of` as a dict."""
    return metrics.interval_of(statistic, weights)._asdict()


def mean_interval(values: np.ndarray, groups: Sequence[Any], weights: np.ndarray) -> dict[str, Any]:
    """`interval` of the mean of the defined values; without bounds if these are of one patient."""
    mean = metrics.mean_of(values)
    if len({group for group, value in zip(groups, values, strict=True) if np.isfinite(value)}) < 2:
        return without_interval(mean(np.ones((1, len(values))))[0])
    return interval(mean, weights)


def without_interval(value: float | np.floating) -> dict[str, Any]:
    """A metric without an interval: one of a single patient, or the FID.

    The fewer different images of a bootstrap replicate would bias the FID further.
    """
    return metrics.Interval(float(value), float("nan"), float("nan"), 0)._asdict()
