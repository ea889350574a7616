"""Stages 2 and 3 under SIGKILL, damaged files, wrong settings, and several processes."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import GPT2_large_DPO_tldr
import psutil
import pytest
import tldr_partial_reward_model
import torch
import transformers
from conftest import ROOT, assert_one_error
from forked import Run, run
from safetensors.torch import load_file
from small_disk import small_disk  # noqa: F401
from test_data import refuse
from test_training import PREFIXES, make_prefix_data, read_log
from tldr_partial_reward_model import Settings, make_trainer

from pargs import training
from pargs.training import checkpoint_to_resume, is_whole

REWARD = "partial_reward_training/tldr_partial_reward_model.py"
DPO = "DPO_training/GPT2_large_DPO_tldr.py"
OUTPUT = {REWARD: "partial_reward_modeling_tldr", DPO: "GPT2_large_tldr_DPO"}
WEIGHTS = {REWARD: "model.safetensors", DPO: "adapter_model.safetensors"}
MODULES = {REWARD: tldr_partial_reward_model, DPO: GPT2_large_DPO_tldr}
RESUME = ("--resume_from_checkpoint", "True")


@pytest.fixture(scope="session")
def data(small_models, tmp_path_factory) -> dict[str, Path]:
    """Run directories to copy: what stage 1 leaves, for an encoder and for a causal reward model."""
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("deberta", "gpt2-reward"):
            folders[name] = tmp_path_factory.mktemp(name)
            monkeypatch.chdir(folders[name])
            make_prefix_data(monkeypatch, small_models[name])
    return folders


@pytest.fixture
def here(data, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(data["deberta"], tmp_path / "run"))
    return tmp_path / "run"


def flags_for(script: str, model: str, *more: str, steps: int = 2) -> list[str]:
    flags = ["--model_name_or_path", model, "--report_to", "none", "--gradient_checkpointing", "False"]
    flags += ["--max_steps", str(steps), "--logging_steps", "1", "--learning_rate", "1e-3"]
    flags += ["--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "4"]
    if script == REWARD:
        flags += ["--eval_comparisons", "4", "--eval_entries", "8", "--disable_dropout", "False"]
    return [*flags, *more]


def curve(folder: Path, step: int) -> list[dict]:
    """What was logged at each step of training, but for times and running totals."""
    logs = json.loads((folder / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]
    passing = ("num_tokens", "runtime", "per_second")
    return [{key: log[key] for key in log if not key.endswith(passing)} for log in logs]


def last_step(output: Path) -> int:
    """The highest step that a checkpoint, whole or not, has been begun for."""
    return max((int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*")), default=0)


# Killed


@pytest.mark.slow
@pytest.mark.parametrize(("script", "model", "kills"), [(REWARD, "deberta", 6), (DPO, "gpt2", 4)])
def test_training_killed_at_random_moments_ends_as_if_it_had_not_been(
    data, small_models, tmp_path, script, model, kills
):
    """Weights bit by bit, and every logged number, with dropout on; the order of the data, too."""
    flags = flags_for(script, small_models[model], "--save_steps", "2", steps=40)
    whole, killed = (shutil.copytree(data["deberta"], tmp_path / name) for name in ("whole", "killed"))
    assert run(script, flags, whole)[0] == 0
    output = OUTPUT[script]
    (runtime,) = (log["train_runtime"] for log in read_log(whole / output) if "train_runtime" in log)
    pause = 2 / 40 * runtime

    moments = random.Random(7)
    for _ in range(kills):
        resumed = Run(script, [*flags, *RESUME], killed)
        saved = last_step(killed / output) + 2 * moments.choice([1, 1, 2])
        resumed.wait_until(lambda saved=saved: last_step(killed / output) >= saved)
        assert resumed.kill_after(moments.uniform(0, pause))
    code, said = run(script, [*flags, *RESUME], killed)
    assert code == 0 and "starts from the beginning" not in said, said

    expected, weights = (load_file(folder / output / WEIGHTS[script]) for folder in (whole, killed))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    assert curve(killed / output, 40) == curve(whole / output, 40)
    assert not (killed / output / ".writing").exists()


@pytest.mark.slow
def test_only_a_whole_checkpoint_is_continued(here, small_models):
    """After damage the checkpoint before is used; without any, training starts anew."""
    flags = flags_for(REWARD, small_models["deberta"], "--save_steps", "1", steps=3)
    code, said = run(REWARD, [*flags, *RESUME], here)
    assert code == 0 and "training starts from the beginning" in said

    output = here / OUTPUT[REWARD]
    kept = sorted(folder.name for folder in output.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-3"]  # --save_total_limit
    assert not [*output.rglob("training_args.bin")]
    assert (
        checkpoint_to_resume("True", output) == checkpoint_to_resume("true", output) == str(output / kept[1])
    )
    assert checkpoint_to_resume(None, output) is None is checkpoint_to_resume("False", output)

    os.truncate(output / "checkpoint-3/optimizer.pt", 1000)
    assert checkpoint_to_resume("True", output) == str(output / "checkpoint-2")
    (output / "checkpoint-2/model.safetensors").unlink()
    assert checkpoint_to_resume("True", output) is None

    for folder in (output / "checkpoint-3", here / "nowhere"):
        code, said = run(REWARD, [*flags, "--resume_from_checkpoint", folder], here)
        assert_one_error(code, said, f"error: '{folder}' is no whole checkpoint")


def trainer_that_saves(model: str, **changes):
    trainer = make_trainer(Settings(model, report_to="none", max_steps=1, **changes))
    trainer.create_optimizer_and_scheduler(1)
    return trainer


def test_an_old_checkpoint_is_deleted_only_after_the_new_one_is_whole(here, small_models, monkeypatch):
    """Or a kill between the two would leave nothing, with --save_total_limit 1."""
    trainer = trainer_that_saves(small_models["deberta"], save_total_limit=1)
    delete = training.rotate_checkpoints

    def only_when_whole(output_dir: str, save_total_limit: int | None = None, **options) -> None:
        newest = Path(output_dir, f"checkpoint-{trainer.state.global_step}")
        assert save_total_limit is None or is_whole(newest)
        delete(output_dir, save_total_limit=save_total_limit, **options)

    monkeypatch.setattr(training, "rotate_checkpoints", only_when_whole)
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", only_when_whole)
    for step in (1, 2):
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
    assert [folder.name for folder in here.glob("*/checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_of_the_same_step_is_not_mixed_with_an_earlier_one(here, small_models, monkeypatch):
    trainer = trainer_that_saves(small_models["deberta"])
    trainer._save_checkpoint(trainer.model, None)
    folder = here / OUTPUT[REWARD] / "checkpoint-0"
    assert is_whole(folder)

    # Files of one length, so that a list of sizes could not tell them apart.
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda *_: os._exit(9))
    killed = os.fork()
    if killed == 0:
        try:
            trainer._save_checkpoint(trainer.model, None)
        finally:
            os._exit(1)  # never go on as a second pytest
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == 9
    assert (folder / "model.safetensors").exists() and not is_whole(folder)


@pytest.mark.slow
def test_a_full_disk_is_said_and_keeps_the_older_checkpoints(data, small_models, small_disk):  # noqa: F811
    """Ever larger disks, until all checkpoints and the model fit."""
    flags = flags_for(REWARD, small_models["deberta"], "--save_steps", "1", *RESUME, steps=3)
    size = sum(file.stat().st_size for file in data["deberta"].rglob("*")) // 1024
    failed = set()
    while True:
        size += 250
        disk = small_disk(size)
        output = disk.path / OUTPUT[REWARD]
        shutil.copytree(data["deberta"], disk.path, dirs_exist_ok=True)
        code, said = disk.run(REWARD, flags)
        if not code:
            break
        assert_one_error(code, said, "cannot write", "is the disk full?")
        assert not (output / ".writing").exists()
        saved = sorted(folder.name for folder in output.glob("checkpoint-*"))
        assert all(is_whole(output / folder) for folder in saved) and not (output / "config.json").exists()
        failed.add(tuple(saved))
    assert {(), ("checkpoint-1",)} <= failed
    assert (output / "model.safetensors").exists()


# Bad input


class Code:
    """Pickled, it is an instruction to run something."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def changed(model: str, folder: Path, change: Callable[[Path], object]) -> str:
    change(shutil.copytree(model, folder))
    return str(folder)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def as_pickle(folder: Path, contents: object = None) -> None:
    weights = folder / "model.safetensors"
    torch.save(contents or load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


MODELS = {
    "weights cut short": (lambda folder: cut(folder / "model.safetensors"), "cannot train"),
    "noise for weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 999),
        "cannot train",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "pickle cut short": (
        lambda folder: [as_pickle(folder), cut(folder / "pytorch_model.bin")],
        "cannot train",
    ),
    "configuration cut short": (lambda folder: cut(folder / "config.json"), "cannot load"),
    "tokenizer cut short": (lambda folder: cut(folder / "tokenizer.json"), "cannot load the tokenizer"),
}


@pytest.fixture
def refused(here, call_main) -> Callable[[str, list[str], str], str]:
    """Exit code 2, one error line that holds the message, no traceback, nothing written."""

    def check(script: str, flags: list[str], message: str) -> str:
        said = refuse(call_main, MODULES[script], *flags)
        assert message in said.split("error: ")[1]
        return said

    return check


@pytest.mark.parametrize("case", MODELS)
def test_a_damaged_model_is_refused(refused, small_models, tmp_path, case):
    change, message = MODELS[case]
    for script, model in ((REWARD, "deberta"), (DPO, "gpt2")):
        folder = changed(small_models[model], tmp_path / model, change)
        refused(script, flags_for(script, folder), message)


def test_a_pickle_of_code_is_refused_and_not_run(refused, small_models, tmp_path):
    ran = tmp_path / "ran"
    for script, model in ((REWARD, "deberta"), (DPO, "gpt2")):
        code = {"weight": Code(f"touch {ran}")}
        folder = changed(small_models[model], tmp_path / model, lambda to, code=code: as_pickle(to, code))
        said = refused(script, flags_for(script, folder), "holds more than weights, that is, code")
        assert "weights_only" not in said  # torch says how to run it all the same
    assert not ran.exists()
    torch.load(tmp_path / "gpt2/pytorch_model.bin", weights_only=False)
    assert ran.exists()  # the pickle would have run


@pytest.mark.slow
def test_a_pickle_of_weights_is_read_with_one_warning(here, small_models, tmp_path):
    folder = changed(small_models["deberta"], tmp_path / "pickled", as_pickle)
    code, said = run(REWARD, flags_for(REWARD, folder), here)
    assert code == 0 and said.count("warning: ") == 1
    assert "has no safetensors; of its pickle only weights are read" in said
    assert (here / OUTPUT[REWARD] / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("script", "model", "flags", "message"),
    [
        (REWARD, "nobody/nothing", "", "cannot load 'nobody/nothing'"),  # a hub name, and no network
        (DPO, "deberta", "", "a policy is a causal language model"),
        (DPO, "gpt2-reward", "", "a policy is a causal language model"),
        (REWARD, "deberta", "--nonsense 1", "--nonsense"),
        (DPO, "gpt2", "--max_steps many", "--max_steps"),
        (REWARD, "deberta", "--load_best_model_at_end --save_steps 3", "round multiple"),
        (REWARD, "deberta", "--eval_entries 0", "--eval_entries should be greater than 0, not 0"),
        (DPO, "gpt2", "--per_device_train_batch_size 0", "should be greater than 0, not 0"),
        (DPO, "gpt2", "--learning_rate nan", "--learning_rate should be"),
        (DPO, "gpt2", "--use_peft False", "--use_peft must stay on"),
        (DPO, "gpt2", "--lora_target_modules none", "Target modules none not found"),
        (DPO, "gpt2", "--output_dir /proc/nothing", "'/proc/nothing'"),
        (REWARD, "deberta", "--config missing.yaml", "cannot read the settings of --config: "),
        (DPO, "gpt2", "--config", "--config needs a YAML file"),
        (DPO, "gpt2", "--push_to_hub", "--push_to_hub needs a login"),
        (REWARD, "deberta", "--trust_remote_code", "--trust_remote_code stays off"),
        (DPO, "gpt2", '--model_init_kwargs {"weights_only":false}', "weights_only stays on"),
    ],
)
def test_wrong_settings_are_refused(refused, small_models, script, model, flags, message):
    refused(script, flags_for(script, small_models.get(model, model), *flags.split()), message)


def entries_for_pairs(pairs: Path) -> None:
    """Put the comparisons where the entries should be."""
    shutil.rmtree(pairs.parent / "train")
    shutil.copytree(pairs / "train", pairs.parent / "train")


@pytest.mark.parametrize(
    ("script", "pattern", "damage"),
    [
        (REWARD, f"{PREFIXES}/train/*.arrow", cut),
        (REWARD, f"{PREFIXES}/train/*.arrow", Path.unlink),
        (REWARD, f"{PREFIXES}/pairs/train/*.arrow", cut),
        (REWARD, f"{PREFIXES}/pairs", entries_for_pairs),
        (REWARD, f"{PREFIXES}/processing.json", cut),
        (REWARD, f"{PREFIXES}/processing.json", Path.unlink),
        (DPO, "summarize_from_feedback/train/*.arrow", cut),
        (DPO, "summarize_from_feedback/train", shutil.rmtree),
    ],
)
def test_a_damaged_dataset_is_refused(refused, here, small_models, script, pattern, damage):
    damage(next(here.glob(pattern)))
    model = small_models["deberta" if script == REWARD else "gpt2"]
    refused(script, flags_for(script, model), "make it with `python DataProcess/")


# Several processes


def torchrun(processes: int, flags: list[str], directory: Path) -> subprocess.Popen:
    """Start the reward model's training; what it prints goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    with open(directory / "log", "w") as log:
        return subprocess.Popen(
            [str(part) for part in (*command, ROOT / REWARD, *flags)],
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def flags_of_a_step(model: str, batch: int, micro_batches: int = 1) -> list[str]:
    """The same six rows in each step: `batch` of them on a process at once."""
    flags = flags_for(REWARD, model, "--save_steps", "2", "--disable_dropout", "True", steps=12)
    flags += ["--per_device_train_batch_size", str(batch)]
    return [*flags, "--gradient_accumulation_steps", str(micro_batches), *RESUME]


COUNTS = ("ranked", "same_prefix")


def losses(directory: Path) -> list[float]:
    return [log["loss"] for log in curve(directory / OUTPUT[REWARD], 12) if "loss" in log]


@pytest.mark.slow
def test_loss_does_not_depend_on_the_number_of_processes(data, small_models, tmp_path):
    """A causal model, whose rows hold different numbers of entries; the loss is averaged over all of them.

    Nor on the number of micro-batches: two processes read three each.
    """
    names = ("one", "two", "three")
    one, two, three = (shutil.copytree(data["gpt2-reward"], tmp_path / name) for name in names)
    code, said = run(REWARD, flags_of_a_step(small_models["gpt2-reward"], 6), one)
    assert code == 0 and "(processes: 1)" in said

    assert torchrun(3, flags_of_a_step(small_models["gpt2-reward"], 2), three).wait() == 0
    assert (three / "log").read_text().count("(processes: 3)") == 1  # one process alone prints
    assert len(losses(one)) == 12 and losses(three) == pytest.approx(losses(one), abs=1e-4)
    assert torchrun(2, flags_of_a_step(small_models["gpt2-reward"], 1, micro_batches=3), two).wait() == 0
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "evaluated"), [("deberta", ["--eval_entries", "40"]), ("gpt2-reward", [])])
def test_held_out_numbers_do_not_depend_on_the_number_of_processes(
    data, small_models, tmp_path, model, evaluated
):
    """Seven comparisons, or 40 of their entries, in batches of three: the last batches are filled up."""
    flags = flags_for(REWARD, small_models[model], "--save_steps", "1", "--eval_comparisons", "7", steps=1)
    flags += ["--per_device_eval_batch_size", "3", *evaluated]
    evaluations = []
    for processes in (1, 2, 3):
        folder = shutil.copytree(data[model], tmp_path / f"{processes}")
        assert torchrun(processes, flags, folder).wait() == 0
        log = next(log for log in curve(folder / OUTPUT[REWARD], 1) if "eval_loss" in log)
        ranked, same = (int(log[f"eval_{name}"]) for name in COUNTS)
        said = f"accuracy is that of {ranked} pairs; in {same} more both prefixes are the same"
        assert said in (folder / "log").read_text()
        evaluations.append(log)

    assert evaluations[0]["eval_same_prefix"] > 1
    assert model != "deberta" or sum(evaluations[0][f"eval_{name}"] for name in COUNTS) == 40
    for found in evaluations[1:]:
        # The smallest and the largest reward of a batch are TRL's.
        exact = [
            name for name in found if name.startswith("eval_") and "min_" not in name and "max_" not in name
        ]
        assert {"eval_accuracy", "eval_accuracy_quarter_1", "eval_loss"} <= {*exact}
        for name in exact:
            assert found[name] == pytest.approx(evaluations[0][name], abs=1e-5), name


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_a_rerun_continues(data, small_models, tmp_path):
    one, two = (shutil.copytree(data["deberta"], tmp_path / name) for name in ("one", "two"))
    assert run(REWARD, flags_of_a_step(small_models["deberta"], 6), one)[0] == 0

    launched = torchrun(2, flags_of_a_step(small_models["deberta"], 3), two)
    while last_step(two / OUTPUT[REWARD]) < 4:
        assert launched.poll() is None, (two / "log").read_text()
        time.sleep(0.001)
    children = psutil.Process(launched.pid).children()
    (second,) = (child for child in children if child.environ().get("RANK") == "1")
    second.kill()
    assert launched.wait() != 0 and not any(child.is_running() for child in children)
    assert "(processes: 2)" not in (two / "log").read_text()

    assert torchrun(2, flags_of_a_step(small_models["deberta"], 3), two).wait() == 0
    said = (two / "log").read_text()
    assert said.count("(processes: 2)") == 1 and "starts from the beginning" not in said
    assert len(losses(one)) == 12 and losses(two) == pytest.approx(losses(one), abs=1e-4)
