"""Decoding that is killed, out of disk, given broken files, shared out: nothing lost, nothing silent."""

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import PARGS_baselines
import psutil
import pytest
import run_state
import score_generations
import show_result
import torch
from accelerate import PartialState
from conftest import ROOT, assert_one_error, make_posts, save, write_prompts
from forked import Run, run
from peft import LoraConfig, get_peft_model
from progress import prompt_key
from run_state import collect_rewards, find_work, save_method
from small_disk import small_disk  # noqa: F401
from small_runs import write_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

from pargs import files, runs
from pargs.chat import ChatPrompt, Turn
from pargs.origin import folder_digest
from pargs.runs import Cost, Generation, Method, MethodRecord, read_traces, trace_path, write_methods

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
        assert record.pop("origin")["versions"]["torch"] == torch.__version__
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
def test_ctrl_c_says_how_to_go_on(flags, whole, here):
    started = Run(SCRIPT, flags, here)
    started.wait_until(lambda: bytes_kept(here))
    os.kill(started.process.pid, signal.SIGINT)
    status, output = started.finish()
    assert status == 130 and "Traceback" not in output
    assert output.splitlines()[-1] == (
        "stopped: the same command (without --overwrite) goes on from what is finished"
    )
    assert run(SCRIPT, flags, here)[0] == 0
    assert_same_files(here, whole)


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", ["deberta", "gpt2-reward"])  # the table's own; and one that reads ids
def test_scores_of_generations_are_those_of_the_table(
    flags, copied, decode, call_main, small_models, monkeypatch, tmp_path, evaluator
):
    """Side by side in the result table; what is scored already is not asked for again."""
    model = small_models[evaluator]
    assert decode(*flags, "--evaluation_reward_model", model, "--output_dir", tmp_path / "other")[0] == 0
    expected = pd.read_csv(tmp_path / "other/baseline_results.csv")
    for name in (evaluator, "bert"):
        status, output = call_main(score_generations, "--reward_model", small_models[name])
        assert status == 0 and f"wrote scores_{name}.json: 60 rewards, 0 of them known before" in output, (
            output
        )
    scores = pd.DataFrame(json.loads((copied / f"scores_{evaluator}.json").read_text())["scores"])
    for method in (*METHODS, "reference"):
        of_method = scores[scores["method"] == method].set_index("prompt")["reward"]
        assert list(of_method[expected["prompt"]]) == list(expected[method]), method

    monkeypatch.setattr(show_result, "save_figure", lambda figure, path: None)
    status, output = call_main(show_result)
    table = pd.read_csv("average_reward.csv", index_col="method")
    assert table.loc["PARGS", f"reward_by_{evaluator}"] == pytest.approx(expected["PARGS"].mean())
    head = (copied / "average_reward.md").read_text().splitlines()[0]
    assert f"Reward by {evaluator}" in head and "Reward by bert" in head

    assert decode(*flags, "--pargs_weight", 3)[0] == 0
    _, output = call_main(show_result)
    assert "PARGS: bert has scored" in output  # all but responses that another weight did not change
    _, output = call_main(score_generations, "--reward_model", model)
    changed = int(output.partition(" rewards, ")[2].partition(" of them known")[0])
    assert 48 <= changed < 60

    elsewhere = shutil.copytree(model, copied / "elsewhere" / Path(model).name)
    status, output = call_main(score_generations, "--reward_model", elsewhere)
    assert_one_error(status, output, "name another column with --name")


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


@pytest.fixture
def copied(whole, here) -> Path:
    """The finished run, in the working directory."""
    shutil.copytree(whole, here, dirs_exist_ok=True)
    return here


