"""The files of a run that the reports read, checked as they are read; and writing a report all or nothing."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from command_line import fail

METHODS = ("ARGS", "PARGS-G", "PARGS", "BESTN", "TOP-K", "DPO", "PPO")
REFERENCE = "reference"
DECODE = "python PARGS_decode/PARGS_baselines.py"

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
        if not path.exists():
            run.notes.append(f"{where}{method} has no {path.name}: its responses are unknown")
            continue

        responses = read_responses(path).reindex(run.rewards.index)
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
        cells = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{DECODE}`")

    methods = [column for column in cells if column != "prompt"]
    if "prompt" not in cells or not methods or cells.empty:
        fail(f"{path} needs a column `prompt`, a column per method and a row per prompt; has {list(cells)}")

    rewards = cells[methods].apply(pd.to_numeric, errors="coerce")
    for method in methods:
        is_empty = cells[method].str.strip().str.lower().isin(["", "nan"])
        for row, (cell, value, empty) in enumerate(
            zip(cells[method], rewards[method], is_empty, strict=True), 1
        ):
            if not (empty or math.isfinite(value)):
                fail(f"{path}, row {row}, column {method}: {cell!r} is not a finite number")

    rewards.index = pd.MultiIndex.from_tuples(prompt_keys(list(cells["prompt"])), names=["prompt", "copy"])
    return rewards.astype(float)


def read_responses(path: Path) -> pd.DataFrame:
    """One `generation_*.json`, a row per prompt."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{DECODE}`")
    if not isinstance(rows, list):
        fail(f"{path} is not a list of responses; make it again with `{DECODE}`")

    for number, row in enumerate(rows, 1):
        texts = [row.get("prompt"), row.get("result")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            fail(f"{path}, row {number}: needs the texts `prompt` and `result`")

    frame = pd.DataFrame(rows, columns=["prompt", "result", "num_tokens", "finish_reason"])
    frame["num_tokens"] = pd.to_numeric(frame["num_tokens"], errors="coerce")
    keys = prompt_keys(list(frame.pop("prompt")))
    frame.index = pd.MultiIndex.from_tuples(keys, names=["prompt", "copy"])
    return frame


def read_trace(directory: Path, method: str) -> dict[Key, list[dict]]:
    """The steps that `--trace` recorded, per prompt; empty where there is no trace."""
    path = directory / f"trace_{file_stem(method)}.jsonl"
    if not path.exists():
        return {}

    prompts, traces = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                prompts.append(row["prompt"])
                traces.append([check_step(step) for step in row["steps"]])
            except (ValueError, KeyError, TypeError) as error:
                fail(f"{path}, line {number} is no trace ({error!r}); make it again with `{DECODE} --trace`")
    return dict(zip(prompt_keys(prompts), traces, strict=True))


def check_step(step: dict) -> dict:
    """A step whose candidates have a log-probability and a reward each, one of them chosen."""
    lengths = {len(step[name]) for name in ("tokens", "log_probs", "rewards")}
    if len(lengths) != 1 or not 0 <= step["chosen"] < max(lengths):
        raise ValueError("a step needs as many tokens as log_probs and rewards, and one of them chosen")
    return step


def read_references(directory: Path, dataset: str) -> dict[str, list[str]]:
    """The reference summaries of each test prompt; empty where the dataset is not there."""
    from datasets import load_from_disk  # takes a second to import

    places = [place for place in (directory / dataset, Path(dataset)) if place.exists()]
    if not places:
        return {}
    try:
        rows = load_from_disk(str(places[0]))["test"]
        pairs = list(zip(rows["prompt"], rows["reference"], strict=True))
    except Exception as error:  # truncated and foreign files raise a dozen different types
        fail(
            f"cannot read the test split of {str(places[0])!r} ({error}); "
            "make it again with `python DataProcess/tldr_data_process.py`"
        )

    references: dict[str, list[str]] = {}
    for prompt, reference in pairs:
        references.setdefault(prompt, []).append(reference)
    return references


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
        beside.unlink(missing_ok=True)
