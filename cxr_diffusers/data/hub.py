"""A data set of the Hugging Face Hub, or a folder of parquet files, that has our columns."""

import re
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from ..connection import cache_if_unreachable
from .boxes import check_box, check_in_pixels
from .images import binary_mask, fit_boxes, fit_image, fit_mask, to_grey
from .rows import BOXES, check_images, png_cell
from .tables import missing_columns

HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


def load_hub(
    path: Path | str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    size: int | None = None,
    aspect: str = "pad",
) -> datasets.Dataset:
    """`datasets.load_dataset` (`load_from_disk` for a folder that `save_to_disk` wrote), with a check of the columns.

    Training needs access to every row at any time, so it cannot read from a stream. `streaming` therefore reads the
    stream once, without storing the downloaded files, and writes the first `limit` rows, with images of `size` pixels,
    to the cache of `datasets`, where the next run opens them.

    Args:
        path: USER/NAME on the Hub, a folder of parquet files, or a saved data set.
        split, config, revision: as in `datasets.load_dataset` (`config` is its `name`); of a saved data set, `split`
            is the name of one.
        limit: only the first so many rows; None: all.
        streaming: see above.
        size, aspect: with `streaming`, keep a grey copy of `size` x `size` pixels, see `images.fit_image`; masks and
            boxes move with it. None: images as they come.

    Returns:
        `datasets.Dataset` with image (`datasets.Image`), label (`datasets.ClassLabel`) and, where they are there, mask
        (`datasets.Image`) and boxes ([[x, y, w, h]] in pixels) as they came; patient, view and path are added where
        they are not there: every image its own patient, the view unknown.

    Raises:
        FileNotFoundError: the Hub does not answer, and the data set is not in the cache.
        ValueError: image or label are missing, or a column has another type; with `streaming`, a folder or a
            data set that does not declare its columns; an invalid box; a `size` without `streaming`, or an `aspect`
            without `size`; a `config` or `revision` of a folder that they do not apply to; no such `split`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected a `limit` of 1 or more, or none, got {limit}")
    if size is None and aspect != "pad":
        raise ValueError(f"expected `aspect` with `size` only, got {aspect!r}")
    if Path(path).exists() and revision is not None:
        raise ValueError(f"expected `revision` of a data set on the Hub only, got {revision!r} of the folder {path}")
    if streaming:
        with _one_line_if_unreachable(path):
            dataset = _streamed(path, split, config, revision, limit, size, aspect)
    elif size is not None:
        raise ValueError(f"expected `size` with streaming=true only, got {size}: a training run shrinks by itself")
    else:
        with _one_line_if_unreachable(path):
            dataset = _downloaded(path, split, config, revision)
        check_columns(dataset.features, path)
        dataset = dataset.select(range(min(limit, len(dataset)))) if limit else dataset
    check_boxes(dataset, path)
    dataset = check_images(dataset)
    rows = [str(i) for i in range(len(dataset))]
    additions = {"patient": rows, "view": [""] * len(rows), "path": [f"{path}/{split}/{i}" for i in rows]}
    for name, values in additions.items():
        if name not in dataset.column_names:
            dataset = dataset.add_column(name, values)
    return dataset


def check_columns(features: datasets.Features, where: Path | str) -> None:
    """Raise ValueError unless image and label, and mask and boxes where they are, are of the kinds that we read."""
    missing_columns(["image", "label"], features, where)
    for name, expected in (("image", datasets.Image), ("label", datasets.ClassLabel), ("mask", datasets.Image)):
        if name in features and not isinstance(features[name], expected):
            hint = ", healthy being class 0" if name == "label" else ""
            raise ValueError(
                f"{where}: expected column {name!r} to be datasets.{expected.__name__}, got {features[name]}: "
                f"cast it with `dataset.cast_column({name!r}, ...)`{hint}"
            )
    boxes = features.get("boxes", BOXES)
    four = getattr(boxes, "feature", None)
    if getattr(four, "length", -1) not in (-1, 4) or not hasattr(getattr(four, "feature", None), "dtype"):
        raise ValueError(f"{where}: expected column 'boxes' to be lists of [x, y, w, h] in pixels, got {boxes}")


def check_boxes(dataset: datasets.Dataset, where: object) -> None:
    """Raise ValueError naming the first row with an invalid box, or for boxes that do not count in pixels."""
    checked = []
    for i, boxes in enumerate(dataset["boxes"] if "boxes" in dataset.column_names else ()):
        for box in boxes or ():
            checked.append(check_box(box, f"{where}, row {i}"))
    check_in_pixels(checked, where)


@contextmanager
def _one_line_if_unreachable(path):
    if Path(path).exists():
        yield
        return
    try:
        with cache_if_unreachable():
            yield
    except (ConnectionError, OfflineModeIsEnabled):
        raise FileNotFoundError(
            f"no folder {path} here, and {constants.ENDPOINT}, where a data set {path} might be, does not answer"
        ) from None


def _downloaded(path, split, config, revision):
    if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        return _saved(datasets.load_from_disk(str(path)), path, split, config)
    return datasets.load_dataset(str(path), name=config, split=split, revision=revision)


def _saved(dataset, path, split, config):
    """A split of what `save_to_disk` wrote; a data set without splits is "train", or has the name it was saved with."""
    is_dict = isinstance(dataset, datasets.DatasetDict)
    names = list(dataset) if is_dict else ["train", *([str(dataset.split)] if dataset.split else [])]
    if config is not None:
        raise ValueError(f"{path}: expected no `config` of a saved data set, got {config!r}")
    if split not in names:
        raise ValueError(f"{path}: expected `split` {' or '.join(dict.fromkeys(names))}, got {split!r}")
    return dataset[split] if is_dict else dataset


def _streamed(path, split, config, revision, limit, size, aspect):
    if Path(path).exists() or not re.fullmatch(HUB_NAME, str(path)):
        raise ValueError(f"expected a name on the Hub to stream from, got {path}: leave `streaming` out for a folder")
    # the rows in the cache are named after the commit, so that a changed data set is read again
    if not re.fullmatch("[0-9a-f]{40}", revision or ""):
        revision = HfApi().dataset_info(str(path), revision=revision).sha
    source = {"path": str(path), "name": config, "split": split, "revision": revision}
    stream = datasets.load_dataset(**source, streaming=True)
    if stream.features is None:
        raise ValueError(f"{path} does not declare its columns: leave `streaming` out")
    check_columns(stream.features, path)
    kept = {"source": source, "limit": limit, "size": size, "aspect": aspect}
    return datasets.Dataset.from_generator(_rows, features=stream.features, gen_kwargs=kept)


def _rows(source, limit, size, aspect):
    """The rows of a stream as they are to be kept."""
    stream = check_images(datasets.load_dataset(**source, streaming=True))
    if size is None:  # the files' own bytes, not opened
        for name, feature in stream.features.items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(name, datasets.Image(decode=False))
    for i, row in enumerate(stream if limit is None else stream.take(limit)):
        for box in row.get("boxes") or ():
            check_box(box, f"{source['path']}, row {i}")
        yield row if size is None else _small(row, size, aspect)


def _small(row, size, aspect):
    image = to_grey(row["image"])
    row["image"] = png_cell(fit_image(image, size, aspect))
    if row.get("mask") is not None:
        row["mask"] = png_cell(fit_mask(binary_mask(row["mask"]), size, aspect))
    if row.get("boxes"):
        row["boxes"] = fit_boxes(row["boxes"], image.width, image.height, size, aspect)
    return row
