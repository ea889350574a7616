"""Stage 5 under bad inputs, under several processes, and with a key that must not be seen."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import GPT4_eval_tldr
import numpy as np
import pandas as pd
import prefix_accuracy
import pytest
import show_generations
import show_result
import torch
from conftest import make_posts
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import BadReply, Question, parse_reply
from judge_server import JudgeServer
from run_files import Run, read_responses, read_steps
from sampled_kl import trace_log_probs
from show_generations import embed_json, rounded_step
from small_runs import (
    CSV,
    TEMPLATE,
    half,
    overwrite,
    read_page,
    refuse,
    run_script,
    trace_step,
    write_dataset,
    write_generations,
    write_records,
    write_rewards,
    write_trace,
)
from transformers import AutoModelForSequenceClassification

from pargs.runs import Method, read_rewards

PROMPTS = [TEMPLATE.format(post=post) for post, _, _ in make_posts(9, 2)]
ARGS, TRACE, RECORDS = "generation_args.json", "trace_args.jsonl", "methods.json"
STEPS = [trace_step(("a", -1.0, 1.0), ("b", -2.0, 2.0), chosen=0)]
fuzz = settings(deadline=None, max_examples=200, derandomize=True, database=None)


def write_pairs(directory: Path, **changes: object) -> None:
    """Both splits that stage 5 reads; the pairs have the fields of `changes`."""
    pairs = [{"prompt": p, "chosen": f" {p[6:20]}", "rejected": " so on"} | changes for p in PROMPTS]
    test = [{"prompt": prompt, "reference": " a reference"} for prompt in PROMPTS]
    write_dataset(directory, validation=pairs, test=test)


@pytest.fixture
def run_directory(tmp_path, small_models) -> Path:
    directory = tmp_path / "run"
    write_rewards(directory, PROMPTS, ARGS=list(range(9)), TOP_K=list(range(9))[::-1])
    base = small_models["gpt2"]
    guided = Method(policy=base, guide="full", weight=1, greedy=True)
    write_records(directory, base, k=10, ARGS=guided, TOP_K=Method(policy=base))
    for method in ("ARGS", "TOP-K"):
        write_generations(directory, method, [f" {method} on {at}" for at in range(9)], PROMPTS)
    write_trace(directory, "ARGS", [STEPS] * 9, PROMPTS)
    write_pairs(directory)
    return directory


# Bad inputs

FOREIGN = "is not what was written there"
NO_DATASET = "cannot read the dataset 'summarize_from_feedback'"
TEST_ARROW, PAIRS_ARROW = (f"summarize_from_feedback/{split}/*.arrow" for split in ("test", "validation"))
NO_UTF8 = lambda content: content.replace(b"POST", b"\xff" * 4)  # noqa: E731


def folder_instead(name: str):
    def spoil(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).mkdir()

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda directory: (directory / CSV).unlink(), f"{CSV} is missing"),
        (overwrite(CSV, lambda content: content[:-3]), "its last line is cut off"),
        (overwrite(CSV, ""), f"{CSV} is not the table that decoding writes"),
        (overwrite(CSV, "post,ARGS\na,1\n"), f"{CSV} is not the table that decoding writes"),
        (overwrite(CSV, "prompt,ARGS\na,three\n"), "could not convert string to float: 'three'"),
        (overwrite(CSV, "prompt,ARGS\na,-inf\n"), "a reward is infinite"),
        (folder_instead(CSV), f"cannot read {CSV}"),
        (overwrite(ARGS, half), f"{ARGS} {FOREIGN}"),
        (overwrite(ARGS, "[" * 100_000), f"{ARGS} {FOREIGN}"),
        (overwrite(ARGS, '[{"prompt": "p", "result": 3}]'), f"{ARGS} {FOREIGN}"),
        (overwrite(TRACE, lambda content: content[:-9]), f"{TRACE}, line 9 {FOREIGN}"),
        (overwrite(TRACE, '{"prompt": "p", "steps": [{"tokens": "ab"}]}'), f"{TRACE}, line 1 {FOREIGN}"),
        (
            overwrite(TRACE, lambda content: content.replace(b'"chosen": 0', b'"chosen": 2')),
            "one of them chosen",
        ),
        (overwrite(RECORDS, half), f"{RECORDS} {FOREIGN}"),
        (overwrite(RECORDS, '{"ARGS": {"k": 10}}'), f"{RECORDS} {FOREIGN}"),
        (overwrite(TEST_ARROW, half), NO_DATASET),
        (overwrite(TEST_ARROW, NO_UTF8), NO_DATASET),
    ],
)
def test_damaged_results_are_refused_in_one_message(run_directory, capsys, spoil, said):
    spoil(run_directory)
    for script in (show_result, show_generations):
        assert said in refuse(script, run_directory, capsys)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (overwrite(PAIRS_ARROW, half), NO_DATASET),
        (overwrite(PAIRS_ARROW, NO_UTF8), NO_DATASET),
        (lambda directory: write_pairs(directory, chosen=None), NO_DATASET),
        (lambda directory: write_pairs(directory, chosen=3), "is not text"),
        (
            lambda directory: write_pairs(directory, chosen=""),
            "none of the 9 validation pairs has two responses",
        ),
        (overwrite("summarize_from_feedback/processing.json", "{"), NO_DATASET),
    ],
)
def test_damaged_pairs_are_refused(run_directory, small_models, capsys, spoil, said):
    spoil(run_directory)
    models = ["--full_reward_model", small_models["bert"], "--partial_reward_model", small_models["bert"]]
    assert said in refuse(prefix_accuracy, run_directory, capsys, *models)


def test_a_damaged_reward_model_is_refused(run_directory, small_models, capsys, tmp_path):
    good = ["--full_reward_model", small_models["bert"], "--partial_reward_model"]
    for name, edit in (("config.json", "{"), ("tokenizer.json", "{"), ("model.safetensors", half)):
        bad = shutil.copytree(small_models["bert"], tmp_path / f"bad {name}")
        overwrite(name, edit)(bad)
        said = refuse(prefix_accuracy, run_directory, capsys, *good, bad)
        assert "cannot load" in said and repr(str(bad)) in said

    model = AutoModelForSequenceClassification.from_pretrained(small_models["bert"])
    model.classifier.bias.data.fill_(math.nan)
    bad = shutil.copytree(small_models["bert"], tmp_path / "nan")
    model.save_pretrained(bad)
    said = refuse(prefix_accuracy, run_directory, capsys, *good, bad)
    assert "the reward nan" in said and "post : so" in said  # names what it was asked


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "x" * 300])
def test_a_place_that_cannot_be_written(run_directory, capsys, place):
    (run_directory / "file").write_text("")
    assert "cannot write" in refuse(show_result, run_directory, capsys, "--output_dir", place)
    assert "cannot write" in refuse(show_generations, run_directory, capsys, "--output", f"{place}/a.html")
    if place.startswith("file"):  # known before the models are asked
        said = refuse(prefix_accuracy, run_directory, capsys, "--output_dir", place)
        assert "cannot write" in said and "Loading" not in said


STRANGE = "\U0001f951 \x00 漢字 <|endoftext|> [SEP] </script> $5_{ "


ENORMOUS = pytest.param("x" * 50_000 + " word" * 10_000, marks=pytest.mark.slow, id="enormous")


@pytest.mark.parametrize(
    "text", [pytest.param(STRANGE, id="strange"), ENORMOUS, pytest.param("", id="empty")]
)
def test_strange_and_enormous_responses_reach_every_report(run_directory, small_models, monkeypatch, text):
    write_generations(run_directory, "ARGS", [text] * 9, PROMPTS)
    write_trace(run_directory, "ARGS", [[trace_step((text, -1.0, 1.0), chosen=0)]], [PROMPTS[0]])
    run_script(show_result, run_directory, "--policy", small_models["gpt2"], "--resamples", 9)
    run_script(show_generations, run_directory)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run_script(GPT4_eval_tldr, run_directory, ARGS, "generation_top_k.json", "--dry_run")

    page = read_page(run_directory)
    assert page["prompts"][0]["responses"][0] == text == page["traces"]["ARGS"][0][0]["tokens"][0]
    table = pd.read_csv(run_directory / "average_reward.csv", index_col="method")
    assert math.isfinite(table.loc["TOP-K", "log_likelihood_per_token"])
    fits = 0 < len(text) < 100  # into the policy's context; of nothing there is no log p per token
    assert math.isfinite(table.loc["ARGS", "log_likelihood_per_token"]) == fits


# Fuzzing

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=9), values, max_size=4),
    max_leaves=8,
)
text = st.text(max_size=20)
number = st.floats() | st.integers(-(10**9), 10**9) | st.none()
generation = st.fixed_dictionaries(
    {
        "prompt": text,
        "result": text,
        "reward": st.floats(allow_nan=False, allow_infinity=False),
        "num_tokens": st.integers(0, 10**9),
        "finish_reason": st.sampled_from(["eos", "length"]),
    },
    optional={"ids": st.none() | st.lists(st.integers(-(10**9), 10**9), max_size=4)},
)
step = st.fixed_dictionaries(
    {
        "tokens": st.lists(text, min_size=2, max_size=2),
        "log_probs": st.lists(number, min_size=2, max_size=2),
        "rewards": st.lists(number, min_size=2, max_size=2),
        "chosen": st.integers(0, 1),
    }
)
trace = st.fixed_dictionaries({"prompt": text, "steps": st.lists(step, max_size=2)})


def read(reader, name: str, content: bytes):
    """What a reader makes of a file; None where it refuses, which it may only do with exit code 2."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            return reader(path)
        except SystemExit as refused:
            assert refused.code == 2
            return None


