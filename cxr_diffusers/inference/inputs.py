"""The inputs of a detection: which files there are, and reading them as the model takes them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.colour import COLOURED, TINTED, colour_level
from ..data.dicom_checks import warnings_of
from ..data.images import (
    PIL_SUFFIXES,
    check_has_contrast,
    describe_skipped,
    is_dicom,
    read_header,
    read_image,
    split_images,
)
from .detection_folder import RESULTS, file_stamp
from .dicom_output import check_source


@dataclass
class Input:
    """One input file after reading.

    name: of its results. path: of the file, or of the folder of an MRI slice. stamp: `file_stamp` from before it was
    read. image: PIL image or array. header: of a DICOM file, else None. warnings: joined by "; ". error: why the file
    could not be read, else "".
    """

    name: str
    path: Path
    stamp: list | None = None
    image: Any = None
    header: Any = None
    warnings: str = ""
    error: str = ""


def read_input(name: str, path: Path, channels: int, dicom: bool) -> Input:
    """Read one file. A file that cannot be read gives an `Input` with an `error`; nothing is raised.

    Args:
        channels: of the model's images.
        dicom: DICOM objects will be written: a DICOM file must name its study and series.
    """
    file = Input(name, path)
    try:
        file.stamp = file_stamp(path)  # before reading: a file that is replaced meanwhile is computed again
        file.image = read_model_input(path, channels)
        check_has_contrast(file.image, path)
        file.header = read_source(path, dicom)
        warnings = warnings_of(file.header) if file.header is not None else colour_warnings(path)
        file.warnings = "; ".join(warnings)
    except (ValueError, OSError) as error:
        file.error = str(error)
    return file


def read_source(path: Path, dicom: bool) -> Any:
    """The header of a DICOM file, None for another file.

    Raises:
        ValueError: `dicom`, and the header lacks an element that DICOM objects need (see `check_source`).
    """
    if not is_dicom(path):
        return None
    header = read_header(path)
    if dicom:
        check_source(header, path)
    return header


def read_model_input(path: Path, channels: int) -> Image.Image | np.ndarray:
    """An image file -> PIL image; the folder of an MRI slice -> (H, W, 4) array.

    Raises:
        ValueError: a damaged file, or another number of channels than the model's.
    """
    image: Image.Image | np.ndarray
    if path.is_dir():
        from ..data.brats import read_slice

        image = read_slice(path)
    else:
        image = read_image(path)
    depth = image.shape[-1] if isinstance(image, np.ndarray) else 1
    if depth != channels and (depth, channels) != (1, 3):
        raise ValueError(f"{path}: expected an image of {channels} channels for this model, got {depth}")
    return image


def model_channels(pipeline: Any) -> int:
    """Number of channels of the images that a pipeline's model takes; 1 if no component names it."""
    configs = [getattr(component, "config", None) or {} for component in pipeline.components.values()]
    return next((config["in_channels"] for config in configs if "in_channels" in config), 1)


def colour_warnings(path: Path) -> list[str]:
    """[a warning] for an image file with colour, else []; see `colour_level`."""
    if path.suffix.lower() not in PIL_SUFFIXES or not path.is_file():
        return []
    warnings = {
        COLOURED: "a colour image: radiographs are grey",
        TINTED: "some colour, which is read as grey: drawn marks or a tint change the map",
    }
    level = colour_level(path)
    return [warnings[level]] if level in warnings else []


def find_images(
    inputs: Iterable[Path | str], output_dir: Path, channels: int = 1
) -> tuple[list[tuple[Path, Path]], dict[Path, str]]:
    """List the images of files and folders.

    Results of an earlier run below an input folder are left out.

    Args:
        inputs: files and folders.
        channels: of the model's images; for 4, folders of MRI slices are inputs as well.

    Returns:
        [(relative path, from which the name of the results is made; path)], and {path: object type} of the DICOM files
        without an image.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without an image.
        ValueError: `output_dir` is the folder of the images.
    """
    output = output_dir.resolve()
    images: list[tuple[Path, Path]] = []
    skipped: dict[Path, str] = {}
    for item in check_inputs(inputs):
        folder = item if item.is_dir() else item.parent
        if folder.resolve() in [output / name for name in ("", *RESULTS)]:
            raise ValueError(f"expected an output folder of its own, got {output_dir}, where the images are")
        slices = list_slices_of(item) if channels == 4 and item.is_dir() else []
        if not item.is_dir() or item in slices:
            images.append((Path(item.name), item))
            continue
        paths, others = (slices, {}) if slices else split_images(item)
        if item.resolve() in output.parents:
            paths = [path for path in paths if output not in path.resolve().parents]
            others = {path: text for path, text in others.items() if output not in path.resolve().parents}
        if not paths:
            beside = f" ({describe_skipped(others)})" if others else ""
            raise FileNotFoundError(f"no png, jpg, bmp, tif, npy or DICOM image in {item}{beside}")
        images += [(path.relative_to(item), path) for path in paths]
        skipped |= others
    return images, skipped


def check_inputs(inputs: Iterable[Path | str]) -> list[Path]:
    """The inputs as paths; FileNotFoundError where there is no such file or folder."""
    paths = [Path(item) for item in inputs]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no such file or folder: {path}")
    return paths


def list_slices_of(folder: Path) -> list[Path]:
    """Folders of MRI slices in a folder, see `data.brats.list_slices`."""
    from ..data.brats import list_slices

    return list_slices(folder)
