"""The demo's world: the generator, the qualities it labels by, the report on them and the shipped models."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import themes
import torch
import true_quality as report
from conftest import ROOT
from datasets import DatasetDict, Features, List, Value, load_dataset
from make_posts import DEFECTS, draw_story, facts_of, parse, write_post, write_summary
from quality import WEIGHTS, share_said, true_quality
from small_runs import CSV, half, overwrite, refuse, run_script, write_generations, write_references
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2ForSequenceClassification,
    GPT2LMHeadModel,
)

DEMO = ROOT / "demo"
INFO = {name: Value("string") for name in ("id", "post", "title", "subreddit", "site", "article")}
HUB_FEATURES = Features(
    {
        "info": INFO,
        "summaries": List({"text": Value("string"), "policy": Value("string"), "note": Value("string")}),
        "choice": Value("int32"),
        "worker": Value("string"),
        "batch": Value("string"),
        "split": Value("string"),
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


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DEMO / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def load(folder: Path, cache: Path) -> DatasetDict:
    return load_dataset(str(folder), cache_dir=str(cache))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    sizes = ["--train_pairs", "60", "--validation_pairs", "20", "--test_posts", "15", "--articles", "3"]
    done = run("make_posts.py", "data", *sizes, cwd=out)
    assert done.returncode == 0, done.stderr
    again = run("make_posts.py", "again", *sizes, cwd=out)
    assert again.returncode == 0, again.stderr
    return out


def test_generator_is_deterministic(made: Path) -> None:
    files = sorted(p.relative_to(made / "data") for p in (made / "data").rglob("*") if p.is_file())
    assert len(files) == 6
    for file in files:
        assert (made / "data" / file).read_bytes() == (made / "again" / file).read_bytes(), file


def test_rows_have_the_hub_schema(made: Path, tmp_path: Path) -> None:
    comparisons = load(made / "data/openai/summarize_from_feedback", tmp_path)
    assert {split: len(rows) for split, rows in comparisons.items()} == {"train": 60, "validation": 23}
    for rows in comparisons.values():
        assert rows.features == HUB_FEATURES

    articles = [row for row in comparisons["validation"] if row["info"]["post"] is None]
    assert len(articles) == 3
    assert all(row["info"]["article"] for row in articles)

    test = load(made / "data/CarperAI/openai_summarize_tldr", tmp_path)["test"]
    assert test.features == Features({"prompt": Value("string"), "label": Value("string")})
    assert len(test) == 15
    for row in test:
        assert row["prompt"].startswith("SUBREDDIT: r/")
        assert row["prompt"].endswith("\nTL;DR:")


def test_card_tells_apart_folders_of_one_name(made: Path, tmp_path: Path) -> None:
    """datasets caches a local folder by its name and its card: other rows need another card."""
    other = run("make_posts.py", str(tmp_path / "other"), "--train_pairs", "5", "--seed", "9", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    sizes = [
        len(load(folder / "openai/summarize_from_feedback", tmp_path / "cache")["train"])
        for folder in (made / "data", tmp_path / "other")
    ]
    assert sizes == [60, 5]


def test_choice_is_the_better_summary_and_test_posts_are_apart(made: Path, tmp_path: Path) -> None:
    facts = json.loads((made / "data/demo_facts.json").read_text())
    comparisons = load(made / "data/openai/summarize_from_feedback", tmp_path)
    test = load(made / "data/CarperAI/openai_summarize_tldr", tmp_path)["test"]

    rows = [row for row in comparisons["validation"] if row["info"]["post"]]
    right = 0
    for row in rows:
        totals = [true_quality(s["text"], facts[row["info"]["post"]])["total"] for s in row["summaries"]]
        right += totals[row["choice"]] > totals[1 - row["choice"]]
    assert right >= 0.8 * len(rows)  # 3% of the labels are turned around

    used = {row["info"]["post"] for split in comparisons.values() for row in split}
    for row in test:
        post = row["prompt"].partition("POST: ")[2].removesuffix("\nTL;DR:")
        assert post not in used
        assert true_quality(row["label"], facts[post])["total"] > 0.97


def test_every_wording_names_its_concepts() -> None:
    slots = {name: values[0] for name, values in themes.SLOTS.items()}
    slots |= {"P": "my boss", "he": "she", "him": "her", "his": "her"}
    for theme in themes.THEMES.values():
        for line in theme["events"] + theme["questions"]:
            wordings, concepts = parse(line, slots)
            for wording in wordings:
                assert share_said(wording, concepts) == 1, (wording, concepts)


def test_a_good_summary_has_every_quality() -> None:
    assert true_quality(GOOD, FACTS) == pytest.approx(dict.fromkeys([*WEIGHTS, "total"], 1.0))
    assert sum(WEIGHTS.values()) == pytest.approx(1)


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


def test_other_words_for_the_same_are_no_defect() -> None:
    facts = FACTS | {"words": [*FACTS["words"], "reduc"]}
    scores = true_quality("boss reducing pay by $200, wondering if I should quit?", facts)
    assert scores["total"] == pytest.approx(1)


def test_an_empty_summary_has_no_quality() -> None:
    assert true_quality("", FACTS) == dict.fromkeys([*WEIGHTS, "total"], 0.0)


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_generator_knows_each_defect(defect: str) -> None:
    """Over many stories a summary with the defect loses in the quality of that name."""
    name = {"invention": "no_invention", "repetition": "no_repetition"}.get(defect, defect)
    rng = random.Random(0)
    scores = []
    for _ in range(60):
        story = draw_story(rng, "train")
        facts = facts_of(story, write_post(rng, story))
        scores.append([true_quality(write_summary(rng, story, d), facts)[name] for d in ({defect}, set())])

    bad, good = map(list, zip(*scores, strict=True))
    assert sum(bad) / 60 < 0.8 < 0.98 < sum(good) / 60


def test_a_folder_that_is_a_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    done = run("make_posts.py", "taken", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: taken is a file")
    assert "Traceback" not in done.stderr


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A run directory in which ARGS wrote the references and TOP-K nothing but a word."""
    (tmp_path / "demo_facts.json").write_text((made / "data/demo_facts.json").read_text())
    test = pd.read_parquet(made / "data/CarperAI/openai_summarize_tldr/test.parquet")
    prompts = [f"POST: {prompt.partition('POST: ')[2]}" for prompt in test["prompt"]]
    write_generations(tmp_path, "ARGS", [f" {label}" for label in test["label"]], prompts)
    write_generations(tmp_path, "TOP-K", [" Help."] * len(test), prompts)
    table = pd.DataFrame({"prompt": prompts, "ARGS": 1.0, "TOP-K": range(len(test)), "reference": 2.0})
    table.to_csv(tmp_path / CSV, index=False)
    return tmp_path


