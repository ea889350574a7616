"""Make the prefix preference dataset: every prefix pair of every comparison, as a reward model reads it.

Reads   summarize_from_feedback/ and the reward model's tokenizer and configuration.
Writes  summarize_from_feedback_partial/: splits `train` and `validation`, one row (`pair`, `length`) for each
        prefix pair; pairs/ holds the ids of each comparison once; processing.json says how to put an
        input together. Stage 2 expands entry i into ids, segment ids and masks.

Both responses are tokenised, the shorter is padded to the longer, and every length from 1 to the longer
makes an entry; past its own end a response stays whole. Entries over `max_length` tokens are dropped.

    python DataProcess/tldr_data_process_partial.py
"""

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from dataset_files import read_dataset, save_dataset, workspace
from datasets import Dataset, DatasetDict, Features, List, Value
from pair_frame import PairFrame, causal_frame, pair_frame
from script_settings import fail, is_main, parse_settings
from text_encoding import encode_prompts, encode_responses, encode_texts
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


@dataclass
class Settings:
    dataset: str = field(default="summarize_from_feedback", metadata={"help": "Preference pairs to read."})
    reward_model: str = field(
        default="OpenAssistant/reward-model-deberta-v3-large",
        metadata={"help": "The reward model to be trained: its tokenizer makes the entries."},
    )
    num_comparisons: int = field(
        default=8192, metadata={"help": "Training comparisons to use, chosen at random; 0 for all."}
    )
    num_validation_comparisons: int = field(
        default=1024, metadata={"help": "Validation comparisons to use; 0 for all."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Longest input in tokens; longer entries are dropped."}
    )
    seed: int = field(default=42, metadata={"help": "Which comparisons are chosen."})
    output: str = field(default="summarize_from_feedback_partial", metadata={"help": "Folder to write."})


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


def load_reward_tokenizer(name: str) -> tuple[PreTrainedTokenizerBase, bool, int]:
    """The reward model's tokenizer, whether the model is causal (decoder-only), and how much it reads."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load the tokenizer of {name!r}: {error}; name another with --reward_model")

    if not tokenizer.is_fast:
        fail(f"{name!r} has no fast tokenizer, which the prefix dataset needs")
    causal = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if causal and tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name!r} has no EOS, which ends a response of a causal reward model")
    # A tokenizer that does not know says 1e30; some configurations say nothing.
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return tokenizer, causal, min(positions, tokenizer.model_max_length)


def choose_comparisons(rows: Dataset, count: int, seed: int) -> Dataset:
    if count < 0:
        fail(f"the number of comparisons must be 0 (all) or more, not {count}")
    if not count:
        return rows
    # In memory: `datasets` would leave cache files in the artifact it reads.
    return rows.shuffle(seed=seed, keep_in_memory=True).select(
        range(min(count, len(rows))), keep_in_memory=True
    )


def encode_pairs(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    frame: PairFrame,
    causal: bool,
    template: str,
    max_length: int,
) -> dict[str, list]:
    """Encode a batch of comparisons and all their prefixes."""
    prompts = encode_prompts(tokenizer, batch["prompt"], template)
    sides = {
        side: encode_side(batch["prompt"], batch[side], tokenizer, causal) for side in ("chosen", "rejected")
    }

    encoded = {"prompt_ids": prompts, "lengths": [], "num_dropped": []}
    for side, (ids, reencoded) in sides.items():
        encoded[f"{side}_ids"], encoded[f"{side}_reencoded"] = ids, reencoded

    for row, prompt_ids in enumerate(prompts):
        room = max_length - frame.num_special - len(prompt_ids)
        longest = max(len(ids[row]) for ids, _ in sides.values())
        fits = [
            length
            for length in range(1, longest + 1)
            if all(prefix_size(ids[row], extra[row], length) <= room for ids, extra in sides.values())
        ]
        encoded["lengths"].append(fits)
        encoded["num_dropped"].append(longest - len(fits))
    return encoded


def encode_side(
    prompts: list[str], responses: list[str], tokenizer: PreTrainedTokenizerBase, causal: bool
) -> tuple[list[list[int]], list[list[dict]]]:
    """Ids of each response, and for each the prefixes that re-encode differently from a slice."""
    if causal:
        # A causal reward model reads the policy's ids, never re-encoded text; EOS is the last token of a
        # finished response, so only the longest prefix carries it.
        ids = encode_responses(tokenizer, prompts, responses)
        return [response_ids + [tokenizer.eos_token_id] for response_ids in ids], [[] for _ in ids]

    ids = encode_texts(tokenizer, responses)
    texts = [prefix_texts(tokenizer, response, own) for response, own in zip(responses, ids, strict=True)]
    again = iter(encode_texts(tokenizer, list(chain.from_iterable(texts))))
    reencoded = []
    for own, prefixes in zip(ids, texts, strict=True):
        fresh = [next(again) for _ in prefixes]
        reencoded.append(
            [
                {"length": length, "ids": prefix_ids}
                for length, prefix_ids in enumerate(fresh, start=1)
                if prefix_ids != own[:length]
            ]
        )
    return ids, reencoded


def prefix_texts(tokenizer: PreTrainedTokenizerBase, response: str, ids: list[int]) -> list[str]:
    """The text of every proper prefix of `ids`, the ids of `response`, as a policy would have written it."""
    prefixes = tokenizer.backend_tokenizer.decode_batch(
        [ids[:length] for length in range(1, len(ids))], skip_special_tokens=False
    )

    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        # A decoded unknown token would be spelt "[UNK]"; the policy writes the character itself.
        known = ids.index(tokenizer.unk_token_id)
        encoded = tokenizer(response, add_special_tokens=False, split_special_tokens=True)
        if encoded["input_ids"] == ids:
            ends = [end for _, end in encoded.encodings[0].offsets]
            prefixes[known:] = [response[: ends[at]] for at in range(known, len(ids) - 1)]

    # Some decoders strip the space that the response begins with.
    space = " " if response.startswith(" ") else ""
    return [prefix if prefix.startswith(space) else space + prefix for prefix in prefixes]


def prefix_size(ids: list[int], reencoded: list[dict], length: int) -> int:
    """Tokens in the prefix of `length` tokens of a response."""
    for prefix in reencoded:
        if prefix["length"] == length:
            return len(prefix["ids"])
    return min(length, len(ids))


def list_entries(batch: dict[str, list], indices: list[int]) -> dict[str, list[int]]:
    """One row for each prefix pair: which comparison, and how long a prefix."""
    rows = [
        (pair, length) for pair, lengths in zip(indices, batch["lengths"], strict=True) for length in lengths
    ]
    return {"pair": [pair for pair, _ in rows], "length": [length for _, length in rows]}


def build_split(rows: Dataset, split: str, encoding: dict, work: Path) -> tuple[Dataset, Dataset]:
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

    if Path(settings.output).resolve() == Path(settings.dataset).resolve():
        fail("--output would replace --dataset; name another folder")

    columns = dict.fromkeys(("train", "validation"), ["prompt", "chosen", "rejected"])
    dataset, notes = read_dataset(
        settings.dataset, columns, made_by="python DataProcess/tldr_data_process.py"
    )
    tokenizer, causal, longest_input = load_reward_tokenizer(settings.reward_model)
    if longest_input < settings.max_length:
        print(f"{settings.reward_model} reads {longest_input} tokens: longer entries are dropped")
    encoding = {
        "tokenizer": tokenizer,
        "frame": causal_frame(tokenizer) if causal else pair_frame(tokenizer),
        "causal": causal,
        "template": notes.get("template", "{post}"),
        "max_length": min(settings.max_length, longest_input),
    }

    counts = {"train": settings.num_comparisons, "validation": settings.num_validation_comparisons}
    pairs, entries = DatasetDict(), DatasetDict()
    with workspace(settings.output) as work:
        for split, count in counts.items():
            rows = choose_comparisons(dataset[split], count, settings.seed)
            pairs[split], entries[split] = build_split(rows, split, encoding, work)

        how = {
            "reward_model": settings.reward_model,
            "causal": causal,
            "template": encoding["template"],
            "max_length": settings.max_length,
            "seed": settings.seed,
            "segment_ids": "token_type_ids" in tokenizer.model_input_names and not causal,
            "frame": encoding["frame"].to_json(),
        }
        save_dataset({".": entries, "pairs": pairs}, how, settings.output)

        print(f"\nwrote {settings.output}/ for {settings.reward_model}")
        for split in counts:
            print(summary_line(split, pairs[split], entries[split]))
    print("next: python partial_reward_training/tldr_partial_reward_model.py")


if __name__ == "__main__":
    main()