def read_trace(path: Path) -> dict:
    return read_steps(Run(path.parent, pd.DataFrame(), {}), "ARGS")


@fuzz
@given(st.lists(generation, max_size=4) | st.lists(generation | anything, max_size=4) | anything)
def test_any_json_is_responses_or_refused(value):
    frame = read(read_responses, ARGS, json.dumps(value).encode())
    rows = value if isinstance(value, list) else [value]
    whole = all(isinstance(row, dict) and "finish_reason" in row for row in rows)
    assert (frame is not None) == whole
    if frame is not None:
        assert len(frame) == len(rows) and frame.index.is_unique


@fuzz
@given(st.lists(trace, min_size=1, max_size=3) | st.lists(trace | anything, max_size=3))
def test_any_json_lines_are_a_trace_or_refused(lines):
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    traces = read(read_trace, TRACE, content)
    whole = all(isinstance(line, dict) and "steps" in line for line in lines)
    assert (traces is not None) == whole
    for steps in (traces or {}).values():
        embed_json({"steps": [rounded_step(each) for each in steps]})
        with np.errstate(all="ignore"):
            log_p, log_q = trace_log_probs(steps, Method(policy="p", guide="r", weight=2))
            assert isinstance(float(log_q - log_p), float)


@fuzz
@given(st.binary(max_size=200) | st.text("0123456789.,-+e\n\"' promtARGSnaif", max_size=80).map(str.encode))
def test_any_bytes_are_a_table_or_refused(content):
    for prefix in (b"", b"prompt,ARGS\n", b"prompt,ARGS\na,1\n"):
        table = read(read_rewards, CSV, prefix + content)
        if table is not None:
            rewards = table.drop(columns="prompt").to_numpy()
            assert rewards.size and rewards.dtype == float and not np.isinf(rewards).any()
    read(read_responses, ARGS, content)


