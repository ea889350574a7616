"""Tables and figures of the study on real text.

A mean is over prompts and training seeds. Its interval is the 95% percentile bootstrap over prompts, of each
prompt's mean over its pairs and seeds; how far training seeds lie apart is shown beside it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from claim_figures import COLOURS, compare, describe, draw_readings
from datasets import load_from_disk
from matplotlib.figure import Figure
from rouge_score.rouge_scorer import RougeScorer

from pargs.figures import EDGE, GREY, save_figure, style_axes
from pargs.files import write_text
from pargs.runs import generation_path
from pargs.statistics import mcnemar

TASKS = {
    "relevance": "Relevance: a post's human summary\nagainst another post's",
    "hh": "Dialogue (HH): the answer\nthat a human preferred",
    "judged": "TL;DR: the summary\nthat a human preferred",
}
READINGS = {
    "full open": ("full", "finished"),
    "full closed": ("full", "always"),
    "partial": ("partial", "finished"),
}
ARMS = {  # label: method and runs
    "greedy": ("GREEDY", "unguided-11"),
    "top-k": ("TOP-K", "unguided-*"),
    "ARGS": ("ARGS", "greedy-s*"),
    "ARGS, closed": ("ARGS", "closed-s*"),
    "PARGS-G": ("PARGS-G", "greedy-s*"),
    "PARGS": ("PARGS", "sampled-s*"),
}
ARM_COLOURS = {
    "greedy": GREY,
    "top-k": "#999999",
    "ARGS": COLOURS["full open"],
    "ARGS, closed": COLOURS["full closed"],
    "PARGS-G": COLOURS["partial"],
    "PARGS": "#3f8fd2",
}
MEASURES = {
    "reward": "reward by MiniLM,\nwhich guided nobody",
    "own_post": "its own post preferred\nto nine others",
    "rouge_l": "ROUGE-L with\nthe human summary",
}
PAIRED = (
    ("greedy", ("ARGS", "ARGS, closed", "PARGS-G", "PARGS")),
    ("ARGS", ("ARGS, closed", "PARGS-G")),
    ("ARGS, closed", ("PARGS-G",)),
    ("top-k", ("PARGS",)),
)


# Ranking


def read_ranking(out: Path, task: str, label: str) -> pd.DataFrame:
    """A row per training seed, pair and part of the response; pairs of equal prefixes are left out."""
    (kind, reading), tables = READINGS[label], []
    for path in sorted(out.glob(f"results/{task}-{kind}-s*.json")):
        found = json.loads(path.read_text())
        table = pd.DataFrame(found["right"][reading], columns=found["percentages"])
        table["prompt"], table["pair"] = found["prompts"], table.index
        table["training_seed"] = int(path.stem.rpartition("-s")[2])
        tables.append(table.melt(["prompt", "pair", "training_seed"], var_name="percent", value_name="right"))
    return pd.concat(tables).dropna().astype({"right": float}) if tables else pd.DataFrame()


def rank_tables(out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each reading at each tenth; and the partial model against each reading of the full one."""
    accuracy, paired = [], []
    for task in TASKS:
        rows = {label: read_ranking(out, task, label) for label in READINGS}
        if any(table.empty for table in rows.values()):
            continue
        # Of a study that is not finished: the seeds that all have.
        seeds = set.intersection(*(set(table["training_seed"]) for table in rows.values()))
        rows = {label: table[table["training_seed"].isin(seeds)] for label, table in rows.items()}
        for label, table in rows.items():
            for percent, own in table.groupby("percent"):
                row = {"task": task, "label": label, "percent": percent, "pairs": own["pair"].nunique()}
                accuracy.append(row | {"prompts": own["prompt"].nunique()} | describe(own, "right"))
        for label in ("full open", "full closed"):
            for percent, own in rows["partial"].groupby("percent"):
                other = rows[label][rows[label]["percent"] == percent]
                row = {"task": task, "first": "partial", "second": label, "percent": percent}
                paired.append(row | compare(own, other, "right") | mcnemar_by_seed(own, other))
    return pd.DataFrame(accuracy), pd.DataFrame(paired)


def mcnemar_by_seed(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, float]:
    """p of McNemar's exact test, one of each training seed; it takes pairs of one prompt as independent."""
    both = first.merge(second, on=["training_seed", "pair"], suffixes=("", "_second"))
    gains = both["right"] - both["right_second"]
    return {
        f"p_seed_{seed}": mcnemar(int((own < 0).sum()), int((own > 0).sum()))
        for seed, own in gains.groupby(both["training_seed"])
    }


