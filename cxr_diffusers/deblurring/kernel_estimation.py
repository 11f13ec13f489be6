"""What blurred this picture? A Gaussian, from how steep its steepest edges still are.

After Polyblur (Delbracio et al. 2021, https://arxiv.org/abs/2012.09322): a picture holds some edge as sharp as its
camera allows, and a step blurred by a Gaussian of width sigma is nowhere steeper than its height / (sigma sqrt(2 pi)).
So sigma = c / f, where f is the largest slope in a direction and c stands for how high the highest steps are. It is
for mild blur, and it is an estimate: docs/deblurring.md says how good.
"""

from dataclasses import dataclass

import numpy as np

from .degradations import gaussian_kernel

# of radiographs: what benchmarks/kernel_estimation.py prints for 60 adult training images of ../shared/cxr. A step from
# black to white has 0.40, photographs 0.36 by Polyblur's authors: radiographs have few steps of full height.
EDGE_HEIGHT = 0.18
# a radiograph's own edges are not equally steep in all directions: less than this does not tell a direction of blur
LEAST_RATIO = 1.5
SHARPEST, BLUREST = 0.3, 4.0  # pixels: what is outside is not told apart
ANGLES = np.arange(0, 180, 10)
QUANTILE = 1e-4  # darkest and brightest pixels that do not decide where black and white are


@dataclass
class BlurEstimate:
    """A Gaussian blur: `sigma` in pixels along `angle` (degrees, counter-clockwise from the rows), `minor` across it.

    `kernel` is the kernel for it, (h, w).
    """

    sigma: float
    minor: float
    angle: float

    @property
    def kernel(self):
        return gaussian_kernel(self.sigma, self.minor, self.angle)


def estimate_blur(image, edge_height=EDGE_HEIGHT):
    """A radiograph -> `BlurEstimate`.

    Args:
        image: PIL image or (H, W) array, any scale. Noise looks like sharp edges: the blur of a noisy picture is taken
            for less than it is.
        edge_height: c of the module; of another kind of pictures, see `calibrate`.

    Returns:
        widths between 0.3 and 4 pixels. 0.3 says "not blurred that this could see".

    Raises:
        ValueError: not a picture of one channel with at least 8 x 8 pixels.
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


def estimate_kernel(image):
    """A radiograph -> the (h, w) kernel of its estimated blur, see `estimate_blur`."""
    return estimate_blur(image).kernel


def directional_steepness(image):
    """(len(ANGLES),): the largest slope a pixel in each direction, black to white being 1."""
    picture = np.asarray(image, np.float64)
    picture = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    if picture.ndim != 2 or min(picture.shape) < 8:
        raise ValueError(f"expected a picture of one channel, at least 8 x 8 pixels, got {picture.shape}")
    low, high = np.quantile(picture, [QUANTILE, 1 - QUANTILE])
    picture = ((picture - low) / max(high - low, 1e-12)).clip(0, 1)
    down, right = np.gradient(picture)
    turns = np.radians(ANGLES)
    return np.array([np.abs(right * np.cos(a) - down * np.sin(a)).max() for a in turns])


def calibrate(images, sigmas=(1.0, 1.5, 2.0)):
    """Sharp pictures -> the `edge_height` of their kind: the median of sigma x f, blurred by known Gaussians."""
    from scipy.ndimage import gaussian_filter

    pictures = [np.asarray(image, np.float64) for image in images]
    found = [s * directional_steepness(gaussian_filter(p, s, mode="mirror")).mean() for p in pictures for s in sigmas]
    return float(np.median(found))
