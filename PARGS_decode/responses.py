"""The responses that are being written: how they begin, which decode together, and how a token enters."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from pargs.cli import fail, is_main
from pargs.models import Policy, encode_for_policy
from pargs.processes import gather


@dataclass
class Response:
    """One response being written: the `sample`-th to a prompt."""

    prompt: str
    prompt_ids: list[int]
    sample: int
    ids: list[int] = field(default_factory=list)
    eos_id: int | None = None  # the token that ended it, which is not among `ids`
    steps: list[dict] = field(default_factory=list)  # the trace, where one is kept
    num_candidates: int = 0  # that there were to choose from, in all steps

    @property
    def finish_reason(self) -> Literal["eos", "length"]:
        return "length" if self.eos_id is None else "eos"

    @property
    def written_ids(self) -> list[int]:
        """All that the policy wrote, the EOS included."""
        return self.ids if self.eos_id is None else [*self.ids, self.eos_id]

    def append(self, token: int, eos_ids: set[int], max_new_tokens: int) -> bool:
        """Take a token in; whether the response ends with it."""
        if token in eos_ids:
            self.eos_id = token
            return True
        self.ids.append(token)
        return len(self.ids) == max_new_tokens


def begin_responses(
    policy: Policy, prompts: list[str], template: str, samples: int, max_new_tokens: int, label: str
) -> list[Response]:
    """Empty responses, `samples` of each prompt side by side; a prompt that is too long loses its head."""
    encoded, num_cut = encode_for_policy(policy, prompts, template, max_new_tokens)
    num_cut = sum(gather([num_cut]))
    if num_cut and is_main():
        print(f"{label}: {num_cut} prompts are longer than {policy.name!r} can read and lose their beginning")
    return [
        Response(prompt, ids, sample)
        for prompt, ids in zip(prompts, encoded, strict=True)
        for sample in range(samples)
    ]


def cut_into_waves(
    responses: list[Response], samples: int, max_new_tokens: int, token_bytes: int, cache_gb: float
) -> Iterator[list[Response]]:
    """Those whose caches, of `token_bytes` a token, fit into `cache_gb`; similar prompt lengths together."""
    groups = [responses[at : at + samples] for at in range(0, len(responses), samples)]
    groups.sort(key=lambda group: len(group[0].prompt_ids), reverse=True)
    while groups:
        response_bytes = token_bytes * (len(groups[0][0].prompt_ids) + max_new_tokens)
        count = max(1, int(cache_gb * 1e9 / (response_bytes * samples)))
        yield [response for group in groups[:count] for response in group]
        groups = groups[count:]


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token takes in a model's key-value cache."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_size * model.dtype.itemsize


def append_tokens(
    policy: Policy, responses: list[Response], chosen: torch.Tensor, max_new_tokens: int
) -> list[bool]:
    """Append each response's token; whether it ends. `chosen` [batch, 3]: the token, if it is usable, and
    of how many candidates it was chosen.

    Here the host waits for the device, once a step (a guide that re-reads text has waited before).
    """
    ended = []
    for response, (token, usable, num_candidates) in zip(responses, chosen.tolist(), strict=True):
        if not usable:
            prompt = response.prompt[:200]
            fail(f"a NaN or infinite reward or log-probability came up after the prompt {prompt!r}")
        response.num_candidates += num_candidates
        ended.append(response.append(token, policy.eos_ids, max_new_tokens))
    return ended


def keep_trace(
    policy: Policy,
    responses: list[Response],
    candidates: torch.Tensor,
    log_probs: torch.Tensor,
    rewards: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    """Add this step's candidates to each response; all but `choice` [batch, 1] are [batch, k].

    What was left out has no log-probability, and what was not asked for no reward: None.
    """
    columns = (tensor.tolist() for tensor in (candidates, log_probs, rewards, choice))
    for response, ids, own_log_probs, own_rewards, (chosen,) in zip(responses, *columns, strict=True):
        response.steps.append(
            {
                "tokens": [policy.tokenizer.decode([token]) for token in ids],
                "log_probs": [round(value, 4) if math.isfinite(value) else None for value in own_log_probs],
                "rewards": [round(value, 4) if math.isfinite(value) else None for value in own_rewards],
                "chosen": chosen,
            }
        )
