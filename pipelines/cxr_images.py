"""Images into a model's square and maps back out of it."""

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


def prepare_image(image, size, scaling="minmax", aspect="pad", data_range=(-1.0, 1.0), num_channels=1):
    """Any picture(s) -> (B, num_channels, size, size) float32 in `data_range`, ready for a model.

    Args:
        image: a PIL image, an array or a tensor, or a list of them (sizes and depths may differ). Arrays are (H, W),
            (H, W, C) or (B, H, W, C), tensors (H, W), (C, H, W) or (B, C, H, W).
        size: side of the model's square, in pixels.
        scaling: "minmax" stretches each picture's own darkest and brightest value to the range, after resizing and
            inside the frame, so that neither a hot pixel nor the padding decides. "dtype" maps the range of the type
            (0..255, 0..65535; floats: [0, 1] or, if any value is negative, [-1, 1]) and keeps exposure as it is.
        aspect: "pad" (bars in the darkest value, nothing lost), "crop" (centre square), "squash" (the sides are
            stretched to a square, as guided-diffusion's CheXpert scripts do), or "keep" (the picture's own pixels,
            bars around them or the centre of them: MRI slices of 240 pixels in a square of 256).
        data_range: the darkest and the brightest value that the model knows.
        num_channels: channels of the model; colour pictures become grey for one channel.

    Raises:
        TypeError: neither PIL image, array nor tensor (a path, say).
        ValueError: a shape, a value (NaN) or an option that is not as said above.
    """
    if aspect not in ("pad", "crop", "squash", "keep"):
        raise ValueError(f"expected `aspect` pad, crop, squash or keep, got {aspect!r}")
    if scaling not in ("minmax", "dtype"):
        raise ValueError(f"expected `scaling` minmax or dtype, got {scaling!r}")
    pictures = [_one_picture(p, size, scaling, aspect, num_channels) for p in _each_picture(image, num_channels)]
    low, high = data_range
    return torch.stack(pictures) * (high - low) + low


def read_pictures(image, num_channels=1):
    """Any picture(s) -> [((num_channels, H, W) float32 in [0, 1], has it more than 8 bits)], each at its own size.

    [0, 1] is the range of the type. What may be handed in and what is refused: see `prepare_image`, whose
    `scaling="dtype"` this is.
    """
    channels = [_channels(picture, num_channels) for picture in _each_picture(image, num_channels)]
    return [(_scale_by_type(*c).clamp(0, 1), c[2] not in (torch.uint8, torch.bool)) for c in channels]


def frame(height, width, size, aspect):
    """Where a picture of `height` x `width` lies in the model's square: (top, left, height, width), in its pixels.

    "crop", and "keep" of a larger picture, answer with a frame larger than the square and a negative corner.
    """
    if aspect == "squash":
        return 0, 0, size, size
    if aspect == "keep":
        return (size - height) // 2, (size - width) // 2, height, width
    fit = max if aspect == "pad" else min
    scale = size / fit(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - h) // 2, (size - w) // 2, h, w


def restore_map(anomaly_map, height, width, aspect="pad"):
    """(size, size) map of the model's square -> (height, width) float32 array, the picture's own resolution.

    Bars are cut away; what was cropped away comes back as 0.
    """
    tensor = torch.as_tensor(np.asarray(anomaly_map, dtype=np.float32))
    size = tensor.shape[-1]
    top, left, h, w = frame(height, width, size, aspect)
    inside = tensor[max(top, 0) : max(top, 0) + min(h, size), max(left, 0) : max(left, 0) + min(w, size)]
    # the part of the picture that the model saw, in the picture's own pixels
    y, x = (round(max(-corner, 0) * side / shown) for corner, side, shown in ((top, height, h), (left, width, w)))
    seen_h, seen_w = round(inside.shape[0] * height / h), round(inside.shape[1] * width / w)
    restored = torch.zeros(height, width)
    restored[y : y + seen_h, x : x + seen_w] = _resize(inside[None], seen_h, seen_w)[0].clamp(0, 1)
    return restored.numpy()


def _each_picture(image, num_channels):
    """Whatever was handed in -> a list of (C, H, W) arrays or tensors, each in its own type."""
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("expected at least one image, got an empty list")
        return [picture for item in image for picture in _each_picture(item, num_channels)]
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
    if num_channels == 3:
        return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        # mode I is what PIL makes of many 16-bit files
        return (array.astype(np.uint16) if image.mode == "I" and array.min() >= 0 and array.max() < 65536 else array)[
            None
        ]
    return np.asarray(image.convert("L"))[None]


def _one_picture(picture, size, scaling, aspect, num_channels):
    """(C, H, W) of any type -> (num_channels, size, size) float32 in [0, 1]."""
    tensor, floating, kind = _channels(picture, num_channels)
    top, left, h, w = frame(*tensor.shape[1:], size, aspect)
    if scaling == "dtype":
        tensor = _scale_by_type(tensor, floating, kind)
    tensor = _resize(tensor, h, w)
    tensor = tensor[:, max(-top, 0) : max(-top, 0) + size, max(-left, 0) : max(-left, 0) + size]
    if scaling == "minmax":
        low, high = tensor.amin(dim=(1, 2), keepdim=True), tensor.amax(dim=(1, 2), keepdim=True)
        tensor = (tensor - low) / (high - low).clamp(min=1e-12)
    top, left = max(top, 0), max(left, 0)
    return F.pad(tensor.clamp(0, 1), (left, size - tensor.shape[2] - left, top, size - tensor.shape[1] - top))


def _channels(picture, num_channels):
    """(C, H, W) of any type -> ((num_channels, H, W) float32 in its own values, was it floating, its type)."""
    if not torch.is_tensor(picture):
        picture = torch.from_numpy(np.array(picture, dtype=picture.dtype.newbyteorder("=")))  # of some TIFFs it is not
    if picture.numel() == 0 or picture.is_complex():
        raise ValueError(f"expected real pixels, got {picture.dtype} of shape {tuple(picture.shape)}")
    tensor = picture.detach().cpu()
    floating, kind = tensor.is_floating_point(), tensor.dtype
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError("expected finite pixel values, got NaN or infinity")
    if len(tensor) != num_channels:
        if num_channels != 1:
            raise ValueError(f"expected images of {num_channels} channels, got {len(tensor)}")
        # the weights of PIL's convert("L"); a fourth channel is alpha
        tensor = (tensor[:3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return tensor, floating, kind


def _scale_by_type(tensor, floating, kind):
    if floating:
        low, high = tensor.min().item(), tensor.max().item()
        if low < -1 or high > 1:
            raise ValueError(f"expected float images in [0, 1] or [-1, 1], got values from {low:g} to {high:g}")
        return (tensor + 1) / 2 if low < 0 else tensor
    if tensor.min() < 0:
        raise ValueError(f"expected integer images of 0 and more, got {int(tensor.min())}: use `scaling='minmax'`")
    return tensor / {torch.uint8: 255, torch.bool: 1}.get(kind, 65535)


def _resize(tensor, height, width):
    """(C, H, W) -> (C, height, width): area means along a side that shrinks, bilinear along one that grows."""
    pictures = []
    for channel in tensor.numpy():
        picture = PIL.Image.fromarray(channel)
        picture = picture.resize((min(width, picture.width), min(height, picture.height)), PIL.Image.Resampling.BOX)
        pictures.append(np.asarray(picture.resize((width, height), PIL.Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(pictures))
