"""Finished models: the one that is shipped, opening them, their cards, and publishing them."""

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, hf_hub_download

from .files import write_file

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


CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT = "cxr_cfg_64"

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
}


def default_checkpoint(name=DEFAULT):
    """The folder of a shipped model: `CFGAnomalyPipeline.from_pretrained(default_checkpoint())`.

    Those other than the default one are opened with `load_pipeline(NAME)`: they may share components with it.

    Raises:
        ValueError: no such model is shipped; names those that are.
    """
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
    if name not in shipped:
        raise ValueError(f"expected one of the shipped models {', '.join(shipped)}, got {name!r}")
    return str(CHECKPOINTS / name)


def shared_components(folder, index):
    """{name: component} of what a shipped model's index names and its folder does not hold: the default model's.

    A classifier guides the default model's UNet, which is shipped once.
    """
    if folder.parent != CHECKPOINTS:
        return {}
    # a component is [library, class]; `data_range` is a list, too
    pairs = {name for name, value in index.items() if isinstance(value, list) and value and isinstance(value[0], str)}
    missing = [name for name in sorted(pairs - {"_class_name"}) if not (folder / name).is_dir()]
    return {name: getattr(load_pipeline(CHECKPOINTS / DEFAULT), name) for name in missing}


def load_unet(folder, unconditional=False):
    """The UNet of a pipeline folder, a Hub name or a shipped model, to train on from its weights.

    With `unconditional`, a class-conditional UNet is answered as its unconditional equal: the last class embedding, the
    null label, is a constant vector beside that of the time, so it goes into a bias there.
    """
    from diffusers import UNet2DModel

    from .models.class_matrix_unet import ClassMatrixUNet

    folder = shipped_folder(folder) or folder
    found = UNet2DModel.load_config(folder, subfolder="unet")["_class_name"]
    kind = ClassMatrixUNet if found == ClassMatrixUNet.__name__ else UNet2DModel
    unet = kind.from_pretrained(folder, subfolder="unet")
    if not unconditional or unet.config.num_class_embeds is None:
        return unet
    config = {key: value for key, value in unet.config.items() if key != "num_class_embeds" and key[0] != "_"}
    plain = UNet2DModel(**config)
    weights = unet.state_dict()
    null = weights.pop("class_embedding.weight")[-1]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + null
    plain.load_state_dict(weights)
    return plain


def is_hub_name(name):
    """Whether this can only be USER/NAME on the Hub: it is formed so, and nothing here is called so."""
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


def shipped_folder(name):
    """The folder of a shipped model, "default" for the default one; None where that is no name of one."""
    folder = CHECKPOINTS / (DEFAULT if name == "default" else name)
    return folder if (folder / "model_index.json").is_file() and not Path(name).exists() else None


def load_pipeline(name, trust_remote_code=False):
    """Open a model by the class that it names, whichever of ours that is.

    Args:
        name: a pipeline folder, USER/NAME on the Hub, or the name of a shipped model ("default" for the default one).
        trust_remote_code: run the code that it brings along, where its class is none of ours.

    Raises:
        FileNotFoundError: no such folder, or nothing was saved there. ValueError: none of our classes.
    """
    from diffusers import DiffusionPipeline

    from . import pipelines

    name = shipped_folder(name) or name
    index = Path(name) / "model_index.json"
    if not index.is_file():
        if not is_hub_name(name):
            raise FileNotFoundError(f"expected a folder with a model_index.json or a Hub name USER/NAME, got {name}")
        index = Path(hf_hub_download(str(name), "model_index.json"))
    content = json.loads(index.read_text())
    found = class_named(content)
    if found in pipelines.__all__:
        return getattr(pipelines, found).from_pretrained(name, **shared_components(Path(name), content))
    if trust_remote_code:
        return DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    known = [known for known in pipelines.__all__ if known.endswith("Pipeline")]
    raise ValueError(f"expected a {' or '.join(known)} in {name}, got a {found}, whose code has to be trusted first")


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
    from .evaluation import summary_table

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


def publish(folder, repo_id, *, private=None, token=None, create_pr=False):
    """Upload a finished pipeline folder (a training run's, too) to the Hub.

    Only the model is uploaded: the index, the components, code, card and the pictures it shows. A run's checkpoints,
    logs and validation pictures stay at home. The name in the card's example becomes `repo_id`.

    Args:
        repo_id: USER/NAME, or NAME for your own; made if there is none.
        private: of a new repository; None: as your account has it.

    Returns:
        the address of the commit.

    Raises:
        FileNotFoundError: `folder` has no `model_index.json` (nothing was saved there), or no card. ValueError: it is
            the shipped model's, which has no code beside it, or an export.
    """
    from . import pipelines
    from .pipelines.cxr_portable import named

    folder = Path(folder)
    index = read_index(folder)
    if index["_class_name"] in pipelines.__all__:
        raise ValueError(
            f"expected a folder with its code beside it, got {folder}: open it and use pipeline.push_to_hub"
        )
    if any(isinstance(part, list) and part[-1] == "ExportedNet" for part in index.values()):
        # diffusers fetches no *.onnx, and of OpenVINO's two files one: what is there could not be opened
        raise ValueError(f"{folder} is an export, which does not open from the Hub: publish the model it was made from")
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"no README.md in {folder}: a model goes out with its card, see write_model_card")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = (folder / "README.md").read_text()
    if named(card, repo_id) != card:
        write_file(folder / "README.md", named(card, repo_id).encode())
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=finished_files(folder, index),
        commit_message=f"Upload {class_named(index)}",
        create_pr=create_pr,
    ).commit_url


def class_named(index):
    """The name of the pipeline class in a `model_index.json`, with or without its file."""
    found = index["_class_name"]
    return found[-1] if isinstance(found, list) else found


def read_index(folder):
    """`model_index.json` of a pipeline folder; FileNotFoundError where there is none."""
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a pipeline folder with a model_index.json, got {folder}")
    return json.loads(path.read_text())


def finished_files(folder, index):
    """The files of a pipeline folder that belong to the model, as paths below it; whatever else lies there stays.

    They are the index, the card and the pictures it shows, the licence, the scores of healthy images, the code that the
    index names with the siblings it imports, and the components.
    """
    from diffusers.utils.dynamic_modules_utils import get_relative_imports

    beside = [folder / name for name in ("model_index.json", "conversion.json", "README.md", "healthy_scores.json")]
    beside += folder.glob("LICENSE*")
    card = (folder / "README.md").read_text()
    beside += [path for path in folder.glob("*.png") if f"({path.name})" in card]
    if isinstance(index["_class_name"], list):
        code = folder / f"{index['_class_name'][0]}.py"
        beside += [code, *(folder / f"{name}.py" for name in get_relative_imports(code))]
    beside = [path for path in beside if path.is_file()]
    components = [folder / name for name, value in index.items() if isinstance(value, list)]
    inside = [path for component in components if component.is_dir() for path in component.rglob("*") if path.is_file()]
    shown = [path.relative_to(folder) for path in beside + inside if path.suffix != ".tmp"]
    return sorted(path.as_posix() for path in shown if not any(part.startswith(".") for part in path.parts))
