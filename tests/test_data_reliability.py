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
from collections import Counter
from pathlib import Path

import dataset_files
import pytest
import tldr_data_process
import tldr_data_process_partial
from conftest import ROOT, hub_rows, hub_test_rows, write_hub_data
from dataset_files import exchange, save_dataset, workspace
from datasets import Dataset, DatasetDict, load_from_disk
from forked import Run, run, server
from hypothesis import given, settings
from hypothesis import strategies as st
from PARGS_baselines import read_own_prompts
from small_disk import small_disk  # noqa: F401
from tldr_data_process import preference_from_comparison, prompt_from_test_post

PAIRS_SCRIPT = "DataProcess/tldr_data_process.py"
PREFIX_SCRIPT = "DataProcess/tldr_data_process_partial.py"
TEMPLATE = "POST: {post}\nTL;DR:"
OTHER_TEMPLATE = "TEXT: {post}\nTL;DR:"
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


def assert_one_error(status: int, output: str, *said: str) -> None:
    """The script ended with code 2 and one line that says what is wrong."""
    lines = [line for line in output.replace("\r", "\n").split("\n") if "error:" in line]
    assert status == 2, output
    assert len(lines) == 1 and "Traceback" not in output, output
    for text in said:
        assert text in lines[0]


def refuse(module, capsys, monkeypatch, *arguments: str) -> str:
    """Run a script's main in this process, where it must fail; what it says."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    output = capsys.readouterr().err
    assert_one_error(stopped.value.code, output)
    assert not list(Path().glob(".*.writing"))
    return output


def write_pairs(rows: list[dict], notes: str = json.dumps({"template": TEMPLATE})) -> None:
    data = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    data.save_to_disk("summarize_from_feedback")
    Path("summarize_from_feedback/processing.json").write_text(notes)


# Kills


def test_killed_scripts_leave_the_old_dataset_or_the_new(here, small_models):
    """SIGKILL at random moments of both scripts; a run that is left alone then ends as if there were none."""
    write_hub_data(here, hub_rows(60, 1), hub_rows(20, 2), hub_test_rows(20, 3))
    reward_model = ("--reward_model", small_models["bert"])
    variants = {
        (PAIRS_SCRIPT, "summarize_from_feedback"): (["--template", OTHER_TEMPLATE], ["--template", TEMPLATE]),
        (PREFIX_SCRIPT, "summarize_from_feedback_partial"): (
            [*reward_model, "--max_length", "60"],
            [*reward_model],
        ),
    }
    rng = random.Random(0)
    for (script, folder), (first, second) in variants.items():
        assert run(script, first, here)[0] == 0
        start, old = time.monotonic(), files_of(folder)
        assert run(script, second, here)[0] == 0
        seconds, new = time.monotonic() - start, files_of(folder)
        assert old != new

        kills = 0
        while kills < 6:
            script_run = Run(script, (first, second)[kills % 2], here)
            # Every other kill comes while the dataset is being written, which is soon over.
            if saving := kills % 2:
                script_run.wait_for("Saving the dataset")
            killed = script_run.kill_after(rng.random() * seconds * (0.05 if saving else 1))
            assert files_of(folder) in (old, new)
            # Where the script was faster than before, the next moments come sooner.
            kills, seconds = kills + killed, seconds * (1 if killed else 0.8)

        assert run(script, second, here)[0] == 0
        assert files_of(folder) == new
    assert sorted(path.name for path in here.iterdir()) == [
        "CarperAI",
        "openai",
        "summarize_from_feedback",
        "summarize_from_feedback_partial",
    ]


def save_one(word: str, path: str, dies_after: str = "") -> None:
    """Save a small dataset; with `dies_after` as on a file system that cannot exchange, up to that rename."""
    if dies_after:
        dataset_files.exchange = lambda one, other: False
        rename = os.replace

        def rename_and_die(source, destination):
            rename(source, destination)
            if Path(destination).name == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = rename_and_die
    with workspace(path):
        rows = Dataset.from_list([{"prompt": word, "chosen": word, "rejected": word}])
        save_dataset({".": DatasetDict(train=rows)}, {"word": word}, path)


def read_word(path: str) -> str:
    dataset, notes = dataset_files.read_dataset(path, {"train": ["prompt"]}, "the command")
    assert dataset["train"]["prompt"][:] == [notes["word"]]
    return notes["word"]


@pytest.mark.parametrize(("dies_after", "left"), [("old", "first"), ("data", "second")])
def test_kill_between_two_renames_is_mended(here, dies_after, left):
    """Where the file system cannot exchange two folders, the next reader or writer puts the old one back."""
    save_one("first", "data")
    killed = server.Process(target=save_one, args=("second", str(here / "data"), dies_after))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert Path("data").exists() == (dies_after == "data")

    shutil.copytree(here, here.with_name("copy"))
    assert read_word("data") == left
    os.chdir(here.with_name("copy"))
    with pytest.raises(SystemExit), workspace("data"):
        dataset_files.fail("this writer finds nothing to write")
    assert read_word("data") == left
    save_one("third", "data")
    assert read_word("data") == "third" and os.listdir() == ["data"]


def exchange_for_ever(folder: Path) -> None:
    os.chdir(folder)
    while exchange(Path("one"), Path("two")):
        pass


def test_exchange_never_leaves_the_name_empty(here):
    """A reader that looks all the time always finds one of two folders."""
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, name).touch()
    if not exchange(Path("one"), Path("two")):
        pytest.skip("this file system cannot exchange two folders: the two renames are used")

    swapping = server.Process(target=exchange_for_ever, args=(here,))
    swapping.start()
    seen = Counter()
    try:
        while min(seen["one"], seen["two"]) < 300:
            seen[" ".join(os.listdir("one"))] += 1
            assert swapping.is_alive()
    finally:
        swapping.kill()
        swapping.join()
    assert sorted(seen) == ["one", "two"]


def test_a_folder_that_is_no_dataset_is_not_replaced(here, monkeypatch, capsys):
    write_hub_data(here, hub_rows(4, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    for output in (".", "openai", "openai/summarize_from_feedback/README.md"):
        said = refuse(tldr_data_process, capsys, monkeypatch, "--output", output)
        assert "is no dataset, and would be replaced" in said
    assert sorted(os.listdir()) == ["CarperAI", "openai"]


# Disks


@pytest.mark.parametrize("script", [PAIRS_SCRIPT, PREFIX_SCRIPT])
def test_full_disk_is_said_and_keeps_the_old_dataset(script, tmp_path, small_disk, small_models):  # noqa: F811
    """Ever larger disks, until the dataset fits: rows are converted, mapped and saved, and each may fail."""
    for folder, count in (("small", 20), ("large", 1500)):
        write_hub_data(tmp_path / folder, hub_rows(count, 1), hub_rows(20, 2), hub_test_rows(20, 3))
        if script == PREFIX_SCRIPT:
            assert run(PAIRS_SCRIPT, [], tmp_path / folder)[0] == 0

    def arguments(folder: str) -> list[str]:
        source = tmp_path / folder
        if script == PREFIX_SCRIPT:
            dataset = str(source / "summarize_from_feedback")
            models = ["--reward_model", small_models["bert"], "--output", "data"]
            return ["--dataset", dataset, "--num_comparisons", "0", *models]
        return [
            *("--comparisons", str(source / "openai/summarize_from_feedback")),
            *("--test_posts", str(source / "CarperAI/openai_summarize_tldr"), "--output", "data"),
        ]

    sizes = {}
    for folder in ("small", "large"):
        (tmp_path / f"{folder}-output").mkdir()
        assert run(script, arguments(folder), tmp_path / f"{folder}-output")[0] == 0
        sizes[folder] = sum(map(len, files_of(tmp_path / f"{folder}-output/data").values())) // 1024

    old, outputs = files_of(tmp_path / "small-output/data"), []
    while True:
        disk = small_disk(2 * sizes["small"] + 100 + sizes["large"] * len(outputs) // 2)
        shutil.copytree(tmp_path / "small-output/data", disk.path / "data")
        status, output = disk.run(script, arguments("large"))
        if not status:
            break
        assert_one_error(status, output, "No space left on device")
        assert files_of(disk.path / "data") == old and os.listdir(disk.path) == ["data"]
        outputs.append(output)

    assert ["Saving the dataset" in output for output in outputs].count(False) >= 1
    assert "Saving the dataset" in outputs[-1]
    assert files_of(disk.path / "data").keys() == files_of(tmp_path / "large-output/data").keys()
    assert os.listdir(disk.path) == ["data"]


# Bad input


def damage(path: str, how: str) -> None:
    """Cut a file to a part of its size, or overwrite bytes in it."""
    data = bytearray(Path(path).read_bytes())
    if how == "overwritten":
        rng = random.Random(0)
        for at in rng.sample(range(len(data)), len(data) // 20):
            data[at] = rng.randrange(256)
    else:
        del data[int(len(data) * float(how)) :]
    Path(path).write_bytes(data)


@pytest.mark.parametrize("how", ["0", "0.3", "0.7", "0.99", "overwritten"])
def test_damaged_parquet_and_arrow_are_refused(here, monkeypatch, capsys, how):
    write_hub_data(here, hub_rows(6, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    damage("openai/summarize_from_feedback/train.parquet", how)
    said = refuse(tldr_data_process, capsys, monkeypatch)
    assert "cannot load 'openai/summarize_from_feedback'" in said
    assert not Path("summarize_from_feedback").exists()

    write_pairs([PAIR] * 20)
    damage("summarize_from_feedback/train/data-00000-of-00001.arrow", how)
    said = refuse(tldr_data_process_partial, capsys, monkeypatch)
    assert "make it with `python DataProcess/tldr_data_process.py`" in said
    assert not Path("summarize_from_feedback_partial").exists()


@pytest.mark.parametrize("notes", ['{"template": "PO', "", "[1]", '{"template": 3}', '"\ud800"', "\0"])
def test_damaged_notes_are_refused(here, monkeypatch, capsys, notes):
    write_pairs([PAIR])
    Path("summarize_from_feedback/processing.json").write_text(notes, errors="surrogatepass")
    assert "cannot read the dataset" in refuse(tldr_data_process_partial, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "POST: a\nTL;DR:", "chosen": " b"}, "KeyError: 'rejected'"),
        (PAIR | {"chosen": 3}, "column 'chosen' of split 'train' is not text"),
        (PAIR | {"prompt": None}, "column 'prompt' of split 'train'"),
        (PAIR | {"rejected": [" b"]}, "column 'rejected' of split 'train' is not text"),
    ],
)
def test_pairs_of_wrong_columns_are_refused(here, monkeypatch, capsys, row, said):
    write_pairs([row, row])
    assert said in refuse(tldr_data_process_partial, capsys, monkeypatch)


def test_one_null_and_one_broken_text_are_refused(here, monkeypatch, capsys):
    write_pairs([PAIR, PAIR | {"chosen": None}])
    assert "column 'chosen' of split 'train' has an empty cell" in refuse(
        tldr_data_process_partial, capsys, monkeypatch
    )
    write_pairs([PAIR | {"chosen": " sister"}])
    file = Path("summarize_from_feedback/train/data-00000-of-00001.arrow")
    assert file.read_bytes().count(b" sister") == 1
    file.write_bytes(file.read_bytes().replace(b" sister", b" s\xffster"))
    assert "UTF8" in refuse(tldr_data_process_partial, capsys, monkeypatch)


JSON_LINES = [
    (lambda rows: rows[1]["info"].update(post="half \ud800 a pair"), "surrogate pair in string is invalid"),
    (
        lambda rows: rows[1]["info"].update(post=5),
        "row 1 of split 'train': the post or a summary is not text",
    ),
    (lambda rows: rows[2].update(choice=None), "row 2 of split 'train': `choice` is None"),
    (lambda rows: rows[0].update(choice="left"), "row 0 of split 'train': `choice` is 'left'"),
    (lambda rows: [row.pop("summaries") for row in rows], "row 0 of split 'train' has no usable field"),
]


@pytest.mark.parametrize(("change", "said"), JSON_LINES)
def test_rows_of_json_lines_are_refused(here, monkeypatch, capsys, change, said):
    write_hub_data(here, hub_rows(3, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    rows = hub_rows(4, 1)
    change(rows)
    Path("own").mkdir()
    for split in ("train", "validation"):
        Path("own", f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert said in refuse(
        tldr_data_process, capsys, monkeypatch, "--comparisons", "own", "--comparisons_config", "default"
    )


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
    monkeypatch.setattr(sys, "argv", ["script"])
    tldr_data_process.main()
    prompts = load_from_disk("summarize_from_feedback")["train"]["prompt"][:]
    assert prompts == [TEMPLATE.format(post=post.strip()) for post in odd]
    assert "3 no post" in capsys.readouterr().out

    flags = ["--reward_model", small_models["bert"], "--num_comparisons", "0"]
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    tldr_data_process_partial.main()
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


def test_output_may_not_replace_what_is_read(here, monkeypatch, capsys):
    write_pairs([PAIR])
    before = files_of(here)
    assert "would replace --dataset" in refuse(
        tldr_data_process_partial, capsys, monkeypatch, "--output", "./summarize_from_feedback/"
    )
    assert files_of(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory_is_said(here, monkeypatch, capsys):
    write_hub_data(here, hub_rows(4, 1), hub_rows(3, 2), hub_test_rows(3, 3))
    here.chmod(0o555)
    assert "Permission denied" in refuse(tldr_data_process, capsys, monkeypatch)


# Network


HUB_NAMES = {PAIRS_SCRIPT: "openai/summarize_from_feedback", PREFIX_SCRIPT: "OpenAssistant/reward-model"}
# The hub's client waits between its five attempts; the test does not.
IMPATIENT = """
import os, runpy, sys, time
time.sleep = lambda seconds: None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", HUB_NAMES)
def test_offline_hub_is_said_in_one_message(here, script):
    write_pairs([PAIR])
    name = HUB_NAMES[script]
    flags = ["--reward_model", name] if script == PREFIX_SCRIPT else ["--comparisons", name]
    assert_one_error(*run(script, flags, here), name)


