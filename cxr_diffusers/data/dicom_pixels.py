"""The pixels of a DICOM file as grey values; errors name elements of the header and never quote their values."""

import itertools
import logging
import math
import struct
from pathlib import Path

import numpy as np
import PIL.Image

from .dicom import byte_order, element, integer, number, open_with_pixels, quiet
from .dicom_checks import PHOTOMETRIC, has_value, non_radiograph_type, window_of
from .limits import check_pixel_count, check_scans

logger = logging.getLogger(__name__)

RLE = "1.2.840.10008.1.2.5"


def read_dicom(path: Path) -> PIL.Image.Image:
    """A DICOM file -> PIL image, mode "L", or "I;16" for more than 8 bits stored; see `images.read_image`.

    Raises:
        ValueError: not one grey frame, or a header that contradicts itself or the pixels.
    """
    object_type = non_radiograph_type(path)
    if object_type:
        raise ValueError(f"expected a radiograph, got a {object_type}")
    dataset = open_with_pixels(path)
    with quiet():
        photometric = _check_grey(dataset)
        alloc, bits, shift, signed = _bits(dataset)
        raw = _decode(dataset)
        raw = raw.view(f"u{raw.itemsize}")
        padding = _padding(dataset, _as_signed(raw, alloc) if signed else raw, alloc, signed)
        _check_values(dataset, raw, padding, alloc, bits, shift, signed)
        pattern = raw >> shift & (2**bits - 1)
        if bits < alloc:
            padding |= _padding(dataset, _as_signed(pattern, bits) if signed else pattern, bits, signed)
        if padding.all():
            raise ValueError("all pixels are padding (PixelPaddingValue)")
        table, problem = _grey_table(dataset, bits, signed)
    if problem:
        logger.warning("%s: %s", path, problem)
    if photometric == "MONOCHROME1":
        table = 1 - table
    top, dtype = (255, np.uint8) if bits <= 8 else (65535, np.uint16)
    image = (table * top).round().astype(dtype)[pattern]
    if padding.any():
        image[padding] = image[~padding].min()
    return PIL.Image.fromarray(image)


def _check_grey(dataset):
    """The photometric interpretation, MONOCHROME1 or MONOCHROME2; ValueError for other or too large images."""
    frames = integer(dataset, "NumberOfFrames", 1)
    if frames > 1:
        raise ValueError(f"expected one frame, got {frames}: take one out first")
    photometric = str(element(dataset, "PhotometricInterpretation") or "").strip()
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        got = photometric if photometric in PHOTOMETRIC else "another one" if photometric else "none"
        raise ValueError(f"expected a grey DICOM image (PhotometricInterpretation MONOCHROME1 or 2), got {got}")
    if integer(dataset, "SamplesPerPixel", 1) != 1:
        raise ValueError("SamplesPerPixel contradicts PhotometricInterpretation: expected 1 for a grey image")
    check_pixel_count(integer(dataset, "Columns"), integer(dataset, "Rows"))
    return photometric


def _bits(dataset):
    """(bits allocated, bits stored, number of unused low bits, whether values are signed)."""
    alloc, bits = integer(dataset, "BitsAllocated"), integer(dataset, "BitsStored")
    high = integer(dataset, "HighBit", bits - 1)
    signed = integer(dataset, "PixelRepresentation", 0)
    if not 1 <= bits <= min(alloc, 16):
        raise ValueError(f"expected BitsStored of 1 to {min(alloc, 16)} (BitsAllocated {alloc}), got {bits}")
    if not bits - 1 <= high < alloc:
        raise ValueError(f"HighBit {high} contradicts BitsStored {bits} and BitsAllocated {alloc}")
    if signed not in (0, 1):
        raise ValueError("expected PixelRepresentation 0 or 1")
    return alloc, bits, high - bits + 1, bool(signed)


