"""Shared by the commands: the options of a pipeline, and the pipeline that they select."""

import argparse
import inspect
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..processes import Shard

PROCESSES = """\
several GPUs, or several processes on a CPU:
  accelerate launch --multi_gpu --num_processes 2 -m cxr_diffusers.cli {command} ...
"""
SHARDS = f"""{PROCESSES}\
several machines, or a job array: --shard (docs/scale.md)
"""
# options of the calls of all pipelines; their defaults stand in the signatures, or in a checkpoint
SETTINGS: dict[str, dict[str, Any]] = {
    "guidance_scale": {"type": float, "help": "w of (1 + w) target - w negative"},
    "noise_level": {
        "type": int,
        "nargs": "+",
        "action": "extend",
        "metavar": "T",
        "help": "timestep where inversion stops; more may change more. Several: their maps are averaged",
    },
    "num_inference_steps": {"type": int, "help": "of the whole chain"},
    "inversion": {"choices": ["plain", "averaged"], "help": "averaged: more accurate with few steps"},
    "guidance_every": {"type": int, "metavar": "N", "help": "steps, of which only the first evaluates both labels"},
    "decode_until": {"type": int, "metavar": "T", "help": "where decoding from all but the highest level ends; 0: off"},
    "inpaint": {
        "type": float,
        "metavar": "SHARE",
        "help": "of the pixels where the map is highest, which are drawn anew to fit the rest; 0: off",
    },
    "inpaint_steps": {"type": int, "help": "of the whole chain, for --inpaint"},
    "inpaint_rounds": {"type": int, "metavar": "N", "help": "inpaintings, each with a new choice of the pixels"},
    "negative_label": {"help": "class that guidance pushes away from: a name, an id, or null"},
    "source_label": {"help": "class of the inversion"},
    "classifier_scale": {"type": float, "help": "s of classifier guidance"},
    "unet_label": {"help": "class given to the UNet under classifier guidance"},
    "explained_label": {"help": "class whose evidence Grad-CAM or pyramid CAM explains"},
    "direction": {"choices": ["both", "bright", "dark"], "help": "of the change: brighter or darker than it should be"},
    "smoothing": {"type": float, "metavar": "SIGMA", "help": "of the map, in pixels of the model's resolution"},
    "highpass": {
        "type": float,
        "metavar": "SIGMA",
        "help": "without changes that are wider than this, in pixels of an image of 64 pixels; 0: off",
    },
    "match_exposure": {
        "action": argparse.BooleanOptionalAction,
        "help": "give the counterfactual the contrast and brightness of the image before the subtraction",
    },
    "region": {"choices": ["image", "lungs"], "help": "part of the image that the map covers"},
    "keep_below": {
        "type": float,
        "metavar": "VALUE",
        "help": "of the map, below which the counterfactual is the image itself; 0: off",
    },
    "evidence": {
        "type": float,
        "metavar": "WEIGHT",
        "help": "of the class evidence in the map: where the model predicts more for the negative label",
    },
    "score": {
        "choices": ["map", "change", "evidence", "combined"],
        "help": "what the score measures: the map, the change with neither high-pass nor matched exposure, the class "
        "evidence (how much better the negative label explains the image), or change + 2 x evidence",
    },
}

BACKENDS = ("torch", "onnx", "openvino")


def add_command(
    commands: Any, name: str, run: Callable, text: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Add a command to the subparsers of `cxr-diffusers`, and return its parser."""
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_pipeline_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the options that select a model, or `several`, and set the arguments of its call."""
    text = "pipeline folder, Hub name or name of a shipped model (default: the default one)"
    if several:
        parser.add_argument("--model", nargs="+", action="extend", help=f"{text}; several make one table")
    else:
        parser.add_argument("--model", help=text)
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")
    add_batch_size_option(parser)
    add_device_options(parser)
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="runs the network (default: torch, or the format of an exported model); onnx and openvino run on the "
        "CPU and give the same maps to 1e-4 (docs/export.md)",
    )
    parser.add_argument(
        "--as-original",
        action="store_true",
        help="the procedure as guided-diffusion's CFG fork (or, with a classifier, Wolleb's code) ran it, offsets and "
        "clamp included (docs/faithfulness.md)",
    )
    call = parser.add_argument_group("of the pipeline (default: the model's own)")
    for name, option in SETTINGS.items():
        call.add_argument(f"--{name.replace('_', '-')}", **option)


