"""The statistics of the reward table, and the table as people read it."""

import re

import numpy as np
import pandas as pd

from pargs.statistics import bootstrap_interval

SCORE_COLUMN = "reward_by_"  # before the name of a further reward model
TEXT_COLUMNS = ("Method", "Scored by")  # of the table as people read it; the others hold numbers


def per_prompt(values: pd.Series) -> pd.Series:
    """Average a (run, prompt, copy) series over its runs and copies; missing values are left out.

    Prompts, not rows, are the sample: the same prompt decoded with three seeds, or three times in one run, is
    not three independent observations (a greedy method would repeat itself and look three times as certain).
    """
    return values.dropna().groupby(level="prompt", sort=False).mean()


def run_means(values: pd.Series) -> pd.Series:
    """The mean of each run over its prompts, of a (run, prompt, copy) series."""
    return values.groupby(level="run").agg(lambda of_run: per_prompt(of_run).mean()).dropna()


def count_folded(rewards: pd.DataFrame) -> int:
    """How many rows are further copies of a prompt that their run has already."""
    return int((rewards.index.get_level_values("copy") > 0).sum())


def summarise_method(rewards: pd.Series, resamples: int, seed: int) -> dict[str, float]:
    """n, mean, standard error (sample standard deviation / sqrt n), interval, and the spread of the runs."""
    prompts = per_prompt(rewards)
    low, high = bootstrap_interval(prompts.to_numpy(), resamples, seed)
    of_runs = run_means(rewards)
    return {
        "n": len(prompts),
        "runs": len(of_runs),
        "mean": prompts.mean(),
        "standard_error": prompts.sem(),
        "interval_low": low,
        "interval_high": high,
        "run_std": of_runs.std(ddof=1),
    }


def pair(rewards: pd.Series, baseline: pd.Series) -> pd.Series:
    """Differences within each run; where the two were not decoded in the same runs, of prompts' means."""
    of_rewards, of_baseline = (set(run_means(values).index) for values in (rewards, baseline))
    if of_rewards != of_baseline:
        rewards, baseline = per_prompt(rewards), per_prompt(baseline)
    return (rewards - baseline).dropna()


def compare_methods(rewards: pd.Series, baseline: pd.Series, resamples: int, seed: int) -> dict[str, float]:
    """Mean difference where both have a reward, its interval, and the win rate (a tie is half a win)."""
    difference = pair(rewards, baseline)
    prompts = per_prompt(difference)
    low, high = bootstrap_interval(prompts.to_numpy(), resamples, seed)
    wins = (difference > 0) + 0.5 * (difference == 0)
    return {
        "difference": prompts.mean(),
        "difference_low": low,
        "difference_high": high,
        "win_rate": per_prompt(wins).mean(),
    }


def summarise(rewards: pd.DataFrame, baseline: str, resamples: int, seed: int) -> pd.DataFrame:
    """One row of statistics per column of `rewards` (index: run, prompt, copy)."""
    rows = {}
    for method in rewards:
        rows[method] = summarise_method(rewards[method], resamples, seed)
        if method != baseline:
            rows[method] |= compare_methods(rewards[method], rewards[baseline], resamples, seed)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def readable_table(summary: pd.DataFrame) -> pd.DataFrame:
    """The table of `summarise` with one cell per idea; a column that nobody has a value for is left out."""
    baseline = summary["baseline"].iloc[0]
    shown = pd.DataFrame({"Method": summary.index}, index=summary.index)

    def show(column: str, template: str, *fields: str) -> None:
        values = summary.reindex(columns=fields)
        if values[fields[0]].notna().any():
            shown[column] = [
                "–" if pd.isna(row[0]) else show_numbers(template, row)
                for row in values.itertuples(index=False)
            ]

    show("n", "{:.0f}", "n")
    if (summary["runs"] > 1).any():
        show("Runs", "{:.0f}", "runs")
    show("Reward", "{:.3f} ± {:.3f}", "mean", "standard_error")
    show("95% interval", "[{:.3f}, {:.3f}]", "interval_low", "interval_high")
    show("SD of runs", "{:.3f}", "run_std")
    show("Scored by", "{}", "evaluator_was")
    for column in summary.columns[summary.columns.str.startswith(SCORE_COLUMN)]:
        if not column.endswith("_standard_error"):
            name = column.removeprefix(SCORE_COLUMN)
            show(f"Reward by {name}", "{:.3f} ± {:.3f}", column, f"{column}_standard_error")
    show(f"vs {baseline}", "{:+.3f} [{:+.3f}, {:+.3f}]", "difference", "difference_low", "difference_high")
    show("Wins", "{:.0%}", "win_rate")
    show("Tokens", "{:.1f}", "mean_tokens")
    show("Distinct-1/2", "{:.2f} / {:.2f}", "distinct_1", "distinct_2")
    show("ROUGE-L", "{:.3f}", "rouge_l")
    show("log p / token", "{:.2f}", "log_likelihood_per_token")
    show("KL", "{:.1f}", "sampled_kl")
    show("Reward calls / token", "{:.2f}", "reward_calls_per_token")
    show("Seconds / prompt", "{:.3g}", "seconds_per_prompt")
    return shown


def show_numbers(template: str, numbers: tuple) -> str:
    """A filled cell; of one prompt, whose spread is not known, the mean alone."""
    text = re.sub(r" (± nan|\[[+-]?nan, [+-]?nan\])$", "", template.format(*numbers))
    return text.replace("nan", "–")


def in_words(summary: pd.DataFrame) -> list[str]:
    """A sentence for each comparison with the baseline, which says no more than its interval allows."""
    baseline, lines = summary["baseline"].iloc[0], []
    for method, row in summary.drop(index=baseline).iterrows():
        gap, low, high = row["difference"], row["difference_low"], row["difference_high"]
        if np.isnan(low):
            lines.append(f"{method} and {baseline}: too few prompts to compare.")
        elif low <= 0 <= high:
            lines.append(
                f"{method} and {baseline} are not told apart by the reward: the difference is {gap:+.3f} "
                f"[{low:+.3f}, {high:+.3f}], which holds 0."
            )
        else:
            nearer, farther = sorted((abs(low), abs(high)))
            side = "above" if gap > 0 else "below"
            lines.append(
                f"{method} is {abs(gap):.3f} [{nearer:.3f}, {farther:.3f}] {side} {baseline} in reward."
            )
    return lines
