"""Plans: several methods on several data sets, from a YAML file; a table for each data set."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import build, checked, is_number, override_value, read_sections
from ..data import build_dataset
from ..files import write_file
from .comparison import Evaluation, compare
from .report import COLUMNS, counterfactual_table, summary_table

OWN_OPTIONS = ("healthy", "strata", "output_dir", "maps_dir", "shard")  # of `compare`, not among a plan's `options`
# arguments of a pipeline's call that the evaluation gives itself
OWN_ARGUMENTS = (
    *("image", "generator", "output_type", "return_dict"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)


@dataclass
class DataPlan:
    """A data set of a plan."""

    images: dict  # `name` of a loader in cxr_diffusers.data, and its keyword arguments
    healthy: dict = field(default_factory=dict)  # likewise: healthy validation images, for the thresholds
    strata: list = field(default_factory=list)  # columns to report separately


@dataclass
class Plan:
    """The methods and data sets of an evaluation; `configs/plans/evaluate.yaml` is one."""

    methods: dict  # name in the table -> {model: see hub.load_pipeline; any argument of its call}
    data: dict  # name -> `DataPlan`
    root: str = ""  # replaces {root} in the data's values
    options: dict = field(default_factory=dict)  # of `compare`: n_bootstrap, seed, judge, lung_segmenter, ...


def load_plan(
    path: Path | str,
    overrides: Iterable[str] = (),
    only: Iterable[str] = (),
    on: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Plan:
    """Read a plan.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings, as for recipes; `root=FOLDER` needs no section.
        only, on: the names of the methods and of the data sets to keep; none: all.
        skip: the names of methods to leave out.

    Raises:
        ValueError: no YAML, an unknown key or option (the message lists the valid ones), a method without a model,
            images without the name of a loader, or a value `???`, which has to be overridden.
    """
    values = read_sections(path, Plan)
    for override in overrides:
        if override.startswith("root="):
            values["root"] = override.removeprefix("root=")
        else:
            override_value(values, override)
    plan = build(Plan, values, str(path))
    if plan.root == "???":
        raise ValueError(f"{path}: give root, for example: root=/data/cxr")
    plan.data = {
        name: build(DataPlan, fill(data, plan.root), f"{path}: data.{name}") for name, data in plan.data.items()
    }
    skipped = chosen(plan.methods, skip, f"{path}: no method") if skip else {}
    kept = chosen(plan.methods, only, f"{path}: no method")
    plan.methods = {name: method for name, method in kept.items() if name not in skipped}
    plan.data = chosen(plan.data, on, f"{path}: no data set")
    for name, method in plan.methods.items():
        if not isinstance(method, dict) or "model" not in method:
            raise ValueError(f"{path}: methods.{name}: expected a `model` and arguments of its call, got {method!r}")
    for name, data in plan.data.items():
        for part in ("images", "healthy"):
            section = getattr(data, part)
            if "name" not in section and (section or part == "images"):
                raise ValueError(f"{path}: data.{name}.{part}: expected the `name` of a loader, got {section!r}")
    check_options(plan.options, f"{path}: options")
    if not plan.methods or not plan.data:
        raise ValueError(f"{path}: expected at least one method and one data set")
    return plan


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if `compare` has no such option, or one of another type."""
    parameters = inspect.signature(compare).parameters
    allowed = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in OWN_OPTIONS]
    for name, value in options.items():
        if name not in allowed:
            raise ValueError(f"{where}: expected some of {', '.join(allowed)}, got {name!r}")
        expected = {"judge": str | None, "lung_segmenter": str | None, "call_kwargs": dict | None}.get(name)
        if expected:
            checked(value, expected, f"{where}: {name}")
        elif is_number(parameters[name].annotation):
            checked(value, parameters[name].annotation, f"{where}: {name}")


def chosen(items: Mapping[str, Any], names: Iterable[str], message: str) -> dict[str, Any]:
    """The items of these names, in the plan's order; without names all. ValueError where there is no such item."""
    names = list(names)
    unknown = [name for name in names if name not in items]
    if unknown:
        raise ValueError(f"{message} {', '.join(unknown)}, expected some of {', '.join(items)}")
    return {name: item for name, item in items.items() if not names or name in names}


def fill(value: Any, root: str) -> Any:
    """A value with {root} replaced in every string of it."""
    if isinstance(value, dict):
        return {key: fill(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, root) for item in value]
    return value.replace("{root}", root) if isinstance(value, str) else value


def run_plan(
    plan: Plan, open_model: Callable[[Any], Any], output_dir: Path | str, **options: Any
) -> dict[str, Evaluation] | None:
    """Evaluate every method of a plan on each of its data sets.

    Args:
        plan: a `Plan`.
        open_model: `open_model(model)` -> pipeline, placed on its device; opens the methods and the judge.
        output_dir: holds a folder for each data set, see `compare`; summary.md with all tables; and maps/, which the
            data sets share: an image that is in several of them is computed once.
        options: of `compare`, over those of the plan; `lung_segmenter` is a model, where the plan names one.

    Returns:
        {data set: `Evaluation`}; None in all processes but the main one.

    Raises:
        ValueError: an argument that a method's call does not have.
    """
    # all data sets are opened before any model and before anything is computed: a wrong path is an error at once
    opened = {
        name: (build_dataset(**data.images), build_dataset(**data.healthy) if data.healthy else None, data.strata)
        for name, data in plan.data.items()
    }
    pipelines = {}
    for name, method in plan.methods.items():
        kwargs = {key: value for key, value in method.items() if key != "model"}
        kwargs = (plan.options.get("call_kwargs") or {}) | kwargs
        pipelines[name] = checked_call(open_model(method["model"]), kwargs, name)
    settings: dict[str, Any] = {**plan.options, **options}
    if isinstance(settings.get("judge"), str):
        settings["judge"] = open_model(settings["judge"])
    results: dict[str, Evaluation] = {}
    for name, (images, healthy, strata) in opened.items():
        settings |= dict(output_dir=Path(output_dir) / name, maps_dir=Path(output_dir) / "maps")
        result = compare(pipelines, images, healthy=healthy, strata=tuple(strata), **settings)
        if result is not None:
            results[name] = result
    if not results:
        return None
    write_file(Path(output_dir) / "summary.md", plan_table(results).encode())
    return results


def checked_call(pipeline: Any, kwargs: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """(pipeline, kwargs), as `compare` takes them; ValueError where its call has no such argument."""
    arguments = [key for key in inspect.signature(pipeline.__call__).parameters if key not in ("self", *OWN_ARGUMENTS)]
    unknown = sorted(set(kwargs) - set(arguments))
    if unknown and "kwargs" not in arguments:
        raise ValueError(
            f"{name}: a {type(pipeline).__name__} has no {', '.join(unknown)}, expected some of {', '.join(arguments)}"
        )
    return pipeline, kwargs


def plan_table(results: Mapping[str, Evaluation], columns: Mapping[str, str] = COLUMNS) -> str:
    """Markdown: {data set: `Evaluation`} -> a heading and its tables for each."""
    return "\n".join(
        f"## {name}\n\n{summary_table(result, columns)}\n{counterfactual_table(result)}"
        for name, result in results.items()
    )
