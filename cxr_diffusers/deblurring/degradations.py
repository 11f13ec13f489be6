"""Blur kernels, blur and noise: y = k * x + n.

A kernel is an (h, w) float32 array of values that are 0 or more and sum to 1, centred at (h // 2, w // 2).
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import torch
import torch.nn.functional as F

from ..data.images import read_image

BOUNDARIES = {"reflect": "reflect", "replicate": "replicate", "wrap": "circular"}


def motion_kernel(size: int = 10, intensity: float = 0.5, seed: int | np.random.RandomState = 0) -> np.ndarray:
    """A random motion trajectory, drawn as in DiffPIR's experiments (L. Borodenko's motionblur).

    Args:
        size: side of the kernel, in pixels.
        intensity: of the shaking, 0 (nearly straight) to 1.
        seed: a number, or a `numpy.random.RandomState` to draw from.

    Returns:
        (size, size) float32.

    Raises:
        ValueError: a size below 2 or an intensity outside [0, 1].
    """
    _expect(isinstance(size, int) and size >= 2, "a motion `size` in whole pixels, 2 or more", size)
    _expect(0 <= intensity <= 1, "an `intensity` from 0 to 1", intensity)
    random = seed if isinstance(seed, np.random.RandomState) else np.random.RandomState(seed)
    path = motion_path(size, intensity, random)
    # drawn at twice the size, then shrunk
    diagonal = 2 * size * 2**0.5
    drawing = PIL.Image.new("RGB", (2 * size, 2 * size))
    # at least one pixel: below size 54 the width rounds to 0, for which Pillow 13 draws nothing
    width = max(1, int(diagonal / 150))
    PIL.ImageDraw.Draw(drawing).line([(z.real, z.imag) for z in path], fill=(255, 255, 255), width=width)
    drawing = drawing.filter(PIL.ImageFilter.GaussianBlur(radius=int(diagonal * 0.01)))
    drawing = drawing.resize((size, size), PIL.Image.Resampling.LANCZOS).convert("L")
    return _normalised(np.asarray(drawing, np.float64))


def motion_path(size: int, intensity: float, random: np.random.RandomState) -> np.ndarray:
    """(N,) complex: the trajectory of `motion_kernel`, x + iy, in pixels of its drawing of 2 size x 2 size.

    Random numbers are drawn in the order of the original, so a seed gives the same path.
    """
    diagonal = 2 * size * 2**0.5
    length = 0.75 * diagonal * (random.uniform() + random.uniform(0, intensity**2))
    steps: list[float] = []
    while sum(steps) < length:
        step = random.beta(1, 30) * (1 - intensity + 0.1) * diagonal
        if step < length:
            steps.append(step)
    max_angle = random.uniform(0, intensity * np.pi)
    jitter = random.beta(2, 20)
    angles = [random.uniform(-max_angle, max_angle)]
    while len(angles) < len(steps):
        turn = random.triangular(0, intensity * max_angle, max_angle + 0.1)
        keeps = random.uniform() >= jitter
        angles.append(turn * np.sign(angles[-1]) * (1 if keeps else -1))
    path = np.cumsum(np.array(steps) * np.exp(1j * np.array(angles)))
    path = (path - path.mean()) * np.exp(1j * random.uniform(0, np.pi))
    return path + complex(size, size)


def linear_motion_kernel(length: float, angle: float = 0.0) -> np.ndarray:
    """A straight line: motion at constant speed. `length` in pixels (1: no blur), `angle` in degrees from the image's
    rows, counter-clockwise."""
    _expect(length >= 1, "a `length` of 1 pixel or more", length)
    count = max(1, int(64 * length)) | 1
    t = ((np.arange(count) + 0.5) / count - 0.5) * length
    # each piece of the line belongs to the pixel it lies in
    column = np.rint(t * np.cos(np.radians(angle))).astype(int)
    row = np.rint(-t * np.sin(np.radians(angle))).astype(int)
    reach_y, reach_x = np.abs(row).max(), np.abs(column).max()
    kernel = np.zeros((2 * reach_y + 1, 2 * reach_x + 1))
    np.add.at(kernel, (row + reach_y, column + reach_x), 1)
    return _normalised(kernel)


def gaussian_kernel(sigma: float, minor: float | None = None, angle: float = 0.0) -> np.ndarray:
    """A Gaussian: sigma in pixels along `angle` (degrees, counter-clockwise), `minor` across it (None: the same)."""
    minor = sigma if minor is None else minor
    _expect(sigma > 0 and minor > 0, "a `sigma` and a `minor` greater than 0", (sigma, minor))
    radius = max(1, int(np.ceil(4 * max(sigma, minor))))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    turn = np.radians(angle)
    along, across = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    return _normalised(np.exp(-((along / sigma) ** 2 + (across / minor) ** 2) / 2))


def disk_kernel(radius: float) -> np.ndarray:
    """A disk, as from a focal spot or a defocused lens; `radius` in pixels, edge pixels by their covered area."""
    _expect(radius > 0, "a `radius` greater than 0", radius)
    reach, fine = int(np.ceil(radius)), 16
    points = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = points[:, None] ** 2 + points[None] ** 2 <= radius**2
    return _normalised(inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean(axis=(1, 3)))


def load_kernel(path: str | Path) -> np.ndarray:
    """Read a kernel from an image file (png, tif ...; bright pixels have large weights) or a 2-d npy array; sums to 1.

    Raises:
        FileNotFoundError: no such file. ValueError: not 2-d, negative or not finite values, or all 0.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy":
        kernel = np.asarray(read_image(path), np.float64)
    elif not path.is_file():
        raise FileNotFoundError(f"no such kernel file: {path}")
    else:
        kernel = np.load(path, allow_pickle=False).astype(np.float64)
    if kernel.ndim != 2 or not np.isfinite(kernel).all() or kernel.min() < 0 or kernel.max() <= 0:
        raise ValueError(f"{path}: expected a 2-d kernel of finite values, 0 or more and not all 0, got {kernel.shape}")
    return _normalised(kernel)


