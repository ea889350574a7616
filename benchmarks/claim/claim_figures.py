"""Tables and figures of docs/claim.md from the results of the study.

A mean is over prompts and seeds. Its interval is the 95% percentile bootstrap over prompts, of each prompt's
mean over seeds; how far training seeds lie apart is shown beside it. Arms are compared prompt by prompt.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arms import NUM_PAIRS, PERCENTAGES, SEEDS, make_settings
from candidates import ENDING, GOING_ON, NEAR
from datasets import load_from_disk
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from prompts import load_prompts
from quality import WEIGHTS, true_quality
from true_quality import facts_of_prompts, read_facts

from pargs.figures import EDGE, save_figure, style_axes
from pargs.files import write_text
from pargs.prefixes import SIDES
from pargs.statistics import bootstrap_interval, mcnemar

RESAMPLES = 9999
CLEAR = 0.1  # of true quality: differences below are mostly the noise of the rollouts
READING_ORDER = ("full open", "full closed", "full bare", "last", "partial", "partial from full")
COLOURS = {
    "full open": "#c8553d",
    "full closed": "#d98b2b",
    "full bare": "#b0a03a",
    "last": "#9a6fb0",
    "partial": "#1f5fa8",
    "partial from full": "#3f8fd2",
    "full": "#c8553d",
    "partial few": "#2aa0a4",
    "best of n by full": "#3a9d78",
    "best of n by partial": "#7a5c3e",
}
NAMES = {
    "full open": "full, as trained: an EOS behind finished text alone",
    "full closed": "full, asked with an EOS behind every prefix",
    "full bare": "full, no EOS even behind finished text",
    "last": "full, trained and asked without EOS",
    "partial": "partial, from the policy",
    "partial from full": "partial, from the full model",
    "best of n by full": "best of n, n = 1 to 32, by the full model",
}


# Reading what the pieces wrote


def read_results(out: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob(f"results/{pattern}")) for row in json.loads(path.read_text())]


def read_arms(out: Path) -> pd.DataFrame:
    """A row per arm and prompt."""
    tables = []
    for kind in ("causal", "encoder"):
        for row in read_results(out, f"{kind}-*.json"):
            table = pd.DataFrame({name: row[name] for name in ("quality", "reward", "own", "tokens", "eos")})
            table["kl"] = np.subtract(row["log_q"], row["log_p"])
            table["prompt"] = range(len(table))
            for name in ("label", "weight", "k", "greedy", "training_seed", "sampling_seed"):
                table[name] = row[name]
            folder = Path(row["guide"]).name.rpartition("-s")[0]
            pairs = folder.rpartition("-")[2]
            table["pairs"] = int(pairs) if pairs.isdigit() else 4000
            table["kind"] = kind
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def read_unguided(out: Path) -> pd.DataFrame:
    """Greedy decoding and, of the top-k samples, the first of each prompt: a row per arm and prompt."""
    tables = []
    for row in read_results(out, "unguided.json"):
        table = pd.DataFrame(
            {name: row[name] for name in ("quality", "reward", "causal_reward", "tokens", "eos")}
        )
        table["kl"] = np.subtract(row["log_q"], row["log_p"])
        table = table.iloc[:: row["samples"]].reset_index(drop=True)
        tables.append(
            table.assign(label=row["label"], sampling_seed=row["sampling_seed"], prompt=table.index)
        )
    return pd.concat(tables, ignore_index=True)


def read_best(out: Path, kind: str) -> pd.DataFrame:
    """The best of n samples: a row per chooser, n, seeds and prompt."""
    tables = []
    for row in read_results(out, f"best-{kind}-*.json"):
        names = ("quality", "reward", "causal_reward", "own", "tokens", "eos")
        table = pd.DataFrame({name: row[name] for name in names})
        if kind == "encoder":
            table["reward"] = table["causal_reward"]  # as for all whose guide is an encoder
        table["kl_of_samples"] = np.subtract(row["log_q"], row["log_p"])
        for name in ("label", "n", "training_seed", "sampling_seed"):
            table[name] = row[name]
        tables.append(table.assign(prompt=table.index))
    return pd.concat(tables, ignore_index=True)


# Statistics


def by_prompt(rows: pd.DataFrame, value: str) -> pd.Series:
    """Each prompt's mean over seeds."""
    return rows.groupby("prompt")[value].mean()


