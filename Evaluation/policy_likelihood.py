"""How likely a policy finds a response, all of it and within its top-k.

A response is known as text and encoded again here; where the policy wrote a text with other tokens than the
tokenizer would, the numbers are those of the tokenizer's. Prompts are encoded as plain text: live special
tokens of a prompt template are not supported.
"""

import numpy as np
import torch
from command_line import fail
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_policy(name: str) -> PreTrainedModel:
    try:
        policy = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # no network, no such name, a broken file: a dozen different types
        fail(f"cannot load the policy {name!r}: {error}")
    return policy.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail(f"cannot load the tokenizer of {name!r}: {error}")


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, finished: bool
) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the response, with its EOS where the policy wrote one.

    What spells a special token in either text stays text.
    """
    prompt_ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text

    response_ids = tokenizer(response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return prompt_ids, response_ids + [tokenizer.eos_token_id] * finished


@torch.inference_mode()
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
    results = [(np.empty(0), np.empty(0))] * len(pairs)
    # Longest first: little padding, and what does not fit into memory fails at once.
    lengths = [len(prompt) + len(response) for prompt, response in pairs]
    fitting = [at for at, pair in enumerate(pairs) if all(pair) and lengths[at] <= limit]
    order = sorted(fitting, key=lambda at: -lengths[at])

    for start in tqdm(range(0, len(order), batch_size), desc=label, leave=False):
        batch = order[start : start + batch_size]
        sequences = [torch.tensor(pairs[at][0] + pairs[at][1]) for at in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(policy.device)
        ends = torch.tensor([lengths[at] for at in batch], device=policy.device)
        attention_mask = (torch.arange(input_ids.shape[1], device=policy.device) < ends[:, None]).long()
        # [batch, length, vocabulary]
        logits = policy(input_ids=input_ids, attention_mask=attention_mask).logits

        for row, at in enumerate(batch):
            first, last = len(pairs[at][0]), lengths[at]
            log_probs = logits[row, first - 1 : last - 1].float().log_softmax(-1)  # [response, vocabulary]
            chosen = log_probs.gather(-1, input_ids[row, first:last, None]).squeeze(-1)

            top = log_probs.topk(min(k, log_probs.shape[-1])).values  # [response, k]
            within = torch.where(chosen >= top[:, -1], chosen - top.logsumexp(-1), -torch.inf)
            results[at] = chosen.cpu().double().numpy(), within.cpu().double().numpy()
    return results
