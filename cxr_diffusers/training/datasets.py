"""The data sets that a recipe names."""

from datasets import Dataset

from ..data import build_dataset
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


def open_validation(recipe: Recipe | AdversarialRecipe | ClassifierRecipe | SegmenterRecipe) -> Dataset:
    """The data set of a recipe's `validation:` section, whose missing values are those of `data:`."""
    with section("validation"):
        return build_dataset(**{**recipe.data, **recipe.validation})


def diseased_rows(recipe: Recipe | AdversarialRecipe, dataset: Dataset, unlabelled: bool = False) -> Dataset:
    """The diseased validation images to display during training, at most `train.validation_images`.

    Args:
        dataset: the training data.
        unlabelled: whether some images of `dataset` may lack a label.

    Raises:
        ValueError: an image of `dataset` has no label, or none is diseased.
    """
    rows = open_validation(recipe).filter(lambda label: label > 0, input_columns="label")
    labels = dataset["label"][:]
    if (max(labels) < 1 if unlabelled else min(labels) < 0) or not len(rows):
        raise ValueError(f"expected a label for every image and diseased ones among them, got {recipe.data}")
    return rows.select(range(min(recipe.train.validation_images, len(rows))))
