"""Stage 5 under bad inputs, under several processes, and with a key that must not be seen."""

import json
import math
import os
import re
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
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import BadReply, Question, parse_reply
from judge_server import JudgeServer
from response_measures import guided_kl
from run_files import read_responses, read_rewards, read_template, read_trace
from show_generations import embed_json, rounded_step
from transformers import AutoModelForSequenceClassification

TEMPLATE = "POST: {post}\nTL;DR:"
PROMPTS = [TEMPLATE.format(post=post) for post, _, _ in make_posts(9, 2)]
fuzz = settings(deadline=None, max_examples=200, derandomize=True, database=None)


# A run, and the scripts in it


def write_generations(directory: Path, stem: str, **changes: object) -> None:
    """A generation file whose rows have the fields of `changes`."""
    rows = [
        {"prompt": prompt, "result": f" {stem} on {at}", "num_tokens": 3, "finish_reason": "eos"} | changes
        for at, prompt in enumerate(PROMPTS)
    ]
    (directory / f"generation_{stem}.json").write_text(json.dumps(rows))


def trace_line(prompt: str = PROMPTS[0], **changes: object) -> str:
    step = {"tokens": ["a", "b"], "log_probs": [-1.0, -2.0], "rewards": [1.0, 2.0], "chosen": 0}
    return json.dumps({"prompt": prompt, "steps": [step | changes]}) + "\n"


def write_dataset(directory: Path, **columns: list) -> None:
    """Both splits that stage 5 reads; `columns` replaces some of the pairs'."""
    pairs = {"prompt": PROMPTS, "chosen": [f" {p[6:20]}" for p in PROMPTS], "rejected": [" so on"] * 9}
    splits = {
        "validation": Dataset.from_dict(pairs | columns),
        "test": Dataset.from_dict({"prompt": PROMPTS, "reference": [" a reference"] * 9}),
    }
    folder = directory / "summarize_from_feedback"
    DatasetDict(splits).save_to_disk(str(folder))
    (folder / "processing.json").write_text(json.dumps({"template": TEMPLATE}))


