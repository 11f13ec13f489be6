"""Metrics of maps, masks and scores: arrays in, numbers out, NaN where a metric is not defined."""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

FPR_LIMIT = 0.3  # of AUPRO: beyond it more than a third of the healthy tissue is marked
SSIM_RADIUS = 5  # pixels that scikit-image's Gaussian window of sigma 1.5 reaches
MAX_CUTS = 4096  # of a `Ranking`
MAX_VALUES = 2**25  # positive values from which the cuts are chosen: 128 MiB in float32
REPLICATES = 1024  # of one matrix product
COLUMNS = 512  # of a table that are converted to float64 at a time
SLICE = 32  # replicates whose metrics are computed at a time: their counts fit into the processor's cache

Statistic = Callable[[np.ndarray], np.ndarray]  # (R, N) counts of the images -> (R,) values


class SortedScores:
    """The scores of an image's (or a data set's) pixels, sorted once for all of its metrics.

    Every metric follows from how many pixels, and how many positive pixels, lie above some value. Except for `aupro`
    and `best_dice` each agrees with scikit-learn's to 1e-12.

    Args:
        scores: array of any shape, higher is more abnormal; or a list of arrays, whose pixels are pooled.
        truth: booleans of the same shape(s).

    Attributes:
        values: (n,) all scores, ascending.
        positives: (p,) scores of the positive pixels, ascending.
        region_weights: (p,) for each of these, 1 / size of its 8-connected region.
        regions: number of regions.

    Raises:
        ValueError: shapes that differ, or scores that are not finite.
    """

    def __init__(self, scores: Any, truth: Any) -> None:
        weights, self.regions = _region_weights(truth)
        flat, truth = pool(scores, truth)
        positives = flat[truth]
        order = np.argsort(positives)
        self.values, self.positives, self.region_weights = np.sort(flat), positives[order], weights[order]

    @property
    def undefined(self) -> bool:
        """Whether there is no positive pixel."""
        return len(self.positives) == 0

    def average_precision(self) -> float:
        """See `pixel_average_precision`."""
        if self.undefined:
            return float("nan")
        true_positives = len(self.positives) - np.searchsorted(self.positives, self.positives)
        marked = len(self.values) - np.searchsorted(self.values, self.positives)
        return float(np.mean(true_positives / marked))

    def auroc(self) -> float:
        """See `pixel_auroc`: the share of (positive, negative) pairs of pixels in the right order; ties are half."""
        p, n = len(self.positives), len(self.values) - len(self.positives)
        if p == 0 or n == 0:
            return float("nan")
        below, up_to = (int(np.searchsorted(self.values, self.positives, side).sum()) for side in ("left", "right"))
        return (below + up_to - p * p) / (2 * p * n)  # p * p: pairs of two positive pixels

    def hit(self) -> float:
        """See the function `hit`."""
        true_positives, marked = self.count_at_least(self.values[-1])
        return float("nan") if self.undefined else true_positives / marked

    def count_above(self, threshold: float) -> tuple[int, int]:
        """(positive pixels, pixels) whose score is greater than the threshold."""
        return self._count(threshold, "right")

    def count_at_least(self, threshold: float) -> tuple[int, int]:
        """(positive pixels, pixels) whose score is the threshold or greater."""
        return self._count(threshold, "left")

    def _count(self, threshold: float, side: Any) -> tuple[int, int]:
        # in the scores' own precision, as NumPy compares an array with a number
        value = np.asarray(threshold, self.values.dtype)
        true_positives, marked = (len(v) - int(np.searchsorted(v, value, side)) for v in (self.positives, self.values))
        return true_positives, marked

    def dice(self, threshold: float) -> float:
        """Dice of the pixels above the threshold; see the function `dice`."""
        true_positives, marked = self.count_above(threshold)
        return float("nan") if self.undefined else 2 * true_positives / (marked + len(self.positives))

    def iou(self, threshold: float) -> float:
        """IoU of the pixels above the threshold; see the function `iou`."""
        true_positives, marked = self.count_above(threshold)
        return float("nan") if self.undefined else true_positives / (marked + len(self.positives) - true_positives)

    def mass_above(self, cuts: np.ndarray) -> np.ndarray:
        """(3, 2K) for K descending cuts: positive pixels, pixels, and sum of `region_weights`.

        Columns: more than the highest cut, at least the highest cut, more than the second, ...
        """
        first_positive, first = (_first_above(values, cuts) for values in (self.positives, self.values))
        overlap = np.append(np.cumsum(self.region_weights[::-1])[::-1], 0.0)
        return np.stack([len(self.positives) - first_positive, len(self.values) - first, overlap[first_positive]])


