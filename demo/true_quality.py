"""Score what each method wrote by the true quality of the demo's world, beside its reward.

Reads, in the current directory, demo_facts.json (from make_posts.py), baseline_results.csv and
generation_*.json (from stage 4) and, for the references' row, the test split of summarize_from_feedback/
(from stage 1). Prints a table, a row per method, and writes it to true_quality.csv.

    python demo/true_quality.py
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from quality import WEIGHTS, true_quality

from pargs.cli import fail, is_main, parse_settings, setting
from pargs.files import DECODE, MAKE_PAIRS, read_dataset, write_whole
from pargs.runs import REFERENCE, REWARDS, generation_path, read_generations, read_rewards

MAKE_FACTS = "python demo/make_posts.py ."


@dataclass
class Settings:
    facts: str = setting("demo_facts.json", "Facts of the posts.")
    rewards: str = setting(REWARDS, "Rewards of every method.")
    dataset: str = setting("summarize_from_feedback", "Holds the references.")
    output: str = setting("true_quality.csv", "Where the table goes.")


def read_facts(path: str) -> dict[str, dict]:
    """The facts of each post of the world."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path} is missing; make it with `{MAKE_FACTS}`")
    except (OSError, ValueError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{MAKE_FACTS}`")


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


def read_responses(method: str, prompts: list[str]) -> list[str]:
    """What the method wrote for the prompts, in their order."""
    path = generation_path(method)
    generations = read_generations(path)
    if [generation.prompt for generation in generations] != prompts:
        fail(f"{path} is of other prompts than the table of rewards; make both again with `{DECODE}`")
    return [generation.result for generation in generations]


def read_references(dataset: str, prompts: list[str]) -> list[str] | None:
    """The reference summaries of the prompts; None where stage 1's output is not here."""
    if not Path(dataset).is_dir():
        return None
    test = read_dataset(dataset, {"test": ["prompt", "reference"]}, MAKE_PAIRS)[0]["test"]
    references = dict(zip(test["prompt"], test["reference"], strict=True))
    if not set(prompts) <= set(references):
        fail(f"{dataset} holds other prompts than the table of rewards; decode again with `{DECODE}`")
    return [references[prompt] for prompt in prompts]


def mean_quality(
    responses: list[str], facts: list[dict], rewards: pd.Series, prompts: list[str]
) -> dict[str, float]:
    """One row of the table: means over the prompts, and the standard error of the mean quality.

    A prompt that comes twice counts once, with its mean.
    """
    rows = pd.DataFrame(true_quality(text, known) for text, known in zip(responses, facts, strict=True))
    qualities = rows.assign(reward=rewards).groupby(prompts, sort=False).mean()
    row = {
        "n": len(qualities),
        "reward": qualities["reward"].mean(),
        "true_quality": qualities["total"].mean(),
        "standard_error": qualities["total"].sem(),
    }
    return row | qualities[list(WEIGHTS)].mean().to_dict()


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if not is_main():
        return  # under a launcher one process is enough
    facts = read_facts(settings.facts)
    rewards = read_rewards(Path(settings.rewards))
    prompts = list(rewards["prompt"])
    known = facts_of_prompts(facts, prompts)

    rows = {}
    for method in rewards.columns.drop("prompt"):
        if method == REFERENCE:
            responses = read_references(settings.dataset, prompts)
        else:
            responses = read_responses(method, prompts)
        if responses is not None:
            rows[method] = mean_quality(responses, known, rewards[method], prompts)

    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
    print(table.round(3).to_string())
    write_whole(Path(settings.output), table.to_csv)
    print(f"wrote {settings.output}; what each quality means: demo/quality.py")


if __name__ == "__main__":
    main()
