"""The method as the paper states it, in the plainest loop: one prompt, one candidate at a time, no cache.

The policy reads its own ids; an encoder reward model reads the re-tokenised text, through its tokenizer's
own pair encoding; a causal one reads the policy's ids, with EOS where the response is finished.
"""

from dataclasses import dataclass

import torch


@dataclass
class Step:
    """What the reference saw when it chose a token: how far the choice was from another one."""

    token: int
    margin: float


@torch.no_grad()
def reference_response(
    policy,
    policy_tokenizer,
    prompt: str,
    k: int,
    max_new_tokens: int,
    reward_model=None,
    reward_tokenizer=None,
    causal: bool = False,
    weight: float = 0.0,
    uniforms=None,
    eos: int | None = None,
) -> list[Step]:
    """Write one response, ended by `eos` where one is given.

    `uniforms(step)` gives the random number of a step, None decodes greedily.
    """
    prompt_ids = policy_tokenizer(prompt)["input_ids"]
    response, steps = [], []

    for step in range(max_new_tokens):
        logits = policy(torch.tensor([prompt_ids + response], device=policy.device)).logits[0, -1]
        log_probs, by_probability = logits.float().log_softmax(-1).sort(descending=True, stable=True)
        # One more than the candidates: a token just outside the top k could have been in it.
        log_probs, by_probability = log_probs[: k + 1].tolist(), by_probability[: k + 1].tolist()

        scores = []
        for token, score in zip(by_probability[:k], log_probs, strict=False):
            if reward_model is not None:
                score += weight * reference_reward(
                    reward_model, reward_tokenizer, causal, policy_tokenizer, prompt, [*response, token]
                )
            scores.append(score)

        chosen, margin = pick(scores, None if uniforms is None else uniforms(step))
        token = by_probability[chosen]
        if k < len(by_probability):
            margin = min(margin, log_probs[k - 1] - log_probs[k])
        steps.append(Step(token, margin))
        if token == eos:
            break
        response.append(token)
    return steps


def pick(scores: list[float], uniform: float | None) -> tuple[int, float]:
    """The index chosen, and how far from choosing another."""
    if uniform is None:
        best = max(range(len(scores)), key=lambda at: (scores[at], -at))
        others = [scores[best] - score for at, score in enumerate(scores) if at != best]
        return best, min(others, default=float("inf"))

    probabilities = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    edge, margin = 0.0, float("inf")
    chosen = None
    for at, probability in enumerate(probabilities):
        edge += probability
        margin = min(margin, abs(edge - uniform))
        if chosen is None and uniform < edge:
            chosen = at
    return len(scores) - 1 if chosen is None else chosen, margin


@torch.no_grad()
def reference_reward(model, tokenizer, causal, policy_tokenizer, prompt: str, response: list[int]) -> float:
    """The reward of a response, whose last id may be the EOS that finishes it."""
    if causal:
        ids = policy_tokenizer(prompt)["input_ids"] + response
        base = getattr(model, model.base_model_prefix)
        return model.score(base(torch.tensor([ids], device=model.device)).last_hidden_state[0, -1]).item()

    text = policy_tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # As a batch of one: a single call takes an empty text for no text at all.
    inputs = tokenizer([prompt], [text], split_special_tokens=True, return_tensors="pt").to(model.device)
    return model(**inputs).logits[0, 0].item()


def assert_same_tokens(steps: list[Step], tokens: list[int], eos: int | None, finished: bool) -> int:
    """The fast path wrote the reference's tokens, up to a step where another choice was as good.

    Returns how many steps were compared.
    """
    fast = tokens + [eos] * finished
    for at, step in enumerate(steps):
        if at >= len(fast) or fast[at] != step.token:
            assert step.margin < 1e-4, (
                f"step {at}: {fast[at : at + 1]} for {step.token}, margin {step.margin}"
            )
            return at
    assert len(fast) == len(steps)
    return len(steps)
