"""The README's commands, word for word, where small stand-ins lie under the hub names; and clear errors."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import PARGS_baselines
import pytest
import show_result
from conftest import (
    ROOT,
    STAGES,
    assert_one_error,
    copy_run_sh,
    hub_rows,
    hub_test_rows,
    make_posts,
    write_hub_data,
    write_prompts,
)
from datasets import load_from_disk
from forked import run
from PARGS_baselines import METHODS, Settings, name_methods
from prompts import load_prompts, read_own_prompts
from run_state import MADE_BY, check_models
from small_runs import TEMPLATE, write_dataset

from pargs.cli import next_step, run_script
from pargs.runs import generation_path, read_generations, read_methods

COMMANDS = r"""
python DataProcess/tldr_data_process.py
python DataProcess/tldr_data_process_partial.py
python partial_reward_training/tldr_partial_reward_model.py --model_name_or_path="OpenAssistant/reward-model-deberta-v3-large" --output_dir="partial_reward_modeling_tldr" --per_device_train_batch_size=16 --num_train_epochs=1 --gradient_accumulation_steps=16 --gradient_checkpointing=True --learning_rate=5e-6 --report_to="wandb" --remove_unused_columns=False --optim="adamw_torch" --logging_steps=10 --evaluation_strategy="steps" --max_length=512
python DPO_training/GPT2_large_DPO_tldr.py --model_name_or_path="vistagi/gpt2-large-tldr-sum" --per_device_train_batch_size 2 --learning_rate 5e-5 --gradient_accumulation_steps 16 --logging_steps 10 --output_dir="GPT2_large_tldr_DPO" --report_to wandb --fp16 --logging_first_step --no_remove_unused_columns --use_peft --lora_r=16 --lora_alpha=16 --max_length=512 --max_prompt_length=512 --optim="rmsprop"
python PARGS_decode/PARGS_baselines.py
python Evaluation/show_result.py
python Evaluation/GPT4_eval_tldr.py "./generation_pargs.json" "./generation_args.json"
"""  # noqa: E501
SCRIPTS = [
    path.relative_to(ROOT)
    for stage in STAGES
    for path in sorted((ROOT / stage).glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]
LAUNCHERS = {
    "python": [],
    "accelerate launch": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"],
}


def call(arguments: list[str | Path], directory: Path, **environment: str) -> subprocess.CompletedProcess:
    """Start python in `directory`, without anybody's keys."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "OPENAI"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=clean | {"HF_HUB_OFFLINE": "1", "NETRC": str(directory / "no-netrc")} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def call_readme(command: str, directory: Path) -> subprocess.CompletedProcess:
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    return call([ROOT / script, *arguments], directory)


def test_readme_has_these_commands():
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS.strip().splitlines():
        assert command in readme
    assert len(SCRIPTS) == 11