def test_the_report_scores_each_method(world: Path, capsys) -> None:
    run_script(report, world)
    table = pd.read_csv(world / "true_quality.csv", index_col="method")
    assert list(table.index) == ["ARGS", "TOP-K"]
    assert table.loc["ARGS", "true_quality"] > 0.97
    assert table.loc["TOP-K", "true_quality"] == pytest.approx(0.3)  # no invention, no repetition, brevity
    assert table.loc["TOP-K", "standard_error"] == pytest.approx(0)
    assert table.loc["TOP-K", "reward"] == pytest.approx(7)
    assert list(table["n"]) == [15, 15]
    assert "ARGS" in capsys.readouterr().out

    prompts = list(pd.read_csv(world / CSV)["prompt"])
    write_references(world, [" Help."] * 15, prompts)
    run_script(report, world)
    table = pd.read_csv(world / "true_quality.csv", index_col="method")
    assert table.loc["reference", "true_quality"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "demo_facts.json").unlink(), "demo_facts.json is missing"),
        (overwrite("demo_facts.json", half), "cannot read demo_facts.json"),
        (overwrite("demo_facts.json", "{}"), "prompt 0 of the rewards is no post"),
        (lambda run: (run / CSV).unlink(), f"{CSV} is missing"),
        (lambda run: (run / "generation_args.json").unlink(), "generation_args.json is missing"),
        (overwrite("generation_args.json", half), "generation_args.json is not"),
        (overwrite("generation_args.json", "[]"), "generation_args.json is of other prompts"),
    ],
)
def test_the_report_fails_clearly(world: Path, capsys, spoil, message: str) -> None:
    spoil(world)
    assert f"error: {message}" in refuse(report, world, capsys)


NAMES = ("summariser", "full-reward-model", "rl-summariser")


def test_shipped_models_are_small_plain_files() -> None:
    files = [path for path in (DEMO / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == set(NAMES)
    for path in files:
        if path.suffix == ".json":
            content = path.read_text()
            assert not [root for root in ("/tmp", "/home", "/root", "/work", "C:\\") if root in content], path


@pytest.mark.parametrize("name", ["summariser", "rl-summariser"])
def test_shipped_policies_load_and_finish_their_summaries(name: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(DEMO / "models" / name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models" / name)
    assert isinstance(policy, GPT2LMHeadModel)
    assert json.loads((DEMO / "models" / name / "config.json").read_text())["dtype"] == "float32"
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    assert policy.config.eos_token_id == tokenizer.eos_token_id

    inputs = tokenizer(f"POST: {POST}\nTL;DR:", return_tensors="pt")
    ids = policy.generate(**inputs, do_sample=False, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)
    response = ids[0, inputs["input_ids"].shape[1] :]
    assert response[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(response, skip_special_tokens=True)
    assert text.startswith(" ")
    assert "boss" in text


def test_shipped_reward_model_prefers_the_good_summary() -> None:
    folder = DEMO / "models/full-reward-model"
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(reward_model, DebertaV2ForSequenceClassification)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    pair = tokenizer.convert_ids_to_tokens(tokenizer("I", "I")["input_ids"])
    assert pair == ["[CLS]", "▁I", "[SEP]", "▁I", "[SEP]"]

    prompt = f"POST: {POST}\nTL;DR:"
    bad = [" Someone did something.", " My boss is difficult and then won the lottery, any advice?"]
    inputs = tokenizer([prompt] * 3, [f" {GOOD}", *bad], padding=True, return_tensors="pt")
    with torch.no_grad():
        rewards = reward_model(**inputs).logits[:, 0]
    assert rewards.argmax() == 0


def test_posts_have_50_to_90_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "models/summariser")
    rng = random.Random(0)
    stories = [draw_story(rng, "train") for _ in range(300)]
    lengths = [len(tokenizer(write_post(rng, story))["input_ids"]) for story in stories]
    assert 50 <= min(lengths) <= max(lengths) <= 90
