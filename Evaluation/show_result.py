"""Table and figure of the average reward of each method, from one run or from several pooled.

Reads   baseline_results.csv of each run and, where they are there, its generation_*.json, trace_*.jsonl
        and the references in summarize_from_feedback/.
Writes  average_reward.csv, .md, .tex (the table) and average_reward.png, .pdf (the figure).

With --policy also: log-likelihood per token of the responses under the reference policy, and the sampled
KL to it per response, in nats. The KL of PARGS needs its trace, that of DPO and PPO needs --dpo_policy and
--ppo_policy; best-of-n has no log-probabilities of its own, so its KL is left out.

    python Evaluation/show_result.py
    python Evaluation/show_result.py runs/seed*/ --baseline PARGS
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import pandas as pd
from command_line import fail, is_main, parse_command_line
from matplotlib.figure import Figure
from response_measures import measure_responses
from reward_figure import draw_figure
from run_files import REFERENCE, Run, check_writable, read_run, write_whole
from statistics_table import readable_table, summarise

NAME = "average_reward"


@dataclass
class Settings:
    baseline: str | None = field(
        default=None, metadata={"help": "Method to compare the others to; ARGS, else the first one."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the bootstrap."})
    resamples: int = field(default=9999, metadata={"help": "Bootstrap resamples."})
    dataset: str = field(
        default="summarize_from_feedback", metadata={"help": "Dataset with the reference summaries."}
    )
    policy: str | None = field(
        default=None,
        metadata={"help": "Reference policy, e.g. vistagi/gpt2-large-tldr-sum, for log-likelihood and KL."},
    )
    dpo_policy: str | None = field(default=None, metadata={"help": "With --policy: that of DPO, for KL."})
    ppo_policy: str | None = field(default=None, metadata={"help": "With --policy: that of PPO, for KL."})
    k: int = field(default=10, metadata={"help": "The k that TOP-K, DPO and PPO sampled with, for KL."})
    pargs_weight: float = field(default=2.0, metadata={"help": "The weight that PARGS sampled with, for KL."})
    batch_size: int = field(default=8, metadata={"help": "Responses scored at once by a policy."})
    output_dir: str = field(default=".", metadata={"help": "Where the table and the figure go."})


def read_runs(directories: list[str]) -> dict[str, Run]:
    names = [os.path.normpath(directory) for directory in directories]
    if len(set(names)) < len(names):
        fail(f"a run directory is named twice: {' '.join(directories)}")
    return {name: read_run(name) for name in names}


def pool_rewards(runs: dict[str, Run]) -> pd.DataFrame:
    """Rewards of all runs: a row per (run, prompt, copy), a column per method, `reference` last."""
    rewards = pd.concat({name: run.rewards for name, run in runs.items()}, names=["run"])
    return rewards[sorted(rewards, key=lambda column: column == REFERENCE)]


def choose_baseline(requested: str | None, methods: list[str]) -> str:
    if requested is None:
        return "ARGS" if "ARGS" in methods else methods[0]
    if requested not in methods:
        fail(f"--baseline {requested}: not in baseline_results.csv, which has {', '.join(methods)}")
    return requested


def describe(summary: pd.DataFrame, num_runs: int) -> list[str]:
    """What the numbers are, in the words of a caption."""
    lines = [
        "Reward: mean ± standard error (sample standard deviation / √n) over n prompts; "
        "intervals: 95% percentile bootstrap over prompts.",
        f"vs {summary['baseline'].iloc[0]}: paired difference on the same prompts; a tie is half a win.",
    ]
    if num_runs > 1:
        lines.append(
            f"{num_runs} runs pooled: a prompt that several runs share counts once, with its mean; "
            "SD of runs: sample standard deviation of the runs' means."
        )
    if "sampled_kl" in summary:
        lines.append("KL: sampled, to the reference policy, per response, in nats; greedy: - log p.")
    return lines


def save_table(summary: pd.DataFrame, caption: list[str], notes: list[str], output_dir: Path) -> None:
    """The table as numbers (.csv) and as people read it (.md, .tex), with its caption and what is missing."""
    shown = readable_table(summary)
    numeric = ["right"] * (len(shown.columns) - 1)
    markdown = shown.to_markdown(index=False, disable_numparse=True, colalign=("left", *numeric))
    remarks = "".join(f"\n- {line}" for line in caption + notes)
    latex = shown.to_latex(index=False, escape=True, column_format="l" + "r" * len(numeric))
    comments = "".join(f"% {line}\n" for line in ["needs \\usepackage{booktabs}", *caption, *notes])

    write_whole(output_dir / f"{NAME}.csv", lambda path: summary.to_csv(path))
    write_whole(output_dir / f"{NAME}.md", lambda path: path.write_text(f"{markdown}\n{remarks}\n", "utf-8"))
    write_whole(output_dir / f"{NAME}.tex", lambda path: path.write_text(comments + latex, "utf-8"))


def save_figure(figure: Figure, output_dir: Path) -> None:
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text
        write_whole(output_dir / f"{NAME}.png", lambda path: figure.savefig(path, format="png", dpi=200))
        # No date inside: the same numbers make the same file.
        undated = {"format": "pdf", "metadata": {"CreationDate": None}}
        write_whole(output_dir / f"{NAME}.pdf", lambda path: figure.savefig(path, **undated))


def main() -> None:
    runs_help = "Run directories, pooled; the current one by default."
    settings, directories = parse_command_line(Settings, __doc__, runs_help)
    for name in ("resamples", "k", "batch_size"):
        if getattr(settings, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.seed < 0:
        fail(f"--seed must be at least 0, not {settings.seed}")
    if not (settings.policy or is_main()):
        return  # there is no model work to share
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)

    runs = read_runs(directories)
    rewards = pool_rewards(runs)
    baseline = choose_baseline(settings.baseline, list(rewards))

    beside_reward, notes = measure_responses(
        runs,
        list(rewards),
        settings.dataset,
        settings.policy,
        {"DPO": settings.dpo_policy, "PPO": settings.ppo_policy},
        settings.k,
        settings.pargs_weight,
        settings.batch_size,
    )
    if not is_main():
        return

    summary = summarise(rewards, baseline, settings.resamples, settings.seed)
    summary.insert(0, "baseline", baseline)
    summary = summary.join(beside_reward)
    notes = [note for run in runs.values() for note in run.notes] + notes

    caption = describe(summary, len(runs))
    print(readable_table(summary).to_markdown(index=False, tablefmt="simple", disable_numparse=True))
    print("\n" + "\n".join(caption))
    if notes:
        print("\nLeft out:\n" + "\n".join(f"- {note}" for note in notes))

    save_table(summary, caption, notes, output_dir)
    save_figure(draw_figure(rewards, summary), output_dir)
    print(f"\nwrote {output_dir / NAME}.csv, .md, .tex (table) and .png, .pdf (figure)")
    print("next: python Evaluation/show_generations.py")


if __name__ == "__main__":
    main()
