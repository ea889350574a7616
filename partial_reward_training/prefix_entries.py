"""From the compact prefix dataset to a batch: expand entries, pick those to evaluate on, pad."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pargs.prefixes import SIDES, EncodedResponse, PairFrame


def expand_entries(
    batch: dict[str, list[int]], pairs: Dataset, frame: PairFrame
) -> dict[str, list[list[int] | int]]:
    """Turn rows (`pair`, `length`) into the inputs of both sides: ids, segment ids and mask."""
    kinds = ("input_ids", "token_type_ids", "attention_mask")
    names = [*(f"{side}_{kind}" for side in SIDES for kind in kinds), "quarter", "same"]
    expanded = {name: [] for name in names}
    rows = {pair: pairs[pair] for pair in set(batch["pair"])}

    for pair, length in zip(batch["pair"], batch["length"], strict=True):
        row = rows[pair]
        prefixes = [read_response(row, side).prefix(length) for side in SIDES]
        for side, prefix in zip(SIDES, prefixes, strict=True):
            ids = frame.ids(row["prompt_ids"], prefix)
            expanded[f"{side}_input_ids"].append(ids)
            expanded[f"{side}_token_type_ids"].append(frame.segments(row["prompt_ids"], prefix))
            expanded[f"{side}_attention_mask"].append([1] * len(ids))
        expanded["quarter"].append(quarter_of(length, longest_response(row)))
        expanded["same"].append(prefixes[0] == prefixes[1])
    return expanded


def read_response(row: dict[str, Any], side: str) -> EncodedResponse:
    """One response of a stored comparison."""
    reencoded = {prefix["length"]: prefix["ids"] for prefix in row[f"{side}_reencoded"]}
    return EncodedResponse(row[f"{side}_ids"], reencoded)


def longest_response(row: dict[str, Any]) -> int:
    """Tokens in the longer response of a stored comparison."""
    return max(len(row[f"{side}_ids"]) for side in SIDES)


def quarter_of(length: Any, longest: Any) -> Any:
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
        longest[pair] = longest_response(pairs[int(pair)])

    pair_of, length_of = np.array(entries["pair"]), np.array(entries["length"])
    candidates = np.flatnonzero(np.isin(pair_of, chosen))
    quarters = quarter_of(length_of[candidates], longest[pair_of[candidates]])

    picked = [
        generator.permutation(candidates[quarters == quarter])[: num_entries // 4] for quarter in range(4)
    ]
    return entries.select(np.sort(np.concatenate(picked)), keep_in_memory=True)


@dataclass
class EntryCollator:
    """Pad a batch of expanded entries: first all chosen inputs, then all rejected ones.

    `quarters` and `same` (both sides have the same prefix) are [batch, 1]: one entry in a row.
    """

    tokenizer: PreTrainedTokenizerBase
    segment_ids: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        kinds = ["input_ids", "attention_mask"] + ["token_type_ids"] * self.segment_ids
        inputs = {
            kind: [example[f"{side}_{kind}"] for side in SIDES for example in examples] for kind in kinds
        }

        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        batch["quarters"] = torch.tensor([[example["quarter"]] for example in examples])
        batch["same"] = torch.tensor([[example["same"]] for example in examples])
        return batch


@dataclass
class PairCollator:
    """Pad a batch of whole comparisons for a causal model, which scores every prefix in one pass.

    `read_out` [2 * batch, longest] is where the reward of each prefix length stands in the sequence,
    -1 where there is no such entry; `quarters` [batch, longest] has -1 there, too, and `same` goes with it.
    """

    pad_token_id: int
    start: list[int]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, read_out, quarters, same = [], [], [], []
        for side in SIDES:
            for example in examples:
                prompt, response = self.start + example["prompt_ids"], example[f"{side}_ids"]
                # Only what an entry reads: longer prefixes were dropped.
                response = response[: max(example["lengths"])]
                sequences.append(torch.tensor(prompt + response))
                lengths = torch.tensor(example["lengths"])
                read_out.append(len(prompt) - 1 + lengths.clamp(max=len(response)))

        for example in examples:
            lengths, (chosen, rejected) = example["lengths"], (example[f"{side}_ids"] for side in SIDES)
            quarters.append(quarter_of(torch.tensor(lengths), longest_response(example)))
            same.append(torch.tensor([chosen[:length] == rejected[:length] for length in lengths]))

        masks = [torch.ones_like(ids) for ids in sequences]
        return {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "read_out": pad_sequence(read_out, batch_first=True, padding_value=-1),
            "quarters": pad_sequence(quarters, batch_first=True, padding_value=-1),
            "same": pad_sequence(same, batch_first=True),
        }
