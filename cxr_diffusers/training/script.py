"""What the programs of training/ have in common, around the loop: rows to show, the card, the last words."""

from ..data import build_dataset
from ..hub.model_card import describe_training, trained_on, write_model_card
from ..hub.publishing import publish
from ..processes import process_state


def new_unet(**options):
    """An untrained UNet of a recipe's `unet:` section: a `SpaceToDepthUNet` where it has a `patch_size`."""
    from diffusers import UNet2DModel

    from ..models.space_to_depth_unet import SpaceToDepthUNet

    return (SpaceToDepthUNet if "patch_size" in options else UNet2DModel)(**options)


def diseased_rows(recipe, dataset, unlabelled=False):
    """The diseased images that are shown while `recipe` is trained on `dataset`: `train.validation_images` at most.

    Args:
        unlabelled: whether images of `dataset` may lack a label.

    Raises:
        ValueError: an image of `dataset` has no label, or none is diseased.
    """
    shown = build_dataset(**{**recipe.data, **recipe.validation})
    shown = shown.filter(lambda label: label > 0, input_columns="label")
    labels = dataset["label"][:]
    if (max(labels) < 1 if unlabelled else min(labels) < 0) or not len(shown):
        raise ValueError(f"expected a label for every image and diseased ones among them, got {recipe.data}")
    return shown.select(range(min(recipe.train.validation_images, len(shown))))


def write_card(folder, recipe, size, num_images):
    """The model card of what `recipe` made of `num_images` images of `size` pixels."""
    training, sources = describe_training(recipe, size, num_images), trained_on(recipe)
    write_model_card(folder, training=training, name=recipe.train.hub_model_id, datasets=sources)


def finish(output_dir, config, *hints):
    """The end of a training script, in the main process: publish if that was asked, and say what is where."""
    if not process_state().is_main_process:
        return
    if config.push_to_hub:
        print("published at", publish(output_dir, config.hub_model_id or output_dir.name, private=config.hub_private))
    print(f"model:   {output_dir}\npicture: {sorted((output_dir / 'validation').glob('*.png'))[-1]}")
    print(*hints, sep="\n")
