"""cxr-diffusers detect: an anomaly map for each image."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import (
    SHARDS,
    add_command,
    add_pipeline_options,
    add_shard_option,
    batch_size_of,
    call_kwargs,
    counted,
    keyword_options,
    open_pipeline,
    print_shard,
    shard_of,
)

DETECT = f"""\
examples:
  cxr-diffusers detect chest.png --out maps
  cxr-diffusers detect /data/pacs_export --out maps --dicom
  cxr-diffusers detect /data/dicom --out maps --model runs/chexpert_cfg_256 --noise-level 500
  cxr-diffusers detect chest.png --out maps --save-masks --threshold healthy:0.99

{SHARDS.format(command="detect")}"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    detect = add_command(commands, "detect", run, "an anomaly map for each image of a file or folder", DETECT)
    detect.add_argument("images", nargs="+", type=Path, help="png, jpg, tif, npy or DICOM files, or folders")
    detect.add_argument("--out", type=Path, required=True, help="folder for panels, maps and results.csv")
    detect.add_argument("--map-format", choices=["png", "npy"], default="png", help="16-bit PNG or float32 npy")
    text = "as a PNG at the model's resolution, and a crisp one: the input plus the enlarged change"
    detect.add_argument("--save-counterfactual", action="store_true", help=text)
    text = "for each DICOM file a Segmentation, a Secondary Capture and a Presentation State (docs/clinic.md)"
    detect.add_argument("--dicom", action="store_true", help=text)
    detect.add_argument("--save-trajectory", action="store_true", help="an animation (WebP) of inversion and decoding")
    text = "map value of the last colour (default: 3 x the threshold, at most 1)"
    detect.add_argument("--vmax", type=float, help=text)
    text = (
        "above which a pixel is abnormal: a map value from 0 to 1, or a quantile of the pixels of healthy images, such "
        "as healthy:0.99 (default: the model's, from healthy images)"
    )
    detect.add_argument("--threshold", metavar="VALUE", help=text)
    text = "boxes of the regions above the threshold: boxes.json for all images, or labels/NAME.txt for each"
    detect.add_argument("--save-boxes", choices=["coco", "yolo"], help=text)
    detect.add_argument("--save-masks", action="store_true", help="the map above the threshold, as a PNG of 0 and 255")
    text = "no panel NAME.png of each image: less time and space"
    detect.add_argument("--no-panel", action="store_false", dest="save_panel", help=text)
    add_shard_option(detect)
    add_pipeline_options(detect)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 1 if an image failed."""
    from ..inference.detection import detect
    from ..inference.dicom_output import import_highdicom
    from ..inference.inputs import check_inputs
    from ..inference.thresholds import parse_threshold

    shard = shard_of(options)
    # before the model is opened, which takes a while
    if options.threshold is not None:
        parse_threshold(options.threshold)
    check_inputs(options.images)
    if options.dicom:
        import_highdicom()
    options.batch_size = batch_size_of(options)
    summary = detect(
        open_pipeline(options),
        options.images,
        options.out,
        **keyword_options(options, detect, call_kwargs=call_kwargs(options), shard=shard),
    )
    if summary is None:  # not the main process
        return 0
    computed, failed, seconds = summary["computed"], summary["failed"], summary["seconds_per_image"]
    earlier = summary["images"] - computed - len(failed)
    table = "results.csv" if computed or earlier else "failed.csv"
    result = options.out / table if shard.is_all else options.out
    print(
        f"{counted(summary['images'], 'image')}: {computed} computed{f' ({seconds:.2g} s each)' if computed else ''}, "
        f"{earlier} were there, {len(failed)} failed. See {result}"
    )
    if shard.is_all:
        print_file_notes(summary)
    for error in failed.values():
        print(f"failed: {' '.join(error.split())}", file=sys.stderr)
    if not shard.is_all:  # a shard with failed images exits with 0: the run for the tables tries them once more
        print_shard(options, shard, len(failed))
        return 0
    return 1 if failed else 0


def print_file_notes(summary: dict) -> None:
    """Print the number of skipped files, of images without DICOM objects, and of images with each warning."""
    from collections import Counter

    from ..data.images import describe_skipped

    if summary["skipped"]:
        print(f"left out: {describe_skipped(summary['skipped'])}")
    if summary["without_dicom"]:
        print(f"no DICOM objects: {len(summary['without_dicom'])} of the images are no DICOM files")
    counts = Counter(warning for text in summary["warnings"].values() for warning in text.split("; "))
    if counts:
        warned = counted(len(summary["warnings"]), "image")
        print(f"{warned} with warnings (column `warnings`); their maps may be meaningless:")
    for warning, count in counts.most_common():
        print(f"  {count} x {warning}")