def describe(rows: pd.DataFrame, value: str) -> dict[str, float]:
    """Mean, interval over prompts, and the means of the training seeds that lie furthest apart."""
    of_prompts = by_prompt(rows, value)
    low, high = bootstrap_interval(of_prompts.to_numpy(), RESAMPLES, 0)
    described = {value: of_prompts.mean(), f"{value}_low": low, f"{value}_high": high}
    if "training_seed" in rows:
        of_seeds = rows.groupby("training_seed")[value].mean()
        described |= {f"{value}_seed_min": of_seeds.min(), f"{value}_seed_max": of_seeds.max()}
    return described


def compare(first: pd.DataFrame, second: pd.DataFrame, value: str) -> dict[str, float]:
    """The paired difference first - second: mean, interval over prompts, and that of each training seed.

    What has no training seed (no guide) stands beside every seed.
    """
    differences = (by_prompt(first, value) - by_prompt(second, value)).dropna()
    low, high = bootstrap_interval(differences.to_numpy(), RESAMPLES, 0)
    found = {"difference": differences.mean(), "low": low, "high": high, "prompts": len(differences)}
    for seed in SEEDS:
        of_seed = [of_training_seed(rows, seed) for rows in (first, second)]
        if all(len(rows) for rows in of_seed):
            found[f"seed_{seed}"] = (by_prompt(of_seed[0], value) - by_prompt(of_seed[1], value)).mean()
    return found