@pytest.mark.slow
def test_commands_run_word_for_word(small_models, tmp_path):
    """In a directory in which the hub names resolve."""
    write_hub_data(tmp_path, hub_rows(24, 1), hub_rows(8, 2), hub_test_rows(6, 3))
    for name, model in (
        ("vistagi/gpt2-large-tldr-sum", "gpt2"),
        ("vistagi/gpt2-large-tldr-sum-rlhf", "gpt2"),
        ("OpenAssistant/reward-model-deberta-v3-large", "deberta"),
    ):
        shutil.copytree(small_models[model], tmp_path / name)
    outputs = {}
    *stages, judge = COMMANDS.strip().splitlines()
    for command in stages:
        done = call_readme(command, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[command.split("/")[1].split(".")[0]] = done

    for artifact in (
        "summarize_from_feedback/dataset_dict.json",
        "summarize_from_feedback_partial/dataset_dict.json",
        "partial_reward_modeling_tldr/model.safetensors",
        "GPT2_large_tldr_DPO/adapter_model.safetensors",
        "average_reward.png",
    ):
        assert (tmp_path / artifact).exists(), artifact
    table = pd.read_csv(tmp_path / "baseline_results.csv")
    assert list(table.columns) == ["prompt", *METHODS, "reference"]
    assert len(table) == 6 and table.notna().all().all()
    assert list(json.loads((tmp_path / "methods.json").read_text())) == list(METHODS)
    for method in METHODS:
        path = generation_path(method, tmp_path)
        rows = read_generations(path)
        assert [row.prompt for row in rows] == list(table["prompt"])
        assert [row.reward for row in rows] == list(table[method])
        fields = {"prompt", "result", "reward", "num_tokens", "finish_reason", "ids"}
        assert all(set(row) == fields for row in json.loads(path.read_text()))

    training = outputs["tldr_partial_reward_model"].stderr
    assert "--evaluation_strategy became --eval_strategy" in training
    assert "no wandb login: logging offline" in training
    dpo = outputs["GPT2_large_DPO_tldr"].stderr
    assert "--no_remove_unused_columns became" in dpo and "--fp16 needs a GPU" in dpo
    assert list((tmp_path / "wandb").glob("offline-run-*"))

    done = call_readme(judge, tmp_path)
    assert_one_error(done.returncode, done.stderr, "OPENAI_API_KEY")
    assert not (tmp_path / "gpt-4-evaluations").exists()


@pytest.mark.slow
def test_own_data_in_five_commands(small_models, tmp_path):
    """The README's, word for word, on a CSV of 200 rows."""
    section = (ROOT / "README.md").read_text().partition("## Your own data")[2]
    commands = section.partition("```bash\n")[2].partition("```")[0].strip().splitlines()
    assert len(commands) == 5
    rows = [
        {"prompt": f"{ask} It is my {at}th post.", "chosen": f"ask {who}", "rejected": f"{what} and so on"}
        for at, (ask, who, what) in enumerate(make_posts(200, 3))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "pairs.csv", index=False)
    names = {"HuggingFaceTB/SmolLM2-135M-Instruct": "chat"}
    names |= {"OpenAssistant/reward-model-deberta-v3-large": "deberta"}
    for name, model in names.items():
        shutil.copytree(small_models[model], tmp_path / name)
    for command in commands:
        done = call_readme(command, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    assert set(read_methods(tmp_path)) == {"ARGS", "PARGS-G", "PARGS", "BESTN", "TOP-K", "GREEDY"}
    written = read_generations(generation_path("PARGS", tmp_path))
    assert len(written) == 20 and all(row.prompt.startswith("<|im_start|>system\n") for row in written)
    chosen = {row["prompt"]: row["chosen"] for row in rows}
    test = load_from_disk(tmp_path / "summarize_from_feedback")["test"]
    assert [chosen[row["turns"][0]["content"]] for row in test] == test["reference"][:]
    table = (tmp_path / "average_reward.md").read_text()
    assert all(f"| {method} " in table for method in ("PARGS", "BESTN", "reference"))


@pytest.mark.slow
def test_the_sweep_of_the_readme_ends_in_one_table(small_models, tmp_path, monkeypatch, call_main):
    """Its lines as bash reads them, with small models; three weights by two seeds, and two more k."""
    section = (ROOT / "README.md").read_text().partition("## Several seeds and sweeps")[2]
    lines = section.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(lines) == 4
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "own", [f"POST: {at}\nTL;DR:" for at in range(4)])
    small = ["--policy", small_models["gpt2"], "--full_reward_model", small_models["gpt2-reward"]]
    small += ["--partial_reward_model", small_models["bert"], "--prompts", "own", "--max_new_tokens", "6"]
    scripts = {"PARGS_baselines.py": (PARGS_baselines, small), "show_result.py": (show_result, [])}
    monkeypatch.setattr(show_result, "save_figure", lambda figure, path: None)
    for line in lines:
        say = f'python() {{ printf "%q " "$@"; echo; }}; {line}'
        commands = subprocess.run(["bash", "-c", say], capture_output=True, text=True, check=True).stdout
        for script, *arguments in map(shlex.split, commands.splitlines()):
            module, more = scripts[Path(script).name]
            status, output = call_main(module, *arguments, *more)
            assert status == 0, output

    seeds = pd.read_csv("sweep/seeds/average_reward.csv", index_col="method")
    assert list(seeds.loc[["ARGS", "PARGS"], "runs"]) == [2, 2]
    assert seeds.loc["ARGS", "run_std"] == 0 < seeds.loc["PARGS", "run_std"]  # ARGS is greedy
    table = pd.read_csv("sweep/table/average_reward.csv", index_col="method")
    rows = [(1.0, 5, 1), (1.0, 20, 1), *((w, 10, 2) for w in (0.5, 1.0, 2.0))]
    expected = {f"ARGS (weight {w}, k {k})": runs for w, k, runs in rows}
    assert {name: runs for name, runs in table["runs"].items() if name.startswith("ARGS")} == expected
    assert len(table) == 11 and set(table["n"]) == {0, 4}  # nobody wrote a reference


@pytest.fixture(scope="module")
def spaced(tmp_path_factory) -> Path:
    """The stages in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("a b")
    for stage in STAGES:
        shutil.copytree(ROOT / stage, root / stage, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_starts_from_a_path_with_a_space(spaced, tmp_path, launcher, script):
    directory = tmp_path / "c d"
    directory.mkdir()
    done = call([*LAUNCHERS[launcher], spaced / script, "--help"], directory, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("usage: ") == 1 and f"usage: {script.name}" in done.stdout
    assert not list(directory.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("DataProcess/tldr_data_process.py", "cannot load 'openai/summarize_from_feedback'"),
        (
            "partial_reward_training/tldr_partial_reward_model.py",
            "make it with `python DataProcess/tldr_data_process_partial.py`",
        ),
        ("DPO_training/GPT2_large_DPO_tldr.py", "make it with `python DataProcess/tldr_data_process.py`"),
        ("PARGS_decode/PARGS_baselines.py", "make it with `python DataProcess/tldr_data_process.py`"),
        ("Evaluation/show_result.py", "python PARGS_decode/PARGS_baselines.py"),
    ],
)
def test_what_is_missing_is_named_with_the_command(tmp_path, script, said):
    directory = tmp_path / "run"
    directory.mkdir()
    status, output = run(script, [], directory)
    assert_one_error(status, output, said)
    assert len(output.splitlines()) == 1  # nothing of wandb, nor of a hub that was asked in vain
    assert not list(directory.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_knows_ctrl_c(script):
    assert '\n    run_script(main, "the same command' in (ROOT / script).read_text()


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    for rank, said in (("0", "\nstopped: the same command starts again\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(signal, "signal", lambda *ignored: None)  # this process goes on
        with pytest.raises(SystemExit) as stopped:
            run_script(interrupted, "the same command starts again")
        assert stopped.value.code == 130 and capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("place", "step"),
    [(".", "Evaluation/show_result.py"), ("runs/a b", "../../Evaluation/show_result.py 'a b'")],
)
def test_the_next_step_can_be_typed_where_it_is_printed(tmp_path, monkeypatch, capsys, place, step):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / place)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "PARGS_decode/PARGS_baselines.py")])
    next_step("Evaluation/show_result.py", *(["a b"] if place != "." else []))
    assert capsys.readouterr().out == f"next: python {step}\n"


def test_run_sh_says_what_to_type(tmp_path):
    """Before it makes or starts anything."""
    for name in ("run.sh", "environment.sh"):
        shutil.copy(ROOT / name, tmp_path)

    def start(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "run.sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
        )
        return done.returncode, done.stdout + done.stderr

    status, printed = start("--help")
    assert status == 0 and "bash run.sh demo decode -- --seed 3" in printed and "set -e" not in printed
    one_script = "flags go to one step that is one script (reward, dpo or decode)"
    assert_one_error(*start("demo", "decode", "report", "--", "--seed", "3"), one_script)
    assert_one_error(*start("demo", "--", "--seed", "3"), one_script)
    assert_one_error(*start("demo", "decode", "--seed", "3"), "bash run.sh demo decode -- --seed 3")
    assert_one_error(*start("demo", "decod"), "bash run.sh demo decode report")
    assert_one_error(*start("demos"), "bash run.sh demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.sh", "run.sh"]


def test_ctrl_c_in_run_sh_says_how_to_go_on(tmp_path):
    """A stand-in for python, which Ctrl-C meets while it trains."""
    copy_run_sh(tmp_path, 'case "$1" in *reward_model.py) kill -INT 0 ;; esac')
    flags = ["--", "--overwrite", "--seed", "3 4"]
    for steps, again in (
        (["data", "reward", "report"], "reward report"),
        (["reward", *flags], r"reward -- --seed 3\ 4"),
    ):
        command = ["bash", "run.sh", "paper", *steps]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, start_new_session=True)
        assert done.returncode == 130 and "\033" not in done.stdout
        said = f"stopped in the step reward; to go on from there: bash run.sh paper {again}"
        assert done.stderr == f"\n{said}\n"


def refusal(capsys, function: Callable, *arguments: object) -> str:
    """The one line in which a function refuses."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    said = capsys.readouterr().err
    assert_one_error(stopped.value.code, said)
    return said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("partial_reward_model", "python partial_reward_training/tldr_partial_reward_model.py"),
        ("dpo_policy", "python DPO_training/GPT2_large_DPO_tldr.py"),
        ("policy", "name another with --policy"),
        ("full_reward_model", "name another with --full_reward_model"),
        ("evaluation_reward_model", "name another with --evaluation_reward_model"),
    ],
)
def test_missing_models_are_named_with_the_command(
    small_models, tmp_path, monkeypatch, capsys, setting, said
):
    """Before anything is decoded, and before --overwrite drops anything."""
    monkeypatch.chdir(tmp_path)
    policies = dict.fromkeys(("policy", "dpo_policy", "ppo_policy"), small_models["gpt2"])
    rewards = ("full_reward_model", "partial_reward_model", "evaluation_reward_model")
    names = policies | dict.fromkeys(rewards, small_models["bert"])

    def check(names: dict[str, str]) -> None:
        settings = Settings(**names)
        methods = {name: METHODS[name](settings) for name in METHODS}
        check_models(methods, settings.evaluation_reward_model, vars(settings))

    check(names)
    default = getattr(Settings(), setting)
    absent = default if default in MADE_BY else "./absent"
    assert said in refusal(capsys, check, names | {setting: absent})