ASKED = Question("POST: p\nTL;DR:", " one", " two", "AB", "judge", 0.0)
score = st.integers(0, 11) | st.sampled_from([True, 7.0, "8", None])
around = st.text(st.characters(codec="utf-8", exclude_characters="{}"), max_size=30)
FRAGMENTS = ["{", "}", "[", '"', ":", ",", "8", "-1", "1e9", "true", "null", "\\"]
fragments = st.sampled_from([*FRAGMENTS, '"reason"', '"score_1"', '"score_2"'])


@fuzz
@given(text | st.lists(fragments | text, max_size=25).map("".join))
def test_the_judges_parser_raises_nothing_but_bad_reply(reply):
    try:
        found = parse_reply(reply, ASKED)
    except BadReply:
        return
    assert {found.score_1, found.score_2} <= set(range(1, 11)) and found.reason


@pytest.mark.parametrize(
    "reply", ["{" * 10**5 + "}", '{"a":' * 10**5 + "1" + "}" * 10**5, '{"a": "\\ud800"}']
)
def test_the_judges_parser_survives_depth_and_what_is_no_text(reply):
    with pytest.raises(BadReply):
        parse_reply(reply, ASKED)
    with pytest.raises(BadReply):
        parse_reply(reply + '{"score_1": ' + "9" * 5000 + ', "reason": "\ud800"}', ASKED)


fields_of_a_reply = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(["score_1", "score_2", "reason"], anything)
)
fields_of_a_reply |= st.fixed_dictionaries({"score_1": score, "score_2": score, "reason": text})


@fuzz
@given(around, fields_of_a_reply, around, st.booleans(), st.sampled_from([None, 2]))
def test_a_reply_is_a_verdict_exactly_where_it_has_the_format(before, fields, after, ascii_only, indent):
    scores, reason = [fields.get("score_1"), fields.get("score_2")], fields.get("reason")
    expected = all(type(score) is int and 1 <= score <= 10 for score in scores)
    expected = expected and isinstance(reason, str) and bool(reason.strip())
    try:
        found = parse_reply(
            before + json.dumps(fields, ensure_ascii=ascii_only, indent=indent) + after, ASKED
        )
    except BadReply:
        assert not expected
    else:
        assert expected and found.model_dump() == fields | {"reason": reason.strip()}


