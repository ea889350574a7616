"""Work shared out over the processes that `accelerate launch` or torchrun started, if they did."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers.utils import logging

from pargs.cli import PATIENCE, fail, is_main

Item = TypeVar("Item")
Result = TypeVar("Result")


def hide_bars_in_logs() -> None:
    """Leave the libraries' progress bars to the first process's terminal: a log would be full of them."""
    if not (is_main() and sys.stderr.isatty()):
        datasets.disable_progress_bars()
        logging.disable_progress_bar()


def join_processes() -> PartialState:
    """The processes of this launch, which wait here for each other; one alone without a launcher."""
    hide_bars_in_logs()
    if not is_main():
        logging.set_verbosity_error()
    # `cpu` is said outright, or processes without a GPU would not find each other.
    # A process that has done its share waits for the others, however long.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def describe_device() -> str:
    """E.g. "2 processes, NVIDIA H100" or "1 process, CPU with 4 threads", for a record."""
    if torch.cuda.is_available():
        return f"{count_processes()}, {torch.cuda.get_device_name()}"
    return f"{count_processes()}, CPU with {torch.get_num_threads()} threads"


def count_processes() -> str:
    """E.g. "2 processes", for a summary."""
    number = join_processes().num_processes
    return f"{number} process" + "es" * (number > 1)


def split(items: list[Item]) -> list[Item]:
    """This process's share of `items`; the shares follow each other in the order of the processes."""
    with join_processes().split_between_processes(items) as mine:
        return list(mine)


def gather(results: list[Result]) -> list[Result]:
    """What all processes made of their shares, in the order of the items."""
    try:
        return gather_object(results)
    except RuntimeError as error:
        time.sleep(PATIENCE)  # where another process failed, it says why, and the launcher ends this one
        fail(f"the processes have lost each other: {error}")


def map_shared(work: Callable[[Item], Result], items: list[Item], label: str, unit: str) -> list[Result]:
    """`work` of each item, in order: every process does its share, and all get the whole.

    The items are the same for any number of processes, so the results are too.
    """
    return gather([work(item) for item in progress_bar(split(items), label, unit)])


def progress_bar(items: list[Item] | None, label: str, unit: str, total: int | None = None) -> "tqdm[Any]":
    """A bar on the first process's terminal; a log that is no terminal gets none.

    Without `items` it is moved by `update`, up to `total`.
    """
    return tqdm(items, desc=label, unit=unit, total=total, disable=None if is_main() else True)