def test_unreachable_hub_is_said_in_one_message(here):
    """Nobody listens where the hub should be, and HF_HUB_OFFLINE is not set."""
    write_pairs([PAIR])
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(here / "hub")}
        scripts = [
            subprocess.Popen(
                [sys.executable, "-c", IMPATIENT, ROOT / script],
                env=os.environ | hub,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for script in HUB_NAMES
        ]
        outputs = [script.communicate()[0] for script in scripts]
    assert_one_error(scripts[0].returncode, outputs[0], "cannot load 'openai/summarize_from_feedback'")
    assert_one_error(scripts[1].returncode, outputs[1], "cannot load the tokenizer of 'OpenAssistant/")
    assert outputs[0].count("Retrying") == 5  # the client did try, and has given up


# Row readers

# With halves of surrogate pairs, and with the marks that some readers take for the end of a line.
letters = st.characters() | st.sampled_from("ab \n\ud800\udfff\u2028\x85")
texts = st.text(letters, max_size=12)
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


summaries = likely(st.lists(record(text=likely(texts | st.none())), min_size=2, max_size=2))
comparisons = record(
    info=record(post=likely(texts | st.none())), summaries=summaries, choice=likely(st.integers(0, 1))
)
filled = st.text(letters, min_size=1, max_size=12).filter(str.strip)
valid_comparisons = st.builds(
    lambda post, pair, choice: {"info": {"post": post}, "summaries": pair, "choice": choice},
    filled,
    st.lists(st.builds(dict, text=filled), min_size=2, max_size=2),
    st.integers(0, 1),
)
test_prompts = texts | st.builds("SUBREDDIT: r/x\n{}POST:{}\nTL;DR:{}".format, texts, texts, texts)
valid_test_posts = st.builds(dict, prompt=st.builds("POST:{}\nTL;DR:".format, filled), label=filled)
test_posts = record(prompt=likely(test_prompts), label=likely(texts | st.none()))


@fuzz
@given(comparisons | valid_comparisons)
def test_any_comparison_is_a_pair_or_a_value_error(row):
    try:
        pair = preference_from_comparison(row, 3, "train", TEMPLATE)
    except ValueError as error:
        assert str(error).startswith("row 3 of split 'train'")
        return
    assert sorted(pair) == ["chosen", "dropped", "prompt", "rejected"]
    "".join(pair.values()).encode()  # can be written

    post, answers = row["info"]["post"], [summary["text"] for summary in row["summaries"]]
    if pair["dropped"]:
        blank = [not (text or "").strip() for text in (post, *answers)]
        assert any(blank) or answers[0].strip() == answers[1].strip()
        assert pair["prompt"] == pair["chosen"] == pair["rejected"] == ""
    else:
        assert pair["prompt"] == "POST: " + post.strip() + "\nTL;DR:"
        assert pair["chosen"] == " " + answers[row["choice"]].strip()
        assert pair["rejected"] == " " + answers[1 - row["choice"]].strip()


@fuzz
@given(test_posts | valid_test_posts)
def test_any_test_post_is_a_prompt_or_a_value_error(row):
    try:
        read = prompt_from_test_post(row, 3, TEMPLATE)
    except ValueError as error:
        assert str(error).startswith("row 3 of the test posts")
        return
    assert sorted(read) == ["dropped", "prompt", "reference"]
    "".join(read.values()).encode()
    if read["dropped"]:
        assert read["prompt"] == read["reference"] == ""
    else:
        assert read["reference"] == " " + row["label"].strip()
        post = read["prompt"].removeprefix("POST: ").removesuffix("\nTL;DR:")
        assert post and post == post.strip() and post in row["prompt"]


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


@fuzz
@given(
    st.lists(
        test_prompts.map(lambda text: json.dumps(text)[:-1])
        | record(prompt=likely(texts), reference=likely(texts | st.none())),
        max_size=3,
    ),
    st.booleans(),
)
def test_any_prompt_file_is_read_or_refused(tmp_path_factory, rows, ascii_only):
    """Lines of whole and of broken JSON, with text as escapes and as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        prompts, references = read_own_prompts(str(path))
    except SystemExit as stopped:
        assert stopped.code == 2
        return
    assert prompts == [row["prompt"] for row in rows]
    assert references == [row.get("reference") for row in rows]
    "".join([*prompts, *filter(None, references)]).encode()
