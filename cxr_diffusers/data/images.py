"""An image file -> a grey PIL picture that has lost nothing: mode "L" (8 bit) or "I;16" (more)."""

import collections
import logging
import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from .dicom_checks import no_picture

logger = logging.getLogger(__name__)

PIL_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
SUFFIXES = (*PIL_SUFFIXES, ".npy", *DICOM_SUFFIXES)

# not pictures, although they begin like DICOM files: the table of contents of an exported CD
DICOM_CONTENTS = "DICOMDIR"


def read_image(path):
    """Read one radiograph.

    png, jpg, bmp, tif: as stored; colour becomes grey by PIL's weights, an EXIF orientation is applied.
    npy: uint8 (H, W) or (H, W, 1); uint16; or float in [0, 1], which becomes 16 bit.
    DICOM: modality LUT, then VOI LUT or the first window, then MONOCHROME1 inverted, so that bright is dense. The grey
    scale is that of the type, never of the image: 0 and the maximum of the result are the ends of the *stored bits*
    after the modality LUT (with a window: the ends of the window). So two exposures stay two exposures, and whoever
    wants a stretch per image asks for it (`scaling="minmax"`). Padding pixels (PixelPaddingValue) become black.

    Returns:
        PIL image, mode "L", or "I;16" for more than 8 bits stored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken, or nothing that can be shown as one grey picture; the message names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such image file: {path}")
    try:
        if path.suffix.lower() == ".npy":
            return grey_picture(np.load(path, allow_pickle=False))
        if path.suffix.lower() not in PIL_SUFFIXES and is_dicom(path):
            return _read_dicom(path)
        with PIL.Image.open(path) as image:
            return to_grey(PIL.ImageOps.exif_transpose(image))
    # PIL raises SyntaxError and struct.error too on broken files; whatever it is, the user needs the path
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def picture_size(image):
    """(height, width) of a PIL image or of an (H, W) or (H, W, C) array."""
    return (image.height, image.width) if isinstance(image, PIL.Image.Image) else image.shape[:2]


def to_grey(image):
    """PIL image of any mode -> "L" or "I;16"; ValueError for 32-bit values that 16 bits cannot hold."""
    if image.mode.startswith("I;16"):
        return PIL.Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        array = np.asarray(image)
        return grey_picture(array.astype(np.uint16) if _fits_16_bits(array) else array)
    return image.convert("L")


def grey_picture(array):
    """(H, W) or (H, W, 1) array -> PIL image: uint8 -> "L"; uint16, or float in [0, 1] -> "I;16"; else ValueError."""
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected an array of shape (H, W) or (H, W, 1), got {array.shape}")
    if array.dtype in (np.uint8, np.uint16):
        return PIL.Image.fromarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected an array of uint8, uint16 or float in [0, 1], got {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"expected floats in [0, 1], got values from {array.min():g} to {array.max():g}")
    return PIL.Image.fromarray((array * 65535).round().astype(np.uint16))


def list_images(folder):
    """Sorted paths of all images below `folder`, among them DICOM files without extension, as a PACS exports them.

    Hidden files and folders are left out, and DICOM files that are no picture (reports, segmentations, presentation
    states), with a note in the log. Raises NotADirectoryError.
    """
    images, skipped = split_images(folder)
    if skipped:
        logger.warning("%s: left out %s", folder, describe_skipped(skipped))
    return images


def split_images(folder):
    """(what `list_images` lists, {path: what it is} of the DICOM files that are no picture), both sorted."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder of images, got {folder}")
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    images, skipped = [], {}
    for path in sorted(found):
        suffix = path.suffix.lower()
        if suffix in PIL_SUFFIXES or suffix == ".npy":
            images.append(path)
        elif suffix in DICOM_SUFFIXES or _is_bare_dicom(path):
            what = no_picture(path)
            if what:
                skipped[path] = what
            else:
                images.append(path)
    return images, skipped


def describe_skipped(skipped):
    """{path: what it is} -> "3 DICOM files without a radiograph (2 Enhanced SR Storage, 1 Segmentation Storage)"."""
    counts = collections.Counter(skipped.values())
    kinds = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    return f"{len(skipped)} DICOM file{'s' * (len(skipped) > 1)} without a radiograph ({kinds})"


