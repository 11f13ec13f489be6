"""Input, counterfactual and map of one image in the same frame, for display side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import height_and_width
from ..pipelines.cxr_images import frame, prepare_image, restore_map

PANEL_SIZE = 512  # longer side: sharp enough to read the chest, three of them fit on a screen
SMALLEST_PANEL = 320  # longer side of the panels of smaller images


def panel_size(image: Image.Image | np.ndarray) -> int:
    """Longer side of an image's panels in pixels: its own, from `SMALLEST_PANEL` to `PANEL_SIZE`."""
    return min(max(*height_and_width(image), SMALLEST_PANEL), PANEL_SIZE)


def has_counterfactual(pipeline: Any) -> bool:
    """Whether a method (a pipeline or its class) makes a counterfactual; the others return the image itself."""
    return getattr(pipeline, "has_counterfactual", True)


def same_frame(
    source: Image.Image | np.ndarray,
    image: np.ndarray,
    counterfactual: np.ndarray | None,
    anomaly_map: np.ndarray,
    config: Mapping,
    longest: int = PANEL_SIZE,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(input, counterfactual, map), (h, w) floats in [0, 1] each, without the bars of the model's square.

    Args:
        source: the input of the pipeline, a PIL image or an (H, W, C) array.
        image, counterfactual, anomaly_map: (size, size, C), (size, size, C) and (size, size) of its "np" output;
            without a counterfactual (None) there is none in the result either.
        config: the pipeline's.
        longest: longer side of the result, in pixels.
    """
    aspect = config["aspect"]
    grey = sharp_input(source, image, config, longest)
    healthy = None if counterfactual is None else restore_map(counterfactual.mean(-1), *grey.shape, aspect)
    return grey, healthy, restore_map(anomaly_map, *grey.shape, aspect)


def crisp_counterfactual(
    source: Image.Image | np.ndarray, image: np.ndarray, counterfactual: np.ndarray, config: Mapping
) -> np.ndarray:
    """The input plus the change that the model made, enlarged to the input's resolution.

    The details are those of the input; the model has seen neither them nor this image. Of images of several channels,
    their mean.

    Args:
        source, image, counterfactual, config: as in `same_frame`.

    Returns:
        (H, W) float32 in [0, 1], in the greys of `image`, at the resolution of `source`.
    """
    height, width = height_and_width(source)
    change = counterfactual.mean(-1) - image.mean(-1)
    # restoring clips to [0, 1]: brighter and darker are restored one after the other
    brighter, darker = (restore_map(np.maximum(x, 0), height, width, config["aspect"]) for x in (change, -change))
    return (sharp_input(source, image, config, max(height, width)) + brighter - darker).clip(0, 1)


def sharp_input(
    source: Image.Image | np.ndarray, image: np.ndarray, config: Mapping, longest: int = PANEL_SIZE
) -> np.ndarray:
    """(h, w) float32 in [0, 1]: the input in the greys that the model saw, `longest` pixels on its longer side.

    Images that the model takes pixel by pixel, and those of several channels (their mean), keep their own size.
    """
    if config["aspect"] == "keep" or isinstance(source, np.ndarray):
        return restore_map(image.mean(-1), *height_and_width(source), config["aspect"])
    return in_model_greys(source, image.shape[0], config["scaling"], config["aspect"], longest)


def in_model_greys(image: Image.Image, size: int, scaling: str, aspect: str, longest: int = PANEL_SIZE) -> np.ndarray:
    """PIL image -> (h, w) float32 in [0, 1], the longer side `longest` pixels: the radiograph at its own sharpness.

    Black and white are those of the input of a model that works at `size` pixels, as in the counterfactual.
    """
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # 8 bits are resized as they are, which is several times as fast; more as floats
    deep = image if image.mode == "L" else Image.fromarray(np.asarray(image, np.float32))
    grey = np.array(deep.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grey /= 255 if image.mode == "L" else 65535
    if scaling == "minmax":
        top, left, h, w = frame(image.height, image.width, size, aspect)
        square = prepare_image(image, size, "dtype", aspect, (0.0, 1.0))[0, 0]
        square = square[max(top, 0) : max(top, 0) + h, max(left, 0) : max(left, 0) + w].numpy()  # without the bars
        grey = (grey - square.min()) / max(np.ptp(square), 1e-12)
    return grey.clip(0, 1)
