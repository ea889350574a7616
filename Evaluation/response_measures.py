"""What stands beside the reward, which alone can be gamed: length, diversity, overlap, likelihood, KL."""

import re

import numpy as np
import pandas as pd
from command_line import is_main
from rouge_score.rouge_scorer import RougeScorer
from run_files import REFERENCE, Run, find_dataset, read_references, read_template, read_trace
from scipy.special import log_softmax
from statistics_table import per_prompt

GREEDY = ("ARGS", "PARGS-G")


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


def pool_responses(runs: dict[str, Run], method: str) -> pd.DataFrame:
    """The responses of a method in all runs, indexed by (run, prompt, copy); those missing are left out."""
    responses = {name: run.responses[method] for name, run in runs.items() if method in run.responses}
    return pd.concat(responses, names=["run"]).dropna(subset="result") if responses else pd.DataFrame()


def mean_over(values: list[float], rows: pd.DataFrame, label: str, notes: list[str]) -> float:
    """Mean over prompts; a value that could not be computed is noted and left out."""
    series = pd.Series(values, index=rows.index, dtype=float).replace([np.inf, -np.inf], np.nan)
    if series.isna().any():
        notes.append(f"{label}: no value for {series.isna().sum()} of {len(series)} responses")
    return per_prompt(series).mean()


def measure_texts(
    method: str, rows: pd.DataFrame, references: dict[str, dict[str, list[str]]], notes: list[str]
) -> dict[str, float]:
    """Length in tokens, diversity (within a run, averaged over runs) and overlap with the reference."""
    texts = rows["result"].groupby(level="run", sort=False)
    measured = {
        "mean_tokens": mean_over(list(rows["num_tokens"]), rows, f"{method}: num_tokens", notes),
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


def measure_likelihood(
    responses: dict[str, pd.DataFrame],
    policy: str,
    own_policies: dict[str, str | None],
    templates: dict[str, str],
    k: int,
    batch_size: int,
    notes: list[str],
) -> dict[str, dict[str, float]]:
    """Log-likelihood per token under the reference policy, and the KL of what was sampled without a trace.

    TOP-K sampled from the top-k of the reference policy, a method of `own_policies` from the top-k of its
    own; a greedy method's distribution has all its mass on its response. `templates`: of each run's prompts.
    """
    # Imported here: PyTorch and a model are for those who ask for them.
    from policy_likelihood import encode_pair, load_policy, load_tokenizer, response_log_probs
    from processes import count_processes

    tokenizer = load_tokenizer(policy)
    pairs = {
        method: [
            encode_pair(
                tokenizer, row.Index[1], row.result, row.finish_reason != "length", templates[row.Index[0]]
            )
            for row in rows.itertuples()
        ]
        for method, rows in responses.items()
    }

    model = load_policy(policy)
    reference = {
        method: response_log_probs(model, pairs[method], k, batch_size, f"{method}: log p")
        for method in pairs
    }
    own = {"TOP-K": reference["TOP-K"]} if "TOP-K" in pairs else {}
    for method, name in own_policies.items():
        if name and method in pairs:
            model = load_policy(name)
            own[method] = response_log_probs(model, pairs[method], k, batch_size, f"{method}: its own log p")

    measured = {}
    for method, rows in responses.items():
        log_probs = [under_policy for under_policy, _ in reference[method]]
        per_token = [each.mean() if len(each) else np.nan for each in log_probs]
        measured[method] = {"log_likelihood_per_token": mean_over(per_token, rows, f"{method}: log p", notes)}

        if method in GREEDY:
            log_q = [0.0] * len(rows)
        elif method in own:
            log_q = [within_top_k.sum() for _, within_top_k in own[method]]
        else:
            continue
        kl = [q - each.sum() if len(each) else np.nan for q, each in zip(log_q, log_probs, strict=True)]
        measured[method]["sampled_kl"] = mean_over(kl, rows, f"{method}: KL", notes)

    if is_main():
        print(f"likelihood of {sum(map(len, pairs.values()))} responses, {count_processes()}\n")
    return measured


def guided_kl(steps: list[dict], weight: float | None) -> float:
    """Sampled KL to the reference policy of one guided response, in nats, from its trace.

    With a weight the method sampled from q = softmax(log pi + w r) over the candidates: the sum over steps
    of log q - log pi of the chosen token. With None it chose greedily, which is a distribution with all its
    mass on one response: the sum of - log pi. NaN where a step lacks a number.
    """
    total = 0.0
    for step in steps:
        log_probs = np.array(step["log_probs"], dtype=float)  # [k]
        own = 0.0
        if weight is not None:
            own = log_softmax(log_probs + weight * np.array(step["rewards"], dtype=float))[step["chosen"]]
        total += own - log_probs[step["chosen"]]
    return total if steps else float("nan")


def measure_traces(
    runs: dict[str, Run], responses: dict[str, pd.DataFrame], pargs_weight: float, notes: list[str]
) -> dict[str, float]:
    """Sampled KL of the guided methods whose traces are there."""
    measured = {}
    for method in (*GREEDY, "PARGS"):
        traces = {name: read_trace(run.directory, method) for name, run in runs.items()}
        if method in responses and any(traces.values()):
            rows, weight = responses[method], None if method in GREEDY else pargs_weight
            kl = [guided_kl(traces[run].get((prompt, copy), []), weight) for run, prompt, copy in rows.index]
            measured[method] = mean_over(kl, rows, f"{method}: KL from the trace", notes)
    return measured


def measure_responses(
    runs: dict[str, Run],
    methods: list[str],
    dataset: str,
    policy: str | None,
    own_policies: dict[str, str | None],
    k: int,
    pargs_weight: float,
    batch_size: int,
) -> tuple[pd.DataFrame, list[str]]:
    """Everything beside the reward, a row per method, and what could not be had."""
    responses = {method: pool_responses(runs, method) for method in methods if method != REFERENCE}
    responses = {method: rows for method, rows in responses.items() if len(rows)}
    references = {name: read_references(run.directory, dataset) for name, run in runs.items()}
    without = [name for name, found in references.items() if not found]
    notes = [f"{name}: no ROUGE-L, for the references in {dataset}/ are not there" for name in without]

    measured = {method: measure_texts(method, rows, references, notes) for method, rows in responses.items()}
    if policy and responses:
        templates = {name: read_template(find_dataset(run.directory, dataset)) for name, run in runs.items()}
        likelihood = measure_likelihood(responses, policy, own_policies, templates, k, batch_size, notes)
        measured = {method: values | likelihood[method] for method, values in measured.items()}
    for method, kl in measure_traces(runs, responses, pargs_weight, notes).items():
        measured[method]["sampled_kl"] = kl

    without_kl = [method for method in measured if "sampled_kl" not in measured[method]]
    if without_kl and len(without_kl) < len(measured):
        notes.append(f"no KL for {', '.join(without_kl)}: see --help for what each needs")
    return pd.DataFrame.from_dict(measured, orient="index"), notes
