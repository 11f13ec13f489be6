"""Model cards: the README.md of a pipeline folder."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..files import write_file
from .loading import class_named, read_index

# the numbers of an evaluation that go into a card: its table and its YAML
HEADLINES = {
    "pixel_ap": "pixel AP",
    "pixel_auroc": "pixel AUROC",
    "hit_rate": "hit rate",
    "dice": "Dice",
    "image_auroc": "image AUROC",
}


# of a card, by the pipeline's class
TAGS = {
    "DiffPIRDeblurPipeline": ["deblurring", "image-restoration", "diffusion-prior"],
    None: ["anomaly-detection", "weakly-supervised", "counterfactual"],
}


CARD = """---
{metadata}
---

# {title}

{picture}
Where is this chest X-ray abnormal? {method} Trained on image-level labels alone. Made with `cxr_diffusers`.

**Research use only.** Not a medical device; not for diagnosis, triage or any decision about a patient. It marks what
looks unusual to it and misses much; what is known about how much holds for the data named below, and no other.

## How to use

```python
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
pipeline(Image.open("chest.png")).anomaly_map[0].save("map.png")  # 16 bit, value / 65535
```

The answer also has `image`, `counterfactual` (the chest as if healthy) and `anomaly_score`, one number for each image.
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

{picture}
A diffusion model of radiographs, the prior of a deblurring: it undoes a known blur by DiffPIR (Zhu et al. 2023,
https://arxiv.org/abs/2305.08995). Made with `cxr_diffusers`.

**Research use only.** Not a medical device; not for diagnosis, triage or any decision about a patient. What a prior
restores is what it thinks likely: fine structure in the answer need not be in the patient.

## How to use

```python
from diffusers import DiffusionPipeline
from PIL import Image

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
kernel = [[1 / 9] * 3] * 3  # what blurred the picture, in its pixels; sums to 1
pipeline(Image.open("chest.png"), kernel=kernel).restored[0].save("restored.png")
```

## Training

{training}

## Evaluation

{evaluation}
"""


# what a pipeline does, for the reader of its card
METHODS = {
    "CFGAnomalyPipeline": "A class-conditional diffusion model turns a radiograph into the same chest as if healthy,\n"
    "by classifier-free guidance; the anomaly map is what had to change.",
    "ClassifierGuidedPipeline": "A diffusion model turns a radiograph into the same chest as if healthy, along the\n"
    "gradient of a classifier; the anomaly map is what had to change.",
    "FixedPointGANPipeline": "A Fixed-Point GAN translates a radiograph to the same chest as if healthy in one\n"
    "pass; the anomaly map is what had to change.",
    "GradCAMPipeline": "The map is where an image classifier finds its evidence against healthy (Grad-CAM). There is\n"
    "no counterfactual in it: a comparison partner for methods that make one.",
    "PyramidCAMPipeline": "The map is where a classifier with a feature pyramid finds disease (after PYLON). There is\n"
    "no counterfactual in it: a comparison partner for methods that make one.",
}


def write_model_card(
    folder,
    *,
    training,
    evaluation=None,
    evaluated_on="validation images",
    name=None,
    license="apache-2.0",
    datasets=(),
    picture=None,
):
    """Write `README.md` into a pipeline folder.

    Args:
        folder: has a `model_index.json`.
        training: Markdown: the data, its licence, steps, seed.
        evaluation: a folder written by `evaluate`, or its summary as a dict: the main figures as a table, and for the
            YAML's `model-index`.
        evaluated_on: the name of the data of `evaluation`.
        name: what a reader will load, USER/NAME; None: the folder's name. (`publish` puts its own in.)
        license: of the weights, by its identifier on the Hub.
        datasets: names of the training data, on the Hub where they are there.
        picture: name of a picture in the folder.

    Raises:
        FileNotFoundError: no `model_index.json`, no summary.json, or no such picture.
    """
    folder = Path(folder)
    index = read_index(folder)
    if picture and not (folder / picture).is_file():
        raise FileNotFoundError(f"expected the card's picture in the folder, no file {folder / picture}")
    name = name or folder.resolve().name
    summary = evaluation
    if evaluation is not None and not isinstance(evaluation, dict):
        summary = json.loads((Path(evaluation) / "summary.json").read_text())
    results = eval_results(summary, evaluated_on) if summary else None
    kind = class_named(index)
    metadata = ModelCardData(
        language="en",
        license=license,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["chest-x-ray", "radiology", *TAGS.get(kind, TAGS[None]), "cxr_diffusers"],
        datasets=list(datasets) or None,
        metrics=[result.metric_type for result in results or ()] or None,
        model_name=name.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    text = (DEBLUR_CARD if kind == "DiffPIRDeblurPipeline" else CARD).format(
        metadata=metadata.to_yaml(),
        title=name.split("/")[-1],
        method=METHODS.get(kind, "A model of anomalies in chest X-rays."),
        picture=f"![input, counterfactual, anomaly map]({picture})\n" if picture else "",
        name=name,
        classes=", ".join((index.get("class_names") or {}).values()) or "not named",
        settings=", ".join(f"`{key}={value!r}`" for key, value in (index.get("settings") or {}).items())
        or "those of the original procedure",
        training=training.strip(),
        evaluation=describe_evaluation(summary, evaluated_on) if summary else "Not evaluated yet.",
    )
    write_file(folder / "README.md", str(ModelCard(text)).encode())


def describe_training(recipe, size, num_images):
    """What a run learns from, for the reader of its model card (Markdown).

    Args:
        recipe: a recipe of any kind.
        size: side of its pictures, in pixels.
        num_images: of its data set.
    """
    config, data = recipe.train, ", ".join(f"{k}={v}" for k, v in recipe.data.items() if k != "root")
    return (
        f"{num_images} images ({data}), {size} x {size} pixels; up to {config.max_steps} steps of batch "
        f"{config.batch_size} per process, seed {config.seed}; averaged (EMA) weights.\n\n"
        "Name the source and the licence of your data here before you publish."
    )


def trained_on(recipe):
    """The names on the Hub of what a run learns from: [] where that is no data set of the Hub."""
    path = str(recipe.data.get("path", ""))
    return [path] if recipe.data["name"] == "hub" and not Path(path).exists() else []


def describe_evaluation(summary, evaluated_on):
    """`evaluate`'s summary -> Markdown: on what, and the main figures of the model and of its controls."""
    from ..evaluation import summary_table

    return (
        f"On {evaluated_on}: {summary['n_images']} images of {summary['n_patients']} patients, "
        f"{summary['n_with_region']} of them with a known abnormal region, and {summary['n_healthy']} healthy images "
        "beside them. Brackets: 95 % bootstrap intervals over patients. The other rows are controls, which do "
        f"without the picture or without the model.\n\n{summary_table(summary, HEADLINES)}"
    ).strip()


def eval_results(summary, evaluated_on):
    """`evaluate`'s summary -> the entries of the card's `model-index`, of the main figures that are defined."""
    found = {metric: (summary["method"].get(metric) or {}).get("value") for metric in HEADLINES}
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
        for metric, value in found.items()
        if value is not None and value == value
    ]
