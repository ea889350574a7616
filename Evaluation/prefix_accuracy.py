"""Do reward models rank prefixes? On held-out preference pairs, for the full and the partial reward model.

Reads   the validation split of summarize_from_feedback/, and the two reward models.
Writes  prefix_accuracy.png, .pdf, .csv: how often the chosen prefix scores above the rejected one, against
        the fraction of the response seen; prefix_accuracy_paired.csv: the two models on the same pairs;
        token_rewards.png, .pdf: the rewards token by token; prefix_accuracy.json: where they come from.

As in training, the prefixes of a pair have the same length in tokens of the reward model, here a fraction of
its longer response, and past its own end a response stays whole. Where both prefixes are still the same
there is nothing to rank: those pairs do not count at that fraction. No two pairs are of one prompt.

    python Evaluation/prefix_accuracy.py
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from prefix_figures import READABLE, draw_accuracy, draw_token_rewards, name_models
from pydantic import NonNegativeInt, PositiveInt
from reward_reading import Pair, ask, encode_pair, read_rewards

from pargs.cli import fail, is_main, next_step, parse_settings, run_script, setting, warn
from pargs.figures import save_figure
from pargs.files import MAKE_PAIRS, TRAIN_PARTIAL, check_writable, read_dataset, write_text, write_whole
from pargs.models import RewardModel, load_reward_model
from pargs.origin import Origin, identify
from pargs.prefixes import SIDES
from pargs.processes import count_processes, describe_device, join_processes
from pargs.runs import GuideEos
from pargs.statistics import bootstrap_interval, mcnemar, proportion

PERCENTAGES = range(10, 101, 10)


@dataclass
class Settings:
    dataset: str = setting("summarize_from_feedback", "Preference pairs; the split `validation` is read.")
    full_reward_model: str = setting("OpenAssistant/reward-model-deberta-v3-large", "Trained on whole texts.")
    partial_reward_model: str = setting("partial_reward_modeling_tldr", "Trained on prefixes.")
    full_eos: GuideEos = setting(
        "finished", "Where the full model reads an EOS, if it is decoder-only: always closes every prefix."
    )
    num_pairs: PositiveInt = setting(128, "Pairs to rank, chosen at random.")
    num_examples: PositiveInt = setting(3, "Pairs shown token by token: the first of readable length.")
    max_length: PositiveInt = setting(512, "Longest input in tokens; pairs with a longer one are left out.")
    token_budget: PositiveInt = setting(4096, "Tokens read at once; more fill a GPU, fewer take less memory.")
    seed: NonNegativeInt = setting(42, "Which pairs are chosen, and of the bootstrap.")
    resamples: PositiveInt = setting(9999, "Bootstrap resamples.")
    output_dir: str = setting(".", "Where the figures and the table go.")
    overwrite: bool = setting(False, "Also over figures of more pairs.")


def keep_figures_of_more(settings: Settings) -> None:
    """Exit where a quick look at a few pairs would replace the figures of more."""
    path = Path(settings.output_dir, "prefix_accuracy.json")
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["num_pairs"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # none that is known to be of more
    if settings.num_pairs < pairs and not settings.overwrite:
        fail(
            f"{path} is of {pairs} pairs, more than --num_pairs {settings.num_pairs}: "
            "keep it with another --output_dir, or replace it with --overwrite"
        )


def read_pairs(settings: Settings) -> tuple[Dataset, str]:
    """The held-out comparisons in random order, and the template of their prompts."""
    dataset, notes = read_dataset(settings.dataset, {"validation": ["prompt", *SIDES]}, MAKE_PAIRS)
    # In memory: `datasets` would leave a cache file in the artifact it reads.
    rows = dataset["validation"].shuffle(seed=settings.seed, keep_in_memory=True)
    return rows, notes["template"]


def load_reward_models(settings: Settings) -> dict[str, RewardModel]:
    """Both models, which read `max_length` tokens at most."""
    hints = {
        "full": "name another with --full_reward_model",
        "partial": f"make it with `{TRAIN_PARTIAL}`, or name another with --partial_reward_model",
    }
    reward_models = {}
    for label, hint in hints.items():
        name, device = getattr(settings, f"{label}_reward_model"), join_processes().device
        model = load_reward_model(name, torch.float32, device, settings.token_budget, hint)
        model.max_length = min(model.max_length, settings.max_length)
        reward_models[label] = model
    return reward_models


def choose_readings(reward_models: dict[str, RewardModel], full_eos: GuideEos) -> dict[str, GuideEos]:
    """Where each model reads an EOS: the partial one as it is trained, the full one as it is asked to."""
    full = reward_models["full"]
    if full_eos != "finished" and not full.causal:
        warn(f"{full.name!r} is an encoder, which reads no EOS: --full_eos {full_eos} changes nothing")
        full_eos = "finished"
    return {"full": full_eos, "partial": "finished"}


def prefix_lengths(longest: int) -> list[int]:
    """Tokens at each of PERCENTAGES of a response of `longest` tokens, rounded up."""
    return [-(-percent * longest // 100) for percent in PERCENTAGES]


def fits(reward_model: RewardModel, pair: Pair) -> bool:
    """Whether both responses have tokens, and the model can read them and all their prefixes."""
    responses = pair.sides.values()
    room = reward_model.max_length - reward_model.frame.num_special - len(pair.prompt_ids)
    inputs = [ids for response in responses for ids in (response.ids, *response.reencoded.values())]
    return all(response.ids for response in responses) and max(map(len, inputs)) <= room


def choose_pairs(
    rows: Dataset, reward_models: dict[str, RewardModel], template: str, settings: Settings
) -> tuple[list[dict[str, Pair]], Counter[str]]:
    """The first pairs that both models can read, as each of them reads them; and why others are left out."""
    chosen: dict[str, dict[str, Pair]] = {}  # one of each prompt: prompts are the sample
    left_out: Counter[str] = Counter()
    for row in rows:
        if row["prompt"] in chosen:
            left_out["further ones of a prompt"] += 1
            continue
        pair = {label: encode_pair(model, row, template) for label, model in reward_models.items()}
        if all(fits(model, pair[label]) for label, model in reward_models.items()):
            chosen[row["prompt"]] = pair
        else:
            left_out["empty or over --max_length"] += 1
        if len(chosen) == settings.num_pairs:
            break

    if not chosen:
        fail(
            f"none of the {len(rows)} validation pairs has two responses and "
            f"fits into --max_length {settings.max_length}"
        )
    return list(chosen.values()), left_out


def choose_examples(pairs: list[dict[str, Pair]], count: int) -> list[dict[str, Pair]]:
    """The first pairs whose words can be read below an axis; longer ones only where those are too few."""
    return sorted(pairs, key=lambda pair: max(own.longest for own in pair.values()) > READABLE)[:count]


def score(
    reward_model: RewardModel,
    pairs: list[Pair],
    examples: list[Pair],
    label: str = "",
    eos: GuideEos = "finished",
) -> tuple[pd.DataFrame, list[dict[str, list[float]]]]:
    """One model's rewards: a row per pair and percentage; and, per example and side, one per token."""
    cells, questions = [], []
    for at, pair in enumerate(pairs):
        lengths = prefix_lengths(pair.longest)
        both = [ask(reward_model, pair.prompt_ids, pair.sides[side], lengths, eos) for side in SIDES]
        for percent, chosen, rejected in zip(PERCENTAGES, *both, strict=True):
            cells.append({"pair": at, "percent": percent, "same": chosen.seen == rejected.seen})
            questions += [chosen, rejected]

    num_ranked = len(questions)
    for pair in examples:
        for response in pair.sides.values():
            lengths = list(range(1, len(response.ids) + 1))
            questions += ask(reward_model, pair.prompt_ids, response, lengths, eos)

    rewards = read_rewards(reward_model, questions, label)
    frame = pd.DataFrame(cells)
    frame["chosen"], frame["rejected"] = rewards[:num_ranked:2], rewards[1:num_ranked:2]

    rest = iter(rewards[num_ranked:])
    curves = [{side: [next(rest) for _ in pair.sides[side].ids] for side in SIDES} for pair in examples]
    return frame, curves