def is_dicom(path):
    """True for a file that ends as DICOM files do, or has their magic word behind its preamble of 128 bytes."""
    return Path(path).suffix.lower() in DICOM_SUFFIXES or _has_magic(path)


def read_header(path):
    """The pydicom dataset of a DICOM file, without its pixels."""
    return _open_dicom(path, stop_before_pixels=True)


def dicom_header(path):
    """(patient, view) of a DICOM file: PatientID, and ViewPosition where it is PA or AP; "" where unknown."""
    dataset = read_header(path)
    view = str(dataset.get("ViewPosition") or "").upper()
    return str(dataset.get("PatientID") or ""), view if view in ("PA", "AP") else ""


def fit_image(image, size, aspect="pad"):
    """PIL image ("L" or "I;16") -> the same mode, `size` x `size`, in the geometry of `pipelines.cxr_images.frame`.

    Area means along a side that shrinks, bicubic along one that grows.

    Args:
        aspect: "pad" (bars as dark as the picture's darkest pixel, so that a later stretch of the grey scale finds the
            same ends as in the picture itself; nothing lost), "crop" (the centre) or "squash" (sides stretched, as the
            original's preparation script does).
    """
    return _fit(image, size, aspect, PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BOX, fill=np.min)


def fit_mask(mask, size, aspect="pad"):
    """PIL mask -> PIL "L" of 0 / 255, `size` x `size`, moved exactly as `fit_image` moves its image; nearest."""
    nearest = PIL.Image.Resampling.NEAREST
    return _fit(binary_mask(mask), size, aspect, nearest, nearest, fill=lambda mask: 0)


def fit_boxes(boxes, width, height, size, aspect="pad"):
    """[[x, y, w, h]] in pixels of a `width` x `height` image -> the same anatomy's boxes after `fit_image`.

    What a crop cuts off is cut off the boxes; a box that is gone altogether is left out.
    """
    from ..pipelines.cxr_images import frame

    top, left, h, w = frame(height, width, size, aspect)
    fitted = []
    for x, y, box_w, box_h in boxes:
        x0, x1 = (min(max(left + v * w / width, 0.0), float(size)) for v in (x, x + box_w))
        y0, y1 = (min(max(top + v * h / height, 0.0), float(size)) for v in (y, y + box_h))
        if x1 > x0 and y1 > y0:
            fitted.append([x0, y0, x1 - x0, y1 - y0])
    return fitted


def binary_mask(mask):
    """PIL image -> "L" of 0 / 255: everything above 0 is inside (so masks of 0 / 1 work as well)."""
    return PIL.Image.fromarray((np.asarray(to_grey(mask)) > 0).astype(np.uint8) * 255)


def equalize(image):
    """Histogram equalisation, v -> round(max * (cdf(v) - cdf(v_min)) / (N - cdf(v_min))), as OpenCV's equalizeHist.

    8 bit -> 8 bit, 16 bit -> 16 bit. An image of one value stays as it is. (`PIL.ImageOps.equalize` is another formula:
    it counts the pixels *below* v with a step rounded to whole pixels, so the black of a padded radiograph, a third of
    its pixels, shifts every grey by a different amount.)
    """
    array = np.asarray(image)
    top = np.iinfo(array.dtype).max
    cdf = np.bincount(array.ravel(), minlength=top + 1).cumsum()
    first = cdf[array.min()]
    if first == array.size:
        return image.copy()
    # float32 as in OpenCV, so that halves round alike; at 16 bit that would cost the last bit
    real = np.float32 if top == 255 else np.float64
    table = np.rint((cdf - first).clip(0).astype(real) * (real(top) / real(array.size - first)))
    return PIL.Image.fromarray(table.clip(0, top).astype(array.dtype)[array])


