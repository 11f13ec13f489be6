"""Model cards: the README.md of a pipeline folder."""

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import as_json, write_file
from ..fingerprints import weights_digest
from .loading import class_named, is_hub_name, load_pipeline, read_index

# metrics of an evaluation that a card reports, in its table and in its YAML
HEADLINES = {
    "pixel_ap": "pixel AP",
    "pixel_auroc": "pixel AUROC",
    "hit_rate": "hit rate",
    "dice": "Dice",
    "image_auroc": "image AUROC",
}


# by the pipeline's class
TAGS = {
    "DiffPIRDeblurPipeline": ["deblurring", "image-restoration", "diffusion-prior"],
    None: ["anomaly-detection", "weakly-supervised", "counterfactual"],
}


CARD = """---
{metadata}
---

# {title}

{image}
Where is this chest X-ray abnormal? {method} Trained on image-level labels alone. Made with `cxr_diffusers`.

**Research use only.** Not a medical device; not for diagnosis, triage or any decision about a patient. It marks regions
that look unusual to the model, and misses many; the figures below hold for the data named there only.

## How to use

```python
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
pipeline(Image.open("chest.png")).anomaly_map[0].save("map.png")  # 16 bit, value / 65535
```

The output also has `image`, `counterfactual` ({counterfactual}) and `anomaly_score`, one number for each image.
Classes: {classes}. Defaults of the call: {settings}.

## Training

{training}

## Evaluation

{evaluation}
"""


DEBLUR_CARD = """---
{metadata}
---

# {title}

{image}
A diffusion model of radiographs, used as the prior for deblurring with a given kernel by DiffPIR (Zhu et al. 2023,
https://arxiv.org/abs/2305.08995). Made with `cxr_diffusers`.

**Research use only.** Not a medical device; not for diagnosis, triage or any decision about a patient. A prior restores
likely structures: fine structure in the output is not necessarily present in the patient.

## How to use

```python
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
kernel = [[1 / 9] * 3] * 3  # blur kernel in pixels of the image; sums to 1
pipeline(Image.open("chest.png"), kernel=kernel).restored[0].save("restored.png")
```

## Training

{training}

## Evaluation

{evaluation}
"""


def write_model_card(
    folder: Path | str,
    *,
    training: str,
    evaluation: Path | str | dict | None = None,
    evaluated_on: str = "validation images",
    name: str | None = None,
    license: str = "apache-2.0",
    datasets: Sequence[str] = (),
    image: str | None = None,
) -> None:
    """Write `README.md` into a pipeline folder.

    Args:
        folder: has a `model_index.json`.
        training: Markdown: the data, its licence, steps, seed.
        evaluation: a folder written by `evaluate` (for a plan: the folder that holds those of its data sets), or a
            summary as a dict. The rows of this model, identified by its weights, go into a table and into the YAML's
            `model-index`.
        evaluated_on: the name of the data of `evaluation`; a plan's data sets have names of their own.
        name: USER/NAME for the example in the card; None: the folder's name. (`publish` replaces it.)
        license: of the weights, by its identifier on the Hub.
        datasets: names of the training data, on the Hub if they are there.
        image: name of an image file in the folder.

    Raises:
        FileNotFoundError: no `model_index.json`, no summary.json, or no such image. ValueError: the evaluation has
            no row of this model, or several.
    """
    from .. import pipelines

    folder = Path(folder)
    index = read_index(folder)
    if image and not (folder / image).is_file():
        raise FileNotFoundError(f"expected the card's image in the folder, no file {folder / image}")
    home = folder.resolve()
    # a training run writes its model into a hidden folder before it is moved into place
    name = name or (home.parent if home.name.startswith(".") else home).name
    results, text = None, "Not evaluated yet."
    if evaluation is not None:
        results, text = evaluation_section(load_pipeline(folder), read_summaries(evaluation, evaluated_on))
    class_name = class_named(index)
    pipeline_class = getattr(pipelines, class_name, pipelines.cxr_anomaly.ContractMixin)
    counterfactual = getattr(pipeline_class, "has_counterfactual", True)
    metadata = ModelCardData(
        language="en",
        license=license,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["chest-x-ray", "radiology", *TAGS.get(class_name, TAGS[None]), "cxr_diffusers"],
        datasets=list(datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results or ())) or None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    card = (DEBLUR_CARD if class_name == "DiffPIRDeblurPipeline" else CARD).format(
        metadata=metadata.to_yaml(),
        title=name.split("/")[-1],
        method=textwrap.fill(getattr(pipeline_class, "summary", ""), 118),
        image=f"![input{', counterfactual' if counterfactual else ''}, anomaly map]({image})\n" if image else "",
        name=name,
        counterfactual="the chest as if healthy" if counterfactual else "the image: this method makes none",
        classes=", ".join((index.get("class_names") or {}).values()) or "not named",
        settings=", ".join(f"`{key}={value!r}`" for key, value in (index.get("settings") or {}).items())
        or "those of the original procedure",
        training=training.strip(),
        evaluation=text,
    )
    write_file(folder / "README.md", str(ModelCard(card)).encode())


def describe_training(recipe: Any, size: int, num_images: int) -> str:
    """The training data and settings of a run, in Markdown for its model card.

    Args:
        recipe: of any training program.
        size: side of its images, in pixels.
        num_images: of its data set.
    """
    config, hub_names = recipe.train, trained_on(recipe)
    public = {k: v for k, v in recipe.data.items() if v in hub_names or not is_local(k, v)}
    data = ", ".join(f"{key}={value}" for key, value in public.items())
    accumulated = getattr(config, "gradient_accumulation_steps", 1)
    batch = config.batch_size if accumulated == 1 else f"{accumulated} x {config.batch_size}"
    start, other = "", config.init_from
    if other:
        other = "another model" if is_local("", other) and not is_hub_name(other) else other
        start = f"Training started from the weights of {other}, whose training data are not named here.\n\n"
    return (
        f"{num_images} images ({data}), {size} x {size} pixels; up to {config.max_steps} steps of batch "
        f"{batch} per process, seed {config.seed}; averaged (EMA) weights.\n\n{start}"
        "Name the source and the licence of your data here before you publish."
    )


