"""Image files without metadata: the same pixels, without text, dates or names."""

import io
import struct

import numpy as np
import PIL.Image

from ..data.images import FORMATS, decode_image
from ..data.limits import check_pixel_count

PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # they determine the pixels
ORIENTATION = 0x0112  # EXIF tag


def strip_metadata(content: bytes) -> bytes:
    """Remove text, EXIF, XMP, colour profile, comments, thumbnail and trailing bytes from an image file.

    PNG and JPEG keep their compressed pixels. Other formats, and images with an EXIF orientation, become PNG; modes
    that PNG does not have become TIFF.

    Args:
        content: bytes of an image file that Pillow reads.

    Returns:
        bytes of a file with the same pixels and mode; a TIFF whose zero is white becomes one whose zero is black.

    Raises:
        ValueError: not an image file, or a truncated one.
    """
    PIL.Image.init()
    try:
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_pixel_count(*image.size)
            turned = image.getexif().get(ORIENTATION, 1) != 1
            if image.format == "PNG" and not turned:
                return _strip_png(content)
            if image.format == "JPEG" and not turned:
                return _strip_jpeg(content)
        return _encode(decode_image(content))
    except (OSError, struct.error, IndexError, SyntaxError) as error:
        raise ValueError(f"expected a whole image file, got one that cannot be read ({type(error).__name__})") from None


def _strip_png(content):
    kept, start, name = [PNG], len(PNG), b""
    while name != b"IEND":
        size, name = struct.unpack_from(">I4s", content, start)
        end = start + 12 + size
        if end > len(content):
            raise IndexError
        if name in PNG_CHUNKS:
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def _strip_jpeg(content):
    kept, start = [content[:2]], 2
    while True:
        if content[start] != 0xFF:
            raise IndexError
        while content[start + 1] == 0xFF:  # fill bytes
            start += 1
        marker = content[start + 1]
        if marker == 0xD9:  # end of image
            return b"".join([*kept, content[start : start + 2]])
        end = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
        segment = content[start:end]
        if marker == 0xE0 and segment[4:9] == b"JFIF\0":
            kept.append(segment[:2] + b"\0\x10" + segment[4:16] + b"\0\0")  # means YCbCr; without its thumbnail
        elif marker == 0xEE and segment[4:9] == b"Adobe":
            kept.append(segment[:2] + b"\0\x0e" + segment[4:16])  # names the colour space
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        if marker == 0xDA:  # compressed pixels, up to the next marker other than a restart or a stuffed 255
            begin = end
            while content[end] != 0xFF or content[end + 1] == 0 or 0xD0 <= content[end + 1] <= 0xD7:
                end = content.find(b"\xff", end + 1)
                if end < 0:
                    raise IndexError
            kept.append(content[begin:end])
        start = end


def _encode(image):
    """The pixels of a PIL image as a new file: PNG, or TIFF for a mode that PNG does not have."""
    plain = image.copy()
    plain.info = {key: value for key, value in image.info.items() if key == "transparency"}
    if plain.mode == "I;16B":
        plain = PIL.Image.fromarray(np.asarray(plain).astype(np.uint16))
    with io.BytesIO() as buffer:
        plain.save(buffer, "png" if plain.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "tiff")
        return buffer.getvalue()
