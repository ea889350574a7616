"""Stage 1 when it is killed, the disk is full, or what it reads is broken."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tldr_data_process
import tldr_data_process_partial
from conftest import ROOT, assert_one_error, hub_rows, hub_test_rows, write_hub_data
from dataset_files import recover, save_dataset, workspace
from datasets import Dataset, DatasetDict, load_from_disk
from forked import Run, run, server
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import read_own_prompts
from small_disk import small_disk  # noqa: F401
from test_data import FULL_TEMPLATE, TEMPLATE, refuse, run_main, write_pairs
from tldr_data_process import preference_from_comparison, prompt_from_test_post

from pargs.cli import fail
from pargs.encoding import TEMPLATE_FIELDS, template_words
from pargs.files import read_dataset

PAIRS_SCRIPT = "DataProcess/tldr_data_process.py"
PREFIX_SCRIPT = "DataProcess/tldr_data_process_partial.py"
ARROW = "summarize_from_feedback/train/data-00000-of-00001.arrow"
PAIR = {"prompt": "POST: my keys\nTL;DR:", "chosen": " my sister", "rejected": " no"}
fuzz = settings(deadline=None, derandomize=True, max_examples=200)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty run directory, whose log lies beside it."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# Kills


@pytest.mark.slow
def test_killed_scripts_leave_the_old_dataset_or_the_new(here, small_models):
    """SIGKILL at random moments of both scripts; a run that is left alone then ends as if there were none."""
    write_hub_data(here, hub_rows(60, 1), hub_rows(20, 2), hub_test_rows(20, 3))
    reward_model = ("--reward_model", small_models["bert"])
    rng = random.Random(0)
    for script, folder, first, second in (
        (PAIRS_SCRIPT, "summarize_from_feedback", ("--template", "TEXT: {post}"), ()),
        (
            PREFIX_SCRIPT,
            "summarize_from_feedback_partial",
            (*reward_model, "--max_length", "60"),
            reward_model,
        ),
    ):
        assert run(script, first, here)[0] == 0
        start, old = time.monotonic(), files_of(folder)
        assert run(script, second, here)[0] == 0
        seconds, new = time.monotonic() - start, files_of(folder)
        assert old != new

        kills = 0
        while kills < 6:
            script_run = Run(script, (first, second)[kills % 2], here)
            # Every other kill comes while the dataset is being written, which is soon over.
            saving = kills % 2
            while saving and script_run.process.is_alive() and not Path(f".{folder}.writing/new").exists():
                time.sleep(0.001)
            killed = script_run.kill_after(rng.random() * seconds * (0.05 if saving else 1))
            recover(folder)  # as the next script does
            assert files_of(folder) in (old, new)
            # Where the script was faster than before, the next moments come sooner.
            kills, seconds = kills + killed, seconds * (1 if killed else 0.8)

        assert run(script, second, here)[0] == 0
        assert files_of(folder) == new
    assert not [*here.glob(".*")] and len([*here.iterdir()]) == 4


def save_one(word: str, stop_at: str = "", kill: bool = True) -> None:
    """Save a small dataset as "data"; killed after the rename to `stop_at`, or that rename fails."""
    rename = os.replace

    def rename_or_stop(source, destination):
        if Path(destination).name == stop_at and not kill and Path(source).name == "new":
            raise OSError("no new names")
        rename(source, destination)
        if Path(destination).name == stop_at and kill:
            os.kill(os.getpid(), signal.SIGKILL)

    with workspace("data"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "replace", rename_or_stop)
        save_dataset({".": DatasetDict(train=Dataset.from_list([{"prompt": word}]))}, {"word": word}, "data")


def read_word() -> str:
    dataset, notes = read_dataset("data", {"train": ["prompt"]}, "the command")
    assert dataset["train"]["prompt"][:] == [notes["word"]]
    return notes["word"]


def save_and_die(folder: Path, stop_at: str) -> None:
    os.chdir(folder)
    save_one("second", stop_at)


@pytest.mark.parametrize(("stop_at", "left"), [("old", "first"), ("data", "second")])
def test_kill_between_two_renames_is_mended(here, stop_at, left):
    """The next reader or writer of stage 1 puts the old dataset back."""
    save_one("first")
    killed = server.Process(target=save_and_die, args=(here, stop_at))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert Path("data").exists() == (stop_at == "data")

    shutil.copytree(here, here.with_name("copy"))
    recover("data")
    assert read_word() == left
    os.chdir(here.with_name("copy"))
    with pytest.raises(SystemExit), workspace("data"):
        fail("this writer finds nothing to write")
    assert read_word() == left
    save_one("third")
    assert read_word() == "third" and os.listdir() == ["data"]


def test_a_rename_that_fails_leaves_the_old_dataset(here):
    save_one("first")
    with pytest.raises(SystemExit):
        save_one("second", "data", kill=False)
    assert read_word() == "first" and os.listdir() == ["data"]


def test_pairs_that_a_kill_took_away_are_read_by_the_next_script(here, monkeypatch, small_models):
    write_pairs([PAIR])
    Path(".summarize_from_feedback.writing").mkdir()
    Path("summarize_from_feedback").rename(".summarize_from_feedback.writing/old")
    run_main(tldr_data_process_partial, monkeypatch, "--reward_model", small_models["bert"])
    assert Path("summarize_from_feedback/train").exists()


def test_only_a_dataset_that_is_not_read_is_replaced(here, call_main):
    write_hub_data(here, hub_rows(4, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    write_pairs([PAIR])
    before = files_of(here)
    for output in (".", "openai", "openai/summarize_from_feedback/README.md"):
        said = refuse(call_main, tldr_data_process, "--output", output)
        assert "is no dataset, and would be replaced" in said
    said = refuse(call_main, tldr_data_process_partial, "--output", "./summarize_from_feedback/")
    assert "would replace --dataset" in said
    assert files_of(here) == before


# Disks


@pytest.mark.slow
@pytest.mark.parametrize("script", [PAIRS_SCRIPT, PREFIX_SCRIPT])
def test_full_disk_is_said_and_keeps_the_old_dataset(script, tmp_path, small_disk, small_models):  # noqa: F811
    """Ever larger disks, until the dataset fits: rows are converted, mapped and saved, and each may fail."""
    flags, sizes = {}, {}
    for name, count in (("small", 20), ("large", 1500)):
        source, output = tmp_path / name, tmp_path / f"{name}-output"
        output.mkdir()
        write_hub_data(source, hub_rows(count, 1), hub_rows(20, 2), hub_test_rows(20, 3))
        flags[name] = ["--comparisons", source / "openai/summarize_from_feedback", "--output", "data"]
        flags[name] += ["--test_posts", source / "CarperAI/openai_summarize_tldr"]
        if script == PREFIX_SCRIPT:
            assert run(PAIRS_SCRIPT, [], source)[0] == 0
            flags[name] = ["--dataset", source / "summarize_from_feedback", "--num_comparisons", "0"]
            flags[name] += ["--reward_model", small_models["bert"], "--output", "data"]
        assert run(script, flags[name], output)[0] == 0
        sizes[name] = sum(map(len, files_of(output / "data").values())) // 1024

    old, failures = files_of(tmp_path / "small-output/data"), 0
    while True:
        disk = small_disk(2 * sizes["small"] + 100 + sizes["large"] * failures // 2)
        shutil.copytree(tmp_path / "small-output/data", disk.path / "data")
        status, output = disk.run(script, flags["large"])
        if not status:
            break
        assert_one_error(status, output, "No space left on device")
        assert files_of(disk.path / "data") == old and os.listdir(disk.path) == ["data"]
        failures += 1

    assert failures >= 4  # what is mapped takes the dataset's size, and what is saved takes it again
    assert files_of(disk.path / "data").keys() == files_of(tmp_path / "large-output/data").keys()
    assert os.listdir(disk.path) == ["data"]


# Bad input


@pytest.mark.parametrize("kept", [0, 0.5, 0.99, None])
def test_damaged_parquet_and_arrow_are_refused(here, call_main, kept):
    """Cut to a part of their size, or overwritten in places."""
    write_hub_data(here, hub_rows(6, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    write_pairs([PAIR] * 20)
    for path, module, said in (
        ("openai/summarize_from_feedback/train.parquet", tldr_data_process, "cannot load 'openai/summ"),
        (ARROW, tldr_data_process_partial, "make it with `python DataProcess/tldr_data_process.py`"),
    ):
        data = bytearray(Path(path).read_bytes())
        for at in random.Random(0).sample(range(len(data)), len(data) // 20):
            data[at] ^= 0xFF * (kept is None)
        Path(path).write_bytes(data if kept is None else data[: int(kept * len(data))])
        assert said in refuse(call_main, module)


def test_pairs_of_wrong_columns_or_notes_are_refused(here, call_main):
    for row, said in (
        ({"prompt": "POST: a\nTL;DR:", "chosen": " b"}, "column 'rejected' of split 'train' is missing"),
        (PAIR | {"chosen": 3}, "column 'chosen' of split 'train' is not text"),
        (PAIR | {"rejected": [" b"]}, "column 'rejected' of split 'train' is not text"),
        (PAIR | {"chosen": None}, "column 'chosen' of split 'train' has an empty cell"),
    ):
        write_pairs([PAIR, row] if row.get("chosen", "") is None else [row])
        assert said in refuse(call_main, tldr_data_process_partial)

    write_pairs([PAIR | {"chosen": " sister"}])
    assert Path(ARROW).read_bytes().count(b" sister") == 1
    Path(ARROW).write_bytes(Path(ARROW).read_bytes().replace(b" sister", b" s\xffster"))
    assert "UTF8" in refuse(call_main, tldr_data_process_partial)
    for notes in ('{"template": "PO', "", "[1]", '{"template": 3}', '"\ud800"', "\0"):
        write_pairs([PAIR], notes)
        assert "cannot read the dataset" in refuse(call_main, tldr_data_process_partial)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choice": 2}, "row 1 of split 'train': `choice` is 2"),
        ({"choice": None}, "row 1 of split 'train': `choice` is None"),
        ({"info": None}, "row 1 of split 'train' has no usable field"),
        ({"info": {"post": 5}}, "the post or a summary is not text"),
        ({"info": {"post": "half \ud800 a pair"}}, "surrogate pair in string is invalid"),
        ({"summaries": [{"text": "one"}]}, "row 1 of split 'train': 1 summaries, not 2"),
    ],
)
def test_bad_row_is_named(here, call_main, change, said):
    write_hub_data(here, hub_rows(3, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    rows = [{"info": {"post": "a"}, "summaries": row["summaries"], "choice": 0} for row in hub_rows(3, 1)]
    rows[1] |= change
    Path("own").mkdir()
    for split in ("train", "validation"):
        Path("own", f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--comparisons", "own", "--comparisons_config", "default"]
    assert said in refuse(call_main, tldr_data_process, *flags)


def test_a_damaged_card_is_refused(here, call_main):
    write_hub_data(here, hub_rows(3, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    Path("openai/summarize_from_feedback/README.md").write_text("---\nconfigs: [\n---\n")
    assert "cannot load 'openai/summarize_from_feedback'" in refuse(call_main, tldr_data_process)


def test_odd_texts_pass_through_both_scripts(here, monkeypatch, small_models, capsys):
    """Empty posts are dropped and counted, entries that are too long too; all else is kept to the letter."""
    odd = [
        "我的猫不吃饭 😀 زبان e\u0301 \u2028 ffi",
        "<|endoftext|> [SEP] [CLS]",
        "word " * 20000,
        "my " * 300,  # more than the model reads, less than --max_length
        "x" * 100000,
        "short",
    ]
    rows = hub_rows(len(odd) + 3, 1)
    for row, post in zip(rows, [*odd, None, "", " \u2003\n\t"], strict=True):
        row["info"]["post"] = post
    write_hub_data(here, rows, hub_rows(3, 2), hub_test_rows(3, 3))
    run_main(tldr_data_process, monkeypatch)
    prompts = load_from_disk("summarize_from_feedback")["train"]["prompt"][:]
    assert prompts == [TEMPLATE.format(post=post.strip()) for post in odd]
    assert "3 no post" in capsys.readouterr().out

    flags = ["--reward_model", small_models["bert"], "--num_comparisons", "0"]
    run_main(tldr_data_process_partial, monkeypatch, *flags)
    pairs = load_from_disk("summarize_from_feedback_partial/pairs")["train"]
    assert [at for at, lengths in enumerate(pairs["lengths"]) if not lengths] == [2, 3]

    # The model reads 256 tokens, whatever --max_length says.
    assert "reads 256 tokens" in capsys.readouterr().out
    frame = json.loads(Path("summarize_from_feedback_partial/processing.json").read_text())["frame"]
    around = sum(len(frame[part]) for part in ("start", "middle", "end"))
    for pair in pairs:
        sides = len(pair["chosen_ids"]), len(pair["rejected_ids"])
        longest = min(max(pair["lengths"], default=0), max(sides))
        assert not longest or around + len(pair["prompt_ids"]) + longest <= 256


# Network

# The hub's client waits between its five attempts; the test does not.
IMPATIENT = """
import runpy, sys, time
time.sleep = lambda seconds: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_unreachable_hub_is_said_in_one_message(here):
    """Nobody listens where the hub should be, and HF_HUB_OFFLINE is not set."""
    write_pairs([PAIR])
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "HF_HOME": str(here / "hub")}
        hub |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT / "DataProcess")}
        for script, said in (
            (PAIRS_SCRIPT, "cannot load 'openai/summarize_from_feedback'"),
            (PREFIX_SCRIPT, "cannot load the tokenizer of 'OpenAssistant/"),
        ):
            command = [sys.executable, "-c", IMPATIENT, ROOT / script]
            done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True)
            assert_one_error(done.returncode, done.stderr, said)
            # The client did try, and has given up.
            assert script == PREFIX_SCRIPT or done.stderr.count("Retrying") == 5


