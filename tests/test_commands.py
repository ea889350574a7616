"""The README's commands, word for word, where small stand-ins lie under the hub names; and clear errors."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pandas as pd
import PARGS_baselines
import pytest
from conftest import ROOT, hub_rows, hub_test_rows, write_hub_data
from PARGS_baselines import METHODS, Settings, claim_directory, load_policy, load_prompts, read_own_prompts

COMMANDS = r"""
python DataProcess/tldr_data_process.py
python DataProcess/tldr_data_process_partial.py
python partial_reward_training/tldr_partial_reward_model.py --model_name_or_path="OpenAssistant/reward-model-deberta-v3-large" --output_dir="partial_reward_modeling_tldr" --per_device_train_batch_size=16 --num_train_epochs=1 --gradient_accumulation_steps=16 --gradient_checkpointing=True --learning_rate=5e-6 --report_to="wandb" --remove_unused_columns=False --optim="adamw_torch" --logging_steps=10 --evaluation_strategy="steps" --max_length=512
python DPO_training/GPT2_large_DPO_tldr.py --model_name_or_path="vistagi/gpt2-large-tldr-sum" --per_device_train_batch_size 2 --learning_rate 5e-5 --gradient_accumulation_steps 16 --logging_steps 10 --output_dir="GPT2_large_tldr_DPO" --report_to wandb --fp16 --logging_first_step --no_remove_unused_columns --use_peft --lora_r=16 --lora_alpha=16 --max_length=512 --max_prompt_length=512 --optim="rmsprop"
python PARGS_decode/PARGS_baselines.py
python Evaluation/show_result.py
python Evaluation/GPT4_eval_tldr.py "./generation_pargs.json" "./generation_args.json"
"""  # noqa: E501


@pytest.fixture(scope="session")
def hub_directory(small_models, tmp_path_factory) -> Path:
    """A run directory in which the hub names resolve, with all of a README run's artifacts."""
    directory = tmp_path_factory.mktemp("run")
    write_hub_data(directory, hub_rows(24, 1), hub_rows(8, 2), hub_test_rows(6, 3))
    for name, model in (
        ("vistagi/gpt2-large-tldr-sum", "gpt2"),
        ("vistagi/gpt2-large-tldr-sum-rlhf", "gpt2"),
        ("OpenAssistant/reward-model-deberta-v3-large", "deberta"),
    ):
        shutil.copytree(small_models[model], directory / name)
    return directory


def call(command: str, directory: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command line of the README in `directory`."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "OPENAI"))}
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        cwd=directory,
        env=clean | {"HF_HUB_OFFLINE": "1", "NETRC": str(directory / "no-netrc")} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def assert_clear_error(status: int, output: str, *said: str) -> None:
    assert status == 2, output
    assert "Traceback" not in output
    assert len(re.findall(r"error:", output)) == 1
    for text in said:
        assert text in output


def test_readme_has_these_commands():
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS.strip().splitlines():
        assert command in readme


def test_commands_run_word_for_word(hub_directory):
    outputs = {}
    *stages, judge = COMMANDS.strip().splitlines()
    for command in stages:
        done = call(command, hub_directory)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[command.split("/")[1].split(".")[0]] = done

    for artifact in (
        "summarize_from_feedback/dataset_dict.json",
        "summarize_from_feedback_partial/dataset_dict.json",
        "partial_reward_modeling_tldr/model.safetensors",
        "GPT2_large_tldr_DPO/adapter_model.safetensors",
        "average_reward.png",
        *(f"generation_{PARGS_baselines.file_stem(method)}.json" for method in METHODS),
    ):
        assert (hub_directory / artifact).exists(), artifact

    table = pd.read_csv(hub_directory / "baseline_results.csv")
    assert list(table.columns) == ["prompt", *METHODS, "reference"]
    assert len(table) == 6 and table.notna().all().all()
    for method in METHODS:
        rows = json.loads(
            (hub_directory / f"generation_{PARGS_baselines.file_stem(method)}.json").read_text()
        )
        assert [row["prompt"] for row in rows] == list(table["prompt"])
        assert [row["reward"] for row in rows] == list(table[method])
        assert all(set(row) == {"prompt", "result", "reward", "num_tokens", "finish_reason"} for row in rows)

    training = outputs["tldr_partial_reward_model"].stderr
    assert "--evaluation_strategy became --eval_strategy" in training
    assert "no wandb login: logging offline" in training
    dpo = outputs["GPT2_large_DPO_tldr"].stderr
    assert "--no_remove_unused_columns became" in dpo and "--fp16 needs a GPU" in dpo
    assert list((hub_directory / "wandb").glob("offline-run-*"))

    done = call(judge, hub_directory)
    assert_clear_error(done.returncode, done.stderr, "OPENAI_API_KEY")
    assert not (hub_directory / "gpt-4-evaluations").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("DataProcess/tldr_data_process.py", "", "cannot load 'openai/summarize_from_feedback'"),
        ("DPO_training/GPT2_large_DPO_tldr.py", "--report_to none", "cannot load"),
        ("PARGS_decode/PARGS_baselines.py", "", "make it with `python DataProcess/tldr_data_process.py`"),
        ("PARGS_decode/PARGS_baselines.py", "--methods MAGIC", "--methods knows ARGS, PARGS-G"),
        ("PARGS_decode/PARGS_baselines.py", "--k 0", "--k must be at least 1"),
        ("Evaluation/show_result.py", "", "python PARGS_decode/PARGS_baselines.py"),
    ],
)
def test_what_is_missing_is_named_with_the_command(tmp_path, script, arguments, said):
    directory = tmp_path / "run"
    directory.mkdir()
    assert_clear_error(*forked.run(script, arguments.split(), directory), said)
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partial_reward_model": "absent"}, "python partial_reward_training/tldr_partial_reward_model.py"),
        ({"dpo_policy": "absent"}, "python DPO_training/GPT2_large_DPO_tldr.py"),
        ({"policy": "absent"}, "--policy"),
        ({"full_reward_model": "absent"}, "--full_reward_model"),
    ],
)
def test_missing_models_are_named_with_the_command(small_models, capsys, settings, said):
    """Before anything is decoded, and before --overwrite drops anything."""
    names = {
        "policy": small_models["gpt2"],
        "dpo_policy": small_models["gpt2"],
        "ppo_policy": small_models["gpt2"],
        "full_reward_model": small_models["bert"],
        "evaluation_reward_model": small_models["bert"],
        "partial_reward_model": small_models["bert"],
    }
    PARGS_baselines.check_models(Settings(**names))
    with pytest.raises(SystemExit) as stopped:
        PARGS_baselines.check_models(Settings(**names | settings))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_language_model_is_no_reward_model(small_models, prompts, capsys):
    settings = Settings(policy=small_models["gpt2"], partial_reward_model=small_models["gpt2"])
    with pytest.raises(SystemExit) as stopped:
        PARGS_baselines.decode_method("PARGS", prompts, "{post}", settings)
    assert stopped.value.code == 2
    assert "is no trained reward model: it is a GPT2LMHeadModel" in capsys.readouterr().err