def _first_above(values: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """(2K,) position of the first of the ascending `values` above each descending cut, then of that cut itself."""
    return np.stack([np.searchsorted(values, cuts, side) for side in ("right", "left")], axis=1).ravel()


def _region_weights(truth: Any) -> tuple[np.ndarray, int]:
    """Booleans, or a list -> (1 / size of its 8-connected region for each positive pixel, number of regions)."""
    if isinstance(truth, list):
        parts = [_region_weights(t) for t in truth]
        return np.concatenate([weights for weights, _ in parts]), sum(n for _, n in parts)
    truth = np.asarray(truth, bool)
    regions, n = ndimage.label(truth, structure=np.ones((3,) * truth.ndim))
    return (1.0 / np.bincount(regions.ravel())[regions[truth]] if n else np.zeros(0)), n


def pixel_average_precision(anomaly_map: Any, truth: Any) -> float:
    """Average precision of the pixels: 1 is perfect, the share of positive pixels is chance.

    The mean over the positive pixels of the precision at their score, which is scikit-learn's definition.

    Args:
        anomaly_map: array of any shape, higher is more abnormal; or a list of arrays, whose pixels are pooled.
        truth: booleans of the same shape(s).

    Returns:
        float; NaN without a positive pixel.

    Raises:
        ValueError: shapes that differ, or values that are not finite.
    """
    return SortedScores(anomaly_map, truth).average_precision()


def pixel_auroc(anomaly_map: Any, truth: Any) -> float:
    """Area under the ROC curve of the pixels; arguments as in `pixel_average_precision`. NaN with one class only."""
    return SortedScores(anomaly_map, truth).auroc()


def image_average_precision(scores: Any, labels: Any) -> float:
    """(N,) scores, (N,) labels (0 healthy, others abnormal) -> average precision; NaN without an abnormal image."""
    return pixel_average_precision(np.asarray(scores), np.asarray(labels) != 0)


def image_auroc(scores: Any, labels: Any) -> float:
    """(N,) scores, (N,) labels (0 healthy, others abnormal) -> area under the ROC curve; NaN with one class only."""
    return pixel_auroc(np.asarray(scores), np.asarray(labels) != 0)


def dice(mask: Any, truth: Any) -> float:
    """2 |P and T| / (|P| + |T|) of two boolean arrays of one shape; NaN without a positive pixel in `truth`."""
    mask, truth = pool(mask, truth)
    mask = mask.astype(bool)
    return float(2 * (mask & truth).sum() / (mask.sum() + truth.sum())) if truth.any() else float("nan")


def iou(mask: Any, truth: Any) -> float:
    """|P and T| / |P or T| of two boolean arrays of one shape; NaN without a positive pixel in `truth`."""
    mask, truth = pool(mask, truth)
    mask = mask.astype(bool)
    return float((mask & truth).sum() / (mask | truth).sum()) if truth.any() else float("nan")


def best_dice(anomaly_map: Any, truth: Any) -> tuple[float, float]:
    """The Dice of the best single threshold: an upper bound, since the truth chose the threshold.

    Arguments as in `pixel_average_precision`; the pixels of a list are pooled and share the threshold.

    Returns:
        (dice, threshold): the mask is `anomaly_map >= threshold`; NaN, NaN without a positive pixel.
    """
    ranked = SortedScores(anomaly_map, truth)
    if ranked.undefined:
        return float("nan"), float("nan")
    thresholds = ranked.positives[::-1]  # between two of them only negative pixels are added
    true_positives = len(thresholds) - np.searchsorted(ranked.positives, thresholds)
    marked = len(ranked.values) - np.searchsorted(ranked.values, thresholds)
    values = 2 * true_positives / (marked + len(thresholds))
    return float(values.max()), float(thresholds[values.argmax()])


def hit(anomaly_map: Any, truth: Any) -> float:
    """1 where the map's maximum lies inside the true region, 0 where not (hit rate of CheXlocalize).

    Saporta et al. 2022 (https://doi.org/10.1038/s42256-022-00536-x) call it the most representative point. Pixels that
    share the maximum share the hit, so a constant map scores the region's share of the image, not the luck of a corner.

    Args:
        anomaly_map: (H, W).
        truth: (H, W) booleans; boxes count as regions, see `box_mask`.

    Returns:
        float in [0, 1]; NaN without a positive pixel.
    """
    return SortedScores(anomaly_map, truth).hit()


def hit_rate(maps: Iterable[Any], truths: Iterable[Any]) -> float:
    """Mean of `hit` over the images of two lists; images without a positive pixel are left out, NaN if all are."""
    hits = np.array([hit(m, t) for m, t in zip(maps, truths, strict=True)])
    return float(np.nanmean(hits)) if np.isfinite(hits).any() else float("nan")


def aupro(anomaly_map: Any, truth: Any, fpr_limit: float = FPR_LIMIT) -> float:
    """Area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    Bergmann et al. 2020 (https://arxiv.org/abs/1911.02357), section 5.2: at each threshold the mean over the connected
    true regions of the marked share of the region, so that a small lesion weighs as much as a large one. Regions are
    8-connected; the false-positive rate is pooled over all pixels.

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


def psnr(image: Any, reference: Any, data_range: float = 1.0, outside: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two (H, W) arrays; with `outside` (H, W) booleans, of the other pixels only.

    Infinite for equal images, NaN if `outside` leaves no pixel.
    """
    image, reference = same_shape(np.asarray(image, np.float64), np.asarray(reference, np.float64))
    keep = np.ones(image.shape, bool) if outside is None else ~np.asarray(outside, bool)
    if not keep.any():
        return float("nan")
    error = np.mean((image[keep] - reference[keep]) ** 2)
    return float(10 * np.log10(data_range**2 / error)) if error else float("inf")


def ssim(image: Any, reference: Any, data_range: float = 1.0, outside: np.ndarray | None = None) -> float:
    """Structural similarity (Wang et al. 2004, their Gaussian window of sigma 1.5) of two (H, W) arrays.

    With `outside` (H, W) booleans it is the mean over the pixels whose window does not touch the region: how well the
    rest of the image was kept. NaN if no such pixel is left.

    Raises:
        ValueError: from scikit-image, for images under 11 pixels.
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


def box_mask(boxes: Iterable[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Union of [x, y, w, h] boxes in pixels -> (height, width) booleans: the pixels whose centre lies in a box.

    A box too thin to contain a centre keeps the one pixel it lies in; parts outside the image are cut off.

    Raises:
        ValueError: not four finite numbers, a side of 0 or less, or a box entirely outside the image.
    """
    mask = np.zeros((height, width), bool)
    for box in boxes:
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) <= 0:
            raise ValueError(f"expected a box [x, y, w, h] with positive sides, got {list(box)}")
        x, y, w, h = map(float, box)
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise ValueError(f"expected a box inside the image of {width} x {height} pixels, got {list(box)}")
        mask[_centres(y, h, height), _centres(x, w, width)] = True
    return mask


