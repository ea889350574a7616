"""Reward models in decoding: how they read a prompt and a response, and how fast.

An encoder (or a causal model with a tokenizer of its own) reads prompt and response afresh for every
candidate: `RereadingGuide`. A causal model that shares the policy's tokenizer keeps its own key-value cache
and reads only the token just chosen and the k candidates of a step: `CachedGuide`.
"""

import os
import sys
from dataclasses import dataclass
from pickle import UnpicklingError

import torch
from fast_attention import use_fast_attention
from pair_frame import PairFrame, causal_frame, pair_frame
from script_settings import fail, is_main
from text_encoding import decode_texts, encode_prompts, encode_responses, encode_texts
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


def warn_of_pickle(name: str) -> None:
    """Say once that a checkpoint has no safetensors; torch then reads its pickle with `weights_only=True`."""
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would ask a server to convert it
    if is_main() and not any(
        cached_file(name, file, **quiet) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    ):
        print(f"warning: {name!r} has no safetensors; of its pickle only weights are read", file=sys.stderr)


def why(error: Exception) -> str:
    """What is wrong with a model's files; torch's own words on a pickle say how to run it all the same."""
    if isinstance(error, UnpicklingError):
        return "its pickle is damaged or holds more than weights, that is, code"
    return str(error) or type(error).__name__


@dataclass
class RewardModel:
    """A sequence classifier with one output, and what it takes to ask it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    frame: PairFrame
    causal: bool  # decoder-only: one EOS ends a finished response, a prefix has none
    max_length: int  # tokens it can read
    token_budget: int  # tokens it reads at once; halved when memory runs out

    def shares_ids_with(self, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether it reads the policy's ids as they are, never re-encoded text."""
        return self.causal and self.tokenizer.get_vocab() == policy_tokenizer.get_vocab()


@dataclass
class Written:
    """A response: its text, whether it is finished, and its ids without EOS if the policy wrote them."""

    text: str
    finished: bool
    ids: list[int] | None = None


def load_reward_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    token_budget: int,
    fast_attention: bool = True,
) -> RewardModel:
    """Load a trained reward model; exits where it is missing, has no trained head or not one output."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load the reward model {name!r}: {error}")
    if not tokenizer.is_fast:
        fail(f"the reward model {name!r} has no fast tokenizer, which decoding needs")
    if not any("SequenceClassification" in kind for kind in config.architectures or []):
        fail(f"{name!r} is no trained reward model: it is a {(config.architectures or ['nameless'])[0]}")
    if config.num_labels != 1:
        fail(f"{name!r} has {config.num_labels} labels; a reward model has one")

    warn_of_pickle(name)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        fail(f"cannot load the weights of the reward model {name!r}: {why(error)}")
    if loading["missing_keys"]:
        fail(f"{name!r} is no trained reward model: it has no weights for {sorted(loading['missing_keys'])}")

    causal = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if causal and not hasattr(model, "score"):
        fail(f"{name!r} ({type(model).__name__}) has no `score` head over all tokens")
    model = copy_weights(model).to(device).eval()
    used = use_fast_attention(model) if fast_attention else None
    if used and is_main():
        print(f"{name}: {used}", file=sys.stderr)
    return RewardModel(
        name,
        model,
        tokenizer,
        frame=causal_frame(tokenizer) if causal else pair_frame(tokenizer),
        causal=causal,
        max_length=longest_input(config, tokenizer),
        token_budget=token_budget,
    )


def copy_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Move the weights from the file that they are mapped from into aligned memory, in place.

    On a CPU, where the map happens to lie decides the last bits of every product; they differed by launch.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def longest_input(config: AutoConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that a model can read, from its positions and its tokenizer (which may not know: 1e30)."""
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return min(positions, int(min(tokenizer.model_max_length, sys.maxsize)))


def encode_written(reward_model: RewardModel, prompts: list[str], written: list[Written]) -> list[list[int]]:
    """Ids of each response as the reward model reads them, with EOS where a causal model's is finished.

    Texts are encoded, except that ids a policy wrote are taken as they are.
    """
    texts = [response.text for response in written]
    if not reward_model.causal:
        return encode_texts(reward_model.tokenizer, texts)

    own = [response.ids for response in written]
    if None in own:
        own = encode_responses(reward_model.tokenizer, prompts, texts)
    eos = [reward_model.tokenizer.eos_token_id]
    return [ids + eos * response.finished for ids, response in zip(own, written, strict=True)]


