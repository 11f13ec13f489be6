"""From an anomaly map to a mask: smooth, threshold, drop what is too small."""

import numpy as np
from scipy import ndimage


def smooth_map(anomaly_map, sigma):
    """(..., H, W) -> (..., H, W) float32: Gaussian smoothing within each map; `sigma` in pixels, 0 changes nothing."""
    anomaly_map = np.asarray(anomaly_map, np.float32)
    if sigma < 0:
        raise ValueError(f"expected a `sigma` of 0 or more, got {sigma}")
    if sigma == 0:
        return anomaly_map
    return ndimage.gaussian_filter(anomaly_map, sigma, mode="nearest", axes=(-2, -1))


def threshold_map(anomaly_map, threshold, sigma=0.0, min_area=0):
    """(H, W) map -> (H, W) boolean mask: smoothed, above the threshold, in pieces of at least `min_area`.

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


def drop_small(mask, min_area):
    """(H, W) booleans -> (H, W) booleans without the 8-connected components of fewer than `min_area` pixels."""
    if min_area < 0:
        raise ValueError(f"expected a `min_area` of 0 or more, got {min_area}")
    if min_area <= 1:
        return mask
    components, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    area = np.bincount(components.ravel())
    return mask & (area >= min_area)[components]


def healthy_threshold(maps, quantile=0.99):
    """One threshold for a data set: the value that all but `1 - quantile` of the pixels of healthy images stay below.

    Take healthy VALIDATION images. A threshold found on the test image itself (Otsu, min-max) marks something in every
    picture, healthy ones too.

    Args:
        maps: maps of healthy images, a list of (H, W) arrays (sizes may differ) or a (B, H, W) array. Smooth them
            first if the maps to be thresholded are smoothed.
        quantile: in (0, 1): 0.99 marks 1 % of healthy pixels.

    Returns:
        float.

    Raises:
        ValueError: no map, a value that is not finite, or a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise ValueError(f"expected a `quantile` between 0 and 1, got {quantile}")
    if len(maps) == 0:
        raise ValueError("expected the maps of at least one healthy image, got none")
    pixels = np.concatenate([np.asarray(m, np.float32).ravel() for m in maps])
    if not np.isfinite(pixels).all():
        raise ValueError("expected finite values, got NaN or infinity in a map")
    return float(np.quantile(pixels, quantile))
