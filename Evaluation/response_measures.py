"""What stands beside the reward, which alone can be gamed: whose reward it is, length, diversity, overlap,
likelihood, KL, cost.
"""

import re

import numpy as np
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from run_files import Run, read_references
from sampled_kl import Values, locate_model, measure_likelihood
from statistics_table import SCORE_COLUMN, per_prompt

from pargs.runs import REFERENCE


def measure_responses(
    runs: dict[str, Run], methods: list[str], dataset: str, policy: str | None, batch_size: int
) -> tuple[pd.DataFrame, list[str]]:
    """What stands beside the reward, a row per method, and what could not be had of pooled responses."""
    references = {name: read_references(run, dataset) for name, run in runs.items()}
    for name, run in runs.items():
        if not references[name]:
            run.note(f"no ROUGE-L, for the references in {dataset}/ are not there")
    found = [measure_likelihood(run, dataset, policy, batch_size) for run in runs.values()]
    likelihood, kl = (dict(zip(runs, values, strict=True)) for values in zip(*found, strict=True))

    scorers = dict.fromkeys(scorer for run in runs.values() for scorer in run.scores)
    for run in runs.values():
        if unasked := [scorer for scorer in scorers if scorer not in run.scores]:
            run.note(f"not scored by {', '.join(unasked)}, whose columns are of the other runs")

    measured: dict[str, dict[str, float | str | None]] = {}
    notes: list[str] = []
    for method in methods:
        measured[method] = {}
        for scorer in scorers:
            measured[method] |= mean_score(runs, method, scorer, references, notes)
        if method == REFERENCE:
            continue
        of_runs = [run for run in runs.values() if method in run.rewards]
        measured[method] |= {"evaluator_was": who_marked(of_runs, method), **mean_cost(of_runs, method)}
        responses = {name: run.responses[method] for name, run in runs.items() if method in run.responses}
        if not responses:
            continue
        rows = pd.concat(responses, names=["run"]).dropna(subset="result")
        measured[method] |= measure_texts(method, rows, references, notes)
        measured[method] |= {
            "log_likelihood_per_token": pooled_mean(likelihood, method, "log p", notes),
            "sampled_kl": pooled_mean(kl, method, "KL", notes),
        }
    return pd.DataFrame.from_dict(measured, orient="index").dropna(axis="columns", how="all"), notes


def mean_score(
    runs: dict[str, Run],
    method: str,
    scorer: str,
    references: dict[str, dict[str, list[str]]],
    notes: list[str],
) -> dict[str, float]:
    """Mean and standard error of what a further reward model gives a method, over all runs it has scored."""
    of_runs = {}
    for name, run in runs.items():
        if scorer not in run.scores or method not in run.rewards:
            continue
        own_name, rewards = run.names.get(method, method), run.scores[scorer].rewards()
        if method == REFERENCE:
            own = [references[name].get(prompt, [None])[0] for prompt, _ in run.rewards.index]
            texts = pd.Series(own, run.rewards.index, dtype=object).dropna()  # some prompts have none
        elif method in run.responses:
            texts = run.responses[method]["result"]
        else:
            continue
        found = [rewards.get((own_name, prompt, text), np.nan) for (prompt, _), text in texts.items()]
        of_runs[name] = pd.Series(found, texts.index, dtype=float)
    if not any(len(found) for found in of_runs.values()):
        return {}
    pooled = pd.concat(of_runs, names=["run"])
    prompts = per_prompt(pooled)
    if missing := int(pooled.isna().sum()):
        notes.append(
            f"{method}: {scorer} has scored {len(pooled) - missing} of {len(pooled)} responses; "
            "Evaluation/score_generations.py scores the rest"
        )
    column = f"{SCORE_COLUMN}{scorer}"
    return {column: prompts.mean(), f"{column}_standard_error": prompts.sem()}


def who_marked(runs: list[Run], method: str) -> str | None:
    """What the reward model of the table was to a method; "mixed" where runs differ, None where none says."""
    found = {role_of_evaluator(run, method) for run in runs}
    return found.pop() if len(found) == 1 else "mixed"