def is_local(key: str, value: Any) -> bool:
    """Whether an entry of a recipe's `data` section, or an entry inside it, names a file or folder of this machine."""
    if isinstance(value, dict):
        return any(is_local(k, v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return any(is_local("", v) for v in value)
    text = str(value)
    return key in ("root", "path", "csv") or any(mark in text for mark in "/\\~") or text.endswith(".csv")


def trained_on(recipe: Any) -> list[str]:
    """[name on the Hub] of the training data; [] if they are not from the Hub."""
    path = str(recipe.data.get("path", ""))
    return [path] if recipe.data["name"] == "hub" and not Path(path).exists() else []


def read_summaries(evaluation: Path | str | dict, evaluated_on: str) -> dict[str, dict]:
    """{name of the data: summary} of a folder of `evaluate`, of a plan's folder, or of a summary as a dict.

    Raises:
        FileNotFoundError: neither the folder nor a folder in it has a summary.json.
    """
    if isinstance(evaluation, dict):
        return {evaluated_on: evaluation}
    folder = Path(evaluation)
    if (folder / "summary.json").is_file():
        return {evaluated_on: json.loads((folder / "summary.json").read_text())}
    paths = sorted(folder.glob("*/summary.json"))
    if not paths:
        raise FileNotFoundError(f"expected a folder written by evaluate, got {folder} without a summary.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def evaluation_section(pipeline: Any, summaries: dict[str, dict]) -> tuple[list[EvalResult], str]:
    """The results of one model from evaluations that may contain other models as well.

    Args:
        pipeline: the model.
        summaries: {name of the data: `evaluate`'s summary}.

    Returns:
        (the `EvalResult`s of the card's `model-index`, Markdown).

    Raises:
        ValueError: a summary has no row of this model, or several.
    """
    rows = {data: row_of(pipeline, summary) for data, summary in summaries.items()}
    results = [result for data, row in rows.items() for result in eval_results(summaries[data], row, data)]
    return results, "\n\n".join(describe_evaluation(summaries[data], row, data) for data, row in rows.items())


def row_of(pipeline: Any, summary: dict) -> str:
    """The name of the method in `evaluate`'s summary with the class, weights and settings of `pipeline`.

    If there are several, the one that was called with the model's own settings.

    Raises:
        ValueError: there is none, or not exactly one.
    """
    methods = summary.get("settings", {}).get("methods", {})
    if not any(method.get("weights") for method in methods.values()):
        raise ValueError("the evaluation names no weights (an older version wrote it): run evaluate again")
    own = (type(pipeline).__name__, weights_digest(pipeline), as_json(pipeline.config.get("settings")))
    same = {
        name: method
        for name, method in methods.items()
        if (method["class"], method["weights"], method["config"].get("settings")) == own
    }
    if not same:
        raise ValueError(f"expected an evaluation of this model, got one of {', '.join(methods)} with other weights")
    exact = [name for name, method in same.items() if not method["call_kwargs"]]
    names = exact or list(same)
    if len(names) > 1:
        raise ValueError(f"expected one row of this model in the evaluation, got {len(names)}: {', '.join(names)}")
    return names[0]


def describe_evaluation(summary: dict, row: str, evaluated_on: str) -> str:
    """Markdown: the data, and the main figures of a model, other models and controls.

    Args:
        summary: `evaluate`'s.
        row: the name of the model's row.
    """
    from ..evaluation import summary_table
    from ..evaluation.controls import mean_map_of
    from ..evaluation.tables import and_healthy

    methods = summary["settings"]["methods"]
    others = [f"`{name}`" for name in methods if name != row]
    call = ", ".join(f"`{key}={value!r}`" for key, value in methods[row]["call_kwargs"].items())
    sentences = [
        f"On {evaluated_on}: {summary['n_images']} images of {summary['n_patients']} patients, "
        f"{summary['n_with_region']} of them with a known abnormal region{and_healthy(summary)}. "
        f"Brackets: 95 % bootstrap intervals over patients. This model is the row `{row}`",
        f", called with {call}. " if call else ". ",
        f"Other models: {', '.join(others)}. " if others else "",
        "The remaining rows are controls, made without knowledge of the disease.",
    ]
    left_out = [mean_map_of(name, methods) for name in methods if name != row]  # the mean maps of other models
    names = [row, *(name for name in summary["rows"] if name != row and not name.startswith(tuple(left_out)))]
    pairs = {f"{row} - {name}" for name in names}
    kept = {
        "rows": {name: summary["rows"][name] for name in names},
        "differences": {pair: values for pair, values in summary["differences"].items() if pair in pairs},
        "strata": {},
    }
    table = summary_table({**summary, **kept}, HEADLINES)
    return f"{''.join(sentences)}\n\n{table}".strip()


def eval_results(summary: dict, row: str, evaluated_on: str) -> list[EvalResult]:
    """The entries of the card's `model-index`: the main figures of the method `row`, without undefined ones."""
    values = {metric: (summary["rows"][row].get(metric) or {}).get("value") for metric in HEADLINES}
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="weakly supervised anomaly localisation",
            dataset_type=re.sub(r"\W+", "-", evaluated_on.lower()).strip("-"),
            dataset_name=evaluated_on,
            metric_type=metric,
            metric_name=HEADLINES[metric],
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
        if value is not None and value == value
    ]