# Row readers

# With halves of surrogate pairs, and with the marks that some readers take for the end of a line.
plain = st.text(min_size=1, max_size=12) | st.text(st.sampled_from("ab \u2028\x85"), min_size=1, max_size=6)
texts = st.text(max_size=12) | st.text(st.sampled_from("ab \n\ud800\udfff\u2028\x85"), max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def likely(known: st.SearchStrategy) -> st.SearchStrategy:
    """Mostly a value of the right kind, at times any."""
    return st.one_of(known, known, known, known, values)


def record(**fields: st.SearchStrategy) -> st.SearchStrategy:
    """A dictionary in which each field may be missing or of any kind."""
    return likely(st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(fields))


def either(*kinds: st.SearchStrategy) -> st.SearchStrategy:
    """Each as often as the others, where `|` would weigh them by their own parts."""
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def comparison_rows(text: st.SearchStrategy) -> st.SearchStrategy:
    summaries = st.lists(st.fixed_dictionaries({"text": text}), min_size=2, max_size=2)
    info = st.fixed_dictionaries(dict.fromkeys(TEMPLATE_FIELDS, text))
    return st.fixed_dictionaries({"info": info, "summaries": summaries, "choice": st.integers(0, 1)})


headers = st.sampled_from(["TITLE: x\n", "SUBREDDIT: r/x\nTITLE: TITLE: x\n", "SUBREDDIT: x\n", ""])
test_prompts = st.builds("{}POST:{}\nTL;DR:{}".format, headers, plain, st.sampled_from(["", " ", "x"]))
test_posts = st.fixed_dictionaries({"prompt": test_prompts, "label": plain})
broken_test_posts = record(prompt=likely(texts), label=likely(texts | st.none()))
broken_comparisons = record(
    info=record(**dict.fromkeys(TEMPLATE_FIELDS, texts)),
    summaries=likely(st.lists(record(text=texts))),
    choice=values,
)


templates = st.sampled_from([TEMPLATE, FULL_TEMPLATE, "{title}a{post} "])


def fill(template: str, values: dict[str, str]) -> str:
    """The template with its values, or "" where they cannot be found again in it."""
    values = {name: text.strip() for name, text in values.items() if f"{{{name}}}" in template}
    words = template_words(template)
    ambiguous = any(word in text for word, text in zip(words[1:-1], values.values(), strict=False))
    return "" if ambiguous else template.format(**values)


@fuzz
@given(either(comparison_rows(plain), comparison_rows(texts), broken_comparisons), templates)
def test_any_comparison_is_a_pair_or_a_value_error(row, template):
    try:
        pair = preference_from_comparison(row, 3, "train", template)
    except ValueError as error:
        assert str(error).startswith("row 3 of split 'train'")
        return
    assert sorted(pair) == ["chosen", "dropped", "prompt", "rejected"]
    "".join(pair.values()).encode()  # can be written

    values = {name: row["info"][name] for name in TEMPLATE_FIELDS if f"{{{name}}}" in template}
    answers = [summary["text"] for summary in row["summaries"]]
    blank = not all((text or "").strip() for text in (*values.values(), *answers))
    if pair["dropped"]:
        assert blank or answers[0].strip() == answers[1].strip() or not fill(template, values)
        assert pair["prompt"] == pair["chosen"] == pair["rejected"] == ""
    else:
        space = "" if template[-1] == " " else " "
        assert not blank and pair["prompt"] == fill(template, values)
        assert pair["chosen"] == space + answers[row["choice"]].strip()
        assert pair["rejected"] == space + answers[1 - row["choice"]].strip()


@fuzz
@given(either(test_posts, broken_test_posts), st.sampled_from([TEMPLATE, FULL_TEMPLATE]))
def test_any_test_post_is_a_prompt_or_a_value_error(row, template):
    try:
        read = prompt_from_test_post(row, 3, template)
    except ValueError as error:
        assert str(error).startswith("row 3 of the test posts")
        return
    assert sorted(read) == ["dropped", "prompt", "reference"]
    "".join(read.values()).encode()
    if read["dropped"]:
        assert read["prompt"] == read["reference"] == ""
    else:
        assert read["reference"] == " " + row["label"].strip()
        header, _, post = f"\n{row['prompt']}".rstrip().removesuffix("\nTL;DR:").partition("\nPOST:")
        values = {"subreddit": "x", "title": "TITLE: x", "post": post}  # the one header with both
        assert template == TEMPLATE or header == "\nSUBREDDIT: r/x\nTITLE: TITLE: x"
        assert read["prompt"] == fill(template, values)


@pytest.mark.parametrize(
    "text", ["POST:\n" * 17000, "POST: a" + "\nTL;DR:" * 14000 + "x", "\nPOST:" + " " * 100000]
)
def test_enormous_test_posts_without_marks_are_refused(text):
    with pytest.raises(ValueError, match="row 0 of the test posts"):
        prompt_from_test_post({"prompt": text, "label": "x"}, 0, TEMPLATE)


def test_post_of_a_test_row_is_what_stands_between_the_first_and_the_last_mark():
    prompt = "TITLE: POST: no\nPOST: a\nTL;DR:\nPOST: b \nTL;DR: \n"
    read = prompt_from_test_post({"prompt": prompt, "label": "c"}, 0, TEMPLATE)
    assert read["prompt"] == "POST: a\nTL;DR:\nPOST: b\nTL;DR:"


own_prompts = st.fixed_dictionaries(
    {"prompt": plain.map("POST: {}".format)}, optional={"reference": plain | st.none()}
)
broken_lines = test_prompts.map(lambda text: json.dumps(text)[:-1]) | record(prompt=texts, reference=texts)


@fuzz
@given(st.lists(own_prompts, min_size=1, max_size=3), st.lists(broken_lines, max_size=1), st.booleans())
def test_any_prompt_file_is_read_or_refused(tmp_path_factory, rows, broken, ascii_only):
    """Lines of whole and of broken JSON, with text as escapes and as it is."""
    rows = [*rows, *broken]
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        prompts, references = read_own_prompts(str(path))
    except SystemExit as stopped:
        assert stopped.code == 2 and broken
        return
    assert prompts == [row["prompt"] for row in rows]
    assert references == [row.get("reference") for row in rows]
    "".join([*prompts, *filter(None, references)]).encode()