def _fit(image, size, aspect, grow, shrink, fill):
    from ..pipelines.cxr_images import frame  # here: it imports torch, which reading a file does not need

    if image.mode not in ("L", "I;16"):
        raise ValueError(f"expected a picture of mode L or I;16, got {image.mode}")
    if aspect not in ("pad", "crop", "squash"):
        raise ValueError(f"expected `aspect` pad, crop or squash, got {aspect!r}")
    top, left, h, w = frame(image.height, image.width, size, aspect)
    kind = np.asarray(image).dtype
    # 16 bits are resized as floats: exact, and bicubic overshoot is clipped instead of wrapped
    picture = image if kind == np.uint8 else PIL.Image.fromarray(np.asarray(image).astype(np.float32))
    picture = picture.resize((min(w, image.width), min(h, image.height)), shrink).resize((w, h), grow)
    resized = np.asarray(picture)[max(-top, 0) : max(-top, 0) + size, max(-left, 0) : max(-left, 0) + size]
    if kind != np.uint8:
        resized = resized.round().clip(0, 65535).astype(kind)
    top, left = max(top, 0), max(left, 0)
    square = np.full((size, size), fill(resized), kind)
    square[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return PIL.Image.fromarray(square)


def _fits_16_bits(array):
    return np.isfinite(array).all() and array.min() >= 0 and 1 < array.max() < 65536 and (array == array.round()).all()


def _has_magic(path):
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _is_bare_dicom(path):
    return path.name != DICOM_CONTENTS and path.suffix.lower() not in (".csv", ".txt", ".json") and _has_magic(path)


def _open_dicom(path, stop_before_pixels=False):
    import pydicom

    # `force` only where the name says DICOM: some exports lack the preamble
    return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels, force=not _has_magic(path))


def _read_dicom(path):
    import pydicom.pixels

    what = no_picture(path)
    if what:
        raise ValueError(f"expected a radiograph, got a {what}")
    dataset = _open_dicom(path)
    if "PixelData" not in dataset:
        raise ValueError("a DICOM file without pixels (a report or a table of contents?)")
    if not hasattr(dataset.file_meta, "TransferSyntaxUID"):
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"expected one frame, got {dataset.NumberOfFrames}: take one out first")
    photometric = str(dataset.get("PhotometricInterpretation"))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"expected a grey DICOM image (MONOCHROME1 or 2), got {photometric}")
    stored = _decode_pixels(dataset)
    array = pydicom.pixels.apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        array = array.round().astype(np.int64)  # a table's index, which a rescale has made float
    array = np.asarray(pydicom.pixels.apply_voi_lut(array, dataset), np.float64)
    low, high = _grey_range(dataset)
    array = ((array - low) / (high - low)).clip(0, 1)
    if photometric == "MONOCHROME1":
        array = 1 - array
    if "PixelPaddingValue" in dataset:
        array[stored == dataset.PixelPaddingValue] = 0
    top, kind = (255, np.uint8) if dataset.BitsStored <= 8 else (65535, np.uint16)
    return PIL.Image.fromarray((array * top).round().astype(kind))


def _decode_pixels(dataset):
    """(H, W) stored values, or an error that says which decoder to install."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.is_encapsulated:
        import pydicom.pixels

        try:
            decoder = pydicom.pixels.get_decoder(syntax)
        except NotImplementedError:
            raise ValueError(f"compressed as {syntax.name}, for which pydicom has no decoder") from None
        if not decoder.is_available:
            raise ValueError(
                f"compressed as {syntax.name}, for which no decoder is installed: one of "
                f"{'; '.join(decoder.missing_dependencies)} (pip install pylibjpeg[all])"
            )
    return dataset.pixel_array


def _grey_range(dataset):
    """(darkest, brightest) value that the type allows after modality and VOI LUT, whatever this image holds."""
    if dataset.get("VOILUTSequence"):
        return 0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    if dataset.get("ModalityLUTSequence"):
        return 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(dataset.BitsStored), dataset.PixelRepresentation == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if dataset.get("RescaleSlope") is not None and dataset.get("RescaleIntercept") is not None:
        low, high = (v * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept) for v in (low, high))
    # pydicom's window runs from the one to the other, even where a negative slope makes the first the larger
    return (low, high) if dataset.get("WindowWidth") is not None else (min(low, high), max(low, high))
