"""Train a UNet without classes, the prior for deblurring, on the same loop as `train_cfg.py`.

    accelerate launch training/train_unconditional.py                            (phantoms: minutes, any machine)
    accelerate launch training/train_unconditional.py RECIPE.yaml [section.key=value ...]

It is saved as diffusers' own `DDIMPipeline`. To resume, run the same command again.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from cxr_diffusers import build_dataset, denoising_loss
from cxr_diffusers.data import TensorImages, augment
from cxr_diffusers.hub import load_unet
from cxr_diffusers.recipe import parse_command_line
from cxr_diffusers.training_loop import seeded, train
from cxr_diffusers.visualization import contact_sheet, save_png

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "phantom_unconditional_32.yaml"


def main(arguments):
    recipe = parse_command_line(arguments, DEFAULT_RECIPE)
    config = recipe.train
    size, channels = recipe.unet["sample_size"], recipe.unet["in_channels"]
    images = TensorImages(build_dataset(**recipe.data), size, num_channels=channels, **recipe.images)
    with seeded(config.seed):
        unet = load_unet(config.init_from) if config.init_from else UNet2DModel(**recipe.unet)
    scheduler = DDIMScheduler(**recipe.scheduler)
    if unet.config.num_class_embeds is not None:
        raise ValueError(f"expected no unet.num_class_embeds, got {unet.config.num_class_embeds}: use train_cfg.py")

    def loss_fn(model, batch):
        x = augment(batch["images"], **config.augment) if config.augment else batch["images"]
        return denoising_loss(
            model,
            scheduler,
            x,
            snr_gamma=config.snr_gamma,
            logit_normal=config.logit_normal,
            vlb_weight=config.vlb_weight,
        )

    def save(model, folder):
        DDIMPipeline(model, scheduler).save_pretrained(folder)

    def validate(model, step):
        """Samples: what the prior believes a chest looks like."""
        path = Path(config.output_dir) / "validation" / f"step-{step:07d}.png"
        rows = [{"image": x, "maps": {}} for x in sample(model, scheduler, config.validation_images)]
        save_png(contact_sheet(rows, [], title=f"samples at step {step}"), path)
        return {"samples": path}

    if config.push_to_hub:
        raise ValueError("a prior is diffusers' own DDIMPipeline: open the run with it and use its push_to_hub")
    output_dir = train(unet, loss_fn, images, config, save=save, validate=validate, identity=recipe.identity())
    if PartialState().is_main_process:
        print(f"model:   {output_dir}\npicture: {sorted((output_dir / 'validation').glob('*.png'))[-1]}")


@torch.no_grad()
def sample(unet, scheduler, count, num_inference_steps=50):
    """(count, H, W, C) in [0, 1], drawn by DDIM from seed 0. (`DDIMPipeline` itself cannot run a learned variance.)"""
    size, channels = unet.config.sample_size, unet.config.in_channels
    x = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0)).to(unet.device)
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample[:, :channels], t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


if __name__ == "__main__":
    main(sys.argv[1:])
