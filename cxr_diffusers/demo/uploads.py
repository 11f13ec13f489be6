"""A file that somebody hands in -> a radiograph, or a sentence that says why not."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from ..data.colour import COLOURED, TINTED, colour_level
from ..data.dicom_checks import warnings_of
from ..data.images import DICOM_SUFFIXES, PIL_SUFFIXES, is_dicom, read_header, read_image
from ..data.limits import check_scans

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # by content: PIL knows others, some of which start programs
MAX_MEGAPIXELS = 40  # a chest radiograph has about 10
SMALLEST = 32  # pixels, of the shorter side
LONGEST = 4  # times the shorter side


@dataclass
class Upload:
    """A radiograph that was handed in. name: its file's, without folders. warnings: sentences for the reader."""

    picture: PIL.Image.Image
    name: str
    warnings: list[str]


def read_upload(path, max_megapixels=MAX_MEGAPIXELS):
    """Read a png, jpg, bmp, tif or DICOM file that may be anything.

    The size is read from the header before any pixel is decoded; the type of the file from its content.

    Raises:
        ValueError: no such picture, too large, too small, empty, or in colour; the message is for the page's reader.
    """
    path = Path(path)
    dicom = path.suffix.lower() not in PIL_SUFFIXES and is_dicom(path)
    if not dicom and path.suffix.lower() not in PIL_SUFFIXES:
        kinds = ", ".join(suffix[1:] for suffix in (*PIL_SUFFIXES, *DICOM_SUFFIXES[:1]))
        raise ValueError(f"{path.name} is no picture that this page reads. Expected a radiograph as {kinds}.")
    try:
        check_size(*(dicom_size(path) if dicom else header_size(path)), max_megapixels)
        warnings = dicom_warnings(path) if dicom else colour_warnings(path)
        picture = read_image(path)
    except Refused as error:
        raise ValueError(f"{path.name}: {error}") from None
    except Exception as error:  # whatever a broken file makes of its reader
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
        raise ValueError(f"{path.name} cannot be read as a picture: {reason[:200]}") from None
    if is_blank(picture):
        raise ValueError(f"{path.name} is blank: it has next to no greys that differ.")
    return Upload(picture, path.name, warnings)


class Refused(ValueError):
    """A picture, but none for this page."""


def check_size(width, height, max_megapixels=MAX_MEGAPIXELS):
    """Raise `Refused` for what is too large to decode here, too small, or too long to be a chest."""
    size = f"{width} \u00d7 {height} pixels"
    if width * height > max_megapixels * 1e6:
        raise Refused(f"{size} are more than the {max_megapixels:g} megapixels that this page takes.")
    if min(width, height) < SMALLEST:
        raise Refused(f"{size} are too few: expected {SMALLEST} or more each way.")
    if max(width, height) > LONGEST * min(width, height):
        raise Refused(f"{size} are no radiograph of a chest: one side is over {LONGEST} times as long as the other.")


def header_size(path):
    """(width, height) of a png, jpg, bmp or tif file, from its header."""
    with PIL.Image.open(path, formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO"):
            check_scans(path.read_bytes(), image.width * image.height)
        return image.size


def dicom_size(path):
    """(width, height) of a DICOM file, from its header; a compressed header is not opened, it may be endless."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    except pydicom.errors.InvalidDicomError:  # no preamble, as some old exports
        syntax = None
    if syntax is not None and syntax.is_deflated:
        raise Refused("its data set is compressed as a whole (deflated), which this page does not open.")
    try:  # pydicom's own messages quote the header, which is a patient's
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=["Rows", "Columns"])
        return int(header.Columns), int(header.Rows)
    except AttributeError:
        raise Refused("a DICOM file without a picture (a report, or no DICOM file at all).") from None
    except Exception:
        raise Refused("a DICOM file whose header is damaged.") from None


def dicom_warnings(path):
    """Sentences about a DICOM file whose header does not speak of a frontal radiograph of a chest; [] for one that does
    or is silent."""
    return [f"Its header speaks against it: {warning}." for warning in warnings_of(read_header(path))]


def colour_warnings(path):
    """[] for a grey picture, a sentence for one with some colour; `Refused` where most of it is coloured."""
    level = colour_level(path)
    if level == COLOURED:
        raise Refused("a colour picture. Radiographs are grey: is this a photograph, or a picture of something else?")
    if level == TINTED:
        return ["It has some colour, which is read as grey: drawn marks or a tint change the answer."]
    return []


def is_blank(picture):
    """True where a grey PIL picture shows nothing: hardly any greys, or 98 % of its pixels within 2 % of the range of
    its values."""
    array = np.asarray(picture)
    low, high = np.quantile(array[:: max(1, array.shape[0] // 512), :: max(1, array.shape[1] // 512)], [0.01, 0.99])
    return len(np.unique(array)) < 8 or high - low <= 0.02 * max(float(array.max()), 1)
