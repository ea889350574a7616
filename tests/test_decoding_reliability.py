"""Decoding that is killed, out of disk, given broken files, shared out: nothing lost, nothing silent."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, make_posts, save
from forked import Run, run
from peft import LoraConfig, get_peft_model
from progress import Progress
from small_disk import small_disk  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SCRIPT = "PARGS_decode/PARGS_baselines.py"
METHODS = ["ARGS", "PARGS", "BESTN", "TOP-K"]


@pytest.fixture
def flags(small_models, tmp_path) -> list[str]:
    """Twelve prompts in four methods, an encoder and a causal guide, a few prompts a wave."""
    with open(tmp_path / "prompts.jsonl", "w") as file:
        for post, good, _ in make_posts(12, 3):
            file.write(json.dumps({"prompt": f"POST: {post}\nTL;DR:", "reference": " " + good}) + "\n")
    models = {
        "policy": "gpt2",
        "full_reward_model": "deberta",
        "partial_reward_model": "gpt2-reward",
        "dpo_policy": "gpt2",
        "ppo_policy": "llama",
    }
    named = [part for role, name in models.items() for part in (f"--{role}", small_models[name])]
    return [
        *("--prompts", str(tmp_path / "prompts.jsonl"), "--methods", *METHODS, *named),
        *("--max_new_tokens", "8", "--k", "5", "--best_of", "3", "--cache_gb", "0.0001", "--trace"),
    ]


def make_directory(path: Path) -> Path:
    path.mkdir()
    return path


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_files(directory: Path, whole: Path) -> None:
    """Byte for byte, but for the numbers of a trace, which are not the last word of a file's rewards."""
    ours, theirs = files_of(directory), files_of(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.startswith("trace"):
            assert ours[name] == theirs[name], name
            continue
        for our_line, their_line in zip(ours[name].splitlines(), theirs[name].splitlines(), strict=True):
            our_prompt, their_prompt = json.loads(our_line), json.loads(their_line)
            assert our_prompt["prompt"] == their_prompt["prompt"]
            for our_step, their_step in zip(our_prompt["steps"], their_prompt["steps"], strict=True):
                assert our_step["tokens"] == their_step["tokens"]
                assert our_step["chosen"] == their_step["chosen"]
                for numbers in ("log_probs", "rewards"):
                    assert our_step[numbers] == pytest.approx(their_step[numbers], abs=2e-4)


def replace_flag(flags: list[str], name: str, value: str) -> list[str]:
    at = flags.index(name)
    return [*flags[: at + 1], value, *flags[at + 2 :]]


def assert_refused(done: tuple[int, str], *said: str) -> None:
    status, output = done
    assert status == 2, output
    assert "Traceback" not in output and output.count("error:") == 1
    for text in said:
        assert text in output


def bytes_kept(directory: Path) -> int:
    """How much a run has put down; it grows until the run has ended."""
    total = 0
    for path in directory.glob("generation_*"):
        with contextlib.suppress(FileNotFoundError):  # progress goes as results come
            total += max(0, path.stat().st_size - 1)  # a progress file begins with an empty line
    return total


# Kills


def test_killed_runs_end_in_the_files_of_one_that_never_was(flags, tmp_path):
    """Twenty SIGKILLs at random moments; whatever was finished before one is not decoded again."""
    status, output = run(SCRIPT, flags, make_directory(tmp_path / "whole"))
    assert status == 0, output
    expected = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {f"generation_{name}.json" for name in ("args", "pargs", "bestn", "top_k")} <= expected

    moments = random.Random(0)
    kills = runs = went_on = 0
    directory = make_directory(tmp_path / "0")
    while kills < 20:
        started = Run(SCRIPT, flags, directory)
        if kills % 2:  # every other one is sure to have decoded something
            seen = bytes_kept(directory)
            while started.process.is_alive() and bytes_kept(directory) == seen:
                time.sleep(0.005)
        if started.kill_after(moments.uniform(0, 1)):
            kills += 1
            went_on += bytes_kept(directory) > 0
        else:
            assert started.finish()[0] == 0, started.finish()[1]
            assert_same_files(directory, tmp_path / "whole")
            runs += 1
            directory = make_directory(tmp_path / str(runs))

    assert run(SCRIPT, flags, directory)[0] == 0
    assert_same_files(directory, tmp_path / "whole")
    assert went_on >= 10


def test_what_is_finished_is_not_decoded_again(flags, tmp_path):
    """A record that was altered comes through: it was read, not decoded anew; a torn one is decoded again."""
    assert run(SCRIPT, flags, make_directory(tmp_path / "whole"))[0] == 0
    directory = make_directory(tmp_path / "run")
    started = Run(SCRIPT, flags, directory)
    progress = directory / "generation_args.progress-0.jsonl"
    while not (progress.exists() and progress.read_bytes().count(b"\n") >= 3):
        assert started.process.is_alive()
    started.kill_after(0)

    records = [line for line in progress.read_text().splitlines() if '"ids"' in line]
    altered, torn = json.loads(records[0]), records[1]
    altered["ids"] = altered["ids"][:1]
    progress.write_text(json.dumps(altered) + "\nnot json\n[]\n" + torn[: len(torn) // 2])

    assert run(SCRIPT, flags, directory)[0] == 0
    ours, theirs = (
        json.loads((tmp_path / name / "generation_args.json").read_text()) for name in ("run", "whole")
    )
    differing = [at for at in range(len(ours)) if ours[at] != theirs[at]]
    assert len(differing) == 1 and ours[differing[0]]["num_tokens"] == 1
    assert not list(directory.glob("*.progress-*"))


def test_a_trace_is_not_pieced_together_from_a_run_without(flags, tmp_path):
    directory = make_directory(tmp_path / "run")
    started = Run(SCRIPT, [flag for flag in flags if flag != "--trace"], directory)
    while not bytes_kept(directory):
        assert started.process.is_alive()
    started.kill_after(0)

    assert run(SCRIPT, flags, directory)[0] == 0
    traces = [json.loads(line) for line in (directory / "trace_args.jsonl").read_text().splitlines()]
    assert len(traces) == 12 and all(trace["steps"] for trace in traces)


def test_a_rerun_with_more_methods_keeps_what_was_finished(flags, tmp_path):
    directory = make_directory(tmp_path / "run")
    at = flags.index("--methods") + 1
    started = Run(SCRIPT, [*flags[:at], "ARGS", *flags[at + len(METHODS) :]], directory)
    while not bytes_kept(directory):
        assert started.process.is_alive()
    started.kill_after(0)

    status, output = run(SCRIPT, flags, directory)
    assert status == 0 and "responses kept from an earlier run" in output


def test_records_of_another_experiment_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PartialState(cpu=True)
    Progress("generation_args", "one").add([{"prompt": "p", "reward": 1.0}])
    assert Progress("generation_args", "other").found == []
    again = Progress("generation_args", "one")
    assert [record["reward"] for record in again.found] == [1.0]
    again.drop()
    assert not list(tmp_path.iterdir())


def test_progress_of_a_finished_method_is_removed(flags, tmp_path):
    """A kill between writing the results and dropping the progress."""
    directory = make_directory(tmp_path / "run")
    assert run(SCRIPT, flags, directory)[0] == 0
    shutil.copytree(directory, tmp_path / "whole")
    (directory / "generation_args.progress-2.jsonl").write_text("\n")
    assert run(SCRIPT, flags, directory)[0] == 0
    assert_same_files(directory, tmp_path / "whole")


def test_a_finished_method_is_left_alone_until_overwrite(flags, tmp_path):
    directory = make_directory(tmp_path / "run")
    assert run(SCRIPT, flags, directory)[0] == 0
    path = directory / "generation_args.json"
    shutil.copytree(directory, tmp_path / "whole")
    altered = json.loads(path.read_text())
    altered[0]["result"] = " altered"
    path.write_text(json.dumps(altered))

    status, output = run(SCRIPT, flags, directory)
    assert status == 0 and "ARGS: done before" in output
    assert json.loads(path.read_text())[0]["result"] == " altered"

    path.write_text(path.read_text()[:-30])  # what is not whole is no result
    assert run(SCRIPT, flags, directory)[0] == 0
    assert path.read_bytes() == (tmp_path / "whole/generation_args.json").read_bytes()

    path.write_text(json.dumps(altered))
    assert run(SCRIPT, [*flags, "--overwrite"], directory)[0] == 0
    assert_same_files(directory, tmp_path / "whole")


def test_other_settings_or_a_retrained_model_are_refused(flags, small_models, tmp_path):
    directory = make_directory(tmp_path / "run")
    guide = shutil.copytree(small_models["gpt2-reward"], tmp_path / "guide")
    flags = replace_flag(flags, "--partial_reward_model", str(guide))
    started = Run(SCRIPT, flags, directory)
    while not list(directory.glob("*.progress-*")):
        assert started.process.is_alive()
    started.kill_after(0)
    before = files_of(directory)

    assert_refused(run(SCRIPT, replace_flag(flags, "--k", "4"), directory), "k (was 5, is 4)", "--overwrite")
    other = replace_flag(flags, "--policy", small_models["llama"])
    assert_refused(run(SCRIPT, other, directory), "policy (was")

    model = AutoModelForSequenceClassification.from_pretrained(guide)
    model.score.weight.data += 1
    model.save_pretrained(guide)
    assert_refused(run(SCRIPT, flags, directory), "the model of --partial_reward_model")
    assert files_of(directory) == before


def test_a_full_disk_ends_in_one_message_and_keeps_what_was_finished(flags, small_disk, tmp_path):  # noqa: F811
    assert run(SCRIPT, flags, make_directory(tmp_path / "whole"))[0] == 0
    disk = small_disk(400)

    # The last page is given up now and then, until everything fits.
    filler = disk.path / "filler"
    filler.write_bytes(b"x" * 1024 * 380)
    stops = 0
    for room in range(20, 400, 20):
        status, output = disk.run(SCRIPT, flags)
        if status == 0:
            break
        assert_refused((status, output), "No space left on device")
        assert all(json.loads(path.read_text()) for path in disk.path.glob("generation_*.json"))
        stops += 1
        with open(filler, "r+b") as file:
            file.truncate(1024 * (380 - room))
    filler.unlink()
    assert stops >= 3
    assert_same_files(disk.path, tmp_path / "whole")


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


def test_any_number_of_processes_writes_the_same_files_also_after_one_died(flags, tmp_path):
    """Alone; three, of which one is killed; and two that go on from there."""
    assert run(SCRIPT, flags, make_directory(tmp_path / "alone"))[0] == 0

    directory = make_directory(tmp_path / "together")
    launched = launch(3, flags, directory)
    progress = directory / "generation_pargs.progress-2.jsonl"
    while not progress.exists():
        assert launched.poll() is None, launched.stdout.read()
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(launched.pid).children() if "--prompts" in child.cmdline()]
    assert len(ranks) == 3
    ranks[1].kill()
    output, _ = launched.communicate()
    assert launched.returncode not in (0, None) and "SIGKILL" in output
    assert not any(rank.is_running() for rank in ranks)

    launched = launch(2, flags, directory)
    output, _ = launched.communicate()
    assert launched.returncode == 0, output
    assert "ARGS: done before" in output
    assert output.count("2 processes; mean rewards") == 1
    assert_same_files(directory, tmp_path / "alone")


# Broken models and input


@pytest.fixture
def broken(small_models, tmp_path):
    """Copy a small model, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(small_models[name], tmp_path / f"broken-{name}"))

    return copy


def test_truncated_weights_are_named(flags, broken, tmp_path):
    for flag, name in (("--policy", "gpt2"), ("--full_reward_model", "deberta")):
        folder = broken(name)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        directory = make_directory(tmp_path / name)
        assert_refused(run(SCRIPT, replace_flag(flags, flag, str(folder)), directory), str(folder))
        assert not list(directory.glob("generation_*.json"))


def test_reward_model_with_two_labels_is_refused(flags, broken, tmp_path):
    folder = broken("bert")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, ignore_mismatched_sizes=True
    )
    model.save_pretrained(folder)
    directory = make_directory(tmp_path / "run")
    assert_refused(
        run(SCRIPT, replace_flag(flags, "--full_reward_model", str(folder)), directory), "2 labels"
    )


def test_adapter_of_another_model_is_refused(flags, small_models, tmp_path):
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(small_models["gpt2"])
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(small_models["gpt2"]).save_pretrained(adapter)
    deeper = AutoModelForCausalLM.from_config(
        type(model.config)(**model.config.to_diff_dict() | {"n_layer": 3})
    )
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2"])
    flags = [*replace_flag(flags, "--dpo_policy", str(adapter)), "--methods", "DPO"]

    for name, base in (
        ("deeper", save(deeper, tokenizer, tmp_path / "deeper")),
        ("llama", small_models["llama"]),
    ):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert_refused(run(SCRIPT, flags, make_directory(tmp_path / f"on-{name}")), "cannot load the policy")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (["--magic"], "unknown arguments: --magic"),
        (["--k", "many"], "--k: invalid int value: 'many'"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--num_prompts", "-1"], "--num_prompts must be at least 0"),
    ],
)
def test_a_bad_flag_is_one_line(flag, said, tmp_path):
    directory = make_directory(tmp_path / "run")
    assert_refused(run(SCRIPT, flag, directory), said)
    assert not list(directory.iterdir())


def test_settings_that_cannot_go_together_are_refused(flags, tmp_path):
    directory = make_directory(tmp_path / "run")
    spread = run(SCRIPT, [*flags, "--device_map", "auto"], directory, WORLD_SIZE="2")
    assert_refused(spread, "--device_map", "one process")
    assert not list(directory.iterdir())

    long = replace_flag(flags, "--max_new_tokens", "300")  # the policies read 256
    assert_refused(run(SCRIPT, long, directory), "no prompt fits beside --max_new_tokens")


def test_more_candidates_than_tokens_are_refused(flags, tmp_path):
    refused = run(SCRIPT, replace_flag(flags, "--k", "100000"), make_directory(tmp_path / "run"))
    assert_refused(refused, "--k 100000 is more than the")


def test_pickled_weights_are_read_as_weights_alone(flags, broken, tmp_path):
    folder = broken("gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    flags = [*replace_flag(flags, "--policy", str(folder)), "--methods", "TOP-K"]
    directory = make_directory(tmp_path / "run")
    status, output = run(SCRIPT, flags, directory)
    assert status == 0, output
    assert output.count("warning:") == 1 and "pickle" in output

    torch.save({"lm_head.weight": Opens(str(tmp_path / "sentinel"))}, folder / "pytorch_model.bin")
    directory = make_directory(tmp_path / "hostile")
    status, output = run(SCRIPT, flags, directory)
    assert_refused((status, output), "holds more than weights")
    assert not (tmp_path / "sentinel").exists()


class Opens:
    """Unpickled, it would create a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_extreme_prompts_are_decoded(flags, small_models, tmp_path):
    """Huge, foreign, full of special tokens, all the same: what does not fit loses its beginning, counted."""
    posts = [
        "long " * 20_000,
        "Мой сосед 我的邻居 😀🏳️‍🌈",
        "<|endoftext|> [SEP] [CLS] <sep>" * 3,
        "a" * 100_000,
        "\x00\u202e",
    ]
    with open(tmp_path / "prompts.jsonl", "w") as file:
        for post in posts:
            file.write(json.dumps({"prompt": f"POST: {post}\nTL;DR:", "reference": f" {post}"}) + "\n")
    directory = make_directory(tmp_path / "run")
    status, output = run(SCRIPT, flags, directory)
    assert status == 0, output
    assert "2 prompts are longer than" in output and "reference: 2 pairs are longer than" in output
    results = json.loads((directory / "generation_args.json").read_text())
    assert len(results) == len(posts) and all(row["num_tokens"] for row in results)


def test_lone_surrogates_are_refused_with_their_line(flags, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "\\ud800"}\n')
    assert_refused(run(SCRIPT, flags, make_directory(tmp_path / "run")), "line 2")
    assert not list((tmp_path / "run").iterdir())


def test_infinite_final_reward_is_named_with_its_prompt(flags, broken, tmp_path):
    folder = broken("llama-reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.score.weight.data[:] = torch.inf
    model.save_pretrained(folder)
    flags = [*flags, "--methods", "TOP-K", "--evaluation_reward_model", str(folder)]
    directory = make_directory(tmp_path / "run")
    assert_refused(run(SCRIPT, flags, directory), "POST:", "gives a reward of")
    assert not list(directory.glob("generation_*.json"))


def test_truncated_dataset_is_named_with_its_command(flags, tmp_path):
    from datasets import Dataset, DatasetDict

    directory = make_directory(tmp_path / "run")
    rows = [{"prompt": f"p{at}", "reference": f" r{at}"} for at in range(50)]
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(directory / "summarize_from_feedback")
    (arrow,) = directory.rglob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-300])
    refused = run(SCRIPT, flags[2:], directory)
    assert_refused(refused, "python DataProcess/tldr_data_process.py")
