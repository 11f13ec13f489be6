"""cxr-diffusers train: a model trained from a recipe."""

import argparse
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

from .options import PROCESSES, add_command

SEVERAL_GPUS = PROCESSES.format(command="train")
TRAIN = f"""\
RECIPE is a YAML file, or the name of a recipe that comes with the package (--list). key=value replaces a value of the
recipe; the recipe decides which program trains. To resume, run the same command again.

examples:
  cxr-diffusers train phantom_cfg_32
  cxr-diffusers train chexpert_cfg_256 data.root=/data/chexpert-256 train.batch_size=8
  cxr-diffusers train mine.yaml train.learning_rate=1e-3 --push_to_hub --hub_model_id USER/NAME

{SEVERAL_GPUS}"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    train = add_command(commands, "train", run, "a model trained from a recipe", TRAIN)
    train.add_argument("--list", action="store_true", help="list the recipes that come with the package")
    train.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file, or name of a recipe")
    text = "values of the recipe, as section.key=value; --name VALUE is short for train.name=VALUE"
    train.add_argument("values", metavar="key=value", nargs=argparse.REMAINDER, help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..config import CONFIGS

    if options.list:
        print("\n".join(describe(path) for path in sorted(CONFIGS.glob("*.yaml"))))
        print(f"\nto train one: cxr-diffusers train NAME [key=value ...]\n{SEVERAL_GPUS}", end="")
        return 0
    if not options.recipe:
        raise ValueError("expected a recipe; cxr-diffusers train --list shows those that come with the package")

    from ..training.script import run_program

    return run_program(train, [options.recipe, *options.values], "cxr-diffusers train")


def train(arguments: list[str]) -> None:
    """Run the program in training/ that the recipe is for."""
    import torch

    from ..processes import process_state
    from ..training.recipe import load_recipe, parse_overrides, program_of
    from ..training.script import load_program

    path, *values = arguments
    program = program_of(vars(load_recipe(path, parse_overrides(values))))
    state = process_state()
    if state.is_main_process:
        print(f"program: {program}")
        gpus = torch.cuda.device_count()
        if gpus > state.num_processes:
            print(f"GPUs on this machine: {gpus}, used: {state.num_processes}; {SEVERAL_GPUS}", end="")
    load_program(program).main(arguments)


def describe(path: Path) -> str:
    """A recipe's name, its program and the first sentence of its comment, over several lines."""
    from ..config import read_sections
    from ..training.recipe import Recipe, program_of

    comment = itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines())
    text = " ".join(line.removeprefix("# ") for line in comment if not line.startswith("#   "))
    text = re.sub(r"(?:configs/)?(\w+)\.yaml", r"\1", text)  # other recipes by name, as this command takes them
    sentence = re.split(r"(?<!\bal)\. ", text)[0].rstrip(".") + "."
    heading = f"{path.stem}  ({program_of(read_sections(path, Recipe))})"
    return f"{heading}\n{textwrap.fill(sentence, 110, initial_indent='    ', subsequent_indent='    ')}"
