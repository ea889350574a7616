"""How likely a policy finds a response, all of it and within its top-k.

A response is known as text and encoded again here; where the policy wrote a text with other tokens than the
tokenizer would, the numbers are those of the tokenizer's.
"""

import numpy as np
import torch
from command_line import fail
from processes import copy_weights, join_processes, map_batches
from text_encoding import encode_prompts, encode_responses, start_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_policy(name: str) -> PreTrainedModel:
    try:
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # no network, no such name, a broken file: a dozen different types
        fail(f"cannot load the policy {name!r}: {error}")
    return copy_weights(policy.eval()).to(join_processes().device)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load the tokenizer of {name!r}: {error}")
    if not tokenizer.is_fast:
        fail(f"{name!r} has no fast tokenizer, which its likelihoods need")
    return tokenizer


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, finished: bool, template: str
) -> tuple[list[int], list[int]]:
    """Ids of the prompt as decoding reads it, and of the response, with its EOS where the policy wrote one.

    What spells a special token in either text stays text; special tokens of `template` are live.
    """
    (prompt_ids,) = encode_prompts(tokenizer, [prompt], template)
    (response_ids,) = encode_responses(tokenizer, [prompt], [response])
    return start_ids(tokenizer) + prompt_ids, response_ids + [tokenizer.eos_token_id] * finished


def response_log_probs(
    policy: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], k: int, batch_size: int, label: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities in nats of each response's tokens given what precedes them.

    Returns:
        per pair, two arrays of shape [len(response)]: under the policy, and under top-k sampling of it
        (renormalised over the k likeliest tokens, -inf for a token outside them). Both are empty where
        the pair does not fit into the policy's context.
    """
    limit = getattr(policy.config, "max_position_embeddings", None) or float("inf")
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    fitting = [at for at, pair in enumerate(pairs) if all(pair) and lengths[at] <= limit]
    # Longest first: little padding, and what does not fit into memory fails at once.
    order = sorted(fitting, key=lambda at: -lengths[at])

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    scored = map_batches(
        lambda batch: batch_log_probs(policy, [pairs[at] for at in batch], k), batches, label
    )

    results = [(np.empty(0), np.empty(0))] * len(pairs)
    for batch, of_batch in zip(batches, scored, strict=True):
        for at, log_probs in zip(batch, of_batch, strict=True):
            results[at] = log_probs
    return results


@torch.inference_mode()
def batch_log_probs(
    policy: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    sequences = [torch.tensor(prompt + response) for prompt, response in pairs]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(policy.device)
    ends = torch.tensor([len(sequence) for sequence in sequences], device=policy.device)
    attention_mask = (torch.arange(input_ids.shape[1], device=policy.device) < ends[:, None]).long()
    # [batch, length, vocabulary]
    logits = policy(input_ids=input_ids, attention_mask=attention_mask).logits

    results = []
    for row, (prompt, response) in enumerate(pairs):
        first, last = len(prompt), len(prompt) + len(response)
        log_probs = logits[row, first - 1 : last - 1].float().log_softmax(-1)  # [response, vocabulary]
        chosen = log_probs.gather(-1, input_ids[row, first:last, None]).squeeze(-1)

        top = log_probs.topk(min(k, log_probs.shape[-1])).values  # [response, k]
        within = torch.where(chosen >= top[:, -1], chosen - top.logsumexp(-1), -torch.inf)
        results.append((chosen.cpu().double().numpy(), within.cpu().double().numpy()))
    return results
