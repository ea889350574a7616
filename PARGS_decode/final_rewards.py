"""Rewards of finished responses: best-of-n picks by them, and every method is compared by them."""

import math

from progress import Progress, digest
from responses import Response
from transformers import PreTrainedTokenizerFast

from pargs.chat import ChatPrompt
from pargs.cli import fail, is_main
from pargs.encoding import decode_texts, encode_prompts
from pargs.models import RewardModel
from pargs.processes import gather, progress_bar, split
from pargs.runs import Generation
from pargs.scoring import Continuation, encode_continuations, fit_pair, score_pairs


def finished_responses(
    responses: list[Response], reward_model: RewardModel, tokenizer: PreTrainedTokenizerFast
) -> list[Continuation]:
    """What is delivered counts as finished, whatever ended it."""
    keep_ids = reward_model.shares_ids_with(tokenizer)
    texts = decode_texts(tokenizer, [response.ids for response in responses])
    return [
        Continuation(text, True, response.ids if keep_ids else None)
        for response, text in zip(responses, texts, strict=True)
    ]


def pick_best(
    responses: list[Response],
    samples: int,
    reward_model: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    reserved: int,
) -> list[Response]:
    """Of each prompt's samples the one that the reward model likes best, the first of equals."""
    prompts = [response.prompt for response in responses]
    rewards = score_pairs(
        reward_model,
        encode_prompts(reward_model.tokenizer, prompts, template),
        encode_continuations(reward_model, prompts, finished_responses(responses, reward_model, tokenizer)),
        reserved,
    )
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        check_reward(reward, prompt, reward_model)
    best = rewards.view(-1, samples).argmax(1).tolist()
    return [responses[group * samples + sample] for group, sample in enumerate(best)]


def score_responses(
    responses: list[Response],
    reward_model: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    reserved: int,
    progress: Progress | None,
    label: str,
) -> list[Generation]:
    """The responses as they are written to a file, each with its reward."""
    prompts = [response.prompt for response in responses]
    continuations = finished_responses(responses, reward_model, tokenizer)
    rewards = score_finished(reward_model, prompts, continuations, template, reserved, label, progress)
    return [
        Generation(
            prompt=response.prompt,
            result=continuation.text,
            reward=reward,
            num_tokens=len(response.ids),
            finish_reason=response.finish_reason,
            ids=response.written_ids,
            turns=response.prompt.turns if isinstance(response.prompt, ChatPrompt) else None,
        )
        for response, continuation, reward in zip(responses, continuations, rewards, strict=True)
    ]


def score_references(
    reward_model: RewardModel,
    prompts: list[str],
    references: list[str | None],
    template: str,
    reserved: int,
) -> list[float | None]:
    """Rewards of the human references, None where there is none; every process does its share."""
    given = split([at for at, reference in enumerate(references) if reference is not None])
    continuations = [Continuation(references[at] or "", True) for at in given]
    rewards = score_finished(
        reward_model, [prompts[at] for at in given], continuations, template, reserved, "reference"
    )
    scored = dict(gather(list(zip(given, rewards, strict=True))))
    return [scored.get(at) for at in range(len(prompts))]


def score_finished(
    reward_model: RewardModel,
    prompts: list[str],
    continuations: list[Continuation],
    template: str,
    reserved: int,
    label: str,
    progress: Progress | None = None,
) -> list[float]:
    """Rewards of finished responses to 4 decimals, one at a time so that none depends on its batch."""
    prompt_ids = encode_prompts(reward_model.tokenizer, prompts, template)
    response_ids = encode_continuations(reward_model, prompts, continuations)
    report_cut(reward_model, prompt_ids, response_ids, reserved, label)

    rewards = []
    asked = list(zip(prompts, continuations, prompt_ids, response_ids, strict=True))
    for prompt, continuation, own_ids, continued_ids in progress_bar(asked, f"{label:<7} scores", "response"):
        key = digest([prompt, continuation.text])
        reward = progress.rewards.get(key) if progress else None
        if reward is None:
            reward = round(score_pairs(reward_model, [own_ids], [continued_ids], reserved).item(), 4)
            check_reward(reward, prompt, reward_model)
            if progress:
                progress.add_reward(key, reward)
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
