"""A data set of ours -> a data set repository of the Hugging Face Hub: shards of parquet, and a card."""

import os
import re
import warnings
from collections import Counter
from pathlib import Path, PurePosixPath

import datasets
from huggingface_hub import DatasetCard, DatasetCardData, HfApi

from ..data.hub import check_columns
from ..data.rows import BOXES
from .metadata import strip_metadata

# what a data set under an agreement is known by: in the words it is opened with, or in the paths of its images
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

**Research use only**, under the licence named above; it is for whoever holds the rights in the images to give.

{about}

## How to use

```bash
accelerate launch training/train_cfg.py configs/chexpert_cfg_256.yaml data.name=hub data.path={name}
cxr-diffusers evaluate hub:path={name},split={last} --out report
```

```python
from datasets import load_dataset

dataset = load_dataset("{name}", split="{first}")
dataset[0]["image"]  # a PIL picture; dataset.features["label"].names are the classes, healthy first
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
    "mask": "the abnormal region, white on black, as large as its image; none where it is not known",
    "boxes": "lists of [x, y, w, h] in pixels around what is abnormal; empty where there are none or none are known",
}


def publish_dataset(
    splits,
    repo_id,
    *,
    license,
    license_link=None,
    about=None,
    private=None,
    may_share=False,
    pseudonyms=False,
    opened_as="",
    token=None,
):
    """Upload a data set to the Hub; `load_hub`, and anybody's `datasets.load_dataset`, opens it there.

    Images and masks go with the same pixels and without metadata (text, EXIF, comments), boxes and further columns with
    them; the paths lose the folders that they share, so that the layout of the disk stays private. Uploading again
    replaces the earlier version.

    Args:
        splits: {name: data set}, each as the loaders of `cxr_diffusers.data` answer; a data set alone is the split
            "train". Where one split has masks or boxes, the others say that none are known.
        repo_id: USER/NAME, or NAME for your own; made if there is none.
        license: of the images, by its identifier on the Hub ("cc-by-4.0", "other", ...). There is no default: it is
            not ours to give.
        license_link: address of the licence's text, for "other".
        about: Markdown for the card: where the images come from, how they were labelled.
        private: of a new repository; None: as your account has it.
        may_share: you hold the right to share images that look as if they came under an agreement (`AGREEMENTS`).
        pseudonyms: number the patients and the files in place of their names.
        opened_as: the words that the data set was opened with, to know an agreement by.

    Returns:
        the address of the commit.

    Raises:
        PermissionError: images under an agreement without `may_share` or `private`, or a private upload to a repository
            that is public. ValueError: no licence, no split or a split without rows, classes or further columns that
            differ, or pictures that are no `datasets.Image`.
    """
    splits = {"train": splits} if isinstance(splits, datasets.Dataset) else dict(splits)
    check(splits, license)
    splits = alike(splits)
    agreement = agreement_of(splits, opened_as)
    if agreement and not (private or may_share):
        raise PermissionError(
            f"these look like images of {agreement}, whose terms do not allow you to pass them on: say `private`, "
            "or `may_share` if they are not, or if you may"
        )
    if agreement and not may_share:
        warnings.warn(f"a private copy of {agreement} may fall under its terms, too: read them", stacklevel=2)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    # `private` is of a new repository: one that was there stays as it was
    if private and not api.dataset_info(repo_id).private:
        raise PermissionError(f"{repo_id} is there and public: make it private on the Hub first, or name another")
    splits = {name: without_metadata(split, keep_names=not pseudonyms) for name, split in splits.items()}
    splits = renamed(splits) if pseudonyms else {name: relative(split) for name, split in splits.items()}
    text = card(splits, repo_id, license=license, license_link=license_link, about=about, pseudonyms=pseudonyms)
    # first of all, so that the images never lie there without their licence; the upload adds the columns to its YAML
    api.upload_file(
        path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset", token=token
    )
    return datasets.DatasetDict(splits).push_to_hub(repo_id, token=token).commit_url


def agreement_of(splits, opened_as=""):
    """The name of the agreement that images seem to be under, by their paths and the words they were opened with."""
    for name, pattern in AGREEMENTS.items():
        known = re.compile(pattern, re.IGNORECASE)
        if known.search(opened_as) or any(known.search(path) for found in splits.values() for path in found["path"]):
            return name
    return None


def check(splits, license):
    """The door: what can be refused before anything is made on the Hub."""
    if not license or not re.fullmatch(r"[\w.-]+", license):
        raise ValueError(f"expected the `license` of the images, an identifier as cc-by-4.0 or other, got {license!r}")
    if not splits:
        raise ValueError("expected at least one split, got none")
    for name, found in splits.items():
        check_columns(found.features, f"split {name!r}")
        if not len(found):
            raise ValueError(f"split {name!r} is empty")
    classes = {name: found.features["label"].names for name, found in splits.items()}
    if len({tuple(names) for names in classes.values()}) > 1:
        raise ValueError(f"expected the same classes in all splits, got {classes}")
    others = {name: sorted(set(found.column_names) - COLUMNS.keys()) for name, found in splits.items()}
    if len({tuple(names) for names in others.values()}) > 1:
        raise ValueError(f"expected the same further columns in all splits, got {others}")


def alike(splits):
    """The same splits with the same columns, in one order: a mask is None, boxes are [], where a split has none."""
    kinds = {"mask": datasets.Image(), "boxes": BOXES, "patient": datasets.Value("string")}
    kinds |= {name: kinds["patient"] for name in ("view", "path")}
    empty = {"mask": None, "boxes": []}
    names = [name for name in COLUMNS if any(name in found.column_names for found in splits.values())]
    names += sorted(set(next(iter(splits.values())).column_names) - COLUMNS.keys())
    made = {}
    for split, found in splits.items():
        for name in [name for name in names if name not in found.column_names]:
            found = found.add_column(name, [empty.get(name, "")] * len(found), feature=kinds[name])
        found = found.cast_column("boxes", BOXES) if "boxes" in names else found
        made[split] = found.select_columns(names)
    return made


def relative(dataset):
    """The same data set, its paths without the folders that all of them share."""
    paths = [path and PurePosixPath(path.replace(os.sep, "/")) for path in dataset["path"]]  # "" where it is not known
    known = [path for path in paths if path]
    if len({path.is_absolute() for path in known}) > 1:  # nothing is above both
        here = PurePosixPath(Path.cwd().as_posix())
        paths, known = [path and here / path for path in paths], [here / path for path in known]
    shared = known[0].parent if known else PurePosixPath()
    while not all(path.parent.is_relative_to(shared) for path in known):
        shared = shared.parent
    return with_texts(dataset, path=[path and path.relative_to(shared).as_posix() for path in paths])


def renamed(splits):
    """The same splits, patients and paths numbered, no file name left; a patient has one number in all of them."""
    numbers = {"": ""}  # who is not known is nobody in particular
    for found in splits.values():
        for patient in found["patient"]:
            numbers.setdefault(patient, f"patient{len(numbers):06d}")
    return {
        split: with_texts(
            found,
            patient=[numbers[patient] for patient in found["patient"]],
            path=[f"{split}/{i:06d}" for i in range(1, len(found) + 1)],
        )
        for split, found in splits.items()
    }


def without_metadata(dataset, keep_names):
    """The same data set, its images and masks with the same pixels and without metadata, see `strip_metadata`.

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


def strip_cell(cell, keep_name):
    """An image's cell {"path", "bytes"} without metadata, and without the file's name if so asked; None stays None."""
    if cell is None:
        return None
    name = Path(cell["path"]).name if cell["path"] else None
    content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    try:
        content = strip_metadata(content)
    except ValueError as error:
        raise ValueError(f"{name or 'an image'}: {error}") from None
    return {"path": name if keep_name else None, "bytes": content}


def with_texts(dataset, **columns):
    """A data set with columns of text replaced, where they were."""
    order = dataset.column_names
    for name, values in columns.items():
        dataset = dataset.remove_columns(name).add_column(name, values, feature=datasets.Value("string"))
    return dataset.select_columns(order)


def card(splits, repo_id, *, license, license_link=None, about=None, pseudonyms=False):
    """The text of a data set's README.md."""
    names = next(iter(splits.values())).column_names
    tasks = ["image-classification"]
    tasks += ["image-segmentation"] if "mask" in names else []
    tasks += ["object-detection"] if "boxes" in names else []
    metadata = DatasetCardData(
        license=license,
        license_link=license_link,
        pretty_name=repo_id.split("/")[-1],
        task_categories=tasks,
        size_categories=size_category(sum(len(found) for found in splits.values())),
        tags=["chest-x-ray", "radiology", "medical", "anomaly-detection", "cxr_diffusers"],
    )
    words = {
        "patient": "the patient's number here, no name" if pseudonyms else "the patient, as the source calls them",
        "path": "the file's number" if pseudonyms else "the file, as the source calls it",
    }
    rows = [f"| `{name}` | {COLUMNS.get(name, 'as it came').format(**words)} |" for name in names]
    text = CARD.format(
        metadata=metadata.to_yaml(),
        title=repo_id.split("/")[-1],
        name=repo_id,
        about=(about or "Where the images come from and how they were labelled was not said.").strip(),
        first=next(iter(splits)),
        last=list(splits)[-1],
        counts=count_table(splits),
        columns="\n".join(rows),
    )
    return str(DatasetCard(text))


def count_table(splits):
    """Markdown: images of each class, patients, images with a mask or boxes, a line for each split."""
    classes = next(iter(splits.values())).features["label"].names
    unlabelled = any(min(found["label"]) < 0 for found in splits.values())
    heads = ["split", "images", "patients", *classes, *(["not labelled"] if unlabelled else []), "with a mask or boxes"]
    lines = [heads, ["---"] * len(heads)]
    for name, found in splits.items():
        count, cells = Counter(found["label"]), [name, len(found), len(set(found["patient"]))]
        cells += [count[i] for i in range(len(classes))] + ([count[-1]] if unlabelled else [])
        lines.append([*cells, sum(known_regions(found))])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def known_regions(dataset):
    """For each row, whether it has a mask or a box; no picture is opened."""
    region = [False] * len(dataset)
    if "mask" in dataset.column_names:
        masks = dataset.select_columns("mask").cast_column("mask", datasets.Image(decode=False))["mask"]
        region = [mask is not None for mask in masks]
    if "boxes" in dataset.column_names:
        region = [known or bool(boxes) for known, boxes in zip(region, dataset["boxes"], strict=True)]
    return region


def size_category(n):
    """n -> the Hub's word for it: n<1K, 1K<n<10K, ..."""
    bounds = ["1K", "10K", "100K", "1M", "10M"]
    for i, limit in enumerate((10**3, 10**4, 10**5, 10**6, 10**7)):
        if n < limit:
            return f"{bounds[i - 1]}<n<{bounds[i]}" if i else "n<1K"
    return "n>10M"