# The key

KEY = "sk-sentinel-5f2c9e1b7a"


LEAKS = [
    "key in a refusal",
    "key in an error",
    "key in a page",
    "key in a header",
    "repeats the key",
    "wrong key",
]


@pytest.mark.parametrize(
    ("behaviour", "code"), [("good", 0), ("key in a verdict", 0), *((leak, 2) for leak in LEAKS)]
)
def test_the_key_is_in_no_file_and_no_message(run_directory, monkeypatch, capsys, behaviour, code):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with JudgeServer(lambda server, asked: behaviour, score=lambda texts, position: position) as server:
        flags = ["--base_url", server.url, "--max_retries", 0, "--num_prompts", 2, "--concurrency", 2]
        ended = 0
        try:
            run_script(GPT4_eval_tldr, run_directory, ARGS, "generation_top_k.json", *flags)
        except SystemExit as stopped:
            ended = stopped.code
    captured = capsys.readouterr()
    assert ended == code, captured.err
    assert {request["key"] for request in server.requests} == {f"Bearer {KEY}"}  # it was sent, and only sent
    assert KEY not in captured.out + captured.err and "Traceback" not in captured.err

    files = [path for path in run_directory.rglob("*") if path.is_file()]
    assert (run_directory / "gpt-4-evaluations/generation_args_vs_generation_top_k.jsonl") in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


# Several processes

DRIVER = """
# Run scripts one after the other in each process of a launch: the imports are paid once.
import json, os, runpy, sys

for directory, script, *arguments in json.loads(sys.argv[1]):
    os.chdir(directory)
    sys.path[0] = os.path.dirname(script)
    sys.argv = [script] + [argument.replace("{rank}", os.environ["RANK"]) for argument in arguments]
    runpy.run_path(script, run_name="__main__")
"""
OUTPUTS = [
    *(f"{name}.{kind}" for name in ("average_reward", "prefix_accuracy") for kind in ("csv", "png", "pdf")),
    *("average_reward.md", "average_reward.tex", "token_rewards.png", "token_rewards.pdf"),
    "prefix_accuracy_paired.csv",
]


@pytest.fixture
def one_thread():
    """As in each process of a launch: the order of additions depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_processes_write_the_files_of_one(run_directory, small_models, tmp_path, one_thread, capsys, number):
    """And the first one alone prints, also where all fail (with 2), or says who failed alone (with 3)."""
    for rank in (0, 2):
        (tmp_path / f"disk{rank}").symlink_to(small_models["bert"])  # process 1 is on a node that lacks it
    failing = tmp_path / "disk{rank}" if number == 3 else tmp_path / "nowhere"
    models = ["--full_reward_model", small_models["deberta"], "--token_budget", 300, "--partial_reward_model"]
    ranking = [prefix_accuracy, *models, small_models["gpt2-reward"], "--num_examples", 1]
    reporting = [show_result, "--policy", small_models["gpt2"], "--batch_size", 2, "--resamples", 99]

    for module, *arguments in (ranking, reporting):
        run_script(module, run_directory, *arguments)
    assert capsys.readouterr().out.count(", 1 process\n") == 1
    alone = {name: (run_directory / name).read_bytes() for name in OUTPUTS}
    for name in OUTPUTS:
        (run_directory / name).unlink()

    refused = [prefix_accuracy, *models, failing, "--output_dir", "no"]
    commands = [
        [str(part) for part in (run_directory, module.__file__, *arguments)]
        for module, *arguments in (ranking, reporting, refused)
    ]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    done = subprocess.run(
        [*launch, f"--log-dir={tmp_path / 'logs'}", "--redirects=3", driver, json.dumps(commands)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    printed = {
        (int(path.parent.name), path.stem): path.read_text()
        for path in (tmp_path / "logs").glob("*/attempt_0/*/*.log")
    }
    assert len(printed) == 2 * number and done.returncode != 0, done.stderr
    for name in OUTPUTS:
        assert (run_directory / name).read_bytes() == alone[name], name
    assert printed[0, "stdout"].count(f"{number} processes") == 1
    assert not (run_directory / "no").exists()

    failed = 1 if number == 3 else 0
    for (rank, stream), said in printed.items():
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (stream == "stderr" and rank == failed), (rank, stream, said)
        if rank:
            assert said.strip() == "\n".join(errors), (rank, stream, said)
    said = "error: process 1: cannot load" if number == 3 else "error: cannot load"
    assert said in printed[failed, "stderr"]
    assert "exitcode  : 2" in done.stderr
