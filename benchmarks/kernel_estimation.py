"""How good is the blur that is estimated from a radiograph alone? Validation images, blurred by kernels that we know.

    python benchmarks/kernel_estimation.py                      (a minute or two)

The true width of a kernel is that of the Gaussian with its variances. Does the estimate help, or harm? That is said by
Wiener's filter, of the balance (how much to smooth) that is best: with the true kernel; with the estimated one at the
same balance, as if it were the truth; and with the estimated one at the balance that is best for it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from deblurring import BALANCES, BEYOND, ROOT, inside, interval, load_scenes, measure, psnr_of, wiener
from machine import markdown

from cxr_diffusers.deblurring.degradations import make_kernel
from cxr_diffusers.deblurring.kernel_estimation import EDGE_HEIGHT, LEAST_RATIO, calibrate, estimate_blur
from cxr_diffusers.evaluation.metrics import patient_weights

BLURS = [
    ("none", None, 0.5 / 255),
    ("Gaussian, sigma 1", "gaussian:sigma=1", 0.5 / 255),
    ("Gaussian, sigma 2", "gaussian:sigma=2", 0.5 / 255),
    ("Gaussian, sigma 2, noise 5/255", "gaussian:sigma=2", 5 / 255),
    ("Gaussian, sigma 3", "gaussian:sigma=3", 0.5 / 255),
    ("Gaussian, 3 along 30 degrees, 1 across", "gaussian:sigma=3,minor=1,angle=30", 0.5 / 255),
    ("straight motion, length 9, 30 degrees", "linear:length=9,angle=30", 0.5 / 255),
    ("motion, size 10", "motion:size=10,intensity=0.5,seed=0", 0.5 / 255),
    ("disk, radius 3", "disk:radius=3", 0.5 / 255),
]
HEADER = ["blur", "true sigma (along, across)", "estimated, median [quartiles]", "direction found", "its median error"]
HEADER += ["PSNR gained, true kernel", "estimated, taken for true", "estimated, own balance"]


def main(arguments=None):
    options = parser().parse_args(arguments)
    training, _ = load_scenes(options.data, "train", options.calibration, options.size)
    images = inside(training)[:, 0].numpy()
    print(f"EDGE_HEIGHT {EDGE_HEIGHT}; calibrated now on {len(images)} training images: {calibrate(images):.3f}\n")
    scenes, patients = load_scenes(options.data, "val", options.images, options.size)
    weights = patient_weights(patients, 1000)
    rows = [row_of(scenes, weights, *blur) for blur in BLURS]
    print(f"{len(scenes)} validation images of {options.size} pixels\n\n{markdown(HEADER, rows)}")


def row_of(scenes, weights, name, text, noise_std):
    kernel = make_kernel(text) if text else np.ones((1, 1), np.float32)
    truth, blurred = inside(scenes), measure(scenes, kernel, noise_std, seed=0)
    sigma, minor, angle = shape_of(kernel)
    estimates = [estimate_blur(y[0].numpy()) for y in blurred]
    width = [(b.sigma * b.minor) ** 0.5 for b in estimates]
    turned = [b for b in estimates if b.sigma > b.minor]
    off = [abs((b.angle - angle + 90) % 180 - 90) for b in turned]
    low, middle, high = np.quantile(width, [0.25, 0.5, 0.75])
    before = psnr_of(blurred, truth)

    def gained(kernels):
        """{balance: (N,) dB}"""
        pairs = list(zip(kernels, blurred, strict=True))
        restored = {b: torch.stack([wiener(k)(y[None], b)[0] for k, y in pairs]) for b in BALANCES}
        return {b: psnr_of(x, truth) - before for b, x in restored.items()}

    true, estimated = gained([kernel] * len(estimates)), gained([b.kernel for b in estimates])
    best, own = (max(gains, key=lambda b: gains[b].mean()) for gains in (true, estimated))
    return [
        name,
        f"{sigma:.2f}, {minor:.2f}" if text else "0",
        f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        f"{len(turned)} of {len(estimates)}",
        f"{np.median(off):.0f} degrees" if turned and sigma > LEAST_RATIO * minor else "",
        interval(true[best], weights, 2) if text else "",
        interval(estimated[best], weights, 2) if text else "",
        f"{interval(estimated[own], weights, 2)} ({own:g})",
    ]


def shape_of(kernel):
    """A kernel -> (sigma, minor, angle) of the Gaussian with its variances."""
    y, x = np.indices(kernel.shape)
    mean_x, mean_y = (kernel * x).sum(), (kernel * y).sum()
    xx, yy = (kernel * (x - mean_x) ** 2).sum(), (kernel * (y - mean_y) ** 2).sum()
    xy = -(kernel * (x - mean_x) * (y - mean_y)).sum()  # rows go down, angles up
    values, vectors = np.linalg.eigh([[xx, xy], [xy, yy]])
    minor, sigma = np.sqrt(values.clip(0))
    return sigma, minor, np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])) % 180


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT, help="folder with manifest.csv")
    parser.add_argument("--images", type=int, default=24, help="validation images, one a patient")
    parser.add_argument("--calibration", type=int, default=60, help="training images")
    parser.add_argument("--size", type=int, default=256 - 2 * BEYOND, help="of the images, in pixels")
    return parser


if __name__ == "__main__":
    main()
