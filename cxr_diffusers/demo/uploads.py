"""Reads an uploaded file as a radiograph, or refuses it with a reason."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from ..data.colour import COLOURED, TINTED, colour_level
from ..data.dicom_checks import warnings_of
from ..data.images import DICOM_SUFFIXES, PIL_SUFFIXES, check_has_contrast, is_dicom, read_header, read_image
from ..data.limits import check_byte_count, check_scans

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # by content: PIL reads others with external programs
MAX_MEGAPIXELS = 40  # a chest radiograph has about 10
SMALLEST = 32  # pixels, of the shorter side
MAX_ASPECT_RATIO = 4  # longer side / shorter side


@dataclass
class Upload:
    """An uploaded radiograph. name: of the file, without folders. warnings: sentences for the user of the page."""

    image: PIL.Image.Image
    name: str
    warnings: list[str]


def read_upload(path: Path | str, max_megapixels: float = MAX_MEGAPIXELS) -> Upload:
    """Read a png, jpg, bmp, tif or DICOM file of unknown origin.

    The size is read from the header before any pixel is decoded; the file format is detected from the content.

    Raises:
        ValueError: not a readable image, too large, too small, of one value, or in colour; the message is for the
            user of the page.
    """
    path = Path(path)
    dicom = path.suffix.lower() not in PIL_SUFFIXES and is_dicom(path)
    if not dicom and path.suffix.lower() not in PIL_SUFFIXES:
        formats = ", ".join(suffix[1:] for suffix in (*PIL_SUFFIXES, *DICOM_SUFFIXES[:1]))
        raise ValueError(f"{path.name} is not an image file. Expected a radiograph as {formats}.")
    try:
        check_byte_count(path.stat().st_size)
        check_size(*(dicom_size(path) if dicom else header_size(path)), max_megapixels)
        warnings = dicom_warnings(path) if dicom else colour_warnings(path)
        image = read_image(path)
    except Refused as error:
        raise ValueError(f"{path.name}: {error}") from None
    except Exception as error:  # a broken file can make its decoder raise anything
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
        raise ValueError(f"{path.name} cannot be read as an image: {reason[:200]}") from None
    check_has_contrast(image, path.name)
    if reason := why_blank(image):
        raise ValueError(f"{path.name} cannot be a radiograph: {reason}.")
    return Upload(image, path.name, warnings)


class Refused(ValueError):
    """An image, but not one for this page."""


def check_size(width: int, height: int, max_megapixels: float = MAX_MEGAPIXELS) -> None:
    """Raise `Refused` for an image that is too large to decode here, too small, or too long for a chest."""
    size = f"{width} \u00d7 {height} pixels"
    if width * height > max_megapixels * 1e6:
        raise Refused(f"{size} are more than the limit of {max_megapixels:g} megapixels.")
    if min(width, height) < SMALLEST:
        raise Refused(f"{size} are too few: expected at least {SMALLEST} in both directions.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Refused(f"{size} are too long for a chest: one side is over {MAX_ASPECT_RATIO} times the other.")


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) of a png, jpg, bmp or tif file, from its header."""
    with PIL.Image.open(path, formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO"):
            check_scans(path.read_bytes(), image.width * image.height)
        return image.size


TAGS = ["SOPClassUID", "Rows", "Columns"]


def dicom_size(path: Path) -> tuple[int, int]:
    """(width, height) of a DICOM file, from its header; a deflated data set is refused, its size is unknown."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    except pydicom.errors.InvalidDicomError:  # no preamble, as some old exports
        syntax = None
    if syntax is not None and syntax.is_deflated:
        raise Refused("its data set is compressed as a whole (deflated), which this page does not read.")
    try:  # pydicom's own messages quote the header, which holds the patient's data
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=TAGS)
        return int(header.Columns), int(header.Rows)
    except AttributeError:
        is_object = "SOPClassUID" in header
        raise Refused("a DICOM file without an image (a report?)." if is_object else "no DICOM file.") from None
    except Exception:
        raise Refused("a DICOM file whose header is damaged.") from None


def dicom_warnings(path: Path) -> list[str]:
    """Sentences for a DICOM header that names another modality, view or body part than a frontal chest radiograph."""
    return [
        f"The DICOM header does not fit a frontal chest radiograph: {text}." for text in warnings_of(read_header(path))
    ]


def colour_warnings(path: Path) -> list[str]:
    """[] for a grey image, a sentence for one with some colour; raises `Refused` where most of it is coloured."""
    level = colour_level(path)
    if level == COLOURED:
        raise Refused("a colour image. Radiographs are grey: is this a photograph?")
    if level == TINTED:
        return ["The image has some colour, which is converted to grey: annotations or a tint change the answer."]
    return []


def why_blank(image: PIL.Image.Image) -> str:
    """Why a grey PIL image has no content, or "": under 8 values, or 98 % of the pixels within 2 % of the maximum."""
    array = np.asarray(image)
    values = len(np.unique(array))
    if values < 8:
        return f"it has {values} grey value{'s' * (values != 1)}"
    low, high = np.quantile(array[:: max(1, array.shape[0] // 512), :: max(1, array.shape[1] // 512)], [0.01, 0.99])
    return "nearly all of its pixels have the same value" if high - low <= 0.02 * max(float(array.max()), 1) else ""
