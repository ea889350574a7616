"""Guides score the candidates of a step: the reward of each prefix continued by each candidate.

An encoder (or a causal model with a tokenizer of its own) reads prompt and response afresh for every
candidate: `RereadingGuide`. A causal model that shares the policy's tokenizer keeps its own key-value cache
and reads only the token just chosen and the k candidates of a step: `CachedGuide`.
"""

from itertools import compress
from typing import Any

import torch
from responses import Response
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedTokenizerFast

from pargs.cli import fail, warn
from pargs.encoding import decode_texts, encode_prompts, eos_id
from pargs.models import MODEL_ERRORS, Policy, RewardModel
from pargs.processes import gather
from pargs.runs import GuideEos
from pargs.scoring import (
    Continuation,
    base_model,
    encode_continuations,
    fit_pair,
    score_head,
    score_pairs,
)

# How far rewards of the cache may lie from those of reading afresh, beside 1 + the largest of them. Measured
# in random models of 2 to 24 layers: rounding up to 0.002 (float16), 0.015 (bfloat16); faults 0.1 and more.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CacheFault(Exception):
    """A reward model cannot be asked with a key-value cache; the message says why."""


def choose_guide(
    reward_model: RewardModel,
    policy: Policy,
    template: str,
    max_new_tokens: int,
    k: int,
    responses: list[Response],
    eos: GuideEos = "finished",
) -> "RereadingGuide | CachedGuide":
    """The guide that decodes `responses`: a cached one only where it gives the rewards of reading afresh.

    Every process calls this, and all take the same one.
    """
    guide = make_guide(reward_model, policy, template, max_new_tokens, eos)
    if not isinstance(guide, CachedGuide):
        return guide

    afresh = RereadingGuide(reward_model, policy.tokenizer, policy.eos_ids, template, guide.reserved, eos)
    fault = find_fault(guide, afresh, responses, max_new_tokens, k) if responses else None
    fault = next(filter(None, gather([fault])), None)
    if not fault:
        return guide
    warn(f"{reward_model.name!r} cannot use a key-value cache ({fault}): every candidate is read afresh")
    return afresh


def make_guide(
    reward_model: RewardModel, policy: Policy, template: str, max_new_tokens: int, eos: GuideEos = "finished"
) -> "RereadingGuide | CachedGuide":
    """The guide that suits the kind of reward model; `eos` says where a decoder-only one reads an EOS."""
    reserved = max_new_tokens + 1
    if reward_model.max_length - reward_model.frame.num_special <= reserved:
        length = reward_model.max_length
        fail(f"{reward_model.name!r} reads {length} tokens: no prompt fits beside --max_new_tokens")
    if can_cache(reward_model, policy.tokenizer):
        return CachedGuide(reward_model, policy.eos_ids, template, reserved, eos)
    if eos != "finished" and not reward_model.causal:
        warn(f"{reward_model.name!r} is an encoder, which reads no EOS: {eos!r} changes nothing")
    return RereadingGuide(reward_model, policy.tokenizer, policy.eos_ids, template, reserved, eos)


