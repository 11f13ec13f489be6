"""TIFF files whose zero is white, a tag that Pillow honours for 8 bits alone."""

import struct

import numpy as np
import PIL.Image
import PIL.ImageOps


def as_black_is_zero(content: bytes) -> tuple[bytes, bool]:
    """Make Pillow read a TIFF whose zero is white as if its zero were black: `negative` then inverts the pixels.

    Pillow honours that tag for 8 bits only, and refuses some other files that have it.

    Args:
        content: bytes of an image file of any format.

    Returns:
        (content, False), or for a TIFF whose zero is white (its bytes with the tag changed, True).
    """
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if not order or len(content) < 16 or struct.unpack_from(order + "H", content, 2)[0] not in (42, 43):
        return content, False
    big = struct.unpack_from(order + "H", content, 2)[0] == 43
    count, entry, step = ("Q", "Q", 20) if big else ("H", "I", 12)
    (begin,) = struct.unpack_from(order + entry, content, 8 if big else 4)
    (number,) = struct.unpack_from(order + count, content, begin)
    begin += struct.calcsize(order + count)
    for i in range(begin, min(begin + step * min(number, 65535), len(content) - step + 1), step):
        tag, field_type = struct.unpack_from(order + "2H", content, i)
        value_at = i + step - (8 if big else 4)
        value_type = {1: "B", 3: "H", 4: "I"}.get(field_type)
        if tag == 262 and value_type and struct.unpack_from(order + value_type, content, value_at)[0] == 0:
            changed = bytearray(content)
            struct.pack_into(order + value_type, changed, value_at, 1)
            return bytes(changed), True
    return content, False


def negative(image: PIL.Image.Image, bits: int, signed: bool) -> PIL.Image.Image:
    """A PIL image of a TIFF, `bits` deep -> the same, light and dark exchanged within its type."""
    if image.mode in ("1", "L"):
        return PIL.ImageOps.invert(image.convert("L"))
    array = np.asarray(image)
    if array.dtype.kind == "f":
        return PIL.Image.fromarray((1 if array.max() <= 1 else 65535) - array)
    top = 2 ** (bits - signed) - 1
    if bits > 16 and array.max() <= 65535:
        top = 65535  # as `to_grey` reads them
    array = top - array.astype(np.int64)
    return PIL.Image.fromarray(array.astype(np.uint16 if fits_16_bits(array) else np.int32))


def fits_16_bits(array: np.ndarray) -> bool:
    """Whether the values of a 32-bit array fit 16 unsigned bits without loss, and are not just 0 and 1."""
    whole = np.isfinite(array).all() and (array == array.round()).all()
    return bool(whole and array.min() >= 0 and 1 < array.max() < 65536)
