"""What the reporting scripts do with their command line: one message on a mistake, flags and folders in."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from typing import NoReturn, TypeVar

from transformers import HfArgumentParser

T = TypeVar("T")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and shows each default."""


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_command_line(settings: type[T], description: str, runs_help: str) -> tuple[T, list[str]]:
    """The settings, and the run directories named beside them (none: the current one)."""
    parser = HfArgumentParser(settings, description=description, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="*", default=["."], metavar="RUN", help=runs_help)

    parsed, positional, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return parsed, positional.runs
