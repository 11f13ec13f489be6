"""Data sets: `build_dataset(name, ...)`, one loader a file."""

import importlib
import inspect

from .brats import load_brats
from .chexpert import load_chexpert
from .folder import load_folder, load_table
from .hub import load_hub
from .images import fit_image, list_images, read_image
from .nih import load_nih
from .phantom import load_phantom
from .preparation import prepare
from .vindr import load_vindr

LOADERS = {
    "brats": load_brats,
    "chexpert": load_chexpert,
    "folder": load_folder,
    "hub": load_hub,
    "nih": load_nih,
    "phantom": load_phantom,
    "table": load_table,
    "vindr": load_vindr,
}

# these need torch, which takes seconds to import and which reading a file does not need
_LAZY = {"TensorImages": "tensors", "augment": "augmentation"}

__all__ = ["LOADERS", "TensorImages", "augment", "build_dataset", "fit_image", "list_images", "prepare", "read_image"]
__all__ += [loader.__name__ for loader in LOADERS.values()]


def build_dataset(name, **kwargs):
    """Open a data set: `LOADERS[name](**kwargs)`; see the loader for its keywords and columns.

    Raises:
        ValueError: an unknown name, an unknown keyword or a missing one, with those that are known.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(LOADERS)}")
    parameters = inspect.signature(LOADERS[name]).parameters
    unknown = [key for key in kwargs if key not in parameters]
    if unknown:
        raise ValueError(f"data set {name!r}: unknown key {unknown[0]!r}, expected one of {', '.join(parameters)}")
    needed = [key for key, p in parameters.items() if p.default is p.empty and key not in kwargs]
    if needed:
        raise ValueError(f"data set {name!r}: give {needed[0]!r}")
    return LOADERS[name](**kwargs)


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
