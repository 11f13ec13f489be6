"""Data sets: `build_dataset(name, ...)`, one loader a file."""

import inspect
import re
from pathlib import Path

import yaml

from .brats import load_brats
from .chexlocalize import load_chexlocalize
from .chexpert import load_chexpert
from .folder import load_folder, load_table
from .hub import load_hub
from .images import fit_image, list_images, read_image
from .nih import load_nih
from .packing import load_packed
from .phantom import load_phantom
from .preparation import prepare
from .vindr import load_vindr

LOADERS = {
    "brats": load_brats,
    "chexlocalize": load_chexlocalize,
    "chexpert": load_chexpert,
    "folder": load_folder,
    "hub": load_hub,
    "nih": load_nih,
    "packed": load_packed,
    "phantom": load_phantom,
    "table": load_table,
    "vindr": load_vindr,
}

__all__ = ["LOADERS", "build_dataset", "fit_image", "list_images", "open_dataset", "prepare"]
__all__ += ["read_image"]
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


def open_dataset(text):
    """Open a data set by one line, as the command line does: a folder, or `NAME:key=value,key=value`.

    Values are read as YAML, lists in brackets, mappings in braces; for example
    "chexpert:root=/data/CheXpert-v1.0,split=valid,classes=[Pneumonia]".

    Raises:
        ValueError: neither a folder nor the name of a loader, or a part that is no key=value.
    """
    if Path(text).is_dir():
        return build_dataset("folder", root=text)
    name, _, rest = text.partition(":")
    if name not in LOADERS:
        raise ValueError(f"expected a folder or NAME:key=value,... with NAME of {', '.join(LOADERS)}, got {text!r}")
    kwargs = {}
    for item in re.split(r",(?![^\[{]*[\]}])", rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"expected a data set as name:key=value,..., got {item!r} in {text!r}")
        try:
            kwargs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            kwargs[key] = value
    return build_dataset(name, **kwargs)
