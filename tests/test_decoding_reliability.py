"""Decoding that is killed, out of disk, given broken files, shared out: nothing lost, nothing silent."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import PARGS_baselines
import psutil
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, assert_one_error, make_posts, save, write_prompts
from forked import Run, run
from peft import LoraConfig, get_peft_model
from run_state import collect_rewards, methods_left, save_method
from small_disk import small_disk  # noqa: F401
from small_runs import write_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from pargs.runs import Cost, Generation, Method, MethodRecord, write_methods

SCRIPT = "PARGS_decode/PARGS_baselines.py"
METHODS = ["ARGS", "PARGS", "BESTN", "TOP-K"]


@pytest.fixture(scope="module")
def flags(small_models, tmp_path_factory) -> list[str]:
    """Twelve prompts in four methods, an encoder and a causal guide, a few prompts a wave."""
    path, posts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", make_posts(12, 3)
    write_prompts(path, [f"POST: {post}\nTL;DR:" for post, *_ in posts], [f" {good}" for _, good, _ in posts])
    models = {"policy": "gpt2", "full_reward_model": "deberta", "partial_reward_model": "gpt2-reward"}
    models |= {"dpo_policy": "gpt2", "ppo_policy": "llama"}
    named = [part for role, name in models.items() for part in (f"--{role}", small_models[name])]
    return [
        *("--prompts", str(path), "--methods", *METHODS, *named),
        *("--max_new_tokens", "8", "--k", "5", "--best_of", "3", "--cache_gb", "0.0001", "--trace"),
    ]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """The directory of a run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    directory.mkdir()
    status, output = run(SCRIPT, flags, directory)
    assert status == 0, output
    return directory


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty run directory, the working directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def decode(call_main) -> Callable:
    """Run the script in this process, in the working directory."""
    return partial(call_main, PARGS_baselines)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_files(directory: Path, whole: Path, costs: bool = False) -> None:
    """Byte for byte, but for the numbers of a trace, which are not the last word of a file's rewards.

    What each launch cost is compared where nothing was interrupted, all but the seconds.
    """
    ours, theirs = files_of(directory), files_of(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "methods.json":
            assert read_records(ours[name], costs) == read_records(theirs[name], costs)
        elif name.startswith("trace"):
            (our_choices, our_numbers), (choices, numbers) = read_trace(ours[name]), read_trace(theirs[name])
            assert our_choices == choices and our_numbers == pytest.approx(numbers, abs=2e-4), name
        else:
            assert ours[name] == theirs[name], name


def read_records(content: bytes, costs: bool) -> list[tuple[str, dict]]:
    """What a run says of its methods, in order."""
    records = json.loads(content)
    for record in records.values():
        assert record["cost"].pop("seconds") >= 0 and record["cost"].pop("peak_gb") > 0
        if not costs:
            del record["cost"]
    return list(records.items())


def read_trace(content: bytes) -> tuple[list[dict], list[float]]:
    """The traces of a method without their numbers, and the numbers."""
    traces = [json.loads(line) for line in content.splitlines()]
    steps = [step for trace in traces for step in trace["steps"]]
    return traces, [value for step in steps for name in ("log_probs", "rewards") for value in step.pop(name)]


def bytes_kept(directory: Path) -> int:
    """How much a run has put down; it grows until the run has ended."""
    total = 0
    for path in directory.glob("generation_*"):
        with contextlib.suppress(FileNotFoundError):  # progress goes as results come
            total += max(0, path.stat().st_size - 1)  # a progress file begins with an empty line
    return total


def kill_once_something_is_kept(flags: list[str], directory: Path) -> None:
    started = Run(SCRIPT, flags, directory)
    started.wait_until(lambda: bytes_kept(directory))
    started.kill_after(0)


# Kills


@pytest.mark.slow
def test_killed_runs_end_in_the_files_of_one_that_never_was(flags, whole, tmp_path):
    """Twenty SIGKILLs at random moments; whatever was finished before one is not decoded again."""
    assert {f"generation_{name}.json" for name in ("args", "pargs", "bestn", "top_k")} <= {*files_of(whole)}
    moments = random.Random(0)
    kills = runs = went_on = 0
    directory = tmp_path / "0"
    directory.mkdir()
    while kills < 20:
        seen = bytes_kept(directory)
        started = Run(SCRIPT, flags, directory)
        # Every other one is sure to have decoded something.
        while kills % 2 and bytes_kept(directory) == seen and started.process.is_alive():
            time.sleep(0.005)
        if started.kill_after(moments.uniform(0, 1)):
            kills += 1
            went_on += bytes_kept(directory) > 0
        else:
            assert started.finish()[0] == 0, started.finish()[1]
            assert_same_files(directory, whole)
            runs += 1
            directory = tmp_path / str(runs)
            directory.mkdir()

    assert run(SCRIPT, flags, directory)[0] == 0
    assert_same_files(directory, whole)
    assert went_on >= 10


@pytest.mark.slow
def test_what_is_finished_is_not_decoded_again(flags, whole, here):
    """A line that was altered comes through: it was read, not decoded anew; a torn one is decoded again."""
    started = Run(SCRIPT, flags, here)
    progress = here / "generation_args.progress-0.jsonl"
    started.wait_until(lambda: progress.exists() and progress.read_bytes().count(b"\n") >= 3)
    started.kill_after(0)

    lines = [line for line in progress.read_text().splitlines() if '"ids"' in line]
    altered, torn = json.loads(lines[0]), lines[1]
    altered["ids"] = altered["ids"][:1]
    progress.write_text(json.dumps(altered) + "\nnot json\n[]\n" + torn[: len(torn) // 2])

    assert run(SCRIPT, flags, here)[0] == 0
    ours, theirs = (json.loads((folder / "generation_args.json").read_text()) for folder in (here, whole))
    differing = [at for at in range(len(ours)) if ours[at] != theirs[at]]
    assert len(differing) == 1 and ours[differing[0]]["num_tokens"] == 1
    assert not list(here.glob("*.progress-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "kept"), [(["--methods", "ARGS"], True), (["--trace", "False"], False)])
def test_more_methods_keep_what_was_finished_but_no_trace_begins_in_the_middle(flags, here, first, kept):
    kill_once_something_is_kept([*flags, *first], here)
    status, output = run(SCRIPT, flags, here)
    assert status == 0 and ("responses kept from an earlier run" in output) == kept, output
    traces = [json.loads(line) for line in (here / "trace_args.jsonl").read_text().splitlines()]
    assert len(traces) == 12 and all(trace["steps"] for trace in traces)


@pytest.mark.slow
def test_other_settings_or_a_retrained_model_are_refused(flags, small_models, here, decode, tmp_path):
    guide = shutil.copytree(small_models["gpt2-reward"], tmp_path / "guide")
    flags = [*flags, "--partial_reward_model", str(guide)]
    kill_once_something_is_kept(flags, here)
    before = files_of(here)

    assert_one_error(*decode(*flags, "--k", 4), "k (was 5, is 4)", "--overwrite")
    assert_one_error(*decode(*flags, "--policy", small_models["llama"]), "policy (was")
    model = AutoModelForSequenceClassification.from_pretrained(guide)
    model.score.weight.data += 1
    model.save_pretrained(guide)
    assert_one_error(*decode(*flags), f"the model {str(guide)!r} (it was trained anew or replaced)")
    assert files_of(here) == before


@pytest.mark.slow
def test_a_finished_method_is_left_alone_until_overwrite(flags, whole, tmp_path):
    """Also where a kill came between writing the results and dropping the progress."""
    directory = shutil.copytree(whole, tmp_path / "run")
    (directory / "generation_args.progress-2.jsonl").write_text("\n")
    assert run(SCRIPT, flags, directory)[0] == 0
    assert_same_files(directory, whole, costs=True)

    path = directory / "generation_args.json"
    altered = json.loads(path.read_text())
    altered[0]["result"] = " altered"
    path.write_text(json.dumps(altered))
    status, output = run(SCRIPT, flags, directory)
    assert status == 0 and "ARGS: done before" in output
    assert json.loads(path.read_text())[0]["result"] == " altered"

    path.write_text(path.read_text()[:-30])  # what is not whole is no result
    assert run(SCRIPT, flags, directory)[0] == 0
    assert_same_files(directory, whole)

    path.write_text(json.dumps(altered))
    assert run(SCRIPT, [*flags, "--overwrite"], directory)[0] == 0
    assert_same_files(directory, whole, costs=True)

    (directory / "methods.json").write_text("{")  # nor is one of which nothing is known
    status, output = run(SCRIPT, flags, directory)
    assert status == 0 and "done before" not in output
    assert_same_files(directory, whole)


def test_results_without_a_record_are_in_no_table(tmp_path, monkeypatch):
    """They are of an older version, or of models that nobody can tell from those of today."""
    monkeypatch.chdir(tmp_path)
    rows = [Generation(prompt="p", result=" r", reward=1.0, num_tokens=1, finish_reason="length")]
    cost = Cost(responses=1, seconds=1, tokens=1, reward_calls=0, reward_tokens=0)
    method = Method(policy="base")
    record = MethodRecord(method=method, k=5, max_new_tokens=8, reference_policy="base", cost=cost)
    for name in ("ARGS", "TOP-K"):
        save_method(name, rows, None, record, ["ARGS", "TOP-K"])
    assert list(collect_rewards(["ARGS", "TOP-K"], ["p"], [None])) == ["prompt", "ARGS", "TOP-K", "reference"]

    write_methods({"TOP-K": record})
    assert list(collect_rewards(["ARGS", "TOP-K"], ["p"], [None])) == ["prompt", "TOP-K", "reference"]
    PartialState(cpu=True)
    assert methods_left(["ARGS", "TOP-K"], set(), ["p"]) == ["ARGS"]


@pytest.mark.slow
def test_a_full_disk_ends_in_one_message_and_keeps_what_was_finished(flags, whole, small_disk):  # noqa: F811
    disk = small_disk(400)
    # The last page is given up now and then, until everything fits.
    filler = disk.path / "filler"
    filler.write_bytes(b"x" * 1024 * 380)
    stops = 0
    for room in range(20, 400, 20):
        status, output = disk.run(SCRIPT, flags)
        if status == 0:
            break
        assert_one_error(status, output, "No space left on device")
        assert all(json.loads(path.read_text()) for path in disk.path.glob("generation_*.json"))
        stops += 1
        with open(filler, "r+b") as file:
            file.truncate(1024 * (380 - room))
    filler.unlink()
    assert stops >= 3
    assert_same_files(disk.path, whole)


# Many processes


def launch(processes: int, flags: list[str], directory: Path) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *launcher, ROOT / SCRIPT, *flags],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(launched: subprocess.Popen) -> str:
    output, _ = launched.communicate()
    assert launched.returncode == 0, output
    return output


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_files_also_after_one_died(flags, whole, here, tmp_path):
    """Three; three, of which one is killed; and two that go on from there."""
    together = tmp_path / "together"
    together.mkdir()
    assert finish(launch(3, flags, together)).count("3 processes; mean rewards") == 1
    assert_same_files(together, whole, costs=True)

    launched = launch(3, flags, here)
    while not (here / "generation_pargs.progress-2.jsonl").exists():
        assert launched.poll() is None, launched.stdout.read()
        time.sleep(0.005)
    ranks = [child for child in psutil.Process(launched.pid).children() if "--prompts" in child.cmdline()]
    assert len(ranks) == 3
    ranks[1].kill()
    output, _ = launched.communicate()
    assert launched.returncode not in (0, None) and "SIGKILL" in output
    assert not any(rank.is_running() for rank in ranks)

    output = finish(launch(2, flags, here))
    assert "ARGS: done before" in output and output.count("2 processes; mean rewards") == 1
    assert_same_files(here, whole)


# Broken models and input


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def give_two_labels(folder: Path) -> None:
    changes = {"num_labels": 2, "ignore_mismatched_sizes": True}
    AutoModelForSequenceClassification.from_pretrained(folder, **changes).save_pretrained(folder)


def make_infinite(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data[:] = torch.inf
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("flag", "name", "damage", "said"),
    [
        ("--policy", "gpt2", cut_weights, ["cannot load the policy", "model-gpt2"]),
        ("--full_reward_model", "deberta", cut_weights, ["cannot load the weights", "model-deberta"]),
        ("--full_reward_model", "bert", give_two_labels, ["has 2 labels"]),
        (
            "--full_reward_model",
            "gpt2",
            lambda folder: None,
            ["no trained reward model: it is a GPT2LMHeadModel"],
        ),
        ("--evaluation_reward_model", "gpt2-reward", make_infinite, ["a reward of", "the prompt 'POST:"]),
    ],
)
def test_unusable_models_are_named(flags, small_models, here, decode, tmp_path, flag, name, damage, said):
    folder = Path(shutil.copytree(small_models[name], tmp_path / f"model-{name}"))
    damage(folder)
    assert_one_error(*decode(*flags, "--methods", "ARGS", flag, folder), *said)
    assert not list(here.glob("generation_*.json"))


def test_an_adapter_of_another_model_is_refused(flags, small_models, here, decode, tmp_path):
    """Of a deeper one, whose lowest layers it fits."""
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2"])
    model = AutoModelForCausalLM.from_pretrained(small_models["gpt2"])
    deeper = AutoModelForCausalLM.from_config(GPT2Config(**model.config.to_diff_dict() | {"n_layer": 3}))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.peft_config["default"].base_model_name_or_path = save(deeper, tokenizer, tmp_path / "deeper")
    adapter = save(adapted, tokenizer, tmp_path / "adapter")
    refused = decode(*flags, "--dpo_policy", adapter, "--methods", "DPO")
    assert_one_error(*refused, "cannot load the policy")


class Opens:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_read_as_weights_alone(flags, small_models, here, decode, tmp_path):
    folder = Path(shutil.copytree(small_models["gpt2"], tmp_path / "pickled"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    flags = [*flags, "--policy", folder, "--methods", "TOP-K"]
    status, output = decode(*flags)
    assert status == 0, output
    assert output.count("of its pickle only weights are read") == 1

    torch.save({"lm_head.weight": Opens(tmp_path / "sentinel")}, folder / "pytorch_model.bin")
    assert_one_error(*decode(*flags, "--overwrite"), "its pickle is damaged or holds more than weights")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--magic", "unknown arguments: --magic"),
        ("--methods MAGIC", "--methods knows ARGS, PARGS-G"),
        ("--k many", "--k: invalid int value: 'many'"),
        ("--k 0", "--k should be greater than 0"),
        ("--dtype int3", "invalid choice: 'int3'"),
        ("--num_prompts -1", "--num_prompts should be greater than or equal to 0"),
        ("--args_weight nan", "--args_weight should be a finite number"),
        ("--k 100000", "--k 100000 is more than the"),
        ("--device_map auto", "--device_map spreads a policy over all GPUs: start one process"),
    ],
)
def test_a_bad_flag_is_one_line(flags, here, decode, monkeypatch, flag, said):
    if "--device_map" in flag:
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_error(*decode(*flags, *flag.split()), said)
    assert not list(here.iterdir())


def test_a_limit_beyond_the_policy_is_one_line(flags, here, decode):
    refused = decode(*flags, "--methods", "TOP-K", "--max_new_tokens", 300)
    assert_one_error(*refused, "no prompt fits beside --max_new_tokens")


def test_a_truncated_dataset_is_named_with_its_command(flags, here, decode):
    write_dataset(here, test=[{"prompt": f"p{at}", "reference": f" r{at}"} for at in range(50)])
    (arrow,) = here.rglob("*.arrow")
    os.truncate(arrow, arrow.stat().st_size - 300)
    assert_one_error(*decode(*flags[2:]), "python DataProcess/tldr_data_process.py")


@pytest.mark.slow
def test_extreme_prompts_are_decoded(flags, here, decode):
    """Huge, foreign, full of special tokens, all the same: what does not fit loses its beginning, counted."""
    posts = ["long " * 20_000, "Мой сосед 我的邻居 😀🏳️‍🌈", "<|endoftext|> [SEP] [CLS] <sep>" * 3]
    posts += ["a" * 100_000, "\x00\u202e"]
    prompts = [f"POST: {post}\nTL;DR:" for post in posts]
    write_prompts(here / "prompts.jsonl", prompts, [f" {post}" for post in posts])
    status, output = decode(*flags, "--prompts", "prompts.jsonl")
    assert status == 0, output
    assert "2 prompts are longer than" in output and "reference: 2 pairs are longer than" in output
    results = json.loads((here / "generation_args.json").read_text())
    assert len(results) == len(posts) and all(row["num_tokens"] for row in results)
