"""Train a classifier: of noisy images, to guide a trained UNet, or of clean images.

    accelerate launch training/train_classifier.py                              (phantoms: minutes, after train_cfg.py)
    accelerate launch training/train_classifier.py configs/chexpert_classifier_256.yaml data.root=/data/CheXpert-v1.0
    accelerate launch training/train_classifier.py configs/cxr_grad_cam_128.yaml data.root=/data/CheXpert-v1.0-small
    accelerate launch training/train_classifier.py configs/cxr_pyramid_128.yaml data.root=/data/CheXpert-v1.0-small

A recipe with a `diffusion` section ends in a `ClassifierGuidedPipeline` around its UNet, one whose classifier has a
`model_type` of transformers in a `GradCAMPipeline`, one with `architecture: pyramid` in a `PyramidCAMPipeline`. To
resume, run the same command again. `train.init_from` may name a model; training starts from its classifier.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from sklearn.metrics import roc_auc_score

from cxr_diffusers import (
    ClassifierGuidedPipeline,
    GradCAMPipeline,
    NoisyClassifier,
    PyramidCAMPipeline,
    PyramidClassifier,
)
from cxr_diffusers.figures import line_figure
from cxr_diffusers.files import save_png, write_file
from cxr_diffusers.hub.loading import load_pipeline
from cxr_diffusers.training.augmentation import augment
from cxr_diffusers.training.datasets import open_data, open_validation
from cxr_diffusers.training.loop import train
from cxr_diffusers.training.losses import noisy_classification_loss
from cxr_diffusers.training.networks import start_from
from cxr_diffusers.training.recipe import ClassifierRecipe, parse_command_line, section
from cxr_diffusers.training.run import seeded
from cxr_diffusers.training.script import finish, run_program, train_command, validation_file, write_card
from cxr_diffusers.training.tensors import TensorImages

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "phantom_classifier_32.yaml"


def main(arguments: Sequence[str]) -> None:
    recipe = parse_command_line(arguments, DEFAULT_RECIPE, ClassifierRecipe)
    dataset, class_names = open_data(recipe)
    held_out = open_validation(recipe, dataset)
    if min(dataset["label"][:]) < 0 or len(set(held_out["label"][:])) < 2:
        raise ValueError(f"expected a label for every image and more than one class to tell apart, got {recipe.data}")
    with seeded(recipe.train.seed):
        with section("classifier"):
            task = task_of(recipe)(recipe, class_names, dataset["label"][:])
    if recipe.train.init_from:
        start_from(recipe.train.init_from, task.model, "classifier")
    options = {"num_channels": getattr(task.model.config, "in_channels", 1), **task.preparation}
    images, held_out = (TensorImages(rows, task.size, **options) for rows in (dataset, held_out))
    with section("pipeline, images"):
        task.pipeline(task.model)  # reports errors of these sections before training

    def loss_fn(model, batch):
        x = batch["images"]
        if recipe.train.augment:
            with section("train.augment"):
                x = augment(x, data_range=task.preparation["data_range"], **recipe.train.augment)
        return task.loss(model, x, batch["labels"])

    def save(model, folder):
        task.pipeline(model).save_pretrained(folder)
        write_card(folder, recipe, task.size, len(dataset))

    def validate(model, step):
        path = validation_file(recipe.train, step)
        levels, values = measure(task, model, held_out)
        write_file(path.with_suffix(".json"), json.dumps({"noise_level": levels, **values}).encode())
        title = f"step {step}: {len(held_out)} validation images"
        save_png(line_figure(levels, values, "noise level (timestep)", title=title), path)
        return {"validation": path}

    output_dir = train(task.model, loss_fn, images, recipe.train, save=save, validate=validate, identity=task.identity)
    hint = f"detect:  cxr-diffusers detect YOUR_IMAGES --model {output_dir} --out maps"
    finish(output_dir, recipe.train, hint, recipe=recipe)


def task_of(recipe: ClassifierRecipe) -> "type[NoisyImageTask | ImageTask]":
    """The class below that builds and trains the classifier of a recipe; ValueError for an unknown architecture."""
    architecture = recipe.classifier.get("architecture")
    if architecture not in (None, "pyramid"):
        raise ValueError(f"expected `classifier.architecture` pyramid, or none, got {architecture!r}")
    if architecture:
        return PyramidImageTask
    return ImageTask if "model_type" in recipe.classifier else NoisyImageTask


class NoisyImageTask:
    """p(label | x_t, t), with the data range, size and noise schedule of the UNet to be guided."""

    def __init__(self, recipe: ClassifierRecipe, class_names: list[str], labels: Sequence[int]) -> None:
        if not recipe.diffusion.get("model"):
            raise ValueError("give diffusion.model, the pipeline to be guided, or the classifier's model_type")
        for name in ("loss", "images"):  # images are prepared as for the UNet
            if getattr(recipe, name):
                raise ValueError(f"expected no `{name}` for a classifier of noisy images, got {getattr(recipe, name)}")
        try:
            guided = load_pipeline(recipe.diffusion["model"])
        except FileNotFoundError as error:
            raise ValueError(
                f"diffusion.model: {error}; train one: {train_command('train_cfg', 'phantom_cfg_32')}"
            ) from None
        self.unet, self.scheduler = guided.unet.eval(), guided.scheduler
        self.size, self.class_names, self.settings = guided.unet.config.sample_size, class_names, recipe.pipeline
        self.preparation = {name: guided.config[name] for name in ("scaling", "aspect", "data_range")}
        self.labels_of_unet = {"has_null_label": guided.config.get("has_null_label", True)}
        self.labels_of_unet["views"] = guided.config.get("views")
        self.model = NoisyClassifier(
            sample_size=self.size,
            in_channels=guided.unet.config.in_channels,
            num_classes=len(class_names),
            **recipe.classifier,
        )
        schedule = {name: self.scheduler.config[name] for name in ("num_train_timesteps", "beta_schedule")}
        self.identity = {**recipe.identity(), "preparation": self.preparation, "schedule": schedule}
        self.levels = list(range(0, self.scheduler.config.num_train_timesteps, 200))

    def loss(self, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Any:
        return noisy_classification_loss(model, self.scheduler, images, labels)

    def logits(self, model: torch.nn.Module, images: torch.Tensor, level: int) -> torch.Tensor:
        timesteps = torch.full((len(images),), level, device=images.device)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(level)).to(images.device)
        return model(self.scheduler.add_noise(images, noise, timesteps), timesteps)

    def pipeline(self, model: torch.nn.Module) -> DiffusionPipeline:
        return ClassifierGuidedPipeline(
            self.unet,
            model,
            self.scheduler,
            class_names=self.class_names,
            settings=self.settings or None,
            **self.labels_of_unet,
            **self.preparation,
        )


class ImageTask:
    """p(label | x), a classifier of transformers, created from its configuration and trained from scratch."""

    levels = [0]

    def __init__(self, recipe: ClassifierRecipe, class_names: list[str], labels: Sequence[int]) -> None:
        options = dict(recipe.images)
        self.size = options.pop("size", None)
        if not self.size or recipe.diffusion:
            raise ValueError(f"expected images.size and no diffusion section, got {recipe.images}, {recipe.diffusion}")
        self.class_names, self.settings, self.options = class_names, recipe.pipeline, options
        self.preparation = {**options, "data_range": (-1.0, 1.0)}
        self.identity = recipe.identity()
        self.label_smoothing, self.weights = recipe.loss.get("label_smoothing", 0.0), None
        if recipe.loss.get("balanced"):
            counts = torch.bincount(torch.tensor(labels), minlength=len(class_names))
            self.weights = len(labels) / (len(class_names) * counts.clamp(min=1))
        self.model = self.build(recipe.classifier)

    def build(self, classifier: dict) -> torch.nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        names = dict(enumerate(self.class_names))
        default = AutoConfig.for_model(classifier["model_type"])  # it takes any key
        if unknown := sorted(key for key in classifier if not hasattr(default, key)):
            raise ValueError(f"expected keys of a {type(default).__name__}, got {unknown}")
        config = AutoConfig.for_model(**{"num_channels": 1, **classifier}, id2label=names)
        config.label2id = {name: i for i, name in names.items()}
        return AutoModelForImageClassification.from_config(config)

    def loss(self, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.logits(model, images, level=0).float()
        weights = None if self.weights is None else self.weights.to(logits.device)
        loss = F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def logits(self, model: torch.nn.Module, images: torch.Tensor, level: int) -> torch.Tensor:
        return model(pixel_values=images).logits

    def pipeline(self, model: torch.nn.Module) -> DiffusionPipeline:
        return GradCAMPipeline(model, sample_size=self.size, settings=self.settings or None, **self.options)


class PyramidImageTask(ImageTask):
    """p(label | x) pooled from the maps of a `PyramidClassifier`."""

    def build(self, classifier: dict) -> torch.nn.Module:
        options = {name: value for name, value in classifier.items() if name != "architecture"}
        return PyramidClassifier(sample_size=self.size, num_classes=len(self.class_names), **options)

    def logits(self, model: torch.nn.Module, images: torch.Tensor, level: int) -> torch.Tensor:
        return model(images).logits

    def pipeline(self, model: torch.nn.Module) -> DiffusionPipeline:
        return PyramidCAMPipeline(model, self.class_names, settings=self.settings or None, **self.options)


@torch.no_grad()
def measure(
    task: "NoisyImageTask | ImageTask", model: torch.nn.Module, dataset: TensorImages, batch_size: int = 64
) -> tuple[list[int], dict[str, list[float]]]:
    """(noise levels, {"accuracy": [...], "AUROC healthy / not": [...]}), per level, of a model in eval mode."""
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size)
    labels = dataset.labels.numpy()
    values = {"accuracy": [], "AUROC healthy / not": []}
    for level in task.levels:
        logits = torch.cat([task.logits(model, batch["images"].to(device), level) for batch in loader]).float().cpu()
        values["accuracy"].append(float((logits.argmax(dim=1).numpy() == labels).mean()))
        odds = logits[:, 1:].logsumexp(dim=1) - logits[:, 0]
        values["AUROC healthy / not"].append(float(roc_auc_score(labels > 0, odds.numpy())))
    return task.levels, values


if __name__ == "__main__":
    sys.exit(run_program(main))
