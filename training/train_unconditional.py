"""Train a UNet without classes, the prior for deblurring, on the same loop as `train_cfg.py`.

    accelerate launch training/train_unconditional.py                            (phantoms: minutes, any machine)
    accelerate launch training/train_unconditional.py RECIPE.yaml [section.key=value ...]

It is saved as a `DiffPIRDeblurPipeline`. To resume, run the same command again. `train.init_from` may name a
class-conditional model: training starts from its prediction under the null label.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel

from cxr_diffusers import DiffPIRDeblurPipeline, build_dataset, denoising_loss
from cxr_diffusers.files import save_png
from cxr_diffusers.training.augmentation import augment
from cxr_diffusers.training.loop import train
from cxr_diffusers.training.networks import initial_unet
from cxr_diffusers.training.recipe import UnconditionalRecipe, parse_command_line, section
from cxr_diffusers.training.run import seeded
from cxr_diffusers.training.script import finish, run_program, validation_file, write_card
from cxr_diffusers.training.tensors import TensorImages
from cxr_diffusers.visualization import contact_sheet

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "phantom_unconditional_32.yaml"


def main(arguments: Sequence[str]) -> None:
    recipe = parse_command_line(arguments, DEFAULT_RECIPE, UnconditionalRecipe)
    config = recipe.train
    with section("unet"):
        size, channels = recipe.unet["sample_size"], recipe.unet["in_channels"]
    with section("data, images"):
        images = TensorImages(build_dataset(**recipe.data), size, num_channels=channels, **recipe.images)
    with seeded(config.seed):
        unet = initial_unet(recipe, unconditional=True)
    with section("scheduler"):
        scheduler = DDIMScheduler(**recipe.scheduler)
    if unet.config.num_class_embeds is not None:
        raise ValueError(f"expected no unet.num_class_embeds, got {unet.config.num_class_embeds}: use train_cfg.py")

    prepared = {key: recipe.images[key] for key in ("scaling", "data_range") if key in recipe.images}
    ranges = {key: value for key, value in prepared.items() if key == "data_range"}

    def pipeline(model):
        return DiffPIRDeblurPipeline(model, scheduler, **prepared)

    def loss_fn(model, batch):
        with section("train.augment"):
            x = augment(batch["images"], **ranges, **config.augment) if config.augment else batch["images"]
        return denoising_loss(
            model,
            scheduler,
            x,
            snr_gamma=config.snr_gamma,
            logit_normal=config.logit_normal,
            vlb_weight=config.vlb_weight,
        )

    def save(model, folder):
        pipeline(model).save_pretrained(folder)
        write_card(folder, recipe, size, len(images))

    def validate(model, step):
        """Write samples of the prior."""
        path = validation_file(config, step)
        rows = [{"image": x, "maps": {}} for x in sample(model, scheduler, config.validation_images, **ranges)]
        save_png(contact_sheet(rows, [], title=f"samples at step {step}"), path)
        return {"samples": path}

    with section("pipeline, images"):
        pipeline(unet)  # reports errors of these sections before training
    output_dir = train(unet, loss_fn, images, config, save=save, validate=validate, identity=recipe.identity())
    hint = f"deblur:  cxr-diffusers deblur IMAGES OUT --model {output_dir} --kernel gaussian:sigma=1.5"
    finish(output_dir, config, hint)


@torch.no_grad()
def sample(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    count: int,
    num_inference_steps: int = 50,
    data_range: Sequence[float] = (-1.0, 1.0),
) -> np.ndarray:
    """(count, H, W, C) in [0, 1], drawn by DDIM from seed 0."""
    size, channels = unet.config.sample_size, unet.config.in_channels
    x = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0)).to(unet.device)
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample[:, :channels], t, x).prev_sample
    low, high = data_range
    return ((x - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


if __name__ == "__main__":
    sys.exit(run_program(main))
