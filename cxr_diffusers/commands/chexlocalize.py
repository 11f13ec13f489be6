"""cxr-diffusers chexlocalize: figures that can be compared with those of CheXlocalize's paper."""

import argparse
from pathlib import Path
from typing import Any

from .evaluate import open_methods
from .options import (
    SHARDS,
    add_command,
    add_pipeline_options,
    add_shard_option,
    batch_size_of,
    call_kwargs,
    print_shard,
    shard_of,
)

CHEXLOCALIZE = f"""\
Downloads: CheXpert's images and CheXlocalize's gt_segmentations_{{val,test}}.json, both from Stanford AIMI. The images
must have the size at which they were segmented. docs/evaluation.md describes the protocol.

examples:
  cxr-diffusers chexlocalize /data/CheXpert/test /data/CheXlocalize/gt_segmentations_test.json \\
      --validation /data/CheXpert/val /data/CheXlocalize/gt_segmentations_val.json --out report
  cxr-diffusers chexlocalize /data/CheXpert/val /data/CheXlocalize/gt_segmentations_val.json \\
      --model default runs/mine --frontal-only --out report

{SHARDS.format(command="chexlocalize")}"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "mIoU and hit rate on CheXlocalize's segmentations, by its protocol"
    command = add_command(commands, "chexlocalize", run, text, CHEXLOCALIZE)
    command.add_argument("images", type=Path, help="folder of the split's images, CheXpert/test")
    command.add_argument("segmentations", type=Path, help="their gt_segmentations_test.json")
    command.add_argument(
        "--validation",
        nargs=2,
        type=Path,
        metavar=("IMAGES", "SEGMENTATIONS"),
        help="the validation split, which gives each pathology its threshold (default: Otsu's on each map)",
    )
    command.add_argument(
        "--frontal-only", action="store_true", help="leave out lateral images (the protocol includes them)"
    )
    command.add_argument("--out", type=Path, required=True, help="folder for tables, maps and predictions")
    command.add_argument("--bootstrap", type=int, default=1000, help="replicates over images (default: 1000)")
    add_shard_option(command)
    add_pipeline_options(command, several=True)


def run(options: argparse.Namespace) -> None:
    """Run the command; prints the tables and the name of the file that holds them."""
    from ..evaluation.chexlocalize import chexlocalize_table, evaluate_chexlocalize, open_split
    from ..processes import process_state

    if options.bootstrap < 1:
        raise ValueError(f"expected --bootstrap of 1 or more, got {options.bootstrap}")
    shard, batch_size = shard_of(options), batch_size_of(options)
    test = open_split(options.images, options.segmentations, options.frontal_only)
    validation = None
    if options.validation:
        images, segmentations = options.validation
        validation = open_split(images, segmentations, options.frontal_only)
    summary = evaluate_chexlocalize(
        open_methods(options),
        test,
        validation,
        output_dir=options.out,
        batch_size=batch_size,
        n_bootstrap=options.bootstrap,
        call_kwargs=call_kwargs(options),
        shard=shard,
    )
    if not shard.is_all and process_state().is_main_process:
        print_shard(options, shard, noun="maps")
    if summary is not None:  # the main process
        print(chexlocalize_table(summary))
        print(f"See {options.out / 'summary.md'}")
