"""What both training scripts share: flags, precision, logging, checks, and checkpoints that are whole."""

import json
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import wandb
from datasets import DatasetDict, load_from_disk
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer
from transformers.modeling_utils import load_state_dict
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files
from trl import TrlParser

# The libraries warn each other of names that they rename next; there is nothing to do about it here.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

OLD_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_remove_unused_columns": "--remove_unused_columns=False",
    "--torch_dtype": "--dtype",
}
FILE_LIST = "whole.json"
PATIENCE = 5.0  # seconds in which a launcher ends the other processes of one that failed
# What a damaged file, a full disk or a setting that does not fit raises in torch and in these libraries.
PLAIN_ERRORS = (OSError, ValueError, RuntimeError, EOFError, SafetensorError)


def fail(message: str) -> NoReturn:
    """Print one error line (under several processes, once a node) and exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)  # where all fail alike, the first one speaks and the launcher ends the others
        message = f"process {os.environ.get('RANK')}: {message}"
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # before there is any distributed state to ask
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def one_message(doing: str) -> Iterator[None]:
    """Exit with one line, not a traceback, where what happens inside cannot be done."""
    try:
        yield
    except PLAIN_ERRORS as error:
        fail(f"cannot {doing}: {' '.join(str(error).split()) or type(error).__name__}")


def parse_settings(kind: type, description: str) -> Any:
    """The settings that the command line gives, or exit with code 2."""
    try:
        parser = TrlParser((kind,), description=description)
        (settings,) = parser.parse_args_and_config(rename_old_flags(sys.argv[1:]))
    except ValueError as error:
        fail(" ".join(str(error).split()))

    model_flags = settings.model_init_kwargs or {}
    if settings.trust_remote_code or model_flags.get("trust_remote_code"):
        fail("--trust_remote_code stays off: this project runs no code from a model repository")
    if not model_flags.get("weights_only", True):
        fail("weights_only stays on: this project loads no pickled code")
    if min(settings.per_device_train_batch_size, settings.gradient_accumulation_steps) < 1:
        fail("--per_device_train_batch_size and --gradient_accumulation_steps must be at least 1")
    return settings


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


def check_weights(name: str, revision: str = "main") -> None:
    """Exit where the weights of `name` are missing, cut off or not tensors alone; warn of a pickle."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would ask a server to convert a pickle
    find = partial(cached_file, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

    with one_message(f"load the weights of {name!r}"):
        found = next(filter(None, map(find, names)), None)
        if found is None:
            fail(f"{name!r} has neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, and no other format is read")
        if Path(found).name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
            warn(f"{name!r} has no safetensors: its pickle {WEIGHTS_NAME} is read with weights_only=True")

        files = [found]
        if found.endswith(".json"):
            files, _ = get_checkpoint_shard_files(name, found, revision=revision)
        try:
            for file in files:
                load_state_dict(file, map_location="meta", weights_only=True)  # structure alone, no numbers
        except pickle.UnpicklingError:  # torch's message would say how to run it all the same
            fail(f"{name!r} is refused: its pickle is damaged or holds more than tensors, that is, code")


def read_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    with one_message(f"load the tokenizer of {name!r}"):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def model_kwargs(settings: Any) -> dict[str, Any]:
    """How TRL is to load the model: its `ModelConfig` leaves that to the script."""
    return {
        "revision": settings.model_revision,
        "attn_implementation": settings.attn_implementation,
        "dtype": settings.dtype,
        **(settings.model_init_kwargs or {}),
    }


def check_writable(output_dir: str) -> None:
    with one_message(f"write to {output_dir!r}"):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()


def read_dataset(
    path: str, made_by: str, columns: set[str], splits: Collection[str] = ("train", "validation")
) -> tuple[DatasetDict, dict]:
    """Load a dataset of an earlier stage and its `processing.json`, or exit with code 2."""
    try:
        dataset = load_from_disk(path)
        sidecar = Path(path, "processing.json")
        notes = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    except Exception as error:  # missing, truncated and foreign files raise a dozen different types
        fail(f"cannot read the dataset {path!r} ({error}); make it with `{made_by}`")

    for split in splits:
        missing = columns - {*dataset[split].column_names} if split in dataset else columns
        if missing:
            fail(f"{path!r} has no {' and '.join(sorted(missing))} in {split!r}; make it with `{made_by}`")
    return dataset, notes


class WholeCheckpoints(Trainer):
    """A trainer whose checkpoints count once the list of their files is there; it is written last."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left one
        self.accelerator.wait_for_everyone()

        # The trainer would delete the older ones before this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with one_message(f"write {folder}; older checkpoints stay, --resume_from_checkpoint True continues"):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                list_files(folder)
        self.args.save_total_limit = limit

        if self.is_world_process_zero():
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def list_files(folder: Path) -> None:
    """Write the size of every file of a checkpoint into it, under a temporary name first."""
    sizes = {
        str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()
    }
    listing = folder / f".{FILE_LIST}"
    listing.write_text(json.dumps(sizes, indent=1))
    os.replace(listing, folder / FILE_LIST)


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there in its full length."""
    try:
        sizes = json.loads((folder / FILE_LIST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def checkpoint_to_resume(asked: str | None, output_dir: str) -> str | None:
    """The checkpoint to continue from: the folder `asked` for, or for "True" the last whole one, if any."""
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not is_whole(Path(asked)):
            fail(f"{asked!r} is no whole checkpoint of this script; --resume_from_checkpoint True finds one")
        return asked

    folders = [*Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    whole = [folder for folder in folders if is_whole(folder)]
    for folder in sorted({*folders} - {*whole}):
        warn(f"{folder} is not whole and is not used")
    if not whole:
        warn(f"no whole checkpoint in {output_dir}/: training starts from the beginning")
        return None
    # The last one written: a run with other settings may have left a higher number.
    return str(max(whole, key=lambda folder: (folder / FILE_LIST).stat().st_mtime_ns))


def save_beside(trainer: Trainer) -> Path:
    """Write the trained model to a folder from which `move_into_place` takes it; every process calls this."""
    written = Path(trainer.args.output_dir, ".writing")
    if trainer.is_world_process_zero():
        shutil.rmtree(written, ignore_errors=True)  # an interrupted run may have left one
    trainer.accelerator.wait_for_everyone()

    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(written))
    return written


def move_into_place(written: Path, output_dir: Path, marker: str) -> None:
    """Move the files of `written` into `output_dir`, `marker` last: without it nobody loads the folder.

    The Trainer's `training_args.bin` is a pickle that no later stage reads; it stays behind.
    """
    (output_dir / marker).unlink(missing_ok=True)
    files = [file for file in written.iterdir() if file.name != "training_args.bin"]

    for file in sorted(files, key=lambda file: file.name == marker):
        os.replace(file, output_dir / file.name)
    shutil.rmtree(written)
