"""Train the class-conditional UNet of classifier-free guidance, and save it as a `CFGAnomalyPipeline`.

    accelerate launch training/train_cfg.py                                     (phantoms: minutes, any machine)
    accelerate launch training/train_cfg.py configs/chexpert_cfg_256.yaml data.root=/data/CheXpert-v1.0
    accelerate launch training/train_cfg.py RECIPE.yaml [section.key=value ...] [--push_to_hub] [--hub_model_id=ME/NAME]

To resume, run the same command again. Several GPUs or machines: change only what stands between `accelerate launch` and
the script, e.g. `accelerate launch --multi_gpu --num_processes 4 training/train_cfg.py ...`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from cxr_diffusers import CFGAnomalyPipeline, denoising_loss
from cxr_diffusers.pipelines.cxr_conditions import Conditions
from cxr_diffusers.training.augmentation import augment
from cxr_diffusers.training.datasets import diseased_rows, open_data, open_validation
from cxr_diffusers.training.loop import train
from cxr_diffusers.training.networks import initial_unet
from cxr_diffusers.training.recipe import Recipe, parse_command_line, section
from cxr_diffusers.training.run import seeded
from cxr_diffusers.training.script import finish, run_program, save_strip, train_command, write_card
from cxr_diffusers.training.tensors import TensorImages
from cxr_diffusers.training.validation_loss import ValidationLoss

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "phantom_cfg_32.yaml"


def main(arguments: Sequence[str]) -> None:
    recipe = parse_command_line(arguments, DEFAULT_RECIPE, Recipe)
    config = recipe.train
    dataset, class_names = open_data(recipe)
    views = recipe.conditions.get("views") or []
    with section("unet, images"):
        options = dict(num_channels=recipe.unet["in_channels"], views=views, **recipe.images)
        images = TensorImages(dataset, recipe.unet["sample_size"], **options)
    for i, view in enumerate(views):
        if not ((images.views == i) & (images.labels >= 0)).any():
            raise ValueError(f"conditions: expected labelled images of the views {views}, got none of {view!r}")
        for k, name in enumerate(class_names):
            if not config.init_from and not ((images.views == i) & (images.labels == k)).any():
                raise ValueError(f"conditions: expected images of each class in each view, got none of {name}, {view}")
    validation_rows = diseased_rows(recipe, dataset, unlabelled=True)
    conditions = Conditions(len(class_names), tuple(views))

    with seeded(config.seed):
        unet = initial_unet(recipe)
    with section("scheduler"):
        scheduler = DDIMScheduler(**recipe.scheduler)
    if unet.config.num_class_embeds != conditions.num_embeddings:
        raise ValueError(
            f"expected unet.num_class_embeds={conditions.num_embeddings}: {len(class_names)} classes {class_names}, "
            f"views {views} and the null label, got {unet.config.num_class_embeds}"
        )

    def pipeline(model):
        settings = recipe.pipeline or None
        return CFGAnomalyPipeline(
            model, scheduler, class_names, settings=settings, views=views or None, **recipe.images
        )

    def save(model, folder):
        pipeline(model).save_pretrained(folder)
        write_card(folder, recipe, images.size, len(dataset))

    def validate(model, step):
        detector = pipeline(model)
        detector.set_progress_bar_config(disable=True)
        return {"validation": save_strip(detector(validation_rows["image"][:], output_type="np"), config, step)}

    measure = None
    if config.validation_loss_images:
        unseen = open_validation(recipe)
        with section("validation, images"):
            unseen = TensorImages(unseen, images.size, **options)
        measure = ValidationLoss(unseen, conditions, class_names, scheduler, config.validation_loss_images)

    with section("pipeline, images"):
        pipeline(unet)  # reports errors of these sections before training
    loss_fn = loss_of(recipe, scheduler, conditions)
    output_dir = train(
        unet, loss_fn, images, config, save=save, validate=validate, measure=measure, identity=recipe.identity()
    )
    hints = [f"detect:  cxr-diffusers detect YOUR_IMAGES --model {output_dir} --out maps"]
    if recipe.data["name"] == "phantom":
        command = train_command("train_cfg", "chexpert_cfg_256")
        hints.append(f"CheXpert: {command} data.root=/data/CheXpert-v1.0")
    finish(output_dir, config, *hints, recipe=recipe)


def loss_of(recipe: Recipe, scheduler: DDIMScheduler, conditions: Conditions) -> Callable:
    """The training loss, a function (model, batch) -> scalar; images are augmented as the recipe says."""
    config = recipe.train
    ranges = {key: value for key, value in recipe.images.items() if key == "data_range"}

    def loss_fn(model, batch):
        with section("train.augment"):
            x = augment(batch["images"], **ranges, **config.augment) if config.augment else batch["images"]
        labels, null_labels = embedding_ids(conditions, batch["labels"], batch["views"])
        return denoising_loss(
            model,
            scheduler,
            x,
            labels,
            null_labels=null_labels,
            p_uncond=config.p_uncond,
            snr_gamma=config.snr_gamma,
            logit_normal=config.logit_normal,
            vlb_weight=config.vlb_weight,
        )

    return loss_fn


def embedding_ids(
    conditions: Conditions, labels: torch.Tensor, views: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) class ids and (B,) indices of views, -1 for unknown -> (B,) ids of embeddings, and of their null labels."""
    unknown = labels < 0 if not conditions.views else (labels < 0) | (views < 0)
    view = views.clamp(min=0)
    ids = torch.where(unknown, conditions.unlabelled, conditions.of_class(labels, view))
    return ids, torch.where(unknown, conditions.unlabelled, conditions.null(view))


if __name__ == "__main__":
    sys.exit(run_program(main))
