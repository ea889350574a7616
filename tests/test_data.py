"""Stage 1: formatting, dropping, the prefix entries, and that what is trained on is what decoding asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reward_scoring
import tldr_data_process
import tldr_data_process_partial
from conftest import ROOT, STAGES, comparison, hub_rows, hub_test_rows, write_hub_data
from datasets import Dataset, DatasetDict, load_from_disk
from pair_frame import causal_frame, pair_frame
from prefix_entries import expand_entries
from reward_scoring import Written, encode_written
from text_encoding import decode_texts, encode_prompts, encode_responses, encode_texts
from transformers import AutoTokenizer

TEMPLATE = "POST: {post}\nTL;DR:"


def run_main(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()


def read_error(capsys) -> str:
    """The one line that a failing script leaves, without the progress bars."""
    lines = [line for line in capsys.readouterr().err.split("\n") if "error:" in line]
    assert len(lines) == 1
    return lines[0][lines[0].index("error:") :]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "helper", ["text_encoding.py", "pair_frame.py", "training_setup.py", "script_settings.py"]
)
def test_stages_keep_equal_copies(helper):
    """A stage imports nothing of another, so what two stages must do alike is the same file twice."""
    copies = [ROOT / stage / helper for stage in STAGES if (ROOT / stage / helper).exists()]
    assert len(copies) > 1
    assert len({copy.read_text() for copy in copies}) == 1


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice": 2}, "row 1 of split 'train': `choice` is 2"),
        ({"choice": None}, "row 1 of split 'train': `choice` is None"),
        ({"info": None}, "row 1 of split 'train' has no usable field"),
        ({"summaries": [{"text": "one", "policy": "p", "note": None}]}, "row 1 of split 'train'"),
    ],
)
def test_bad_row_is_named(here, monkeypatch, capsys, change, said):
    rows = hub_rows(3, 1)
    rows[1] |= change
    write_hub_data(here, rows, hub_rows(2, 1), hub_test_rows(3, 2))
    with pytest.raises(SystemExit) as stopped:
        run_main(tldr_data_process, monkeypatch)
    assert stopped.value.code == 2
    assert said in read_error(capsys)
    assert not (here / "summarize_from_feedback").exists()


def test_missing_column_and_bad_test_post_are_named(here, monkeypatch, capsys):
    rows = [{key: value for key, value in row.items() if key != "choice"} for row in hub_rows(3, 1)]
    write_hub_data(here, rows, rows, hub_test_rows(3, 2))
    with pytest.raises(SystemExit):
        run_main(tldr_data_process, monkeypatch)
    assert "row 0 of split 'train' has no usable field 'choice'" in read_error(capsys)

    with pytest.raises(ValueError, match="row 7 of the test posts"):
        tldr_data_process.prompt_from_test_post({"prompt": "no marks", "label": "x"}, 7, TEMPLATE)


def test_missing_source_and_bad_template_fail_clearly(here, monkeypatch, capsys):
    for arguments, said in (
        (["--comparisons", "no/such/folder"], "cannot load"),
        (["--template", "no post"], "--template must hold {post}"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(tldr_data_process, monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert said in read_error(capsys)


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


# tldr_data_process_partial.py


def write_pairs(rows: list[dict], template: str = TEMPLATE) -> None:
    data = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    data.save_to_disk("summarize_from_feedback")
    with open("summarize_from_feedback/processing.json", "w") as file:
        json.dump({"template": template}, file)


def make_entries(monkeypatch, reward_model: str, *arguments: str) -> tuple[Dataset, dict]:
    run_main(tldr_data_process_partial, monkeypatch, "--reward_model", reward_model, *arguments)
    folder = "summarize_from_feedback_partial"
    how = json.loads(Path(folder, "processing.json").read_text())
    pairs = load_from_disk(f"{folder}/pairs")["train"]
    entries = load_from_disk(folder)["train"]
    return entries.with_transform(lambda batch: expand_entries(batch, pairs=pairs, frame=how["frame"])), how


def test_prefix_entries_of_a_short_pair_by_hand(here, monkeypatch, small_models):
    """Two tokens against four: four entries, the shorter side whole from the second one on."""
    write_pairs([{"prompt": "POST: keys\nTL;DR:", "chosen": " my sister", "rejected": " am i wrong ?"}])
    entries, how = make_entries(monkeypatch, small_models["bert"])
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
    assert how["causal"] is False and how["segment_ids"] is True


def test_causal_entries_end_with_one_eos_only_when_finished(here, monkeypatch, small_models):
    write_pairs([{"prompt": "POST: keys\nTL;DR:", "chosen": " my", "rejected": " my sister sold my bike"}])
    entries, how = make_entries(monkeypatch, small_models["gpt2-reward"])
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2-reward"])
    prompt = tokenizer("POST: keys\nTL;DR:")["input_ids"]
    responses = {
        "chosen": tokenizer(" my")["input_ids"] + [tokenizer.eos_token_id],
        "rejected": tokenizer(" my sister sold my bike")["input_ids"] + [tokenizer.eos_token_id],
    }
    assert how["causal"] is True
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
    ]
    write_pairs(rows)
    name = small_models[reward_name]
    entries, how = make_entries(monkeypatch, name, "--num_comparisons", "0")
    tokenizer = AutoTokenizer.from_pretrained(name)
    frame = causal_frame(tokenizer) if how["causal"] else pair_frame(tokenizer)
    reward_model = reward_scoring.RewardModel(name, None, tokenizer, frame, how["causal"], 256, 1000)

    table = load_from_disk("summarize_from_feedback_partial")["train"]
    for at in range(len(table)):
        row, length = rows[table[at]["pair"]], table[at]["length"]
        (prompt_ids,) = encode_prompts(tokenizer, [row["prompt"]], TEMPLATE)
        for side in ("chosen", "rejected"):
            (whole,) = encode_responses(tokenizer, [row["prompt"]], [row[side]])
            if not how["causal"]:
                (whole,) = encode_texts(tokenizer, [row[side]])
            finished = length > len(whole) if how["causal"] else length >= len(whole)
            if how["causal"] or finished:
                # The policy wrote these very ids; an encoder reads the whole text.
                written = Written(row[side], finished, whole[:length] if how["causal"] else None)
            else:
                text = tldr_data_process_partial.prefix_texts(tokenizer, row[side], whole)[length - 1]
                written = Written(text, False)
            (response_ids,) = encode_written(reward_model, [row["prompt"]], [written])

            assert entries[at][f"{side}_input_ids"] == frame.ids(prompt_ids, response_ids)
            assert entries[at][f"{side}_token_type_ids"] == frame.segments(prompt_ids, response_ids)
            # A unigram tokenizer finds `[SEP]` among its pieces even where it is asked not to.
            if reward_name == "bert" or (reward_name == "deberta" and table[at]["pair"] == 1):
                pair = tokenizer([row["prompt"]], [written.text], split_special_tokens=True)
                assert entries[at][f"{side}_input_ids"] == pair["input_ids"][0]
                if "token_type_ids" in pair:
                    assert entries[at][f"{side}_token_type_ids"] == pair["token_type_ids"][0]


def test_prefix_text_is_what_a_policy_would_have_written(tokenizers):
    wordpiece = tokenizers["wordpiece"]
    response = " my 🙂 keys"
    ids = encode_texts(wordpiece, [response])[0]
    assert wordpiece.unk_token_id in ids
    texts = tldr_data_process_partial.prefix_texts(wordpiece, response, ids)
    assert "[UNK]" not in "".join(texts) and texts[ids.index(wordpiece.unk_token_id)].endswith("🙂")

    for kind in ("bpe", "unigram"):
        ids = encode_texts(tokenizers[kind], [" my sister sold my bike"])[0]
        texts = tldr_data_process_partial.prefix_texts(tokenizers[kind], " my sister sold my bike", ids)
        assert all(" my sister sold my bike".startswith(text) and text[0] == " " for text in texts)


def test_long_entries_are_dropped_and_counted(here, monkeypatch, small_models, capsys):
    write_pairs([{"prompt": "POST: keys\nTL;DR:", "chosen": " my sister", "rejected": " am i wrong ?"}])
    tokenizer = AutoTokenizer.from_pretrained(small_models["bert"])
    prompt = len(tokenizer("POST: keys\nTL;DR:", add_special_tokens=False)["input_ids"])
    entries, _ = make_entries(monkeypatch, small_models["bert"], "--max_length", str(prompt + 3 + 3))
    assert [len(entries[at]["rejected_input_ids"]) - prompt - 3 for at in range(len(entries))] == [1, 2, 3]
    assert "1 too long and dropped" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        make_entries(monkeypatch, small_models["bert"], "--max_length", "4")
    assert "fits into --max_length 4" in read_error(capsys)


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


def test_missing_pairs_name_the_command(here, monkeypatch, small_models, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(tldr_data_process_partial, monkeypatch, "--reward_model", small_models["bert"])
    assert stopped.value.code == 2
    assert "make it with `python DataProcess/tldr_data_process.py`" in read_error(capsys)


def test_unwritable_output_leaves_nothing(here, monkeypatch, small_models, capsys):
    write_pairs([{"prompt": "POST: keys\nTL;DR:", "chosen": " my sister", "rejected": " no"}])
    (here / "file").write_text("in the way")
    with pytest.raises(SystemExit) as stopped:
        run_main(
            tldr_data_process_partial,
            monkeypatch,
            "--reward_model",
            small_models["bert"],
            "--output",
            "file/dataset",
        )
    assert stopped.value.code == 2
    assert "cannot write" in read_error(capsys)


def test_scripts_explain_themselves():
    for script in ("tldr_data_process.py", "tldr_data_process_partial.py"):
        shown = subprocess.run(
            [sys.executable, ROOT / "DataProcess" / script, "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0 and "--output" in shown.stdout
