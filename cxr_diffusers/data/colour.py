"""How much colour an image file has: radiographs are grey."""

from pathlib import Path

import numpy as np
import PIL.Image

from .images import FORMATS

GREY, TINTED, COLOURED = "grey", "tinted", "coloured"


def colour_level(path: Path | str) -> str:
    """Classify an image file that Pillow reads as `GREY`, `TINTED` or `COLOURED`.

    Grey values stored as RGB are grey. A pixel's colour is the range of its three channels, 0 to 255, after reduction
    to 128 x 128 pixels.

    Returns:
        `COLOURED` if over 30 % of the pixels have a colour above 40, as in photographs; else `TINTED` if over 2 % have
        one above 15, as with drawn marks or a tinted scan; else `GREY`.
    """
    PIL.Image.init()
    with PIL.Image.open(path, formats=FORMATS) as image:
        if image.mode not in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            return GREY
        image.draft("RGB", (256, 256))
        small = np.asarray(image.convert("RGB").resize((128, 128), PIL.Image.Resampling.BOX), int)
    colour = np.ptp(small, axis=-1)
    if np.mean(colour > 40) > 0.3:
        return COLOURED
    return TINTED if np.mean(colour > 15) > 0.02 else GREY
