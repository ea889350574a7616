"""What the reporting scripts do with their command line: one message on a mistake, flags and folders in."""

import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import NoReturn, TypeVar

from transformers import HfArgumentParser

T = TypeVar("T")
PATIENCE = 5.0  # seconds in which a launcher ends the other processes of one that failed


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and shows each default."""


class CommandLine(HfArgumentParser):
    """The flags of a settings dataclass; a mistake is one line."""

    def __init__(self, settings: type, description: str):
        super().__init__(settings, description=description, formatter_class=HelpFormatter)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def is_main() -> bool:
    """Whether this is the first process of a launch, or the only one: it alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"  # known before PyTorch is imported


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2.

    Where several processes fail alike, the first one says it for all, and its end is the end of the others.
    Another process speaks only if it is still there after a while: then it alone has failed.
    """
    if not is_main():
        time.sleep(PATIENCE)
        message = f"process {os.environ['RANK']}: {message}"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_command_line(settings: type[T], description: str, runs_help: str) -> tuple[T, list[str]]:
    """The settings, and the run directories named beside them (none: the current one)."""
    parser = CommandLine(settings, description)
    parser.add_argument("runs", nargs="*", default=["."], metavar="RUN", help=runs_help)

    parsed, positional, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed, positional.runs
