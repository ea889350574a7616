"""Rewards of prefixes, read as the partial reward model was trained: the same inputs, the same lengths."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from command_line import fail
from pair_frame import PairFrame, causal_frame, pair_frame
from processes import copy_weights, map_batches
from text_encoding import decode_texts, encode_prompts, encode_responses, encode_texts
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


@dataclass
class RewardModel:
    """A sequence classifier with one output, and what it takes to ask it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    frame: PairFrame
    causal: bool  # decoder-only: one EOS ends a finished response, a prefix has none
    max_length: int  # tokens it can read

    @property
    def has_segments(self) -> bool:
        return not self.causal and "token_type_ids" in self.tokenizer.model_input_names


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


@dataclass
class Response:
    """A response and its ids in one reward model, with EOS where that is causal."""

    text: str
    ids: list[int]


@dataclass
class Pair:
    """A comparison as one reward model reads it."""

    prompt: str
    prompt_ids: list[int]
    chosen: Response
    rejected: Response

    @property
    def longest(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


def load_reward_model(name: str, hint: str) -> RewardModel:
    """Load a trained reward model; exits with code 2 where it is missing or has not one trained output."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load the reward model {name!r} ({error}); {hint}")
    if config.num_labels != 1:
        fail(f"{name!r} has {config.num_labels} labels; a reward model has one; {hint}")
    if not tokenizer.is_fast:
        fail(f"{name!r} has no fast tokenizer, which the prefixes need; {hint}")

    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:
        fail(f"cannot load the weights of the reward model {name!r} ({error}); {hint}")
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        fail(f"{name!r} is no trained reward model: it has no weights for {missing}; {hint}")

    causal = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if causal and (tokenizer.eos_token_id is None or not hasattr(model, "score")):
        fail(f"{name!r} is causal and needs an EOS in its tokenizer and a `score` head; {hint}")

    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return RewardModel(
        name,
        copy_weights(model.eval()),
        tokenizer,
        frame=causal_frame(tokenizer) if causal else pair_frame(tokenizer),
        causal=causal,
        max_length=min(positions, int(min(tokenizer.model_max_length, sys.maxsize))),
    )


def encode_pair(reward_model: RewardModel, row: dict[str, str], template: str) -> Pair:
    tokenizer, texts = reward_model.tokenizer, [row["chosen"], row["rejected"]]
    if reward_model.causal:
        ids = encode_responses(tokenizer, [row["prompt"]] * 2, texts)
        ids = [[*response_ids, tokenizer.eos_token_id] for response_ids in ids]
    else:
        ids = encode_texts(tokenizer, texts)
    (prompt_ids,) = encode_prompts(tokenizer, [row["prompt"]], template)
    return Pair(row["prompt"], prompt_ids, *map(Response, texts, ids))


def ask(
    reward_model: RewardModel, prompt_ids: list[int], response: Response, lengths: list[int]
) -> list[Question]:
    """One question for each prefix of `lengths` tokens; past its end a response stays whole."""
    frame = reward_model.frame
    if reward_model.causal:
        # One pass serves every prefix: what stands behind a token does not change its reward.
        before = len(frame.start) + len(prompt_ids) - 1
        input_ids = tuple(frame.ids(prompt_ids, response.ids))
        segments = tuple(frame.segments(prompt_ids, response.ids))
        return [Question(input_ids, segments, before + min(len(response.ids), n)) for n in lengths]

    return [
        Question(tuple(frame.ids(prompt_ids, prefix)), tuple(frame.segments(prompt_ids, prefix)))
        for prefix in encoded_prefixes(reward_model.tokenizer, response, lengths)
    ]


def encoded_prefixes(
    tokenizer: PreTrainedTokenizerBase, response: Response, lengths: list[int]
) -> list[list[int]]:
    """Ids of the prefixes as an encoder meets them in decoding: their text, encoded afresh."""
    cuts = [response.ids[:length] for length in lengths]
    texts = decode_texts(tokenizer, cuts)
    # Some decoders strip the space that the response begins with.
    space = " " if response.text.startswith(" ") else ""
    texts = [text if text.startswith(space) else space + text for text in texts]

    # A whole response has its ids already, and an unknown token would not come back from its text.
    final = [len(cut) == len(response.ids) or tokenizer.unk_token_id in cut for cut in cuts]
    fresh = encode_texts(tokenizer, texts)
    return [cut if keep else ids for cut, keep, ids in zip(cuts, final, fresh, strict=True)]


def read_rewards(
    reward_model: RewardModel, questions: list[Question], device: torch.device, token_budget: int, label: str
) -> list[float]:
    """The reward of each question. Equal inputs are read once, in batches of similar length."""
    inputs = {question.input_ids: question.segments for question in questions}
    batches = cut_batches(sorted(inputs, key=len, reverse=True), token_budget)

    def read(batch: list[tuple[int, ...]]) -> np.ndarray:
        try:
            return forward(reward_model, batch, [inputs[ids] for ids in batch]).cpu().numpy()
        except torch.OutOfMemoryError:
            fail(f"{reward_model.name!r} runs out of memory; lower --token_budget ({token_budget})")

    reward_model.model.to(device)
    table = {}
    for batch, of_batch in zip(batches, map_batches(read, batches, label), strict=True):
        table |= zip(batch, of_batch, strict=True)
    reward_model.model.to("cpu")  # the next model may need the room

    rewards = [table[question.input_ids][question.position].item() for question in questions]
    for question, reward in zip(questions, rewards, strict=True):
        if not math.isfinite(reward):
            text = reward_model.tokenizer.decode(question.seen)
            fail(f"{reward_model.name!r} gives {text[:200]!r} the reward {reward}")
    return rewards


def cut_batches(ordered: list[tuple[int, ...]], token_budget: int) -> list[list[tuple[int, ...]]]:
    """Cut inputs, longest first, into batches of `token_budget` tokens, padding included."""
    batches = []
    start = 0
    while start < len(ordered):
        size = max(1, token_budget // len(ordered[start]))
        batches.append(ordered[start : start + size])
        start += size
    return batches


@torch.inference_mode()
def forward(
    reward_model: RewardModel, inputs: list[tuple[int, ...]], segments: list[tuple[int, ...]]
) -> torch.Tensor:
    """Rewards [batch, length] of a causal model, after each of its tokens; [batch, 1] of an encoder."""
    model, pad_id = reward_model.model, reward_model.tokenizer.pad_token_id or 0
    lengths = torch.tensor([len(ids) for ids in inputs])
    input_ids = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True, padding_value=pad_id)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    model_inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if reward_model.has_segments:
        model_inputs["token_type_ids"] = pad_sequence([torch.tensor(s) for s in segments], batch_first=True)
    model_inputs = {name: tensor.to(model.device) for name, tensor in model_inputs.items()}

    if reward_model.causal:
        hidden = getattr(model, model.base_model_prefix)(**model_inputs, use_cache=False).last_hidden_state
        return model.score(hidden).squeeze(-1).float()
    return model(**model_inputs).logits.float()
