"""From the compact prefix dataset to a batch: expand entries, pick those to evaluate on, pad."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")


def expand_entries(
    batch: dict[str, list[int]], pairs: Dataset, frame: dict[str, Any]
) -> dict[str, list[list[int] | int]]:
    """Turn rows (`pair`, `length`) into the inputs of both sides: ids, segment ids and mask.

    `frame` holds the reward tokenizer's special tokens: `start + prompt + middle + prefix + end`.
    """
    columns = [
        f"{side}_{kind}" for side in SIDES for kind in ("input_ids", "token_type_ids", "attention_mask")
    ]
    expanded = {name: [] for name in [*columns, "quarter"]}
    rows = {pair: pairs[pair] for pair in set(batch["pair"])}

    for pair, length in zip(batch["pair"], batch["length"], strict=True):
        row = rows[pair]
        for side in SIDES:
            prefix = prefix_ids(row[f"{side}_ids"], row[f"{side}_reencoded"], length)
            ids = frame["start"] + row["prompt_ids"] + frame["middle"] + prefix + frame["end"]
            segments = (
                frame["start_segments"]
                + [frame["prompt_segment"]] * len(row["prompt_ids"])
                + frame["middle_segments"]
                + [frame["response_segment"]] * len(prefix)
                + frame["end_segments"]
            )
            expanded[f"{side}_input_ids"].append(ids)
            expanded[f"{side}_token_type_ids"].append(segments)
            expanded[f"{side}_attention_mask"].append([1] * len(ids))

        longest = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        expanded["quarter"].append(quarter_of(length, longest))
    return expanded


def prefix_ids(ids: list[int], reencoded: list[dict], length: int) -> list[int]:
    """The prefix of `length` tokens; past its end a response stays whole."""
    for prefix in reencoded:
        if prefix["length"] == length:
            return prefix["ids"]
    return ids[:length]


def quarter_of(length: int | np.ndarray, longest: int | np.ndarray) -> int | np.ndarray:
    """Which quarter (0 to 3) of a response of `longest` tokens its prefix of `length` tokens ends in."""
    return (4 * length - 1) // longest


def sample_by_quarter(
    entries: Dataset, pairs: Dataset, num_comparisons: int, num_entries: int, seed: int
) -> Dataset:
    """Choose comparisons, then as many of their entries from each quarter of the response."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(pairs))[:num_comparisons]
    longest = np.zeros(len(pairs), dtype=int)
    for pair in chosen:
        longest[pair] = max(len(pairs[int(pair)][f"{side}_ids"]) for side in SIDES)

    pair_of, length_of = np.array(entries["pair"]), np.array(entries["length"])
    candidates = np.flatnonzero(np.isin(pair_of, chosen))
    quarters = quarter_of(length_of[candidates], longest[pair_of[candidates]])

    picked = [
        generator.permutation(candidates[quarters == quarter])[: num_entries // 4] for quarter in range(4)
    ]
    return entries.select(np.sort(np.concatenate(picked)), keep_in_memory=True)


@dataclass
class EntryCollator:
    """Pad a batch of expanded entries: first all chosen inputs, then all rejected ones."""

    tokenizer: PreTrainedTokenizerBase
    segment_ids: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        kinds = ["input_ids", "attention_mask"] + ["token_type_ids"] * self.segment_ids
        inputs = {
            kind: [example[f"{side}_{kind}"] for side in SIDES for example in examples] for kind in kinds
        }

        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["quarters"] = torch.tensor([example["quarter"] for example in examples])
        return batch


@dataclass
class PairCollator:
    """Pad a batch of whole comparisons for a causal model, which scores every prefix in one pass.

    `read_out` [2 * batch, longest] is where the reward of each prefix length stands in the sequence,
    -1 where there is no such entry; `quarters` [entries] belongs to the entries in row order.
    """

    pad_token_id: int
    start: list[int]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, read_out, quarters = [], [], []
        for side in SIDES:
            for example in examples:
                prompt, response = self.start + example["prompt_ids"], example[f"{side}_ids"]
                # Only what an entry reads: longer prefixes were dropped.
                response = response[: max(example["lengths"])]
                sequences.append(torch.tensor(prompt + response))
                lengths = torch.tensor(example["lengths"])
                read_out.append(len(prompt) - 1 + lengths.clamp(max=len(response)))

        for example in examples:
            longest = max(len(example[f"{side}_ids"]) for side in SIDES)
            quarters.append(quarter_of(torch.tensor(example["lengths"]), longest))

        masks = [torch.ones_like(ids) for ids in sequences]
        return {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "read_out": pad_sequence(read_out, batch_first=True, padding_value=-1),
            "quarters": torch.cat(quarters),
        }
