"""Do reward models rank prefixes? On held-out preference pairs, for the full and the partial reward model.

Reads   the validation split of summarize_from_feedback/, and the two reward models.
Writes  prefix_accuracy.png, .pdf, .csv: how often the chosen prefix scores above the rejected one, against
        the fraction of the response seen; token_rewards.png, .pdf: the rewards token by token.

As in training, the prefixes of a pair have the same length in tokens of the reward model, here a fraction of
its longer response, and past its own end a response stays whole. Where both prefixes are still the same
there is nothing to rank: those pairs do not count at that fraction.

    python Evaluation/prefix_accuracy.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import matplotlib
import pandas as pd
import torch
from command_line import CommandLine, fail, is_main
from datasets import Dataset, load_from_disk
from matplotlib.figure import Figure
from prefix_figures import READABLE, draw_accuracy, draw_token_rewards
from processes import count_processes, join_processes
from reward_reading import Pair, RewardModel, ask, encode_pair, load_reward_model, read_rewards
from run_files import check_writable, read_template, write_whole
from scipy.stats import binomtest

PERCENTAGES = range(10, 101, 10)
SIDES = ("chosen", "rejected")


@dataclass
class Settings:
    dataset: str = field(
        default="summarize_from_feedback",
        metadata={"help": "Preference pairs; the split `validation` is read."},
    )
    full_reward_model: str = field(
        default="OpenAssistant/reward-model-deberta-v3-large",
        metadata={"help": "The reward model trained on full responses."},
    )
    partial_reward_model: str = field(
        default="partial_reward_modeling_tldr", metadata={"help": "The reward model trained on prefixes."}
    )
    num_pairs: int = field(default=128, metadata={"help": "Pairs to rank, chosen at random."})
    num_examples: int = field(
        default=3,
        metadata={"help": "Pairs shown token by token: the first with responses of readable length."},
    )
    max_length: int = field(
        default=512, metadata={"help": "Longest input in tokens; pairs with a longer one are left out."}
    )
    token_budget: int = field(
        default=4096, metadata={"help": "Tokens read at once; more fill a GPU, fewer take less memory."}
    )
    seed: int = field(default=42, metadata={"help": "Which pairs are chosen."})
    output_dir: str = field(default=".", metadata={"help": "Where the figures and the table go."})


def read_pairs(path: str, seed: int) -> tuple[Dataset, str]:
    """The held-out comparisons in random order, and the template of their prompts."""
    try:
        rows = load_from_disk(path)["validation"].select_columns(["prompt", *SIDES])
    except Exception as error:  # missing, truncated and foreign files raise a dozen different types
        fail_to_read(path, error)
    # In memory: `datasets` would leave a cache file in the artifact it reads.
    return rows.shuffle(seed=seed, keep_in_memory=True), read_template(Path(path))


def fail_to_read(path: str, error: Exception) -> NoReturn:
    fail(
        f"cannot read the validation pairs of {path!r} ({error}); "
        "make them with `python DataProcess/tldr_data_process.py`"
    )


def read_each(rows: Dataset, path: str) -> Iterator[dict[str, str]]:
    """The pairs one by one: a damaged Arrow file opens like a whole one, and fails where it is damaged."""
    for at in range(len(rows)):
        try:
            row = rows[at]
        except Exception as error:
            fail_to_read(path, error)
        if not all(isinstance(text, str) for text in row.values()):
            fail_to_read(path, TypeError(f"a row is not three texts: {str(row)[:200]}"))
        yield row


def prefix_lengths(longest: int) -> list[int]:
    """Tokens at each of PERCENTAGES of a response of `longest` tokens, rounded up."""
    return [-(-percent * longest // 100) for percent in PERCENTAGES]


def fits(reward_model: RewardModel, pair: Pair, lengths: list[int], max_length: int) -> bool:
    limit = min(max_length, reward_model.max_length)
    if not (pair.chosen.ids and pair.rejected.ids):
        return False  # a response that is empty, or of characters that its tokenizer drops
    return all(
        len(question.input_ids) <= limit
        for side in SIDES
        for question in ask(reward_model, pair.prompt_ids, getattr(pair, side), lengths)
    )


def choose_pairs(
    rows: Dataset, reward_models: dict[str, RewardModel], template: str, settings: Settings
) -> tuple[list[dict[str, Pair]], int]:
    """The first pairs that both models can read, as each of them reads them; and how many they cannot."""
    chosen, num_left_out = [], 0
    for row in read_each(rows, settings.dataset):
        pair = {label: encode_pair(model, row, template) for label, model in reward_models.items()}
        if all(
            fits(model, pair[label], prefix_lengths(pair[label].longest), settings.max_length)
            for label, model in reward_models.items()
        ):
            chosen.append(pair)
        else:
            num_left_out += 1
        if len(chosen) == settings.num_pairs:
            break

    if not chosen:
        fail(
            f"none of the {len(rows)} validation pairs has two responses and "
            f"fits into --max_length {settings.max_length}"
        )
    return chosen, num_left_out


def choose_examples(
    pairs: list[dict[str, Pair]], reward_models: dict[str, RewardModel], settings: Settings
) -> list[dict[str, Pair]]:
    """The first pairs whose words can be read below an axis; longer ones only where those are too few."""
    fitting = [
        pair
        for pair in pairs
        if all(
            fits(model, pair[label], list(range(1, pair[label].longest + 1)), settings.max_length)
            for label, model in reward_models.items()
        )
    ]
    fitting.sort(key=lambda pair: max(own.longest for own in pair.values()) > READABLE)
    return fitting[: settings.num_examples]


def score(
    reward_model: RewardModel,
    pairs: list[Pair],
    examples: list[Pair],
    device: torch.device,
    token_budget: int,
    label: str = "",
) -> tuple[pd.DataFrame, list[dict[str, list[float]]]]:
    """One model's rewards: a row per pair and percentage; and, per example and side, one per token."""
    cells, questions = [], []
    for at, pair in enumerate(pairs):
        both = [
            ask(reward_model, pair.prompt_ids, getattr(pair, side), prefix_lengths(pair.longest))
            for side in SIDES
        ]
        for percent, chosen, rejected in zip(PERCENTAGES, *both, strict=True):
            cells.append({"pair": at, "percent": percent, "same": chosen.seen == rejected.seen})
            questions += [chosen, rejected]

    num_ranked = len(questions)
    for pair in examples:
        for side in SIDES:
            response = getattr(pair, side)
            lengths = list(range(1, len(response.ids) + 1))
            questions += ask(reward_model, pair.prompt_ids, response, lengths)

    rewards = read_rewards(reward_model, questions, device, token_budget, label)
    frame = pd.DataFrame(cells)
    frame["chosen"], frame["rejected"] = rewards[:num_ranked:2], rewards[1:num_ranked:2]

    rest = iter(rewards[num_ranked:])
    curves = [{side: [next(rest) for _ in getattr(pair, side).ids] for side in SIDES} for pair in examples]
    return frame, curves


