"""Log-likelihood and sampled KL of a run's responses, in nats; its records say how each was sampled."""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from run_files import Run, find_template, read_steps
from scipy.special import log_softmax

from pargs.files import DECODE
from pargs.runs import METHODS_FILE, Method, Step

LogProbs = tuple[np.ndarray, np.ndarray]  # of a response's tokens: under a policy, and under its top-k
Measure = Callable[[str, str], list[LogProbs]]  # of the responses of a method under a policy
Values = dict[str, pd.Series]  # per method, a number for each response, indexed by (prompt, copy)


class NoKL(Exception):
    """A method's KL cannot be had; the message says why."""


def measure_likelihood(run: Run, dataset: str, policy: str | None, batch_size: int) -> tuple[Values, Values]:
    """Log-likelihood per token under `policy`, where one is given, and the KL of every method that has one.

    Why a method has none is noted in the run, and where its ids were not to be had.
    """
    policy = policy and locate_model(policy)
    responses = {method: rows.dropna(subset="result") for method, rows in run.responses.items()}
    encoded_again: defaultdict[str, dict[str, None]] = defaultdict(dict)  # methods by reason, in order
    reasons: defaultdict[str, list[str]] = defaultdict(list)

    @cache
    def log_probs(model: str, method: str) -> list[LogProbs]:
        from policy_likelihood import measure_log_probs  # PyTorch is for those who ask for it

        rows, record = responses[method], run.methods.get(method)
        writer = record and locate_model(record.method.policy, run.directory)
        k = record.k if record else 1  # without a record there is no KL
        limit = record.max_new_tokens if record else int(rows["num_tokens"].max())
        label = f"{method} under {Path(model).name}"
        gap = record.candidate_gap if record else None
        template = find_template(run, [record], dataset)
        found, why = measure_log_probs(model, rows, template, writer, k, limit, batch_size, label, gap)
        if why:
            encoded_again[why][method] = None
        return found

    likelihood = {}
    for method, rows in responses.items() if policy else ():  # all under one policy before the next
        values = [log_p.mean() if len(log_p) else np.nan for log_p, _ in log_probs(policy, method)]
        likelihood[method] = pd.Series(values, rows.index)

    kl = {}
    for method, rows in responses.items():
        try:
            kl[method] = pd.Series(response_kl(run, method, rows.index, policy, log_probs), rows.index)
        except NoKL as reason:
            reasons[str(reason)].append(method)
    for reason, methods in encoded_again.items():
        run.note(f"{', '.join(methods)}: policies score the text, encoded again, for {reason}")
    for reason, methods in reasons.items():
        run.note(f"no KL for {', '.join(methods)}: {reason}")
    return likelihood, kl


def response_kl(run: Run, name: str, keys: pd.Index, policy: str | None, log_probs: Measure) -> list[float]:
    """log q - log p of each response of a method: q is the method, p the reference policy.

    A greedy method has all its mass on its response; a guided sample comes from the softmax of the scores in
    its trace, any other from the top k of its policy. p is `policy`, or, where the method decoded with the
    reference policy itself, what its trace says.

    Raises:
        NoKL: a model or a file that it takes is not there, or the method has no q.
    """
    if name not in run.methods:
        raise NoKL(f"{METHODS_FILE} does not say what it was; `{DECODE}` writes it")
    record, method = run.methods[name], run.methods[name].method
    if method.best_of > 1:
        raise NoKL("the best of several samples has no log-probability of its own")

    own_policy = locate_model(method.policy, run.directory)
    is_reference = own_policy == (policy or locate_model(record.reference_policy, run.directory))
    steps = read_steps(run, name) if method.guide else {}
    traced = [trace_log_probs(steps.get(key, []), method) for key in keys] if steps else []
    if traced and is_reference:
        return [log_q - log_p for log_p, log_q in traced]
    if method.guide and not method.greedy and not traced:
        raise NoKL("it takes the trace that `--trace` keeps in decoding")
    if policy is None:
        could_be_traced = bool(method.guide and is_reference)
        raise NoKL("it takes --policy" + ", or the trace that `--trace` keeps in decoding" * could_be_traced)

    if method.greedy:
        log_q = [0.0] * len(keys)
    elif method.guide:
        log_q = [of_method for _, of_method in traced]
    else:
        from policy_likelihood import is_here  # PyTorch is for those who ask for it

        if not is_here(own_policy):
            raise NoKL(f"its policy, {method.policy!r}, is not here")
        log_q = [of_top_k.sum() if len(of_top_k) else np.nan for _, of_top_k in log_probs(own_policy, name)]
    log_p = [each.sum() if len(each) else np.nan for each, _ in log_probs(policy, name)]
    return list(np.subtract(log_q, log_p))


def locate_model(name: str, directory: Path = Path()) -> str:
    """A model's folder, in its run's directory or else here; a name that is no folder is the hub's."""
    places = (directory / name, Path(name))
    return next((str(place.resolve()) for place in places if place.is_dir()), name)


def trace_log_probs(steps: list[Step], method: Method) -> tuple[float, float]:
    """Log-probability of a guided response under its policy, and under the method; NaN without its steps."""
    if not steps:
        return np.nan, np.nan
    of_policy = of_method = 0.0
    for step in steps:
        log_probs = np.array(step.log_probs, dtype=float)  # [k]; NaN for one that could not be chosen
        of_policy += log_probs[step.chosen]
        possible = ~np.isnan(log_probs)
        if not method.greedy and possible.sum() > 1:  # of one candidate the method is sure
            scores = log_probs + method.weight * np.array(step.rewards, dtype=float)
            of_method += log_softmax(np.where(possible, scores, -np.inf))[step.chosen]
    return of_policy, of_method