def _centres(start: float, length: float, size: int) -> slice:
    """Slice of the pixels in 0..size whose centre lies in [start, start + length); at least one pixel."""
    first, stop = int(np.ceil(start - 0.5)), int(np.ceil(start + length - 0.5))
    if stop <= first:
        first = int(np.floor(start + length / 2))
    first = min(max(first, 0), size - 1)
    return slice(first, max(stop, first + 1))


class Ranking:
    """The scores of a set of images, sorted once, so that a bootstrap may weigh the images anew at little cost.

    It keeps how many pixels of each image lie above each of many cuts. The counts of a weighted set are then one
    matrix product, and every metric below follows from them. Cuts are taken at the values of positive pixels, just
    above and just below each: with all of them (`max_cuts=None`) the results are exact; with fewer, each is still an
    exact point of the curve and only the steps between are coarser (4096: under 1e-3 of scikit-learn's).

    The images are read twice and not kept; the tables take 12 bytes for each image and column: 0.5 GB for 5,000 images
    and 4096 cuts. Counts are exact; the regions' shares are rounded to float32, which moves AUPRO by less than 1e-6.

    Args:
        scores: sequence of arrays, one an image; higher is more abnormal.
        truths: sequence of boolean arrays of the same shapes.
        max_cuts: at most so many positive values are cut at, evenly over their ranks; None: all. Of more than
            `MAX_VALUES` different positive values every second (fourth, ...) is considered.
        on_image: called with the `SortedScores` of each image, in order.
    """

    def __init__(
        self,
        scores: Any,
        truths: Any,
        max_cuts: int | None = MAX_CUTS,
        on_image: Callable[[SortedScores], object] | None = None,
    ) -> None:
        if len(scores) != len(truths) or len(scores) == 0:
            raise ValueError(f"expected as many scores as truths, at least one, got {len(scores)} and {len(truths)}")
        cuts = choose_cuts(scores, truths, max_cuts)
        n = len(scores)
        # columns: see `SortedScores.mass_above`
        self.true_positives, self.marked = np.zeros((2, n, 2 * len(cuts)), np.uint32)
        self.overlap = np.zeros((n, 2 * len(cuts)), np.float32)
        self.positives, self.pixels, self.regions = np.zeros((3, n))
        for i, (score, truth) in enumerate(zip(scores, truths, strict=True)):
            ranked = SortedScores(score, truth)
            self.positives[i], self.pixels[i] = len(ranked.positives), len(ranked.values)
            self.regions[i] = ranked.regions
            self.true_positives[i], self.marked[i], self.overlap[i] = ranked.mass_above(cuts)
            if on_image is not None:
                on_image(ranked)

    def pooled(self) -> "Ranking":
        """The same pixels as those of one image: the same curve and values, without replicates."""
        other = copy.copy(self)
        for name in ("true_positives", "marked", "overlap", "positives", "pixels", "regions"):
            setattr(other, name, getattr(self, name).sum(0, keepdims=True, dtype=np.float64))
        return other

    def average_precision(self, weights: Any = None) -> Any:
        """Pooled average precision; `weights` (N,) or (R, N): how often each image counts. -> number, or (R,)."""
        return self.measure(weights, names=["average_precision"])["average_precision"]

    def auroc(self, weights: Any = None) -> Any:
        """Pooled area under the ROC curve; `weights` as in `average_precision`."""
        return self.measure(weights, names=["auroc"])["auroc"]

    def aupro(self, weights: Any = None, fpr_limit: float = FPR_LIMIT) -> Any:
        """Area under the per-region overlap curve, see the function `aupro`; `weights` as in `average_precision`."""
        return self.measure(weights, fpr_limit, names=["aupro"])["aupro"]

    def best_dice(self, weights: Any = None) -> Any:
        """Dice at the pooled set's best threshold; `weights` as in `average_precision`."""
        return self.measure(weights, names=["best_dice"])["best_dice"]

    def measure(
        self,
        weights: Any = None,
        fpr_limit: float = FPR_LIMIT,
        inside: np.ndarray | None = None,
        names: Sequence[str] = ("average_precision", "auroc", "aupro", "best_dice"),
    ) -> dict[str, Any]:
        """All pooled metrics from the same counts.

        Args:
            weights: (N,) or (R, N): how often each image counts; None: once.
            fpr_limit: of AUPRO.
            inside: (N,) booleans: the images that count; None: all.
            names: the metrics to return.

        Returns:
            {name: number, or (R,) array}; NaN where a metric is not defined.
        """
        weights = np.ones(len(self.pixels)) if weights is None else np.asarray(weights, np.float64)
        table = np.atleast_2d(weights)
        parts = [
            self._measure(table[start : start + REPLICATES], fpr_limit, inside, names)
            for start in range(0, len(table), REPLICATES)
        ]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in names}
        return columns if weights.ndim == 2 else {name: column[0] for name, column in columns.items()}

    def _measure(
        self, weights: np.ndarray, fpr_limit: float, inside: np.ndarray | None, names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        rows = slice(None) if inside is None else np.flatnonzero(inside)
        weights = weights[:, rows]
        true_positives, marked = (_product(weights, table, rows) for table in (self.true_positives, self.marked))
        overlap = _product(weights, self.overlap, rows) if "aupro" in names else true_positives
        positives, pixels, regions = (weights @ t[rows] for t in (self.positives, self.pixels, self.regions))
        values = {name: np.full(len(weights), np.nan) for name in names}
        for start in range(0, len(weights), SLICE):  # small enough for the processor's cache
            part = slice(start, start + SLICE)
            counts = Counts(*(c[part] for c in (true_positives, marked, overlap, positives, pixels, regions)))
            for name in names:
                values[name][part] = counts.aupro(fpr_limit) if name == "aupro" else getattr(counts, name)()
        return values

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three (K,) arrays along falling thresholds: recall, precision, false-positive rate; without chance's ends."""
        true_positives, marked = (table.sum(0, dtype=np.float64) for table in (self.true_positives, self.marked))
        some = marked > 0
        true_positives, marked = true_positives[some], marked[some]
        positives, pixels = self.positives.sum(), self.pixels.sum()
        return (
            true_positives / positives,
            true_positives / marked,
            (marked - true_positives) / max(pixels - positives, 1),
        )

    @property
    def prevalence(self) -> float:
        """The share of positive pixels: the average precision of chance."""
        return self.positives.sum() / self.pixels.sum()


def choose_cuts(scores: Any, truths: Any, max_cuts: int | None) -> np.ndarray:
    """(K,) different values of positive pixels, descending; see `Ranking`."""
    parts: list[np.ndarray] = []
    step = 1
    for score, truth in zip(scores, truths, strict=True):
        score, truth = pool(score, truth)
        parts.append(np.unique(score[truth])[::step])
        if max_cuts is not None and sum(map(len, parts)) > MAX_VALUES:
            values = np.unique(np.concatenate(parts))
            if len(values) > MAX_VALUES // 2:
                values, step = values[::2], 2 * step
            parts = [values]
    cuts = np.unique(np.concatenate(parts))[::-1]
    if max_cuts is not None and len(cuts) > max_cuts:
        cuts = cuts[np.linspace(0, len(cuts) - 1, max_cuts).round().astype(int)]
    return cuts


def _product(weights: np.ndarray, table: np.ndarray, rows: Any) -> np.ndarray:
    """`weights @ table[rows]` in float64; a float64 copy of the whole table would take twice its memory."""
    product = np.empty((len(weights), table.shape[1]))
    for start in range(0, table.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        product[:, columns] = weights @ table[rows, columns].astype(np.float64)
    return product


class Counts(NamedTuple):
    """Counts of R weighted sets of images above K cuts, descending: all metrics of a `Ranking` follow from them.

    true_positives, marked, overlap: (R, K) positive pixels, pixels, and regions' shares above each cut.
    positives, pixels, regions: (R,) totals.
    """

    true_positives: np.ndarray
    marked: np.ndarray
    overlap: np.ndarray
    positives: np.ndarray
    pixels: np.ndarray
    regions: np.ndarray

    def average_precision(self) -> np.ndarray:
        """(R,); NaN without a positive pixel."""
        precision = self.true_positives / np.maximum(self.marked, 1)
        return _ratio((np.diff(self.true_positives, axis=1, prepend=0) * precision).sum(1), self.positives)

    def auroc(self) -> np.ndarray:
        """(R,); NaN with one class only."""
        return self._area(_ratio(self.true_positives, self.positives[:, None]))

    def aupro(self, limit: float) -> np.ndarray:
        """(R,); NaN with one class only."""
        return self._area(_ratio(self.overlap, self.regions[:, None]), limit)

    def best_dice(self) -> np.ndarray:
        """(R,); NaN without a positive pixel."""
        dice = (2 * self.true_positives / np.maximum(self.marked + self.positives[:, None], 1)).max(1, initial=0)
        return np.where(self.positives > 0, dice, np.nan)

    def _area(self, y: np.ndarray, limit: float = 1.0) -> np.ndarray:
        """Area under the polygon (false-positive rate, `y`) from 0 to `limit`, divided by `limit`."""
        x = _ratio(self.marked - self.true_positives, (self.pixels - self.positives)[:, None])
        edge = np.ones((len(y), 1))
        x, y = (np.hstack([0 * edge, part, edge]) for part in (x, y))
        width = np.diff(x, axis=1)
        kept = np.clip(limit - x[:, :-1], 0, width)  # of the segment that crosses the limit only the part before it
        slope = np.divide(np.diff(y, axis=1), width, out=np.zeros_like(width), where=width > 0)
        area = (kept * (y[:, :-1] + slope * kept / 2)).sum(1) / limit
        return np.where((self.positives > 0) & (self.pixels > self.positives), area, np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole`, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def measure_images(scores: Any, labels: Any, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision of whole images for (R, N) weights, as `Ranking.measure`; see `image_auroc`.

    Args:
        scores: (N,) numbers.
        labels: (N,), 0 healthy, others abnormal.
        weights: (R, N) how often each image counts.

    Returns:
        {"auroc", "average_precision": (R,)}.
    """
    scores, abnormal = np.asarray(scores, np.float64), np.asarray(labels) != 0
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, got NaN or infinity")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores pass a threshold together
    parts = []
    for start in range(0, len(weights), SLICE):
        table = np.asarray(weights[start : start + SLICE], np.float64)[:, order]
        true_positives, marked = ((table * counted).cumsum(1) for counted in (abnormal[order], 1))
        positives, images = true_positives[:, -1], marked[:, -1]
        true_positives = true_positives[:, last]
        counts = Counts(true_positives, marked[:, last], true_positives, positives, images, positives)
        parts.append([counts.auroc(), counts.average_precision()])
    auroc, precision = np.concatenate(parts, axis=1)
    return {"auroc": auroc, "average_precision": precision}


class Interval(NamedTuple):
    """A value, its bootstrap interval, and the number of replicates without a value."""

    value: float
    low: float
    high: float
    undefined: int


def patient_weights(groups: Iterable[Hashable], n: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each image counts in each replicate of a bootstrap over patients.

    Args:
        groups: (N,) the patient of each image; all images of a patient are drawn together.
        n: number of replicates.
        seed: of the draws.

    Returns:
        (n, N) integers.

    Raises:
        ValueError: no image.
    """
    names: Any = list(groups)
    if not names:
        raise ValueError("expected the patient of at least one image, got none")
    patients, member = np.unique(names, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), size=n)
    return draws[:, member]


def bootstrap_interval(
    statistic: Statistic, groups: Iterable[Hashable], n: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a metric, by patient (Efron & Tibshirani 1993, chapter 13).

    Args:
        statistic: `statistic(weights)`: (R, N) counts of the images -> (R,) values. `Ranking(...).average_precision`,
            `mean_of(values)`.
        groups: (N,) the patient of each image.
        n, level, seed: number of replicates, coverage, seed of the draws.

    Returns:
        `Interval`; its bounds are NaN with fewer than two patients, or where no replicate has a value.
    """
    return interval_of(statistic, patient_weights(groups, n, seed), level)


def paired_difference_interval(
    statistic_a: Statistic,
    statistic_b: Statistic,
    groups: Iterable[Hashable],
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of `a - b` over the same replicates; arguments as in `bootstrap_interval`. Excludes 0: they differ."""
    return bootstrap_interval(lambda w: statistic_a(w) - statistic_b(w), groups, n, level, seed)


def interval_of(statistic: Statistic, weights: np.ndarray, level: float = 0.95) -> Interval:
    """`bootstrap_interval` with the (R, N) replicates of `patient_weights`."""
    value = statistic(np.ones((1, np.shape(weights)[1])))[0]
    if np.all(np.asarray(weights) == 1):  # one patient: every replicate is the set itself
        return Interval(float(value), float("nan"), float("nan"), 0)
    return interval_of_samples(value, statistic(weights), level)


def interval_of_samples(value: float, samples: np.ndarray, level: float = 0.95) -> Interval:
    """Percentile interval of (R,) bootstrap replicates of a value; those that are NaN are left out and counted."""
    defined = samples[np.isfinite(samples)]
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high), int(len(samples) - len(defined)))


def mean_of(values: Any) -> Statistic:
    """The statistic "mean of (N,) values of the images"; images whose value is NaN are left out."""
    values = np.asarray(values, np.float64)
    defined = np.isfinite(values)

    def mean(weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, np.float64)
        return _ratio(weights @ np.where(defined, values, 0.0), weights @ defined)

    return mean


def ratio_of(parts: Any, wholes: Any) -> Statistic:
    """The statistic "sum of (N,) counts of a part / sum of counts of its whole"; NaN where the whole is empty."""
    parts, wholes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)

    def ratio(weights: np.ndarray) -> np.ndarray:
        weights = np.asarray(weights, np.float64)
        return _ratio(weights @ parts, weights @ wholes)

    return ratio


def pool(scores: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays, or two lists of arrays, of the same shapes -> flat scores and flat booleans.

    Raises:
        ValueError: shapes that differ, or scores that are not finite.
    """
    if isinstance(scores, list):
        pairs = [pool(s, t) for s, t in zip(scores, truth, strict=True)]
        flat, positive = zip(*pairs, strict=True)
        return np.concatenate(flat), np.concatenate(positive)
    scores, truth = same_shape(np.asarray(scores), np.asarray(truth))
    if not np.isfinite(scores).all():
        raise ValueError("expected finite values, got NaN or infinity in a map")
    return scores.ravel(), truth.ravel().astype(bool)


def same_shape(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays; ValueError if their shapes differ."""
    if a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape, got {a.shape} and {b.shape}")
    return a, b
