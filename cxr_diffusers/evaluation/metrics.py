"""Numbers from maps, masks and scores: arrays in, numbers out, NaN where a number is not defined."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

FPR_LIMIT = 0.3  # of AUPRO: beyond it more than a third of the healthy tissue is marked
SSIM_RADIUS = 5  # pixels that scikit-image's Gaussian window of sigma 1.5 reaches


def pixel_average_precision(anomaly_map, truth):
    """Average precision of the pixels: 1 is perfect, the share of positive pixels is chance.

    Args:
        anomaly_map: array of any shape, higher is more abnormal; or a list of arrays, whose pixels are pooled.
        truth: booleans of the same shape(s).

    Returns:
        float; NaN without a positive pixel.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    from sklearn.metrics import average_precision_score

    scores, truth = pool(anomaly_map, truth)
    return float(average_precision_score(truth, scores)) if truth.any() else float("nan")


def pixel_auroc(anomaly_map, truth):
    """Area under the ROC curve of the pixels; arguments as in `pixel_average_precision`. NaN with one class only."""
    from sklearn.metrics import roc_auc_score

    scores, truth = pool(anomaly_map, truth)
    return float(roc_auc_score(truth, scores)) if truth.any() and not truth.all() else float("nan")


def image_average_precision(scores, labels):
    """(N,) scores, (N,) labels (0 healthy, others abnormal) -> average precision; NaN without an abnormal image."""
    return pixel_average_precision(np.asarray(scores), np.asarray(labels) != 0)


def image_auroc(scores, labels):
    """(N,) scores, (N,) labels (0 healthy, others abnormal) -> area under the ROC curve; NaN with one class only."""
    return pixel_auroc(np.asarray(scores), np.asarray(labels) != 0)


def dice(mask, truth):
    """2 |P and T| / (|P| + |T|) of two boolean arrays of one shape; NaN without a true pixel: nothing to find."""
    mask, truth = pool(mask, truth)
    mask = mask.astype(bool)
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum())) if truth.any() else float("nan")


def iou(mask, truth):
    """|P and T| / |P or T| of two boolean arrays of one shape; NaN without a true pixel: nothing to find."""
    mask, truth = pool(mask, truth)
    mask = mask.astype(bool)
    return float((mask & truth).sum() / (mask | truth).sum()) if truth.any() else float("nan")


def best_dice(anomaly_map, truth):
    """The Dice of the best single threshold: an upper bound, since the truth chose the threshold.

    Arguments as in `pixel_average_precision`; the pixels of a list are pooled and share the threshold.

    Returns:
        (dice, threshold): the mask is `anomaly_map >= threshold`; NaN, NaN without a positive pixel.
    """
    scores, truth = pool(anomaly_map, truth)
    if not truth.any():
        return float("nan"), float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(truth[order])
    last = np.append(scores[1:] != scores[:-1], True)  # equal values pass a threshold together
    values = (2 * found / (np.arange(1, len(scores) + 1) + found[-1]))[last]
    return float(values.max()), float(scores[last][values.argmax()])


def hit(anomaly_map, truth):
    """1 where the map's maximum lies inside the true region, 0 where not (hit rate of CheXlocalize).

    Saporta et al. 2022 (https://doi.org/10.1038/s42256-022-00536-x) call it the most representative point. Pixels that
    share the maximum share the hit, so a constant map has the region's share of the picture, not the luck of a corner.

    Args:
        anomaly_map: (H, W).
        truth: (H, W) booleans; boxes count as regions, see `box_mask`.

    Returns:
        float in [0, 1]; NaN without a true pixel.
    """
    scores, truth = pool(anomaly_map, truth)
    return float(truth[scores == scores.max()].mean()) if truth.any() else float("nan")


def hit_rate(maps, truths):
    """Mean of `hit` over the images of two lists; images without a true pixel are left out, NaN if all are."""
    hits = np.array([hit(m, t) for m, t in zip(maps, truths, strict=True)])
    return float(np.nanmean(hits)) if np.isfinite(hits).any() else float("nan")


