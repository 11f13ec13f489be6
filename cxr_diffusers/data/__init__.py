"""Data sets: `build_dataset(name, ...)`, one loader a file."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..config import checked, is_number
from .brats import load_brats
from .chestx_det import load_chestx_det
from .chexlocalize import load_chexlocalize
from .chexmask import load_chexmask
from .chexpert import load_chexpert
from .folder import load_folder, load_table
from .hub import load_hub
from .images import fit_image, list_images, read_image
from .mimic_cxr import load_mimic_cxr
from .nih import load_nih
from .packing import load_packed
from .padchest import load_padchest
from .phantom import load_phantom
from .preparation import prepare
from .rsna import load_rsna
from .selection import select_rows
from .siim import load_siim
from .vindr import load_vindr, load_vindr_pcxr

LOADERS: dict[str, Callable[..., Dataset]] = {
    "brats": load_brats,
    "chestx_det": load_chestx_det,
    "chexlocalize": load_chexlocalize,
    "chexmask": load_chexmask,
    "chexpert": load_chexpert,
    "folder": load_folder,
    "hub": load_hub,
    "mimic_cxr": load_mimic_cxr,
    "nih": load_nih,
    "packed": load_packed,
    "padchest": load_padchest,
    "phantom": load_phantom,
    "rsna": load_rsna,
    "siim": load_siim,
    "table": load_table,
    "vindr": load_vindr,
    "vindr_pcxr": load_vindr_pcxr,
}

__all__ = ["LOADERS", "build_dataset", "fit_image", "list_images", "open_dataset", "prepare"]
__all__ += ["read_image"]
__all__ += [loader.__name__ for loader in LOADERS.values()]


def build_dataset(name: str, **kwargs: Any) -> Dataset:
    """Open a data set: `LOADERS[name](**kwargs)`; see the loader for its keywords and columns.

    Raises:
        ValueError: an unknown name, an unknown keyword (the message lists the valid ones), a missing one, or a number
            of the wrong type.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(LOADERS)}")
    parameters = dict(inspect.signature(LOADERS[name]).parameters)
    if parameters.pop("selection", None):
        parameters |= {key: p for key, p in inspect.signature(select_rows).parameters.items() if key != "table"}
    unknown = [key for key in kwargs if key not in parameters]
    if unknown:
        raise ValueError(f"data set {name!r}: unknown key {unknown[0]!r}, expected one of {', '.join(parameters)}")
    needed = [key for key, p in parameters.items() if p.default is p.empty and key not in kwargs]
    if needed:
        raise ValueError(f"data set {name!r}: give {needed[0]!r}")
    for key, value in kwargs.items():
        if is_number(parameters[key].annotation):
            checked(value, parameters[key].annotation, f"data set {name!r}: {key}")
    return LOADERS[name](**kwargs)


def open_dataset(text: str) -> Dataset:
    """Open a data set written as one line, as on the command line: a folder, or `NAME:key=value,key=value`.

    Values are read as YAML, lists in brackets, mappings in braces; for example
    "chexpert:root=/data/CheXpert-v1.0,split=valid,classes=[Pneumonia]".

    Raises:
        ValueError: neither a folder nor the name of a loader, a part that is not key=value, or a key given twice.
    """
    if Path(text).is_dir():
        return build_dataset("folder", root=text)
    name, _, rest = text.partition(":")
    if name not in LOADERS:
        raise ValueError(f"expected a folder or NAME:key=value,... with NAME of {', '.join(LOADERS)}, got {text!r}")
    kwargs = {}
    for item in _split_items(rest) if rest else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"expected a data set as name:key=value,..., got {item!r} in {text!r}")
        if key in kwargs:
            raise ValueError(f"expected {key!r} once in {text!r}, got it twice")
        try:
            kwargs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            kwargs[key] = value
    return build_dataset(name, **kwargs)


def _split_items(text):
    """Parts of a text between commas that are not inside brackets or braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
