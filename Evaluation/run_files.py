"""What a run directory holds, by prompt: rewards, responses, traces and references, and what is missing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
from pydantic import BaseModel, FiniteFloat

from pargs.cli import SettingsParser
from pargs.files import MAKE_PAIRS, read_dataset, read_template
from pargs.origin import Origin
from pargs.runs import (
    REFERENCE,
    REFERENCES,
    REWARDS,
    MethodRecord,
    Reference,
    Step,
    generation_path,
    parse_json,
    read_bytes,
    read_generations,
    read_methods,
    read_rewards,
    read_traces,
    trace_path,
)

Key = tuple[str, int]  # a prompt, and which of its occurrences in the run (0 unless a prompt comes twice)


class Score(BaseModel):
    """The reward of one response, or of a reference."""

    method: str
    prompt: str
    result: str
    reward: FiniteFloat


class Scores(BaseModel):
    """A file `scores_NAME.json`: a run's responses as one reward model finds them."""

    reward_model: str
    identity: str | None  # a digest of its folder, or the hub's commit
    origin: Origin
    scores: list[Score]

    def rewards(self) -> dict[tuple[str, str, str], float]:
        """By method, prompt and text: what was decoded anew since has none."""
        return {(score.method, score.prompt, score.result): score.reward for score in self.scores}


@dataclass
class Run:
    """One run directory.

    `rewards` has a row per prompt and a column per method (and `reference`); `responses` has, per method
    with a generation file, a row per prompt with `result`, `num_tokens`, `finish_reason`, `ids` (None in
    older files) and `turns` (None but of chat prompts). Both are indexed by (prompt, copy). `methods` says
    what each method was; `notes` names everything that is missing.
    """

    directory: Path
    rewards: pd.DataFrame
    methods: dict[str, MethodRecord]
    responses: dict[str, pd.DataFrame] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)  # by name
    names: dict[str, str] = field(default_factory=dict)  # of methods that have another name in the files
    notes: list[str] = field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message if self.directory == Path() else f"{self.directory}: {message}")


T = TypeVar("T")


def parse_runs(kind: type[T], description: str | None, help: str) -> tuple[T, list[str]]:
    """The settings of a script, and the run directories that it is given."""
    parser = SettingsParser(kind, description)
    parser.add_argument("runs", nargs="*", default=["."], metavar="RUN", help=help)
    settings, others = parser.parse()
    return settings, others.runs


def prompt_keys(prompts: list[str]) -> list[Key]:
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def index_by_prompt(table: pd.DataFrame) -> pd.DataFrame:
    """The same rows, indexed by (prompt, copy) instead of having a column `prompt`."""
    keys = pd.MultiIndex.from_tuples(prompt_keys(list(table["prompt"])), names=["prompt", "copy"])
    return table.drop(columns="prompt").set_index(keys)


def read_run(directory: Path) -> Run:
    """Read a run's rewards, responses and methods; exits where a file is damaged."""
    run = Run(directory, index_by_prompt(read_rewards(directory / REWARDS)), read_methods(directory))

    for method, rewards in run.rewards.items():
        if rewards.isna().any():
            run.note(
                f"{method} has no reward in {missing_rows(rewards)}: "
                "they count neither in its mean nor in its differences"
            )
        path = generation_path(str(method), directory)
        if method == REFERENCE:
            continue
        if not path.exists():
            run.note(f"{method} has no {path.name}: its responses are unknown")
            continue

        responses = read_responses(path)
        if unrewarded := len(responses.index.difference(run.rewards.index)):
            run.note(f"{path.name} has {unrewarded} responses to prompts not in {REWARDS}")
        responses = responses.reindex(run.rewards.index)
        if responses["result"].isna().any():
            run.note(f"{path.name} has no response for {missing_rows(responses['result'])} of {REWARDS}")
        if responses["result"].notna().any():
            run.responses[str(method)] = responses
    for path in sorted(directory.glob("scores_*.json")):
        run.scores[path.stem.removeprefix("scores_")] = read_scores(path)
    return run


def read_scores(path: Path) -> Scores:
    again = "delete it, then `python Evaluation/score_generations.py`"
    return parse_json(Scores, read_bytes(path), str(path), again)


def missing_rows(column: pd.Series, limit: int = 8) -> str:
    """E.g. "2 of 100 rows (row 3, 7)"."""
    rows = [str(at + 1) for at, is_missing in enumerate(column.isna()) if is_missing]
    shown = ", ".join(rows[:limit]) + (", ..." if len(rows) > limit else "")
    return f"{len(rows)} of {len(column)} rows (row {shown})"


def read_responses(path: Path) -> pd.DataFrame:
    """One `generation_*.json`, a row per prompt."""
    columns = ["prompt", "result", "num_tokens", "finish_reason", "ids", "turns"]
    rows = [generation.model_dump(include=set(columns)) for generation in read_generations(path)]
    return index_by_prompt(pd.DataFrame(rows, columns=columns))


def read_steps(run: Run, method: str) -> dict[Key, list[Step]]:
    """The steps that `--trace` recorded, per prompt; empty where there is no trace."""
    traces = read_traces(trace_path(run.names.get(method, method), run.directory))
    keys = prompt_keys([trace.prompt for trace in traces])
    return {key: trace.steps for key, trace in zip(keys, traces, strict=True)}


def find_dataset(run: Run, dataset: str) -> Path | None:
    """The dataset of a run: in its directory, or else in the current one."""
    return next((place for place in (run.directory / dataset, Path(dataset)) if place.exists()), None)


def find_template(run: Run, records: Iterable[MethodRecord | None], dataset: str) -> str:
    """The prompts' template: what the first record says that says it, else the dataset."""
    said = (record.template for record in records if record and record.template is not None)
    found = next(said, None)
    return read_template(find_dataset(run, dataset) or dataset) if found is None else found


def read_references(run: Run, dataset: str) -> dict[str, list[str]]:
    """The reference summaries of each prompt, of the dataset and of the user's own prompts."""
    references: dict[str, list[str]] = {}
    if place := find_dataset(run, dataset):
        test = read_dataset(place, {"test": ["prompt", "reference"]}, MAKE_PAIRS)[0]["test"]
        for prompt, reference in zip(test["prompt"], test["reference"], strict=True):
            references.setdefault(prompt, []).append(reference)

    path, own = run.directory / REFERENCES, {}
    for row in parse_json(list[Reference], read_bytes(path), str(path)) if path.exists() else ():
        if row.reference is not None:
            own.setdefault(row.prompt, []).append(row.reference)
    # The dataset may have more for a prompt than the run drew.
    others = {prompt: texts for prompt, texts in own.items() if set(texts) - {*references.get(prompt, ())}}
    return references | others