def aupro(anomaly_map, truth, fpr_limit=FPR_LIMIT):
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    Bergmann et al. 2020 (https://arxiv.org/abs/1911.02357), section 5.2: at each threshold the mean over the connected
    true regions of the share of the region that is found, so that a small lesion weighs as much as a large one. Regions
    are 8-connected; the false-positive rate is pooled over all pixels.

    Args:
        anomaly_map: (H, W), or a list of such.
        truth: booleans of the same shape(s).
        fpr_limit: in (0, 1].

    Returns:
        float in [0, 1]; NaN without a positive or without a negative pixel.
    """
    if not isinstance(anomaly_map, list):
        anomaly_map, truth = [anomaly_map], [truth]
    return float(Ranking(anomaly_map, truth, max_cuts=None).aupro(fpr_limit=fpr_limit))


# of one image, (map, truth) and (mask, truth); a new entry is a new column of per_image.csv and a mean in summary.json
METRICS = {"pixel_ap": pixel_average_precision, "pixel_auroc": pixel_auroc, "hit": hit}
MASK_METRICS = {"dice": dice, "iou": iou}


def psnr(image, reference, data_range=1.0, outside=None):
    """Peak signal-to-noise ratio in dB of two (H, W) arrays; with `outside` (H, W) booleans, of the other pixels only.

    Infinite for equal pictures, NaN if `outside` leaves no pixel.
    """
    image, reference = same_shape(np.asarray(image, np.float64), np.asarray(reference, np.float64))
    keep = np.ones(image.shape, bool) if outside is None else ~np.asarray(outside, bool)
    if not keep.any():
        return float("nan")
    error = np.mean((image[keep] - reference[keep]) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error else float("inf")


def ssim(image, reference, data_range=1.0, outside=None):
    """Structural similarity (Wang et al. 2004, their Gaussian window of sigma 1.5) of two (H, W) arrays.

    With `outside` (H, W) booleans it is the mean over those pixels whose window does not touch the region, so it says
    how well the rest of the picture was kept. NaN if no such pixel is left.

    Raises:
        ValueError: from scikit-image, for pictures under 11 pixels.
    """
    from skimage.metrics import structural_similarity

    image, reference = same_shape(np.asarray(image, np.float64), np.asarray(reference, np.float64))
    value, local = structural_similarity(
        image, reference, data_range=data_range, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    if outside is None:
        return float(value)
    keep = ~ndimage.maximum_filter(np.asarray(outside, bool), size=2 * SSIM_RADIUS + 1)
    return float(local[keep].mean()) if keep.any() else float("nan")


def box_mask(boxes, height, width):
    """Union of [x, y, w, h] boxes in pixels -> (height, width) booleans: the pixels whose centre lies in a box.

    A box too thin to hold a centre keeps the one pixel it lies in; what reaches over the border is cut.

    Raises:
        ValueError: not four finite numbers, a side of 0 or less, or a box wholly outside the picture.
    """
    mask = np.zeros((height, width), bool)
    for box in boxes:
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) <= 0:
            raise ValueError(f"expected a box [x, y, w, h] with positive sides, got {list(box)}")
        x, y, w, h = map(float, box)
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise ValueError(f"expected a box inside the picture of {width} x {height} pixels, got {list(box)}")
        mask[_centres(y, h, height), _centres(x, w, width)] = True
    return mask


def _centres(start, length, size):
    """The pixels of 0..size whose centre lies in [start, start + length), at least one, as a slice."""
    first, stop = int(np.ceil(start - 0.5)), int(np.ceil(start + length - 0.5))
    if stop <= first:
        first = int(np.floor(start + length / 2))
    first = min(max(first, 0), size - 1)
    return slice(first, max(stop, first + 1))


class Ranking:
    """The scores of a set of images, sorted once, so that a bootstrap may weigh the images anew at little cost.

    It keeps how many pixels of each image lie above each of many cuts. The counts of a weighted set are then one
    matrix product, and every number below follows from them. Cuts are taken at the values of positive pixels, just
    above and just below each: with all of them (`max_cuts=None`) the results are exact; with fewer, each is still an
    exact point of the curve and only the steps between are coarser (4096: under 1e-3 of scikit-learn's).

    Args:
        scores: sequence of arrays, one an image; higher is more abnormal. Scores of whole images: arrays of one number.
        truths: sequence of boolean arrays of the same shapes.
        max_cuts: at most so many positive values are cut at, evenly over their ranks; None: all.
    """

    def __init__(self, scores, truths, max_cuts=4096):
        if len(scores) != len(truths) or len(scores) == 0:
            raise ValueError(f"expected as many scores as truths, at least one, got {len(scores)} and {len(truths)}")
        positive = [s[t] for s, t in (pool(s, t) for s, t in zip(scores, truths, strict=True))]
        cuts = np.unique(np.concatenate(positive))[::-1]
        if max_cuts is not None and len(cuts) > max_cuts:
            cuts = cuts[np.linspace(0, len(cuts) - 1, max_cuts).round().astype(int)]
        n = len(scores)
        # columns: more than the highest cut, at least the highest cut, more than the second, ...
        self.found, self.marked, self.overlap = np.zeros((3, n, 2 * len(cuts)))
        self.positives, self.pixels, self.regions = np.zeros((3, n))
        for i, (score, truth) in enumerate(zip(scores, truths, strict=True)):
            weight, self.regions[i] = _region_weights(np.asarray(truth, bool))
            score, truth = pool(score, truth)
            self.positives[i], self.pixels[i] = truth.sum(), truth.size
            self.marked[i] = _mass_above(score, None, cuts)
            self.found[i] = _mass_above(score[truth], None, cuts)
            self.overlap[i] = _mass_above(score[truth], weight, cuts)

    def average_precision(self, weights=None):
        """Pooled average precision; `weights` (N,) or (R, N): how often each image counts. -> number, or (R,)."""
        return self._weighed(_average_precision, weights, self.found, self.positives)

    def auroc(self, weights=None):
        """Pooled area under the ROC curve; `weights` as in `average_precision`."""
        return self._weighed(_area, weights, self.found, self.positives)

    def aupro(self, weights=None, fpr_limit=FPR_LIMIT):
        """Area under the per-region overlap curve, see the function `aupro`; `weights` as in `average_precision`."""
        return self._weighed(_area, weights, self.overlap, self.regions, fpr_limit)

    def best_dice(self, weights=None):
        """Dice at the pooled set's best threshold; `weights` as in `average_precision`."""
        return self._weighed(_best_dice, weights, self.found, self.positives)

    def curve(self):
        """Three (K,) arrays along falling thresholds: recall, precision, false-positive rate; without chance's ends."""
        found, marked = self.found.sum(0), self.marked.sum(0)
        some = marked > 0
        found, marked = found[some], marked[some]
        positives, pixels = self.positives.sum(), self.pixels.sum()
        return found / positives, found / marked, (marked - found) / max(pixels - positives, 1)

    @property
    def prevalence(self):
        """The share of positive pixels: the average precision of chance."""
        return self.positives.sum() / self.pixels.sum()

    def _weighed(self, function, weights, above, total, *args, rows=128):
        weights = np.ones(len(self.pixels)) if weights is None else np.asarray(weights, np.float64)
        table = np.atleast_2d(weights)
        values = np.full(len(table), np.nan)
        for start in range(0, len(table), rows):  # in slices, so that 1000 replicates need no gigabytes
            w = table[start : start + rows]
            positives, pixels = w @ self.positives, w @ self.pixels
            ok = (positives > 0) & ((pixels > positives) | (function is not _area))
            w = w[ok]
            if len(w):
                found, marked = w @ self.found, w @ self.marked
                share = found if above is self.found else w @ above
                counts = (share, (w @ total)[:, None], marked - found, marked, (pixels - positives)[ok, None])
                values[np.flatnonzero(ok) + start] = function(*counts, *args)
        return values if weights.ndim == 2 else values[0]


def _average_precision(found, positives, false, marked, negatives):
    precision = found / np.maximum(marked, 1)
    return (np.diff(found, axis=1, prepend=0) * precision).sum(1) / positives[:, 0]


def _best_dice(found, positives, false, marked, negatives):
    return (2 * found / (marked + positives)).max(1)


def _area(share, total, false, marked, negatives, limit=1.0):
    """Area under the polygon (false / negatives, share / total) from 0 to `limit`, divided by `limit`."""
    edge = np.ones((len(share), 1))
    x = np.hstack([0 * edge, false / negatives, edge])
    y = np.hstack([0 * edge, share / total, edge])
    width = np.diff(x, axis=1)
    kept = np.clip(limit - x[:, :-1], 0, width)  # of the segment that crosses the limit only the part before it
    slope = np.divide(np.diff(y, axis=1), width, out=np.zeros_like(width), where=width > 0)
    return (kept * (y[:, :-1] + slope * kept / 2)).sum(1) / limit


def _mass_above(values, weights, cuts):
    """For each cut, descending: the number (or weight) of `values` above it, then of those at least as high."""
    order = np.argsort(values)
    values = values[order]
    mass = np.arange(len(values), -1, -1.0) if weights is None else _suffix_sums(weights[order])
    above, at_least = (np.searchsorted(values, cuts, side) for side in ("right", "left"))
    return np.stack([mass[above], mass[at_least]], axis=1).ravel()


def _suffix_sums(weights):
    return np.append(np.cumsum(weights[::-1])[::-1], 0.0)


def _region_weights(truth):
    """Booleans -> (1 / size of its 8-connected region for each true pixel, number of regions)."""
    regions, n = ndimage.label(truth, structure=np.ones((3,) * truth.ndim))
    return (1.0 / np.bincount(regions.ravel())[regions[truth]] if n else np.zeros(0)), n


class Interval(NamedTuple):
    """A number, its bootstrap interval, and how many replicates had no value."""

    value: float
    low: float
    high: float
    undefined: int


def patient_weights(groups, n=1000, seed=0):
    """How often each image counts in each replicate of a bootstrap over patients.

    Args:
        groups: (N,) the patient of each image; all images of a patient are drawn together.
        n: number of replicates.
        seed: of the draws.

    Returns:
        (n, N) integers.
    """
    if len(groups) == 0:
        raise ValueError("expected the patient of at least one image, got none")
    patients, member = np.unique(list(groups), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=n)
    return draws[:, member]


def bootstrap_interval(statistic, groups, n=1000, level=0.95, seed=0):
    """Percentile bootstrap interval of a number, by patient (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: `statistic(weights)`: (R, N) counts of the images -> (R,) values. `Ranking(...).average_precision`,
            `mean_of(values)`.
        groups: (N,) the patient of each image.
        n, level, seed: number of replicates, coverage, seed of the draws.

    Returns:
        `Interval`; its bounds are NaN with fewer than two patients, or where no replicate has a value.
    """
    return interval_of(statistic, patient_weights(groups, n, seed), level)


def paired_difference_interval(statistic_a, statistic_b, groups, n=1000, level=0.95, seed=0):
    """Interval of `a - b` over the same replicates; arguments as in `bootstrap_interval`. Excludes 0: they differ."""
    return bootstrap_interval(lambda w: statistic_a(w) - statistic_b(w), groups, n, level, seed)


def interval_of(statistic, weights, level=0.95):
    """`bootstrap_interval` with the (R, N) replicates of `patient_weights` drawn before."""
    weights = np.asarray(weights)
    value = statistic(np.ones((1, weights.shape[1])))[0]
    if (weights == 1).all():  # one patient: every replicate is the set itself
        return Interval(float(value), float("nan"), float("nan"), 0)
    samples = statistic(weights)
    defined = samples[np.isfinite(samples)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), int(len(samples) - len(defined)))


def mean_of(values):
    """(N,) numbers of the images -> the statistic "their mean"; images whose number is NaN are left out."""
    values = np.asarray(values, np.float64)
    defined = np.isfinite(values)

    def mean(weights):
        weights = np.asarray(weights, np.float64)
        count = weights @ defined
        total = weights @ np.where(defined, values, 0.0)
        return np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0)

    return mean


def ratio_of(parts, wholes):
    """(N,) counts of a part and of its whole -> the statistic "their pooled ratio"; NaN where the whole is empty."""
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)

    def ratio(weights):
        weights = np.asarray(weights, np.float64)
        part, whole = weights @ parts, weights @ wholes
        return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)

    return ratio


def pool(scores, truth):
    """Two arrays, or two lists of arrays, of the same shapes -> flat scores and flat booleans.

    Raises:
        ValueError: shapes that differ, or scores that are not finite.
    """
    if isinstance(scores, list):
        pairs = [pool(s, t) for s, t in zip(scores, truth, strict=True)]
        return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))
    scores, truth = same_shape(np.asarray(scores), np.asarray(truth))
    if not np.isfinite(scores).all():
        raise ValueError("expected finite values, got NaN or infinity in a map")
    return scores.ravel(), truth.ravel().astype(bool)


def same_shape(a, b):
    """Both arrays as they came, or ValueError if their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape, got {a.shape} and {b.shape}")
    return a, b
