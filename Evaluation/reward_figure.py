"""The figure of the average reward: means with their intervals, and the prompts behind them."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from statistics_table import per_prompt, run_means

from pargs.figures import EDGE, GREY, PALETTE, style_axes
from pargs.runs import REFERENCE


def draw_figure(rewards: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Left: every prompt's reward, with mean and interval. Right: the paired differences to the baseline.

    `rewards` is indexed by (run, prompt, copy), `summary` comes from `statistics_table.summarise`.
    """
    baseline = summary["baseline"].iloc[0]
    figure = Figure(figsize=(10, 1.5 + 0.5 * len(summary)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    jitter = np.random.default_rng(0)

    for at, (method, row) in enumerate(summary.iterrows()):
        colour = GREY if method == REFERENCE else PALETTE[at % len(PALETTE)]
        points = per_prompt(rewards[method])
        heights = at + jitter.uniform(-0.28, 0.28, len(points))
        left.scatter(points, heights, s=11, color=colour, alpha=0.28, linewidths=0)
        draw_mean(left, row["mean"], row["interval_low"], row["interval_high"], at, colour)

        if row["runs"] > 1:
            means = run_means(rewards[method])
            left.scatter(means, np.full(len(means), at + 0.38), s=22, marker="^", color=colour, linewidths=0)
        if method != baseline:
            draw_mean(right, row["difference"], row["difference_low"], row["difference_high"], at, colour)

    names = [fill(f"{name}  (n={n:.0f})", 28) for name, n in summary["n"].items()]
    left.set_yticks(range(len(summary)), names)
    left.set_ylim(len(summary) - 0.45, -0.55)  # the first method on top
    style_axes(left, "Average reward", "reward of the response", grid="x")
    style_axes(right, fill(f"Difference to {baseline}", 26), "difference of rewards, same prompts", grid="x")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="y", length=0)
    right.axvline(0, color="#444444", linewidth=1, zorder=1)

    legend = "● mean with 95% bootstrap interval      pale dots: one prompt each"
    legend += "      ▲ mean of one run" if (summary["runs"] > 1).any() else ""
    figure.supxlabel(legend, fontsize=8.5, color="#555555")
    return figure


def draw_mean(axes: Axes, mean: float, low: float, high: float, at: int, colour: str) -> None:
    """A dot and its interval, edged in white."""
    if np.isfinite([low, high]).all():
        axes.plot([low, high], [at, at], color="white", linewidth=5, solid_capstyle="round", zorder=3)
        axes.plot([low, high], [at, at], color=colour, linewidth=2.6, solid_capstyle="round", zorder=4)
    axes.plot([mean], [at], "o", color=colour, markersize=8, zorder=5, **EDGE)
