"""Rows of a loader -> `datasets.Dataset`, with the columns that every data set here has."""

import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import PIL.Image
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from datasets.features.features import register_feature
from datasets.table import InMemoryTable
from datasets.utils.file_utils import is_local_path, xopen
from tqdm.auto import tqdm

from .boxes import check_box, image_size
from .images import binary_mask, check_has_contrast, decode_image, errors_name, read_binary_mask, read_image
from .limits import MAX_BYTES, check_byte_count
from .tables import check_encodable

logger = logging.getLogger(__name__)

# files that `datasets.Image` decodes on access; others are decoded when the data set is made
LAZY_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
BOXES = List(List(Value("float32"), length=4))  # [x, y, w, h] in pixels


@dataclass
class PathsFeature:
    """Base of a `datasets` feature for files that its `decode_example` opens on access; a value is a list of texts.

    Only paths are stored: a data set that is moved to another machine needs its files there. A subclass is a dataclass
    with a class attribute `dtype` and a field `_type`, its own name, decorated with `registered`.
    """

    pa_type: ClassVar[pa.DataType] = pa.list_(pa.string())

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Sequence[Path | str]) -> list[str]:
        return [str(item) for item in value]


Feature = TypeVar("Feature", bound=type[PathsFeature])


def registered(feature: Feature) -> Feature:
    """Class decorator: `datasets` opens saved data sets that have this feature."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "experimental"
        register_feature(feature, feature.__name__)
    return feature


class CheckedImage(Image):
    """`datasets.Image` that decodes within the limits of `limits`, as `read_image` does, and keeps the file's mode.

    It is stored and published as a plain `datasets.Image`, and equal to one.
    """

    def __eq__(self, other):
        return isinstance(other, Image) and (self.mode, self.decode, self.id) == (other.mode, other.decode, other.id)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> PIL.Image.Image:
        """{"path", "bytes"} -> PIL image; ValueError that names a file that is damaged, too large or not there."""
        if not self.decode or not isinstance(value, dict) or (value["path"] is None and value["bytes"] is None):
            return super().decode_example(value, token_per_repo_id)
        if value["bytes"] is None and not _is_lazy(value["path"]) and is_local_path(value["path"]):
            image = read_image(value["path"])  # of a broken file, see `_image_cell`: raises its error
        else:
            with errors_name(value["path"] or "an image of the data set"):
                image = decode_image(_content(value["path"]) if value["bytes"] is None else value["bytes"])
        return image if self.mode in (None, image.mode) else image.convert(self.mode)


class CheckedMask(CheckedImage):
    """`CheckedImage` of masks: one without a value above 127, as of 0 and 1, becomes 0 / 255 (above 0 is inside)."""

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> PIL.Image.Image:
        mask = super().decode_example(value, token_per_repo_id)
        return binary_mask(mask) if self.decode and np.asarray(mask.convert("L")).max() <= 127 else mask


def check_images(dataset: Any) -> Any:
    """A data set, or a stream, whose columns of `datasets.Image` are decoded by `CheckedImage`, masks `CheckedMask`."""
    for name, feature in dataset.features.items():
        if isinstance(feature, Image):
            checked = CheckedMask if name == "mask" else CheckedImage
            dataset = dataset.cast_column(name, checked(mode=feature.mode, decode=feature.decode))
    return dataset


def to_dataset(rows: Sequence[Mapping[str, Any]], class_names: Sequence[str], image: Any = None) -> Dataset:
    """Rows -> data set with columns image, label, patient, view, path, and boxes and mask where any row has one.

    Args:
        rows: dicts with image (path or PIL image), label (class id, -1 unlabelled), and optionally patient, view, path,
            boxes (list of [x, y, w, h] in pixels; []: none, or unknown), mask (PIL image, the
            `png_cell` of one, or None).
        class_names: names of the class ids, healthy first.
        image: a `datasets` feature that opens the rows' image by itself; None: images that PIL or `read_image` opens.

    Raises:
        ValueError: no rows, an invalid box, or a name that is not UTF-8, which a data set cannot hold.
    """
    if not rows:
        raise ValueError("the data set is empty: no row is left after the filters that were asked for")
    features = _features(class_names, image or CheckedImage())
    columns = {"image": [row["image"] for row in rows] if image else _image_cells(rows)}
    columns["label"] = [int(row["label"]) for row in rows]
    for name in ("patient", "view", "path"):
        columns[name] = _texts([row.get(name) for row in rows], name)
    if any(row.get("boxes") is not None for row in rows):
        features["boxes"] = BOXES
        columns["boxes"] = [[check_box(box, row.get("path")) for box in row.get("boxes") or []] for row in rows]
    if any(row.get("mask") is not None for row in rows):
        features["mask"] = CheckedImage()
        masks = [row.get("mask") for row in rows]
        columns["mask"] = [png_cell(mask) if isinstance(mask, PIL.Image.Image) else mask for mask in masks]
    return Dataset.from_dict(columns, features=Features(features))


def columns_to_dataset(columns: Mapping[str, Sequence[Any]], class_names: Sequence[str]) -> Dataset:
    """Columns instead of rows -> data set, as `to_dataset` makes it of image files: seconds for 200,000 of them.

    Args:
        columns: {"image": paths, "label": class ids, "patient", "view", "path": texts, and optionally "boxes"}.

    Raises:
        ValueError: see `to_dataset`.
    """
    if not all(str(path).lower().endswith(LAZY_SUFFIXES) for path in columns["image"]) or not len(columns["image"]):
        return to_dataset(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], class_names
        )
    features = _features(class_names, CheckedImage())
    paths = pa.array(_texts(columns["image"], "image"), pa.string())
    arrays = {"image": pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])}
    arrays["label"] = pa.array(np.asarray(columns["label"], np.int64))
    for name in ("patient", "view", "path"):
        arrays[name] = pa.array(_texts(columns[name], name), pa.string())
    if "boxes" in columns:
        features["boxes"] = BOXES
        rows = zip(columns["boxes"], columns["path"], strict=True)
        boxes = [[check_box(box, path) for box in row] for row, path in rows]
        arrays["boxes"] = pa.array(boxes, Features(features).arrow_schema.field("boxes").type)
    schema = Features(features).arrow_schema
    return Dataset(
        InMemoryTable.from_arrays(list(arrays.values()), schema=schema), info=DatasetInfo(features=Features(features))
    )


def _features(class_names, image):
    features = {"image": image, "label": ClassLabel(names=list(class_names))}
    return features | {name: Value("string") for name in ("patient", "view", "path")}


def _texts(values, name):
    texts = [str(value or "") for value in values]
    check_encodable(texts, name)
    return texts


def each_row(
    dataset: Any, failed: dict[str, str], contrast: bool = True, unnamed: str = "row"
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (index, row) of each row whose image can be read.

    Args:
        dataset: a sequence of rows with `image` and, where it is known, `path`.
        failed: {path: error} of the others is added to it, and logged.
        contrast: leave out images of a single value, too.
        unnamed: with its number, the name of a row without a path.
    """
    for i in range(len(dataset)):
        try:
            row = dataset[i]
            if contrast:
                check_has_contrast(row["image"], row.get("path") or f"{unnamed} {i}")
        except (ValueError, OSError) as error:
            logger.warning("left out: %s", error)
            failed[column_of(dataset, "path")[i] or f"{unnamed} {i}"] = str(error)
        else:
            yield i, row


