"""Maps -> numbers with intervals, over the same replicates for all methods, so that they can be subtracted.

A statistic is a function of the images' weights, (R, N) -> (R,): how often each image counts in each replicate.
"""

import hashlib

import numpy as np
from tqdm.auto import tqdm

from . import metrics
from .controls import CHANCE, GATED, MEAN, mean_map_of
from .masks import healthy_threshold

MEANS = {"pixel_ap": "pixel_ap_mean", "pixel_auroc": "pixel_auroc_mean", "hit": "hit_rate"}  # others: the same
SCORE_QUANTILE = 0.95  # of the healthy images' scores: an image above it is called abnormal
UNKNOWN = dict.fromkeys((*metrics.METRICS, *metrics.MASK_METRICS, "prevalence"), np.nan)


def threshold_of(method, healthy_rows, quantile, smoothing):
    """From healthy validation images, or else the pipeline's own; None if there is neither."""
    if not healthy_rows:
        return method.option("map_threshold")
    return healthy_threshold(method.restored(method.healthy_answers, healthy_rows, smoothing), quantile)


def equal_thresholds(maps, methods):
    """{name: threshold or None}: of a method its own, of a control what marks as many pixels as the first method."""
    thresholds = dict.fromkeys(maps) | {method.name: method.threshold for method in methods}
    first = methods[0]
    if first.threshold is None or len(maps[first.name]) == 0:
        return thresholds
    share = np.mean(all_pixels(maps[first.name]) > first.threshold)
    for name in set(maps) - {method.name for method in methods} - {CHANCE}:  # a constant map has no part to mark
        thresholds[name] = float(np.quantile(all_pixels(maps[name]), 1 - share))
    return thresholds


def all_pixels(maps):
    return np.concatenate([np.ravel(m) for m in maps])


def measure(maps, rows, thresholds, progress):
    """{name: (a dict of numbers an image, `Ranking` of all pixels)}; all of these images have a true region."""
    if not rows:
        return dict.fromkeys(maps, ([], None))
    truths = [row["truth"] for row in rows]
    measured = {}
    for name, found in tqdm(maps.items(), "measure", disable=not progress):
        numbers = [measure_image(m, t, thresholds[name]) for m, t in zip(found, truths, strict=True)]
        measured[name] = numbers, metrics.Ranking(found, truths)
    return measured


def measure_image(found, truth, threshold):
    numbers = {name: metric(found, truth) for name, metric in metrics.METRICS.items()}
    for name, metric in metrics.MASK_METRICS.items():
        numbers[name] = np.nan if threshold is None else metric(found > threshold, truth)
    numbers["sensitivity"], numbers["specificity"] = rates(found, truth, threshold)
    return {**numbers, "prevalence": float(truth.mean())}


def rates(anomaly_map, truth, threshold):
    """((true positives, positives), (true negatives, negatives)) of an image's pixels; NaN without a threshold."""
    if threshold is None:
        return (np.nan, np.nan), (np.nan, np.nan)
    marked = anomaly_map > threshold
    return (np.sum(marked & truth), np.sum(truth)), (np.sum(~marked & ~truth), np.sum(~truth))


def pixel_level(measured, rows, n_bootstrap, seed):
    """-> ({method: {number: statistic}}, replicates) of the pixels and of the per-image numbers' means."""
    if not rows:
        return {}, None
    statistics = {}
    for name, (numbers, ranking) in measured.items():
        found = {
            "pixel_ap": ranking.average_precision,
            "pixel_auroc": ranking.auroc,
            "aupro": ranking.aupro,
            "best_dice": ranking.best_dice,
        }
        for column in (*metrics.METRICS, *metrics.MASK_METRICS):
            found[MEANS.get(column, column)] = metrics.mean_of([n[column] for n in numbers])
        for rate in ("sensitivity", "specificity"):
            found[f"pixel_{rate}"] = metrics.ratio_of(*np.array([n[rate] for n in numbers]).T)
        statistics[name] = {number: remember(statistic) for number, statistic in found.items()}
    return statistics, metrics.patient_weights([row["group"] for row in rows], n_bootstrap, seed)


def score_thresholds(scores, n_dataset):
    """{name: `SCORE_QUANTILE` of the healthy images' scores, which come last, or None without such images}."""
    return {
        name: float(np.quantile(values[n_dataset:], SCORE_QUANTILE)) if len(values) > n_dataset else None
        for name, values in scores.items()
    }


