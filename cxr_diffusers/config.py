"""YAML and overrides -> dataclasses; unknown keys and values of the wrong type are errors."""

import types
import typing
from dataclasses import fields
from pathlib import Path

import yaml


def read_sections(path, cls):
    """The sections of a YAML file as a dict, for `build(cls, ...)`; ValueError where it is no YAML or has none."""
    try:
        sections = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path}: expected the sections {[f.name for f in fields(cls)]}, got {sections!r}")
    return sections


def override_value(sections, override):
    """Put one `section.key=value` into the nested dict `sections`."""
    dotted, equals, value = override.partition("=")
    *parents, key = dotted.removeprefix("--").split(".")
    if not equals or not parents:
        raise ValueError(f"expected an override of the form section.key=value, got {override!r}")
    target = sections
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ValueError(f"{override!r}: {parent!r} has no keys, it is {target!r}")
    try:
        target[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"expected a YAML value in {override!r}, got {' '.join(str(error).split())}") from None


def build(cls, values, where):
    """`cls(**values)`, naming the place and the offending key when a key is unknown, missing or of the wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    known = {f.name: f for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {sorted(known)}")
        values[key] = checked(value, known[key].type, f"{where}: {key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def checked(value, kind, where):
    """`value` if it is of the annotated type (an int will do for a float), else ValueError."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return float(value)
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        hint = " (YAML reads 1e-4 as text, 1.0e-4 as a number)" if float in kinds and isinstance(value, str) else ""
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where} must be {names}, got {value!r}{hint}")
    return value
