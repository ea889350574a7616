"""Table and figure of the average reward of each method, from one run or from several pooled.

Reads   baseline_results.csv and methods.json of each run and, where they are there, its generation_*.json,
        trace_*.jsonl, scores_*.json (a column each), and the references in summarize_from_feedback/.
Writes  average_reward.csv, .md, .tex (the table) and average_reward.png, .pdf (the figure); results.json, the
        table as data, with how each method of each run was made.

Several runs are pooled where they differ in the seed of the sampling alone; --sweep gives a method with other
settings, say another weight, a row of its own.

The sampled KL from the reference policy, per response in nats, comes from a method's trace or, with --policy,
from the policies that methods.json names; --policy also gives the log-likelihood per token. Best-of-n has no
log-probabilities of its own, so no KL.

    python Evaluation/show_result.py
    python Evaluation/show_result.py runs/seed*/ --baseline PARGS --output_dir runs
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pooling import check_alike, label_sweep, note_unknown
from pydantic import NonNegativeInt, PositiveInt
from response_measures import measure_responses
from reward_figure import draw_figure
from run_files import Run, parse_runs, read_run
from statistics_table import TEXT_COLUMNS, count_folded, in_words, readable_table, summarise

from pargs.cli import fail, is_main, next_step, run_script, setting
from pargs.figures import save_figure
from pargs.files import check_writable, write_text, write_whole
from pargs.origin import Origin
from pargs.runs import REFERENCE, REWARDS

NAME = "average_reward"


@dataclass
class Settings:
    baseline: str | None = setting(None, "Method to compare the others to; the first one if not given.")
    seed: NonNegativeInt = setting(42, "Seed of the bootstrap.")
    resamples: PositiveInt = setting(9999, "Bootstrap resamples.")
    dataset: str = setting("summarize_from_feedback", "Dataset with the reference summaries.")
    policy: str | None = setting(
        None, "Reference policy, e.g. vistagi/gpt2-large-tldr-sum, for log p and KL."
    )
    batch_size: PositiveInt = setting(8, "Responses scored at once by a policy.")
    sweep: bool = setting(False, "A row for each setting of a method; runs that share them are pooled.")
    pool_anyway: bool = setting(False, "Pool runs also where their settings, models or prompts differ.")
    output_dir: str | None = setting(
        None, "Where the table and the figure go; if not given, into the run, or of several runs here."
    )


def read_runs(directories: list[str]) -> dict[str, Run]:
    names = [os.path.normpath(directory) for directory in directories]
    if len(set(names)) < len(names):
        fail(f"a run directory is named twice: {' '.join(directories)}")
    runs = {name: read_run(Path(name)) for name in names}

    methods = dict.fromkeys(name for run in runs.values() for name in (*run.methods, *run.rewards))
    for run in runs.values():
        if missing := [method for method in methods if method not in run.rewards]:
            run.note(f"not in {REWARDS}: {', '.join(missing)}")
    return runs


def pool_rewards(runs: dict[str, Run]) -> pd.DataFrame:
    """Rewards of all runs: a row per (run, prompt, copy), a column per method, `reference` last."""
    rewards = pd.concat({name: run.rewards for name, run in runs.items()}, names=["run"])
    return rewards[sorted(rewards, key=lambda column: column == REFERENCE)]


def choose_baseline(requested: str | None, methods: list[str]) -> str:
    if requested and requested not in methods:
        fail(f"--baseline {requested}: not in {REWARDS}, which has {', '.join(methods)}")
    return requested or methods[0]


def describe_settings(runs: dict[str, Run]) -> list[str]:
    """Whose rewards the table holds, and how its methods decoded; where runs differ, each value."""
    records = [
        (method, run.methods[method])
        for run in runs.values()
        for method in run.rewards
        if method in run.methods
    ]
    if not records:
        return []

    def all_values(name: str) -> str:
        values = dict.fromkeys(getattr(record, name) for _, record in records)
        if name == "evaluator":  # of a folder its name, of one of the hub's all of it
            values = [
                value and (Path(value).name if Path(value).is_absolute() else value) for value in values
            ]
        unknown = "none" if name == "candidate_gap" else "?"  # in an older record
        return ", ".join(unknown if value is None else str(value) for value in values)

    guided = [(method, record.method.weight) for method, record in records if record.method.guide]
    weights = [f"{method} {weight:g}" for method, weight in guided if "(weight" not in method]
    parts = [f"k = {all_values('k')}", f"at most {all_values('max_new_tokens')} new tokens"]
    parts += [f"w: {', '.join(dict.fromkeys(weights))}"] if weights else []
    if any(record.candidate_gap for _, record in records):
        parts.append(f"candidate gap {all_values('candidate_gap')}")
    return [f"Rewards by {all_values('evaluator')}; {'; '.join(parts)}."]


def describe(summary: pd.DataFrame, rewards: pd.DataFrame, runs: dict[str, Run]) -> list[str]:
    """What the numbers are, in the words of a caption."""
    num_runs, num_folded = rewards.index.get_level_values("run").nunique(), count_folded(rewards)
    lines = [
        *describe_settings(runs),
        "Reward: mean ± standard error (sample standard deviation / √n) over n prompts; "
        "intervals: 95% percentile bootstrap over prompts.",
        f"vs {summary['baseline'].iloc[0]}: paired difference on the same prompts; a tie is half a win.",
    ]
    if num_runs > 1:
        lines.append(
            f"{num_runs} runs pooled: a prompt that several runs share counts once, with its mean; "
            "SD of runs: sample standard deviation of the runs' means."
        )
    if num_folded:
        lines.append(
            f"A prompt that stands in a run more than once counts once, with its mean: "
            f"{num_folded} of {len(rewards)} rows were folded."
        )
    if "sampled_kl" in summary:
        lines.append("KL: sampled, to the reference policy, per response, in nats; greedy: - log p.")
    if "evaluator_was" in summary:
        lines.append(
            "Scored by: what the model that gave these rewards was to the method. Its own guide or chooser "
            "favours it: do not judge a method by that mark alone."
        )
    if "seconds_per_prompt" in summary:
        lines.append(
            "Reward calls / token: rewards asked for (also those of an EOS, and of samples that best-of-n "
            "discards) per token delivered; Seconds / prompt: decoding and choosing. Both of the last launch."
        )
    return lines


def save_data(
    summary: pd.DataFrame,
    caption: list[str],
    notes: list[str],
    runs: dict[str, Run],
    settings: Settings,
    seconds: float,
) -> None:
    """The table as data, with what it says in words and what each method of each run was made with."""
    rows = json.loads(summary.to_json(orient="index", double_precision=15))  # a NaN becomes null
    content = {
        "results": rows,
        "in_words": in_words(summary),
        "caption": caption,
        "left_out": notes,
        "runs": {
            name: {method: record.model_dump() for method, record in run.methods.items()}
            for name, run in runs.items()
        },
        "scores": {
            name: {scorer: scores.model_dump(exclude={"scores"}) for scorer, scores in run.scores.items()}
            for name, run in runs.items()
        },
        "seconds": round(seconds, 1),
        "origin": Origin.of(settings).model_dump(),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(Path(settings.output_dir or ".", "results.json"), text + "\n")


def save_table(summary: pd.DataFrame, caption: list[str], notes: list[str], output_dir: Path) -> None:
    """The table as numbers (.csv) and as people read it (.md, .tex), with its caption and what is missing."""
    shown = readable_table(summary)
    sides = ["left" if column in TEXT_COLUMNS else "right" for column in shown]
    markdown = shown.to_markdown(index=False, disable_numparse=True, colalign=sides)
    remarks = "".join(f"\n- {line}" for line in caption + notes)
    latex = shown.to_latex(index=False, escape=True, column_format="".join(side[0] for side in sides))
    comments = "".join(f"% {line}\n" for line in ["needs \\usepackage{booktabs}", *caption, *notes])

    write_whole(output_dir / f"{NAME}.csv", lambda path: summary.to_csv(path))
    write_text(output_dir / f"{NAME}.md", f"{markdown}\n{remarks}\n")
    write_text(output_dir / f"{NAME}.tex", comments + latex)


def main() -> None:
    started = time.perf_counter()
    runs_help = "Run directories, pooled; the current one by default."
    settings, directories = parse_runs(Settings, __doc__, runs_help)
    if not (settings.policy or is_main()):
        return  # there is no model work to share
    one_run = directories[0] if len(directories) == 1 else "."
    settings.output_dir = settings.output_dir or one_run
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)

    runs = read_runs(directories)
    if settings.sweep:
        if not settings.pool_anyway:
            check_alike(runs, sweep=True)
        runs, rewards = label_sweep(runs)
    else:
        if len(runs) > 1:
            note_unknown(runs)
            if not settings.pool_anyway:
                check_alike(runs)
        rewards = pool_rewards(runs)
    baseline = choose_baseline(settings.baseline, list(rewards))
    beside_reward, notes = measure_responses(
        runs, list(rewards), settings.dataset, settings.policy, settings.batch_size
    )
    if not is_main():
        return

    summary = summarise(rewards, baseline, settings.resamples, settings.seed)
    summary.insert(0, "baseline", baseline)
    summary = summary.join(beside_reward)
    notes = [note for run in runs.values() for note in run.notes] + notes

    caption = describe(summary, rewards, runs)
    shown = readable_table(summary).rename(columns=lambda name: name.replace(" / ", "\n/ "))  # a narrow head
    print(shown.to_markdown(index=False, tablefmt="simple", disable_numparse=True))
    print("\n" + "\n".join(caption))
    if notes:
        print("\nLeft out:\n" + "\n".join(f"- {note}" for note in notes))

    save_table(summary, caption, notes, output_dir)
    save_data(summary, caption, notes, runs, settings, time.perf_counter() - started)
    save_figure(draw_figure(rewards, summary), output_dir / NAME)
    print("\n" + "\n".join(in_words(summary)))
    print(f"\nwrote {output_dir / NAME}.csv, .md, .tex (table) and .png, .pdf (figure)")
    print(f"wrote {output_dir / 'results.json'} (the table as data)")
    next_step("Evaluation/show_generations.py", *([] if directories[0] == "." else directories[:1]))


if __name__ == "__main__":
    run_script(main, "the same command starts again")
