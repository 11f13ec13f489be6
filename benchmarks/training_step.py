"""Seconds a training step takes, and the share of it that waits for data, in the loop that trains.

    python benchmarks/training_step.py                                        (minutes)
    python benchmarks/training_step.py --recipes phantom_cfg_32 --steps 50 train.batch_size=32

The recipes' models learn from phantoms of 256 pixels here, so that no data are needed. "in memory" is what small data
sets get (each image prepared once); "from files" decodes and prepares every image anew.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from machine import describe_machine, markdown

from cxr_diffusers import denoising_loss, load_phantom, load_recipe, train
from cxr_diffusers.training.augmentation import augment
from cxr_diffusers.training.tensors import TensorImages

CONFIGS = Path(__file__).parent.parent / "configs"
HEADER = ["recipe", "images", "parameters", "batch", "seconds a step", "images a second", "waiting for data"]
WARM_UP = 2  # steps that do not count


def main(arguments=None):
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(describe_machine("cuda" if torch.cuda.is_available() else "cpu") + "\n")
    rows = [
        [name, where, *measure(name, options, cache_bytes)]
        for name in options.recipes
        for where, cache_bytes in (("in memory", 2 << 30), ("from files", 0))
    ]
    print(f"\n{markdown(HEADER, rows)}\n\nmedian of {options.steps} steps")


class Timed(torch.utils.data.Dataset):
    """A data set that knows how long its items took to come."""

    def __init__(self, dataset):
        self.dataset, self.seconds = dataset, 0.0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        start = time.perf_counter()
        item = self.dataset[index]
        self.seconds += time.perf_counter() - start
        return item


def measure(name, options, cache_bytes):
    """A short run of `train` -> the cells of a row. A step is the time from one call of the loss to the next."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(CONFIGS / f"{name}.yaml", ["data.root=none", *options.overrides])
        config = recipe.train
        config.output_dir, config.max_steps = folder, WARM_UP + options.steps + 1
        config.gradient_accumulation_steps, config.dataloader_num_workers = 1, 0
        phantoms = load_phantom(4 * config.batch_size, size=256)
        images = Timed(TensorImages(phantoms, recipe.unet["sample_size"], **recipe.images, cache_bytes=cache_bytes))
        unet, scheduler = UNet2DModel(**recipe.unet), DDIMScheduler(**recipe.scheduler)
        starts, waited = [], []

        def loss_fn(model, batch):
            starts.append(time.perf_counter())
            waited.append(images.seconds)
            x = augment(batch["images"], **config.augment) if config.augment else batch["images"]
            return denoising_loss(model, scheduler, x, batch["labels"], logit_normal=config.logit_normal)

        train(unet, loss_fn, images, config, save=lambda model, folder: folder.mkdir())
    seconds = statistics.median(differences(starts)[WARM_UP:])
    share = sum(differences(waited)[WARM_UP:]) / sum(differences(starts)[WARM_UP:])
    size, batch = unet.num_parameters() / 1e6, config.batch_size
    return [f"{size:.1f} M", str(batch), f"{seconds:.3f}", f"{batch / seconds:.1f}", f"{share:.1%}"]


def differences(values):
    return [b - a for a, b in zip(values, values[1:], strict=False)]


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["cxr_cfg_64", "phantom_cfg_32"], help="names in configs/")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own choice")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for all recipes")
    return parser


if __name__ == "__main__":
    main()
