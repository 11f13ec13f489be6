"""Distances between two sets of images by their features: FID and KID, with any feature network."""

from collections.abc import Hashable, Iterable

import numpy as np

from .metrics import Statistic


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance of two sets of features (FID, Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

    |mean a - mean b|^2 + trace(A + B - 2 (A B)^1/2) with the sets' covariances A and B. It is biased: with few images
    it is far above 0 for two samples of the same distribution, so compare it at equal numbers only.

    Args:
        a: (N, D) features, N at least 2.
        b: (M, D) features, M at least 2.

    Returns:
        float, 0 or more; NaN where a set has fewer than two images.

    Raises:
        ValueError: features of different lengths.
    """
    a, b = features_of(a, b)
    if min(len(a), len(b)) < 2:
        return float("nan")
    centred_a, centred_b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    # the trace of (A B)^1/2 is the sum of the singular values of this smaller matrix; the square root itself need not
    # exist: with fewer images than features both covariances are singular
    shared = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + (centred_a**2).sum() + (centred_b**2).sum() - 2 * shared
    return float(max(distance, 0.0))


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    groups_a: Iterable[Hashable] | None = None,
    groups_b: Iterable[Hashable] | None = None,
) -> float:
    """Kernel distance of two sets of features (KID, Binkowski et al. 2018, https://arxiv.org/abs/1801.01401).

    The unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3: 0 on average for two samples of one
    distribution, however small, so single values may be negative.

    Args:
        a: (N, D) features.
        b: (M, D) features.
        groups_a, groups_b: (N,) and (M,) the patient of each image; None: all are different. Pairs of images of one
            patient do not count, neither within a set nor between the sets.

    Returns:
        float; NaN with fewer than two patients in a set.
    """
    a, b = features_of(a, b)
    own_a, own_b = ([f"{side} {i}" for i in range(n)] for side, n in (("a", len(a)), ("b", len(b))))
    groups = [*(own_a if groups_a is None else groups_a), *(own_b if groups_b is None else groups_b)]
    in_a = np.arange(len(groups)) < len(a)
    statistic = kernel_distance_of(np.concatenate([a, b]), in_a, ~in_a, groups)
    return float(statistic(np.ones((1, len(groups))))[0])


def kernel_distance_of(
    features: np.ndarray, in_a: np.ndarray, in_b: np.ndarray, groups: Iterable[Hashable]
) -> Statistic:
    """`kernel_distance` as a statistic for `metrics.interval_of`: (R, N) counts of the images -> (R,) values.

    An image that is drawn twice in a replicate forms no pair with itself: otherwise every replicate would contain
    copies, and its distance would be too large.

    Args:
        features: (N, D) of all images.
        in_a, in_b: (N,) booleans: the two sets.
        groups: (N,) the patient of each.
    """
    features = np.asarray(features, np.float64)
    _, patients = np.unique(list(groups), return_inverse=True)
    pairs = (patients[:, None] != patients).astype(np.float64)
    kernel = pairs * (features @ features.T / features.shape[1] + 1) ** 3
    in_a, in_b = (np.asarray(side, np.float64) for side in (in_a, in_b))

    def statistic(weights: np.ndarray) -> np.ndarray:
        a, b = (np.asarray(weights, np.float64) * side for side in (in_a, in_b))
        return mean_pair(kernel, pairs, a, a) + mean_pair(kernel, pairs, b, b) - 2 * mean_pair(kernel, pairs, a, b)

    return statistic


def mean_pair(kernel: np.ndarray, pairs: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of the kernel over the pairs of two (R, N) weighted sets -> (R,); NaN without a pair."""
    total, count = (((a @ table) * b).sum(1) for table in (kernel, pairs))
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def features_of(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64; ValueError unless they are (N, D) and (M, D)."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D), got {a.shape} and {b.shape}")
    return a, b
