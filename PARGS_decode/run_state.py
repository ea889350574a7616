"""What a run directory holds of each method, what is left of it to do, and which make up one table."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import broadcast_object_list
from peft import PeftConfig
from progress import progress_files
from pydantic import TypeAdapter
from transformers import PreTrainedConfig

from pargs.cli import fail, is_main
from pargs.files import TRAIN_DPO, TRAIN_PARTIAL, write_rows, write_text
from pargs.models import load_config, loading
from pargs.origin import identify
from pargs.runs import (
    METHODS_FILE,
    REFERENCE,
    REFERENCES,
    REPORTS,
    REWARDS,
    Generation,
    Method,
    MethodRecord,
    Reference,
    Trace,
    describe_changes,
    generation_path,
    read_if_whole,
    trace_path,
    write_methods,
)

MADE_BY = {
    "partial_reward_modeling_tldr": TRAIN_PARTIAL,
    "GPT2_large_tldr_DPO": TRAIN_DPO,
}


# Models


def check_models(
    methods: dict[str, Method], evaluator: str, settings: dict[str, Any]
) -> dict[str, str | None]:
    """Every model that the methods need is there; by name, what tells it from a later one of that name."""
    policies = {method.policy for method in methods.values()}
    needed = [model for method in methods.values() for model in method.models]
    identities = {}
    for model in dict.fromkeys([*needed, evaluator]):
        flags = [f"--{flag}" for flag, value in settings.items() if value == model]
        identities[model] = identify_model(model, flags, settings["k"] if model in policies else 0)
    return identities


def identify_model(name: str, flags: list[str], k: int = 0) -> str | None:
    """What tells a model from a later one of the same name; exits where it is not there.

    Better said now than after hours of decoding. `flags` name it; a policy must know at least `k` tokens.
    """
    hint = f"name another with {' or '.join(flags) or 'its row of METHODS'}"
    if name in MADE_BY:
        hint = f"make it with `{MADE_BY[name]}`, or {hint}"
    if (name in MADE_BY or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
        fail(f"there is no folder {name!r}; {hint}")

    config: PeftConfig | PreTrainedConfig
    if Path(name, "adapter_config.json").exists():
        with loading(repr(name), hint):
            config = PeftConfig.from_pretrained(name)
    else:
        config = load_config(name, hint)
    vocabulary = getattr(config, "vocab_size", k)
    if k > vocabulary:
        fail(f"--k {k} is more than the {vocabulary} tokens that {name!r} knows")

    return identify(name, config)


# What is here, and what is left to do


@dataclass
class Work:
    """One method: what of it is here, and which prompts are left to decode."""

    new: list[str]
    kept: list[Generation] = field(default_factory=list)  # written as they would be now, asked for or not
    steps: dict[str, list[dict]] = field(default_factory=dict)  # of the kept ones with a trace, by prompt
    scored: bool = True  # whether the rewards of the kept ones are the evaluator's

    @property
    def is_done(self) -> bool:
        return self.scored and not self.new


def find_work(
    records: dict[str, MethodRecord], traced: set[str], prompts: list[str], directory: Path
) -> dict[str, Work]:
    """What is left of the methods that `records` describes; those `traced` need their trace.

    As the main process sees it: machines need not share a disk.
    """
    known, found = known_methods(directory), {}
    for name, record in records.items() if is_main() else ():
        found[name] = find_own_work(name, known.get(name), record, name in traced, prompts, directory)
        if found[name].is_done:
            print(f"{name}: done before, see {generation_path(name, directory)}")
            for path in progress_files(name, directory):  # of a launch that was killed after all was written
                path.unlink(missing_ok=True)
    return broadcast_object_list([found])[0]


def find_own_work(
    name: str,
    known: MethodRecord | None,
    record: MethodRecord,
    is_traced: bool,
    prompts: list[str],
    directory: Path,
) -> Work:
    """Responses are kept that the same recipe wrote; a method of which nothing is known is not here."""
    rows = read_if_whole(list[Generation], generation_path(name, directory))
    if known is None or rows is None:
        if rows is not None:
            print(f"{name}: decoded anew: {METHODS_FILE} does not know it")
        return Work(prompts)
    if changes := describe_changes(known.recipe, record.recipe):
        reason = ", ".join(changes) if known.origin else f"{METHODS_FILE} does not say how it was decoded"
        print(f"{name}: decoded anew: {reason}")
        return Work(prompts)

    steps = read_steps(name, directory)
    # A text and a conversation that reads like it have other ids.
    turns = {prompt: getattr(prompt, "turns", None) for prompt in prompts}
    rows = [row for row in rows if row.turns == turns.get(row.prompt, row.turns)]
    here = {row.prompt for row in rows}
    if is_traced and (untraced := here.intersection(prompts) - steps.keys()):
        print(f"{name}: --trace decodes {len(untraced)} prompts anew: their candidates were not kept")
        here -= untraced
    evaluator = str(record.evaluator)
    work = Work(
        new=[prompt for prompt in prompts if prompt not in here],
        kept=[row for row in rows if row.prompt in here],
        steps=steps,
        scored=known.evaluator == evaluator and known.models.get(evaluator) == record.models[evaluator],
    )
    if work.new and work.kept:
        print(f"{name}: {len(work.new)} of {len(prompts)} prompts are decoded, the others are kept")
    if not work.scored:
        print(f"{name}: {len(work.kept)} responses are scored again, by {evaluator!r}")
    return work


def read_steps(method: str, directory: Path) -> dict[str, list[dict]]:
    """The steps of each prompt in a method's trace; none where there is none, or it is damaged."""
    try:
        lines = trace_path(method, directory).read_bytes().splitlines()
        traces = [TypeAdapter(Trace).validate_json(line) for line in lines]
    except (OSError, ValueError):
        return {}
    return {trace.prompt: [step.model_dump() for step in trace.steps] for trace in traces}


