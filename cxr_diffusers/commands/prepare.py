"""cxr-diffusers prepare: a small grey copy of a data set."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .options import add_command, add_shard_option, counted, keyword_options, print_shard, shard_of

# the options that belong to one of the two ways alone, by their names in `options`
OF_FOLDER = {"equalize": "--equalize", "image_format": "--format", "frontal_only": "--frontal-only"}
OF_FOLDER |= {"fast_jpeg": "--fast-jpeg", "num_workers": "--workers"}
OF_PACK = {"unlabelled": "--unlabelled", "fill_views": "--fill-views", "quality": "--quality"}


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "a small grey copy of a data set, paths in its CSVs rewritten"
    prepare = add_command(commands, "prepare", run, text)
    prepare.add_argument(
        "source", help="CheXpert or ChestX-ray14 as downloaded, or any folder; with --pack also NAME:key=value,..."
    )
    prepare.add_argument("output", type=Path)
    prepare.add_argument("--size", type=int, default=256, help="side, in pixels (default: 256)")
    prepare.add_argument("--aspect", choices=["pad", "edge", "crop", "squash"], default="pad", help="default: pad")
    add_option = partial(prepare.add_argument, default=argparse.SUPPRESS)  # so that it shows which were given
    add_option("--equalize", action="store_true", help="histogram equalisation, as the original did")
    add_option("--format", dest="image_format", choices=["png", "jpg"], help="default: png")
    add_option("--frontal-only", action="store_true", help="omit lateral views of CheXpert")
    text = "decode large JPEG files at reduced size: several times faster, but changes pixels slightly"
    add_option("--fast-jpeg", action="store_true", help=text)
    add_option("--workers", type=int, dest="num_workers", help="processes (default: one for each CPU)")
    prepare.add_argument("--overwrite", action="store_true", help="replace existing copies")
    add_shard_option(prepare)
    pack = prepare.add_argument_group("one file instead of a folder")
    text = "write OUTPUT as one Parquet file of JPEG images and labels, for `data.name=packed data.root=OUTPUT`"
    pack.add_argument("--pack", action="store_true", help=text)
    add_option = partial(pack.add_argument, default=argparse.SUPPRESS)
    text = "data sets whose images are packed without a class, for the null label"
    add_option("--unlabelled", nargs="+", action="extend", metavar="DATA", help=text)
    text = "predict AP or PA from the image where the table does not say"
    add_option("--fill-views", action="store_true", help=text)
    add_option("--quality", type=int, help="of the JPEG images (default: 92)")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code, 1 if an image failed."""
    wrong = [flag for name, flag in (OF_FOLDER if options.pack else OF_PACK).items() if hasattr(options, name)]
    if wrong:
        raise ValueError(f"expected {', '.join(wrong)} only {'without' if options.pack else 'with'} --pack")
    if options.pack:
        if options.shard:
            raise ValueError(f"expected --pack without --shard, got {options.shard}: it writes one file")
        return pack(options)
    from ..data.preparation import prepare

    shard = shard_of(options)
    summary = prepare(options.source, options.output, **keyword_options(options, prepare, shard=shard))
    if not shard.is_all:
        print_shard(options, shard, summary["failed"])
        return 0
    return 1 if summary["failed"] else 0


def pack(options: argparse.Namespace) -> int:
    """Run the command with `--pack`; returns the exit code."""
    from ..data import open_dataset
    from ..data.packing import pack
    from ..data.views import fill_views

    if options.output.exists() and not options.overwrite:
        raise ValueError(f"expected a new file, {options.output} exists: give --overwrite to replace it")
    dataset = open_dataset(options.source)
    if hasattr(options, "fill_views"):
        dataset, auroc = fill_views(dataset)
        print("every view is in the table" if auroc is None else f"views filled in; cross-validated AUROC {auroc:.3f}")
    unlabelled = [open_dataset(text) for text in getattr(options, "unlabelled", [])]
    failed = pack(dataset, options.output, **keyword_options(options, pack, unlabelled=unlabelled))
    images = len(dataset) + sum(map(len, unlabelled)) - len(failed)
    print(f"{options.output}: {counted(images, 'image')}, {options.output.stat().st_size / 1e6:.1f} MB")
    for error in failed.values():
        print(f"left out: {error}", file=sys.stderr)
    return 1 if failed else 0
