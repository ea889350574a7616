"""Make the prefix preference dataset: every prefix pair of every comparison, as a reward model reads it.

Reads   summarize_from_feedback/ and the reward model's tokenizer and configuration.
Writes  summarize_from_feedback_partial/: splits `train` and `validation`, one row (`pair`, `length`) for each
        prefix pair; pairs/ holds the ids of each comparison once; processing.json says how to put an
        input together. Stage 2 expands entry i into ids, segment ids and masks.

Both responses are tokenised, the shorter is padded to the longer, and every length from 1 to the longer
makes an entry; past its own end a response stays whole. Entries over `max_length` tokens are dropped.
`--lengths_per_comparison 4` keeps four lengths of each training comparison, drawn at random, so that more
comparisons cost the same.

    python DataProcess/tldr_data_process_partial.py
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dataset_files import recover, save_dataset, workspace
from datasets import Dataset, DatasetDict, Features, List, Value
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedTokenizerFast

from pargs.chat import with_turns
from pargs.cli import changed_flags, fail, is_main, next_step, parse_settings, run_script, setting
from pargs.encoding import encode_prompts
from pargs.files import MAKE_PAIRS, read_dataset
from pargs.models import check_eos, is_causal, load_config, load_tokenizer, longest_input
from pargs.prefixes import SIDES, PairFrame, encode_with_prefixes, make_frame
from pargs.processes import hide_bars_in_logs


@dataclass
class Settings:
    dataset: str = setting("summarize_from_feedback", "Preference pairs to read.")
    reward_model: str = setting(
        "OpenAssistant/reward-model-deberta-v3-large",
        "The reward model to be trained: its tokenizer makes the entries.",
    )
    num_comparisons: NonNegativeInt = setting(
        8192, "Training comparisons to use, chosen at random; 0 for all."
    )
    num_validation_comparisons: NonNegativeInt = setting(1024, "Validation comparisons to use; 0 for all.")
    lengths_per_comparison: NonNegativeInt = setting(
        0, "Prefix lengths to keep of each training comparison, at random; 0 for all."
    )
    max_length: PositiveInt = setting(512, "Longest input in tokens; longer entries are dropped.")
    seed: NonNegativeInt = setting(42, "Which comparisons, and which of their lengths, are chosen.")
    output: str = setting("summarize_from_feedback_partial", "Folder to write.")


Ids = List(Value("int32"))
Reencoded = List({"length": Value("int32"), "ids": Ids})
PAIR_FEATURES = Features(
    {
        "prompt_ids": Ids,
        "chosen_ids": Ids,
        "rejected_ids": Ids,
        # The few prefixes whose text, encoded afresh, is not a slice of the ids above.
        "chosen_reencoded": Reencoded,
        "rejected_reencoded": Reencoded,
        "lengths": List(Value("int32")),  # the prefix lengths that fit into max_length
        "num_dropped": Value("int32"),
    }
)
ENTRY_FEATURES = Features({"pair": Value("int32"), "length": Value("int32")})


def load_reward_tokenizer(name: str) -> tuple[PreTrainedTokenizerFast, bool, int]:
    """The reward model's tokenizer, whether the model is causal (decoder-only), and how much it reads."""
    hint = "name another with --reward_model"
    tokenizer, config = load_tokenizer(name, hint), load_config(name, hint)
    causal = is_causal(config)
    if causal:
        check_eos(name, tokenizer)
    return tokenizer, causal, longest_input(config, tokenizer)


def choose_comparisons(rows: Dataset, count: int, seed: int) -> Dataset:
    if not count:
        return rows
    # In memory: `datasets` would leave cache files in the artifact it reads.
    shuffled = rows.shuffle(seed=seed, keep_in_memory=True)
    return shuffled.select(range(min(count, len(rows))), keep_in_memory=True)


def encode_pairs(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerFast,
    frame: PairFrame,
    causal: bool,
    template: str,
    max_length: int,
) -> dict[str, list]:
    """Encode a batch of comparisons and all their prefixes."""
    prompts = with_turns(batch["prompt"], batch.get("turns"))
    prompt_ids = encode_prompts(tokenizer, prompts, template)
    sides = [encode_with_prefixes(tokenizer, prompts, batch[side], causal) for side in SIDES]

    encoded = {"prompt_ids": prompt_ids, "lengths": [], "num_dropped": []}
    for side, responses in zip(SIDES, sides, strict=True):
        encoded[f"{side}_ids"] = [response.ids for response in responses]
        encoded[f"{side}_reencoded"] = [
            [{"length": length, "ids": ids} for length, ids in response.reencoded.items()]
            for response in responses
        ]

    for own_ids, *pair in zip(prompt_ids, *sides, strict=True):
        room = max_length - frame.num_special - len(own_ids)
        longest = max(len(response.ids) for response in pair)
        fits = [
            length
            for length in range(1, longest + 1)
            if all(len(response.prefix(length)) <= room for response in pair)
        ]
        encoded["lengths"].append(fits)
        encoded["num_dropped"].append(longest - len(fits))
    return encoded


