"""Input, counterfactual and map of one image in one frame, ready to stand side by side."""

import numpy as np
from PIL import Image

from ..data.images import picture_size
from ..pipelines.cxr_images import frame, prepare_image, restore_map

PANEL_SIZE = 512  # longer side: sharp enough to read the chest, three of them fit on a screen


def same_frame(source, image, counterfactual, anomaly_map, config, longest=PANEL_SIZE):
    """(input, counterfactual, map), (h, w) floats in [0, 1] each, without the bars of the model's square.

    Args:
        source: the PIL image or (H, W, C) array that was handed to the pipeline.
        image, counterfactual, anomaly_map: (size, size, C), (size, size, C) and (size, size) of its "np" answer.
        config: the pipeline's.
        longest: longer side of the result, in pixels.
    """
    aspect, size = config["aspect"], picture_size(source)
    if aspect == "keep" or isinstance(source, np.ndarray):  # pixel by pixel; of several channels their mean
        return [restore_map(x, *size, aspect) for x in (image.mean(-1), counterfactual.mean(-1), anomaly_map)]
    grey = in_model_greys(source, anomaly_map.shape[-1], config["scaling"], aspect, longest)
    return [grey, *(restore_map(x, *grey.shape, aspect) for x in (counterfactual.mean(-1), anomaly_map))]


def in_model_greys(image, size, scaling, aspect, longest=PANEL_SIZE):
    """PIL image -> (h, w) float32 in [0, 1], the longer side `longest` pixels: the radiograph at its own sharpness.

    Black and white are those of the model that works at `size` pixels, so it compares with the counterfactual.
    """
    scale = longest / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    # 8 bits are resized as they are, which is several times as fast; more as floats
    deep = image if image.mode == "L" else Image.fromarray(np.asarray(image, np.float32))
    grey = np.asarray(deep.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grey = grey / (255 if image.mode == "L" else 65535)
    if scaling == "minmax":
        top, left, h, w = frame(image.height, image.width, size, aspect)
        square = prepare_image(image, size, "dtype", aspect, (0.0, 1.0))[0, 0]
        square = square[max(top, 0) : max(top, 0) + h, max(left, 0) : max(left, 0) + w].numpy()  # without the bars
        grey = (grey - square.min()) / max(np.ptp(square), 1e-12)
    return grey.clip(0, 1)
