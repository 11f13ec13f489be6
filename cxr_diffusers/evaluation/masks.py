"""From an anomaly map to a mask: smoothing, thresholds, and the removal of small components."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from .lazy import Lazy


def smooth_map(anomaly_map: Any, sigma: float) -> np.ndarray:
    """(..., H, W) -> (..., H, W) float32: Gaussian smoothing within each map; `sigma` in pixels, 0 changes nothing.

    Raises:
        ValueError: a negative `sigma`.
    """
    anomaly_map = np.asarray(anomaly_map, np.float32)
    if sigma < 0:
        raise ValueError(f"expected a `sigma` of 0 or more, got {sigma}")
    if sigma == 0:
        return anomaly_map
    return ndimage.gaussian_filter(anomaly_map, sigma, mode="nearest", axes=(-2, -1))


def threshold_map(anomaly_map: Any, threshold: float, sigma: float = 0.0, min_area: int = 0) -> np.ndarray:
    """(H, W) map -> (H, W) boolean mask: smoothed, above the threshold, in components of at least `min_area`.

    A higher threshold never adds a pixel, and a map of zeros has no mask at any threshold of 0 or more.

    Args:
        anomaly_map: (H, W), in [0, 1].
        threshold: a pixel is marked where the map is greater; see `healthy_threshold`.
        sigma: of the Gaussian, in pixels of the map.
        min_area: in pixels; 8-connected components that are smaller are dropped.

    Raises:
        ValueError: not an (H, W) map, a threshold that is not a number, a negative `sigma` or `min_area`.
    """
    anomaly_map = np.asarray(anomaly_map)
    if anomaly_map.ndim != 2:
        raise ValueError(f"expected an (H, W) map, got shape {anomaly_map.shape}")
    if not np.isfinite(threshold):
        raise ValueError(f"expected a threshold, got {threshold}")
    return drop_small(smooth_map(anomaly_map, sigma) > threshold, min_area)


def drop_small(mask: np.ndarray, min_area: int) -> np.ndarray:
    """(H, W) booleans without the 8-connected components of fewer than `min_area` pixels."""
    if min_area < 0:
        raise ValueError(f"expected a `min_area` of 0 or more, got {min_area}")
    if min_area <= 1:
        return mask
    components, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    area = np.bincount(components.ravel())
    return mask & (area >= min_area)[components]


def healthy_threshold(maps: Sequence[Any] | Lazy[Any] | np.ndarray, quantile: float = 0.99) -> float:
    """One threshold for a data set: the value that all but `1 - quantile` of the pixels of healthy images stay below.

    Take healthy VALIDATION images. A threshold computed from the test image itself (Otsu, min-max) marks something in
    every image, also in healthy ones.

    Args:
        maps: maps of healthy images, a sequence of (H, W) arrays (sizes may differ) or a (B, H, W) array. Smooth them
            first if the maps to be thresholded are smoothed.
        quantile: in (0, 1): 0.99 marks 1 % of healthy pixels.

    Raises:
        ValueError: no map, a value that is not finite, or a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise ValueError(f"expected a `quantile` between 0 and 1, got {quantile}")
    if len(maps) == 0:
        raise ValueError("expected the maps of at least one healthy image, got none")
    return pixel_quantiles(maps, [quantile])[0]


def pixel_quantiles(maps: Sequence[Any] | Lazy[Any] | np.ndarray, quantiles: Sequence[float]) -> list[float]:
    """Quantiles of all pixels of some maps, as `numpy.quantile` of all float32 values at once, without holding them.

    Exact: float32 values sort like integers of 32 bits. A first pass counts their upper 16 bits, a second one the lower
    16 bits of the values beside the quantiles. It takes 1.5 MiB for a quantile, whatever the number of maps.

    Args:
        maps: sequence of arrays of any sizes, read twice; at least one pixel.
        quantiles: in [0, 1].

    Raises:
        ValueError: a value that is not finite.
    """
    counts = np.zeros(2**16, np.int64)
    for anomaly_map in maps:
        counts += np.bincount(_sortable(anomaly_map) >> 16, minlength=2**16)
    positions = [quantile * (counts.sum() - 1) for quantile in quantiles]
    ranks = [rank for position in positions for rank in (int(np.floor(position)), int(np.ceil(position)))]
    ends = counts.cumsum()
    upper = np.searchsorted(ends, ranks, side="right")
    lower = {int(u): np.zeros(2**16, np.int64) for u in upper}
    for anomaly_map in maps:
        keys = _sortable(anomaly_map)
        for u, low_counts in lower.items():
            low_counts += np.bincount(keys[keys >> 16 == u] & 0xFFFF, minlength=2**16)
    values = [
        _unsortable(
            (int(u) << 16) + int(np.searchsorted(lower[int(u)].cumsum(), rank - (ends[u] - counts[u]), "right"))
        )
        for u, rank in zip(upper, ranks, strict=True)
    ]
    return [
        below + (above - below) * (position - np.floor(position))
        for position, below, above in zip(positions, values[::2], values[1::2], strict=True)
    ]


def _sortable(anomaly_map: Any) -> np.ndarray:
    """(n,) int64 in [0, 2^32) that sort as the float32 values do."""
    values = np.asarray(anomaly_map, np.float32).ravel() + np.float32(0)  # -0 becomes 0
    if not np.isfinite(values).all():
        raise ValueError("expected finite values, got NaN or infinity in a map")
    bits = values.view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(2**31)).astype(np.int64)


def _unsortable(key: int) -> float:
    """The value whose `_sortable` is `key`."""
    bits = key - 2**31 if key >= 2**31 else 2**32 - 1 - key
    return float(np.uint32(bits).view(np.float32))
