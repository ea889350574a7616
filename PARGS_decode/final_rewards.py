"""Rewards of finished responses: best-of-n picks by them, and every method is compared by them."""

from progress import Progress, digest, prompt_key
from responses import Response
from transformers import PreTrainedTokenizerFast

from pargs.chat import ChatPrompt
from pargs.encoding import decode_texts, encode_prompts
from pargs.models import RewardModel
from pargs.processes import gather, split
from pargs.runs import Generation
from pargs.scoring import Continuation, check_reward, encode_continuations, score_finished, score_pairs


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
    rewards = score_unless_known(reward_model, prompts, continuations, template, reserved, label, progress)
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


def score_again(
    rows: list[Generation],
    reward_model: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    reserved: int,
    progress: Progress,
    label: str,
) -> list[Generation]:
    """Responses that were written before, with this reward model's rewards; every process does its share."""
    own, keep_ids = split(rows), reward_model.shares_ids_with(tokenizer)
    prompts, continuations = [row.asked for row in own], [Continuation.written(row, keep_ids) for row in own]
    rewards = score_unless_known(reward_model, prompts, continuations, template, reserved, label, progress)
    return gather(
        [row.model_copy(update={"reward": reward}) for row, reward in zip(own, rewards, strict=True)]
    )


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


def score_unless_known(
    reward_model: RewardModel,
    prompts: list[str],
    continuations: list[Continuation],
    template: str,
    reserved: int,
    label: str,
    progress: Progress | None,
) -> list[float]:
    """Rewards of finished responses; those that `progress` has kept are not asked for again."""
    texts = [continuation.text for continuation in continuations]
    keys = [digest([prompt_key(prompt), text]) for prompt, text in zip(prompts, texts, strict=True)]
    known = progress.rewards if progress else {}
    unknown = [at for at, key in enumerate(keys) if key not in known]
    rewards = score_finished(
        reward_model,
        [prompts[at] for at in unknown],
        [continuations[at] for at in unknown],
        template,
        reserved,
        label,
        progress and (lambda at, reward: progress.add_reward(keys[unknown[at]], reward)),
    )
    asked = dict(zip(unknown, rewards, strict=True))
    return [asked[at] if at in asked else known[key] for at, key in enumerate(keys)]
