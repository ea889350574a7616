"""What both training scripts share: flags, precision, logging, checkpoints that are whole, and saving."""

import json
import os
import shutil
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import TrlParser

from pargs.cli import HelpFormatter, check_values, fail, warn
from pargs.models import MODEL_ERRORS, why
from pargs.processes import hide_bars_in_logs

# The libraries warn each other of names that they rename next; there is nothing to do about it here.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

OLD_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_remove_unused_columns": "--remove_unused_columns=False",
    "--torch_dtype": "--dtype",
}
FILE_LIST = "whole.json"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, in three libraries

T = TypeVar("T")


class TrainingParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")


def parse_settings(kind: type[T], description: str | None) -> T:
    """The settings that the command line gives; exits where one of them cannot be."""
    hide_bars_in_logs()
    kinds: Any = (kind,)
    parser = TrainingParser(kinds, description=description, formatter_class=HelpFormatter)
    try:
        (settings,) = parser.parse_args_and_config(rename_old_flags(sys.argv[1:]))
    except (OSError, ValueError, ArgumentTypeError) as error:  # TRL's settings look at each other
        fail(str(error))
    check_values(settings)

    model_flags = settings.model_init_kwargs or {}
    if settings.trust_remote_code or model_flags.get("trust_remote_code"):
        fail("--trust_remote_code stays off: this project runs no code from a model repository")
    if not model_flags.get("weights_only", True):
        fail("weights_only stays on: this project loads no pickled code")
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


def settle_checkpointing(settings: Any, model_class: Any) -> None:
    """Switch gradient checkpointing off where the model's class has none. Changes `settings` in place."""
    if settings.gradient_checkpointing and not getattr(model_class, "supports_gradient_checkpointing", True):
        warn(f"--gradient_checkpointing is switched off: {model_class.__name__} has none")
        # Two names of one setting.
        settings.gradient_checkpointing = False
        settings.activation_checkpointing = False


def settle_logging(settings: Any) -> None:
    """No progress bar in a log, and wandb writes to a local folder instead of asking for an account."""
    settings.disable_tqdm = settings.disable_tqdm or not sys.stderr.isatty()
    if "wandb" not in settings.report_to or "WANDB_MODE" in os.environ:
        return

    try:
        import wandb  # training without it needs no wandb
    except ImportError:
        fail("--report_to wandb needs `pip install wandb`; --report_to none trains without it")
    if not wandb.login(prompt=False, verify=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # or it would not read the variable again
        warn("no wandb login: logging offline into wandb/ (upload later with `wandb sync`)")


@contextmanager
def starting(model: str) -> Iterator[None]:
    """Exit with one line where a trainer cannot load its model or cannot be made with these settings."""
    try:
        yield
    except MODEL_ERRORS as error:
        fail(f"cannot train {model!r} with these settings: {why(error)}")


def model_kwargs(settings: Any) -> dict[str, Any]:
    """How TRL is to load the model: its `ModelConfig` leaves that to the script."""
    return {
        "revision": settings.model_revision,
        "attn_implementation": settings.attn_implementation,
        "dtype": settings.dtype,
        **(settings.model_init_kwargs or {}),
    }


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


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there in its full length."""
    try:
        sizes = json.loads((folder / FILE_LIST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


class WholeCheckpoints(Trainer):
    """A trainer whose checkpoints count once the list of their files is there; it is written last."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = str(self.args.output_dir)
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have left one
        self.accelerator.wait_for_everyone()

        # The trainer would delete the older ones before this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
                list_files(folder)
        except WRITE_ERRORS as error:
            shutil.rmtree(folder, ignore_errors=True)
            fail(
                f"cannot write {str(folder)!r} (is the disk full?): {error}; older checkpoints stay, "
                "and --resume_from_checkpoint True goes on from the last"
            )
        self.args.save_total_limit = limit

        if self.is_world_process_zero():
            rotate_checkpoints(
                output_dir,
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


def save_trained(trainer: Trainer, marker: str, finish: Callable[[Path], object] | None = None) -> None:
    """Write the trained model beside the checkpoints, whole or not at all; every process calls this.

    It is written into a folder of its own, where `finish` may change it. Its files then move into place,
    `marker` last: without that file nobody loads the model.
    """
    output_dir = Path(str(trainer.args.output_dir))
    beside = output_dir / ".writing"
    try:
        if trainer.is_world_process_zero():
            shutil.rmtree(beside, ignore_errors=True)  # an interrupted run may have left one
        trainer.accelerator.wait_for_everyone()
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(beside))

        if trainer.is_world_process_zero():
            if finish is not None:
                finish(beside)
            (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            (output_dir / marker).unlink(missing_ok=True)
            for file in sorted(beside.iterdir(), key=lambda file: file.name == marker):
                os.replace(file, output_dir / file.name)
            beside.rmdir()
    except WRITE_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        fail(f"cannot write {str(output_dir)!r} (is the disk full?): {error}")
    trainer.accelerator.wait_for_everyone()
