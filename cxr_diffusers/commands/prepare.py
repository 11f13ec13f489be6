"""cxr-diffusers prepare: a small grey copy of a data set."""

from pathlib import Path

from .options import add_command


def add(commands):
    text = "a small grey copy of a data set, paths in its CSVs rewritten"
    prepare = add_command(commands, "prepare", run, text)
    prepare.add_argument("source", type=Path, help="CheXpert or ChestX-ray14 as downloaded, or any folder")
    prepare.add_argument("output", type=Path)
    prepare.add_argument("--size", type=int, default=256, help="side, in pixels (default: 256)")
    prepare.add_argument("--aspect", choices=["pad", "crop", "squash"], default="pad", help="default: pad")
    prepare.add_argument("--equalize", action="store_true", help="histogram equalisation, as the original did")
    prepare.add_argument("--format", choices=["png", "jpg"], default="png")
    prepare.add_argument("--frontal-only", action="store_true", help="leave lateral views out")
    prepare.add_argument("--workers", type=int, default=None, help="processes (default: one for each CPU)")
    prepare.add_argument("--overwrite", action="store_true", help="make the copies anew")


def run(options):
    from ..data.preparation import prepare

    prepare(
        options.source,
        options.output,
        size=options.size,
        aspect=options.aspect,
        equalize=options.equalize,
        image_format=options.format,
        frontal_only=options.frontal_only,
        num_workers=options.workers,
        overwrite=options.overwrite,
    )
