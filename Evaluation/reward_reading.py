"""Rewards of prefixes, read as the partial reward model was trained: the same inputs, the same lengths."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pargs.chat import with_turns
from pargs.cli import fail
from pargs.encoding import encode_prompts, eos_id
from pargs.models import RewardModel
from pargs.prefixes import SIDES, EncodedResponse, encode_with_prefixes
from pargs.processes import map_shared
from pargs.runs import GuideEos
from pargs.scoring import micro_batch_size, token_rewards


@dataclass
class Pair:
    """A comparison as one reward model reads it."""

    prompt: str
    prompt_ids: list[int]
    sides: dict[str, EncodedResponse]

    @property
    def longest(self) -> int:
        return max(len(response.ids) for response in self.sides.values())


@dataclass(frozen=True)
class Question:
    """The reward that the model gives to these ids, read at one position of a causal model."""

    input_ids: tuple[int, ...]
    segments: tuple[int, ...]
    position: int = -1  # an encoder gives one reward for all of its input

    @property
    def seen(self) -> tuple[int, ...]:
        """The ids that the reward depends on."""
        return self.input_ids[: self.position + 1 or None]


def encode_pair(reward_model: RewardModel, row: Mapping[str, Any], template: str) -> Pair:
    tokenizer, (prompt,) = reward_model.tokenizer, with_turns([row["prompt"]], [row.get("turns")])
    responses = [row[side] for side in SIDES]
    encoded = encode_with_prefixes(tokenizer, [prompt] * 2, responses, reward_model.causal)
    (prompt_ids,) = encode_prompts(tokenizer, [prompt], template)
    return Pair(prompt, prompt_ids, dict(zip(SIDES, encoded, strict=True)))


def ask(
    reward_model: RewardModel,
    prompt_ids: list[int],
    response: EncodedResponse,
    lengths: list[int],
    eos: GuideEos = "finished",
) -> list[Question]:
    """One question for each prefix of `lengths` tokens; past its end a response stays whole.

    `eos` says behind which prefixes a decoder-only model reads an EOS, as a guide of decoding does.
    """
    frame = reward_model.frame
    if not reward_model.causal:
        prefixes = [response.prefix(length) for length in lengths]
        return [
            Question(tuple(frame.ids(prompt_ids, prefix)), tuple(frame.segments(prompt_ids, prefix)))
            for prefix in prefixes
        ]

    before = len(frame.start) + len(prompt_ids) - 1
    written = response.ids[:-1]  # without the EOS, which ends every response here
    if eos == "always":  # the EOS takes the place of what follows, so no pass serves two prefixes
        closed = [[*written[:length], eos_id(reward_model.tokenizer)] for length in lengths]
        return [
            Question(
                tuple(frame.ids(prompt_ids, ids)),
                tuple(frame.segments(prompt_ids, ids)),
                before + len(ids),
            )
            for ids in closed
        ]

    # One pass serves every prefix: what stands behind a token does not change its reward.
    read = written if eos == "never" else response.ids
    input_ids, segments = tuple(frame.ids(prompt_ids, read)), tuple(frame.segments(prompt_ids, read))
    return [Question(input_ids, segments, before + min(len(read), length)) for length in lengths]


def read_rewards(reward_model: RewardModel, questions: list[Question], label: str) -> list[float]:
    """The reward of each question. Equal inputs are read once, in batches of similar length."""
    segments = {question.input_ids: question.segments for question in questions}
    batches = []
    rest = sorted(segments, key=len, reverse=True)
    while rest:
        count = micro_batch_size([len(ids) for ids in rest], reward_model.token_budget)
        batches.append(rest[:count])
        rest = rest[count:]

    def read(batch: list[tuple[int, ...]]) -> np.ndarray:
        inputs, of_inputs = [list(ids) for ids in batch], [list(segments[ids]) for ids in batch]
        try:
            return token_rewards(reward_model, inputs, of_inputs).cpu().numpy()
        except torch.OutOfMemoryError:
            fail(f"{reward_model.name!r} runs out of memory; lower --token_budget")

    table = {}
    for batch, rewards in zip(batches, map_shared(read, batches, label, " batches"), strict=True):
        table |= zip(batch, rewards, strict=True)

    found = [table[question.input_ids][question.position].item() for question in questions]
    for question, reward in zip(questions, found, strict=True):
        if not math.isfinite(reward):
            text = reward_model.tokenizer.decode(list(question.seen))
            fail(f"{reward_model.name!r} gives {text[:200]!r} the reward {reward}")
    return found