def add_batch_size_option(parser: argparse.ArgumentParser) -> None:
    """Add `--batch-size`, see `batch_size_of`."""
    text = "images at once, in each process (default: 8; 32 on a GPU)"
    parser.add_argument("--batch-size", type=int, help=text)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--dtype`."""
    parser.add_argument("--device", help="cuda, mps, cpu (default: the best there is)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="number format of the networks (default: bfloat16 where the device has it in hardware, else float32); a "
        "classifier of transformers always computes in float32",
    )


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """Add `--shard`."""
    text = (
        "compute only share i of n (i from 0) and write no tables; a later run without --shard writes them "
        "(default: the task of a Slurm array or an indexed Kubernetes job, else all; 0/1 is always all; docs/scale.md)"
    )
    parser.add_argument("--shard", metavar="i/n", help=text)


def shard_of(options: argparse.Namespace) -> "Shard":
    """The shard of `--shard` or of the job array."""
    from ..processes import Shard

    return Shard.parse(options.shard)


def print_shard(options: argparse.Namespace, shard: "Shard", failed: int = 0, noun: str = "images") -> None:
    """Print how many images or maps of a shard are done, and the command that writes the tables."""
    arguments = list(options.arguments)
    for i in reversed(range(len(arguments))):
        if arguments[i].startswith("--shard="):
            del arguments[i]
        elif arguments[i] == "--shard":
            del arguments[i : i + 2]
    done = f"{shard.items - failed} of its {shard.items} {noun} are done{f', {failed} failed' if failed else ''}"
    print(f"shard {shard}: {done}. When all shards have ended, write the tables:")
    print(f"  cxr-diffusers {shlex.join(arguments)}")


def counted(number: int, noun: str) -> str:
    """1, "image" -> "1 image"; 2, "image" -> "2 images"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def keyword_options(options: argparse.Namespace, function: Callable, **others: Any) -> dict[str, Any]:
    """The options that `function` has as keyword-only arguments, by name, and `others`, which take precedence."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and hasattr(options, p.name)]
    return {**{name: getattr(options, name) for name in names}, **others}


def call_kwargs(options: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments that were given; a label that is a number is an id, else a name."""
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    if len(given.get("noise_level", [])) == 1:
        given["noise_level"] = given["noise_level"][0]
    return {k: int(v) if k.endswith("_label") and v.isdigit() else v for k, v in given.items()}


def batch_size_of(options: argparse.Namespace) -> int:
    """The number of `--batch-size`, or the default of the device: a GPU is idle most of the time with few images.

    Raises:
        ValueError: less than 1.
    """
    from ..processes import process_state

    if options.batch_size is None:
        device = str(options.device or process_state().device)  # whether it can be used is checked later
        return 32 if device.startswith(("cuda", "xpu")) else 8
    if options.batch_size < 1:
        raise ValueError(f"expected --batch-size of 1 or more, got {options.batch_size}")
    return options.batch_size


def open_pipeline(options: argparse.Namespace, model: str | None = None) -> Any:
    """A model, or that of `--model`, on the device of this process; ValueError where its call lacks a given option."""
    from ..evaluation.plan import checked_call
    from ..hub.loading import load_pipeline
    from ..inference.export import with_backend
    from ..models.exported_net import ExportedNet
    from ..precision import use_dtype
    from ..processes import process_state, usable_device

    if options.backend in BACKENDS[1:]:
        check_exported(options, f"--backend {options.backend}")
    if options.as_original:
        check_float32(options, "--as-original")
    state, device = process_state(), usable_device(options.device)
    model = model or options.model or "default"
    pipeline = load_pipeline(model, options.trust_remote_code)
    for network in filter(lambda part: isinstance(part, ExportedNet), pipeline.components.values()):
        check_exported(options, f"a model exported to {network.config.format}")
    on_terminal = state.is_main_process and sys.stderr.isatty()
    pipeline.set_progress_bar_config(disable=not on_terminal, leave=False, position=1)
    if options.backend:
        pipeline = with_backend(pipeline, options.backend)
    pipeline = pipeline.to(device)
    # an exported network computes as it was exported; the original procedure as the original did
    use_dtype(pipeline, "float32" if options.backend in BACKENDS[1:] or options.as_original else options.dtype)
    if not options.as_original:
        return checked_call(pipeline, call_kwargs(options), model)[0]
    from ..guided_diffusion.original import OriginalProcedure

    scale = "classifier_scale" if "classifier" in pipeline.components else "guidance_scale"
    unknown = sorted(set(call_kwargs(options)) - {scale, "noise_level", "num_inference_steps"})
    if unknown:
        raise ValueError(f"the original procedure has no {', '.join(unknown)}: leave it out with --as-original")
    return OriginalProcedure(pipeline)


def check_exported(options: argparse.Namespace, network: str) -> None:
    """Raise ValueError if `--device` or `--dtype` is not that of an exported network: the CPU, float32."""
    if options.device not in (None, "cpu"):
        raise ValueError(f"expected --device cpu with {network}, got {options.device}")
    check_float32(options, network)


def check_float32(options: argparse.Namespace, reason: str) -> None:
    """Raise ValueError if `--dtype` is another than float32, in which `reason` computes."""
    if options.dtype not in ("auto", "float32"):
        raise ValueError(f"expected --dtype float32 with {reason}, got {options.dtype}")
