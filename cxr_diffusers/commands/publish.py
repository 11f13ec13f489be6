"""cxr-diffusers publish: a trained model to the Hub."""

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, keyword_options

PUBLISH = """\
examples:
  cxr-diffusers publish runs/chexpert_cfg_256 me/chexpert-cfg
  cxr-diffusers publish model me/model --training "Trained on ..., licence ..., 50,000 steps, seed 0." \\
      --evaluation report
"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    publish = add_command(commands, "publish", run, "a trained model, with its code and card, to the Hub", PUBLISH)
    publish.add_argument("folder", type=Path, help="a run or pipeline folder")
    publish.add_argument("name", help="USER/NAME")
    publish.add_argument("--private", action="store_true", default=None)
    card = publish.add_argument_group("to write a new card")
    card.add_argument("--training", help="Markdown: the data, its licence, how the model was trained")
    card.add_argument("--evaluation", type=Path, help="a folder written by `evaluate`, or a plan's")
    text = "name of its images (default: validation images; a plan names them itself)"
    card.add_argument("--evaluated-on", default=argparse.SUPPRESS, help=text)
    card.add_argument("--license", default=argparse.SUPPRESS, help="of the weights (default: apache-2.0)")
    card.add_argument("--image", help="name of a PNG in the folder, shown in the card")


def run(options: argparse.Namespace) -> None:
    """Run the command; prints the address of the upload."""
    from ..hub.model_card import write_model_card
    from ..hub.publishing import publish

    given = [name for name in ("evaluation", "evaluated_on", "license", "image") if getattr(options, name, None)]
    if "evaluated_on" in given and not (options.evaluation and (options.evaluation / "summary.json").is_file()):
        raise ValueError(f"expected --evaluation FOLDER of one data set with --evaluated-on, got {options.evaluation}")
    if options.training:
        write_model_card(options.folder, **keyword_options(options, write_model_card))
    elif given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"expected --training beside {flags}: a new card names the data, its licence and the training")
    elif options.folder.is_dir() and not (options.folder / "README.md").is_file():
        raise ValueError(f"no card (README.md) in {options.folder}: give --training TEXT to write one")
    print(publish(options.folder, options.name, private=options.private))
