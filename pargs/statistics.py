"""Intervals and tests that tables and figures share."""

import numpy as np
from scipy import stats


def bootstrap_interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan, np.nan
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // len(values)),  # at most 80 MB at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def proportion(count: int, total: int) -> dict:
    """count / total with its 95% Wilson interval (Wilson 1927); nulls where there is nothing to count."""
    if total == 0:
        return {"count": 0, "of": 0, "rate": None, "low": None, "high": None}
    interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {"count": count, "of": total, "rate": count / total, "low": interval.low, "high": interval.high}


def mcnemar(first_only: int, second_only: int) -> float:
    """p of McNemar's exact test: are two methods right equally often, by the cases where only one is?"""
    decided = first_only + second_only
    return float(stats.binomtest(first_only, decided).pvalue) if decided else 1.0
