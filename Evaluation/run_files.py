"""The files of a run that the reports read, checked as they are read; and writing a report all or nothing."""

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from command_line import fail

METHODS = ("ARGS", "PARGS-G", "PARGS", "BESTN", "TOP-K", "DPO", "PPO")
REFERENCE = "reference"
DECODE = "python PARGS_decode/PARGS_baselines.py"

LARGEST_REWARD = 3.4e38  # that a model could give, in fp32

Key = tuple[str, int]  # a prompt, and which of its occurrences in the run (0 unless a prompt comes twice)


@dataclass
class Run:
    """One run directory.

    `rewards` has a row per prompt and a column per method (and `reference`); `responses` has, per method
    with a readable generation file, a row per prompt with `result`, `num_tokens`, `finish_reason`. Both are
    indexed by (prompt, copy). `notes` names everything that is missing.
    """

    directory: Path
    rewards: pd.DataFrame
    responses: dict[str, pd.DataFrame] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def file_stem(method: str) -> str:
    """PARGS-G -> pargs_g, as in generation_pargs_g.json."""
    return method.lower().replace("-", "_")


def prompt_keys(prompts: list[str]) -> list[Key]:
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def some(items: list, limit: int = 8) -> str:
    """The first few of a list, as text."""
    return ", ".join(map(str, items[:limit])) + (", ..." if len(items) > limit else "")


def read_run(directory: str) -> Run:
    """Read a run's rewards and responses. Exits with code 2 where a file is unreadable or a row is bad."""
    run = Run(Path(directory), read_rewards(Path(directory, "baseline_results.csv")))
    where = "" if run.directory == Path(".") else f"{directory}: "

    not_run = [method for method in METHODS if method not in run.rewards]
    if not_run:
        run.notes.append(f"{where}not in baseline_results.csv: {', '.join(not_run)}")

    for method, rewards in run.rewards.items():
        rows = [at + 1 for at, is_missing in enumerate(rewards.isna()) if is_missing]
        if rows:
            run.notes.append(
                f"{where}{method} has no reward in {len(rows)} of {len(rewards)} rows "
                f"(row {some(rows)}): they count neither in its mean nor in its differences"
            )
        if method == REFERENCE:
            continue

        path = run.directory / f"generation_{file_stem(method)}.json"
        if not os.path.exists(path):  # unlike Path.exists, no error for a name that is too long
            run.notes.append(f"{where}{method} has no {path.name}: its responses are unknown")
            continue

        responses = read_responses(path)
        unrewarded = len(responses.index.difference(run.rewards.index))
        if unrewarded:
            run.notes.append(
                f"{where}{path.name} has {unrewarded} responses to prompts not in baseline_results.csv"
            )
        responses = responses.reindex(run.rewards.index)
        missing = [at + 1 for at, is_missing in enumerate(responses["result"].isna()) if is_missing]
        if missing:
            run.notes.append(
                f"{where}{path.name} has no response for {len(missing)} of {len(rewards)} prompts "
                f"of baseline_results.csv (row {some(missing)})"
            )
        run.responses[method] = responses
    return run