def rank(rewards: pd.DataFrame) -> pd.DataFrame:
    """Ranking accuracy per percentage, with the 95% Wilson interval, from one model's rewards.

    `n` counts the pairs whose prefixes differ; equal rewards of different prefixes are not ranked correctly.
    """
    rows = []
    for percent, cells in rewards.groupby("percent"):
        ranked = cells[~cells["same"]]
        correct = proportion(int((ranked["chosen"] > ranked["rejected"]).sum()), len(ranked))
        row = {"percent": percent, "n": len(ranked), "same_prefix": len(cells) - len(ranked)}
        row |= {"correct": correct["count"], "accuracy": correct["rate"]}
        rows.append(row | {"interval_low": correct["low"], "interval_high": correct["high"]})
    return pd.DataFrame(rows)


def compare(rewards: dict[str, pd.DataFrame], resamples: int, seed: int) -> pd.DataFrame:
    """Both models on the same pairs, a row per percentage: who alone is right, and how much more often.

    `n` counts the pairs whose prefixes differ for both models. `difference` is the partial model's accuracy
    less the full one's, with its 95% percentile bootstrap interval; `p` is McNemar's exact test.
    """
    full, partial = (rewards[label].set_index(["percent", "pair"]) for label in ("full", "partial"))
    right = pd.DataFrame({"full": full["chosen"] > full["rejected"]})
    right["partial"] = partial["chosen"] > partial["rejected"]
    right["ranked"] = ~(full["same"] | partial["same"])

    rows = []
    for percent, cells in right.groupby(level="percent"):
        ranked = cells[cells["ranked"]]
        gains = ranked["partial"].astype(float) - ranked["full"].astype(float)  # 1: the partial model alone
        full_only, partial_only = int((gains < 0).sum()), int((gains > 0).sum())
        low, high = bootstrap_interval(gains.to_numpy(), resamples, seed)
        row = {"percent": percent, "n": len(ranked), "full_only": full_only, "partial_only": partial_only}
        row |= {"difference": gains.mean(), "interval_low": low, "interval_high": high}
        rows.append(row | {"p": mcnemar(full_only, partial_only) if len(ranked) else float("nan")})
    return pd.DataFrame(rows)


