"""A data set of the Hugging Face Hub, or a folder of parquet files, that has our columns."""

from pathlib import Path

import datasets

from .rows import missing_columns


def load_hub(path, *, split="train", config=None, revision=None):
    """`datasets.load_dataset` (or `load_from_disk` for a folder that `save_to_disk` wrote), and a look at the columns.

    Args:
        path: USER/NAME on the Hub, a folder of parquet files, or a saved data set.
        split, config, revision: as in `datasets.load_dataset` (`config` is its `name`).

    Returns:
        `datasets.Dataset` with image (`datasets.Image`) and label (`datasets.ClassLabel`) as it came; patient, view and
        path are added where they are not there: every image its own patient, the view unknown.

    Raises:
        ValueError: image or label are missing or of another kind.
    """
    if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
    else:
        dataset = datasets.load_dataset(str(path), name=config, split=split, revision=revision)
    missing_columns(["image", "label"], dataset.column_names, path)
    for name, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
        if not isinstance(dataset.features[name], kind):
            raise ValueError(
                f"{path}: expected column {name!r} to be datasets.{kind.__name__}, got {dataset.features[name]}: "
                f"cast it with `dataset.cast_column({name!r}, ...)`, healthy being class 0"
            )
    rows = [str(i) for i in range(len(dataset))]
    additions = {"patient": rows, "view": [""] * len(rows), "path": [f"{path}/{split}/{i}" for i in rows]}
    for name, values in additions.items():
        if name not in dataset.column_names:
            dataset = dataset.add_column(name, values)
    return dataset