def test_own_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "POST: a\\nTL;DR:", "reference": " b", "id": 7}\n\n{"prompt": "c"}\n')
    assert read_own_prompts(str(path)) == (["POST: a\nTL;DR:", "c"], [" b", None])
    path.write_text('{"prompt": "one\u2028prompt"}\n', encoding="utf-8")
    assert read_own_prompts(str(path)) == (["one\u2028prompt"], [None])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nonsense", "line 1 is not a JSON object"),
        (b'{"prompt": "a"}\n{"text": "a"}', "line 2 is not a JSON object"),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', "line 2 is not a JSON object"),  # a lone surrogate
        (b'{"prompt": " "}', "the prompt is blank"),
        (b'{"prompt": 3}', "should be a valid string"),
        (b"", "holds no prompts"),
        (b"\xff", "cannot read the prompts"),
    ],
)
def test_own_prompts_that_cannot_be_read(tmp_path, capsys, content, said):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    assert said in refusal(capsys, read_own_prompts, str(path))


def test_test_prompts_are_drawn_by_seed(tmp_path):
    write_dataset(tmp_path, test=[{"prompt": f"p{at}", "reference": f" r{at}"} for at in range(50)])

    def draw(num_prompts: int, seed: int = 42) -> tuple:
        return load_prompts(str(tmp_path / "summarize_from_feedback"), None, num_prompts, seed)

    prompts, references, template = draw(10)
    assert len(prompts) == 10 and template == TEMPLATE
    assert [" r" + prompt[1:] for prompt in prompts] == references
    assert draw(10)[0] == prompts != draw(10, seed=1)[0]
    assert len(draw(0)[0]) == 50


def test_how_many_prompts(tmp_path):
    """Not said: 100 of the test split, all of a file. Said: that many, and fewer are the first of more."""
    write_dataset(tmp_path, test=[{"prompt": f"p{at}", "reference": " r"} for at in range(120)])
    write_prompts(tmp_path / "own", [f"own {at}" for at in range(150)])
    folder, own = str(tmp_path / "summarize_from_feedback"), str(tmp_path / "own")
    counts = {None: (100, 150), 0: (120, 150), 2: (2, 2), 110: (110, 110)}
    drawn = {count: [load_prompts(folder, file, count, 1)[0] for file in (None, own)] for count in counts}
    assert {count: tuple(map(len, found)) for count, found in drawn.items()} == counts
    for split, file in (drawn[2], drawn[None]):
        assert drawn[110][0][: len(split)] == split and file == [f"own {at}" for at in range(len(file))]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["pargs", "Top_K", "ARGS", "args"], ["PARGS", "TOP-K", "ARGS"]),
        ([], list(METHODS)),
    ],
)
def test_methods_are_known_in_any_case(asked, named):
    assert name_methods(asked) == named
