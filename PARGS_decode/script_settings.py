"""Read a script's settings; a mistake of its user ends in one line, however many processes make it."""

import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import NoReturn, TypeVar

from transformers import HfArgumentParser

T = TypeVar("T")
PATIENCE = 5.0  # seconds in which a launcher ends the other processes of one that failed


def is_main() -> bool:
    """Whether this is the first process of a launch, or the only one: it alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2.

    Where all processes fail alike, the first one says it and its end is the end of the others; one that is
    still there after a while has failed alone and speaks for itself.
    """
    if not is_main():
        time.sleep(PATIENCE)
        message = f"process {os.environ['RANK']}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and shows each default."""


class CommandLine(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def parse_settings(settings: type[T], description: str) -> T:
    """The settings dataclass with the flags that were given."""
    parser = CommandLine(settings, description=description, formatter_class=HelpFormatter)
    parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed
