"""The demo's world: the generator, the qualities it labels by, the report on them and the shipped models."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import make_posts
import numpy as np
import pandas as pd
import pytest
import themes
import torch
import true_quality as report
from conftest import ROOT, assert_one_error, copy_run_sh
from datasets import DatasetDict, Features, List, Value, load_dataset
from make_posts import DEFECTS, draw_story, facts_of, parse, write_post, write_summary
from quality import WEIGHTS, share_said, true_quality
from small_runs import (
    CSV,
    half,
    overwrite,
    refuse,
    run_script,
    write_generations,
    write_records,
    write_references,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from true_quality import Mean, compare_in_words, difference, mark

from pargs.runs import Method

MODELS = ROOT / "demo/models"
POSTS, TEST_POSTS = "openai/summarize_from_feedback", "CarperAI/openai_summarize_tldr"
SIZES = ["--train_pairs", "60", "--validation_pairs", "20", "--test_posts", "15", "--articles", "3"]
TEXT = Value("string")
HUB_FEATURES = Features(
    {
        "info": dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"), TEXT),
        "summaries": List({"text": TEXT, "policy": TEXT, "note": TEXT}),
        "choice": Value("int32"),
        "worker": TEXT,
        "batch": TEXT,
        "split": TEXT,
        "extra": {"confidence": Value("int32")},
    }
)
POST = "I am 30. My boss cut my pay by $200. My sister agrees with me. It rained all day. Should I quit?"
FACTS = {
    "person": "boss",
    "roles": ["boss", "sister", "intern"],
    "event": ["pay", "$200", "cut/reduc"],
    "question": ["quit"],
    "words": ["am", "bos", "cut", "pay", "200", "sister", "agre", "rain", "quit"],
}
GOOD = "My boss cut my pay by $200. Should I quit?"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world."""
    directory = tmp_path_factory.mktemp("made")
    run_script(make_posts, directory, "data", *SIZES)
    return directory / "data"


def load(folder: Path, cache: Path) -> DatasetDict:
    return load_dataset(str(folder), cache_dir=str(cache))


# The generator


@pytest.mark.slow
def test_generator_is_deterministic(made: Path, tmp_path: Path) -> None:
    """Also in another process, where the hashes of strings are others."""
    command = [sys.executable, make_posts.__file__, "again", *SIZES]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_rows_have_the_hub_schema(made: Path, tmp_path: Path) -> None:
    comparisons = load(made / POSTS, tmp_path)
    assert {split: len(rows) for split, rows in comparisons.items()} == {"train": 60, "validation": 23}
    for rows in comparisons.values():
        assert rows.features == HUB_FEATURES
    articles = [row["info"]["article"] for row in comparisons["validation"] if row["info"]["post"] is None]
    assert len(articles) == 3 and all(articles)

    test = load(made / TEST_POSTS, tmp_path)["test"]
    assert test.features == Features({"prompt": TEXT, "label": TEXT})
    assert len(test) == 15
    for row in test:
        assert row["prompt"].startswith("SUBREDDIT: r/") and row["prompt"].endswith("\nTL;DR:")


def test_card_tells_apart_folders_of_one_name(made: Path, tmp_path: Path) -> None:
    """datasets caches a local folder by its name and its card: other rows need another card."""
    run_script(make_posts, tmp_path, "other", "--train_pairs", 5, "--seed", 9)
    folders = (made / POSTS, tmp_path / "other" / POSTS)
    assert [len(load(folder, tmp_path / "cache")["train"]) for folder in folders] == [60, 5]


def test_splits_have_no_story_in_common() -> None:
    rng, names = random.Random(0), ("person", "event_concepts", "question_line")
    drawn = [
        {str([story[name] for name in names]) for story in (draw_story(rng, split) for _ in range(500))}
        for split in ("train", "validation", "test")
    ]
    assert len(set.union(*drawn)) == sum(map(len, drawn))


def test_choice_is_the_better_summary(made: Path, tmp_path: Path) -> None:
    facts = json.loads((made / "demo_facts.json").read_text())
    validation = load(made / POSTS, tmp_path)["validation"]
    rows = [row for row in validation if row["info"]["post"]]
    right = 0
    for row in rows:
        totals = [true_quality(s["text"], facts[row["info"]["post"]])["total"] for s in row["summaries"]]
        right += totals[row["choice"]] > totals[1 - row["choice"]]
    assert right >= 0.8 * len(rows)  # 3% of the labels are turned around

    for row in load(made / TEST_POSTS, tmp_path)["test"]:
        post = row["prompt"].partition("POST: ")[2].removesuffix("\nTL;DR:")
        assert true_quality(row["label"], facts[post])["total"] > 0.97


def test_every_wording_names_its_concepts() -> None:
    slots = {name: values[0] for name, values in themes.SLOTS.items()}
    slots |= {"P": "my boss", "he": "she", "him": "her", "his": "her"}
    for theme in themes.THEMES.values():
        for line in theme["events"] + theme["questions"]:
            wordings, concepts = parse(line, slots)
            for wording in wordings:
                assert share_said(wording, concepts) == 1, (wording, concepts)


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_generator_knows_each_defect(defect: str) -> None:
    """Over many stories a summary with the defect loses in the quality of that name."""
    name = {"invention": "no_invention", "repetition": "no_repetition"}.get(defect, defect)
    rng = random.Random(0)
    bad = good = 0.0
    for _ in range(60):
        story = draw_story(rng, "train")
        facts = facts_of(story, write_post(rng, story))
        bad += true_quality(write_summary(rng, story, {defect}), facts)[name] / 60
        good += true_quality(write_summary(rng, story, set()), facts)[name] / 60
    assert bad < 0.8 < 0.98 < good


def test_posts_have_50_to_90_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "summariser")
    rng = random.Random(0)
    stories = [draw_story(rng, "train") for _ in range(300)]
    lengths = [len(tokenizer(write_post(rng, story))["input_ids"]) for story in stories]
    assert 50 <= min(lengths) <= max(lengths) <= 90


def test_a_folder_that_is_a_file_is_one_message(tmp_path: Path, call_main) -> None:
    (tmp_path / "taken").write_text("")
    assert_one_error(*call_main(make_posts, tmp_path / "taken"), "taken is a file")


# The qualities


@pytest.mark.parametrize(
    ("quality", "summary", "expected"),
    [
        ("event", "My boss is difficult. Should I quit?", 0),
        ("event", "My boss cut my pay. Should I quit?", 2 / 3),
        ("people", "My sister cut my pay by $200. Should I quit?", 0),
        ("people", "My sister says my boss cut my pay by $200. Should I quit?", 0.5),
        ("people", "Someone cut my pay by $200. Should I quit?", 0),
        ("question", "My boss cut my pay by $200. What now?", 0),
        ("question", "My boss cut my pay by $200. I quit.", 0.5),
        ("no_invention", "My boss cut my pay by $200 in Paris. Should I quit?", 0.5),
        ("no_invention", "My boss cut my pay by $200 with a rusty axe. Should I quit?", 0),
        ("no_repetition", "My boss cut my pay, cut my pay by $200. Should I quit?", 2 / 3),
        ("no_repetition", "My my boss cut my pay by $200. Should I quit?", 2 / 3),
        ("brevity", f"{GOOD} {'I do not know. ' * 6} So what?", 1 - 14 / 18),
    ],
)
def test_a_defect_costs_its_quality(quality: str, summary: str, expected: float) -> None:
    scores = true_quality(summary, FACTS)
    assert scores[quality] == pytest.approx(expected)
    assert scores["total"] < 1
    assert scores["total"] == pytest.approx(sum(WEIGHTS[name] * scores[name] for name in WEIGHTS))


def test_a_good_summary_has_every_quality_and_an_empty_one_none() -> None:
    names = [*WEIGHTS, "total"]
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert true_quality(GOOD, FACTS) == pytest.approx(dict.fromkeys(names, 1.0))
    assert true_quality("", FACTS) == dict.fromkeys(names, 0.0)
    other_words = "boss reducing pay by $200, wondering if I should quit?"
    facts = FACTS | {"words": [*FACTS["words"], "reduc"]}
    assert true_quality(other_words, facts)["total"] == pytest.approx(1)


# The report


def write_run(directory: Path, made: Path, **texts: str | None) -> Path:
    """A run in which a method wrote the same word everywhere, or the references (None)."""
    directory.mkdir(exist_ok=True)
    test = pd.read_parquet(made / TEST_POSTS / "test.parquet")
    prompts = [f"POST: {prompt.partition('POST: ')[2]}" for prompt in test["prompt"]]
    table = pd.DataFrame({"prompt": prompts})
    for name, text in texts.items():
        method = name.replace("_", "-")
        responses = [text or f" {label}" for label in test["label"]]
        write_generations(directory, method, responses, prompts)
        table[method] = range(len(test))
    table.assign(reference=2.0).to_csv(directory / CSV, index=False)
    return directory


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A run directory in which ARGS wrote the references and TOP-K nothing but a word."""
    shutil.copy(made / "demo_facts.json", tmp_path)
    return write_run(tmp_path, made, ARGS=None, TOP_K=" Help.")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Without the files of the figure, which take most of the time."""
    monkeypatch.setattr(report, "save_figure", lambda figure, path: None)


def test_the_report_scores_each_method(world: Path, capsys) -> None:
    run_script(report, world)
    table = pd.read_csv(world / "true_quality.csv", index_col="method")
    assert list(table.index) == ["ARGS", "TOP-K"]
    assert list(table["n"]) == [15, 15] and list(table["run"]) == [".", "."]
    args, top_k = table.loc["ARGS"], table.loc["TOP-K"]
    assert args["true_quality"] > 0.97
    assert args["interval_low"] <= args["true_quality"] <= args["interval_high"]
    # No invention, no repetition, brevity.
    columns = ["true_quality", "standard_error", "interval_low", "interval_high", "reward"]
    assert list(top_k[columns]) == pytest.approx([0.3, 0, 0.3, 0.3, 7])
    assert top_k["minus_ARGS"] == pytest.approx(0.3 - args["true_quality"])
    assert np.isnan(args["minus_ARGS"]) and "minus_GREEDY" not in table
    assert "ARGS" in capsys.readouterr().out
    assert {"true_quality.png", "true_quality.pdf"} <= {path.name for path in world.iterdir()}


def test_references_are_found_in_the_run_or_here(world: Path, made: Path, undrawn) -> None:
    run = write_run(world / "run", made, ARGS=None)
    prompts = list(pd.read_csv(world / CSV)["prompt"])
    write_references(world, [" Help."] * 15, prompts)
    write_references(run, [" Help.", *[" "] * 14], prompts)
    run_script(report, world, ".", "run/")
    table = pd.read_csv(world / "true_quality.csv", index_col=["run", "method"])
    assert table.loc[(".", "reference"), "true_quality"] == pytest.approx(0.3)
    assert table.loc[("run", "reference"), "true_quality"] == pytest.approx(0.3 / 15)


def test_a_prompt_that_comes_twice_counts_once() -> None:
    texts = ["My boss", "The pay", "", ""]  # people 1, event 0 then 0 and 1/3; an empty one has nothing
    marks = mark(texts, [FACTS] * 4, pd.Series([1.0, 5.0, 2.0, 7.0]), ["p", "p", "q", "r"])
    assert list(marks.index) == ["p", "q", "r"] and list(marks["reward"]) == [3, 2, 7]
    assert list(marks["people"]) == [0.5, 0, 0]
    assert list(marks["event"]) == pytest.approx([1 / 6, 0, 0])


def test_differences_are_paired_by_prompt() -> None:
    """Each prompt is 0.3 better; by position the differences would be spread."""
    first = pd.DataFrame({"total": [0.5, 0.7, 0.9]}, index=["p", "q", "r"])
    second = pd.DataFrame({"total": [0.6, 0.2, 0.4]}, index=["r", "p", "q"])
    gap = difference(first, second, report.Settings())
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.3, 0.3, 0.3))


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (Mean(0.12, 0.08, 0.16), "A is 0.120 [0.080, 0.160] above B."),
        (Mean(-0.12, -0.16, -0.08), "A is 0.120 [0.080, 0.160] below B."),
        (
            Mean(-0.02, -0.05, 0.01),
            "A and B are not told apart: the difference is -0.020 [-0.050, +0.010], which holds 0.",
        ),
        (
            Mean(0.02, 0.0, 0.05),
            "A and B are not told apart: the difference is +0.020 [+0.000, +0.050], which holds 0.",
        ),
        (Mean(0.5, float("nan"), float("nan")), "A and B: too few prompts to compare."),
    ],
)
def test_words_say_no_more_than_the_interval(gap: Mean, said: str) -> None:
    assert compare_in_words("A", "B", gap) == said


def guided(guide: object, **changes: object) -> Method:
    return Method(policy="p", guide=str(guide), greedy=True, **({"weight": 1} | changes))


def test_runs_are_compared_with_those_of_the_same_prompts(world: Path, made: Path, undrawn, capsys) -> None:
    """What guided a method is as recorded; the guide of a run is named from its directory."""
    shutil.copytree(MODELS / "causal-reward-model", world / "guide")
    encoder = MODELS / "full-reward-model"
    write_records(write_run(world, made, ARGS=" Help.", GREEDY=None), "p", ARGS=guided("guide", weight=2))
    pd.read_csv(world / CSV)[:14].to_csv(world / CSV, index=False)  # fewer prompts than the others have
    for method in ("args", "greedy"):
        rows = json.loads((world / f"generation_{method}.json").read_text())
        (world / f"generation_{method}.json").write_text(json.dumps(rows[:14]))

    write_records(write_run(world / "open", made, ARGS=None, GREEDY=" Help."), "p", ARGS=guided("../guide"))
    heavy = write_run(world / "heavy", made, ARGS=" Help.", PARGS_G=None)
    write_records(heavy, "p", ARGS=guided(world / "guide", weight=3), PARGS_G=guided(encoder))
    closed = write_run(world / "closed", made, ARGS=" Help.")
    write_records(closed, "p", ARGS=guided("../guide", guide_eos="always"))

    run_script(report, world, ".", "open", "heavy", "closed")
    table = pd.read_csv(world / "true_quality.csv", index_col=["run", "method"])
    assert table.loc[("heavy", "PARGS-G"), ["ARGS_of", "GREEDY_of"]].tolist() == ["heavy", "open"]
    assert table.loc[("heavy", "ARGS"), "minus_GREEDY"] == pytest.approx(0)
    assert table.loc[(".", "ARGS"), "GREEDY_of"] == "."

    gaps = [abs(table.loc[(run, "ARGS"), "minus_GREEDY"]) for run in (".", "open")]
    fewer, all_of_them = (f"is {gap:.3f}" for gap in gaps)
    words = capsys.readouterr().out.partition("True quality, paired")[2].splitlines()[1:]
    assert [re.sub(r" \[.*\]", "", line) for line in words] == [
        f"{world.name} (decoder-only guides, 14 prompts)",
        f"- ARGS (w = 2) {fewer} below GREEDY.",
        "open (decoder-only guides, 15 prompts)",
        f"- ARGS (w = 1) {all_of_them} above GREEDY.",
        "heavy (decoder-only and encoder guides, 15 prompts)",
        f"- PARGS-G (w = 1) {all_of_them} above ARGS (w = 3).",
        f"- ARGS (w = 3) {all_of_them} below ARGS (w = 1) of open.",
        "closed (decoder-only guides, 15 prompts)",
        f"- ARGS (w = 1, EOS behind every prefix) {all_of_them} below ARGS (w = 1) of open.",
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "demo_facts.json").unlink(), "demo_facts.json is missing"),
        (overwrite("demo_facts.json", half), "cannot read demo_facts.json"),
        (overwrite("demo_facts.json", "{}"), "prompt 0 of the rewards is no post"),
        (lambda run: (run / "generation_args.json").unlink(), "generation_args.json is missing"),
        (overwrite("generation_args.json", "[]"), "generation_args.json is of other prompts"),
        (overwrite("methods.json", half), "methods.json is not what was written there"),
    ],
)
def test_the_report_fails_clearly(world: Path, capsys, spoil, said: str) -> None:
    """Damaged rewards and generations are in test_evaluation_reliability.py."""
    write_records(world, "p", ARGS=guided("g"))
    spoil(world)
    assert f"error: {said}" in refuse(report, world, capsys)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([".", "absent"], "there is no run directory 'absent'"),
        ([".", "empty"], "empty/baseline_results.csv is missing"),
        ([".", "empty/.."], "a run directory is named twice"),
    ],
)
def test_runs_that_are_none_are_refused(world: Path, capsys, runs: list[str], said: str) -> None:
    (world / "empty").mkdir()
    assert f"error: {said}" in refuse(report, world, capsys, *runs)


# run.sh


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["demo", "paper"])
def test_run_sh_tells_both_halves_of_the_demo_and_the_paper_alone(tmp_path: Path, mode: str) -> None:
    """Which scripts it starts, where; a stand-in for python notes it."""
    copy_run_sh(tmp_path, 'case "$1" in *.py) echo "$PWD $*" >> "${0%/.venv*}/log" ;; esac')

    def start(*steps: str) -> list[tuple[str, str, str]]:
        """(directory, script, arguments) of each start."""
        (tmp_path / "log").unlink(missing_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
        subprocess.run(["bash", "run.sh", mode, *steps], cwd=tmp_path, env=environment, check=True)
        lines = (tmp_path / "log").read_text().splitlines()
        started = [line.removeprefix(f"{tmp_path}/runs/{mode}").split(" ", 2) for line in lines]
        return [(place, Path(script).stem, "".join(rest)) for place, script, *rest in started]

    flagged = start("decode", "--", "--seed", "3")
    assert flagged and all(arguments.endswith(" --seed 3") for *_, arguments in flagged)
    whole, later = start(), start("decode", "report")
    decoded = [(place, arguments) for place, script, arguments in whole if script == "PARGS_baselines"]
    assert all("--overwrite" in arguments for _, arguments in decoded)
    assert not [arguments for _, _, arguments in later if "--overwrite" in arguments]
    if mode == "paper":
        assert {place for place, *_ in whole} == {""} and len(whole) == 8
        assert "true_quality" not in [script for _, script, _ in whole]
        assert "--evaluation_reward_model" not in decoded[0][1]
        return

    assert [place for place, _ in decoded] == ["", "/causal", "/causal-w3", "/causal-closed"]
    assert [script for place, script, _ in whole if place == "/causal"] == [
        "tldr_data_process_partial",
        "tldr_partial_reward_model",
        "PARGS_baselines",
        "show_result",
        "prefix_accuracy",
    ]
    models = f"{tmp_path}/demo/models"
    by_guide = [f"--evaluation_reward_model {models}/{name}-reward-model" for name in ("causal", "full")]
    assert [by_guide[0] in arguments for _, arguments in decoded] == [True, False, False, False]
    assert [by_guide[1] in arguments for _, arguments in decoded] == [False, True, True, True]
    assert whole[-1] == later[-1] == ("", "true_quality", ". causal causal-w3 causal-closed")


# The shipped models


def test_shipped_models_are_small_plain_files() -> None:
    files = [path for path in MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    weights = {path.parent.name for path in files if path.suffix == ".safetensors"}
    assert weights == {"summariser", "full-reward-model", "causal-reward-model", "rl-summariser"}
    for path in files:
        if path.suffix == ".json":
            content = path.read_text()
            assert not [root for root in ("/tmp", "/home", "/root", "/work", "C:\\") if root in content], path
        if path.name == "config.json":
            assert json.loads(content)["dtype"] == "float32"


@pytest.mark.parametrize("name", ["summariser", "rl-summariser"])
def test_shipped_policies_load_and_finish_their_summaries(name: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(MODELS / name)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert policy.config.model_type == "gpt2"
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token is None
    assert policy.config.eos_token_id == tokenizer.eos_token_id

    inputs = tokenizer(f"POST: {POST}\nTL;DR:", return_tensors="pt")
    ids = policy.generate(**inputs, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)
    response = ids[0, inputs["input_ids"].shape[1] :]
    assert response[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(response, skip_special_tokens=True)
    # It tells of the post; like its careless writers it may name the wrong person.
    assert text.startswith(" ") and "$200" in text


def test_shipped_reward_model_prefers_the_good_summary() -> None:
    folder = MODELS / "full-reward-model"
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert reward_model.config.model_type == "deberta-v2"
    pair = tokenizer.convert_ids_to_tokens(tokenizer("I", "I")["input_ids"])
    assert pair == ["[CLS]", "▁I", "[SEP]", "▁I", "[SEP]"]

    bad = [" Someone did something.", " My boss is difficult and then won the lottery, any advice?"]
    prompts = [f"POST: {POST}\nTL;DR:"] * 3
    inputs = tokenizer(prompts, [f" {GOOD}", *bad], padding=True, return_tensors="pt")
    with torch.no_grad():
        rewards = reward_model(**inputs).logits[:, 0]
    assert rewards.argmax() == 0


def test_shipped_causal_reward_model_prefers_the_good_summary_at_its_eos() -> None:
    folder = MODELS / "causal-reward-model"
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert reward_model.config.model_type == "gpt2"
    # Padding with the EOS would let the classifier read the token before it.
    assert tokenizer.pad_token is None and reward_model.config.pad_token_id is None
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(MODELS / "summariser").get_vocab()

    bad = [" Someone did something.", " My boss is difficult and then won the lottery, any advice?"]
    rewards = []
    for response in (f" {GOOD}", *bad):
        text = f"POST: {POST}\nTL;DR:{response}{tokenizer.eos_token}"
        with torch.no_grad():
            rewards.append(reward_model(**tokenizer(text, return_tensors="pt")).logits.item())
    assert max(rewards) == rewards[0]
