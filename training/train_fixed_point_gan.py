"""Train a Fixed-Point GAN, the one-pass baseline, and save it as a `FixedPointGANPipeline`.

    accelerate launch training/train_fixed_point_gan.py                              (phantoms: minutes, any machine)
    accelerate launch training/train_fixed_point_gan.py configs/chexpert_fixed_point_gan_256.yaml data.root=/data/chest
    accelerate launch training/train_fixed_point_gan.py RECIPE.yaml [section.key=value ...] [--push_to_hub]

To resume, run the same command again. `train.init_from` may name a model; training starts from its generator and a new
discriminator, which is not part of a model. The method and our results: docs/fixed_point_gan.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_diffusers import FixedPointDiscriminator, FixedPointGANPipeline, FixedPointGenerator, train_adversarial
from cxr_diffusers.figures import loss_curves
from cxr_diffusers.files import save_png
from cxr_diffusers.training.datasets import diseased_rows, open_data
from cxr_diffusers.training.networks import start_from
from cxr_diffusers.training.recipe import AdversarialRecipe, parse_command_line, section
from cxr_diffusers.training.run import seeded
from cxr_diffusers.training.script import finish, run_program, save_strip, write_card
from cxr_diffusers.training.tensors import TensorImages

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "phantom_fixed_point_gan_32.yaml"


def main(arguments: Sequence[str]) -> None:
    recipe = parse_command_line(arguments, DEFAULT_RECIPE, AdversarialRecipe)
    config = recipe.train
    dataset, class_names = open_data(recipe)
    with seeded(config.seed):
        with section("generator, discriminator"):
            generator, discriminator = build_networks(recipe)
    if generator.config.num_classes != len(class_names):
        raise ValueError(
            f"expected generator.num_classes={len(class_names)}, the classes {class_names}, got "
            f"{generator.config.num_classes}"
        )
    if config.init_from:
        start_from(config.init_from, generator, "generator")
    with section("images"):
        images = TensorImages(dataset, generator.config.sample_size, **recipe.images)
    validation_rows = diseased_rows(recipe, dataset)

    def pipeline(model):
        return FixedPointGANPipeline(model, class_names, settings=recipe.pipeline or None, **recipe.images)

    def save(model, folder):
        pipeline(model).save_pretrained(folder)
        write_card(folder, recipe, images.size, len(dataset))

    def validate(model, step):
        path = save_strip(pipeline(model)(validation_rows["image"][:], output_type="np"), config, step)
        curves = path.parent.parent / "losses.png"
        save_png(loss_curves({"losses": curves.with_name("log.jsonl")}), curves)
        return {"validation": path, "losses": curves}

    with section("pipeline, images"):
        pipeline(generator)  # reports errors of these sections before training
    output_dir = train_adversarial(
        generator, discriminator, images, config, save=save, validate=validate, identity=recipe.identity()
    )
    hints = [
        f"losses:  {output_dir / 'losses.png'}",
        f"detect:  cxr-diffusers detect YOUR_IMAGES --model {output_dir} --out maps",
    ]
    finish(output_dir, config, *hints, recipe=recipe)


def build_networks(recipe: AdversarialRecipe) -> tuple[FixedPointGenerator, FixedPointDiscriminator]:
    """The recipe's generator and discriminator; size, channels and classes are given once, for the generator."""
    generator = FixedPointGenerator(**recipe.generator)
    shared = {key: generator.config[key] for key in ("sample_size", "in_channels", "num_classes")}
    return generator, FixedPointDiscriminator(**shared, **recipe.discriminator)


if __name__ == "__main__":
    sys.exit(run_program(main))
