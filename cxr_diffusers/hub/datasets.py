"""Publishing a data set on the Hugging Face Hub: Parquet files and a card."""

import os
import re
import warnings
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..data.hub import check_columns
from ..data.rows import BOXES
from .metadata import strip_metadata
from .publishing import uploading

# patterns of data sets under a data use agreement, in the words that opened them or in the paths of their images
AGREEMENTS = {
    "CheXpert": r"chexpert|patient\d{5}/study\d+/view\d",
    "VinDr-CXR": r"vindr|vinbig",
    "MIMIC-CXR": r"mimic",
    "PadChest": r"padchest",
    "BraTS": r"brats",
}

CARD = """---
{metadata}
---

# {title}

Chest radiographs in the columns of [`cxr_diffusers`](https://github.com/cxr-diffusers/cxr_diffusers).

**Research use only**, under the licence named above, which only the holder of the rights in the images can grant.

{about}

## How to use

```bash
cxr-diffusers train chexpert_cfg_256 data.name=hub data.path={name}
cxr-diffusers evaluate hub:path={name},split={last} --out report
```

```python
from datasets import load_dataset

dataset = load_dataset("{name}", split="{first}")
dataset[0]["image"]  # a PIL image; dataset.features["label"].names are the classes, healthy first
```

## What is in it

{counts}

| column | |
|---|---|
{columns}
"""

COLUMNS = {
    "image": "the radiograph",
    "label": "class id, healthy is 0; -1: not labelled",
    "patient": "{patient}; to split and to resample by",
    "view": "AP, PA or empty",
    "path": "{path}",
    "mask": "the abnormal region, white on black, of the size of the image; none if it is unknown",
    "boxes": "lists of [x, y, w, h] in pixels around abnormal regions; empty if there are none or if they are unknown",
}


def publish_dataset(
    splits: Any,
    repo_id: str,
    *,
    license: str,
    license_link: str | None = None,
    about: str | None = None,
    private: bool | None = None,
    may_share: bool = False,
    pseudonyms: bool = False,
    opened_as: str = "",
    token: str | None = None,
) -> str:
    """Upload a data set to the Hub, where `load_hub` and `datasets.load_dataset` open it.

    Images and masks keep their pixels and lose their metadata (text, EXIF, comments); boxes and further columns are
    uploaded as they are. Folders that all paths have in common are removed from the paths. Uploading again replaces the
    earlier version.

    Args:
        splits: {name: data set}, each as returned by the loaders of `cxr_diffusers.data`; a single data set is the
            split "train". If one split has masks or boxes, the others get empty ones.
        repo_id: USER/NAME, or NAME in your own account; created if it does not exist.
        license: of the images, by its identifier on the Hub ("cc-by-4.0", "other", ...). There is no default.
        license_link: address of the licence's text, for "other".
        about: Markdown for the card: source and labels of the images.
        private: visibility of a new repository; None: the default of your account.
        may_share: you have the right to share images that seem to be under a data use agreement (`AGREEMENTS`).
        pseudonyms: replace the names of patients and files by numbers.
        opened_as: the words that the data set was opened with; a data use agreement may be recognised by them.

    Returns:
        the address of the commit.

    Raises:
        PermissionError: images under an agreement without `may_share` or `private`, or a private upload to a public
            repository.
        OSError: the Hub does not answer, or refuses the upload. See `uploading`.
        ValueError: no licence, no split, a split without rows, different classes or columns in different splits, or
            images that are no `datasets.Image`.
    """
    splits = {"train": splits} if isinstance(splits, datasets.Dataset) else dict(splits)
    check(splits, license)
    splits = with_same_columns(splits)
    agreement = agreement_of(splits, opened_as)
    if agreement and not (private or may_share):
        raise PermissionError(
            f"these look like images of {agreement}, whose terms do not allow you to share them: pass `private`, "
            "or `may_share` if they are other images or if you may share them"
        )
    if agreement and not may_share:
        warnings.warn(f"a private copy of {agreement} may be subject to its terms, too: read them", stacklevel=2)
    api = HfApi(token=token)
    with uploading(api, repo_id, repo_type="dataset", private=private) as repo_id:
        splits = {name: without_metadata(split, keep_names=not pseudonyms) for name, split in splits.items()}
        splits = pseudonymised(splits) if pseudonyms else {name: with_relative_paths(s) for name, s in splits.items()}
        text = card(splits, repo_id, about, pseudonyms, license=license, license_link=license_link)
        # first, so that the images are never there without their licence; the upload adds the columns to its YAML
        api.upload_file(
            path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset", token=token
        )
        return datasets.DatasetDict(splits).push_to_hub(repo_id, token=token).commit_url