def print_table(accuracy: pd.DataFrame, names: dict[str, str]) -> None:
    shown = accuracy.assign(
        cell=[
            f"{row.accuracy:.3f} [{row.interval_low:.3f}, {row.interval_high:.3f}]  n={row.n}"
            if row.n
            else "-"
            for row in accuracy.itertuples()
        ]
    ).pivot(index="percent", columns="model", values="cell")
    shown.index = [f"{percent}%" for percent in shown.index]
    shown.columns = [names[label] for label in shown.columns]
    print(shown.to_markdown(tablefmt="simple", disable_numparse=True))


def show_difference(mean: float, low: float, high: float) -> str:
    """With its interval, which a single pair does not have."""
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low == low else "")


def print_comparison(paired: pd.DataFrame) -> None:
    shown = pd.DataFrame(
        {
            "": [f"{percent}%" for percent in paired["percent"]],
            "pairs": paired["n"].astype(str),
            "only full right": paired["full_only"].astype(str),
            "only partial right": paired["partial_only"].astype(str),
            "difference": [
                show_difference(row.difference, row.interval_low, row.interval_high) if row.n else "-"
                for row in paired.itertuples()
            ],
            "p": [f"{row.p:.3f}" if row.n else "-" for row in paired.itertuples()],
        }
    )
    print(shown.to_markdown(index=False, tablefmt="simple", disable_numparse=True))


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    output_dir = Path(settings.output_dir)
    check_writable(output_dir)
    keep_figures_of_more(settings)

    rows, template = read_pairs(settings)
    reward_models = load_reward_models(settings)
    pairs, left_out = choose_pairs(rows, reward_models, template, settings)
    examples = choose_examples(pairs, settings.num_examples)
    readings = choose_readings(reward_models, settings.full_eos)
    names = name_models(readings)

    rewards, curves = {}, {}
    for label, model in reward_models.items():
        own_pairs, own_examples = [pair[label] for pair in pairs], [pair[label] for pair in examples]
        rewards[label], curves[label] = score(model, own_pairs, own_examples, names[label], readings[label])
    if not is_main():
        return

    ranked = {label: rank(of_model).assign(eos=readings[label]) for label, of_model in rewards.items()}
    accuracy = pd.concat(ranked, names=["model"]).reset_index("model")
    paired = compare(rewards, settings.resamples, settings.seed)
    figures = {
        "prefix_accuracy": draw_accuracy(accuracy, paired, len(pairs), names),
        "token_rewards": draw_token_rewards(examples, curves, reward_models, names),
    }
    for name, table in {"prefix_accuracy": accuracy, "prefix_accuracy_paired": paired}.items():
        write_whole(output_dir / f"{name}.csv", lambda path, table=table: table.to_csv(path, index=False))
    for name, figure in figures.items():
        save_figure(figure, output_dir / name)
    models = {model.name: identify(model.name, model.model.config) for model in reward_models.values()}
    record = {"num_pairs": len(pairs), "models": models}
    record["origin"] = Origin.of(settings, describe_device()).model_dump()
    write_text(output_dir / "prefix_accuracy.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    print(f"\nRanking accuracy on prefixes of {len(pairs)} validation pairs, with 95% Wilson intervals;")
    print("n: pairs whose prefixes differ at that fraction of the response\n")
    print_table(accuracy, names)
    print("\nPartial less full, on the pairs that both rank: 95% percentile bootstrap over pairs;")
    print("p: McNemar's exact test, each fraction by itself\n")
    print_comparison(paired)
    if left_out or len(pairs) < settings.num_pairs:
        reasons = [f"{count} pairs left out, {reason}" for reason, count in left_out.items()]
        print("\n" + "; ".join([*reasons, f"{len(pairs)} of {settings.num_pairs} ranked"]))
    print(f"\nwrote {output_dir / 'prefix_accuracy'}.csv, .png, .pdf (figure and table), {count_processes()}")
    print(f"wrote {output_dir / 'prefix_accuracy_paired.csv'} (the two models compared)")
    print(f"wrote {output_dir / 'token_rewards'}.png, .pdf (figure)")
    next_step("Evaluation/show_generations.py")


if __name__ == "__main__":
    run_script(main, "the same command starts again")
