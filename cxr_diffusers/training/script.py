"""What the programs of training/ share around the loop: errors as one line, validation rows, the card, the hints."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..data import build_dataset
from ..hub.model_card import describe_training, trained_on, write_model_card
from ..hub.publishing import publish
from ..processes import process_state


def run_program(main):
    """Call `main` with the command line; exit code 2 and one line for an error that the user can mend, 130 for Ctrl-C.

    Processes that are started together meet here, before each of them reads the data.
    """
    name = Path(sys.argv[0]).name
    try:
        process_state()
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, torch.distributed.DistError) as error:
        advice = "; lower train.batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        tqdm.write(f"{name}: {' '.join(str(error).split())}{advice}", file=sys.stderr)  # not behind a progress bar
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write(f"{name}: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


@contextmanager
def section(name):
    """Raise what libraries raise inside, given the values of a recipe's section, as a ValueError that names it."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{name}: {reason}") from error


def new_unet(**options):
    """An untrained UNet of a recipe's `unet:` section: a `SpaceToDepthUNet` where it has a `patch_size`."""
    from diffusers import UNet2DModel

    from ..models.space_to_depth_unet import SpaceToDepthUNet

    with section("unet"):
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


def calibrate_on_validation(output_dir, recipe):
    """Calibrate a trained model on the healthy validation images that its recipe names, if it names any."""
    from ..inference.calibration import calibrate_trained

    if not recipe.validation:
        return
    try:
        dataset = build_dataset(**{**recipe.data, **recipe.validation})
        for folder in calibrate_trained(output_dir, dataset, recipe.data["name"]):
            print(f"calibrated: {folder}")
    except (ValueError, OSError) as error:  # the model itself is complete
        print(f"not calibrated: {error}; try cxr-diffusers calibrate {output_dir} --healthy DATA", file=sys.stderr)


def finish(output_dir, config, *hints, recipe=None):
    """The end of a training script, in the main process: calibrate the model of `recipe`, publish it if that was asked,
    and say what is where."""
    if not process_state().is_main_process:
        return
    if recipe is not None:
        calibrate_on_validation(output_dir, recipe)
    if config.push_to_hub:
        print("published at", publish(output_dir, config.hub_model_id or output_dir.name, private=config.hub_private))
    print(f"model:   {output_dir}\npicture: {sorted((output_dir / 'validation').glob('*.png'))[-1]}")
    print(*hints, sep="\n")
