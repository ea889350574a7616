"""Judge what each method wrote by the true quality of the demo's world, beside its reward.

Reads, in the current directory, demo_facts.json (from make_posts.py), baseline_results.csv and
generation_*.json (from stage 4) and, for the references' row, the test split of summarize_from_feedback/
(from stage 1). Prints a table, a row per method, and writes it to true_quality.csv.

    python demo/true_quality.py
"""

import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pandas as pd
from quality import WEIGHTS, true_quality
from transformers import HfArgumentParser

DECODE = "python PARGS_decode/PARGS_baselines.py"


@dataclass
class Settings:
    facts: Path = field(default=Path("demo_facts.json"), metadata={"help": "Facts of the posts."})
    rewards: Path = field(default=Path("baseline_results.csv"), metadata={"help": "Rewards of every method."})
    dataset: Path = field(default=Path("summarize_from_feedback"), metadata={"help": "Holds the references."})
    output: Path = field(default=Path("true_quality.csv"), metadata={"help": "Where the table goes."})


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_json(path: Path, command: str) -> object:
    if not path.is_file():
        fail(f"{path} is missing; make it with: {command}")
    try:
        return json.loads(path.read_text())
    except ValueError as problem:
        fail(f"{path} is not JSON ({problem}); make it again with: {command}")


def read_rewards(path: Path) -> pd.DataFrame:
    """A row per prompt, a column of rewards per method and for the reference."""
    if not path.is_file():
        fail(f"{path} is missing; make it with: {DECODE}")
    try:
        rewards = pd.read_csv(path)
    except ValueError as problem:
        fail(f"{path} is no table ({problem}); make it again with: {DECODE}")

    methods = [column for column in rewards.columns if column != "prompt"]
    if "prompt" not in rewards.columns or not methods or rewards.empty:
        fail(f"{path} needs a prompt column, a column per method and rows; make it again with: {DECODE}")
    if not all(pd.api.types.is_numeric_dtype(rewards[method]) for method in methods):
        fail(f"{path} has a reward that is no number; make it again with: {DECODE}")

    return rewards


def read_responses(method: str, rewards: pd.DataFrame) -> list[str]:
    """What the method wrote for the prompts of `rewards`, in their order."""
    path = Path(f"generation_{method.lower().replace('-', '_')}.json")
    rows = read_json(path, DECODE)
    whole = isinstance(rows, list) and all(
        isinstance(r, dict) and {"prompt", "result"} <= set(r) for r in rows
    )
    if not whole:
        fail(f"{path} is no list of prompts and results; make it again with: {DECODE}")
    if [row["prompt"] for row in rows] != list(rewards["prompt"]):
        fail(f"{path} is of other prompts than the table of rewards; make both again with: {DECODE}")

    return [row["result"] for row in rows]


def read_references(dataset: Path, rewards: pd.DataFrame) -> list[str] | None:
    """The reference summaries of the prompts; None where stage 1's output is not here."""
    if not (dataset / "test").is_dir():
        return None

    from datasets import load_from_disk

    test = load_from_disk(str(dataset / "test"))
    references = dict(zip(test["prompt"], test["reference"], strict=True))
    if not set(rewards["prompt"]) <= set(references):
        fail(f"{dataset} holds other prompts than the table of rewards; decode again with: {DECODE}")

    return [references[prompt] for prompt in rewards["prompt"]]


def facts_of_prompts(facts: dict[str, dict], prompts: list[str]) -> list[dict]:
    """The facts of each prompt's post, which stands between "POST: " and the last TL;DR."""
    posts = [prompt.partition("POST: ")[2].rpartition("\nTL;DR:")[0] for prompt in prompts]
    for row, post in enumerate(posts):
        if post not in facts:
            fail(
                f"prompt {row} of the rewards is no post of demo_facts.json; both must come from one "
                "run of python demo/make_posts.py, and the prompts from the default template"
            )

    return [facts[post] for post in posts]


def judge(responses: list[str], facts: list[dict], rewards: pd.Series) -> dict[str, float]:
    """One row of the table: means over the prompts, and the standard error of the mean quality."""
    qualities = pd.DataFrame(true_quality(text, known) for text, known in zip(responses, facts, strict=True))
    row = {
        "n": len(qualities),
        "reward": rewards.mean(),
        "true_quality": qualities["total"].mean(),
        "standard_error": qualities["total"].sem(),
    }
    return row | qualities[list(WEIGHTS)].mean().to_dict()


def main() -> None:
    parser = HfArgumentParser(Settings, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    (settings,) = parser.parse_args_into_dataclasses()

    facts = read_json(Path(settings.facts), "python demo/make_posts.py .")
    rewards = read_rewards(Path(settings.rewards))
    known = facts_of_prompts(facts, list(rewards["prompt"]))

    rows = {}
    for method in rewards.columns.drop("prompt"):
        if method == "reference":
            responses = read_references(Path(settings.dataset), rewards)
        else:
            responses = read_responses(method, rewards)

        if responses is not None:
            rows[method] = judge(responses, known, rewards[method])

    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    print(table.round(3).to_string())

    output = Path(settings.output)
    temporary = output.with_name(output.name + ".tmp")
    table.to_csv(temporary)
    os.replace(temporary, output)
    print(f"wrote {output}; what each quality means: demo/quality.py")


if __name__ == "__main__":
    main()