def fit_pair(
    reward_model: RewardModel, prompt_ids: list[int], response_ids: list[int], reserved: int
) -> tuple[list[int], list[int]]:
    """What the model can read of a pair: the prompt loses its beginning.

    Room is kept for `reserved` response tokens. A response that leaves none loses its end, not its EOS.
    """
    room = reward_model.max_length - reward_model.frame.num_special
    if len(response_ids) > room:
        ends = response_ids[-1] == reward_model.tokenizer.eos_token_id
        response_ids = response_ids[: room - ends] + response_ids[-1:] * ends
    room -= max(len(response_ids), reserved)
    return prompt_ids[-room:] if room > 0 else [], response_ids


@torch.inference_mode()
def score_pairs(
    reward_model: RewardModel, prompts: list[list[int]], responses: list[list[int]], reserved: int
) -> torch.Tensor:
    """Rewards [n] of n (prompt ids, response ids) pairs, read in micro-batches of similar length."""
    frame, device = reward_model.frame, reward_model.model.device
    pairs = [fit_pair(reward_model, *pair, reserved) for pair in zip(prompts, responses, strict=True)]
    inputs = [frame.ids(*pair) for pair in pairs]
    segments = [frame.segments(*pair) for pair in pairs]

    rewards = torch.empty(len(inputs), dtype=torch.float32, device=device)
    order = sorted(range(len(inputs)), key=lambda at: len(inputs[at]), reverse=True)
    while order:
        count = micro_batch_size([len(inputs[at]) for at in order], reward_model.token_budget)
        batch, rest = order[:count], order[count:]
        try:
            rewards[batch] = read_batch(
                reward_model, [inputs[at] for at in batch], [segments[at] for at in batch]
            )
        except torch.cuda.OutOfMemoryError:
            if count == 1:
                fail(f"{reward_model.name!r} runs out of memory on one input; lower --cache_gb")
            # Half of what did not fit, which may have been less than the budget.
            reward_model.token_budget = count * len(inputs[order[0]]) // 2
            continue
        order = rest
    return rewards


