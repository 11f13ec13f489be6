"""Train the lung segmenter, whose gate keeps anomaly maps inside the lungs.

    accelerate launch training/train_lung_segmenter.py configs/cxr_lung_segmenter_64.yaml data.root=ROOT

The data set has lung masks of two pieces each; images without a mask are left out. `train.augment` are keyword
arguments of `cxr_diffusers.training.lungs.augment_lungs`. To resume, run the same command again.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from cxr_diffusers import LungSegmenter, build_dataset
from cxr_diffusers.files import save_png, write_file
from cxr_diffusers.training.datasets import open_validation
from cxr_diffusers.training.loop import train
from cxr_diffusers.training.lungs import LungImages, augment_lungs, paint_opacities
from cxr_diffusers.training.recipe import SegmenterRecipe, parse_command_line, section
from cxr_diffusers.training.run import seeded
from cxr_diffusers.training.script import finish, run_program, validation_file
from cxr_diffusers.visualization import contact_sheet

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "cxr_lung_segmenter_64.yaml"
OVERSAMPLING = 2  # images are kept at this many times the network's size, so that zooming in finds detail


def main(arguments: Sequence[str]) -> None:
    recipe = parse_command_line(arguments, DEFAULT_RECIPE, SegmenterRecipe)
    if recipe.train.push_to_hub:
        raise ValueError("a segmenter is published with the pipeline that it belongs to: expected no train.push_to_hub")
    with seeded(recipe.train.seed):
        with section("segmenter"):
            model = LungSegmenter(**recipe.segmenter)
    if recipe.train.init_from:
        model.load_state_dict(LungSegmenter.from_pretrained(recipe.train.init_from).state_dict())
    size = model.config.sample_size
    with section("data, images"):
        dataset = build_dataset(**recipe.data)
        images = LungImages(dataset, OVERSAMPLING * size, **recipe.images)
    held_out = open_validation(recipe, dataset)
    with section("validation, images"):
        held_out = LungImages(held_out, OVERSAMPLING * size, **recipe.images)

    def loss_fn(model, batch):
        with section("train.augment"):
            x, masks = augment_lungs(batch["images"], batch["masks"], size, **(recipe.train.augment or {}))
        logits = model(x).float()
        overlap = dice(logits.sigmoid(), masks)
        return F.binary_cross_entropy_with_logits(logits, masks) + 1 - overlap.mean(), {"dice": overlap.mean()}

    def validate(model, step):
        path = validation_file(recipe.train, step)
        write_file(path.with_suffix(".json"), json.dumps(measure(model, held_out, size)).encode())
        x = held_out[: recipe.train.validation_images]["images"]
        fields = model.field(x.to(model.device)).cpu()
        pairs = zip((x[:, 0].numpy() + 1) / 2, fields.numpy(), strict=True)
        rows = [{"image": image, "maps": {"lung gate": gate}} for image, gate in pairs]
        save_png(contact_sheet(rows, ["lung gate"], vmax=1.0, title=f"step {step}", opacity=0.5), path)
        return {"validation": path}

    def save(model, folder):
        model.save_pretrained(folder)

    output_dir = train(model, loss_fn, images, recipe.train, save=save, validate=validate, identity=recipe.identity())
    finish(output_dir, recipe.train, f"gate:    LungSegmenter.from_pretrained({str(output_dir)!r}).field(images)")


def dice(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(B, 2, H, W) masks in [0, 1] and true masks -> (B,) Dice coefficients of each image, both lungs together."""
    common, total = (masks * truth).flatten(1).sum(dim=1), (masks + truth).flatten(1).sum(dim=1)
    return (2 * common + 1) / (total + 1)


@torch.no_grad()
def measure(model: LungSegmenter, dataset: LungImages, size: int) -> dict[str, float]:
    """{name: mean Dice over images} of a model in eval mode: unchanged images, and images with painted opacities."""
    with seeded(0):
        images, masks = augment_lungs(dataset.images, dataset.masks, size)  # only resized
        painted = paint_opacities(images, masks, 1.0)
    values = {}
    for name, x in {"dice": images, "dice with painted opacities": painted}.items():
        predicted = [(model(part.to(model.device)) > 0).float().cpu() for part in x.split(64)]
        values[name] = float(dice(torch.cat(predicted), masks).mean())
    return values


if __name__ == "__main__":
    sys.exit(run_program(main))