def draw_ranking(accuracy: pd.DataFrame) -> Figure:
    names = {
        "full open": "full, as trained",
        "full closed": "full, asked with an EOS behind every prefix",
        "partial": "partial",
    }
    tasks = [task for task in TASKS if task in set(accuracy["task"])]
    figure = Figure(figsize=(max(5.5, 4.2 * len(tasks)), 4.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        draw_readings(axes, accuracy[accuracy["task"] == task], "right", names, TASKS[task])
        axes.title.set_fontsize(10)
    panels[0].set_ylabel("chosen prefix scores above the rejected one")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(tasks))
    return figure


# Decoding


def read_arms(out: Path) -> pd.DataFrame:
    """A row per arm, seeds and prompt; the human summaries stand beside them."""
    test: Any = load_from_disk(str(out / "data/relevance"))["test"]
    references = dict(zip(test["prompt"], test["reference"], strict=True))
    numbers = {prompt: at for at, prompt in enumerate(references)}
    rouge, rows = RougeScorer(["rougeL"], use_stemmer=True), []
    for label, (method, runs) in ARMS.items():
        for path in sorted(out.glob(f"runs/{runs}/{generation_path(method)}")):
            name = path.parent.name
            relevant = json.loads((out / f"results/relevant-{name}.json").read_text())[path.stem]
            seed = int(name.partition("-s")[2].partition("-")[0] or 0)
            for row, own in zip(json.loads(path.read_text()), relevant, strict=True):
                overlap = rouge.score(references[row["prompt"]], row["result"])["rougeL"].fmeasure
                found = {"label": label, "training_seed": seed, "prompt": numbers[row["prompt"]]}
                found |= {"reward": row["reward"], "own_post": float(own), "rouge_l": overlap}
                rows.append(found | {"tokens": row["num_tokens"], "eos": row["finish_reason"] == "eos"})
    return pd.DataFrame(rows)


def arm_table(arms: pd.DataFrame) -> pd.DataFrame:
    table = []
    for label in ARMS:
        own = arms[arms["label"] == label]
        row: dict[str, Any] = {"label": label, "responses": len(own)}
        for measure in MEASURES:
            row |= describe(own, measure)
        table.append(row | {"tokens": own["tokens"].mean(), "eos": own["eos"].mean()})
    return pd.DataFrame(table)


def comparison_table(arms: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for second, firsts in PAIRED:
        for first in firsts:
            one, other = (arms[arms["label"] == label] for label in (first, second))
            for measure in MEASURES:
                row = {"first": first, "second": second, "measure": measure}
                rows.append(row | compare(one, other, measure))
    return pd.DataFrame(rows)


def draw_arms(arms: pd.DataFrame, table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for at, row in enumerate(table.itertuples()):
            colour, mean = ARM_COLOURS[row.label], getattr(row, measure)
            axes.hlines(
                at, getattr(row, f"{measure}_low"), getattr(row, f"{measure}_high"), color=colour, linewidth=3
            )
            own = arms[arms["label"] == row.label]
            of_seeds = own.groupby("training_seed")[measure].mean()
            axes.plot(of_seeds, np.full(len(of_seeds), at + 0.22), "|", color=colour, markersize=8)
            axes.plot(mean, at, "o", color=colour, markersize=8, **EDGE)
        axes.set_yticks(range(len(table)), table["label"])
        style_axes(axes, title, grid="x")
        axes.title.set_fontsize(10)
    panels[0].invert_yaxis()
    note = "50 held-out posts; dots: means, bars: 95% bootstrap over posts; ticks: training seeds"
    figure.supxlabel(note, fontsize=8.5, color="#555555")
    return figure


def report(out: Path, docs: Path) -> None:
    """Write every table and figure, and say where."""
    accuracy, paired = rank_tables(out)
    tables, figures = {"accuracy": accuracy, "accuracy_paired": paired}, {"ranking": draw_ranking(accuracy)}
    evaluator = out / "results/evaluator.json"
    if evaluator.exists():  # posts were decoded
        arms = read_arms(out)
        tables |= {"arms": arm_table(arms), "comparisons": comparison_table(arms)}
        figures |= {"arms": draw_arms(arms, tables["arms"])}
        right = json.loads(evaluator.read_text())
        print(f"the evaluator is right on {sum(right)} of {len(right)} held-out pairs")
    for name, each in tables.items():
        write_text(docs / f"real_{name}.csv", each.round(4).to_csv(index=False))
    for name, figure in figures.items():
        save_figure(figure, docs / f"real_{name}")
    print(f"wrote {docs}/real_*.csv, .png, .pdf")
