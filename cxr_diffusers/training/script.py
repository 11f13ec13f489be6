"""Shared by the programs in training/: errors as one line, validation images, the model card, the closing hints."""

import atexit
import gc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import save_png
from ..hub.model_card import describe_training, trained_on, write_model_card
from ..hub.publishing import publish
from ..processes import process_state
from ..visualization import validation_strip
from .datasets import open_validation
from .recipe import AnyRecipe, RunConfig

PACKAGE = Path(__file__).parents[1]
# training/: inside the package when installed, beside it in a checkout
PROGRAMS = PACKAGE / "training_programs" if (PACKAGE / "training_programs").is_dir() else PACKAGE.parent / "training"

atexit.register(gc.freeze)  # see `cxr_diffusers.cli`


def load_program(name: str) -> ModuleType:
    """The module of a program in training/, `train_cfg` for example; its `main(arguments)` trains."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"no program {name} in {PROGRAMS}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_command(program: str, recipe: str) -> str:
    """The command that trains a recipe of the package: from a checkout by the program, else by `cxr-diffusers`."""
    if PROGRAMS.parent == PACKAGE:
        return f"cxr-diffusers train {recipe}"
    return f"accelerate launch training/{program}.py configs/{recipe}.yaml"


def run_program(main: Callable, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Call `main(arguments)` and return an exit code: 0, 2 after an error that the user can correct, 130 after Ctrl-C.

    The error is printed as one line. Processes that are started together wait here for each other before each of them
    reads the data.

    Args:
        arguments: by default those of the command line.
        name: what error messages begin with; by default the file name of the program.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    name = Path(sys.argv[0]).name if name is None else name
    try:
        process_state()
        main(arguments)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError, torch.distributed.DistError) as error:
        advice = "; lower train.batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        tqdm.write(f"{name}: {' '.join(str(error).split())}{advice}", file=sys.stderr)  # clears the progress bar first
        return 2
    except KeyboardInterrupt:
        tqdm.write(f"{name}: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def validation_file(config: RunConfig, step: int) -> Path:
    """The image that a validation writes at this step."""
    return Path(config.output_dir) / "validation" / f"step-{step:07d}.png"


def save_strip(output: Any, config: RunConfig, step: int) -> Path:
    """Draw a pipeline's output for the validation images as a strip; returns the file."""
    path = validation_file(config, step)
    save_png(validation_strip(output.image, output.counterfactual, output.anomaly_map, title=f"step {step}"), path)
    return path


def write_card(folder: str | Path, recipe: AnyRecipe, size: int, num_images: int) -> None:
    """Write the model card of a model that `recipe` trained on `num_images` images of `size` pixels."""
    training, sources = describe_training(recipe, size, num_images), trained_on(recipe)
    write_model_card(folder, training=training, name=recipe.train.hub_model_id, datasets=sources)


def calibrate_on_validation(output_dir: Path, recipe: Any) -> None:
    """Calibrate a trained model on the healthy validation images that its recipe names, if it names any."""
    from ..inference.calibration import calibrate_trained

    if not recipe.validation:
        return
    try:
        for folder in calibrate_trained(output_dir, open_validation(recipe), recipe.data["name"]):
            print(f"calibrated: {folder}")
    except (ValueError, OSError) as error:  # the model itself is complete
        print(f"not calibrated: {error}; try cxr-diffusers calibrate {output_dir} --healthy DATA", file=sys.stderr)


def finish(output_dir: Path, config: RunConfig, *hints: str, recipe: Any = None) -> None:
    """Calibrate the model of `recipe`, publish it if `config` says so, and print where everything is.

    Only in the main process.
    """
    if not process_state().is_main_process:
        return
    if recipe is not None:
        calibrate_on_validation(output_dir, recipe)
    if config.push_to_hub:
        name, private = config.hub_model_id or output_dir.name, config.hub_private or None  # None: as the account says
        print("published at", publish(output_dir, name, private=private))
    print(f"model:   {output_dir}\nimage:   {sorted((output_dir / 'validation').glob('*.png'))[-1]}")
    print(*hints, sep="\n")