def rank(rewards: pd.DataFrame) -> pd.DataFrame:
    """Ranking accuracy per percentage, with the 95% Wilson interval, from one model's rewards.

    `n` counts the pairs whose prefixes differ; equal rewards of different prefixes are not ranked correctly.
    """
    rows = []
    for percent, cells in rewards.groupby("percent"):
        ranked = cells[~cells["same"]]
        n, correct = len(ranked), int((ranked["chosen"] > ranked["rejected"]).sum())
        row = {"percent": percent, "n": n, "same_prefix": len(cells) - n, "correct": correct}
        if n:
            test = binomtest(correct, n)
            interval = test.proportion_ci(confidence_level=0.95, method="wilson")
            row |= {"accuracy": test.statistic, "interval_low": interval.low, "interval_high": interval.high}
        rows.append(row)
    columns = ["percent", "n", "same_prefix", "correct", "accuracy", "interval_low", "interval_high"]
    return pd.DataFrame(rows, columns=columns)


def save_figure(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # text stays text
        png, pdf = path.with_suffix(".png"), path.with_suffix(".pdf")
        write_whole(png, lambda beside: figure.savefig(beside, format="png", dpi=200))
        # No date inside: the same numbers make the same file.
        undated = {"format": "pdf", "metadata": {"CreationDate": None}}
        write_whole(pdf, lambda beside: figure.savefig(beside, **undated))


def print_table(accuracy: pd.DataFrame) -> None:
    shown = accuracy.assign(
        cell=[
            f"{row.accuracy:.3f} [{row.interval_low:.3f}, {row.interval_high:.3f}]  n={row.n}"
            if row.n
            else "-"
            for row in accuracy.itertuples()
        ]
    ).pivot(index="percent", columns="model", values="cell")
    shown.index = [f"{percent}%" for percent in shown.index]
    shown.columns = [f"{label} reward model" for label in shown.columns]
    print(shown.to_markdown(tablefmt="simple", disable_numparse=True))


def main() -> None:
    parser = CommandLine(Settings, __doc__)
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    for name in ("num_pairs", "num_examples", "max_length", "token_budget"):
        if getattr(settings, name) < 1:
            fail(f"--{name} must be at least 1, not {getattr(settings, name)}")
    if settings.seed < 0:
        fail(f"--seed must be at least 0, not {settings.seed}")
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)

    device = join_processes().device
    rows, template = read_pairs(settings.dataset, settings.seed)
    train = "make it with `python partial_reward_training/tldr_partial_reward_model.py`"
    reward_models = {
        "full": load_reward_model(settings.full_reward_model, "name another with --full_reward_model"),
        "partial": load_reward_model(
            settings.partial_reward_model, f"{train}, or name another with --partial_reward_model"
        ),
    }
    pairs, num_left_out = choose_pairs(rows, reward_models, template, settings)
    examples = choose_examples(pairs, reward_models, settings)

    ranked, curves = {}, {}
    for label, model in reward_models.items():
        own_pairs, own_examples = [pair[label] for pair in pairs], [pair[label] for pair in examples]
        rewards, curves[label] = score(
            model, own_pairs, own_examples, device, settings.token_budget, f"{label} reward model"
        )
        ranked[label] = rank(rewards)
    if not is_main():
        return

    accuracy = pd.concat(ranked, names=["model"]).reset_index("model")
    figures = {
        "prefix_accuracy": draw_accuracy(accuracy, len(pairs)),
        "token_rewards": draw_token_rewards(examples, curves, reward_models),
    }
    write_whole(output_dir / "prefix_accuracy.csv", lambda path: accuracy.to_csv(path, index=False))
    for name, figure in figures.items():
        save_figure(figure, output_dir / name)

    print(f"\nRanking accuracy on prefixes of {len(pairs)} validation pairs, with 95% Wilson intervals;")
    print("n: pairs whose prefixes differ at that fraction of the response\n")
    print_table(accuracy)
    if num_left_out or len(pairs) < settings.num_pairs:
        print(
            f"\n{num_left_out} pairs left out, empty or over --max_length; "
            f"{len(pairs)} of {settings.num_pairs} ranked"
        )
    print(f"\nwrote {output_dir / 'prefix_accuracy'}.csv, .png, .pdf (figure and table), {count_processes()}")
    print(f"wrote {output_dir / 'token_rewards'}.png, .pdf (figure)")
    print("next: python Evaluation/show_generations.py")


if __name__ == "__main__":
    main()
