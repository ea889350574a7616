"""What both training scripts share: flags, precision, logging, checkpoints that are whole, and saving."""

import json
import os
import shutil
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import torch
from httpx import HTTPError
from huggingface_hub import get_token, upload_folder
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from trl import TrlParser
from yaml import YAMLError

from pargs.cli import HelpFormatter, check_values, fail, is_main, warn
from pargs.model_card import TRAINING_LOG, Training, write_card
from pargs.models import MODEL_ERRORS, why
from pargs.processes import hide_bars_in_logs

# The libraries warn each other of names that they rename next; there is nothing to do about it here.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

OLD_FLAGS = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_remove_unused_columns": "--remove_unused_columns=False",
    "--torch_dtype": "--dtype",
}
SECRET = ("hub_token", "model_init_kwargs")  # may hold a token: they stand in no card
FILE_LIST = "whole.json"
ACCURACIES = ("accuracy", "rewards/accuracies")  # of the reward trainer, of the DPO trainer
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, in three libraries

T = TypeVar("T")


class TrainingParser(TrlParser):
    """A script's settings come first in its help, TRL's hundred others after them."""

    def __init__(self, kind: type, description: str | None):
        kinds: Any = (kind,)
        usage = "%(prog)s [--help] [--config SETTINGS.yaml] [--SETTING VALUE ...]"
        super().__init__(kinds, usage=usage, description=description, formatter_class=HelpFormatter)
        self.usual = dict(vars(super().parse_known_args([])[0]))

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """As in `HfArgumentParser`, in two groups."""
        kinds, own = get_type_hints(dtype), dtype.__annotations__
        known = {field.name: field for field in fields(dtype) if field.init}
        others = [name for name in known if name not in own]
        for title, names in (("settings of this script", own), ("settings that TRL's trainer knows", others)):
            group = self.add_argument_group(title)
            for name in names:
                known[name].type = kinds[name]
                self._parse_dataclass_field(group, known[name])  # type: ignore

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keeps what was parsed: TRL's settings change each other once they are made."""
        parsed, rest = super().parse_known_args(args, namespace)
        self.parsed = dict(vars(parsed))  # of which HfArgumentParser takes things out
        return parsed, rest

    def stated(self, kind: type) -> dict[str, Any]:
        """The script's own settings, and those of TRL that are not as usual; no secret."""
        own = {name: self.parsed[name] for name in kind.__annotations__}
        others = {name: value for name, value in self.parsed.items() if value != self.usual[name]}
        return {name: value for name, value in (own | others).items() if name not in SECRET}

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see --help")

    def print_help(self, file: Any = None) -> None:
        if is_main():
            super().print_help(file)


def parse_settings(kind: type[T], description: str | None) -> tuple[T, dict[str, Any]]:
    """The settings that the command line gives, and as they were stated; exits where one cannot be."""
    hide_bars_in_logs()
    parser = TrainingParser(kind, description)
    arguments = rename_old_flags(sys.argv[1:])
    if arguments[-1:] == ["--config"]:
        fail("--config needs a YAML file of settings")
    try:
        (settings,) = parser.parse_args_and_config(arguments)
    except (OSError, YAMLError) as error:
        fail(f"cannot read the settings of --config: {error}")
    except (ValueError, TypeError, ArgumentTypeError) as error:  # TRL's settings look at each other
        fail(str(error))
    check_values(settings)

    model_flags = settings.model_init_kwargs or {}
    if settings.trust_remote_code or model_flags.get("trust_remote_code"):
        fail("--trust_remote_code stays off: this project runs no code from a model repository")
    if not model_flags.get("weights_only", True):
        fail("weights_only stays on: this project loads no pickled code")
    return settings, parser.stated(kind)


def rename_old_flags(arguments: list[str]) -> list[str]:
    """Replace the flags of older releases by what they became, with one line for each."""
    renamed = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in OLD_FLAGS:
            warn(f"{flag} became {OLD_FLAGS[flag]}")
            argument = OLD_FLAGS[flag] + equals + value
        # TRL knows `--config FILE` alone.
        renamed += [flag, value] if flag == "--config" and equals else [argument]
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
    """No progress bar in a log, and no tracker that is not there."""
    settings.disable_tqdm = settings.disable_tqdm or not sys.stderr.isatty()
    if "wandb" in settings.report_to and find_spec("wandb") is None:
        fail("--report_to wandb needs `pip install wandb`; --report_to none trains without it")


