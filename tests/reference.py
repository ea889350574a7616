"""The method as the paper states it, in the plainest loop: one prompt, one candidate at a time, no cache.

The policy reads its own ids; an encoder reward model reads the re-tokenised text, through its tokenizer's
own pair encoding; a causal one reads the policy's ids, or the text where it has other ids, with its EOS where
the response is finished, whichever of the policy's ended it.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


@dataclass
class Step:
    """What the reference saw when it chose a token: how far the choice was from another one."""

    token: int
    margin: float


@dataclass
class Reference:
    """A policy, and the reward model that guides it, if any."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    reward_model: PreTrainedModel | None = None
    reward_tokenizer: PreTrainedTokenizerFast | None = None
    causal: bool = False  # decoder-only
    as_read: Callable[[str], str] = str  # a prompt as a reward model with other ids reads it

    @classmethod
    def load(cls, policy: str | Path, reward_model: str | Path, causal: bool) -> "Reference":
        return cls(
            AutoModelForCausalLM.from_pretrained(policy).eval(),
            AutoTokenizer.from_pretrained(policy),
            AutoModelForSequenceClassification.from_pretrained(reward_model).eval(),
            AutoTokenizer.from_pretrained(reward_model),
            causal,
        )

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """Of the next token, over the whole vocabulary."""
        return (
            self.policy(torch.tensor([ids], device=self.policy.device)).logits[0, -1].float().log_softmax(-1)
        )

    @torch.no_grad()
    def reward(self, prompt: str, response: list[int]) -> float:
        """The reward of a response, whose last id may be the EOS that finishes it."""
        text = self.tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not self.causal:
            # As a batch of one: a single call takes an empty text for no text at all.
            prompts = [self.as_read(prompt)]
            inputs = self.reward_tokenizer(prompts, [text], split_special_tokens=True, return_tensors="pt")
            return self.reward_model(**inputs.to(self.reward_model.device)).logits[0, 0].item()

        ids = self.tokenizer(prompt)["input_ids"] + response
        if self.reward_tokenizer.get_vocab() != self.tokenizer.get_vocab():
            finished = response[-1:] == [self.tokenizer.eos_token_id]
            ids = self.reward_tokenizer(self.as_read(prompt) + text)["input_ids"]
            ids += [self.reward_tokenizer.eos_token_id] * finished
        return self.reward_of_ids(ids)

    @torch.no_grad()
    def reward_of_ids(self, ids: list[int]) -> float:
        """What a causal reward model says after the last of `ids`."""
        base = getattr(self.reward_model, self.reward_model.base_model_prefix)
        inputs = torch.tensor([ids], device=self.reward_model.device)
        return self.reward_model.score(base(inputs).last_hidden_state[0, -1]).item()

    def write(
        self,
        prompt: str,
        k: int,
        max_new_tokens: int,
        weight: float = 0.0,
        uniforms: Callable[[int], float] | None = None,
        eos: Collection[int] = (),
        guide_eos: str = "finished",
        gap: float = math.inf,
    ) -> list[Step]:
        """Write one response, ended by any of `eos`.

        The guide reads an EOS behind what is finished, or `guide_eos` is "always" or "never".
        `uniforms(step)` gives the random number of a step, None decodes greedily. Candidates more than `gap`
        nats below the most probable are left out.
        """
        prompt_ids = self.tokenizer(prompt)["input_ids"]
        response, steps, end = [], [], self.tokenizer.eos_token_id

        for step in range(max_new_tokens):
            sorted_log_probs, by_probability = self.log_probs(prompt_ids + response).sort(
                descending=True, stable=True
            )
            # One more than the candidates: a token just outside the top k could have been in it.
            log_probs, tokens = sorted_log_probs[: k + 1].tolist(), by_probability[: k + 1].tolist()

            scores, near = [], [log_prob for log_prob in log_probs[:k] if log_prob >= log_probs[0] - gap]
            for token, score in zip(tokens[: len(near)], near, strict=True):
                if weight:
                    ids = response if token in eos else [*response, token]
                    finished = token in eos if guide_eos == "finished" else guide_eos == "always"
                    ids = [*ids, end] if finished else ids
                    score += weight * self.reward(prompt, ids)
                scores.append(score)

            chosen, margin = pick(scores, None if uniforms is None else uniforms(step))
            if k < len(tokens):
                margin = min(margin, log_probs[k - 1] - log_probs[k])
            margin = min([margin, *(abs(log_probs[0] - gap - each) for each in log_probs[1:k])])
            steps.append(Step(tokens[chosen], margin))
            if tokens[chosen] in eos:
                break
            response.append(tokens[chosen])
        return steps


def pick(scores: list[float], uniform: float | None) -> tuple[int, float]:
    """The index chosen, and how far from choosing another."""
    if uniform is None:
        best = max(range(len(scores)), key=lambda at: (scores[at], -at))
        others = [scores[best] - score for at, score in enumerate(scores) if at != best]
        return best, min(others, default=float("inf"))

    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    edge, margin, chosen = 0.0, float("inf"), None
    for at, probability in enumerate(probabilities):
        edge += probability
        margin = min(margin, abs(edge - uniform))
        if chosen is None and uniform < edge:
            chosen = at
    return len(scores) - 1 if chosen is None else chosen, margin


def assert_same_tokens(steps: list[Step], fast: list[int]) -> int:
    """The fast path wrote the reference's tokens, up to a step where another choice was as good.

    Returns how many steps were compared.
    """
    for at, step in enumerate(steps):
        if at >= len(fast) or fast[at] != step.token:
            assert step.margin < 1e-4, (
                f"step {at}: {fast[at : at + 1]} for {step.token}, margin {step.margin}"
            )
            return at
    assert len(fast) == len(steps)
    return len(steps)
