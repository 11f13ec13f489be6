"""TIFF files whose zero is white, a tag that Pillow honours for 8 bits alone."""

import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps


def as_black_is_zero(path):
    """(path, False), or for a TIFF whose zero is white (a copy in memory with the opposite tag, True).

    Pillow honours that tag for 8 bits alone, and refuses some others; so it is taken off, and honoured here.
    """
    with open(path, "rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if not order or struct.unpack_from(order + "H", head, 2)[0] not in (42, 43):
            return path, False
        big = struct.unpack_from(order + "H", head, 2)[0] == 43
        count, entry, step = ("Q", "Q", 20) if big else ("H", "I", 12)
        (begin,) = struct.unpack_from(order + entry, head, 8 if big else 4)
        file.seek(begin)
        number = file.read(struct.calcsize(order + count))
        begin += len(number)
        tags = file.read(step * min(struct.unpack(order + count, number)[0], 65535))
        for i in range(0, len(tags) - step + 1, step):
            tag, kind = struct.unpack_from(order + "2H", tags, i)
            place = i + step - (8 if big else 4)
            size = {1: "B", 3: "H", 4: "I"}.get(kind)
            if tag == 262 and size and struct.unpack_from(order + size, tags, place)[0] == 0:
                file.seek(0)
                content = bytearray(file.read())
                struct.pack_into(order + size, content, begin + place, 1)
                return io.BytesIO(content), True
    return path, False


def negative(image, bits, signed):
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


def fits_16_bits(array):
    """Whether the values of a 32-bit array fit 16 unsigned bits without loss, and are not just 0 and 1."""
    return np.isfinite(array).all() and array.min() >= 0 and 1 < array.max() < 65536 and (array == array.round()).all()