def of_training_seed(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    return rows[rows["training_seed"].isin([seed, 0])] if "training_seed" in rows else rows


def by_weight(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per weight: means and intervals of quality, reward, own reward and KL."""
    table = []
    for weight, own in rows.groupby("weight"):
        row = {"weight": weight}
        for value in ("quality", "reward", "own", "kl"):
            row |= describe(own, value)
        table.append(row | {"tokens": own["tokens"].mean(), "eos": own["eos"].mean()})
    return pd.DataFrame(table)


# 1. Ranking prefixes


def rank_table(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each guide at each tenth; and the paired comparisons, seed by seed and over all."""
    percentages = list(PERCENTAGES)
    right: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for row in read_results(out, "prefixes-*.json"):
        key = ("decoder-only" if row["causal"] else "encoder", row["label"])
        right.setdefault(key, []).append(pd.DataFrame(row["right"], columns=percentages).astype(float))

    accuracy = []
    for (kind, label), seeds in right.items():
        mean = pd.concat(seeds).groupby(level=0).mean()  # [pairs, percentages]; NaN: both prefixes the same
        for percent in percentages:
            values = mean[percent].dropna().to_numpy()
            low, high = bootstrap_interval(values, RESAMPLES, 0)
            of_seeds = [seed[percent].mean() for seed in seeds]
            row = {"kind": kind, "label": label, "percent": percent, "pairs": len(values)}
            row |= {"accuracy": values.mean(), "low": low, "high": high}
            unfinished = mean[percent][is_cut(out, kind, percent)].dropna()
            row |= {"cut_pairs": len(unfinished), "cut_accuracy": unfinished.mean()}
            accuracy.append(row | {"seed_min": min(of_seeds), "seed_max": max(of_seeds)})

    paired = []
    for kind, first, second in (
        ("decoder-only", "partial", "full open"),
        ("decoder-only", "partial", "full closed"),
        ("decoder-only", "full closed", "full open"),
        ("decoder-only", "partial from full", "partial"),
        ("encoder", "partial", "full"),
        ("encoder", "partial few", "partial"),
    ):
        for percent in percentages:
            pairs = list(zip(right[kind, first], right[kind, second], strict=True))
            gains = [(one[percent] - other[percent]).dropna() for one, other in pairs]
            mean = pd.concat(gains).groupby(level=0).mean().to_numpy()
            low, high = bootstrap_interval(mean, RESAMPLES, 0)
            tests = [mcnemar(int((gain < 0).sum()), int((gain > 0).sum())) for gain in gains]
            row = {"kind": kind, "first": first, "second": second, "percent": percent, "pairs": len(mean)}
            row |= {"difference": mean.mean(), "low": low, "high": high}
            paired.append(row | {f"p_seed_{seed}": p for seed, p in enumerate(tests, 1)})
    return pd.DataFrame(accuracy), pd.DataFrame(paired)


@cache
def is_cut(out: Path, kind: str, percent: int) -> np.ndarray:
    """Of each held-out pair, whether both prefixes are unfinished at that part of the longer one."""
    folder = f"causal-{NUM_PAIRS[-1]}" if kind == "decoder-only" else "encoder-full"
    pairs: Any = load_from_disk(str(out / "data" / folder / "pairs"))["validation"]
    lengths = np.array([[len(ids) for ids in pairs[f"{side}_ids"]] for side in SIDES])  # [2, pairs]
    return -(-percent * lengths.max(0) // 100) < lengths.min(0)


def draw_ranking(accuracy: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = {
        "decoder-only": {label: NAMES[label] for label in ("full open", "full closed", "partial")},
        "encoder": {
            "full": "full",
            "partial": "partial, all lengths of 300 comparisons",
            "partial few": "partial, 4 lengths of more, at equal cost",
        },
    }
    accuracy = accuracy.rename(columns={"low": "accuracy_low", "high": "accuracy_high"})
    for axes, (kind, labels) in zip(panels, shown.items(), strict=True):
        title = "Decoder-only" if kind == "decoder-only" else "Encoder, always asked as if finished"
        draw_readings(axes, accuracy[accuracy["kind"] == kind], "accuracy", labels, title)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    panels[0].set_ylim(0.38, 0.82)  # room for the legends
    panels[0].set_ylabel("chosen prefix scores above the rejected one")
    note = "held-out pairs whose prefixes differ; mean of 3 training seeds; bars: 95% bootstrap over pairs"
    figure.supxlabel(note, fontsize=8.5, color="#555555")
    return figure


def draw_readings(axes: Axes, accuracy: pd.DataFrame, value: str, names: dict[str, str], title: str) -> None:
    """How well each of `names` (label: what it is called) ranks prefixes, against the part seen."""
    for at, (label, name) in enumerate(names.items()):
        rows = accuracy[accuracy["label"] == label]
        beside = rows["percent"] + 0.9 * (at - 1)  # so that no interval hides another
        draw_curve(axes, beside, rows, value, COLOURS[label], "o-", name)
    axes.axhline(0.5, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
    style_axes(axes, title, "part of the response seen")
    axes.set_xticks(range(20, 101, 20), [f"{percent}%" for percent in range(20, 101, 20)])
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


# 2. The frontier


def draw_frontier(arms: pd.DataFrame, unguided: pd.DataFrame, best: pd.DataFrame) -> Figure:
    """Reward and true quality against KL; along a curve the weight, or n, grows."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    causal = arms[(arms["kind"] == "causal") & (arms["k"] == 10) & (arms["pairs"] == 4000)]
    for axes, value in ((left, "reward"), (right, "quality")):
        axes.set_xscale("log")
        for label in ("full open", "full closed", "last", "partial", "partial from full"):
            method = "PARGS-G" if "partial" in label else "ARGS"
            rows = by_weight(causal[(causal["label"] == label) & causal["greedy"]])
            draw_curve(axes, rows["kl"], rows, value, COLOURS[label], "o-", f"{method}: {NAMES[label]}")
        for label in ("full open", "full closed", "partial"):
            method = "PARGS" if "partial" in label else "ARGS"
            rows = by_weight(causal[(causal["label"] == label) & ~causal["greedy"]])
            draw_curve(
                axes, rows["kl"], rows, value, COLOURS[label], "s--", f"{method}, sampled: {NAMES[label]}"
            )

        rows = pd.DataFrame(
            [
                {"n": n, "kl": best_of_n_bound(own, n)} | describe(own, value)
                for n, own in best[best["label"] == "best of n by full"].groupby("n")
            ]
        )
        draw_curve(
            axes, rows["kl"], rows, value, COLOURS["best of n by full"], "^:", NAMES["best of n by full"]
        )
        for label, marker in (("greedy", "*"), ("top-k", "D")):
            rows = unguided[unguided["label"] == label]
            at = rows["kl"].mean(), rows[value].mean()
            axes.plot(*at, marker, color="#222222", markersize=9, zorder=6)
            offset = {"xytext": (7, -12), "textcoords": "offset points"}
            axes.annotate(f"{label}, no reward", at, fontsize=8, **offset)
        axes.xaxis.set_major_formatter(lambda nats, _: f"{nats:g}")
        title = "Reward by an encoder that guided nobody" if value == "reward" else "True quality"
        style_axes(axes, title, "KL from the summariser, nats a response")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8.5, loc="outside lower center", ncols=2)
    return figure


def best_of_n_bound(rows: pd.DataFrame, n: int) -> float:
    """An upper bound of the KL of best-of-n from the policy, in nats.

    KL(best || policy) = KL(best || samples) + E_best[log samples / policy]: the first term is at most
    log n - (n - 1) / n (Beirami et al., 2024, arXiv:2401.01879), the second is measured.
    """
    return float(np.log(n) - (n - 1) / n + rows["kl_of_samples"].mean())


def draw_curve(
    axes: Axes, x: pd.Series, rows: pd.DataFrame, value: str, colour: str, line: str, label: str
) -> None:
    axes.vlines(x, rows[f"{value}_low"], rows[f"{value}_high"], color=colour, alpha=0.35, linewidth=2)
    axes.plot(x, rows[value], line, color=colour, linewidth=1.5, markersize=6, label=label, **EDGE)
    if value == "quality":
        last = f"w = {rows['weight'].max():g}" if "weight" in rows else f"n = {rows['n'].max()}"
        where = (x.iloc[-1], rows[value].iloc[-1])
        axes.annotate(last, where, (6, 3), textcoords="offset points", fontsize=7.5, color=colour)


# 3. Whose reward is hacked


def draw_hacking(arms: pd.DataFrame) -> Figure:
    """Above the guide's own reward, below the true quality, as the weight grows; a column a reading.

    Where the first rises while the second falls, the guide's reward is hacked.
    """
    labels = READING_ORDER
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    panels = figure.subplots(2, len(labels), sharex=True, sharey="row")
    causal = arms[(arms["kind"] == "causal") & (arms["k"] == 10) & (arms["pairs"] == 4000) & arms["greedy"]]
    for column, label in enumerate(labels):
        rows = causal[causal["label"] == label]
        for axes, value in zip(panels[:, column], ("own", "quality"), strict=True):
            for _, of_seed in rows.groupby("training_seed"):
                means = of_seed.groupby("weight")[value].mean()
                axes.plot(means.index, means, "-", color=COLOURS[label], alpha=0.35, linewidth=1.2)
            table = by_weight(rows)
            draw_curve(axes, table["weight"], table, value, COLOURS[label], "o-", label)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda weight, _: f"{weight:g}")
            style_axes(axes, label if value == "own" else "", "" if value == "own" else "weight w")
    panels[0, 0].set_ylabel("the guide's own reward")
    panels[1, 0].set_ylabel("true quality")
    note = "thick: mean of 3 training seeds, 95% bootstrap over prompts; thin: one seed each"
    figure.supxlabel(note, fontsize=8.5, color="#555555")
    return figure


# 4. Candidates


def judge_pairs(found: dict[str, Any]) -> pd.DataFrame:
    """How each guide does on pairs of candidates of one step: a row per guide, seed, weight and post.

    Pairs count whose candidates are both within NEAR nats of the most probable one, and whose values are at
    least CLEAR apart. A guide is asked alone (weight inf), and as decoding asks it, by log pi + w * reward.
    """
    values, log_probs = np.array(found["values"]), np.array(found["log_probs"])  # both [states, k]
    first, second = np.triu_indices(values.shape[1], 1)
    gaps = values[:, first] - values[:, second]  # [states, pairs of candidates]
    near = log_probs > log_probs[:, :1] - NEAR
    counts = near[:, first] & near[:, second] & (np.abs(gaps) >= CLEAR)

    asked = {("log pi", "0", 0.0): log_probs}
    for label, seeds in found["rewards"].items():
        for seed, rewards in seeds.items():
            asked[label, seed, np.inf] = np.array(rewards)
            for weight in (1.0, 2.0, 4.0):
                asked[label, seed, weight] = log_probs + weight * np.array(rewards)

    tables = []
    for (label, seed, weight), scores in asked.items():
        right = np.sign(scores[:, first] - scores[:, second]) == np.sign(gaps)
        table = pd.DataFrame(
            {"prompt": found["post"], "right": (right & counts).sum(1), "pairs": counts.sum(1)}
        )
        table = table.groupby("prompt", as_index=False).sum()
        table = table[table["pairs"] > 0].assign(label=label, training_seed=int(seed), weight=weight)
        tables.append(table.assign(right=table["right"] / table["pairs"]))
    return pd.concat(tables, ignore_index=True)


def candidate_table(out: Path) -> pd.DataFrame:
    """For each guide and weight: how well near candidates of one step are told apart, beside the closed full
    model; and how far apart the guide puts them."""
    found = read_states(out, "candidates")
    pairs, log_probs = judge_pairs(found), np.array(found["log_probs"])
    several = (log_probs > log_probs[:, :1] - NEAR) & ~np.array(found["ends"])
    several &= several.sum(1, keepdims=True) > 1

    table = []
    for (label, weight), rows in pairs.groupby(["label", "weight"], sort=False):
        row = {"label": label, "weight": weight, "posts": rows["prompt"].nunique()} | describe(rows, "right")
        if label != "log pi":
            of_seeds = [np.array(rewards) for rewards in found["rewards"][label].values()]
            spreads = [np.where(several, rewards, np.nan)[several.any(1)] for rewards in of_seeds]
            row["spread"] = np.mean([np.nanstd(spread, axis=1).mean() for spread in spreads])
            closed = pairs[(pairs["label"] == "full closed") & (pairs["weight"] == weight)]
            versus = compare(rows, closed, "right")
            row |= {f"minus_closed_{name}": versus[name] for name in ("difference", "low", "high")}
        table.append(row)
    return pd.DataFrame(table)


def joint_table(out: Path) -> pd.DataFrame:
    """Where a summary can go on or come to an end, for each guide: by how much its reward of going on lies
    above that of ending; first the same of log pi and of the value."""
    found = read_states(out, "joints")
    words = np.char.strip(np.array(found["candidates"]))  # [states, k]
    log_probs = np.array(found["log_probs"])
    near = log_probs > log_probs[:, :1] - NEAR
    on = near & np.isin(words, GOING_ON)
    end = near & (np.isin(words, ENDING) | np.array(found["ends"]))

    guides = {("log pi", 0): log_probs, ("value", 0): np.array(found["values"])}
    for label, seeds in found["rewards"].items():
        guides |= {(label, int(seed)): np.array(rewards) for seed, rewards in seeds.items()}
    tables = []
    for (label, seed), scores in guides.items():
        means = [np.where(which, scores, 0).sum(1) / which.sum(1) for which in (on, end)]
        table = pd.DataFrame({"prompt": found["post"], "going_on": means[0] - means[1]})
        tables.append(table.assign(label=label, training_seed=seed))
    rows = pd.concat(tables)
    return pd.DataFrame(
        [
            {"label": label, "states": len(on), "posts": own["prompt"].nunique()} | describe(own, "going_on")
            for label, own in rows.groupby("label", sort=False)
        ]
    )


def read_states(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"results/{name}.json").read_text())


def draw_joints(table: pd.DataFrame) -> Figure:
    """What each guide says of going on where a summary could end, with intervals and ranges of seeds."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = table.set_index("label").loc[list(READING_ORDER)]
    for at, (label, row) in enumerate(rows.iterrows()):
        colour = COLOURS[str(label)]
        axes.plot([row["going_on_seed_min"], row["going_on_seed_max"]], [at, at], color=colour, alpha=0.35)
        axes.plot([row["going_on_low"], row["going_on_high"]], [at, at], color=colour, linewidth=3)
        axes.plot(row["going_on"], at, "o", color=colour, markersize=9, **EDGE)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(rows)), [NAMES[str(label)] for label in rows.index])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    style_axes(axes, "Where a summary could end", "reward of going on, above that of ending", grid="x")
    figure.supxlabel("thick: 95% bootstrap over posts; thin: range of 3 seeds", fontsize=8.5, color="#555555")
    return figure


def quality_table(out: Path) -> pd.DataFrame:
    """What the true quality of greedy decoding is made of, for each guide at w = 1."""
    data = out / "data"
    prompts, *_ = load_prompts(make_settings(data).dataset, None, 0, 0)
    facts = facts_of_prompts(read_facts(data / "demo_facts.json"), prompts)
    texts = {"greedy, no reward": [read_results(out, "unguided.json")[0]["text"]]}
    for row in read_results(out, "causal-greedy-*.json"):
        if row["weight"] == 1:
            texts.setdefault(row["label"], []).append(row["text"])
    table = []
    for label, runs in texts.items():
        parts = [true_quality(text, known) for run in runs for text, known in zip(run, facts, strict=True)]
        table.append({"label": label} | pd.DataFrame(parts)[[*WEIGHTS, "total"]].mean().to_dict())
    return pd.DataFrame(table)


def draw_candidates(out: Path, arms: pd.DataFrame) -> Figure:
    """True quality of guided decoding against two things that a guide is asked; a dot per guide and seed."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    full_size = (arms["kind"] == "causal") & (arms["k"] == 10) & (arms["pairs"] == 4000)
    greedy = arms[full_size & arms["greedy"] & (arms["weight"] == 1)]
    quality = greedy.groupby(["label", "training_seed"])["quality"].mean()
    ranking = read_ranking(out)
    pairs = judge_pairs(read_states(out, "candidates"))
    telling = pairs[pairs["weight"] == np.inf].groupby(["label", "training_seed"])["right"].mean()

    for label in READING_ORDER:
        own = quality[label]
        left.plot(ranking[label].reindex(own.index), own, "o", color=COLOURS[label], markersize=9, **EDGE)
        right.plot(
            telling[label].reindex(own.index),
            own,
            "o",
            color=COLOURS[label],
            markersize=9,
            label=NAMES[label],
            **EDGE,
        )
    style_axes(left, "Ranks prefixes of two summaries", "right, mean over 10% to 90% of the response")
    style_axes(right, "Tells candidates of one step apart", "right, near candidates of different value")
    left.set_ylabel("true quality of greedy decoding, w = 1")
    for axes in (left, right):
        axes.axvline(0.5, color="#444444", linewidth=1, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(
        *right.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower center", ncols=2
    )
    return figure


def read_ranking(out: Path) -> pd.Series:
    """Each decoder-only guide's ranking accuracy, mean over the prefixes that are not whole, by seed."""
    rows = {}
    for row in read_results(out, "prefixes-causal-*.json"):
        right = pd.DataFrame(row["right"]).iloc[:, :-1].astype(float)
        rows[row["label"], row["training_seed"]] = right.mean().mean()
    return pd.Series(rows)


def draw_example(example: dict[str, Any]) -> Figure:
    """What each guide said along the response that the full model guided; below, what came of it."""
    tokens, chosen = example["tokens"], example["chosen"]
    ends, log_probs = np.array(example["ends"]), np.array(example["log_probs"])
    panels = {label: np.array(rewards) for label, rewards in example["rewards"].items()}
    figure = Figure(figsize=(max(9, 0.48 * len(tokens)), 9.6), layout="constrained")
    rows = figure.subplots(len(panels) + 1, 1, sharex=True)
    steps = np.arange(len(tokens))
    for axes, (label, values) in zip(
        rows, {**panels, "value": np.array(example["values"])}.items(), strict=True
    ):
        scores = log_probs + values if label != "value" else values
        colour = COLOURS.get(label, "#222222")
        for column in range(values.shape[1]):
            axes.plot(steps, values[:, column], ".", color="#bbbbbb", markersize=5)
        axes.plot(steps[ends.any(1)], values[ends], "x", color="#222222", markersize=7, label="ending here")
        axes.plot(steps, values[steps, chosen], "o-", color=colour, linewidth=1.3, label="written", **EDGE)
        picked = values[steps, scores.argmax(1)]
        ring = "best" if label == "value" else "what this guide would take, by log pi + r"
        axes.plot(steps, picked, "o", mfc="none", mec="#222222", markersize=11, label=ring)
        title = "mean true quality of what the policy writes from here" if label == "value" else NAMES[label]
        style_axes(axes, title)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.17))
    # Where the token that was written lost most of what could still be had.
    values = np.array(example["values"])
    lost = values.max(1) - values[steps, chosen]
    worst, best = int(lost.argmax()), int(values[lost.argmax()].argmax())
    for axes in rows:
        axes.axvspan(worst - 0.5, worst + 0.5, color="#f3e9d2", zorder=0)
    text = f"“{tokens[worst].strip()}” for “{example['candidates'][worst][best].strip()}”: {-lost[worst]:.2f}"
    rows[-1].annotate(text.replace("-", "−"), (worst + 0.6, values[worst].max()), fontsize=9, va="center")

    words = [token.strip() or token for token in tokens]
    words[-1] = "(end)" if ends[-1, chosen[-1]] else words[-1]
    rows[-1].set_xticks(steps, words, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    for tick in rows[-1].get_xticklabels():
        tick.set_parse_math(False)
    return figure


# All of it


def arm_table(arms: pd.DataFrame, unguided: pd.DataFrame, best: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row per arm, over its seeds: true quality, reward, the guide's own reward, KL, length."""
    table = []
    groups = ["kind", "label", "greedy", "weight", "k", "pairs"]
    for key, rows in arms.groupby(groups, sort=False):
        row = dict(zip(groups, key, strict=True))
        for value in ("quality", "reward", "own", "kl"):
            row |= describe(rows, value)
        table.append(row | {"tokens": rows["tokens"].mean(), "eos": rows["eos"].mean()})
    for label, rows in unguided.groupby("label", sort=False):
        row = {"kind": "none", "label": label, "greedy": label == "greedy", "k": 10}
        for value in ("quality", "reward", "causal_reward", "kl"):
            row |= describe(rows, value)
        table.append(row | {"tokens": rows["tokens"].mean(), "eos": rows["eos"].mean()})
    for kind, of_kind in best.items():
        for (label, n), rows in of_kind.groupby(["label", "n"], sort=False):
            row = {"kind": kind, "label": label, "greedy": False, "n": n}
            for value in ("quality", "reward", "own", "causal_reward"):
                row |= describe(rows, value)
            row["kl"] = best_of_n_bound(rows, n)
            table.append(row | {"tokens": rows["tokens"].mean(), "eos": rows["eos"].mean()})
    return pd.DataFrame(table)


def comparison_table(
    arms: pd.DataFrame, unguided: pd.DataFrame, best: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Paired differences of true quality and reward between arms, prompt by prompt."""
    causal = arms[(arms["kind"] == "causal") & (arms["k"] == 10) & (arms["pairs"] == 4000)]
    encoder = arms[arms["kind"] == "encoder"]

    def arm(of_kind: pd.DataFrame, label: str, weight: float, greedy: bool = True) -> pd.DataFrame:
        return of_kind[
            (of_kind["label"] == label) & (of_kind["weight"] == weight) & (of_kind["greedy"] == greedy)
        ]

    greedy, top_k = (unguided[unguided["label"] == label] for label in ("greedy", "top-k"))
    best_8 = {kind: rows[rows["n"] == 8] for kind, rows in best.items()}
    pairs = []
    for weight in sorted(causal["weight"].unique()):
        for first, second in (
            ("partial", "full open"),
            ("partial", "full closed"),
            ("partial", "last"),
            ("full closed", "full open"),
            ("partial from full", "partial"),
        ):
            names = f"{first}, w = {weight:g}", f"{second}, w = {weight:g}"
            pairs.append(
                ("decoder-only, greedy", *names, arm(causal, first, weight), arm(causal, second, weight))
            )
        for label in ("full open", "full closed", "partial"):
            name = f"{label}, w = {weight:g}"
            pairs.append(("decoder-only, greedy", name, "greedy", arm(causal, label, weight), greedy))
            pairs.append(("decoder-only, sampled", name, "top-k", arm(causal, label, weight, False), top_k))
    chooser = best_8["causal"][best_8["causal"]["label"] == "best of n by full"]
    pairs.append(
        ("decoder-only, greedy", "partial, w = 1", "best of 8 by full", arm(causal, "partial", 1), chooser)
    )
    for second, other in (
        ("best of 8 by full", chooser),
        ("full open, w = 1, greedy", arm(causal, "full open", 1)),
        ("greedy", greedy),
    ):
        sampled = arm(causal, "partial", 2, False)
        pairs.append(("decoder-only, sampled", "partial, w = 2", second, sampled, other))
    for weight in sorted(encoder.loc[encoder["label"] == "full", "weight"].unique()):
        names = f"partial, w = {weight:g}", f"full, w = {weight:g}"
        same_seeds = arm(encoder, "partial", weight), arm(encoder, "full", weight)
        pairs.append(("encoder, greedy", *names, *same_seeds))
        pairs.append(("encoder, greedy", names[1], "greedy", same_seeds[1], greedy))
    few = arm(encoder, "partial few", 1), arm(encoder, "partial", 1)
    pairs.append(("encoder, greedy", "partial few, w = 1", "partial, w = 1", *few))
    few = few[0], arm(encoder, "full", 1)
    pairs.append(("encoder, greedy", "partial few, w = 1", "full, w = 1", *few))
    pairs.append(("encoder, sampled", "partial, w = 2", "top-k", arm(encoder, "partial", 2, False), top_k))

    table = []
    for how, first, second, one, other in pairs:
        for value in ("quality", "reward"):
            if value == "reward" and how.startswith("encoder"):
                other = other.assign(reward=other.get("causal_reward", other["reward"]))
            table.append(
                {"how": how, "first": first, "second": second, "of": value} | compare(one, other, value)
            )
    return pd.DataFrame(table)


def report(out: Path, docs: Path) -> None:
    """Write the tables (.csv) and the figures (.png)."""
    arms, unguided = read_arms(out), read_unguided(out)
    best = {kind: read_best(out, kind) for kind in ("causal", "encoder")}
    accuracy, paired = rank_table(out)
    joints = joint_table(out)
    tables = {
        "prefix_accuracy": accuracy,
        "prefix_accuracy_paired": paired,
        "arms": arm_table(arms, unguided, best),
        "comparisons": comparison_table(arms, unguided, best),
        "candidates": candidate_table(out),
        "joints": joints,
        "quality": quality_table(out),
    }
    docs.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_text(docs / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))

    figures = {
        "prefix_accuracy": draw_ranking(accuracy),
        "frontier": draw_frontier(arms, unguided, best["causal"]),
        "hacking": draw_hacking(arms),
        "example": draw_example(json.loads((out / "results/example.json").read_text())),
        "candidates": draw_candidates(out, arms),
        "joints": draw_joints(joints),
    }
    for name, figure in figures.items():
        save_figure(figure, docs / name)
    minutes = sum(json.loads((out / "seconds.json").read_text()).values()) / 60
    print(f"wrote {', '.join([*tables])} (.csv) and {', '.join(figures)} (.png, .pdf) to {docs}")
    print(f"the pieces took {minutes:.0f} minutes of one thread")
