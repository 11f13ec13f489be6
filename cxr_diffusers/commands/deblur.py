"""cxr-diffusers deblur: a data set deblurred by a diffusion prior."""

import argparse
from pathlib import Path
from typing import Any

from .options import (
    SHARDS,
    add_command,
    add_device_options,
    add_shard_option,
    counted,
    keyword_options,
    print_shard,
    shard_of,
)

DEBLUR = f"""\
KERNEL is the blur of the images, in their own pixels:
  motion:size=10,intensity=0.5,seed=0   a random trajectory      linear:length=9,angle=30   a straight one
  gaussian:sigma=1.5                    disk:radius=2.5          file:path=kernel.png (or .npy)
  estimate                              estimated for each image from its steepest edges (accuracy: docs/deblurring.md)

examples:
  cxr-diffusers deblur /data/CheXpert-v1.0 /data/chexpert-deblurred --kernel gaussian:sigma=1.5 --plan
  cxr-diffusers deblur /data/CheXpert-v1.0 /data/chexpert-deblurred --kernel gaussian:sigma=1.5 --model runs/prior

{SHARDS.format(command="deblur")}"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "a data set deblurred by a diffusion prior (DiffPIR), its layout, CSVs, boxes and masks kept"
    deblur = add_command(commands, "deblur", run, text, DEBLUR)
    deblur.add_argument("source", type=Path, help="CheXpert, ChestX-ray14 or VinDr-CXR as downloaded, or any folder")
    deblur.add_argument("output", type=Path)
    deblur.add_argument("--kernel", required=True, help="see below")
    deblur.add_argument("--model", help="the prior: pipeline folder or Hub name (default: the shipped model)")
    deblur.add_argument("--trust-remote-code", action="store_true", help="run the code that a Hub model brings along")
    deblur.add_argument("--num-inference-steps", type=int, help="evaluations of the prior (default: 100)")
    deblur.add_argument("--noise-std", type=float, help="of the images, black 0 to white 1 (default: 0.5 / 255)")
    deblur.add_argument("--lambda", type=float, dest="lambda_", help="weight of the prior (default: 7)")
    deblur.add_argument("--zeta", type=float, help="share of fresh noise in each step (default: 0.3)")
    deblur.add_argument("--tile-size", type=int, help="process overlapping tiles of this side, to save memory")
    deblur.add_argument("--batch-size", type=int, default=4, help="images of one size at once (default: 4)")
    deblur.add_argument("--format", dest="image_format", choices=["png", "jpg"], default="png")
    deblur.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    add_shard_option(deblur)
    add_device_options(deblur)
    text = "measure a few images and print the expected time of N images (default: all of SOURCE)"
    deblur.add_argument("--plan", type=int, nargs="?", const=0, metavar="N", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 1 if an image was skipped."""
    from ..deblurring.dataset import check, deblur, describe_plan, load_prior, measure
    from ..precision import use_dtype
    from ..processes import process_state, usable_device

    if options.plan is not None and options.shard:
        raise ValueError(f"expected --plan without --shard, got {options.shard}: it is the plan of a whole data set")
    state, shard = process_state(), shard_of(options)
    device = usable_device(options.device)
    check(options.source, options.output, options.image_format, options.batch_size)  # before the prior is opened
    pipeline = load_prior(options.model, options.trust_remote_code).to(device)
    use_dtype(pipeline, options.dtype)
    pipeline.set_progress_bar_config(disable=True)
    names = ("num_inference_steps", "noise_std", "lambda_", "zeta", "tile_size")
    call = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.plan is not None:
        seconds, images = measure(pipeline, options.source, **keyword_options(options, measure, call_kwargs=call))
        if state.is_main_process:
            print(describe_plan(options.plan or images, seconds, state.num_processes))
        return 0
    arguments = keyword_options(options, deblur, call_kwargs=call, shard=shard)
    summary = deblur(pipeline, options.source, options.output, **arguments)
    if summary is None:  # not the main process
        return 0
    counts = f"{summary['computed']} computed, {summary['kept']} already present, {summary['skipped']} skipped"
    print(f"{counted(summary['images'], 'image')}: {counts}. See {options.output}")
    if summary["computed"]:
        print(f"all of them: {describe_plan(summary['images'], summary['seconds_per_image'], state.num_processes)}")
    if not shard.is_all:
        print_shard(options, shard, summary["skipped"])
        return 0
    return 1 if summary["skipped"] else 0