def read_rewards(path: Path) -> pd.DataFrame:
    """`baseline_results.csv` as numbers; an empty cell or `nan` is a missing reward."""
    if not path.exists():
        fail(f"{path} is missing; make it with `{DECODE}` in that directory")
    try:
        # As text first: a post may well read "NA", and a word among the numbers has to be named.
        content = path.read_bytes()
        cells = pd.read_csv(BytesIO(content), dtype=str, keep_default_na=False)
        if not content.endswith(b"\n"):
            raise ValueError("its last line is cut off")
    except (ValueError, OSError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{DECODE}`")
    if not isinstance(cells.index, pd.RangeIndex):
        fail(f"{path} has rows of more values than columns; make it again with `{DECODE}`")

    methods = [column for column in cells if column != "prompt"]
    if "prompt" not in cells or not methods or cells.empty:
        fail(f"{path} needs a column `prompt`, a column per method and a row per prompt; has {list(cells)}")

    rewards = cells[methods].apply(pd.to_numeric, errors="coerce")
    for method in methods:
        is_empty = cells[method].str.strip().str.lower().isin(["", "nan"])
        for row, (cell, value, empty) in enumerate(
            zip(cells[method], rewards[method], is_empty, strict=True), 1
        ):
            if not (empty or abs(value) < LARGEST_REWARD):
                fail(f"{path}, row {row}, column {method}: {cell!r} is not a finite number")

    rewards.index = pd.MultiIndex.from_tuples(prompt_keys(list(cells["prompt"])), names=["prompt", "copy"])
    return rewards.astype(float)


def read_generations(path: Path) -> list[dict]:
    """The rows of a `generation_*.json`, each with its texts `prompt` and `result`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{DECODE}`")
    if not isinstance(rows, list) or not rows:
        fail(f"{path} is not a list of responses; make it again with `{DECODE}`")

    for number, row in enumerate(rows, 1):
        texts = [row.get("prompt"), row.get("result")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            fail(f"{path}, row {number}: needs the texts `prompt` and `result`")
    return [row | {name: encodable(row[name]) for name in ("prompt", "result")} for row in rows]


def encodable(text: str) -> str:
    """A lone surrogate is legal in a JSON file but has no UTF-8 form: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def read_responses(path: Path) -> pd.DataFrame:
    """One `generation_*.json`, a row per prompt; a `num_tokens` that is no number is missing."""
    rows = read_generations(path)
    counts = [row.get("num_tokens") for row in rows]
    known = [type(count) in (int, float) and 0 <= count < 2**53 for count in counts]
    frame = pd.DataFrame(
        {
            "result": [row["result"] for row in rows],
            "num_tokens": [
                float(count) if is_known else np.nan for count, is_known in zip(counts, known, strict=True)
            ],
            "finish_reason": [row.get("finish_reason") for row in rows],
        }
    )
    keys = prompt_keys([row["prompt"] for row in rows])
    frame.index = pd.MultiIndex.from_tuples(keys, names=["prompt", "copy"])
    return frame


def read_trace(directory: Path, method: str) -> dict[Key, list[dict]]:
    """The steps that `--trace` recorded, per prompt; empty where there is no trace."""
    path = directory / f"trace_{file_stem(method)}.jsonl"
    if not path.exists():
        return {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        fail(f"cannot read {path}: {error}")

    prompts, traces = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompts.append(encodable(row["prompt"]))
            traces.append([check_step(step) for step in row["steps"]])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            fail(f"{path}, line {number} is no trace ({error!r}); make it again with `{DECODE} --trace`")
    return dict(zip(prompt_keys(prompts), traces, strict=True))


def check_step(step: dict) -> dict:
    """A step whose candidates have a log-probability and a reward each (null: NaN), one of them chosen.

    Raises:
        ValueError, KeyError, TypeError or OverflowError: it is none.
    """
    tokens, chosen = step["tokens"], step["chosen"]
    numbers = {name: [as_number(value) for value in step[name]] for name in ("log_probs", "rewards")}
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TypeError("the tokens of a step are a list of texts")
    if any(len(values) != len(tokens) for values in numbers.values()):
        raise ValueError("a step needs as many tokens as log_probs and rewards")
    if type(chosen) is not int or not 0 <= chosen < len(tokens):
        raise ValueError(f"the chosen candidate is {chosen!r} of {len(tokens)}")
    return {"tokens": tokens, "chosen": chosen} | numbers


def as_number(value: float | None) -> float:
    if type(value) not in (int, float, type(None)):
        raise TypeError(f"{value!r} is no number")
    return np.nan if value is None else float(value)


def read_references(directory: Path, dataset: str) -> dict[str, list[str]]:
    """The reference summaries of each test prompt; empty where the dataset is not there."""
    from datasets import load_from_disk  # takes a second to import

    place = find_dataset(directory, dataset)
    if place is None:
        return {}
    try:
        rows = load_from_disk(str(place))["test"]
        pairs = list(zip(rows["prompt"], rows["reference"], strict=True))
        if not all(isinstance(text, str | None) for pair in pairs for text in pair):
            raise TypeError("its columns are not text")
    except Exception as error:  # truncated and foreign files raise a dozen different types
        fail(
            f"cannot read the test split of {str(place)!r} ({error}); "
            "make it again with `python DataProcess/tldr_data_process.py`"
        )

    references: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        if reference is not None:
            references.setdefault(prompt, []).append(reference)
    return references


def find_dataset(directory: Path, dataset: str) -> Path | None:
    """The dataset of a run: in its directory, or else in the current one."""
    return next((place for place in (directory / dataset, Path(dataset)) if place.exists()), None)


def read_template(dataset: Path | None) -> str:
    """The template of the prompts, "{post}" where none is kept; its special tokens are live."""
    path = dataset and dataset / "processing.json"
    if path is None or not path.exists():
        return "{post}"
    try:
        template = json.loads(path.read_text(encoding="utf-8"))["template"]
        if not isinstance(template, str):
            raise TypeError("the template is not text")
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        fail(f"cannot read {path} ({error!r}); make it again with `python DataProcess/tldr_data_process.py`")
    return template


def check_writable(directory: Path) -> None:
    """Exit where nothing could be written: better now than after the work is done."""
    place = next(each for each in (directory, *directory.absolute().parents) if os.path.exists(each))
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        fail(f"cannot write into {str(directory)!r}: {str(place)!r} is no directory that can be written")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make the file under a temporary name, then rename it: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        fail(f"cannot write {str(path)!r}: {error}")
    finally:
        with suppress(OSError):
            beside.unlink()