@pytest.fixture
def run_directory(tmp_path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    rewards = {"prompt": PROMPTS, "ARGS": np.arange(9.0), "TOP-K": np.arange(9.0)[::-1]}
    pd.DataFrame(rewards).to_csv(directory / "baseline_results.csv", index=False)
    write_generations(directory, "args")
    write_generations(directory, "top_k")
    (directory / "trace_args.jsonl").write_text("".join(map(trace_line, PROMPTS)))
    write_dataset(directory)
    return directory


def run(module, directory: Path, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()


def refuse(module, directory: Path, capsys, *arguments: object) -> str:
    """What the script says when it refuses: one error, exit code 2, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(module, directory, *arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(re.findall("^error: ", said, re.MULTILINE)) == 1, said
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    return said


# Bad inputs


def overwrite(name: str, content: str | bytes):
    def spoil(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def cut(pattern: str, edit):
    """Change the bytes of the one file that matches."""

    def spoil(directory: Path) -> None:
        (path,) = directory.glob(pattern)
        path.write_bytes(edit(path.read_bytes()))

    return spoil


def folder_instead(name: str):
    def spoil(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).mkdir()

    return spoil


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


DEEP = "[" * 100_000
CSV, ARGS, TRACE = "baseline_results.csv", "generation_args.json", "trace_args.jsonl"
TEST_ARROW = "summarize_from_feedback/test/*.arrow"
PAIRS_ARROW = "summarize_from_feedback/validation/*.arrow"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (overwrite(CSV, ""), f"cannot read {CSV}"),
        (overwrite(CSV, b"\x89PNG\r\n\xff\xfe"), f"cannot read {CSV}"),
        (cut(CSV, lambda content: content[:-20]), f"cannot read {CSV}"),
        (cut(CSV, lambda content: content[:-3]), "its last line is cut off"),
        (overwrite(CSV, "prompt,ARGS\n"), "a row per prompt"),
        (overwrite(CSV, "post,ARGS\na,1\n"), "needs a column `prompt`"),
        (overwrite(CSV, "prompt,ARGS\na,1,2\nb,1,2\n"), "more values than columns"),
        (overwrite(CSV, "prompt,ARGS\na,1e308\nb,1\n"), "'1e308' is not a finite number"),
        (overwrite(CSV, "prompt,ARGS\na,-inf\nb,1\n"), "'-inf' is not a finite number"),
        (folder_instead(CSV), f"cannot read {CSV}"),
        (cut(ARGS, half), f"cannot read {ARGS}"),
        (overwrite(ARGS, b"\xff\xfe\x00"), f"cannot read {ARGS}"),
        (overwrite(ARGS, DEEP), f"cannot read {ARGS}"),
        (overwrite(ARGS, "[]"), f"{ARGS} is not a list of responses"),
        (overwrite(ARGS, '{"prompt": "p"}'), f"{ARGS} is not a list of responses"),
        (lambda d: write_generations(d, "args", result=None), f"{ARGS}, row 1: needs the texts"),
        (folder_instead(ARGS), f"cannot read {ARGS}"),
        (cut(TRACE, half), "is no trace"),
        (overwrite(TRACE, b"\xff\n"), "line 1 is no trace"),
        (overwrite(TRACE, DEEP), "line 1 is no trace"),
        (overwrite(TRACE, trace_line(log_probs=["-1", "-2"])), "'-1' is no number"),
        (overwrite(TRACE, trace_line(chosen=0.5)), "the chosen candidate is 0.5 of 2"),
        (overwrite(TRACE, trace_line(tokens="ab")), "list of texts"),
        (overwrite(TRACE, trace_line(rewards=[10**400, 1])), "line 1 is no trace"),
        (overwrite(TRACE, '{"prompt": ["p"], "steps": []}\n'), "line 1 is no trace"),
        (folder_instead(TRACE), f"cannot read {TRACE}"),
        (cut(TEST_ARROW, half), "cannot read the test split"),
        (cut(TEST_ARROW, lambda content: b""), "cannot read the test split"),
        (
            cut(TEST_ARROW, lambda content: content.replace(b"POST", b"\xff" * 4)),
            "cannot read the test split",
        ),
    ],
)
def test_damaged_results_are_refused_in_one_message(run_directory, capsys, spoil, said):
    spoil(run_directory)
    for script in (show_result, show_generations):
        assert said in refuse(script, run_directory, capsys)


def test_a_damaged_table_or_picture_for_the_page(run_directory, capsys):
    for table in ("", "method,baseline,n,runs\n", "method,baseline,n,runs\nARGS,ARGS,many,x\n", "\0,\n"):
        overwrite("average_reward.csv", table)(run_directory)
        assert "cannot read average_reward.csv" in refuse(show_generations, run_directory, capsys)
    (run_directory / "average_reward.csv").unlink()

    (run_directory / "folder.png").mkdir()
    (run_directory / "link.png").symlink_to("nowhere")
    run(show_generations, run_directory)
    assert 'class="figure"' not in (run_directory / "generations.html").read_text()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "x" * 300])
def test_a_place_that_cannot_be_written(run_directory, small_models, capsys, place):
    (run_directory / "file").write_text("")
    assert "cannot write" in refuse(show_result, run_directory, capsys, "--output_dir", place)
    assert "cannot write" in refuse(show_generations, run_directory, capsys, "--output", f"{place}/a.html")
    if place.startswith("file"):  # known before the models are asked
        said = refuse(prefix_accuracy, run_directory, capsys, "--output_dir", place)
        assert "cannot write" in said and "Loading" not in said


@pytest.mark.parametrize("flags", [["--seed", "-1"], ["--no_such_flag", "1"], ["--seed", "many"]])
def test_bad_flags_are_one_line(run_directory, capsys, flags):
    for script in (show_result, prefix_accuracy):
        said = refuse(script, run_directory, capsys, *flags)
        assert flags[0] in said and said.count("\n") == 1


STRANGE = "\ud800 \U0001f951 \x00 漢字 <|endoftext|> [SEP] </script> $5_{ "
TEXTS = [STRANGE, "x" * 50_000 + " word" * 10_000, ""]


@pytest.mark.parametrize("text", TEXTS)
def test_strange_and_enormous_responses_reach_every_report(run_directory, small_models, monkeypatch, text):
    write_generations(run_directory, "args", result=text, num_tokens=10**400)
    overwrite(TRACE, trace_line(PROMPTS[0] + text, tokens=[text, "b"]))(run_directory)
    run(show_result, run_directory, "--policy", small_models["gpt2"], "--resamples", 9)
    run(show_generations, run_directory)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run(GPT4_eval_tldr, run_directory, ARGS, "generation_top_k.json", "--dry_run")

    page = (run_directory / "generations.html").read_text(encoding="utf-8")
    data = json.loads(page[page.index('id="data">') + 10 : page.index("</script>")])
    assert data["prompts"][0]["responses"][0] == text.replace("\ud800", "?")
    table = pd.read_csv(run_directory / "average_reward.csv", index_col="method")
    assert math.isnan(table.loc["ARGS", "mean_tokens"])  # no such number of tokens
    assert math.isfinite(table.loc["TOP-K", "log_likelihood_per_token"])
    assert math.isfinite(table.loc["ARGS", "log_likelihood_per_token"]) == (len(text) < 100)


def spoilt_model(folder: str, to: Path, edit) -> Path:
    shutil.copytree(folder, to)
    path = to / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    return to


def test_a_damaged_reward_model_is_refused(run_directory, small_models, capsys, tmp_path):
    good = ["--full_reward_model", small_models["bert"], "--partial_reward_model"]
    for number, edit in enumerate((half, lambda content: b"", lambda content: b"\xff" * 64 + content[64:])):
        bad = spoilt_model(small_models["bert"], tmp_path / f"bad{number}", edit)
        said = refuse(prefix_accuracy, run_directory, capsys, *good, bad)
        assert f"cannot load the weights of the reward model '{bad}'" in said

    for name in ("config.json", "tokenizer.json"):
        bad = shutil.copytree(small_models["bert"], tmp_path / f"no {name}")
        (bad / name).write_text("{")
        assert f"cannot load the reward model '{bad}'" in refuse(
            prefix_accuracy, run_directory, capsys, *good, bad
        )

    model = AutoModelForSequenceClassification.from_pretrained(small_models["bert"])
    model.classifier.bias.data.fill_(math.nan)
    bad = shutil.copytree(small_models["bert"], tmp_path / "nan")
    model.save_pretrained(bad)
    said = refuse(prefix_accuracy, run_directory, capsys, *good, bad)
    assert "the reward nan" in said and "post : so" in said  # names what it was asked


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut(PAIRS_ARROW, half), "cannot read the validation pairs"),
        (cut(PAIRS_ARROW, lambda content: b""), "cannot read the validation pairs"),
        (cut(PAIRS_ARROW, lambda content: content.replace(b"POST", b"\xff" * 4)), "can't decode byte 0xff"),
        (lambda d: write_dataset(d, chosen=[None] * 9), "a row is not three texts"),
        (lambda d: write_dataset(d, chosen=[3] * 9), "a row is not three texts"),
        (lambda d: write_dataset(d, chosen=[""] * 9), "none of the 9 validation pairs has two responses"),
        (overwrite("summarize_from_feedback/processing.json", "{"), "processing.json"),
        (overwrite("summarize_from_feedback/processing.json", '{"template": 3}'), "template is not text"),
    ],
)
def test_damaged_pairs_are_refused(run_directory, small_models, capsys, spoil, said):
    spoil(run_directory)
    models = ["--full_reward_model", small_models["bert"], "--partial_reward_model", small_models["bert"]]
    assert said in refuse(prefix_accuracy, run_directory, capsys, *models)


# Fuzzing

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=9), values, max_size=4),
    max_leaves=8,
)
text = st.text(st.characters(), max_size=20)
number = st.floats() | st.integers() | st.none()
generation = st.fixed_dictionaries({"prompt": text, "result": text}, optional={"num_tokens": anything})
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


@fuzz
@given(st.lists(generation, min_size=1, max_size=4) | st.lists(generation | anything, max_size=4) | anything)
def test_any_json_is_responses_or_refused(value):
    frame = read(read_responses, "generation_args.json", json.dumps(value).encode())
    rows = value if isinstance(value, list) else []
    usable = [
        isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("result"), str)
        for row in rows
    ]
    assert (frame is not None) == (bool(rows) and all(usable))
    if frame is not None:
        assert len(frame) == len(rows) and frame.index.is_unique and frame["num_tokens"].dtype == float
        "".join(frame["result"]).encode()  # has a UTF-8 form


@fuzz
@given(st.lists(trace, min_size=1, max_size=3) | st.lists(trace | anything, max_size=3))
def test_any_json_lines_are_a_trace_or_refused(lines):
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    traces = read(lambda path: read_trace(path.parent, "ARGS"), "trace_args.jsonl", content)
    if traces is not None:
        assert len(traces) == len(lines)
        for steps in traces.values():
            embed_json({"steps": [rounded_step(each) for each in steps]})
            with np.errstate(all="ignore"):
                assert isinstance(guided_kl(steps, 2.0), float)


@fuzz
@given(st.binary(max_size=200) | st.text("0123456789.,-+e\n\"' promtARGSnaif", max_size=80).map(str.encode))
def test_any_bytes_are_a_table_or_refused(content):
    for prefix in (b"", b"prompt,ARGS\n", b"prompt,ARGS\na,1\n"):
        rewards = read(read_rewards, "baseline_results.csv", prefix + content)
        if rewards is not None:
            assert rewards.index.is_unique and not np.isinf(rewards.to_numpy()).any()
    read(read_responses, "generation_args.json", content)
    read(lambda path: read_template(path.parent), "processing.json", content)


ASKED = Question("POST: p\nTL;DR:", " one", " two", "AB", "judge", 0.0)
score = st.integers(0, 11) | st.sampled_from([True, 7.0, "8", None])
around = st.text(st.characters(exclude_characters="{}"), max_size=30)
fragments = st.sampled_from(
    [
        "{",
        "}",
        "[",
        '"',
        ":",
        ",",
        "8",
        "-1",
        "1e9",
        "true",
        "null",
        '"reason"',
        '"score_1"',
        '"score_2"',
        "\\",
    ]
)


@fuzz
@given(text | st.lists(fragments | text, max_size=25).map("".join))
def test_the_judges_parser_raises_nothing_but_bad_reply(reply):
    try:
        verdict = parse_reply(reply, ASKED)
    except BadReply:
        return
    assert (
        verdict["score_1"] in range(1, 11)
        and verdict["score_2"] in range(1, 11)
        and verdict["reason"].strip()
    )


def test_the_judges_parser_survives_depth():
    for reply in (
        "{" * 100_000 + "}",
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"score_1": ' + "9" * 5000 + "}",
    ):
        with pytest.raises(BadReply):
            parse_reply(reply, ASKED)


@fuzz
@given(
    around,
    st.fixed_dictionaries({}, optional={"score_1": anything, "score_2": anything, "reason": anything})
    | st.fixed_dictionaries({"score_1": score, "score_2": score, "reason": text}),
    around,
)
def test_a_reply_is_a_verdict_exactly_where_it_has_the_format(before, fields, after):
    scores = [fields.get("score_1"), fields.get("score_2")]
    reason = fields.get("reason")
    expected = all(type(score) is int and 1 <= score <= 10 for score in scores)
    expected = expected and isinstance(reason, str) and bool(reason.strip())
    try:
        verdict = parse_reply(before + json.dumps(fields) + after, ASKED)
    except BadReply:
        assert not expected
    else:
        assert expected and verdict == fields


@fuzz
@given(
    around,
    text.filter(str.strip),
    st.integers(1, 10),
    st.integers(1, 10),
    st.booleans(),
    st.sampled_from([None, 2]),
    around,
)
def test_well_formed_replies_come_back_as_they_were(before, reason, one, two, ascii_only, indent, after):
    fields = {"reason": reason, "score_1": one, "score_2": two}
    reply = before + json.dumps(fields, ensure_ascii=ascii_only, indent=indent) + after
    assert parse_reply(reply, ASKED) == fields


# The key

KEY = "sk-sentinel-5f2c9e1b7a"


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("good", 0),
        ("key in a verdict", 0),
        ("key in a refusal", 2),
        ("key in an error", 2),
        ("key in a page", 2),
        ("key in a header", 2),
        ("repeats the key", 2),
        ("wrong key", 2),
    ],
)
def test_the_key_is_in_no_file_and_no_message(run_directory, monkeypatch, capsys, behaviour, code):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with JudgeServer(lambda server, asked: behaviour, score=lambda texts, position: position) as server:
        flags = ["--base_url", server.url, "--max_retries", 0, "--num_prompts", 2, "--concurrency", 2]
        ended = 0
        try:
            run(GPT4_eval_tldr, run_directory, ARGS, "generation_top_k.json", *flags)
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
]


@pytest.fixture
def one_thread():
    """As in each process of a launch: the order of additions depends on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        run(module, run_directory, *arguments)
    assert capsys.readouterr().out.count(", 1 process\n") == 2
    alone = {name: (run_directory / name).read_bytes() for name in OUTPUTS}
    for name in OUTPUTS:
        (run_directory / name).unlink()

    commands = [
        list(map(str, [run_directory, module.__file__, *arguments]))
        for module, *arguments in (
            ranking,
            reporting,
            [prefix_accuracy, *models, failing, "--output_dir", "no"],
        )
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
    assert printed[0, "stdout"].count(f"{number} processes") == 2
    assert not (run_directory / "no").exists()

    failed = 1 if number == 3 else 0
    for (rank, stream), said in printed.items():
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == (stream == "stderr" and rank == failed), (rank, stream, said)
        if rank:
            assert said.strip() == "\n".join(errors), (rank, stream, said)
    assert ("error: process 1: cannot load" if number == 3 else "error: cannot load") in printed[
        failed, "stderr"
    ]
    assert "exitcode  : 2" in done.stderr
