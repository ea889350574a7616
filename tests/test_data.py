"""Stage 1: formatting, dropping, the prefix entries, and that what is trained on is what decoding asks."""

import json
import sys
from pathlib import Path

import pytest
import tldr_data_process
import tldr_data_process_partial
from conftest import assert_one_error, comparison, hub_rows, hub_test_rows, write_hub_data
from datasets import Dataset, DatasetDict, load_from_disk
from prefix_entries import expand_entries
from transformers import AutoTokenizer

from pargs.encoding import decode_texts, encode_prompts, encode_responses, encode_texts
from pargs.models import RewardModel
from pargs.prefixes import PairFrame, make_frame, prefix_texts
from pargs.scoring import Continuation, encode_continuations

TEMPLATE = "POST: {post}\nTL;DR:"
FULL_TEMPLATE = "SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
SHORT_PAIR = {"prompt": "POST: keys\nTL;DR:", "chosen": " my sister", "rejected": " am i wrong ?"}


def run_main(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def refuse(call_main, module, *arguments: str) -> str:
    """Run a script's main, which must end in one error and write nothing; what it says."""
    before = sorted(Path().rglob("*"))
    status, said = call_main(module, *arguments)
    assert_one_error(status, said)
    assert sorted(Path().rglob("*")) == before
    return said


def write_pairs(rows: list[dict], notes: str = json.dumps({"template": TEMPLATE})) -> None:
    """What the first script writes, with the same rows for training and validation."""
    data = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    data.save_to_disk("summarize_from_feedback")
    Path("summarize_from_feedback/processing.json").write_text(notes, errors="surrogatepass")


# tldr_data_process.py


def test_rows_are_formatted_dropped_and_counted(here, monkeypatch, capsys):
    train = [
        comparison(" I lost my keys. ", "lost keys ", " found keys", 0),
        comparison("A", "good", "bad", 1),
        comparison(None, "article", "summary", 0),
        comparison("  ", "blank", "post", 0),
        comparison("B", "same", " same", 0),
        comparison("C", "", "empty", 0),
    ]
    write_hub_data(here, train, hub_rows(2, 1), hub_test_rows(3, 2))
    run_main(tldr_data_process, monkeypatch)

    data = load_from_disk("summarize_from_feedback")
    assert data["train"].column_names == ["prompt", "chosen", "rejected"]
    assert data["train"][0] == {
        "prompt": "POST: I lost my keys.\nTL;DR:",
        "chosen": " lost keys",
        "rejected": " found keys",
    }
    assert data["train"][1]["chosen"] == " good" and data["train"][1]["rejected"] == " bad"
    assert data["test"].column_names == ["prompt", "reference"]
    assert data["test"][0]["prompt"].startswith("POST: So ") and "SUBREDDIT" not in data["test"][0]["prompt"]
    assert data["test"][0]["reference"].startswith(" my") or data["test"][0]["reference"][0] == " "

    notes = json.loads((here / "summarize_from_feedback/processing.json").read_text())
    assert notes["template"] == TEMPLATE
    assert notes["dropped"]["train"] == {"no post": 2, "identical summaries": 1, "empty summary": 1}
    assert "2 no post" in capsys.readouterr().out


def test_subreddit_and_title_of_both_sources_fill_a_template(here, monkeypatch, capsys):
    """Braces in a text stay as they are; a row that lacks a field or can be read in two ways is dropped."""
    posts = [
        {"subreddit": "keys", "title": "My {post}?", "post": "I {title} them.\nPOST: edited"},
        {"subreddit": "keys", "title": None, "post": "no title"},
        {"subreddit": " ", "title": "t", "post": "a blank subreddit"},
        {"subreddit": "keys", "title": "t\nPOST: early", "post": "late"},
        {"subreddit": "keys", "title": "t", "post": ""},
    ]
    prompt = "SUBREDDIT: r/keys\nTITLE: My {post}?\nPOST: I {title} them.\nPOST: edited\nTL;DR:"
    rows = [comparison(post["post"], "good", "bad", 0) for post in posts]
    for row, post in zip(rows, posts, strict=True):
        row["info"] |= post
    test = [{"prompt": text, "label": "x"} for text in (f"{prompt} ", "TITLE: t\nPOST: a\nTL;DR:")]
    write_hub_data(here, rows, rows, test)
    run_main(tldr_data_process, monkeypatch, "--template", FULL_TEMPLATE.replace("\n", "\\n"))

    data = load_from_disk("summarize_from_feedback")
    assert {split: data[split]["prompt"][:] for split in data} == dict.fromkeys(data, [prompt])
    notes = json.loads(Path("summarize_from_feedback/processing.json").read_text())
    dropped = {"no title": 1, "no subreddit": 1, "ambiguous prompt": 1, "no post": 1}
    assert notes["template"] == FULL_TEMPLATE and notes["dropped"]["train"] == dropped
    assert notes["dropped"]["test"] == {"no subreddit": 1}
    assert "1 ambiguous prompt" in capsys.readouterr().out


def test_parquet_copy_is_read_where_there_is_only_a_script(here, monkeypatch):
    """The layout of the hub's refs/convert/parquet revision: a folder for each configuration."""
    for split, rows in (("train", hub_rows(4, 1)), ("validation", hub_rows(3, 2))):
        folder = here / "copy/comparisons" / split
        folder.mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / "0000.parquet")
    (here / "copy/axis/test").mkdir(parents=True)
    Dataset.from_list([{"other": 1}]).to_parquet(here / "copy/axis/test/0000.parquet")
    (here / "copy/summarize_from_feedback.py").write_text("raise RuntimeError('never run')\n")

    loaded = tldr_data_process.load_source("copy", "comparisons", str(here / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "validation": 3}


def test_two_folders_of_one_name_are_two_datasets(here, monkeypatch):
    for folder, seed in (("one", 1), ("two", 2)):
        (here / folder).mkdir()
        monkeypatch.chdir(here / folder)
        write_hub_data(here / folder, hub_rows(4, seed), hub_rows(2, seed), hub_test_rows(2, seed))
        run_main(tldr_data_process, monkeypatch)
    one, two = (load_from_disk(here / folder / "summarize_from_feedback") for folder in ("one", "two"))
    assert one["train"]["prompt"][:] != two["train"]["prompt"][:]


def test_missing_column_bad_test_post_source_and_template_are_named(here, call_main):
    rows = [{key: value for key, value in row.items() if key != "choice"} for row in hub_rows(3, 1)]
    write_hub_data(here, rows, rows, hub_test_rows(3, 2))
    for arguments, said in (
        ([], "row 0 of split 'train' has no usable field 'choice'"),
        (["--comparisons", "no/such/folder"], "cannot load 'no/such/folder'"),
        (
            ["--comparisons", "CarperAI/openai_summarize_tldr"],
            "no parquet copy of configuration 'comparisons'",
        ),
        (["--template", "no post"], "--template must hold {post} exactly once"),
        (["--template", "{post} {post}"], "--template must hold {post} exactly once"),
        (["--template", "{title} {title} {post}"], "--template must hold {title} at most once"),
        (["--template", "{title}{post}"], "--template must hold something between two fields"),
        (
            ["--template", "{author}: {post}"],
            "--template holds the unknown field {author}; there are {subreddit} {title} {post}",
        ),
    ):
        assert said in refuse(call_main, tldr_data_process, *arguments)
    with pytest.raises(tldr_data_process.UnusableRow, match="row 7 of the test posts"):
        tldr_data_process.prompt_from_test_post({"prompt": "no marks", "label": "x"}, 7, TEMPLATE)


def test_a_mistake_of_ours_ends_in_its_traceback(here, monkeypatch):
    write_hub_data(here, hub_rows(3, 1), hub_rows(2, 1), hub_test_rows(3, 2))
    monkeypatch.setattr(tldr_data_process, "format_prompt", lambda values, template: "".index("nowhere"))
    with pytest.raises(ValueError, match="substring not found"):
        run_main(tldr_data_process, monkeypatch)
    assert sorted(path.name for path in here.iterdir()) == ["CarperAI", "openai"]


# Special tokens


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_special_tokens_spelt_in_data_are_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    spelt = " ".join(tokenizer.all_special_tokens)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    (prompt,) = encode_prompts(tokenizer, [TEMPLATE.format(post=f"why {spelt} here")], TEMPLATE)
    (response,) = encode_responses(tokenizer, ["POST:"], [f" because {spelt}"])
    (text,) = encode_texts(tokenizer, [f" because {spelt}"])
    for ids in (prompt, response, text):
        assert not special & set(ids)
    assert special & set(tokenizer(spelt, add_special_tokens=False)["input_ids"])  # the danger is real


def test_special_tokens_of_the_template_are_live(tokenizers):
    tokenizer = tokenizers["bpe"]
    template = "<sep>POST: {post}<sep>\nTL;DR:"
    (ids,) = encode_prompts(tokenizer, [template.format(post="a <sep> b")], template)
    assert ids.count(tokenizer.sep_token_id) == 2
    assert ids[0] == tokenizer.sep_token_id
    assert decode_texts(tokenizer, [ids]) == ["POST: a <sep> b\nTL;DR:"]
    (plain,) = encode_prompts(tokenizer, ["POST: a b<sep>\nTL;DR:"], "POST: {post}<sep>\nTL;DR:")
    assert plain == tokenizer("POST: a b<sep>\nTL;DR:")["input_ids"]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_special_tokens_of_a_template_with_several_fields_are_live(tokenizers, kind):
    """Those in its own words alone, before, between and behind the fields; a title's own stay text."""
    tokenizer = tokenizers[kind]
    sep = tokenizer.sep_token
    template = f"{sep}TO r/{{subreddit}}{sep}TITLE: {{title}} {sep}POST: {{post}}{sep}\nTL;DR:"
    values = {"subreddit": "keys", "title": f"who {sep} is {sep}", "post": f"my sister {sep}POST: a {sep} b"}
    texts = [f"TO r/{values['subreddit']}", f"TITLE: {values['title']} ", f"POST: {values['post']}"]
    (ids,) = encode_prompts(tokenizer, [template.format(**values)], template)

    expected = []
    for text in encode_texts(tokenizer, texts):
        expected += [tokenizer.sep_token_id, *text]
    assert ids == expected + [tokenizer.sep_token_id, *encode_texts(tokenizer, ["\nTL;DR:"])[0]]
    assert ids.count(tokenizer.sep_token_id) == 4


# tldr_data_process_partial.py


def make_entries(monkeypatch, reward_model: str, *arguments: str) -> tuple[Dataset, dict]:
    """The entries that training reads, and the notes beside them."""
    run_main(tldr_data_process_partial, monkeypatch, "--reward_model", reward_model, *arguments)
    folder = "summarize_from_feedback_partial"
    notes = json.loads(Path(folder, "processing.json").read_text())
    pairs, frame = load_from_disk(f"{folder}/pairs")["train"], PairFrame(**notes["frame"])
    entries = load_from_disk(folder)["train"]
    return entries.with_transform(lambda batch: expand_entries(batch, pairs=pairs, frame=frame)), notes


def test_prefix_entries_of_a_short_pair_by_hand(here, monkeypatch, small_models):
    """Two tokens against four: four entries, the shorter side whole from the second one on."""
    write_pairs([SHORT_PAIR])
    entries, notes = make_entries(monkeypatch, small_models["bert"])
    tokenizer = AutoTokenizer.from_pretrained(small_models["bert"])
    words = {
        word: tokenizer.convert_tokens_to_ids(word) for word in ("my", "sister", "am", "i", "wrong", "?")
    }
    assert tokenizer.unk_token_id not in words.values()

    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    prompt = tokenizer("POST: keys\nTL;DR:", add_special_tokens=False)["input_ids"]
    chosen = [["my"], ["my", "sister"], ["my", "sister"], ["my", "sister"]]
    rejected = [["am"], ["am", "i"], ["am", "i", "wrong"], ["am", "i", "wrong", "?"]]

    assert len(entries) == 4
    for at in range(4):
        entry = entries[at]
        for side, prefix in (("chosen", chosen[at]), ("rejected", rejected[at])):
            response = [words[word] for word in prefix]
            assert entry[f"{side}_input_ids"] == [cls, *prompt, sep, *response, sep]
            assert entry[f"{side}_token_type_ids"] == [0] * (len(prompt) + 2) + [1] * (len(response) + 1)
            assert entry[f"{side}_attention_mask"] == [1] * (len(prompt) + len(response) + 3)
        assert entry["quarter"] == at
    assert notes["causal"] is False and notes["segment_ids"] is True


def test_causal_entries_end_with_one_eos_only_when_finished(here, monkeypatch, small_models):
    write_pairs([{"prompt": "POST: keys\nTL;DR:", "chosen": " my", "rejected": " my sister sold my bike"}])
    entries, notes = make_entries(monkeypatch, small_models["gpt2-reward"])
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2-reward"])
    prompt = tokenizer("POST: keys\nTL;DR:")["input_ids"]
    responses = {
        "chosen": tokenizer(" my")["input_ids"] + [tokenizer.eos_token_id],
        "rejected": tokenizer(" my sister sold my bike")["input_ids"] + [tokenizer.eos_token_id],
    }
    assert notes["causal"] is True
    assert len(entries) == len(responses["rejected"])
    for at in range(len(entries)):
        for side, response in responses.items():
            ids = entries[at][f"{side}_input_ids"]
            assert ids == prompt + response[: at + 1]
            assert ids.count(tokenizer.eos_token_id) == (at + 1 >= len(response))


@pytest.mark.parametrize("reward_name", ["bert", "deberta", "gpt2-reward"])
def test_trained_inputs_are_the_inputs_decoding_asks(here, monkeypatch, small_models, reward_name):
    """Every entry, put together from stage 1's files, is what stage 4 would ask for the same prefix."""
    spelt = "why [SEP] or <|endoftext|> or </s> [CLS]? zürich 🙂 naïve"
    rows = [
        {"prompt": f"POST: {spelt}\nTL;DR:", "chosen": f" ask {spelt}", "rejected": " my café 🙂 keys"},
        {
            "prompt": "POST: keys\nTL;DR:",
            "chosen": " my sister sold it",
            "rejected": " who shouts all night?",
        },
        # The accent is a token of its own, and a prefix that ends before it is encoded otherwise.
        {"prompt": "POST: keys\nTL;DR:", "chosen": " can't e\u0301x", "rejected": " no"},
    ]
    write_pairs(rows)
    name = small_models[reward_name]
    entries, notes = make_entries(monkeypatch, name, "--num_comparisons", "0")
    tokenizer = AutoTokenizer.from_pretrained(name)
    reencoded = load_from_disk("summarize_from_feedback_partial/pairs")["train"]["chosen_reencoded"]
    assert any(reencoded) == (reward_name == "deberta")
    frame = make_frame(tokenizer, notes["causal"])
    reward_model = RewardModel(name, None, tokenizer, frame, notes["causal"], 256, 1000)

    table = load_from_disk("summarize_from_feedback_partial")["train"]
    for at in range(len(table)):
        row, length = rows[table[at]["pair"]], table[at]["length"]
        (prompt_ids,) = encode_prompts(tokenizer, [row["prompt"]], TEMPLATE)
        for side in ("chosen", "rejected"):
            (whole,) = encode_responses(tokenizer, [row["prompt"]], [row[side]])
            if not notes["causal"]:
                (whole,) = encode_texts(tokenizer, [row[side]])
            finished = length > len(whole) if notes["causal"] else length >= len(whole)
            if notes["causal"] or finished:
                # The policy wrote these very ids; an encoder reads the whole text.
                continuation = Continuation(row[side], finished, whole[:length] if notes["causal"] else None)
            else:
                continuation = Continuation(prefix_texts(tokenizer, row[side], whole)[length - 1], False)
            (response_ids,) = encode_continuations(reward_model, [row["prompt"]], [continuation])

            assert entries[at][f"{side}_input_ids"] == frame.ids(prompt_ids, response_ids)
            assert entries[at][f"{side}_token_type_ids"] == frame.segments(prompt_ids, response_ids)
            # A unigram tokenizer finds `[SEP]` among its pieces even where it is asked not to.
            if reward_name == "bert" or (reward_name == "deberta" and table[at]["pair"] == 1):
                pair = tokenizer([row["prompt"]], [continuation.text], split_special_tokens=True)
                assert entries[at][f"{side}_input_ids"] == pair["input_ids"][0]
                if "token_type_ids" in pair:
                    assert entries[at][f"{side}_token_type_ids"] == pair["token_type_ids"][0]


def test_prefix_text_is_what_a_policy_would_have_written(tokenizers):
    wordpiece = tokenizers["wordpiece"]
    response = " my 🙂 keys"
    ids = encode_texts(wordpiece, [response])[0]
    assert wordpiece.unk_token_id in ids
    texts = prefix_texts(wordpiece, response, ids)
    assert "[UNK]" not in "".join(texts) and texts[ids.index(wordpiece.unk_token_id)].endswith("🙂")

    for kind in ("bpe", "unigram"):
        ids = encode_texts(tokenizers[kind], [" my sister sold my bike"])[0]
        texts = prefix_texts(tokenizers[kind], " my sister sold my bike", ids)
        assert all(" my sister sold my bike".startswith(text) and text[0] == " " for text in texts)


def test_long_entries_are_dropped_and_counted(here, monkeypatch, small_models, capsys, call_main):
    write_pairs([SHORT_PAIR])
    tokenizer = AutoTokenizer.from_pretrained(small_models["bert"])
    prompt = len(tokenizer("POST: keys\nTL;DR:", add_special_tokens=False)["input_ids"])
    entries, _ = make_entries(monkeypatch, small_models["bert"], "--max_length", str(prompt + 3 + 3))
    assert [len(entries[at]["rejected_input_ids"]) - prompt - 3 for at in range(len(entries))] == [1, 2, 3]
    assert "1 too long and dropped" in capsys.readouterr().out

    flags = ["--reward_model", small_models["bert"], "--max_length", "4"]
    assert "fits into --max_length 4" in refuse(call_main, tldr_data_process_partial, *flags)


def test_number_of_comparisons_and_seed(here, monkeypatch, small_models):
    rows = [
        {"prompt": f"POST: {' my' * n}\nTL;DR:", "chosen": " my keys", "rejected": " no"} for n in range(30)
    ]
    write_pairs(rows)

    def pairs(*arguments):
        make_entries(monkeypatch, small_models["bert"], *arguments)
        return load_from_disk("summarize_from_feedback_partial/pairs")["train"]["prompt_ids"][:]

    few = pairs("--num_comparisons", "5")
    assert len(few) == 5 and few == pairs("--num_comparisons", "5")
    assert few != pairs("--num_comparisons", "5", "--seed", "1")
    assert len(pairs("--num_comparisons", "0")) == 30


def test_a_few_lengths_of_each_comparison(here, monkeypatch, small_models):
    """Drawn for training alone, the same for a seed, different from pair to pair."""
    write_pairs([SHORT_PAIR] * 6)  # four lengths each
    drawn = {}
    for seed in ("1", "1", "2"):
        entries, notes = make_entries(
            monkeypatch, small_models["bert"], "--lengths_per_comparison", "2", "--seed", seed
        )
        table = load_from_disk("summarize_from_feedback_partial")
        lengths = [[row["length"] for row in table["train"] if row["pair"] == pair] for pair in range(6)]
        assert drawn.setdefault(seed, lengths) == lengths
        assert all(len(own) == len(set(own)) == 2 and own == sorted(own) for own in lengths)
        assert len({tuple(own) for own in lengths}) > 1
        assert len(entries) == 12 and notes["lengths_per_comparison"] == 2
        assert len(table["validation"]) == 24
    assert drawn["1"] != drawn["2"]


def test_missing_pairs_wrong_numbers_and_an_unwritable_output_are_named(here, small_models, call_main):
    flags = ["--reward_model", small_models["bert"]]
    for arguments, said in (
        ([], "make it with `python DataProcess/tldr_data_process.py`"),
        (["--num_comparisons", "-1"], "--num_comparisons should be greater than or equal to 0, not -1"),
        (["--max_length", "0"], "--max_length should be greater than 0, not 0"),
    ):
        assert said in refuse(call_main, tldr_data_process_partial, *flags, *arguments)
    write_pairs([SHORT_PAIR])
    (here / "file").write_text("in the way")
    said = refuse(call_main, tldr_data_process_partial, *flags, "--output", "file/dataset")
    assert "cannot write 'file/dataset'" in said