def readable_images(dataset: Dataset) -> tuple[Dataset, dict[str, str]]:
    """(the rows of `each_row`, {path: error} of the others)."""
    failed: dict[str, str] = {}
    kept = [i for i, _ in each_row(dataset, failed)]
    return dataset.select(kept) if failed else dataset, failed


def rows_with_region(dataset: Dataset, among: Iterable[int]) -> list[int]:
    """Those of some rows that have a true region: a mask with a pixel above 127 or, without a mask, a box."""
    columns = [name for name in ("mask", "boxes") if name in dataset.column_names]
    regions = dataset.select_columns(columns)  # so that no image is decoded
    return [i for i in among if columns and is_marked(**regions[int(i)])]


def is_marked(mask: PIL.Image.Image | None = None, boxes: Sequence | None = None) -> bool:
    """Whether a mask has a pixel above 127; without a mask, whether there is a box."""
    return bool(boxes) if mask is None else bool((np.asarray(mask.convert("L")) > 127).any())


def column_of(dataset: Any, name: str) -> list[Any]:
    """A column of a sequence of rows, None where it has none; images of a `datasets.Dataset` are not decoded."""
    if not isinstance(dataset, Dataset):
        return [row.get(name) for row in dataset]
    return dataset[name][:] if name in dataset.column_names else [None] * len(dataset)


def read_mask(path: Path, image_path: Path) -> PIL.Image.Image | dict[str, Any]:
    """The mask of an image as PIL "L", 0 / 255; a cell that raises when it is decoded if either file is broken.

    Raises:
        ValueError: the mask has another size than its image.
    """
    try:
        mask, size = read_binary_mask(path), image_size(image_path)
    except (ValueError, OSError):
        return {"path": str(path), "bytes": None}
    if mask.size != size:
        raise ValueError(
            f"{path}: expected a mask of {size[0]} x {size[1]}, as its image {image_path}, got {mask.size}"
        )
    return mask


def _content(path):
    """The bytes of a file, or of an address that `datasets` opens."""
    if not is_local_path(path):
        with xopen(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("no such image file")
    check_byte_count(path.stat().st_size)
    return path.read_bytes()


def _is_lazy(path):
    return Path(path).suffix.lower() in LAZY_SUFFIXES


def _image_cells(rows):
    eager = sum(not isinstance(row["image"], PIL.Image.Image) and not _is_lazy(row["image"]) for row in rows)
    with tqdm(total=eager, desc="reading", unit="image", disable=eager < 20, leave=False) as bar:
        return [_image_cell(row["image"], bar) for row in rows]


def _image_cell(image, bar):
    if isinstance(image, PIL.Image.Image):
        return png_cell(image)
    if _is_lazy(image):
        return {"path": str(image), "bytes": None}
    bar.update()
    try:
        return png_cell(read_image(image))
    except (ValueError, OSError):  # raised again when its row is used: one file does not stop the others
        return {"path": str(image), "bytes": None}


def png_cell(image: PIL.Image.Image) -> dict[str, Any]:
    """A PIL image as a cell of a data set's column."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # quick: it stays in memory
    # no path: where the file exists, `datasets` would keep the path and drop the bytes
    return {"path": None, "bytes": buffer.getvalue()}
