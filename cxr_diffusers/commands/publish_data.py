"""cxr-diffusers publish-data: a data set to the Hub."""

import argparse
from typing import Any

from .options import add_command, keyword_options

PUBLISH_DATA = """\
DATA is a folder, or NAME:key=value,... as for `evaluate`; it becomes the split "train".

Check first that the licence of the images allows you to pass them on. CheXpert's, VinDr-CXR's, MIMIC-CXR's and
PadChest's agreements do not: such images are refused unless --private, and even a private copy may fall under them.

examples:
  cxr-diffusers publish-data /data/mine-256 me/mine --license cc-by-4.0 --about "From ..., labelled by ..."
  cxr-diffusers publish-data chexpert:root=/data/chexpert-256 me/chexpert-256 --license other --private \\
      --split validation=chexpert:root=/data/chexpert-256,split=valid
  cxr-diffusers publish-data phantom:n=200 me/phantoms --split test=phantom:n=50,seed=1 --license apache-2.0
and then, to train and to measure:
  cxr-diffusers train chexpert_cfg_256 data.name=hub data.path=me/mine
  cxr-diffusers evaluate hub:path=me/phantoms,split=test --out report
"""


def add(commands: Any) -> None:
    """Add the command to the subparsers of `cxr-diffusers`."""
    text = "a data set, with its card, to the Hub"
    publish = add_command(commands, "publish-data", run, text, PUBLISH_DATA)
    publish.add_argument("data", metavar="DATA", help="the data set, see below")
    publish.add_argument("name", help="USER/NAME")
    publish.add_argument("--split", metavar="SPLIT=DATA", action="append", default=[], help="another split; repeatable")
    publish.add_argument(
        "--license", required=True, help="of the images, under its name on the Hub: cc-by-4.0, other, ..."
    )
    publish.add_argument("--license-link", metavar="URL", help="where to read it, if it is `other`")
    publish.add_argument("--about", help="Markdown for the card: where the images come from, who labelled them, how")
    publish.add_argument("--private", action="store_true", default=None)
    publish.add_argument("--pseudonyms", action="store_true", help="number patients and files in place of their names")
    text = "confirm that you may share these images although they look like those of a data use agreement"
    publish.add_argument("--i-may-share-this", dest="may_share", action="store_true", help=text)


def run(options: argparse.Namespace) -> None:
    """Run the command; prints the address of the upload."""
    from ..data import open_dataset
    from ..hub.datasets import publish_dataset

    data_by_split = {"train": options.data}
    for item in options.split:
        name, equals, data = item.partition("=")
        if not equals or not name.isidentifier() or name in data_by_split:
            raise ValueError(f"expected --split NAME=DATA with a name of its own (train is DATA's), got {item!r}")
        data_by_split[name] = data
    address = publish_dataset(
        {name: open_dataset(data) for name, data in data_by_split.items()},
        options.name,
        **keyword_options(options, publish_dataset, opened_as=" ".join(data_by_split.values())),
    )
    print(address)