def keep_lengths(batch: dict[str, list], indices: list[int], count: int, seed: int) -> dict[str, list]:
    """Of each comparison's prefix lengths `count` at random, in order."""
    drawn = []
    for pair, lengths in zip(indices, batch["lengths"], strict=True):
        rng = random.Random(f"{seed} {pair}")
        drawn.append(sorted(rng.sample(lengths, min(count, len(lengths)))))
    return {"lengths": drawn}


def list_entries(batch: dict[str, list], indices: list[int]) -> dict[str, list[int]]:
    """One row for each prefix pair: which comparison, and how long a prefix."""
    rows = [
        (pair, length) for pair, lengths in zip(indices, batch["lengths"], strict=True) for length in lengths
    ]
    return {"pair": [pair for pair, _ in rows], "length": [length for _, length in rows]}


def build_split(
    rows: Dataset, split: str, encoding: dict, work: Path, lengths_per_comparison: int, seed: int
) -> tuple[Dataset, Dataset]:
    """The pairs of a split with their ids, and its entries; files are written to `work`."""
    pairs = rows.map(
        encode_pairs,
        batched=True,
        batch_size=256,
        fn_kwargs=encoding,
        remove_columns=rows.column_names,
        features=PAIR_FEATURES,
        load_from_cache_file=False,
        cache_file_name=str(work / f"{split}-pairs.arrow"),
        desc=f"{split}: encoding prefixes",
    )
    if lengths_per_comparison:
        pairs = pairs.map(
            keep_lengths,
            batched=True,
            with_indices=True,
            fn_kwargs={"count": lengths_per_comparison, "seed": seed},
            features=PAIR_FEATURES,
            load_from_cache_file=False,
            cache_file_name=str(work / f"{split}-lengths.arrow"),
            desc=f"{split}: drawing lengths",
        )
    entries = pairs.map(
        list_entries,
        batched=True,
        with_indices=True,
        remove_columns=pairs.column_names,
        features=ENTRY_FEATURES,
        load_from_cache_file=False,
        cache_file_name=str(work / f"{split}-entries.arrow"),
        desc=f"{split}: listing entries",
    )
    if not len(entries):
        fail(f"no prefix of split {split!r} fits into --max_length {encoding['max_length']}")
    return pairs, entries


def summary_line(split: str, pairs: Dataset, entries: Dataset) -> str:
    reencoded = sum(map(len, chain(pairs["chosen_reencoded"], pairs["rejected_reencoded"])))
    return (
        f"  {split:<10} {len(entries):>9} prefix pairs of {len(pairs)} comparisons; "
        f"{sum(pairs['num_dropped'])} too long and dropped, {reencoded} re-encoded"
    )


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if not is_main():
        return  # under a launcher one process is enough
    hide_bars_in_logs()

    if Path(settings.output).resolve() == Path(settings.dataset).resolve():
        fail("--output would replace --dataset; name another folder")

    recover(settings.dataset)
    columns = ["prompt", *SIDES]
    dataset, notes = read_dataset(settings.dataset, {"train": columns, "validation": columns}, MAKE_PAIRS)
    tokenizer, causal, longest = load_reward_tokenizer(settings.reward_model)
    if longest < settings.max_length:
        print(f"{settings.reward_model} reads {longest} tokens: longer entries are dropped")
    encoding = {
        "tokenizer": tokenizer,
        "frame": make_frame(tokenizer, causal),
        "causal": causal,
        "template": notes["template"],
        "max_length": min(settings.max_length, longest),
    }

    counts = {"train": settings.num_comparisons, "validation": settings.num_validation_comparisons}
    pairs, entries = DatasetDict(), DatasetDict()
    with workspace(settings.output) as work:
        for split, count in counts.items():
            rows = choose_comparisons(dataset[split], count, settings.seed)
            lengths = settings.lengths_per_comparison if split == "train" else 0
            pairs[split], entries[split] = build_split(rows, split, encoding, work, lengths, settings.seed)

        notes = {
            "reward_model": settings.reward_model,
            "causal": causal,
            "template": encoding["template"],
            "max_length": settings.max_length,
            "lengths_per_comparison": settings.lengths_per_comparison,
            "seed": settings.seed,
            "segment_ids": "token_type_ids" in tokenizer.model_input_names and not causal,
            "frame": encoding["frame"].to_json(),
        }
        save_dataset({".": entries, "pairs": pairs}, notes, settings.output)

        print(f"\nwrote {settings.output}/ for {settings.reward_model}")
        for split in counts:
            print(summary_line(split, pairs[split], entries[split]))
    flags = changed_flags(
        dataset=(settings.output, Settings.output),
        model_name_or_path=(settings.reward_model, Settings.reward_model),
        max_length=(str(settings.max_length), str(Settings.max_length)),
    )
    next_step("partial_reward_training/tldr_partial_reward_model.py", *flags)


if __name__ == "__main__":
    run_script(main, "the same command starts again; a dataset that was here is as it was")
