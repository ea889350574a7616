"""What a training script settles before it trains: old flag names, precision, logging, and saving whole."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import wandb
from datasets import DatasetDict, load_from_disk

# The libraries warn each other of names that they rename next; there is nothing to do about it here.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

OLD_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_remove_unused_columns": "--remove_unused_columns=False",
    "--torch_dtype": "--dtype",
}


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # before there is any distributed state to ask
        print(f"warning: {message}", file=sys.stderr)


def rename_old_flags(arguments: list[str]) -> list[str]:
    """Replace the flags of older releases by what they became, with one line for each."""
    renamed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in OLD_FLAGS:
            warn(f"{flag} became {OLD_FLAGS[flag]}")
            argument = OLD_FLAGS[flag] + equals + value
        renamed.append(argument)
    return renamed


def settle_precision(settings: Any) -> None:
    """Decide fp16 or bf16: what the flags say, else bf16 where the GPU has it and fp32 elsewhere.

    A flag that the hardware cannot honour is dropped with a warning. Changes `settings` in place.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        settings.use_cpu = True  # said outright, or processes without a GPU would not find each other
        for flag in ("fp16", "bf16", "tf32", "load_in_8bit", "load_in_4bit"):
            if getattr(settings, flag):
                warn(f"--{flag} needs a GPU and there is none: dropped")
                setattr(settings, flag, None if flag == "tf32" else False)

    if settings.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        warn("--bf16 is not supported by this GPU: dropped")
        settings.bf16 = False
    if settings.bf16 is None:
        settings.bf16 = has_gpu and not settings.fp16 and torch.cuda.is_bf16_supported(False)
    settings.dataloader_pin_memory = settings.dataloader_pin_memory and has_gpu


def log_offline_without_login(report_to: list[str] | str | None) -> None:
    """Let wandb write to a local folder instead of asking for an account."""
    if not report_to or "wandb" not in report_to or "WANDB_MODE" in os.environ:
        return
    if not wandb.login(prompt=False, verify=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # or it would not read the variable again
        warn("no wandb login: logging offline into wandb/ (upload later with `wandb sync`)")


def read_dataset(path: str, made_by: str) -> tuple[DatasetDict, dict]:
    """Load a dataset of an earlier stage and its `processing.json`, or exit with code 2."""
    try:
        dataset = load_from_disk(path)
        sidecar = Path(path, "processing.json")
        notes = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    except Exception as error:  # missing, truncated and foreign files raise a dozen different types
        fail(f"cannot read the dataset {path!r} ({error}); make it with `{made_by}`")
    return dataset, notes


def move_into_place(written: Path, output_dir: Path, marker: str) -> None:
    """Move the files of `written` into `output_dir`, `marker` last: without it nobody loads the folder.

    The Trainer's `training_args.bin` is a pickle that no later stage reads; it stays behind.
    """
    (output_dir / marker).unlink(missing_ok=True)
    files = [file for file in written.iterdir() if file.name != "training_args.bin"]

    for file in sorted(files, key=lambda file: file.name == marker):
        os.replace(file, output_dir / file.name)
    shutil.rmtree(written)
