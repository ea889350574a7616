"""How likely a policy finds a response, all of it and within its top-k.

A response is the ids that its policy wrote, the EOS that ended it included. Its text is encoded again only
where they are not known or mean something else to another policy; it then ends with any EOS of that policy.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import PeftConfig
from sampled_kl import LogProbs
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from pargs.chat import with_turns
from pargs.cli import fail
from pargs.encoding import encode_responses
from pargs.files import DECODE
from pargs.models import MODEL_ERRORS, Policy, encode_for_policy, load_policy, load_tokenizer
from pargs.processes import join_processes, map_shared
from pargs.runs import METHODS_FILE


class Pair(NamedTuple):
    """A prompt and a response as a policy reads them."""

    prompt_ids: list[int]
    response_ids: list[int]
    any_eos: bool = False  # the last id stands for every EOS of the policy: which one ended it is not known


def measure_log_probs(
    policy_name: str,
    responses: pd.DataFrame,
    template: str,
    writer: str | None,
    k: int,
    max_new_tokens: int,
    batch_size: int,
    label: str,
    gap: float | None = None,
) -> tuple[list[LogProbs], str | None]:
    """Both log-probabilities of each response under a policy; and why text was encoded again, if it was.

    `responses` is indexed by (prompt, copy); `writer` is the policy that wrote them.
    """
    policy = load_policy(policy_name, torch.float32, join_processes().device)
    reason = why_encode_again(policy, responses, writer)
    if reason:
        pairs = encode_texts_again(policy, responses, template, max_new_tokens)
    else:
        pairs = pair_ids(policy, responses, template, max_new_tokens)
    return response_log_probs(policy, pairs, k, batch_size, label, gap), reason


def why_encode_again(policy: Policy, responses: pd.DataFrame, writer: str | None) -> str | None:
    """Why the ids of the responses are not what this policy would read; None where they are."""
    if responses["ids"].isna().any():
        return "their files hold no ids"
    if writer is None:
        return f"{METHODS_FILE} does not say whose ids they are"
    if not is_here(writer):
        return f"the policy that wrote them, {writer!r}, is not here"
    if policy.name != writer and vocabulary(policy.name) != vocabulary(writer):
        return f"{policy.name!r} has another vocabulary than the policy that wrote them"
    return None


@cache
def is_here(name: str) -> bool:
    """Whether a policy can be had: a folder, or from the hub."""
    kind = PeftConfig if Path(name, "adapter_config.json").exists() else AutoConfig
    try:
        kind.from_pretrained(name)
    except MODEL_ERRORS:
        return False
    return True


@cache
def vocabulary(name: str) -> dict[str, int]:
    return load_tokenizer(name).get_vocab()


def prompts_of(responses: pd.DataFrame) -> list[str]:
    return with_turns(list(responses.index.get_level_values("prompt")), responses.get("turns"))


def pair_ids(policy: Policy, responses: pd.DataFrame, template: str, max_new_tokens: int) -> list[Pair]:
    """Each prompt as decoding reads it, and the ids that were written."""
    prompts = prompts_of(responses)
    prompt_ids, _ = encode_for_policy(policy, prompts, template, max_new_tokens)
    vocabulary_size = policy.model.get_input_embeddings().num_embeddings
    if any(not 0 <= token < vocabulary_size for ids in responses["ids"] for token in ids):
        fail(f"a generation file holds ids that {policy.name!r} does not know; make it again with `{DECODE}`")
    return [Pair(prompt, ids) for prompt, ids in zip(prompt_ids, responses["ids"], strict=True)]


def encode_texts_again(
    policy: Policy, responses: pd.DataFrame, template: str, max_new_tokens: int
) -> list[Pair]:
    """Each prompt as decoding reads it, and its response's text in the policy's own tokens.

    What spells a special token in a text stays text; special tokens of `template` are live.
    """
    prompts = prompts_of(responses)
    prompt_ids, _ = encode_for_policy(policy, prompts, template, max_new_tokens)
    response_ids = encode_responses(policy.tokenizer, prompts, list(responses["result"]))
    eos, ended = sorted(policy.eos_ids)[:1], responses["finish_reason"] == "eos"
    return [
        Pair(prompt, response + eos * ends, bool(eos) and ends)
        for prompt, response, ends in zip(prompt_ids, response_ids, ended, strict=True)
    ]


def response_log_probs(
    policy: Policy, pairs: list[Pair], k: int, batch_size: int, label: str, gap: float | None = None
) -> list[LogProbs]:
    """Log-probabilities in nats of each response's tokens given what precedes them.

    Returns:
        per pair, two arrays of shape [len(response)]: under the policy, and under top-k sampling of it
        (renormalised over the k likeliest tokens, of these over those within `gap` nats of the first if it
        is given, -inf for a token outside them). Both are empty where the pair does not fit into the
        policy's context.
    """
    lengths = [len(pair.prompt_ids) + len(pair.response_ids) for pair in pairs]
    fitting = [
        at
        for at, pair in enumerate(pairs)
        if pair.prompt_ids and pair.response_ids and lengths[at] <= policy.max_length
    ]
    # Longest first: little padding, and what does not fit into memory fails at once.
    order = sorted(fitting, key=lambda at: -lengths[at])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    scored = map_shared(
        lambda batch: batch_log_probs(policy, [pairs[at] for at in batch], k, gap), batches, label, " batches"
    )

    results: list[LogProbs] = [(np.empty(0), np.empty(0))] * len(pairs)
    for batch, of_batch in zip(batches, scored, strict=True):
        for at, log_probs in zip(batch, of_batch, strict=True):
            results[at] = log_probs
    return results


@torch.inference_mode()
def batch_log_probs(policy: Policy, pairs: list[Pair], k: int, gap: float | None = None) -> list[LogProbs]:
    device = policy.model.device
    sequences = [torch.tensor(pair.prompt_ids + pair.response_ids) for pair in pairs]
    input_ids = pad_sequence(sequences, batch_first=True).to(device)  # [batch, length]
    attention_mask = pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True).to(device)
    # [batch, length, vocabulary]
    logits = policy.model(input_ids=input_ids, attention_mask=attention_mask).logits

    eos = torch.tensor(sorted(policy.eos_ids), dtype=torch.long, device=device)
    results = []
    for row, pair in enumerate(pairs):
        first, last = len(pair.prompt_ids), len(sequences[row])
        log_probs = logits[row, first - 1 : last - 1].float().log_softmax(-1)  # [response, vocabulary]
        top = log_probs.topk(min(k, log_probs.shape[-1])).values  # [response, k]
        lowest = top[:, -1:] if gap is None else top[:, -1:].maximum(top[:, :1] - gap)
        within = log_probs - top.masked_fill(top < lowest, -torch.inf).logsumexp(-1, keepdim=True)
        within = within.where(log_probs >= lowest, -torch.inf)  # [response, vocabulary]

        of_tokens = []
        for values in (log_probs, within):
            chosen = values.gather(-1, input_ids[row, first:last, None]).squeeze(-1)  # [response]
            if pair.any_eos:
                chosen[-1] = values[-1, eos].logsumexp(-1)
            of_tokens.append(chosen.cpu().double().numpy())
        results.append(tuple(of_tokens))
    return results
