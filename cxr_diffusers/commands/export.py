"""cxr-diffusers export: a model to ONNX or OpenVINO."""

import argparse
from pathlib import Path
from typing import Any

from .options import BACKENDS, add_command

EXPORT = """\
examples:
  cxr-diffusers export default model_onnx --format onnx
  cxr-diffusers detect chest.png --out maps --model model_onnx

`detect` and `evaluate` need no exported folder: with --backend they export into a cache on first use.
"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "a model to ONNX or OpenVINO, for faster maps on a CPU"
    export = add_command(commands, "export", run, text, EXPORT)
    export.add_argument("checkpoint", help="pipeline folder, Hub name or name of a shipped model")
    export.add_argument("output", type=Path, help="a new folder, which --model opens")
    export.add_argument("--format", choices=BACKENDS[1:], default="onnx", help="default: onnx")
    export.add_argument("--overwrite", action="store_true", help="replace the output folder")
    export.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from ..hub.loading import load_pipeline
    from ..inference.export import TOLERANCE, check_packages, export_pipeline

    check_packages(options.format)  # before a model is opened
    pipeline = load_pipeline(options.checkpoint, options.trust_remote_code)
    export_pipeline(pipeline, options.output, options.format, overwrite=options.overwrite)
    print(
        f"{options.output}: a {type(pipeline).__name__} with its network in {options.format} format; outputs agree to "
        f"{TOLERANCE:g}"
    )