def _decode(dataset):
    """(H, W) values as stored, all allocated bits; ValueError, before memory is allocated, for a wrong size."""
    import pydicom.pixels

    meta = dataset.file_meta
    if not has_value(meta.get("TransferSyntaxUID")):
        meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
    syntax = meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:
        raise ValueError("TransferSyntaxUID names no transfer syntax that pydicom has")
    rows, columns, alloc = (integer(dataset, name) for name in ("Rows", "Columns", "BitsAllocated"))
    pixels = dataset.PixelData
    if syntax.is_encapsulated:
        try:
            decoder = pydicom.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise ValueError(f"compressed as {syntax.name}, for which pydicom has no decoder") from None
        if not decoder.is_available:
            raise ValueError(
                f"compressed as {syntax.name}, for which no decoder is installed: one of "
                f"{'; '.join(decoder.missing_dependencies)} (pip install pylibjpeg[all])"
            )
        try:
            frame = b"".join(pydicom.encaps.generate_fragments(_without_offsets(pixels)))
        except Exception:
            raise ValueError("the compressed pixels are damaged or cut short") from None
        if syntax == RLE:
            _check_rle(frame, rows * columns)
        else:
            check_scans(frame, rows * columns)
            size = _codestream_size(frame)
            if size and size != (rows, columns):
                raise ValueError(f"expected {rows} x {columns} pixels (Rows, Columns), got {size[0]} x {size[1]}")
    elif len(pixels) < (expected := math.ceil(rows * columns * alloc / 8)):
        raise ValueError(f"cut short: {len(pixels):,} bytes of pixels, expected {expected:,}")
    try:
        dataset.pixel_array_options(correct_unused_bits=False)
        array = dataset.pixel_array
    except Exception as error:
        raise ValueError(f"its pixels are damaged or cut short ({type(error).__name__})") from None
    if array.shape != (rows, columns) or array.dtype.kind not in "iu":
        raise ValueError(f"expected ({rows}, {columns}) integers, got {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))  # of big-endian files, too


def _without_offsets(pixels):
    """Encapsulated pixels without their first item, the offset table."""
    (length,) = struct.unpack_from("<I", pixels, 4)
    return pixels[8 + length :]


def _check_rle(frame, pixels):
    """Raise ValueError if a segment decodes to fewer bytes than there are pixels, or to far more."""
    if len(frame) < 64:
        raise ValueError("cut short: the compressed pixels have no header")
    n, *offsets = struct.unpack_from("<16I", frame)
    if not 0 < n < 16:
        raise ValueError("the compressed pixels are damaged: expected 1 to 15 segments")
    for begin, end in itertools.pairwise([*offsets[:n], len(frame)]):
        segment = memoryview(frame)[begin:end]
        size = i = 0
        while i < len(segment) - 1 and size <= 2 * pixels + 1024:
            code = segment[i]
            if code < 128:
                size, i = size + min(code + 1, len(segment) - i - 1), i + code + 2
            elif code > 128:
                size, i = size + 257 - code, i + 2
            else:
                i += 1
        if size > 2 * pixels + 1024:
            raise ValueError(f"the compressed pixels unpack to more than their {pixels:,} pixels")
        if size < pixels:
            raise ValueError(f"cut short: {size:,} of {pixels:,} pixels")


def _codestream_size(frame):
    """(rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 stream; None if there are none."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(frame) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    i = 2
    while frame[:2] == b"\xff\xd8" and i + 9 <= len(frame):
        if frame[i] != 0xFF:
            i += 1
            continue
        marker = frame[i + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">2H", frame, i + 5)
        alone = marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD9
        i += (2 - (marker == 0xFF)) if alone else 2 + struct.unpack_from(">H", frame, i + 2)[0]
    return None


def _as_signed(array, bits):
    values = array.astype(np.int64)
    return np.where(values >= 2 ** (bits - 1), values - 2**bits, values)


def _padding(dataset, stored, bits, signed):
    """(H, W) booleans: the padding, by PixelPaddingValue and PixelPaddingRangeLimit.

    The header may have unsigned values for signed pixels, or the reverse: they are compared in the pixels' type.
    """
    value, limit = number(dataset, "PixelPaddingValue"), number(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(stored.shape, bool)
    ends = [int(value), int(value if limit is None else limit)]
    if not all(-(2 ** (bits - 1)) <= end < 2**bits for end in ends):
        return np.zeros(stored.shape, bool)
    if signed:
        ends = [end - 2**bits if end >= 2 ** (bits - 1) else end for end in ends]
    else:
        ends = [end % 2**bits for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def _check_values(dataset, raw, padding, alloc, bits, shift, signed):
    """Raise ValueError if pixels use bits that the header excludes."""
    image = raw[~padding]
    if not image.size:
        return
    if shift and (image & (2**shift - 1)).any() and image.max() < 2**bits:
        raise ValueError(f"HighBit {shift + bits - 1} contradicts the pixels, which use the lowest {bits} bits")
    unused = alloc - bits - shift
    if not unused or any((group, 0x0102) in dataset for group in range(0x6000, 0x6020, 2)):
        return  # overlays lie in unused bits
    above = image >> (bits + shift)
    # above a signed value the sign bit is repeated, or zeros follow
    sign = (image >> (bits + shift - 1) & 1) * (2**unused - 1) if signed else 0
    if ((above != 0) & (above != sign)).any():
        raise ValueError(f"the pixels hold values above BitsStored {bits}")


def _grey_table(dataset, bits, signed):
    """((2^bits,) floats in [0, 1], the grey value of each stored pattern, bright for large values; a warning or "")."""
    stored = np.arange(2**bits)
    stored = _as_signed(stored, bits) if signed else stored
    lut = _lut(dataset, "ModalityLUTSequence", signed)
    if lut:
        values, low, high = _look_up(stored, *lut)
    else:
        slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
        if slope == 0:
            raise ValueError("RescaleSlope is 0: all pixels would have one value")
        values = stored * (1.0 if slope is None else slope) + (intercept or 0.0)
        low, high = values.min(), values.max()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("RescaleSlope and RescaleIntercept leave no range of values")
    lut, problem = _lut(dataset, "VOILUTSequence", signed or low < 0), ""
    if lut:
        values, low, high = _look_up(values.round().astype(np.int64), *lut)
    else:
        window, problem = window_of(dataset)
        if window:
            return _windowed(values, *window), ""
    return ((values - low) / (high - low)).clip(0, 1), problem


def _windowed(values, center, width, function):
    """Values -> grey values in [0, 1], by DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - center) / width).clip(-700, 700)))
    if function == "LINEAR_EXACT":
        return ((values - center) / width + 0.5).clip(0, 1)
    if width == 1:
        return (values > center - 0.5).astype(float)
    return ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _lut(dataset, name, signed):
    """(first value, table, bits) of the first look-up table of a sequence; None without any."""
    for item in element(dataset, name) or ():
        descriptor, data = element(item, "LUTDescriptor"), element(item, "LUTData")
        if descriptor is None or data is None:
            continue
        try:
            words = byte_order(dataset) + "u2"
            if isinstance(descriptor, bytes):
                descriptor = np.frombuffer(descriptor, words)
            count, first, bits = (int(n) for n in descriptor)
            count, first = count % 65536 or 65536, first % 65536
            if isinstance(data, bytes):
                data = np.frombuffer(data, np.uint8 if len(data) < 2 * count else words)
            else:
                data = np.atleast_1d(np.asarray(data, np.uint16))
            if len(data) < count <= 2 * len(data) and bits <= 8:  # two entries in each word
                data = data.astype("<u2").view(np.uint8)
        except Exception:
            raise ValueError(f"{name} cannot be read") from None
        if len(data) < count or not 8 <= bits <= 16:
            raise ValueError(f"{name}: LUTDescriptor contradicts LUTData")
        table = data[:count].astype(np.int64)
        return first - 65536 * (signed and first >= 32768), table, max(bits, int(table.max()).bit_length())
    return None


def _look_up(values, first, table, bits):
    """(values of the table, the lowest and the highest value that its bits allow)."""
    return table[(values - first).clip(0, len(table) - 1)].astype(float), 0.0, float(2**bits - 1)
