"""What stands beside the reward, which alone can be gamed: length, diversity, overlap, likelihood, KL."""

import re

import numpy as np
import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from run_files import Run, read_references
from sampled_kl import Values, measure_likelihood
from statistics_table import per_prompt

from pargs.runs import REFERENCE


def measure_responses(
    runs: dict[str, Run], methods: list[str], dataset: str, policy: str | None, batch_size: int
) -> tuple[pd.DataFrame, list[str]]:
    """Everything beside the reward, a row per method, and what could not be had of pooled responses."""
    references = {name: read_references(run, dataset) for name, run in runs.items()}
    for name, run in runs.items():
        if not references[name]:
            run.note(f"no ROUGE-L, for the references in {dataset}/ are not there")
    found = [measure_likelihood(run, dataset, policy, batch_size) for run in runs.values()]
    likelihood, kl = (dict(zip(runs, values, strict=True)) for values in zip(*found, strict=True))

    measured, notes = {}, []
    for method in methods:
        responses = {name: run.responses[method] for name, run in runs.items() if method in run.responses}
        if method == REFERENCE or not responses:
            continue
        rows = pd.concat(responses, names=["run"]).dropna(subset="result")
        measured[method] = measure_texts(method, rows, references, notes)
        measured[method] |= {
            "log_likelihood_per_token": pooled_mean(likelihood, method, "log p", notes),
            "sampled_kl": pooled_mean(kl, method, "KL", notes),
        }
    return pd.DataFrame.from_dict(measured, orient="index").dropna(axis="columns", how="all"), notes


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
