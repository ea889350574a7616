"""Model work shared out over the processes that `accelerate launch` or torchrun started, if they did."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from command_line import PATIENCE, fail, is_main
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def join_processes() -> PartialState:
    """The processes of this launch, which wait here for each other; one alone without a launcher."""
    if not is_main():
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    # Said outright, or processes without a GPU would not find each other.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


def copy_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Move the weights from the file that they are mapped from into aligned memory, in place.

    Where the map happens to lie decides how matrices are multiplied, and so the last bits of every number:
    they differed between launches.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def count_processes() -> str:
    number = join_processes().num_processes
    return f"{number} process" + "es" * (number > 1)


def map_batches(work: Callable[[Batch], Result], batches: list[Batch], label: str) -> list[Result]:
    """`work` of each batch, in order: every process does its share, and all get the whole.

    The batches are the same for any number of processes, so the results are too: padding and company can
    change the last bits of a number.
    """
    state = join_processes()
    mine = range(state.process_index, len(batches), state.num_processes)
    progress = tqdm(mine, desc=label, unit=" batches", disable=not is_main())
    done = [(at, work(batches[at])) for at in progress]
    try:
        gathered = dict(gather_object(done))
    except RuntimeError as error:
        time.sleep(PATIENCE)  # where another process failed, it says why, and the launcher ends this one
        fail(f"the processes have lost each other: {error}")
    return [gathered[at] for at in range(len(batches))]
