"""Settings from a dataclass and the command line; a mistake of the user ends in one line, exit code 2."""

import os
import shlex
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser

T = TypeVar("T")
TRUTH_VALUES = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")  # as HfArgumentParser reads them
PATIENCE = 5.0  # seconds in which a launcher ends the other processes of one that failed


def setting(default: T, help: str, **metadata: Any) -> T:
    """A field of a settings dataclass; a list is copied for each instance.

    The annotation says what values are right (`PositiveInt`, `Literal`, ...) and `check_values` looks.
    """
    described: Any = {"help": help, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=described)  # type: ignore
    return field(default=default, metadata=described)


def is_main() -> bool:
    """Whether this is the first process of a launch, or the only one: it alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"  # known before PyTorch is imported


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


def run_script(main: Callable[[], object], again: str) -> None:
    """Run a script's `main`. Ctrl-C ends it in one line that says what starting it `again` does, exit 130."""
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt the way out
        if is_main():
            print(f"\nstopped: {again}", file=sys.stderr)
        raise SystemExit(130) from None


def next_step(script: str, *arguments: str, said: str = "next") -> None:
    """Print the command of the step that follows, as it is typed where this one was."""
    path = os.path.relpath(Path(sys.argv[0]).absolute().parents[1] / script)
    print(f"{said}: {shlex.join(['python', path, *arguments])}")


def changed_flags(**flags: tuple[str, str]) -> list[str]:
    """The flags of another script that have to be given: each is (value, the usual value)."""
    return [word for name, (value, usual) in flags.items() if value != usual for word in (f"--{name}", value)]


def warn(message: str) -> None:
    """Print one warning line, once a launch."""
    if is_main():
        print(f"warning: {' '.join(message.split())}", file=sys.stderr)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring and shows each default."""


class SettingsParser(HfArgumentParser, Generic[T]):
    """The flags of a settings dataclass, and whatever `add_argument` adds."""

    def __init__(self, kind: type[T], description: str | None):
        super().__init__(kind, description=description, formatter_class=HelpFormatter)  # type: ignore

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A switch takes no word but true or false: in `--dry_run A.json` the file is another argument."""
        words = list(sys.argv[1:] if args is None else args)
        switches = {
            flag for action in self._actions if action.const is True for flag in action.option_strings
        }
        for at, (word, following) in enumerate(zip_longest(words, words[1:], fillvalue="")):
            if word in switches and following.lower() not in TRUTH_VALUES:
                words[at] = f"{word}=true"
        return super().parse_known_args(words, namespace)

    def print_help(self, file: Any = None) -> None:
        if is_main():
            super().print_help(file)

    def parse(self) -> tuple[T, Namespace]:
        """The settings, and the arguments that were added."""
        settings, *others, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        check_values(settings)
        return settings, others[0] if others else Namespace()


def parse_settings(kind: type[T], description: str | None) -> T:
    """The settings dataclass with the flags that were given."""
    return SettingsParser(kind, description).parse()[0]


def check_values(settings: object) -> None:
    """Exit where a setting's value is not what its annotation allows; inherited settings are left alone."""
    allowed = get_type_hints(type(settings), include_extras=True)
    for name in type(settings).__annotations__:
        value = getattr(settings, name)
        try:
            TypeAdapter(allowed[name]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Input ")
            fail(f"--{name} {reason}, not {value!r}")