KERNELS: dict[str, Callable[..., np.ndarray]] = {
    "motion": motion_kernel,
    "linear": linear_motion_kernel,
    "gaussian": gaussian_kernel,
    "disk": disk_kernel,
    "file": load_kernel,
}


def make_kernel(text: str) -> np.ndarray:
    """ "motion:size=10,intensity=0.5,seed=3", "linear:length=9,angle=30", "gaussian:sigma=1.5", "disk:radius=2",
    "file:path=k.png" -> kernel: a name of `KERNELS` and keywords of its function, all of them numbers but `path`.

    >>> make_kernel("linear:length=3").round(2).tolist()
    [[0.33, 0.33, 0.33]]

    Raises:
        ValueError: an unknown name or keyword, or one that is missing, given twice or no number.
    """
    name, _, rest = str(text).partition(":")
    if name not in KERNELS:
        raise ValueError(f"expected a kernel of {', '.join(KERNELS)}, got {text!r}")
    parameters = inspect.signature(KERNELS[name]).parameters
    given: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        key, _, value = item.partition("=")
        if key not in parameters:
            raise ValueError(f"{text!r}: unknown key {key!r}, expected some of {', '.join(parameters)}")
        if key in given:
            raise ValueError(f"{text!r}: expected {key!r} once, got it twice")
        try:
            given[key] = value if key == "path" else float(value)
        except ValueError:
            raise ValueError(f"{text!r}: expected a number for {key!r}, got {value!r}") from None
        if key in ("size", "seed") and given[key] == int(given[key]):
            given[key] = int(given[key])
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if missing:
        raise ValueError(f"{text!r}: give {missing[0]!r}, as in {name}:{missing[0]}=...")
    return KERNELS[name](**given)


def blur(image: torch.Tensor, kernel: np.ndarray | torch.Tensor, boundary: str = "reflect") -> torch.Tensor:
    """Convolve an image with a kernel, k * x.

    Args:
        image: (B, C, H, W) or (H, W) tensor.
        kernel: (h, w), see the module.
        boundary: the values outside the image: "reflect" (mirrored), "replicate" (the edge pixel) or "wrap" (periodic,
            as for the Fourier transform).

    Returns:
        a tensor of the image's shape.

    Raises:
        ValueError: an unknown boundary, or a kernel larger than the image.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"expected `boundary` {', '.join(BOUNDARIES)}, got {boundary!r}")
    kernel = torch.as_tensor(kernel).to(image)
    (h, w), (height, width) = kernel.shape, image.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"expected a kernel of at most {height} x {width}, the image's size, got {h} x {w}")
    x = image.reshape(-1, 1, height, width)
    # the part of the kernel after its centre reaches pixels before this one, and the other way round
    x = F.pad(x, (w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2), mode=BOUNDARIES[boundary])
    return F.conv2d(x, kernel.flip(0, 1)[None, None]).reshape(image.shape)


def blur_adjoint(image: torch.Tensor, kernel: np.ndarray | torch.Tensor, boundary: str = "reflect") -> torch.Tensor:
    """The adjoint of `blur`: <blur(x), y> = <x, blur_adjoint(y)> for all x and y. Arguments as for `blur`."""
    with torch.enable_grad():
        x = torch.zeros_like(image, requires_grad=True)
        return torch.autograd.grad(blur(x, kernel, boundary), x, image)[0]


def add_noise(image: torch.Tensor, noise_std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Add white Gaussian noise of standard deviation `noise_std`, on the scale of the image."""
    _expect(noise_std >= 0, "a `noise_std` of 0 or more", noise_std)
    noise = torch.randn(image.shape, generator=generator, dtype=image.dtype)
    return image + noise_std * noise.to(image.device)


def degrade(
    image: torch.Tensor,
    kernel: np.ndarray | torch.Tensor,
    noise_std: float = 0.0,
    boundary: str = "reflect",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Blur and add noise, y = k * x + n, for images in [0, 1]; `DiffPIRDeblurPipeline` reverses it."""
    return add_noise(blur(image, kernel, boundary), noise_std, generator)


def _normalised(kernel):
    return (kernel / kernel.sum()).astype(np.float32)


def _expect(condition, expectation, got):
    if not condition:
        raise ValueError(f"expected {expectation}, got {got!r}")
