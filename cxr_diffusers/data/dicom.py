"""Opening a DICOM file; errors name elements of the header and never quote their values."""

import contextlib
import io
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .dicom_checks import has_value
from .limits import MAX_BYTES

DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"  # the end of compressed pixels
DEFLATED = "1.2.840.10008.1.2.1.99"


def is_dicom(path: Path | str) -> bool:
    """Whether a file has a suffix of DICOM files, or the letters DICM after a preamble of 128 bytes."""
    return Path(path).suffix.lower() in DICOM_SUFFIXES or has_magic(path)


def has_magic(path: Path | str) -> bool:
    """Whether a regular file has the letters DICM after 128 bytes; False if it cannot be opened."""
    try:
        if not Path(path).is_file():  # reading a named pipe would block
            return False
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path | str) -> Any:
    """The pydicom dataset of a DICOM file, without its pixels; ValueError with the path if it is not a DICOM file."""
    try:
        return open_dicom(path, stop_before_pixels=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dicom_header(path: Path | str) -> tuple[str, str]:
    """(patient, view) of a DICOM file: PatientID, and ViewPosition if it is PA or AP; "" if unknown.

    Raises:
        ValueError: no DICOM file, or an element that cannot be read.
    """
    return _patient_and_view(read_header(path), path)


def patient_and_view(path: Path | str) -> tuple[str, str]:
    """As `dicom_header`; ("", "") for a file of another type or a broken one: reading its pixels gives the reason.

    Raises:
        ValueError: an element that cannot be read.
    """
    try:
        dataset = read_header(path) if is_dicom(path) else None
    except (ValueError, OSError):
        dataset = None
    return ("", "") if dataset is None else _patient_and_view(dataset, path)


def _patient_and_view(dataset, path):
    try:
        patient, view = (str(element(dataset, name) or "").strip() for name in ("PatientID", "ViewPosition"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return patient, view.upper() if view.upper() in ("PA", "AP") else ""


def open_dicom(path: Path | str, **options: Any) -> Any:
    """`pydicom.dcmread` without its warnings; a deflated file that would fill the memory is refused first.

    Raises:
        ValueError: empty, or no DICOM file.
    """
    import pydicom

    magic = has_magic(path)
    if not Path(path).stat().st_size:
        raise ValueError("the file is empty")
    with quiet():
        if magic:
            _check_deflated(path)
        try:
            # `force` for files that only have the suffix: some exports lack the preamble
            dataset = pydicom.dcmread(path, force=not magic, **options)
        except Exception as error:
            reason = "damaged or cut short" if magic else "no DICOM file"
            raise ValueError(f"{reason} ({type(error).__name__})") from None
    if not magic and not {"SOPClassUID", "Rows", "PhotometricInterpretation"} & set(keywords_of(dataset)):
        raise ValueError("no DICOM file")
    return dataset


def open_with_pixels(path: Path | str) -> Any:
    """The dataset with its PixelData, even if the delimiter at the end of the pixels is missing."""
    import pydicom

    dataset = open_dicom(path)
    if "PixelData" in dataset:
        return dataset
    keywords = keywords_of(dataset)
    if {"FloatPixelData", "DoubleFloatPixelData"} & keywords:
        raise ValueError("expected pixels of at most 16 bits, got floats")
    with quiet(), contextlib.suppress(Exception):
        ended = pydicom.dcmread(io.BytesIO(Path(path).read_bytes() + DELIMITER), force=True)
        if "PixelData" in ended:
            return ended
    if "SOPClassUID" in keywords and "Rows" not in keywords and not _ends_early(dataset):
        raise ValueError("a DICOM file without pixels (a report or a table of contents?)")
    raise ValueError("cut short: the file ends before its pixels do")


def _ends_early(dataset):
    from pydicom.dataelem import RawDataElement

    elements = [dataset.get_item(tag) for tag in dataset.keys()]  # noqa: SIM118
    last = elements[-1] if elements else None
    return isinstance(last, RawDataElement) and last.value is not None and len(last.value) < last.length < 2**32 - 1


def element(dataset: Any, name: str) -> Any:
    """The value of an element, None if it is absent or empty; ValueError with its name if it cannot be read."""
    try:
        value = dataset.get(name)
    except Exception:
        raise ValueError(f"{name} cannot be read") from None
    return value if has_value(value) else None


def number(dataset: Any, name: str) -> float | None:
    """The first number of an element as a float, None if it is absent or empty; ValueError for anything else."""
    value = element(dataset, name)
    if value is None:
        return None
    try:
        if isinstance(value, bytes):  # with implicit VR the type may be US or SS
            value = np.frombuffer(value, byte_order(dataset) + "u2")
        first = float(value if isinstance(value, (str, float, int)) else value[0])
    except Exception:
        first = math.nan
    if not math.isfinite(first):
        raise ValueError(f"{name} cannot be read as a number")
    return first


def byte_order(dataset: Any) -> str:
    """NumPy's sign for the byte order of a dataset: "<" or ">"."""
    return ">" if getattr(dataset, "is_original_little_endian", True) is False else "<"


def integer(dataset: Any, name: str, default: int | None = None) -> int:
    """The integer of an element, `default` if it is absent or empty.

    Raises:
        ValueError: not one integer; or absent or empty, without a default.
    """
    value = number(dataset, name)
    if value is None and default is None:
        raise ValueError(f"{name} is missing")
    if value is not None and (value % 1 or not isinstance(element(dataset, name), (str, float, int))):
        raise ValueError(f"{name} cannot be read as one integer")
    return int(default if value is None else value)  # type: ignore[arg-type]  # one of them is given, see above


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress pydicom's warnings, which quote values of the header."""
    log, level = logging.getLogger("pydicom"), logging.getLogger("pydicom").level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)


def keywords_of(dataset: Any) -> set[str]:
    """The keywords of the elements of a dataset."""
    import pydicom

    return {pydicom.datadict.keyword_for_tag(tag) for tag in dataset.keys()}  # noqa: SIM118


def _check_deflated(path):
    import pydicom

    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        begin = 144 + int(meta.get("FileMetaInformationGroupLength") or 0)
    except Exception:  # `dcmread` will report it
        return
    if meta.get("TransferSyntaxUID") != DEFLATED:
        return
    inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with open(path, "rb") as file:
        file.seek(begin)
        rest = file.read(1 << 20)
        try:
            while rest and not inflate.eof:
                size += len(inflate.decompress(rest, 1 << 20))
                if size > MAX_BYTES:
                    raise ValueError(f"unpacks to more than {MAX_BYTES:,} bytes")
                rest = inflate.unconsumed_tail or file.read(1 << 20)
        except zlib.error:
            raise ValueError("damaged or cut short (its deflated part)") from None
