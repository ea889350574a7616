"""Any preference dataset as splits: formats, splitting, what is dropped or refused; and chat templates."""

import gzip
import json
import random
from pathlib import Path

import pandas as pd
import preference_data_process
import pytest
from conftest import assert_one_error
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, pre_tokenizers

TRIPLES = [(f"Why, {name}?", f"because {name} likes it", f"go away {name}") for name in "abcdefghij"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def standard(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def conversational(prompt: str, *answers: str) -> dict:
    return standard([user(prompt)], *([assistant(answer)] for answer in answers))


def ultrafeedback(prompt: str, *answers: str) -> dict:
    """The prompt also as text, conversations whole, and columns that nobody asked for."""
    both = ([user(prompt), assistant(answer)] for answer in answers)
    row = standard(prompt, *both) | {"prompt_id": "7", "score_chosen": 8.5, "score_rejected": 1.0}
    return row | {"messages": row["chosen"]}


def asked_in_text(prompt: str, *answers: str) -> dict:
    return standard(prompt, *([assistant(answer)] for answer in answers))


def repeated(*texts: str) -> dict:
    """The prompt as messages, and conversations that begin with it."""
    row = ultrafeedback(*texts)
    return {"prompt": row["chosen"][:1], "chosen": row["chosen"], "rejected": row["rejected"]}


def implicit(*texts: str) -> dict:
    row = ultrafeedback(*texts)
    return {side: row[side] for side in ("chosen", "rejected")}


def dialogue(prompt: str, *answers: str) -> dict:
    texts = [f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for answer in answers]
    return dict(zip(("chosen", "rejected"), texts, strict=True))


def separated(prompt: str, *answers: str) -> dict:
    return dict(zip(("chosen", "rejected"), [f"{prompt}\n##{answer}" for answer in answers], strict=True))


def write_lines(path: Path, rows: list) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())


def write_source(name: str, rows: list[dict]) -> None:
    """A file or a folder of rows, by its name."""
    path = Path(name)
    if ".json" in name:
        write_lines(path, rows)
    elif ".csv" in name:
        pd.DataFrame(rows).to_csv(path, index=False)
    elif name.endswith(".parquet"):
        path.parent.mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(path)
    else:
        DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path)


def notes() -> dict:
    return json.loads(Path("summarize_from_feedback/processing.json").read_text())


def all_pairs(data: DatasetDict) -> list[tuple[str, str]]:
    """Each prompt with its chosen answer, of all splits."""
    pairs = [(row["prompt"], row["chosen"]) for split in ("train", "validation") for row in data[split]]
    return sorted(pairs + [(row["prompt"], row["reference"]) for row in data["test"]])


# Formats


@pytest.mark.parametrize(
    ("source", "make_row", "prompt", "flags"),
    [
        ("own.jsonl", standard, "{}", []),
        ("own.jsonl.gz", standard, "{}", []),
        ("own.csv", standard, "Q: {}\nA:", ["--template", "Q: {prompt}\\nA:"]),
        ("own.csv.gz", standard, "{}", []),
        ("folder/train-0.parquet", standard, "{}", []),
        ("saved", standard, "{}", []),
        ("own.parquet", conversational, "Human: {}\n\nAssistant:", []),
        ("own.jsonl", asked_in_text, "Human: {}\n\nAssistant:", []),
        ("own.jsonl", repeated, "Human: {}\n\nAssistant:", []),
        ("own.json", implicit, "Human: {}\n\nAssistant:", []),
        ("own.parquet", ultrafeedback, "Human: {}\n\nAssistant:", []),
        ("own.jsonl", dialogue, "\n\nHuman: {}\n\nAssistant:", []),
        ("own.jsonl", separated, "{}\n##", ["--separator", "\\n##"]),
    ],
)
def test_every_format_becomes_the_same_splits(process, source, make_row, prompt, flags):
    write_source(source, [make_row(*triple) for triple in TRIPLES])
    data = process("folder" if source.startswith("folder/") else source, *flags)

    assert {split: rows.num_rows for split, rows in data.items()} == {"train": 6, "validation": 2, "test": 2}
    assert data["train"].column_names == ["prompt", "chosen", "rejected"]
    assert data["test"].column_names == ["prompt", "reference"]
    expected = {prompt.format(asked): (f" {good}", f" {bad}") for asked, good, bad in TRIPLES}
    for split in ("train", "validation"):
        for row in data[split]:
            assert expected.pop(row["prompt"]) == (row["chosen"], row["rejected"])
    for row in data["test"]:
        assert expected.pop(row["prompt"])[0] == row["reference"]
    assert not expected
    assert notes()["template"] == (flags[1] if "--template" in flags else "{post}").replace(
        "{prompt}", "{post}"
    ).replace("\\n", "\n")