def agreement_of(splits: dict, opened_as: str = "") -> str | None:
    """The name of the data use agreement that the images seem to be under, judged by their paths and `opened_as`."""
    for name, pattern in AGREEMENTS.items():
        texts = [opened_as, *(path for split in splits.values() for path in split["path"])]
        if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            return name
    return None


def check(splits: dict, license: str) -> None:
    """Raise ValueError for an invalid licence or invalid splits, before anything is created on the Hub."""
    if not license or not re.fullmatch(r"[\w.-]+", license):
        raise ValueError(f"expected the `license` of the images, an identifier as cc-by-4.0 or other, got {license!r}")
    if not splits:
        raise ValueError("expected at least one split, got none")
    for name, split in splits.items():
        check_columns(split.features, f"split {name!r}")
        if not len(split):
            raise ValueError(f"split {name!r} is empty")
    classes = {name: split.features["label"].names for name, split in splits.items()}
    if len({tuple(names) for names in classes.values()}) > 1:
        raise ValueError(f"expected the same classes in all splits, got {classes}")
    others = {name: sorted(set(split.column_names) - COLUMNS.keys()) for name, split in splits.items()}
    if len({tuple(names) for names in others.values()}) > 1:
        raise ValueError(f"expected the same further columns in all splits, got {others}")


def with_same_columns(splits: dict) -> dict:
    """The splits with the same columns in the same order; a split without masks or boxes gets None or []."""
    text = datasets.Value("string")
    features = {"mask": datasets.Image(), "boxes": BOXES, "patient": text, "view": text, "path": text}
    empty: dict[str, Any] = {"mask": None, "boxes": []}
    names = [name for name in COLUMNS if any(name in split.column_names for split in splits.values())]
    names += sorted(set(next(iter(splits.values())).column_names) - COLUMNS.keys())
    completed = {}
    for split_name, split in splits.items():
        for name in [name for name in names if name not in split.column_names]:
            split = split.add_column(name, [empty.get(name, "")] * len(split), feature=features[name])
        split = split.cast_column("boxes", BOXES) if "boxes" in names else split
        completed[split_name] = split.select_columns(names)
    return completed