def role_of_evaluator(run: Run, method: str) -> str | None:
    record = run.methods.get(method)
    if record is None or record.evaluator is None:
        return None
    evaluator = locate_model(record.evaluator, run.directory)
    roles = {"its guide": record.method.guide, "its chooser": record.method.chooser}
    same = (role for role, name in roles.items() if name and locate_model(name, run.directory) == evaluator)
    return next(same, "another model")


def mean_cost(runs: list[Run], method: str) -> dict[str, float]:
    """The mean over the runs that know what a method cost; nothing where none does."""
    costs = pd.DataFrame([cost_of(run, method) for run in runs])
    return {str(name): mean for name, mean in costs.mean().items()}


def cost_of(run: Run, method: str) -> dict[str, float]:
    """Reward calls for a token and seconds for a prompt, of what the method's last launch wrote.

    Nothing where it wrote nothing, or where it chose among samples of an earlier launch as well: its cost has
    the calls and the time for those, but not their tokens.
    """
    record = run.methods.get(method)
    if record is None or not record.cost.responses:
        return {}
    cost, samples, tokens = record.cost, record.method.best_of, float(record.cost.tokens)
    if record.method.chooser:
        if cost.responses != samples * len(run.rewards):
            run.note(f"no cost of {method}: its last launch wrote other responses than these")
            return {}
        # Of what is delivered: discarded samples are part of its price, as they are of the seconds.
        delivered = run.responses.get(method)
        tokens = np.nan if delivered is None else delivered["num_tokens"].sum(skipna=False)
    return {
        "reward_calls_per_token": cost.reward_calls / tokens if tokens else np.nan,
        "seconds_per_prompt": cost.seconds * samples / cost.responses,
    }


def pooled_mean(values: dict[str, Values], method: str, label: str, notes: list[str]) -> float:
    """Mean over the prompts of all runs that have values; a value that could not be computed is left out."""
    of_runs = {name: found[method] for name, found in values.items() if method in found}
    if not of_runs:
        return np.nan
    pooled = pd.concat(of_runs, names=["run"]).replace([np.inf, -np.inf], np.nan)
    if missing := pooled.isna().sum():
        notes.append(f"{method}: {label}: no value for {missing} of {len(pooled)} responses")
    return per_prompt(pooled).mean()


def measure_texts(
    method: str, rows: pd.DataFrame, references: dict[str, dict[str, list[str]]], notes: list[str]
) -> dict[str, float]:
    """Length in tokens, diversity (within a run, averaged over runs) and overlap with the reference.

    `rows` is indexed by (run, prompt, copy). Copies repeat each other, so one of each counts for diversity.
    """
    first_copies = rows[~rows.index.droplevel("copy").duplicated()]
    texts = first_copies["result"].groupby(level="run", sort=False)
    measured = {
        "mean_tokens": per_prompt(rows["num_tokens"]).mean(),
        "distinct_1": texts.agg(lambda run: distinct_n(list(run), 1)).mean(),
        "distinct_2": texts.agg(lambda run: distinct_n(list(run), 2)).mean(),
    }

    targets = [references[run].get(prompt) for run, prompt, _ in rows.index]
    compared = rows[[target is not None for target in targets]]
    if len(compared):
        scores = rouge_l(list(compared["result"]), [target for target in targets if target is not None])
        measured["rouge_l"] = per_prompt(pd.Series(scores, index=compared.index)).mean()
        if len(compared) < len(rows):
            notes.append(f"{method}: no reference for {len(rows) - len(compared)} of {len(rows)} responses")
    return measured


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams over all n-grams of `texts` together (Li et al., 2016), in words; NaN for none.

    It falls as the texts get longer, so compare methods on the same prompts and mind their length.
    """
    ngrams = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        ngrams += zip(*(words[start:] for start in range(n)), strict=False)
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def rouge_l(responses: list[str], references: list[list[str]]) -> list[float]:
    """F1 of the longest common subsequence of stemmed words, against the best of each one's references."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(responses, references, strict=True)
    return [scorer.score_multi(targets, response)["rougeL"].fmeasure for response, targets in pairs]
