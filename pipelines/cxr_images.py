"""Images as a model's square input, and maps of that square as maps of the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


def prepare_image(
    image: Any,
    size: int,
    scaling: str = "minmax",
    aspect: str = "pad",
    data_range: Sequence[float] = (-1.0, 1.0),
    num_channels: int = 1,
) -> torch.Tensor:
    """Any image(s) -> (B, num_channels, size, size) float32 in `data_range`, the input of a model.

    Args:
        image: a PIL image, an array or a tensor, or a list of them (sizes and depths may differ). Arrays are (H, W),
            (H, W, C) or (B, H, W, C), tensors (H, W), (C, H, W) or (B, C, H, W).
        size: side of the model's square, in pixels.
        scaling: "minmax" stretches each image from its own darkest and brightest value to the range, after resizing
            and inside the frame, so that neither a hot pixel nor the padding determines the range. "dtype" maps the
            range of the type (0..255, 0..65535; floats: [0, 1] or, if any value is negative, [-1, 1]) and keeps the
            exposure.
        aspect: "pad" (bars in the darkest value, nothing lost), "edge" (the same, but the bars repeat the border of the
            image), "crop" (centre square), "squash" (the sides are stretched to a square, as guided-diffusion's
            CheXpert scripts do), or "keep" (no resizing: the image is padded, or its centre is cut out: MRI slices of
            240 pixels in a square of 256).
        data_range: the model's values for black and white.
        num_channels: channels of the model; colour images become grey for one channel.

    Raises:
        TypeError: not a PIL image, an array or a tensor (but, for example, a path).
        ValueError: an unsupported shape, a NaN or an infinity, or an invalid option.
    """
    if aspect not in ("pad", "edge", "crop", "squash", "keep"):
        raise ValueError(f"expected `aspect` pad, edge, crop, squash or keep, got {aspect!r}")
    if scaling not in ("minmax", "dtype"):
        raise ValueError(f"expected `scaling` minmax or dtype, got {scaling!r}")
    images = [_prepare_one(item, size, scaling, aspect, num_channels) for item in _split_images(image, num_channels)]
    low, high = data_range
    return torch.stack(images) * (high - low) + low


def read_images(image: Any, num_channels: int = 1) -> list[tuple[torch.Tensor, bool]]:
    """Any image(s) -> [((num_channels, H, W) float32 in [0, 1], True for more than 8 bits)], each at its own size.

    [0, 1] is the range of the type, as with `scaling="dtype"` of `prepare_image`, which documents the types that are
    accepted and the errors.
    """
    channels = [_channels(item, num_channels) for item in _split_images(image, num_channels)]
    return [(_scale_by_type(*c).clamp(0, 1), c[2] not in (torch.uint8, torch.bool)) for c in channels]


def frame(height: int, width: int, size: int, aspect: str) -> tuple[int, int, int, int]:
    """Where an image of `height` x `width` lies in the model's square: (top, left, height, width) in its pixels.

    "crop", and "keep" of a larger image, give a frame larger than the square, with a negative corner.
    """
    if aspect == "squash":
        return 0, 0, size, size
    if aspect == "keep":
        return (size - height) // 2, (size - width) // 2, height, width
    fit = max if aspect in ("pad", "edge") else min
    scale = size / fit(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - h) // 2, (size - w) // 2, h, w


def restore_map(anomaly_map: Any, height: int, width: int, aspect: str = "pad") -> np.ndarray:
    """(size, size) map of the model's square -> (height, width) float32 array at the image's own resolution.

    Bars are cut away; parts of the image that were cropped away get 0.
    """
    tensor = torch.as_tensor(np.asarray(anomaly_map, dtype=np.float32))
    size = tensor.shape[-1]
    top, left, h, w = frame(height, width, size, aspect)
    inside = tensor[max(top, 0) : max(top, 0) + min(h, size), max(left, 0) : max(left, 0) + min(w, size)]
    # the part of the image inside the square, in the image's own pixels
    y, x = (round(max(-corner, 0) * side / framed) for corner, side, framed in ((top, height, h), (left, width, w)))
    inner_h, inner_w = round(inside.shape[0] * height / h), round(inside.shape[1] * width / w)
    restored = torch.zeros(height, width)
    restored[y : y + inner_h, x : x + inner_w] = _resize(inside[None], inner_h, inner_w)[0].clamp(0, 1)
    return restored.numpy()


def _split_images(image, num_channels):
    """Any image(s) -> a list of (C, H, W) arrays or tensors, each in its own type."""
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("expected at least one image, got an empty list")
        return [one for item in image for one in _split_images(item, num_channels)]
    if isinstance(image, PIL.Image.Image):
        return [_from_pil(image, num_channels)]
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            return [image[None]]
        if image.ndim in (3, 4) and image.shape[-1] in (1, 3, 4, num_channels):
            return list(np.moveaxis(image, -1, -3).reshape(-1, image.shape[-1], *image.shape[-3:-1]))
        raise ValueError(f"expected arrays of shape (H, W), (H, W, C) or (B, H, W, C), got {image.shape}")
    if torch.is_tensor(image):
        if image.ndim == 2:
            return [image[None]]
        if image.ndim in (3, 4) and image.shape[-3] in (1, 3, 4, num_channels):
            return list(image.reshape(-1, *image.shape[-3:]))
        raise ValueError(f"expected tensors of shape (H, W), (C, H, W) or (B, C, H, W), got {tuple(image.shape)}")
    raise TypeError(f"expected a PIL image, an array, a tensor or a list of them, got {type(image).__name__}")


def _from_pil(image, num_channels):
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        if image.mode == "I" and array.min() >= 0 and array.max() < 65536:  # PIL opens many 16-bit files as mode I
            array = array.astype(np.uint16)
        # PIL's convert("RGB") would make all values above 255 white
        return np.repeat(array[None], 3 if num_channels == 3 else 1, axis=0)
    if num_channels == 3:
        return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    return np.asarray(image.convert("L"))[None]


def _prepare_one(image, size, scaling, aspect, num_channels):
    """(C, H, W) of any type -> (num_channels, size, size) float32 in [0, 1]."""
    tensor, floating, dtype = _channels(image, num_channels)
    top, left, h, w = frame(*tensor.shape[1:], size, aspect)
    if scaling == "dtype":
        tensor = _scale_by_type(tensor, floating, dtype)
    tensor = _resize(tensor, h, w)
    tensor = tensor[:, max(-top, 0) : max(-top, 0) + size, max(-left, 0) : max(-left, 0) + size]
    if scaling == "minmax":
        low, high = tensor.amin(dim=(1, 2), keepdim=True), tensor.amax(dim=(1, 2), keepdim=True)
        tensor = (tensor - low) / (high - low).clamp(min=1e-12)
    top, left = max(top, 0), max(left, 0)
    bars = (left, size - tensor.shape[2] - left, top, size - tensor.shape[1] - top)
    return F.pad(tensor.clamp(0, 1), bars, mode="replicate" if aspect == "edge" else "constant")


def _channels(image, num_channels):
    """(C, H, W) of any type -> ((num_channels, H, W) float32 in its own values, whether it was floating, its type)."""
    if not torch.is_tensor(image):
        # some TIFF readers give big-endian arrays
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("=")))
    if image.numel() == 0 or image.is_complex():
        raise ValueError(f"expected real pixels, got {image.dtype} of shape {tuple(image.shape)}")
    tensor = image.detach().cpu()
    floating, dtype = tensor.is_floating_point(), tensor.dtype
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError("expected finite pixel values, got NaN or infinity")
    if len(tensor) != num_channels:
        if num_channels != 1:
            raise ValueError(f"expected images of {num_channels} channels, got {len(tensor)}")
        # the weights of PIL's convert("L"); a fourth channel is alpha
        tensor = (tensor[:3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return tensor, floating, dtype


def _scale_by_type(tensor, floating, dtype):
    if floating:
        low, high = tensor.min().item(), tensor.max().item()
        if low < -1 or high > 1:
            raise ValueError(f"expected float images in [0, 1] or [-1, 1], got values from {low:g} to {high:g}")
        return (tensor + 1) / 2 if low < 0 else tensor
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high > 65535:
        raise ValueError(f"expected integer images from 0 to 65535, got {low} to {high}: use `scaling='minmax'`")
    return tensor / {torch.uint8: 255, torch.bool: 1}.get(dtype, 65535)


def _resize(tensor, height, width):
    """(C, H, W) -> (C, height, width): area means along a side that shrinks, bilinear along one that grows."""
    channels = []
    for channel in tensor.numpy():
        image = PIL.Image.fromarray(channel)
        image = image.resize((min(width, image.width), min(height, image.height)), PIL.Image.Resampling.BOX)
        channels.append(np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(channels))