@pytest.mark.slow
def test_a_result_belongs_to_its_own_settings(flags, whole, copied, decode, small_models, tmp_path):
    """A weight, a seed or a model concerns the methods that have it, and going back gives what was there."""
    before = files_of(copied)
    (copied / "average_reward.md").write_text("of the results that go")
    status, output = decode(*flags, "--pargs_weight", 3)
    assert status == 0 and "PARGS: decoded anew: weight was 2.0, is 3.0" in output, output
    assert output.count("done before") == 3 and not (copied / "average_reward.md").exists()
    changed = {name for name, content in files_of(copied).items() if content != before[name]}
    assert changed == {"generation_pargs.json", "trace_pargs.jsonl", "baseline_results.csv", "methods.json"}

    status, output = decode(*flags, "--pargs_weight", 3, "--seed", 1)
    assert output.count("decoded anew: seed was 42, is 1") == 3 and "ARGS: done before" in output
    assert {record["seed"] for record in json.loads((copied / "methods.json").read_text()).values()} == {1}
    assert decode(*flags)[0] == 0
    assert_same_files(copied, whole)

    guide = shutil.copytree(small_models["gpt2-reward"], tmp_path / "guide")
    flags = [*flags, "--partial_reward_model", str(guide)]
    assert decode(*flags)[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(guide)
    model.score.weight.data += 1
    model.save_pretrained(guide)
    status, output = decode(*flags, "--methods", "TOP-K")
    assert status == 0 and "left out" not in output, output  # that model is not of this launch
    status, output = decode(*flags)
    assert f"PARGS: decoded anew: the model {str(guide)!r} was trained anew or replaced" in output
    assert output.count("done before") == 3


@pytest.mark.slow
def test_more_prompts_keep_those_that_are_done(flags, whole, here, decode):
    """And fewer take nothing away."""
    assert decode(*flags, "--num_prompts", 5)[0] == 0
    status, output = decode(*flags)
    assert status == 0 and output.count("7 of 12 prompts are decoded, the others are kept") == 4, output
    assert json.loads((here / "methods.json").read_text())["ARGS"]["cost"]["responses"] == 7
    assert_same_files(here, whole)
    (here / "trace_args.jsonl").unlink()
    status, output = decode(*flags)
    assert "ARGS: --trace decodes 12 prompts anew: their candidates were not kept" in output
    assert_same_files(here, whole)

    status, output = decode(*flags, "--num_prompts", 2)
    assert status == 0 and output.count("done before") == 4 and "baseline_results.csv: 2 prompts" in output
    assert decode(*flags)[0] == 0
    assert_same_files(here, whole)


@pytest.mark.slow
@pytest.mark.parametrize("evaluator", ["bert", "gpt2-reward"])  # by text, and by the policy's ids
def test_another_evaluator_scores_and_decodes_nothing(
    flags, copied, decode, small_models, tmp_path, monkeypatch, evaluator
):
    flags = [*flags, "--evaluation_reward_model", small_models[evaluator]]
    fresh = tmp_path / "fresh"
    assert decode(*flags, "--output_dir", fresh)[0] == 0
    monkeypatch.setattr(PARGS_baselines, "decode_method", None)
    status, output = decode(*flags)
    assert status == 0 and output.count("12 responses are scored again") == 4, output
    assert_same_files(copied, fresh, costs=True)


@pytest.mark.slow
def test_no_table_mixes_settings(flags, copied, decode, monkeypatch):
    """A method of another k, or without some of the prompts, is left out; a command brings it in."""
    status, output = decode(*flags, "--methods", "args", "--k", 4)
    assert status == 0 and "left out: PARGS: k is 5, not 4" in output, output
    assert header(copied) == ["prompt", "ARGS", "reference"]
    (command,) = [line for line in output.splitlines() if line.startswith("to decode them so: ")]
    _, _, *arguments = shlex.split(command.removeprefix("to decode them so: "))
    assert decode(*arguments)[0] == 0
    assert header(copied) == ["prompt", *METHODS, "reference"]

    assert decode(*flags, "--methods", "TOP-K", "--num_prompts", 5, "--overwrite")[0] == 0
    status, output = decode(*flags, "--methods", "ARGS")
    assert "left out: TOP-K: 7 of 12 prompts are not decoded" in output
    assert "left out: PARGS: k is 4, not 5" in output
    assert header(copied) == ["prompt", "ARGS", "reference"]


def header(directory: Path) -> list[str]:
    return (directory / "baseline_results.csv").read_text().splitlines()[0].split(",")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "again"), [("PARGS", True), ("PARGS", False), ("TOP-K", False)])