def can_cache(reward_model: RewardModel, policy_tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether candidates can share a cache: the policy's ids, and attention over the whole prefix."""
    layers = DynamicCache(config=reward_model.model.config).layers
    sliding = any(getattr(layer, "is_sliding", False) for layer in layers)
    return reward_model.shares_ids_with(policy_tokenizer) and not sliding


def find_fault(
    cached: "CachedGuide",
    afresh: "RereadingGuide",
    responses: list[Response],
    max_new_tokens: int,
    k: int,
) -> str | None:
    """What is wrong with the cached rewards of the longest and the shortest prompt, or None.

    Asked as the run asks, k candidates at once, since some models count positions by column; and behind
    prefixes of random tokens up to the full length, since some layers see only what is near.
    """
    reward_model = cached.reward_model
    asked = reward_model.calls, reward_model.tokens_read
    by_length = sorted(responses, key=lambda response: len(response.prompt_ids), reverse=True)
    probes = [Response(by_length[at].prompt, by_length[at].prompt_ids, 0) for at in (0, -1)]

    known = min(len(reward_model.tokenizer), embedding_size(reward_model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(known, (2, max_new_tokens), generator=generator).tolist()
    candidates = torch.randint(known, (2, k), generator=generator).to(reward_model.model.device)
    if len(cached.eos_ids):
        candidates[:, 0] = cached.eos_ids[0]  # one that ends the response

    try:
        afresh.begin(probes)
        cached.begin(probes)
        for length in sorted({0, max(0, max_new_tokens - 2), max_new_tokens - 1}):
            if length == max_new_tokens - 1 and length:  # the shorter one has ended
                cached.keep([0])
                probes, candidates = probes[:1], candidates[:1]
            for probe, own in zip(probes, tokens, strict=False):
                probe.ids = own[:length]
            expected = afresh.score(probes, candidates)
            off = (cached.score(probes, candidates) - expected).abs().max().item()
            if not off <= TOLERANCES[reward_model.model.dtype] * (1 + expected.abs().max().item()):
                return f"its rewards are {off:.3g} off after {length} tokens"
    except CacheFault as fault:
        return str(fault)
    finally:
        reward_model.calls, reward_model.tokens_read = asked
    return None


def embedding_size(reward_model: RewardModel) -> int:
    """How many ids the model knows: a tokenizer may have more."""
    embeddings: Any = reward_model.model.get_input_embeddings()
    return embeddings.num_embeddings


class RereadingGuide:
    """Scores candidates by reading prompt and continued response afresh."""

    def __init__(
        self,
        reward_model: RewardModel,
        policy_tokenizer: PreTrainedTokenizerFast,
        eos_ids: set[int],
        template: str,
        reserved: int,
        eos: GuideEos = "finished",
    ):
        self.reward_model = reward_model
        self.policy_tokenizer = policy_tokenizer
        self.eos_ids = eos_ids
        self.template = template
        self.reserved = reserved
        self.eos = eos
        self.keep_ids = reward_model.shares_ids_with(policy_tokenizer)

    def begin(self, responses: list[Response]) -> None:
        """Encode the prompts, once."""
        prompts = list({response.prompt for response in responses})
        encoded = encode_prompts(self.reward_model.tokenizer, prompts, self.template)
        self.prompt_ids = dict(zip(prompts, encoded, strict=True))

    def keep(self, kept: list[int]) -> None:
        """Nothing is held for a response between two steps."""

    def score(
        self, responses: list[Response], candidates: torch.Tensor, asked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rewards [batch, k] of each prefix continued by each candidate; `eos` says which read an EOS.

        Of candidates that are not `asked` [batch, k] about (None: all are) the reward is NaN.
        """
        asked = torch.ones_like(candidates, dtype=torch.bool) if asked is None else asked
        prompts, prefixes, finished = [], [], []
        rows = zip(responses, candidates.tolist(), asked.tolist(), strict=True)
        for response, tokens, asked_about in rows:
            for token in compress(tokens, asked_about):
                ends = token in self.eos_ids
                prompts.append(response.prompt)
                prefixes.append(response.ids if ends else [*response.ids, token])
                finished.append(ends if self.eos == "finished" else self.eos == "always")

        continuations = [
            Continuation(text, ends, ids if self.keep_ids else None)
            for text, ends, ids in zip(
                decode_texts(self.policy_tokenizer, prefixes), finished, prefixes, strict=True
            )
        ]
        prompt_ids = [self.prompt_ids[prompt] for prompt in prompts]
        continued = encode_continuations(self.reward_model, prompts, continuations)
        rewards = torch.full(candidates.shape, torch.nan, device=candidates.device)
        found = score_pairs(self.reward_model, prompt_ids, continued, self.reserved)
        rewards[asked] = found.to(rewards.device)
        return rewards


class CachedGuide:
    """Scores candidates with the reward model's own cache: k + 1 tokens a step, each candidate by itself;
    2 k + 1 where an EOS closes every one.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        eos_ids: set[int],
        template: str,
        reserved: int,
        eos: GuideEos = "finished",
    ):
        self.reward_model = reward_model
        self.template = template
        self.reserved = reserved
        self.eos = eos
        self.eos_ids = torch.tensor(sorted(eos_ids), device=reward_model.model.device)

    @torch.inference_mode()
    def begin(self, responses: list[Response]) -> None:
        """Read the prompts, left-padded, into the cache."""
        model, prompts = self.reward_model, [response.prompt for response in responses]
        encoded = encode_prompts(model.tokenizer, prompts, self.template)
        fitted = [model.frame.ids(*fit_pair(model, ids, [], self.reserved)) for ids in encoded]
        model.tokens_read += sum(map(len, fitted))

        input_ids, self.mask = left_pad(fitted, model.model.device)  # both [batch, longest]
        self.past_key_values = DynamicCache(config=model.model.config)
        # [batch, 1, hidden], of the prefix's last token
        self.last_hidden = self.read(input_ids, self.mask, positions(self.mask))[:, -1:]
        self.num_read = 0  # response tokens in the cache

    def keep(self, kept: list[int]) -> None:
        """Go on with these rows of the batch."""
        index = torch.tensor(kept, device=self.mask.device)
        self.mask, self.last_hidden = self.mask[index], self.last_hidden[index]
        self.past_key_values.batch_select_indices(index)

    @torch.inference_mode()
    def score(
        self, responses: list[Response], candidates: torch.Tensor, asked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rewards [batch, k]; reads the prefix's new token, then every candidate beside the others.

        Of candidates that are not `asked` [batch, k] about (None: all are) the reward is NaN. They are read
        all the same, unless nobody is asked about any: the prefix then waits for the next step.
        """
        if asked is not None and not asked.any():
            return torch.full(candidates.shape, torch.nan, device=candidates.device)
        device, k = self.mask.device, candidates.shape[1]
        ends = torch.isin(candidates, self.eos_ids)
        eos = eos_id(self.reward_model.tokenizer)

        # None at the first step; then one, or more where nobody was asked in between.
        new = [response.ids[self.num_read :] for response in responses]
        parts = [torch.tensor(new, dtype=torch.long, device=device), candidates.masked_fill(ends, eos)]
        if self.eos == "always":
            parts.append(torch.full_like(candidates, eos))  # one behind each candidate
        num_new = parts[0].shape[1]
        self.reward_model.calls += candidates.numel() if asked is None else int(asked.sum())
        self.reward_model.tokens_read += sum(part.numel() for part in parts)

        places = [torch.arange(num_new), torch.full((k,), num_new), torch.full((k,), num_new + 1)]
        offsets = torch.cat(places[: len(parts)]).to(device)
        seen = self.mask.sum(1, keepdim=True)  # [batch, 1]
        hidden = self.read(
            torch.cat(parts, dim=1), self.candidate_mask(num_new, k, len(parts) - 1), seen + offsets
        )  # [batch, new + k (+ k), hidden]

        self.past_key_values.crop(-k * (len(parts) - 1))
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(responses), num_new)], dim=1)
        self.num_read += num_new
        if num_new:
            self.last_hidden = hidden[:, num_new - 1 : num_new]
        hidden = self.choose_hidden(hidden[:, num_new:], ends)
        rewards = score_head(self.reward_model)(hidden).squeeze(-1).float()
        return rewards if asked is None else rewards.masked_fill(~asked, torch.nan)

    def choose_hidden(self, hidden: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Where each candidate's reward is read, [batch, k, hidden]; `hidden` holds what stands behind the
        prefix, `ends` [batch, k] which candidates are an EOS themselves."""
        own = hidden[:, : ends.shape[1]]
        if self.eos == "always":
            return torch.where(ends[..., None], own, hidden[:, ends.shape[1] :])
        if self.eos == "never":
            return torch.where(ends[..., None], self.last_hidden, own)
        return own

    def read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of the tokens, which the cache takes in.

        Raises:
            CacheFault: the model's code is not made for such a mask or cache.
        """
        try:
            return base_model(self.reward_model)(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=self.past_key_values,
                use_cache=True,
            ).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except MODEL_ERRORS as error:
            raise CacheFault(str(error) or type(error).__name__) from error

    def candidate_mask(self, num_new: int, k: int, length: int) -> torch.Tensor:
        """Additive mask [batch, 1, read, past + read] of k continuations of `length` tokens, the first tokens
        of all before the second ones: each sees the prefix and itself alone.

        Additive, because eager attention adds whatever it is given, booleans included.
        """
        batch, past = self.mask.shape
        num_read = num_new + length * k
        own = torch.ones(num_read, num_read, dtype=torch.bool, device=self.mask.device).tril()
        continuation = torch.arange(length * k, device=self.mask.device) % k
        own[num_new:, num_new:] &= continuation[:, None] == continuation

        seen = self.mask.bool()[:, None, :].expand(batch, num_read, past)
        allowed = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)[:, None]
        dtype = self.reward_model.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=self.mask.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def left_pad(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both [batch, longest], padded on the left (with id 0, masked out)."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    masks = [torch.ones_like(sequence) for sequence in ids]
    input_ids, attention_mask = (
        pad_sequence(rows, batch_first=True, padding_side="left").to(device) for rows in (ids, masks)
    )
    return input_ids, attention_mask


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of every token among those that are not padding, [batch, length]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)