def image_rates(scores, rows, thresholds, n_bootstrap, seed):
    """-> ({method: {number: statistic}}, replicates): sensitivity and specificity of the images at a threshold.

    Over the data set's own images: the healthy images that gave the threshold would have the specificity chosen.

    Args:
        scores: {name: at least as many scores as rows}.
        rows: those of the data set.
        thresholds: {name: threshold or None}; an image is called abnormal where its score is greater.
    """
    if not any(row["label"] is not None for row in rows):
        return {}, None
    abnormal = np.array([row["label"] not in (None, 0) for row in rows])
    normal = np.array([row["label"] == 0 for row in rows])
    statistics = {}
    for name, threshold in thresholds.items():
        if threshold is not None:
            called = np.asarray(scores[name][: len(rows)]) > threshold
            statistics[name] = {
                "image_sensitivity": metrics.ratio_of(called & abnormal, abnormal),
                "image_specificity": metrics.ratio_of(~called & normal, normal),
            }
    return statistics, metrics.patient_weights([row["group"] for row in rows], n_bootstrap, seed)


def image_level(scores, rows, n_bootstrap, seed):
    """-> ({method: {number: statistic}}, replicates), over the images whose label is known."""
    known = [i for i, row in enumerate(rows) if row["label"] is not None]
    if not known:
        return {}, None
    truths = [np.array([rows[i]["label"] != 0]) for i in known]
    statistics = {}
    for name, values in scores.items():
        ranking = metrics.Ranking([np.array([values[i]]) for i in known], truths, max_cuts=None)
        statistics[name] = {"image_auroc": remember(ranking.auroc), "image_ap": remember(ranking.average_precision)}
    return statistics, metrics.patient_weights([rows[i]["group"] for i in known], n_bootstrap, seed)


def image_level_by_view(scores, rows, n_bootstrap, seed):
    """The image numbers among the images of one view alone, {"AP": {n_images, n_healthy, rows}}, where there are both.

    Sicker patients are imaged AP more often, so a score that detects the view appears to detect disease.
    """
    known = [i for i, row in enumerate(rows) if row["label"] is not None]
    found = {}
    for view in ("AP", "PA"):
        chosen = [i for i in known if rows[i]["view"] == view]
        part = {name: [values[i] for i in chosen] for name, values in scores.items()}
        table = image_level(part, [rows[i] for i in chosen], n_bootstrap, seed)
        found[view] = {
            "n_images": len(chosen),
            "n_healthy": sum(rows[i]["label"] == 0 for i in chosen),
            "rows": intervals([table]),
        }
    return found if all(part["n_images"] for part in found.values()) else {}


def remember(statistic):
    """The same statistic; asked again with the same weights (each is, for its differences), it does not compute."""
    seen = {}

    def remembered(weights):
        key = hashlib.blake2b(np.ascontiguousarray(weights, np.float64)).digest()
        if key not in seen:
            seen[key] = statistic(weights)
        return seen[key]

    return remembered


def intervals(tables):
    """[({name: {number: statistic}}, replicates), ...] -> {name: {number: {value, low, high, undefined}}}."""
    found = {}
    for statistics, weights in tables:
        for name, numbers in statistics.items():
            for number, statistic in numbers.items():
                found.setdefault(name, {})[number] = metrics.interval_of(statistic, weights)._asdict()
    return found


def differences(tables, methods, names):
    """Paired: each method minus each control, and the first method minus each other one; otherwise as `intervals`."""
    minuses = []
    for statistics, weights in tables:
        both = {
            f"{a} - {b}": {n: minus(statistics[a][n], statistics[b][n]) for n in statistics[a]}
            for a, b in pairs(methods, names)
            if b in statistics
        }
        minuses.append((both, weights))
    return intervals(minuses)


def pairs(methods, names):
    others = [(methods[0], other) for other in methods[1:]]
    controls = [name for name in names if name not in methods]
    # the mean map of another method is no control of this one
    return others + [
        (m, c)
        for m in methods
        for c in controls
        if not c.startswith(MEAN) or c.removesuffix(GATED) == mean_map_of(m, methods)
    ]


def minus(a, b):
    return lambda weights: a(weights) - b(weights)


def stratified(table, rows, strata, names):
    """The pixel numbers of each stratum, {"view = AP": {n_images, n_patients, rows}}."""
    both_views = {"AP", "PA"} <= {row["view"] for row in rows}
    return {
        f"{column} = {value or 'unknown'}": stratum(table, rows, column, value, names)
        for column in [*(["view"] if both_views else []), *strata]
        for value in sorted({row[column] for row in rows})
    }


def stratum(table, rows, column, value, names):
    statistics, weights = table
    inside = np.array([row[column] == value for row in rows])
    inner = {name: {n: masked(statistic, inside) for n, statistic in statistics[name].items()} for name in names}
    return {
        "n_images": int(inside.sum()),
        "n_patients": len({row["group"] for row, ok in zip(rows, inside, strict=True) if ok}),
        "rows": intervals([(inner, weights)]),
    }


def masked(statistic, inside):
    """The statistic of the images inside: the others weigh 0."""
    return lambda weights: statistic(weights * inside)