def settle_hub(settings: Any) -> None:
    """Exit where a trained model could not be uploaded; it is uploaded once, when it is whole."""
    if settings.push_to_hub and not (settings.hub_token or get_token()):
        fail("--push_to_hub needs a login: `hf auth login`, or HF_TOKEN in the environment")
    settings.hub_strategy = HubStrategy.END


def start_tracking(settings: Any) -> None:
    """wandb, imported where it reports alone, writes to a local folder instead of asking for an account."""
    if "wandb" not in settings.report_to or "WANDB_MODE" in os.environ or not is_main():
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # or it would not read the variable again
        warn("no wandb login: logging offline into wandb/ (upload later with `wandb sync`)")


def short_line(logs: dict[str, float], state: TrainerState) -> str | None:
    """Loss, accuracy and learning rate of one log; None for the sums of the end. The log file has all."""
    kind = "eval_" if "eval_loss" in logs else ""
    if f"{kind}loss" not in logs:
        return None
    shown = [f"{'held-out ' * bool(kind)}loss {logs[f'{kind}loss']:.3f}"]
    shown += [f"accuracy {logs[kind + name]:.3f}" for name in ACCURACIES if kind + name in logs]
    if "learning_rate" in logs:
        shown.append(f"learning rate {logs['learning_rate']:.2e}")
    return f"step {state.global_step:>5} of {state.max_steps}: {', '.join(shown)}"


class PrintedLog(PrinterCallback):
    """A line for each log, where no terminal shows a bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := short_line(logs or {}, state)):
            print(line, flush=True)


class LogAboveBar(ProgressCallback):
    """A line for each log, above the bar of a terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (line := short_line(logs or {}, state)):
            tqdm.write(line)


@contextmanager
def starting(model: str) -> Iterator[None]:
    """Exit with one line where a trainer cannot load its model or cannot be made with these settings."""
    try:
        yield
    except (*MODEL_ERRORS, HTTPError) as error:  # of the hub, where --push_to_hub makes a repository
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

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for theirs, ours in ((PrinterCallback, PrintedLog), (ProgressCallback, LogAboveBar)):
            if self.pop_callback(theirs):
                self.add_callback(ours)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None beside a checkpoint: `save_trained` writes the card, with the model."""

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


def evaluate_at_end(trainer: Trainer) -> None:
    """The held-out figures of the model that is saved, where the trainer has not just taken them."""
    taken = {log["step"] for log in trainer.state.log_history if "eval_loss" in log}
    if trainer.state.global_step not in taken or trainer.args.load_best_model_at_end:
        trainer.evaluate()


def save_trained(
    trainer: Trainer, marker: str, training: Training, finish: Callable[[Path], object] | None = None
) -> None:
    """Write the trained model, its card and its log beside the checkpoints, whole or not at all.

    Every process calls this. It is written into a folder of its own, where `finish` may change it. Its files
    then move into place, `marker` last: without that file nobody loads the model.
    """
    output_dir = Path(str(trainer.args.output_dir))
    beside = output_dir / ".writing"
    try:
        if trainer.is_world_process_zero():
            shutil.rmtree(beside, ignore_errors=True)  # an interrupted run may have left one
        trainer.accelerator.wait_for_everyone()
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(beside), _internal_call=True)  # else --push_to_hub would upload it now

        if trainer.is_world_process_zero():
            if finish is not None:
                finish(beside)
            (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            (beside / "README.md").write_text(write_card(trainer, training), encoding="utf-8")
            lines = (json.dumps(log) + "\n" for log in trainer.state.log_history)
            (beside / TRAINING_LOG).write_text("".join(lines))
            (output_dir / marker).unlink(missing_ok=True)
            for file in sorted(beside.iterdir(), key=lambda file: file.name == marker):
                os.replace(file, output_dir / file.name)
            beside.rmdir()
    except WRITE_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        fail(f"cannot write {str(output_dir)!r} (is the disk full?): {error}")
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        upload(trainer, output_dir)
    trainer.accelerator.wait_for_everyone()


def upload(trainer: Trainer, folder: Path) -> None:
    """Upload the model as it is; the trainer's `push_to_hub` would write an adapter beside a merged one."""
    try:
        upload_folder(
            repo_id=str(trainer.hub_model_id),
            folder_path=folder,
            commit_message="End of training",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
            ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", ".*"],
        )
    except (HTTPError, OSError, ValueError) as error:  # the network, the hub, and what it cannot take
        fail(f"the model is whole in {str(folder)!r}, but it cannot be uploaded: {error}")