def known_methods(directory: Path) -> dict[str, MethodRecord]:
    """What methods.json says of the methods here; a damaged one counts as not written, like results."""
    return read_if_whole(dict[str, MethodRecord], directory / METHODS_FILE) or {}


# Writing


def drop_results(methods: list[str], directory: Path) -> None:
    """Remove what the methods left here, finished or not, and the reports that were made of it."""
    kept = {name: record for name, record in known_methods(directory).items() if name not in methods}
    for method in methods:
        if generation_path(method, directory).exists():
            drop_reports(directory)
        for path in (generation_path(method, directory), trace_path(method, directory)):
            path.unlink(missing_ok=True)
        for path in progress_files(method, directory):
            path.unlink(missing_ok=True)
    if (directory / METHODS_FILE).exists():
        write_methods(kept, directory)


def drop_reports(directory: Path) -> None:
    """Remove the tables, the figure and the page: they are of results that go."""
    (directory / REWARDS).unlink(missing_ok=True)
    for pattern in REPORTS:
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def save_method(
    method: str,
    generations: list[Generation],
    steps: dict[str, list[dict]],
    record: MethodRecord,
    order: list[str],
    directory: Path = Path(),
) -> None:
    """Write a method's results and its record, which belong together also after a kill in between.

    Results of another recipe go first, as all that replaces them is kept in the progress. The record names
    the evaluator once its rewards are written. `order` is that of all methods.
    """
    records, path = known_methods(directory), generation_path(method, directory)
    known = records.get(method)
    if path.exists():
        drop_reports(directory)
        if known is None or known.recipe != record.recipe:
            path.unlink()
            trace_path(method, directory).unlink(missing_ok=True)

    if steps:
        # A line for each response: of a repeated prompt stage 5 looks for as many.
        traced = [row.prompt for row in generations if row.prompt in steps]
        lines = [json.dumps({"prompt": p, "steps": steps[p]}, ensure_ascii=False) + "\n" for p in traced]
        write_text(trace_path(method, directory), "".join(lines))
    else:
        trace_path(method, directory).unlink(missing_ok=True)

    def write_record(record: MethodRecord) -> None:
        named = records | {method: record}
        write_methods({name: named[name] for name in (*order, *named) if name in named}, directory)

    write_record(record.model_copy(update={"evaluator": None}))
    write_rows(path, [row.model_dump(exclude_none=True) for row in generations])
    write_record(record)


# One table


def collect_rewards(
    methods: list[str],
    prompts: list[str],
    references: list[float | None],
    shared: dict[str, Any],
    directory: Path = Path(),
) -> tuple[pd.DataFrame, dict[str, str]]:
    """One row a prompt, a column for each of `methods` and the references'; and why a method is left out.

    All of a table were decoded with the `shared` settings and models, for the same prompts.
    """
    table, known, left_out = pd.DataFrame({"prompt": prompts}), known_methods(directory), {}
    for method in methods:
        rows = read_if_whole(list[Generation], generation_path(method, directory))
        if method not in known or rows is None:
            continue
        rewards = {row.prompt: row.reward for row in rows}
        reasons = disagreements(known[method], shared)
        if missing := sum(prompt not in rewards for prompt in prompts):
            reasons.append(f"{missing} of {len(prompts)} prompts are not decoded")
        if reasons:
            left_out[method] = ", ".join(reasons)
        else:
            table[method] = [rewards[prompt] for prompt in prompts]
    table[REFERENCE] = references
    return table, left_out


def save_rewards(table: str, directory: Path) -> None:
    """Write the table; reports of another one go."""
    path = directory / REWARDS
    if path.exists() and path.read_text(encoding="utf-8") != table:
        drop_reports(directory)
    write_text(path, table)


def disagreements(record: MethodRecord, shared: dict[str, Any]) -> list[str]:
    """In what a method differs from the settings and models that all of a table share."""
    theirs = record.model_dump()
    if record.method.greedy:
        theirs["seed"] = shared["seed"]  # it draws nothing
    reasons = [
        f"{key} is {theirs[key]!r}, not {value!r}"
        for key, value in shared.items()
        if key != "models" and theirs[key] != value
    ]
    return reasons + [
        f"the model {name!r} is another one"
        for name in record.models.keys() & shared["models"].keys()
        if record.models[name] != shared["models"][name]
    ]


def save_references(
    prompts: list[str], references: list[str | None], rewards: list[float | None], directory: Path
) -> None:
    """Write what humans wrote for the prompts, for stage 5 to compare with."""
    rows = [
        Reference(prompt=prompt, reference=reference, reward=reward).model_dump()
        for prompt, reference, reward in zip(prompts, references, rewards, strict=True)
    ]
    write_rows(directory / REFERENCES, rows)