def test_own_prompts_and_their_errors(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "POST: a\\nTL;DR:", "reference": " b"}\n\n{"prompt": "c"}\n')
    assert read_own_prompts(str(path)) == (["POST: a\nTL;DR:", "c"], [" b", None])

    path.write_text('{"prompt": "one\u2028prompt"}\n', encoding="utf-8")
    assert read_own_prompts(str(path)) == (["one\u2028prompt"], [None])

    for line, said in (
        ("nonsense", "line 1 is not a JSON object"),
        ('{"text": "a"}', "line 1 is not a JSON object"),
        ('["prompt"]', "line 1 is not a JSON object"),
        ('{"prompt": " "}', '"prompt" must be text'),
        ('{"prompt": 3}', '"prompt" must be text'),
        ("", "holds no prompts"),
    ):
        path.write_text(line)
        with pytest.raises(SystemExit) as stopped:
            read_own_prompts(str(path))
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_test_prompts_are_drawn_by_seed(tmp_path, monkeypatch, hub_directory):
    from datasets import Dataset, DatasetDict

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{at}", "reference": f" r{at}"} for at in range(50)]
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk("summarize_from_feedback")
    prompts, references, template = load_prompts(Settings(num_prompts=10))
    assert len(prompts) == 10 and template == "{post}"
    assert [" r" + prompt[1:] for prompt in prompts] == references
    assert load_prompts(Settings(num_prompts=10))[0] == prompts
    assert load_prompts(Settings(num_prompts=10, seed=1))[0] != prompts
    assert len(load_prompts(Settings(num_prompts=0))[0]) == 50


def test_two_experiments_are_not_mixed_in_one_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    claim_directory(Settings(k=10), ["p"], {})
    Path("generation_args.json").write_text("[]")
    claim_directory(Settings(k=10, methods=["PARGS"]), ["p"], {})
    with pytest.raises(SystemExit) as stopped:
        claim_directory(Settings(k=5), ["p"], {})
    assert stopped.value.code == 2
    assert "k (was 10, is 5)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        claim_directory(Settings(k=10), ["other prompts"], {})
    assert "prompts_digest" in capsys.readouterr().err

    Path("decoding_settings.json").rename("elsewhere.json")
    with pytest.raises(SystemExit):
        claim_directory(Settings(k=10), ["p"], {})
    assert "unknown settings" in capsys.readouterr().err

    claim_directory(Settings(k=5, overwrite=True), ["p"], {})
    assert not Path("generation_args.json").exists()
    assert json.loads(Path("decoding_settings.json").read_text())["k"] == 5


def test_end_tokens_are_those_of_the_policy(small_models):
    policy = load_policy(small_models["llama"], PARGS_baselines.torch.float32, "cpu")
    assert policy.eos_ids == {policy.tokenizer.eos_token_id}
