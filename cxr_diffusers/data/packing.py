"""A data set in one file: compressed images and labels, for a node's scratch disk or a machine without a network."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet
from datasets import Dataset, Features, Image
from tqdm.auto import tqdm

from ..files import new_file, remove_dead_of
from .images import fit_image, to_grey
from .rows import check_images, each_row

COLUMNS = ("image", "label", "patient", "view", "path")


def pack(
    dataset: Dataset,
    path: Path | str,
    *,
    size: int,
    aspect: str = "pad",
    quality: int = 92,
    unlabelled: Sequence[Dataset] = (),
) -> dict[str, str]:
    """Write a data set as one Parquet file of JPEG images, which `load_packed` and the Hub open.

    Args:
        dataset: a data set of `build_dataset`.
        path: the file to write; it appears when it is whole.
        size: side of the stored images, in pixels.
        aspect: as in `images.fit_image`.
        quality: of the JPEG images; 100 for masks of fine structure.
        unlabelled: further data sets, whose images are stored without a class (label -1).

    Returns:
        {path: error} of the images that cannot be read, which are left out and logged.

    Raises:
        ValueError: an option out of its range, or no image that can be read.
    """
    if size < 8 or not 1 <= quality <= 100:
        raise ValueError(f"expected a `size` of 8 pixels or more and a `quality` of 1 to 100, got {size} and {quality}")
    remove_dead_of(path)
    features = Features({**dataset.select_columns(list(COLUMNS)).features, "image": Image()})
    parts = [(dataset, None), *((more, -1) for more in unlabelled)]
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    failed: dict[str, str] = {}
    with tqdm(total=sum(len(part) for part, _ in parts), desc="packing", unit="image") as bar:
        for part, label in parts:
            for _, row in each_row(part, failed, contrast=False):
                image = _shrunk(row, size, aspect, quality)
                columns["image"].append({"bytes": image, "path": None})
                columns["label"].append(row["label"] if label is None else label)
                for name in ("patient", "view", "path"):
                    columns[name].append(row[name])
                bar.update()
    if not columns["image"]:
        raise ValueError(f"expected images that can be read, got none: {next(iter(failed.values()), 'no image')}")
    with new_file(path) as temporary:
        Dataset.from_dict(columns, features=features).to_parquet(temporary)
    return failed


def load_packed(root: Path | str, *, part: str = "all") -> Dataset:
    """Open a file that `pack` wrote.

    Args:
        root: the Parquet file.
        part: "all", "labelled" or "unlabelled" images.

    Raises:
        FileNotFoundError: no such file. ValueError: not a packed data set, or an unknown `part`.
    """
    path = Path(root)
    if not path.is_file():
        raise FileNotFoundError(f"expected a packed data set (`cxr-diffusers prepare --pack`), no file {path}")
    if part not in ("all", "labelled", "unlabelled"):
        raise ValueError(f"expected `part` all, labelled or unlabelled, got {part!r}")
    try:
        dataset = check_images(Dataset(_in_memory(pyarrow.parquet.read_table(path))))
    except (pyarrow.ArrowException, ValueError, KeyError) as error:
        raise ValueError(f"{path}: expected a packed data set (Parquet), got {error}") from None
    if missing := sorted(set(COLUMNS) - set(dataset.column_names)):
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, missing {', '.join(missing)}")
    if part == "all":
        return dataset
    labelled = np.asarray(dataset["label"][:]) >= 0
    return dataset.select(np.flatnonzero(labelled == (part == "labelled")))


def _in_memory(table):
    from datasets.table import InMemoryTable

    return InMemoryTable(table)


def _shrunk(row, size, aspect, quality):
    try:
        image = fit_image(to_grey(row["image"]), size, aspect)
        if image.mode != "L":
            image = to_8_bits(image)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
    except Exception as error:  # whatever a decoder raises, the file must be named
        raise ValueError(f"{row['path']}: {error}") from error
    return buffer.getvalue()


def to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """PIL image of 16 bits -> 8 bits, its own darkest and brightest value at the ends."""
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    return PIL.Image.fromarray(((values - low) / max(high - low, 1.0) * 255).round().astype(np.uint8))
