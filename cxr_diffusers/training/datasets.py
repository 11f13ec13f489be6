"""The data sets that a recipe names."""

import sys

from datasets import Dataset
from tqdm.auto import tqdm

from ..data import build_dataset
from ..processes import process_state
from .recipe import AdversarialRecipe, AnyRecipe, ClassifierRecipe, Recipe, SegmenterRecipe, section


def open_data(recipe: AnyRecipe) -> tuple[Dataset, list[str]]:
    """The data set of a recipe's `data:` section, and the names of its classes.

    Raises:
        ValueError: also for a class without an image, which a model that starts from no other one never learns.
    """
    with section("data"):
        dataset = build_dataset(**recipe.data)
        names, present = dataset.features["label"].names, set(dataset["label"][:])
        missing = [name for k, name in enumerate(names) if k not in present]
        if missing and max(present) >= 0 and not recipe.train.init_from:
            raise ValueError(f"expected images of each class of {', '.join(names)}, got none of {', '.join(missing)}")
    return dataset, names


def open_validation(
    recipe: Recipe | AdversarialRecipe | ClassifierRecipe | SegmenterRecipe, training: Dataset | None = None
) -> Dataset:
    """The data set of a recipe's `validation:` section, whose missing values are those of `data:`.

    Args:
        training: the training data; a warning counts the patients that are in both.
    """
    with section("validation"):
        dataset = build_dataset(**{**recipe.data, **recipe.validation})
    shared = set() if training is None else patients_of(dataset) & patients_of(training)
    if shared and process_state().is_main_process:
        tqdm.write(
            f"{len(shared)} of {len(patients_of(dataset))} patients of the validation images are among the training "
            "images, so the results on them will be too good: see the recipe's section validation",
            file=sys.stderr,
        )
    return dataset


def patients_of(dataset: Dataset) -> set[str]:
    """The patients of a data set; where `load_hub` has numbered its rows in place of patients, their paths."""
    patients = dataset["patient"][:]
    return set(dataset["path"][:] if patients == list(map(str, range(len(patients)))) else patients)


def diseased_rows(recipe: Recipe | AdversarialRecipe, dataset: Dataset, unlabelled: bool = False) -> Dataset:
    """The diseased validation images to display during training, at most `train.validation_images`.

    Args:
        dataset: the training data.
        unlabelled: whether some images of `dataset` may lack a label.

    Raises:
        ValueError: an image of `dataset` has no label, or none is diseased.
    """
    rows = open_validation(recipe, dataset).filter(lambda label: label > 0, input_columns="label")
    labels = dataset["label"][:]
    if (max(labels) < 1 if unlabelled else min(labels) < 0) or not len(rows):
        raise ValueError(f"expected a label for every image and diseased ones among them, got {recipe.data}")
    return rows.select(range(min(recipe.train.validation_images, len(rows))))
