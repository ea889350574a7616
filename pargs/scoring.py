"""Ask a reward model: from prompts and continuations to rewards, in batches that fit."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence

from pargs.cli import fail, is_main
from pargs.encoding import encode_prompts, encode_responses, encode_texts, eos_id
from pargs.models import RewardModel
from pargs.processes import gather, progress_bar
from pargs.runs import Generation


@dataclass
class Continuation:
    """What follows a prompt: its text, whether it is finished, and its ids (no EOS) if a policy wrote it."""

    text: str
    finished: bool
    ids: list[int] | None = None

    @classmethod
    def written(cls, row: Generation, keep_ids: bool) -> "Continuation":
        """A response from a file, with its ids where the reward model shares them with the policy."""
        ids = row.ids[:-1] if row.ids and row.finish_reason == "eos" else row.ids
        return cls(row.result, True, ids if keep_ids else None)


def encode_continuations(
    reward_model: RewardModel, prompts: list[str], continuations: list[Continuation]
) -> list[list[int]]:
    """Ids of each continuation as the reward model reads them, with EOS where a causal model's is finished.

    Texts are encoded, except that ids a policy wrote are taken as they are.
    """
    texts = [continuation.text for continuation in continuations]
    if not reward_model.causal:
        return encode_texts(reward_model.tokenizer, texts)

    own = [continuation.ids for continuation in continuations if continuation.ids is not None]
    if len(own) < len(continuations):
        own = encode_responses(reward_model.tokenizer, prompts, texts)
    eos = [eos_id(reward_model.tokenizer)]
    return [ids + eos * continuation.finished for ids, continuation in zip(own, continuations, strict=True)]


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
    frame = reward_model.frame
    pairs = [fit_pair(reward_model, *pair, reserved) for pair in zip(prompts, responses, strict=True)]
    inputs = [frame.ids(*pair) for pair in pairs]
    segments = [frame.segments(*pair) for pair in pairs]

    rewards = torch.empty(len(inputs), dtype=torch.float32, device=reward_model.model.device)
    order = sorted(range(len(inputs)), key=lambda at: len(inputs[at]), reverse=True)
    while order:
        count = micro_batch_size([len(inputs[at]) for at in order], reward_model.token_budget)
        batch, rest = order[:count], order[count:]
        try:
            rewards[batch] = final_rewards(
                reward_model, [inputs[at] for at in batch], [segments[at] for at in batch]
            )
        except torch.OutOfMemoryError:
            if count == 1:
                fail(f"{reward_model.name!r} runs out of memory on one input; lower --cache_gb")
            # Half of what did not fit, which may have been less than the budget.
            reward_model.token_budget = count * len(inputs[order[0]]) // 2
            continue
        order = rest
    return rewards


def score_finished(
    reward_model: RewardModel,
    prompts: list[str],
    continuations: list[Continuation],
    template: str,
    reserved: int,
    label: str,
    keep: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Rewards of finished responses to 4 decimals, one at a time so that none depends on its batch.

    `keep` is told the place and the reward of each as it comes.
    """
    prompt_ids = encode_prompts(reward_model.tokenizer, prompts, template)
    response_ids = encode_continuations(reward_model, prompts, continuations)
    report_cut(reward_model, prompt_ids, response_ids, reserved, label)

    rewards = []
    pairs = list(zip(prompts, prompt_ids, response_ids, strict=True))
    for at, (prompt, own_ids, continued_ids) in enumerate(
        progress_bar(pairs, f"{label:<7} scores", "response")
    ):
        reward = round(score_pairs(reward_model, [own_ids], [continued_ids], reserved).item(), 4)
        check_reward(reward, prompt, reward_model)
        if keep:
            keep(at, reward)
        rewards.append(reward)
    return rewards


def report_cut(
    reward_model: RewardModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    reserved: int,
    label: str,
) -> None:
    """Say how many pairs, of all processes, a reward model could not read whole."""
    pairs = zip(prompts, responses, strict=True)
    cut = sum(gather([sum(fit_pair(reward_model, *pair, reserved) != pair for pair in pairs)]))
    if cut and is_main():
        print(f"{label}: {cut} pairs are longer than {reward_model.name!r} can read and were cut")


def check_reward(reward: float, prompt: str, reward_model: RewardModel) -> None:
    if not math.isfinite(reward):
        fail(f"{reward_model.name!r} gives a reward of {reward} after the prompt {prompt[:200]!r}")


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


def final_rewards(
    reward_model: RewardModel, inputs: list[list[int]], segments: list[list[int]]
) -> torch.Tensor:
    """The reward [batch] of each whole input, in one forward pass."""
    rewards = token_rewards(reward_model, inputs, segments)
    reward_model.calls += len(inputs)
    if not reward_model.causal:
        return rewards[:, 0]

    # By length, never by searching for the pad id: that may be the EOS.
    last = torch.tensor([[len(ids) - 1] for ids in inputs], device=rewards.device)
    return rewards.gather(1, last).squeeze(1)


@torch.inference_mode()
def token_rewards(
    reward_model: RewardModel, inputs: list[list[int]], segments: list[list[int]]
) -> torch.Tensor:
    """Rewards after each token, [batch, longest], of a causal model; [batch, 1] of an encoder.

    One right-padded forward pass; behind an input's own length the rewards mean nothing.
    """
    device, pad_id = reward_model.model.device, cast(int, reward_model.tokenizer.pad_token_id or 0)
    lengths = torch.tensor([len(ids) for ids in inputs])
    reward_model.tokens_read += int(lengths.sum())

    # Built on the host and moved in one copy each.
    input_ids = pad_sequence([torch.tensor(ids) for ids in inputs], batch_first=True, padding_value=pad_id)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    model_inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}

    if reward_model.causal:
        hidden = base_model(reward_model)(**model_inputs, use_cache=False).last_hidden_state
        return score_head(reward_model)(hidden).squeeze(-1).float()

    if reward_model.has_segments:
        padded = pad_sequence([torch.tensor(ids) for ids in segments], batch_first=True)
        model_inputs["token_type_ids"] = padded.to(device)
    return reward_model.model(**model_inputs).logits.float()


def base_model(reward_model: RewardModel) -> torch.nn.Module:
    """The model below the `score` head."""
    return getattr(reward_model.model, reward_model.model.base_model_prefix)


def score_head(reward_model: RewardModel) -> torch.nn.Module:
    """From hidden states [..., hidden] to rewards [..., 1]."""
    return reward_model.model.get_submodule("score")