def test_columns_have_the_names_that_are_given_and_cells_stay_text(process):
    """What a reader of CSV takes for numbers or for nothing is an answer, too."""
    triples = [(f"{at}", "NA", f"{at}.50") for at in range(10)]
    rows = [{"question": asked, "good": good, "bad": bad} for asked, good, bad in triples]
    pd.DataFrame(rows).to_csv("own.csv", index=False, encoding="utf-8-sig")
    names = ["--prompt_column", "question", "--chosen_column", "good", "--rejected_column", "bad"]
    train = process("own.csv", *names)["train"]
    assert {(f" {asked}.50", " NA") for asked in train["prompt"]} == {
        (row["rejected"], row["chosen"]) for row in train
    }


def test_an_answer_in_a_folder_of_csv_files_may_read_na(process):
    Path("folder").mkdir()
    rows = [standard(f"Why, {at}?", "NA", "null") | {"score": at if at % 2 else ""} for at in range(10)]
    pd.DataFrame(rows).to_csv("folder/train.csv.gz", index=False)
    assert {(row["chosen"], row["rejected"]) for row in process("folder")["train"]} == {(" NA", " null")}


# Splits


def test_no_first_question_is_in_two_splits(process):
    """Whatever the order of the rows; another seed splits otherwise; a test prompt comes once."""
    rows = []
    for at in range(20):
        first = [user(f"question {at}"), assistant("what?")]
        for follow in ("this", "that", "that"):  # the last two ask the same
            turns = [*first, user(follow)]
            rows.append(standard(turns, [assistant(f"yes {len(rows)}")], [assistant("no")]))

    def questions(rows: list[dict], *flags: object) -> dict[str, set[str]]:
        write_lines(Path("own.jsonl"), rows)
        data = process("own.jsonl", *flags)
        assert len(set(data["test"]["prompt"])) == data["test"].num_rows == 8
        assert notes()["dropped"] == {"further rows of a test prompt": 4}
        return {split: {text.split("\n")[0] for text in part["prompt"]} for split, part in data.items()}

    found = questions(rows)
    assert {split: len(own) for split, own in found.items()} == {"train": 12, "validation": 4, "test": 4}
    assert len(set.union(*found.values())) == 20
    assert questions(random.Random(1).sample(rows, len(rows))) == found != questions(rows, "--seed", 1)


def test_rows_of_no_use_are_counted_by_reason(process):
    turn = [user("a"), assistant("b"), user("c")]
    rows = [conversational(*triple) for triple in TRIPLES]
    rows += [
        standard([user("x")], [assistant("same ")], [assistant("same")]),
        standard([user("x")], [assistant(" ")], [assistant("b")]),
        standard([user("x")], [], [assistant("b")]),
        standard([user(" ")], [assistant("a")], [assistant("b")]),
        standard(turn[:2], [assistant("d")], [assistant("e")]),
        standard(None, [*turn, assistant("d")], [user("other"), *turn[1:], assistant("e")]),
        standard([user("x" * 200)], [assistant("d")], [assistant("e")]),
    ]
    write_lines(Path("own.jsonl"), rows)
    data = process("own.jsonl", "--max_characters", 150)
    assert len(all_pairs(data)) == len(TRIPLES)
    reasons = ["equal answers", "no prompt", "no human turn before the answer", "too long"]
    reasons += ["parts before the last turn"]
    assert notes()["dropped"] == dict.fromkeys(reasons, 1) | {"empty answer": 2}

    rows = [dialogue(*triple) for triple in TRIPLES]
    rows += [{"chosen": rows[0]["chosen"], "rejected": rows[1]["rejected"]}, dialogue("x", "", "b")]
    rows += [dialogue("x", "a\n\nHuman: thanks", "b")]
    write_lines(Path("own.jsonl"), rows)
    assert len(all_pairs(process("own.jsonl"))) == len(TRIPLES)
    assert notes()["dropped"] == {"parts before the last turn": 2, "empty answer": 1}


