"""The two figures of the rewards of prefixes: ranking accuracy, and single responses token by token."""

from textwrap import shorten

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from reward_reading import Pair

from pargs.figures import EDGE, GREY, PALETTE, style_axes
from pargs.models import RewardModel
from pargs.prefixes import EncodedResponse
from pargs.runs import GuideEos

MODELS = {"full": PALETTE[0], "partial": PALETTE[2]}
READINGS: dict[GuideEos, str] = {
    "finished": "",
    "always": ", EOS behind every prefix",
    "never": ", no EOS",
}
SIDE_COLOURS = {"chosen": "#3a9d78", "rejected": "#c8553d"}
READABLE = 32  # tokens whose words still fit along an axis
PROMPT_CHARACTERS = 170


def name_models(readings: dict[str, GuideEos]) -> dict[str, str]:
    """What each model is called, from where it reads an EOS."""
    return {label: f"{label} reward model{READINGS[eos]}" for label, eos in readings.items()}


def draw_accuracy(
    accuracy: pd.DataFrame, paired: pd.DataFrame, num_pairs: int, names: dict[str, str]
) -> Figure:
    """Above: accuracy with its interval against the part of the response seen, a line per model.
    Below: how much more often the partial model is right on the pairs that both rank.

    `accuracy` has a row per `model` and `percent`, `paired` a row per `percent`, as in the .csv files.
    """
    figure = Figure(figsize=(7.2, 5.8), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    axes.axhline(0.5, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate("coin toss", (101, 0.5), (0, 3), textcoords="offset points", ha="right", color="#555555")

    for (label, rows), shift in zip(accuracy.groupby("model"), (-0.6, 0.6), strict=True):
        rows = rows.dropna(subset="accuracy")
        at, colour = rows["percent"] + shift, MODELS[label]  # beside each other, so that both can be read
        axes.vlines(
            at, rows["interval_low"], rows["interval_high"], color=colour, alpha=0.45, linewidth=2.6, zorder=2
        )
        axes.plot(at, rows["accuracy"], "o-", color=colour, markersize=8, linewidth=1.6, **EDGE, zorder=3)

    style_axes(axes, "Ranking accuracy on prefixes of held-out pairs", pad=28)
    axes.set_ylabel("chosen prefix scores\nabove the rejected one")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    draw_differences(below, paired)

    handles = [Line2D([], [], color=colour, marker="o", linewidth=1.6) for colour in MODELS.values()]
    # Between title and axes, where no interval can reach.
    axes.legend(
        handles,
        [names[label] for label in MODELS],
        frameon=False,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
    )
    counts = accuracy.loc[accuracy["n"] > 0, "n"]
    span = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    caption = (
        f"{span} of {num_pairs} pairs count: those whose prefixes differ\n"
        "bars: 95% interval, by Wilson above, by bootstrap over pairs below"
    )
    figure.supxlabel(caption, fontsize=8.5, color="#555555")
    return figure


def draw_differences(axes: Axes, paired: pd.DataFrame) -> None:
    """The paired difference at each percentage with its interval, around a line where there is none."""
    rows = paired.dropna(subset="difference")
    axes.axhline(0, color="#444444", linewidth=1, zorder=1)
    bounds = rows["interval_low"], rows["interval_high"]
    axes.vlines(rows["percent"], *bounds, color=GREY, alpha=0.6, linewidth=2.6, zorder=2)
    axes.plot(rows["percent"], rows["difference"], "o", color=GREY, markersize=7, **EDGE, zorder=3)

    style_axes(axes, "", "part of the response seen")
    axes.set_ylabel("partial − full,\nsame pairs")
    axes.set_xticks(paired["percent"])
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}".replace("-", "−") if value else "0%")


def draw_token_rewards(
    examples: list[dict[str, Pair]],
    curves: dict[str, list[dict[str, list[float]]]],
    reward_models: dict[str, RewardModel],
    names: dict[str, str],
) -> Figure:
    """A row per example, a column per model: the reward after each token of both responses.

    The scale is the same all down a column, as rewards of one model compare.
    `curves[model][example][side]` holds a reward for each token of that response.
    """
    figure = Figure(figsize=(12, 0.9 + 3.1 * len(examples)), layout="constrained")
    title = "Reward after each token of a held-out pair"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
    parts = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]

    for at, (part, pair) in enumerate(zip(parts, examples, strict=True)):
        heading = shorten(pair["full"].prompt, PROMPT_CHARACTERS, placeholder=" …")
        part.suptitle(heading, x=0.01, ha="left", fontsize=9, color="#555555", parse_math=False)
        for axes, (label, reward_model) in zip(part.subplots(1, 2), reward_models.items(), strict=True):
            style_axes(axes, names[label][0].upper() + names[label][1:] if at == 0 else "")
            draw_curves(axes, pair[label], curves[label][at], reward_model)
            axes.set_ylabel("reward")
            axes.set_ylim(*reward_range(curves[label]))

    handles = [Line2D([], [], color=colour, marker="o", linewidth=1.6) for colour in SIDE_COLOURS.values()]
    figure.legend(
        handles, [f"{side} response" for side in SIDE_COLOURS], frameon=False, loc="upper right", ncols=2
    )
    return figure


def reward_range(curves: list[dict[str, list[float]]]) -> tuple[float, float]:
    """What holds all rewards of one model, with a margin."""
    rewards = [reward for example in curves for side in example.values() for reward in side]
    margin = 0.08 * (max(rewards) - min(rewards)) or 1.0
    return min(rewards) - margin, max(rewards) + margin


def draw_curves(axes: Axes, pair: Pair, curves: dict[str, list[float]], reward_model: RewardModel) -> None:
    """Both responses over their tokens; the words of the chosen one above, of the rejected one below."""
    for side, colour in SIDE_COLOURS.items():
        rewards = curves[side]
        axes.plot(range(1, len(rewards) + 1), rewards, "o-", color=colour, markersize=3.5, linewidth=1.6)
        axes.plot(
            [len(rewards)], rewards[-1:], "o", color=colour, markersize=8, markeredgecolor="white", zorder=4
        )

    axes.set_xlim(0.4, pair.longest + 0.6)
    if pair.longest > READABLE:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("tokens of the response")
        return

    above = axes.secondary_xaxis("top")
    for axis, side in ((above, "chosen"), (axes, "rejected")):
        labels = words(reward_model, pair.sides[side])
        axis.set_xticks(range(1, len(labels) + 1), labels, fontsize=7.5, color=SIDE_COLOURS[side])
        for tick in axis.get_xticklabels():
            tick.set(rotation=60, rotation_mode="anchor", ha="left" if axis is above else "right")
            tick.set_parse_math(False)  # a $ is a dollar
        axis.tick_params(axis="x", length=0)
    above.spines["top"].set_visible(False)


def words(reward_model: RewardModel, response: EncodedResponse) -> list[str]:
    """Each token as text."""
    tokenizer = reward_model.tokenizer
    texts = [text.strip() for text in tokenizer.batch_decode([[token] for token in response.ids])]
    ends = reward_model.causal and response.ids[-1] == tokenizer.eos_token_id
    return [*texts[:-1], "(end)"] if ends else texts
