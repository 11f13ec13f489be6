"""Blur as a product in the Fourier domain: transfer function, data steps, and the treatment of borders."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def check_kernel(kernel: torch.Tensor | np.ndarray) -> torch.Tensor:
    """(h, w) or (B, h, w), any type -> (B or 1, h, w) float32 tensor.

    Raises:
        ValueError: another shape, a value that is negative or not finite, or a sum that is not 1.
    """
    kernel = torch.as_tensor(kernel).detach().float()
    kernel = kernel[None] if kernel.ndim == 2 else kernel
    if kernel.ndim != 3 or kernel.numel() == 0:
        raise ValueError(f"expected a kernel of shape (h, w) or (B, h, w), got {tuple(kernel.shape)}")
    if not torch.isfinite(kernel).all() or kernel.min() < 0:
        raise ValueError("expected a kernel of finite values, 0 or more: got negative ones, NaN or infinity")
    sums = kernel.sum(dim=(1, 2))
    if (sums - 1).abs().max() > 1e-3:
        raise ValueError(f"expected a kernel that sums to 1 (blur keeps the exposure), got {sums.tolist()}")
    return kernel


def transfer_function(kernel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, h, w) -> (B, 1, height, width) complex: the Fourier transform of a kernel centred at (h // 2, w // 2).

    Multiplication by it is circular convolution, also for kernels with even sides.

    Raises:
        ValueError: the kernel is larger than the image.
    """
    h, w = kernel.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"expected a kernel of at most {height} x {width}, the image's size, got {h} x {w}")
    padded = F.pad(kernel, (0, width - w, 0, height - h))
    return torch.fft.fft2(torch.roll(padded, (-(h // 2), -(w // 2)), dims=(-2, -1)))[:, None]


def data_step(x0: torch.Tensor, y: torch.Tensor, otf: torch.Tensor, rho: float | torch.Tensor) -> torch.Tensor:
    """argmin_x |k * x - y|^2 + rho |x - x0|^2 in closed form.

    Args:
        x0, y: (B, C, H, W), real.
        otf: the `transfer_function` of k.
        rho: greater than 0; a number or a tensor that broadcasts.
    """
    half = _half_spectrum(otf)
    numerator = half.conj() * torch.fft.rfft2(y) + rho * torch.fft.rfft2(x0)
    return torch.fft.irfft2(numerator / (half.abs() ** 2 + rho), s=x0.shape[-2:])


def masked_data_step(
    x0: torch.Tensor,
    y: torch.Tensor,
    otf: torch.Tensor,
    rho: float | torch.Tensor,
    measured: torch.Tensor,
    iterations: int = 15,
) -> torch.Tensor:
    """argmin_x |measured (k * x - y)|^2 + rho |x - x0|^2 by conjugate gradients that start at `x0`.

    The data step of an image into whose border a part of the scene was blurred that lies outside it.

    There is no closed form, but each iteration takes a few Fourier transforms only, far less than a call of the
    network. Where the measurement says little (outside the image, at frequencies that the blur has removed), so few
    iterations stay near `x0`, as intended.

    Args:
        x0, y, otf, rho: as in `data_step`.
        measured: (B, 1, H, W) booleans, the pixels of the image.
    """
    transfer = _half_spectrum(otf)
    adjoint = transfer.conj()

    def multiplied(x, factor):
        return torch.fft.irfft2(factor * torch.fft.rfft2(x), s=x.shape[-2:])

    def normal(x):
        return multiplied(measured * multiplied(x, transfer), adjoint) + rho * x

    def dot(a, b):
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)

    tiny = torch.finfo(x0.dtype).tiny
    x = x0
    residual = multiplied(measured * (y - multiplied(x0, transfer)), adjoint)
    direction, power = residual, dot(residual, residual)
    for _ in range(iterations):
        image = normal(direction)
        length = power / (dot(direction, image) + tiny)
        x, residual = x + length * direction, residual - length * image
        old, power = power, dot(residual, residual)
        direction = residual + power / (old + tiny) * direction
    return x


def image_masks(sizes: Sequence[tuple[int, int]], height: int, width: int) -> torch.Tensor:
    """[(h, w)] of images in the middle of canvases -> (B, 1, height, width) booleans, True inside the images."""
    masks = torch.zeros(len(sizes), 1, height, width, dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        middle(mask, *size)[:] = True
    return masks


def canvas_size(height: int, width: int, margin: int, multiple: int) -> tuple[int, int]:
    """(H, W) of the periodic image that `extend` makes: a margin on each side, rounded up by `fast_length`."""
    return fast_length(height + 2 * margin, multiple), fast_length(width + 2 * margin, multiple)


def fast_length(length: int, multiple: int) -> int:
    """The least k `multiple` >= `length` whose k has no prime factor above 11: Fourier transforms of it are fast.

    >>> fast_length(278, 2), fast_length(1046, 8)
    (280, 1056)
    """
    k = math.ceil(length / multiple)
    while True:
        rest = k
        for prime in (2, 3, 5, 7, 11):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return k * multiple
        k += 1


def extend(y: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(C, h, w) -> (C, height, width), an image that can be repeated without a seam; `y` is its middle.

    The Fourier transform treats an image as periodic. Where its left and right edges differ, a deconvolution sees a
    step and rings into the image. So both edges are continued by reflection and faded into each other over the margin
    that they share.
    """
    for axis, size in ((-2, height), (-1, width)):
        y = _extend_axis(y, axis, size)
    return y


def middle(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(..., H, W) -> (..., height, width), the middle: undoes `extend`."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _half_spectrum(otf):
    """The frequencies of `torch.fft.rfft2`: half of them determine the transform of a real image."""
    return otf[..., : otf.shape[-1] // 2 + 1]


def _extend_axis(y, axis, size):
    old = y.shape[axis]
    gap, before = size - old, (size - old) // 2
    if gap == 0:
        return y
    # the margin in the order of a periodic image: from after the last pixel to before the first
    i = torch.arange(gap)
    after_last = y.index_select(axis, _reflect(old + i, old))
    before_first = y.index_select(axis, _reflect(i - gap, old))
    fade = 0.5 - 0.5 * torch.cos(math.pi * (i + 1) / (gap + 1))
    shape = [1] * y.ndim
    shape[axis] = gap
    fade = fade.to(y).reshape(shape)
    margin = (1 - fade) * after_last + fade * before_first
    after, front = margin.split([gap - before, before], dim=axis)
    return torch.cat([front, y, after], dim=axis)


def _reflect(i, size):
    """Positions of any integer -> 0..size - 1, mirrored at the edges, the edge pixel not repeated."""
    if size == 1:
        return torch.zeros_like(i)
    i = i.remainder(2 * size - 2)
    return torch.where(i < size, i, 2 * size - 2 - i)