def micro_batch_size(lengths: list[int], token_budget: int) -> int:
    """How many sequences, the longest first, to read at once: within the budget and with little padding.

    Once a batch is worth a pass, one that is shorter than nine tenths of the longest waits for the next.
    """
    width = max(1, lengths[0])
    most = min(len(lengths), max(1, token_budget // width))
    for count in range(max(1, token_budget // 8 // width), most):
        if lengths[count] < 0.9 * width:
            return count
    return most


def read_batch(reward_model: RewardModel, inputs: list[list[int]], segments: list[list[int]]) -> torch.Tensor:
    """Rewards [batch] of one right-padded forward pass."""
    device = reward_model.model.device
    lengths = torch.tensor([len(ids) for ids in inputs])
    pad_id = reward_model.tokenizer.pad_token_id or 0

    # Built on the host and moved in one copy each.
    input_ids = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True, padding_value=pad_id)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    model_inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}

    if reward_model.causal:
        hidden = base_model(reward_model)(**model_inputs, use_cache=False).last_hidden_state
        # By length, never by searching for the pad id: that may be the EOS.
        last = hidden[torch.arange(len(inputs), device=device), lengths.to(device) - 1]
        return reward_model.model.score(last).squeeze(-1).float()

    if "token_type_ids" in reward_model.tokenizer.model_input_names:
        padded = pad_sequence([torch.tensor(ids) for ids in segments], batch_first=True)
        model_inputs["token_type_ids"] = padded.to(device)
    return reward_model.model(**model_inputs).logits.squeeze(-1).float()


def base_model(reward_model: RewardModel) -> torch.nn.Module:
    return getattr(reward_model.model, reward_model.model.base_model_prefix)


class RereadingGuide:
    """Scores candidates by reading prompt and continued response afresh."""

    def __init__(
        self,
        reward_model: RewardModel,
        policy_tokenizer: PreTrainedTokenizerBase,
        eos_ids: set[int],
        template: str,
        reserved: int,
    ):
        self.reward_model = reward_model
        self.policy_tokenizer = policy_tokenizer
        self.eos_ids = eos_ids
        self.template = template
        self.reserved = reserved
        self.keep_ids = reward_model.shares_ids_with(policy_tokenizer)

    def begin(self, prompts: list[str]) -> None:
        """Encode the prompts, once."""
        self.prompts = prompts
        self.prompt_ids = encode_prompts(self.reward_model.tokenizer, prompts, self.template)

    def keep(self, rows: list[int]) -> None:
        self.prompts = [self.prompts[row] for row in rows]
        self.prompt_ids = [self.prompt_ids[row] for row in rows]

    def score(
        self, prefixes: list[list[int]], candidates: list[list[int]], device_candidates: torch.Tensor
    ) -> torch.Tensor:
        """Rewards [batch, k] of each prefix continued by each candidate; an EOS finishes the response."""
        continued, finished = [], []
        for prefix, tokens in zip(prefixes, candidates, strict=True):
            for token in tokens:
                ends = token in self.eos_ids
                continued.append(prefix if ends else [*prefix, token])
                finished.append(ends)

        texts = decode_texts(self.policy_tokenizer, continued)
        written = [
            Written(text, ends, ids if self.keep_ids else None)
            for text, ends, ids in zip(texts, finished, continued, strict=True)
        ]

        k = len(candidates[0])
        prompts = [prompt for prompt in self.prompts for _ in range(k)]
        prompt_ids = [ids for ids in self.prompt_ids for _ in range(k)]
        responses = encode_written(self.reward_model, prompts, written)
        return score_pairs(self.reward_model, prompt_ids, responses, self.reserved).view(-1, k)


class CachedGuide:
    """Scores candidates with the reward model's own cache: k + 1 tokens a step, each candidate by itself."""

    def __init__(self, reward_model: RewardModel, eos_ids: set[int], template: str, reserved: int):
        self.reward_model = reward_model
        self.template = template
        self.reserved = reserved
        self.eos_ids = torch.tensor(sorted(eos_ids), device=reward_model.model.device)

    @torch.inference_mode()
    def begin(self, prompts: list[str]) -> None:
        """Read the prompts, left-padded, into the cache."""
        device = self.reward_model.model.device
        encoded = encode_prompts(self.reward_model.tokenizer, prompts, self.template)
        fitted = [
            self.reward_model.frame.ids(*fit_pair(self.reward_model, ids, [], self.reserved))
            for ids in encoded
        ]
        input_ids, self.mask = (tensor.to(device) for tensor in left_pad(fitted))
        self.past_key_values = DynamicCache(config=self.reward_model.model.config)
        base_model(self.reward_model)(
            input_ids,
            attention_mask=self.mask,
            position_ids=positions(self.mask),
            past_key_values=self.past_key_values,
            use_cache=True,
        )
        self.read = 0  # response tokens in the cache

    def keep(self, rows: list[int]) -> None:
        indices = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[indices]
        self.past_key_values.batch_select_indices(indices)

    @torch.inference_mode()
    def score(
        self, prefixes: list[list[int]], candidates: list[list[int]], device_candidates: torch.Tensor
    ) -> torch.Tensor:
        """Rewards [batch, k]; reads the prefix's new token, then every candidate beside the others."""
        device, k = self.mask.device, device_candidates.shape[1]
        eos_id = self.reward_model.tokenizer.eos_token_id
        tokens = torch.where(torch.isin(device_candidates, self.eos_ids), eos_id, device_candidates)

        new = [prefix[self.read :] for prefix in prefixes]  # none at the first step, then one
        tokens = torch.cat([torch.tensor(new, dtype=torch.long, device=device), tokens], dim=1)
        num_new = tokens.shape[1] - k

        seen = self.mask.sum(1, keepdim=True)  # [batch, 1]
        offsets = torch.arange(tokens.shape[1], device=device).clamp(max=num_new)
        hidden = base_model(self.reward_model)(
            tokens,
            attention_mask=self.candidate_mask(num_new, k),
            position_ids=seen + offsets,
            past_key_values=self.past_key_values,
            use_cache=True,
        ).last_hidden_state

        self.past_key_values.crop(-k)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(prefixes), num_new)], dim=1)
        self.read += num_new
        return self.reward_model.model.score(hidden[:, num_new:]).squeeze(-1).float()

    def candidate_mask(self, num_new: int, k: int) -> torch.Tensor:
        """Additive mask [batch, 1, new + k, past + new + k]: a candidate sees the prefix and itself alone.

        Additive, because eager attention adds whatever it is given, booleans included.
        """
        batch, past = self.mask.shape
        own = torch.zeros(num_new + k, num_new + k, dtype=torch.bool, device=self.mask.device)
        own[:, :num_new] = True
        own[:num_new] = torch.tril(own[:num_new])
        own[num_new:, num_new:] = torch.eye(k, dtype=torch.bool, device=self.mask.device)

        seen = self.mask.bool()[:, None, :].expand(batch, num_new + k, past)
        allowed = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)[:, None]
        dtype = self.reward_model.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=self.mask.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def can_cache(reward_model: RewardModel, policy_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether candidates can share a cache: the policy's ids, and attention over the whole prefix."""
    layers = DynamicCache(config=reward_model.model.config).layers
    sliding = any(layer.is_sliding for layer in layers)
    return reward_model.shares_ids_with(policy_tokenizer) and not sliding


def left_pad(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both [batch, longest], padded on the left (with id 0, masked out)."""
    longest = max(map(len, sequences))
    input_ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in sequences])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences])
    return input_ids, attention_mask


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among those that are not padding, [batch, length]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)