def test_a_run_stopped_while_it_saves_is_whole_after_the_next(
    flags, whole, copied, decode, small_models, tmp_path, monkeypatch, method, again
):
    """Between any two files, where results of another weight and evaluator lie already."""
    others = [*flags, "--pargs_weight", 3, "--evaluation_reward_model", small_models["bert"]]
    others += ["--methods", method]
    fresh = shutil.copytree(whole, tmp_path / "fresh")
    monkeypatch.chdir(fresh)
    assert decode(*others)[0] == 0
    monkeypatch.chdir(copied)

    write_text, stops = run_state.write_text, 0
    for last in range(1, 8):
        written = []

        def stop_at_last(path: Path, text: str, last=last, written=written) -> None:
            written.append(path)
            if len(written) == last:
                raise KeyboardInterrupt
            write_text(path, text)

        with monkeypatch.context() as patch:
            for module in (files, run_state, runs):
                patch.setattr(module, "write_text", stop_at_last)
            try:
                decode(*others)
            except KeyboardInterrupt:
                stops += 1
        assert decode(*(others if again else flags))[0] == 0
        assert_same_files(copied, fresh if again else whole)
        shutil.copytree(whole, copied, dirs_exist_ok=True)
    assert stops >= 5


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
    record = MethodRecord(
        method=method,
        k=5,
        max_new_tokens=8,
        reference_policy="base",
        evaluator="judge",
        cost=cost,
        models={"base": "1", "judge": "2"},
    )
    shared = {"k": 5, "max_new_tokens": 8, "evaluator": "judge", "models": record.models, "seed": None}
    for name in ("ARGS", "TOP-K"):
        save_method(name, rows, {}, record, ["ARGS", "TOP-K"])
    table, _ = collect_rewards(["ARGS", "TOP-K"], ["p"], [None], shared)
    assert list(table) == ["prompt", "ARGS", "TOP-K", "reference"]

    write_methods({"TOP-K": record})
    table, _ = collect_rewards(["ARGS", "TOP-K"], ["p"], [None], shared)
    assert list(table) == ["prompt", "TOP-K", "reference"]
    PartialState(cpu=True)
    work = find_work(dict.fromkeys(["ARGS", "TOP-K"], record), set(), ["p"], Path())
    assert [name for name in work if not work[name].is_done] == ["ARGS"]

    # Of a prompt that comes twice, stage 5 looks for two traces.
    step = {"tokens": ["r"], "log_probs": [0.0], "rewards": [1.0], "chosen": 0}
    save_method("ARGS", rows * 2, {"p": [step]}, record, ["ARGS", "TOP-K"])
    assert [trace.prompt for trace in read_traces(trace_path("ARGS"))] == ["p", "p"]


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


def test_a_text_and_a_conversation_that_reads_like_it_are_two_prompts():
    turn = {"role": "user", "content": "Why?", "before": "<user>", "special_ids": [1]}
    prompt = ChatPrompt([Turn(**turn)])
    assert prompt == "<user>Why?" and prompt_key(prompt) != prompt_key("<user>Why?")
    assert prompt_key(ChatPrompt([Turn(**turn)])) == prompt_key(prompt)


def test_a_model_of_which_little_was_trained_anew_is_another(tmp_path):
    """A few bytes, anywhere in a large file."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    digests = {folder_digest(str(tmp_path))}
    for at in (0, 3 << 20, (5 << 20) - 1):
        weights.write_bytes(bytes(at) + b"\1" + bytes((5 << 20) - at - 1))
        digests.add(folder_digest(str(tmp_path)))
    assert len(digests) == 4
