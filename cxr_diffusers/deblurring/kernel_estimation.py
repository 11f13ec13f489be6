"""Estimate the Gaussian blur of an image from its steepest edges.

After Polyblur (Delbracio et al. 2021, https://arxiv.org/abs/2012.09322): an image contains some edge as sharp as its
camera allows, and a step blurred by a Gaussian of width sigma is nowhere steeper than its height / (sigma sqrt(2 pi)).
So sigma = c / f, where f is the largest slope in a direction and c depends on the height of the highest steps. This is
for mild blur; docs/deblurring.md reports its errors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from .degradations import gaussian_kernel

# of radiographs: the median over 60 adult training images (benchmarks/kernel_estimation.py). A step from black to white
# has 0.40, photographs have 0.36 according to Polyblur's authors: radiographs have few steps of full height.
EDGE_HEIGHT = 0.18
# the edges of a sharp radiograph are not equally steep in all directions: a smaller ratio does not indicate a direction
LEAST_RATIO = 1.5
SHARPEST, BLUREST = 0.3, 4.0  # pixels; smaller and larger widths cannot be distinguished
ANGLES = np.arange(0, 180, 10)
QUANTILE = 1e-4  # share of the darkest and of the brightest pixels that is ignored in the grey scale


@dataclass
class BlurEstimate:
    """A Gaussian blur: `sigma` in pixels along `angle` (degrees, counter-clockwise from the rows), `minor` across it.

    `kernel` is the kernel for it, (h, w).
    """

    sigma: float
    minor: float
    angle: float

    @property
    def kernel(self) -> np.ndarray:
        return gaussian_kernel(self.sigma, self.minor, self.angle)


def estimate_blur(image: PIL.Image.Image | np.ndarray, edge_height: float = EDGE_HEIGHT) -> BlurEstimate:
    """Estimate the blur of a radiograph.

    Args:
        image: PIL image or (H, W) array, any scale. Noise looks like sharp edges: the blur of a noisy image is
            underestimated.
        edge_height: c in the description of the module; for other types of images, see `calibrate`.

    Returns:
        widths between 0.3 and 4 pixels. 0.3 means that no blur can be detected.

    Raises:
        ValueError: not an image of one channel with at least 8 x 8 pixels.
    """
    steepness = directional_steepness(image)
    sigmas = np.clip(edge_height / np.maximum(steepness, 1e-12), SHARPEST, BLUREST)
    # an edge is least steep across the direction of the widest blur
    widest = int(np.argmax(sigmas))
    across = (widest + len(ANGLES) // 2) % len(ANGLES)
    if sigmas[widest] < LEAST_RATIO * sigmas[across]:
        sigma = float(edge_height / steepness.mean()) if steepness.mean() > 0 else BLUREST
        sigma = min(max(sigma, SHARPEST), BLUREST)
        return BlurEstimate(sigma, sigma, 0.0)
    return BlurEstimate(float(sigmas[widest]), float(sigmas[across]), float(ANGLES[widest]))


def estimate_kernel(image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """A radiograph -> the (h, w) kernel of its estimated blur, see `estimate_blur`."""
    return estimate_blur(image).kernel


def directional_steepness(image: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """(len(ANGLES),): the largest slope per pixel in each direction, where black to white is 1."""
    values = np.asarray(image, np.float64)
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or min(values.shape) < 8:
        raise ValueError(f"expected an image of one channel, at least 8 x 8 pixels, got {values.shape}")
    low, high = np.quantile(values, [QUANTILE, 1 - QUANTILE])
    values = ((values - low) / max(high - low, 1e-12)).clip(0, 1)
    down, right = np.gradient(values)
    turns = np.radians(ANGLES)
    return np.array([np.abs(right * np.cos(a) - down * np.sin(a)).max() for a in turns])


def calibrate(images: Iterable[PIL.Image.Image | np.ndarray], sigmas: Sequence[float] = (1.0, 1.5, 2.0)) -> float:
    """Sharp images -> the `edge_height` for images of their type: the median of sigma x f after Gaussian blurs."""
    from scipy.ndimage import gaussian_filter

    arrays = [np.asarray(image, np.float64) for image in images]
    heights = [s * directional_steepness(gaussian_filter(a, s, mode="mirror")).mean() for a in arrays for s in sigmas]
    return float(np.median(heights))
