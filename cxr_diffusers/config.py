"""YAML files and command-line overrides -> dataclasses; unknown keys and values of the wrong type are errors."""

import re
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml

T = typing.TypeVar("T")
MERGE = "tag:yaml.org,2002:merge"  # the key <<

# recipes, and plans/ of evaluations: inside the package when installed, beside it in a checkout
INSTALLED = Path(__file__).with_name("configs")
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
PLANS = CONFIGS / "plans"


def config_file(name: str | Path, folder: Path = CONFIGS) -> Path:
    """The path of a YAML file: `name` itself, or the file of that name that comes with the package in `folder`.

    Raises:
        FileNotFoundError: there is neither; the message lists the names in `folder`.
    """
    shipped = folder / f"{name}.yaml"
    path = shipped if Path(name).suffix not in (".yaml", ".yml") and shipped.is_file() else Path(name)
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise FileNotFoundError(f"expected a YAML file or one of {names}, got {name}")
    return path


class Loader(yaml.SafeLoader):
    """YAML as of version 1.2 where PyYAML is not: numbers may be written 1e-3, and a key may not be given twice."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """As in PyYAML; ComposerError for a key that is given twice, of which PyYAML drops the first value."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != MERGE):
            if key.value in names:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} twice", key.start_mark)
            names.add(key.value)
        return node


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), "-+0123456789")


def read_sections(path: str | Path, cls: type) -> dict:
    """The sections of a YAML file, as a dict for `build(cls, ...)`.

    Raises:
        ValueError: the file is not YAML, or has no sections.
    """
    try:
        sections = yaml.load(Path(path).read_text(), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{path}: expected the sections {[f.name for f in fields(cls)]}, got {sections!r}")
    return sections


def override_value(sections: dict, override: str) -> None:
    """Put one `section.key=value` into the nested dict `sections`; ValueError if it has another form."""
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
        target[key] = yaml.load(value, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"expected a YAML value in {override!r}, got {' '.join(str(error).split())}") from None


def build(cls: type[T], values: dict, where: str) -> T:
    """`cls(**values)` of a dataclass.

    Raises:
        ValueError: a key is unknown or missing, or its value has the wrong type; names the key and `where` it is.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected keys and values, got {values!r}")
    annotations: dict[str, typing.Any] = {f.name: f.type for f in fields(typing.cast(typing.Any, cls))}
    for key, value in values.items():
        if key not in annotations:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {sorted(annotations)}")
        values[key] = checked(value, annotations[key], f"{where}: {key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def is_number(annotation: typing.Any) -> bool:
    """Whether an annotation is int, float or bool, or one of them or None."""
    parts = set(typing.get_args(annotation)) or {annotation}
    return parts <= {int, float, bool, type(None)}


def checked(value: typing.Any, annotation: typing.Any, where: str) -> typing.Any:
    """`value` if it has the annotated type (an int is accepted for a float), else ValueError.

    A `Literal` with "no" takes false too: YAML reads an unquoted `no` as that.
    """
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    allowed = typing.get_args(annotation) if union else (annotation,)
    choices = [choice for part in allowed for choice in typing.get_args(part)]
    if choices:
        value = "no" if value is False and "no" in choices else value
        if value in choices or value is None and type(None) in allowed:
            return value
        raise ValueError(f"{where}: expected {' or '.join(map(str, choices))}, got {value!r}")
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed:
        return float(value)
    if float in allowed and str(value).lower().lstrip("+-") in ("nan", "inf", "infinity"):  # for YAML these are texts
        raise ValueError(f"{where}: expected a finite number, got {value}")
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
        hint = " (YAML reads no, off, yes and on as false and true: quote it)" if isinstance(value, bool) else ""
        # a section that has a dataclass of its own is written as a dict
        names = " or ".join("dict" if is_dataclass(part) else part.__name__ for part in allowed)
        raise ValueError(f"{where}: expected {names}, got {value!r}{hint}")
    return value