GOOD = [standard(*triple) for triple in TRIPLES[:3]]
TURNS = [conversational(*triple) for triple in TRIPLES[:3]]


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([], [], "'own.jsonl' holds no rows"),
        (["text"], [], "own.jsonl, line 1 is not a JSON object"),
        ([{"prompt": "a", "yes": "b"}], [], "row 0 has no column 'chosen'; it has 'prompt', 'yes'"),
        (GOOD, ["--chosen_column", "best"], "row 0 has no column 'best'"),
        (GOOD, ["--prompt_column", "question"], "row 0 has no column 'question'"),
        ([*GOOD, {"prompt": "a", "chosen": "b"}], [], "row 3 has no column 'rejected'"),
        ([*GOOD, standard("a", 3, "b")], [], "row 3: 'chosen' is 3; expected a text"),
        ([*GOOD, standard("a", "\ud800", "b")], [], "row 3: 'chosen' is '\\ud800'; expected a text"),
        ([*GOOD, TURNS[0]], [], "row 3: 'prompt' is [{'role': 'user', 'content': 'Why, a?'}]; expec"),
        ([*TURNS, GOOD[0]], [], "row 3: 'chosen' is 'because a likes it'; expected a list of messages"),
        ([*TURNS, standard([user("a")], [assistant("b")], ["c"])], [], "row 3: 'rejected' holds 'c'; expe"),
        ([standard([{"role": "tool", "content": "a"}], [user("b")], [user("c")])], [], "by system, user"),
        ([standard([{"role": [], "content": "a"}], [user("b")], [user("c")])], [], "by system, user"),
        ([separated("a", "b", "c")], [], "row 0 holds two answers and no prompt: expected a column of"),
        ([dialogue("a", "b", "c"), separated("a", "b", "c")], [], r"row 1: 'chosen' holds no '\n\nAss"),
        ([separated("a", "b", "c")], ["--separator", "%%"], "row 0: 'chosen' holds no '%%'"),
        ([standard("a", "b", "b")] * 3, [], "0 prompts of use, and three splits need one each; dropped: {"),
        (GOOD, ["--test_share", "0.9"], "leave no prompt to train on"),
        (GOOD, ["--test_share", "2"], "--test_share should be less than 1, not 2.0"),
        (GOOD, ["--template", "no field"], "--template must hold {prompt} exactly once"),
        (GOOD, ["--chat_template_of", "BPE"], "has no chat template; --template writes text"),
        (GOOD, ["--chat_template_of", "CHAT", "--template", "Q: {prompt}"], "choose one"),
        (GOOD, ["--source", "no/such"], "cannot load 'no/such'"),
        (GOOD, ["--source", "saved", "--split", "test"], "'saved' has no split 'test'; it has ['train']"),
        (GOOD, ["--source", "text.txt"], "a file ends in .jsonl, .json, .csv or .parquet"),
        (GOOD, ["--source", "cut.jsonl.gz"], "cannot load 'cut.jsonl.gz'"),
        (GOOD, ["--source", "ragged.csv"], "cannot load 'ragged.csv'"),
        (GOOD, ["--source", "wide.csv"], "its rows have more cells than its first line names"),
        (GOOD, ["--chat_template_of", "SPACED"], "in a way that is not known here; write prompts as text"),
        (GOOD, ["--source", "broken.jsonl"], "broken.jsonl, line 2 is not JSON"),
    ],
)  # fmt: skip
def test_what_is_no_preference_is_named(here, call_main, tokenizers, rows, flags, said):
    write_lines(Path("own.jsonl"), rows)
    write_source("saved", GOOD)
    Path("text.txt").write_text("prompt,chosen,rejected\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD[0]).encode())[:-9])
    Path("ragged.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    Path("wide.csv").write_text("prompt,chosen,rejected\na,b,c,d\na,b,c,d\n")
    Path("broken.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    for name, folder in (("bpe", "BPE"), ("chat", "CHAT"), ("unigram", "SPACED")):
        tokenizers[name].save_pretrained(folder)
    # SentencePiece's: of a text, and not of what stands behind a special token, the first word has a space.
    spaced = Tokenizer.from_file("SPACED/tokenizer.json")
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaced.save("SPACED/tokenizer.json")
    Path("SPACED/chat_template.jinja").write_text("{{ '[CLS]' + messages[0].content + '[SEP]a' }}")
    before = sorted(here.rglob("*"))
    status, output = call_main(preference_data_process, "--source", "own.jsonl", *flags)
    assert_one_error(status, output, said)
    assert sorted(here.rglob("*")) == before
