"""The command line, `cxr-diffusers COMMAND ...`."""

import argparse
import atexit
import gc
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands import COMMANDS
from .version import __version__

# errors that a user can correct are printed without a traceback
ONE_LINE_ERRORS = (ValueError, OSError, ImportError)
DOCUMENTATION = "https://github.com/cxr-diffusers/cxr_diffusers/tree/main/docs"

# without Python's last search of all objects for cycles, which takes over a second with torch and diffusers
atexit.register(gc.freeze)


class Parser(argparse.ArgumentParser):
    """A parser that prints a wrong command line as one line, without the list of all options before it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `argparse`; an unknown option is an error of the command that it was given to."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print `message` and how to get help on stderr, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; for help: {self.prog} --help\n")


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
        say(f"cxr-diffusers {options.command}: {' '.join(str(error).split())}")
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        advice = "; lower --batch-size" if getattr(options, "batch_size", None) else ""
        say(f"cxr-diffusers {options.command}: {' '.join(str(error).split()).rstrip('.')}{advice}")
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
    parser = Parser(
        prog="cxr-diffusers",
        description="See where a chest X-ray is abnormal. Research use only, not for diagnosis.",
        epilog=f"documentation: {DOCUMENTATION}",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