def with_relative_paths(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set, its paths without the folders that all of them have in common."""
    paths: list[Any] = [path and PurePosixPath(path.replace(os.sep, "/")) for path in dataset["path"]]  # "": unknown
    given = [path for path in paths if path]
    if len({path.is_absolute() for path in given}) > 1:  # no folder contains both absolute and relative paths
        here = PurePosixPath(Path.cwd().as_posix())
        paths, given = [path and here / path for path in paths], [here / path for path in given]
    shared = given[0].parent if given else PurePosixPath()
    while not all(path.parent.is_relative_to(shared) for path in given):
        shared = shared.parent
    return with_texts(dataset, path=[path and path.relative_to(shared).as_posix() for path in paths])


def pseudonymised(splits: dict) -> dict:
    """The splits with numbers for patients and paths; a patient has the same number in all of them."""
    numbers = {"": ""}  # unknown patients stay unknown
    for split in splits.values():
        for patient in split["patient"]:
            numbers.setdefault(patient, f"patient{len(numbers):06d}")
    return {
        name: with_texts(
            split,
            patient=[numbers[patient] for patient in split["patient"]],
            path=[f"{name}/{i:06d}" for i in range(1, len(split) + 1)],
        )
        for name, split in splits.items()
    }


def without_metadata(dataset: datasets.Dataset, keep_names: bool) -> datasets.Dataset:
    """The data set, its images and masks with the same pixels and without metadata, see `strip_metadata`.

    Args:
        keep_names: whether the images keep the names of their files.

    Raises:
        ValueError: an image file that cannot be read.
    """
    features = dataset.features
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = dataset
    for name in columns:
        encoded = encoded.cast_column(name, datasets.Image(decode=False))

    def strip(*cells):
        return {name: strip_cell(cell, keep_names) for name, cell in zip(columns, cells, strict=True)}

    return encoded.map(strip, input_columns=columns, features=features, desc="removing metadata")


def strip_cell(cell: dict | None, keep_name: bool) -> dict | None:
    """An image's cell {"path", "bytes"} without metadata, and without the file's name unless `keep_name`."""
    if cell is None:
        return None
    name = Path(cell["path"]).name if cell["path"] else None
    content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    try:
        content = strip_metadata(content)
    except ValueError as error:
        raise ValueError(f"{name or 'an image'}: {error}") from None
    return {"path": name if keep_name else None, "bytes": content}


def with_texts(dataset: datasets.Dataset, **columns: list[str]) -> datasets.Dataset:
    """The data set with these text columns replaced; the order of the columns stays."""
    order = dataset.column_names
    for name, values in columns.items():
        dataset = dataset.remove_columns(name).add_column(name, values, feature=datasets.Value("string"))
    return dataset.select_columns(order)


def card(splits: dict, repo_id: str, about: str | None, pseudonyms: bool, **licence: str | None) -> str:
    """The text of a data set's README.md; `licence` are `license` and `license_link` of the Hub's metadata."""
    names = next(iter(splits.values())).column_names
    tasks = ["image-classification"]
    tasks += ["image-segmentation"] if "mask" in names else []
    tasks += ["object-detection"] if "boxes" in names else []
    metadata = DatasetCardData(
        **licence,
        pretty_name=repo_id.split("/")[-1],
        task_categories=tasks,
        size_categories=size_category(sum(map(len, splits.values()))),
        tags=["chest-x-ray", "radiology", "medical", "anomaly-detection", "cxr_diffusers"],
    )
    words = {
        "patient": "number of the patient in this data set" if pseudonyms else "the patient's name in the source",
        "path": "number of the file" if pseudonyms else "the file's name in the source",
    }
    rows = [f"| `{name}` | {COLUMNS.get(name, 'as in the source').format(**words)} |" for name in names]
    text = CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.split("/")[-1],
        name=repo_id,
        about=(about or "The publisher has not described the source and the labels of the images.").strip(),
        first=next(iter(splits)),
        last=list(splits)[-1],
        counts=count_table(splits),
        columns="\n".join(rows),
    )
    return str(DatasetCard(text))


def count_table(splits: dict) -> str:
    """Markdown table with one line for each split: images of each class, patients, images with a mask or boxes."""
    classes = next(iter(splits.values())).features["label"].names
    unlabelled = any(min(split["label"]) < 0 for split in splits.values())
    heads = ["split", "images", "patients", *classes, *(["not labelled"] if unlabelled else []), "with a mask or boxes"]
    lines = [heads, ["---"] * len(heads)]
    for name, split in splits.items():
        count, cells = Counter(split["label"]), [name, len(split), len(set(split["patient"]))]
        cells += [count[i] for i in range(len(classes))] + ([count[-1]] if unlabelled else [])
        lines.append([*cells, sum(has_region(split))])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def has_region(dataset: datasets.Dataset) -> list[bool]:
    """For each row, whether it has a mask or a box; no image is opened."""
    region = [False] * len(dataset)
    if "mask" in dataset.column_names:
        masks = dataset.select_columns("mask").cast_column("mask", datasets.Image(decode=False))["mask"]
        region = [mask is not None for mask in masks]
    if "boxes" in dataset.column_names:
        region = [has_mask or bool(boxes) for has_mask, boxes in zip(region, dataset["boxes"], strict=True)]
    return region


def size_category(n: int) -> str:
    """n -> the Hub's size category: n<1K, 1K<n<10K, ..."""
    bounds = ["1K", "10K", "100K", "1M", "10M"]
    for i, limit in enumerate((10**3, 10**4, 10**5, 10**6, 10**7)):
        if n < limit:
            return f"{bounds[i - 1]}<n<{bounds[i]}" if i else "n<1K"
    return "n>10M"
