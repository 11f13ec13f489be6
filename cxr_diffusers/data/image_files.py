"""Image files of a data set: finding them, reading DICOM headers, and decoding each file only when it is accessed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas as pd
import PIL.Image
from tqdm.auto import tqdm

from .dicom import patient_and_view
from .images import SUFFIXES, read_image, walk
from .rows import LAZY_SUFFIXES, PathsFeature, registered, to_dataset
from .selection import select_rows
from .tables import brief, is_file

logger = logging.getLogger(__name__)

FRONTAL = ("PA", "AP")
NEGATIVE = "negative"


@registered
@dataclass
class RadiographFile(PathsFeature):
    """A `datasets` feature: the path of an image file (DICOM, tif, npy, ...), decoded by `read_image` on access.

    A value is [path], or [path, "negative"] for a file whose light and dark are exchanged. It is decoded to a PIL image
    of mode "L" or "I;16", a negative inverted.
    """

    dtype: ClassVar[str] = "PIL.Image.Image"
    _type: str = field(default="RadiographFile", init=False, repr=False)

    def decode_example(self, value: Sequence[str], token_per_repo_id: Any = None) -> PIL.Image.Image:
        image = read_image(value[0])
        return as_negative(image) if value[1:] == [NEGATIVE] else image


def as_negative(image: PIL.Image.Image) -> PIL.Image.Image:
    """PIL image of mode "L" or "I;16" -> its negative, v -> max + min - v: the same range of values."""
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    return PIL.Image.fromarray((low + high - array.astype(np.int64)).astype(array.dtype))


def files_to_dataset(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> datasets.Dataset:
    """As `rows.to_dataset`, for rows whose image is a path: every file is decoded on access, also a DICOM file.

    Args:
        rows: may have "negative", true for an image whose light and dark are exchanged in its file.
        names: of the classes.
    """
    lazy = [Path(row["image"]).suffix.lower() in LAZY_SUFFIXES and not row.get("negative") for row in rows]
    if all(lazy):
        return to_dataset(rows, names)
    rows = [{**row, "image": [row["image"], *([NEGATIVE] if row.get("negative") else [])]} for row in rows]
    return to_dataset(rows, names, image=RadiographFile())


def index_files(folder: Path) -> dict[str, Path]:
    """{file name without suffix: path} of all image files below a folder; of two of one name, the first in order."""
    paths = [Path(parent, name) for parent, _, files in walk(folder) for name in files if not name.startswith(".")]
    return {path.stem: path for path in sorted(paths, reverse=True) if path.suffix.lower() in SUFFIXES}


def select_files(
    table: pd.DataFrame,
    candidates: Callable[[Any], Sequence[Path]],
    skip_missing: bool = False,
    **selection: Any,
) -> pd.DataFrame:
    """Rows of a table chosen by `selection.select_rows`, with a column `file`, the image of each.

    Args:
        table: has the columns `select_rows` needs, and `where`, the place of each row for messages.
        candidates: a row (as a named tuple) -> paths at which its image may be, likeliest first.
        skip_missing: leave rows out whose image does not exist, before the selection, with one warning.
        selection: keyword arguments of `select_rows`.

    Raises:
        FileNotFoundError: no file at any of the candidates of a selected row.
    """
    if skip_missing:
        return select_rows(locate_files(table, candidates, True), **selection)
    return locate_files(select_rows(table, **selection), candidates)


def locate_files(
    table: pd.DataFrame, candidates: Callable[[Any], Sequence[Path]], skip_missing: bool = False
) -> pd.DataFrame:
    """The table with a column `file`; parameters and errors as of `select_files`."""
    files, missing = [], []
    for row in tqdm(table.itertuples(), total=len(table), desc="checking images", unit="file", leave=False, delay=2):
        paths = candidates(row)
        file = next((path for path in paths if is_file(path)), None)
        files.append(file)
        if file is None:
            missing.append(f"{row.where}: no image {brief(paths[0], 400)}")
    if missing and not skip_missing:
        more = f" (and {len(missing) - 1} more rows without one)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}{more}; `skip_missing` leaves such rows out")
    if missing:
        logger.warning(
            "left out %d of %d rows, their images are missing; first: %s", len(missing), len(table), missing[0]
        )
    table = table.assign(file=pd.Series(files, index=table.index, dtype=object))
    return table[table["file"].notna()]


def read_headers(files: Sequence[Path]) -> list[tuple[str, str]]:
    """[(patient, view)] of files, see `dicom.patient_and_view`."""
    bar = tqdm(files, desc="reading headers", unit="file", leave=False, delay=2)
    return [patient_and_view(file) for file in bar]


def check_views(
    views: Sequence[str] | None, choices: Sequence[str] = (*FRONTAL, ""), frontal_only: bool = False
) -> list[str] | None:
    """`views` as a list; ValueError unless it is None or a list of some of `choices` ("" is an unknown view).

    Args:
        frontal_only: images of an unknown view are left out, so that "" is an error, too.
    """
    if views is None:
        return None
    wrong = [view for view in views if view not in choices]
    if isinstance(views, str) or wrong:
        raise ValueError(f"expected `views` a list of {', '.join(map(repr, choices))}, got {views!r}")
    if frontal_only and "" in views:
        raise ValueError(f"expected `frontal_only` false with '' among `views`, got {views!r}: it leaves these out")
    return list(views)
