"""Blur as a product in the Fourier domain: transfer function, data steps, and what borders need."""

import math

import torch
import torch.nn.functional as F


def check_kernel(kernel):
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


def transfer_function(kernel, height, width):
    """(B, h, w) -> (B, 1, height, width) complex: the Fourier transform of a kernel centred at (h // 2, w // 2).

    Multiplying by it is the circular convolution, of kernels with even sides as well.

    Raises:
        ValueError: the kernel is larger than the picture.
    """
    h, w = kernel.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"expected a kernel of at most {height} x {width}, the picture's size, got {h} x {w}")
    padded = F.pad(kernel, (0, width - w, 0, height - h))
    return torch.fft.fft2(torch.roll(padded, (-(h // 2), -(w // 2)), dims=(-2, -1)))[:, None]


def data_step(x0, y, otf, rho):
    """argmin_x |k * x - y|^2 + rho |x - x0|^2 in closed form; `otf` is the transfer function of k.

    x0, y: (B, C, H, W); rho > 0, a number or a tensor that broadcasts.
    """
    numerator = otf.conj() * torch.fft.fft2(y) + rho * torch.fft.fft2(x0)
    return torch.fft.ifft2(numerator / (otf.abs() ** 2 + rho)).real


def masked_data_step(x0, y, otf, rho, known, iterations=15):
    """argmin_x |known (k * x - y)|^2 + rho |x - x0|^2 by conjugate gradients from `x0`.

    The data step of a picture whose surroundings were blurred into it and were not themselves measured.

    There is no closed form, but the products are the same as there, and much cheaper than asking a network. Where the
    measurement says little (the surroundings, frequencies that the blur has removed), so few iterations stay near `x0`,
    which is what is wanted of them.

    Args:
        known: (B, 1, H, W) booleans, the pixels that were measured.
    """

    def blurred(x, transfer):
        return torch.fft.ifft2(transfer * torch.fft.fft2(x)).real

    def normal(x):
        return blurred(known * blurred(x, otf), otf.conj()) + rho * x

    def dot(a, b):
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)

    tiny = torch.finfo(x0.dtype).tiny
    x = x0
    residual = blurred(known * (y - blurred(x0, otf)), otf.conj())
    direction, power = residual, dot(residual, residual)
    for _ in range(iterations):
        image = normal(direction)
        length = power / (dot(direction, image) + tiny)
        x, residual = x + length * direction, residual - length * image
        old, power = power, dot(residual, residual)
        direction = residual + power / (old + tiny) * direction
    return x


def measured(sizes, height, width):
    """[(h, w)] of pictures in the middle of canvases -> (B, 1, height, width) booleans: which pixels are theirs."""
    known = torch.zeros(len(sizes), 1, height, width, dtype=torch.bool)
    for mask, size in zip(known, sizes, strict=True):
        middle(mask, *size)[:] = True
    return known


def canvas_size(height, width, margin, multiple):
    """(H, W) of the periodic picture that `extend` makes: a margin on each side, rounded up to a multiple."""
    return tuple(math.ceil((side + 2 * margin) / multiple) * multiple for side in (height, width))


def extend(y, height, width):
    """(C, h, w) -> (C, height, width), a picture that can be repeated without a seam; `y` is its middle.

    The Fourier transform takes a picture for periodic. Where its left and right edges differ, a deconvolution sees a
    cliff there and rings into the picture. So both edges are continued by reflection and faded into each other over the
    margin that they share.
    """
    for axis, size in ((-2, height), (-1, width)):
        y = _extend_axis(y, axis, size)
    return y


def middle(x, height, width):
    """(..., H, W) -> (..., height, width): what `extend` was given."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def _extend_axis(y, axis, size):
    old = y.shape[axis]
    gap, before = size - old, (size - old) // 2
    if gap == 0:
        return y
    # the margin, walked from behind the last pixel round to before the first
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
