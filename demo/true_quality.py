"""Score what each method of a run, or of several, wrote by the true quality of the demo's world.

Reads   of each run baseline_results.csv, methods.json and generation_*.json (from stage 4); demo_facts.json
        (from make_posts.py) and, for the references' row, the test split of summarize_from_feedback/ (from
        stage 1), from the run's directory or else from the current one.
Writes  true_quality.csv, a row a run and method, and true_quality.png, .pdf: reward and true quality.

Differences are paired by prompt. A run that lacks ARGS or GREEDY is compared with that of the first run named
that has the same prompts. The last lines say in words how the methods differ.

    python demo/true_quality.py
    python demo/true_quality.py . causal causal-w3 causal-closed
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, PositiveInt
from quality import WEIGHTS, true_quality

from pargs.cli import SettingsParser, fail, is_main, run_script, setting
from pargs.figures import EDGE, GREY, PALETTE, save_figure, style_axes
from pargs.files import DECODE, MAKE_PAIRS, check_writable, read_dataset, write_whole
from pargs.models import is_causal, load_config
from pargs.runs import (
    REFERENCE,
    REWARDS,
    MethodRecord,
    generation_path,
    read_generations,
    read_methods,
    read_rewards,
)
from pargs.statistics import bootstrap_interval

MAKE_FACTS = "python demo/make_posts.py ."
BASELINES = ("ARGS", "GREEDY")  # to which the table compares every method
IN_WORDS = (("ARGS", "GREEDY"), ("PARGS-G", "ARGS"), ("PARGS", "TOP-K"), ("PARGS-G", "BESTN"))
EOS_WORDS = {"finished": "", "always": ", EOS behind every prefix", "never": ", no EOS"}


@dataclass
class Settings:
    facts: str = setting("demo_facts.json", "Facts of the posts.")
    dataset: str = setting("summarize_from_feedback", "Holds the references.")
    output: str = setting("true_quality.csv", "Where the table goes; the figure goes beside it.")
    seed: NonNegativeInt = setting(42, "Seed of the bootstrap.")
    resamples: PositiveInt = setting(9999, "Bootstrap resamples.")


@dataclass
class Run:
    """What the methods of a run wrote, judged: `marks` has a row per prompt for each of them."""

    name: str
    records: dict[str, MethodRecord]  # whose models are named as they are from here
    marks: dict[str, pd.DataFrame]
    prompts: frozenset[str]

    @property
    def title(self) -> str:
        return Path.cwd().name if self.name == os.curdir else self.name

    def label(self, method: str) -> str:
        """E.g. "ARGS (w = 1)": what guided it, as recorded."""
        record = self.records.get(method)
        if record is None or not record.method.guide:
            return method
        return f"{method} (w = {record.method.weight:g}{EOS_WORDS[record.method.guide_eos]})"

    def describe(self) -> str:
        """E.g. "causal (decoder-only guides, 200 prompts)"; the kind is that of the guides that are here."""
        guides = [record.method.guide for record in self.records.values()]
        configs = [
            load_config(guide, "it guided this run")
            for guide in dict.fromkeys(guides)
            if guide and is_model(guide)
        ]
        kinds = sorted({"decoder-only" if is_causal(config) else "encoder" for config in configs})
        guided_by = [f"{' and '.join(kinds)} guides"] if kinds else []
        return f"{self.title} ({', '.join([*guided_by, f'{len(self.prompts)} prompts'])})"


def parse_command_line() -> tuple[Settings, list[str]]:
    parser = SettingsParser(Settings, __doc__)
    runs_help = "Run directories; the current one by default."
    parser.add_argument("runs", nargs="*", default=["."], metavar="RUN", help=runs_help)
    settings, others = parser.parse()
    return settings, others.runs


# Reading runs


def read_facts(path: Path) -> dict[str, dict]:
    """The facts of each post of the world."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path} is missing; make it with `{MAKE_FACTS}`")
    except (OSError, ValueError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{MAKE_FACTS}`")


def facts_of_prompts(facts: dict[str, dict], prompts: list[str]) -> list[dict]:
    """The facts of each prompt's post, which stands between "POST: " and the last TL;DR."""
    posts = [prompt.partition("POST: ")[2].rpartition("\nTL;DR:")[0] for prompt in prompts]
    for row, post in enumerate(posts):
        if post not in facts:
            fail(
                f"prompt {row} of the rewards is no post of demo_facts.json; both must come from one "
                "run of python demo/make_posts.py, and the prompts from the default template"
            )
    return [facts[post] for post in posts]


def read_responses(path: Path, prompts: list[str]) -> list[str]:
    """What a method wrote for the prompts, in their order."""
    results = {generation.prompt: generation.result for generation in read_generations(path)}
    if not results.keys() >= set(prompts):
        fail(f"{path} is of other prompts than the table of rewards; make both again with `{DECODE}`")
    return [results[prompt] for prompt in prompts]


def read_references(dataset: Path, prompts: list[str]) -> list[str] | None:
    """The reference summaries of the prompts; None where stage 1's output is not here."""
    if not dataset.is_dir():
        return None
    test = read_dataset(dataset, {"test": ["prompt", "reference"]}, MAKE_PAIRS)[0]["test"]
    references = dict(zip(test["prompt"], test["reference"], strict=True))
    if not set(prompts) <= set(references):
        fail(f"{dataset} holds other prompts than the table of rewards; decode again with `{DECODE}`")
    return [references[prompt] for prompt in prompts]


def mark(responses: list[str], facts: list[dict], rewards: pd.Series, prompts: list[str]) -> pd.DataFrame:
    """The qualities, their total and the reward: a row per prompt; one that comes twice has its mean."""
    rows = pd.DataFrame(true_quality(text, known) for text, known in zip(responses, facts, strict=True))
    return rows.assign(reward=rewards).groupby(prompts, sort=False).mean()


def is_model(name: str) -> bool:
    return Path(name, "config.json").is_file()


def seen_from_here(record: MethodRecord, directory: Path) -> MethodRecord:
    """The record with the folders that it names from the run's directory named from the current one."""

    def locate(name: str | None) -> str | None:
        return str((directory / name).resolve()) if name and is_model(str(directory / name)) else name

    method = record.method
    named = {field: locate(getattr(method, field)) for field in ("policy", "guide", "chooser")}
    changes = {"method": method.model_copy(update=named), "evaluator": locate(record.evaluator)}
    return record.model_copy(update=changes)


def read_run(name: str, settings: Settings) -> Run:
    """Read a run and judge it; exits where there is none, or a file is missing or damaged."""
    directory = Path(name)
    if not directory.is_dir():
        fail(f"there is no run directory {name!r}")
    own_facts, own_dataset = directory / settings.facts, directory / settings.dataset
    facts = read_facts(own_facts if own_facts.exists() else Path(settings.facts))
    rewards = read_rewards(directory / REWARDS)
    prompts = list(rewards["prompt"])
    known = facts_of_prompts(facts, prompts)

    marks = {}
    for method in rewards.columns.drop("prompt"):
        if method == REFERENCE:
            place = own_dataset if own_dataset.exists() else Path(settings.dataset)
            responses = read_references(place, prompts)
        else:
            responses = read_responses(generation_path(method, directory), prompts)
        if responses is not None:
            marks[method] = mark(responses, known, rewards[method], prompts)

    records = {
        method: seen_from_here(record, directory) for method, record in read_methods(directory).items()
    }
    return Run(
        name, {method: records[method] for method in marks if method in records}, marks, frozenset(prompts)
    )


def read_runs(names: list[str], settings: Settings) -> list[Run]:
    names = [os.path.normpath(name) for name in names]
    if len(set(names)) < len(names):
        fail(f"a run directory is named twice: {' '.join(names)}")
    return [read_run(name, settings) for name in names]


# Comparing


@dataclass
class Mean:
    """A mean over prompts with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: pd.Series, settings: Settings) -> "Mean":
        known = values.dropna().to_numpy()
        interval = bootstrap_interval(known, settings.resamples, settings.seed)
        return cls(float(known.mean()) if len(known) else np.nan, *interval)


def difference(first: pd.DataFrame, second: pd.DataFrame, settings: Settings) -> Mean:
    """By how much the first one's true quality is above the second's, of the same prompts."""
    return Mean.of(first["total"] - second["total"], settings)  # pandas pairs them by prompt


def find_baseline(method: str, run: Run, runs: list[Run]) -> Run | None:
    """The run itself, or else the first one named that has the method, on the same prompts."""
    return next((each for each in (run, *runs) if method in each.marks and each.prompts == run.prompts), None)


def find_original(method: str, run: Run, runs: list[Run]) -> Run | None:
    """The first run named before this one whose method differs in nothing but weight and reading of EOS."""
    for other in runs[: runs.index(run)]:
        ours, theirs = run.records.get(method), other.records.get(method)
        if ours is None or theirs is None or other.prompts != run.prompts or ours.method == theirs.method:
            continue
        varied = {name: getattr(theirs.method, name) for name in ("weight", "guide_eos")}
        as_theirs = {"method": ours.method.model_copy(update=varied), "cost": theirs.cost}
        as_theirs |= {"models": theirs.models, "origin": theirs.origin}  # of the same names
        if ours.model_copy(update=as_theirs) == theirs:
            return other
    return None


def mean_quality(marks: pd.DataFrame, settings: Settings) -> dict[str, float]:
    """A method's means over the prompts, with the standard error and the intervals."""
    reward, quality = Mean.of(marks["reward"], settings), Mean.of(marks["total"], settings)
    row = {
        "n": len(marks),
        "reward": reward.value,
        "reward_low": reward.low,
        "reward_high": reward.high,
        "true_quality": quality.value,
        "standard_error": marks["total"].sem(),
        "interval_low": quality.low,
        "interval_high": quality.high,
    }
    return row | marks[list(WEIGHTS)].mean().to_dict()


def tabulate(run: Run, runs: list[Run], settings: Settings) -> pd.DataFrame:
    """A row per method; `ARGS_of` names the run whose ARGS `minus_ARGS` is measured from."""
    rows = {}
    for method, marks in run.marks.items():
        row: dict[str, object] = {"label": run.label(method), **mean_quality(marks, settings)}
        for name in BASELINES:
            baseline = find_baseline(name, run, runs)
            if baseline and (method, run.name) != (name, baseline.name):
                gap = difference(marks, baseline.marks[name], settings)
                row |= {
                    f"minus_{name}": gap.value,
                    f"minus_{name}_low": gap.low,
                    f"minus_{name}_high": gap.high,
                }
                row[f"{name}_of"] = baseline.name
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


# Saying it


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers as people read them; a mean has its interval in brackets."""

    def show(name: str, low: str, high: str, sign: str = "") -> list[str]:
        numbers = zip(table[name], table[low], table[high], strict=True)
        return [
            ""
            if np.isnan(mean)
            # Of one prompt there is no interval.
            else f"{mean:{sign}.3f}" + ("" if np.isnan(a) else f" [{a:{sign}.3f}, {b:{sign}.3f}]")
            for mean, a, b in numbers
        ]

    shown = pd.DataFrame({"reward": table["reward"].map("{:.2f}".format)})
    shown["true quality"] = show("true_quality", "interval_low", "interval_high")
    shown["se"] = table["standard_error"].map("{:.3f}".format)
    for name in WEIGHTS:
        shown[name] = table[name].map("{:.2f}".format)
    for name in BASELINES:
        if f"minus_{name}" in table:
            columns = [f"minus_{name}{end}" for end in ("", "_low", "_high")]
            shown[f"minus {name}"] = show(*columns, sign="+")
    return shown.set_index(table["label"].rename("method"))


def compare_in_words(first: str, second: str, gap: Mean) -> str:
    """One sentence on two methods, which says no more than the interval allows."""
    if np.isnan(gap.low):
        return f"{first} and {second}: too few prompts to compare."
    if gap.low <= 0 <= gap.high:
        return (
            f"{first} and {second} are not told apart: the difference is {gap.value:+.3f} "
            f"[{gap.low:+.3f}, {gap.high:+.3f}], which holds 0."
        )
    low, high = sorted((abs(gap.low), abs(gap.high)))
    side = "above" if gap.value > 0 else "below"
    return f"{first} is {abs(gap.value):.3f} [{low:.3f}, {high:.3f}] {side} {second}."


def describe_run(run: Run, runs: list[Run], settings: Settings) -> list[str]:
    """A sentence for each comparison: within the run, then with the run of which it is a variant."""
    lines = []
    for first, second in IN_WORDS:
        if first in run.marks and second in run.marks:
            gap = difference(run.marks[first], run.marks[second], settings)
            lines.append(compare_in_words(run.label(first), run.label(second), gap))
    for method, marks in run.marks.items():
        if original := find_original(method, run, runs):
            gap = difference(marks, original.marks[method], settings)
            other = f"{original.label(method)} of {original.title}"
            lines.append(compare_in_words(run.label(method), other, gap))
    return lines


# Drawing


def group_runs(runs: list[Run]) -> list[list[Run]]:
    """A run together with its variants, in the order named."""
    groups: list[list[Run]] = []
    for run in runs:
        originals = {original.name for method in run.marks if (original := find_original(method, run, runs))}
        group = next((group for group in groups if originals & {each.name for each in group}), None)
        if group:
            group.append(run)
        else:
            groups.append([run])
    return groups


def rows_of_group(group: list[Run], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of its panels: a method beside its variants, the references last.

    Of what is the same in two runs the first one.
    """
    rows = pd.concat([tables[run.name] for run in group]).drop_duplicates("label")
    order = [*rows.index.drop(REFERENCE, errors="ignore").unique(), REFERENCE]
    return rows.sort_index(key=lambda methods: methods.map(order.index), kind="stable")


def draw_figure(runs: list[Run], tables: dict[str, pd.DataFrame]) -> Figure:
    """For each run, with its variants, a row of two panels: the mean reward, and the true quality."""
    groups = group_runs(runs)
    rows = [rows_of_group(group, tables) for group in groups]
    heights = [len(table) + 2.2 for table in rows]  # room for title and axis
    methods = dict.fromkeys(
        method for table in rows for method in table.index.drop(REFERENCE, errors="ignore")
    )
    colours = {method: PALETTE[at % len(PALETTE)] for at, method in enumerate(methods)}
    figure = Figure(figsize=(11, 0.4 + 0.34 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)

    for (left, right), group, table in zip(grid, groups, rows, strict=True):
        draw_means(left, table, "reward", "reward_low", "reward_high", colours)
        draw_means(right, table, "true_quality", "interval_low", "interval_high", colours)
        style_axes(left, group[0].describe(), name_reward(group[0]), grid="x")
        style_axes(right, "", "true quality", grid="x")
        left.set_yticks(range(len(table)), table["label"].str.replace(", ", ",\n"))
        right.set_yticks(range(len(table)), [""] * len(table))
        right.set_xlim(0, 1)

    legend = (
        "● mean over prompts with 95% bootstrap interval      dashed: GREEDY, the policy without a reward"
    )
    figure.supxlabel(legend, fontsize=8.5, color="#555555")
    return figure


def name_reward(run: Run) -> str:
    """The axis of the rewards, with the model that gave them where the run says which."""
    evaluators = {Path(record.evaluator).name for record in run.records.values() if record.evaluator}
    return ", ".join(["mean reward", *sorted(evaluators)])


def draw_means(
    axes: Axes, table: pd.DataFrame, mean: str, low: str, high: str, colours: dict[str, str]
) -> None:
    """A dot and its interval for each method, the first on top, and a line at GREEDY."""
    for at, (method, row) in enumerate(table.iterrows()):
        colour = colours.get(str(method), GREY)
        if np.isfinite([row[low], row[high]]).all():
            axes.plot([row[low], row[high]], [at, at], color=colour, linewidth=2.6, solid_capstyle="round")
        axes.plot([row[mean]], [at], "o", color=colour, markersize=8, zorder=3, clip_on=False, **EDGE)
    if "GREEDY" in table.index:
        axes.axvline(table.loc["GREEDY", mean], color="#444444", linewidth=1, linestyle="--", zorder=1)
    axes.set_ylim(len(table) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)


def main() -> None:
    settings, names = parse_command_line()
    if not is_main():
        return  # under a launcher one process is enough
    output = Path(settings.output)
    check_writable(output.parent)
    runs = read_runs(names, settings)
    tables = {run.name: tabulate(run, runs, settings) for run in runs}

    for run in runs:
        print(f"\n{run.describe()}")
        print(readable_table(tables[run.name]).to_markdown(tablefmt="simple", disable_numparse=True))
        for name in BASELINES:
            baseline = find_baseline(name, run, runs)
            if baseline and baseline is not run:
                print(f"{name} is that of {baseline.title}")

    figure = draw_figure(runs, tables)
    write_whole(output, pd.concat(tables, names=["run"]).to_csv)
    save_figure(figure, output)
    print(f"\nwrote {output}, .png, .pdf; what each quality means: demo/quality.py")

    print("\nTrue quality, paired by prompt, with 95% intervals over prompts (not over seeds or trainings):")
    for run in runs:
        if lines := describe_run(run, runs, settings):
            print("\n".join([run.describe(), *(f"- {line}" for line in lines)]))


if __name__ == "__main__":
    run_script(main, "the same command starts again")
