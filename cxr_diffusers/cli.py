"""The command line, `cxr-diffusers COMMAND ...`."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from .commands import COMMANDS
from .version import __version__

# errors that a user can correct are printed without a traceback
ONE_LINE_ERRORS = (ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 done except for some files, 2 not done."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    # pydicom's warnings quote values, such as names and birth dates; our own messages name the element instead
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    try:
        check_output(options)
        return options.run(options) or 0
    except ONE_LINE_ERRORS as error:
        say(f"cxr-diffusers {options.command}: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"cxr-diffusers {options.command}: stopped")
        return 130


def say(message: str) -> None:
    """Print a line on stderr, above the progress bars that are still open."""
    from tqdm.auto import tqdm

    tqdm.write(message, file=sys.stderr)


def check_output(options: argparse.Namespace) -> None:
    """Raise ValueError if the command has an output folder that cannot be written, before it reads or computes."""
    place = getattr(options, "out", None) or getattr(options, "output", None)
    if place is not None:
        from .files import check_output_folder

        check_output_folder(place.parent if getattr(options, "pack", False) else place)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all commands."""
    parser = argparse.ArgumentParser(
        prog="cxr-diffusers", description="See where a chest X-ray is abnormal. Research use only, not for diagnosis."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
