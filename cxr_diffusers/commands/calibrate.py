"""cxr-diffusers calibrate: threshold, healthy scores and error range of a model, from validation images."""

import argparse
import sys
from typing import Any

from .options import (
    SETTINGS,
    add_batch_size_option,
    add_command,
    add_device_options,
    batch_size_of,
    counted,
    keyword_options,
    open_pipeline,
)

CALIBRATE = """\
DATA is a folder of images, or NAME:key=value,... as for `cxr-diffusers evaluate`. Take validation images: neither
training images nor the images you want to report results on. 100 healthy images or more are a good number.

Written into the folder MODEL: `map_threshold` (model_index.json), healthy_scores.json and, for a diffusion model,
denoising_errors.json. docs/calibrate.md explains them. Run the same command again after an interruption.

examples:
  cxr-diffusers calibrate runs/mine --healthy /data/validation/healthy
  cxr-diffusers calibrate runs/mine --healthy /data/validation/healthy --diseased /data/validation/diseased
  cxr-diffusers calibrate runs/chexpert_cfg_256 --healthy chexpert:root=/data/CheXpert-v1.0,split=valid,classes=[]
"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "threshold and healthy scores of a model, from validation images"
    calibrate = add_command(commands, "calibrate", run, text, CALIBRATE)
    calibrate.add_argument("model", metavar="MODEL", help="the folder of your model")
    calibrate.add_argument("--healthy", metavar="DATA", required=True, help="healthy validation images")
    text = "diseased validation images, which must not be taken for images of another kind"
    calibrate.add_argument("--diseased", metavar="DATA", help=text)
    text = "of the pixels of healthy maps; the threshold is the value that this share of them is below (default: 0.95)"
    calibrate.add_argument("--quantile", type=float, default=0.95, help=text)
    calibrate.add_argument("--named", help="description of the healthy images, for figures (default: DATA)")
    add_batch_size_option(calibrate)
    add_device_options(calibrate)
    # a model is calibrated with its own settings
    calibrate.set_defaults(trust_remote_code=False, backend=None, as_original=False)
    calibrate.set_defaults(**dict.fromkeys(SETTINGS))


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..data import open_dataset
    from ..inference.calibration import TRAINING_IMAGES, calibrate_model, check_own_folder
    from ..inference.out_of_distribution import FEWEST, has_denoiser
    from ..processes import process_state

    if not process_state().is_main_process:
        return 0
    folder = check_own_folder(options.model)
    healthy = open_dataset(options.healthy)
    diseased = open_dataset(options.diseased) if options.diseased else None
    options.batch_size = batch_size_of(options)
    pipeline = open_pipeline(options)
    if diseased is not None and not has_denoiser(pipeline):
        print(f"note: --diseased is not used, a {type(pipeline).__name__} has no denoising network", file=sys.stderr)
    arguments = keyword_options(options, calibrate_model, diseased=diseased, pipeline=pipeline)
    result = calibrate_model(folder, healthy, options.named or options.healthy, **arguments)
    scores = result.scores.scores
    share = f"{result.quantile:.0%} of the pixels of {len(scores)} healthy images"
    print(f"map_threshold: {result.map_threshold:g} ({share} are below it)")
    print(f"healthy scores: {scores[0]:.4g} to {scores[-1]:.4g}, median {scores[len(scores) // 2]:.4g}")
    quantiles, values = list(result.scores.map_quantiles), list(result.scores.map_quantiles.values())
    text = f"pixels of healthy maps: {values[0]:g} to {values[-1]:g}, their quantiles {quantiles[0]} to {quantiles[-1]}"
    print(f"{text} (`detect --threshold healthy:0.99`)")
    for view, of_view in result.scores.by_view.items():
        print(f"  {view}: {counted(len(of_view), 'image')}, {of_view[0]:.4g} to {of_view[-1]:.4g}")
    if len(scores) < FEWEST:
        advice = f"threshold and p-values are coarse, {TRAINING_IMAGES} or more are recommended"
        print(f"warning: only {len(scores)} healthy images: {advice}", file=sys.stderr)
    if result.errors is not None:
        print(result.errors.describe())
    for error in result.failed.values():
        print(f"left out: {error}", file=sys.stderr)
    return 1 if result.failed else 0
