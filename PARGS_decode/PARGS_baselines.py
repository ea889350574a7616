"""Decode the test prompts with every method: ARGS, PARGS-G, PARGS, BESTN, TOP-K, GREEDY, DPO and PPO.

Reads   summarize_from_feedback/ (split `test`), the policies and the reward models.
Writes  generation_{args,pargs,pargs_g,bestn,...}.json and baseline_results.csv, which holds the
        evaluation reward model's score of each finished response; methods.json, what each method was, what
        it cost and where it comes from; references.json; with --trace also trace_*.jsonl.

At each token the policy proposes its top k; guided methods add w times the reward of each continuation to
its log-probability and take the best, or sample. All prompts decode together, yet what is written for one
does not depend on the others: its random numbers belong to (seed, method, prompt, sample, step) alone.
What is finished is kept as it goes: the same command goes on after a run that was killed. With other
settings, what they change is decoded anew, and nothing else: one method, prompts that are new, or rewards.

    python PARGS_decode/PARGS_baselines.py
"""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from final_rewards import pick_best, score_again, score_references, score_responses
from guides import CachedGuide, RereadingGuide, choose_guide, left_pad, positions
from progress import Progress
from prompts import load_prompts
from pydantic import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt
from responses import Response, append_tokens, begin_responses, cache_bytes, cut_into_waves, keep_trace
from run_models import (
    Precision,
    choose_dtype,
    get_evaluator,
    get_policy,
    get_reward_model,
    peak_gb,
    reset_peak,
)
from run_state import (
    Work,
    check_models,
    collect_rewards,
    drop_results,
    find_work,
    known_methods,
    save_method,
    save_references,
    save_rewards,
)
from transformers import Cache, DynamicCache

from pargs.cli import TRUTH_VALUES, fail, is_main, next_step, parse_settings, run_script, setting
from pargs.files import check_writable
from pargs.models import Policy, load_policy, load_tokenizer, warn_of_unused_separator
from pargs.origin import Origin
from pargs.processes import count_processes, describe_device, gather, join_processes, progress_bar, split
from pargs.runs import (
    REWARDS,
    Cost,
    Generation,
    GuideEos,
    Method,
    MethodRecord,
    generation_path,
    write_methods,
)


@dataclass
class Settings:
    methods: list[str] = setting([], "Which to run, e.g. --methods ARGS PARGS-G; all of them if not given.")

    policy: str = setting("vistagi/gpt2-large-tldr-sum", "The reference policy (SFT model).")
    full_reward_model: str = setting(
        "OpenAssistant/reward-model-deberta-v3-large", "Of full texts: guides ARGS, picks for BESTN, scores."
    )
    partial_reward_model: str = setting("partial_reward_modeling_tldr", "Of prefixes: guides PARGS.")
    evaluation_reward_model: str | None = setting(
        None, "Scores what is finished; else the full reward model."
    )
    dpo_policy: str = setting("GPT2_large_tldr_DPO", "The DPO adapter or model.")
    ppo_policy: str = setting("vistagi/gpt2-large-tldr-sum-rlhf", "The RLHF model.")

    dataset: str = setting("summarize_from_feedback", "Where the test prompts are.")
    prompts: str | None = setting(
        None, 'Own prompts instead: lines {"prompt": ..., "reference": ...}, a text or messages.'
    )
    num_prompts: NonNegativeInt | None = setting(
        None, "How many to decode, 0 for all; if not given, 100 test prompts or all of --prompts."
    )
    prompt_seed: int = setting(42, "Which test prompts; more of the same seed contain the fewer.")
    output_dir: str = setting(".", "Where everything is written: a run directory.")

    k: PositiveInt = setting(10, "Tokens that the policy proposes at each step.")
    candidate_gap: PositiveFloat | None = setting(
        None, "Leave out candidates more than so many nats below the most probable; none unless given."
    )
    max_new_tokens: PositiveInt = setting(64, "Longest response in tokens.")
    args_weight: FiniteFloat = setting(1.0, "w of ARGS in log pi + w * r.")
    pargs_g_weight: FiniteFloat = setting(1.0, "w of PARGS-G.")
    pargs_weight: FiniteFloat = setting(2.0, "w of PARGS.")
    args_eos: GuideEos = setting(
        "finished", "Where ARGS' guide reads an EOS, if it is decoder-only: always closes every prefix."
    )
    best_of: PositiveInt = setting(10, "Samples that BESTN chooses from.")
    seed: int = setting(42, "Of all sampling.")

    overwrite: bool = setting(False, "Delete what is here of the methods, and decode them anew.")
    trace: bool = setting(False, "Keep every step's candidates and rewards.")
    dtype: Precision = setting("auto", "Of policies and guides; auto: float16 on a GPU, float32 on a CPU.")
    device_map: str | None = setting(None, "auto spreads a policy too large for one GPU over all of them.")
    fast_attention: bool = setting(
        False, "The attention of requirements-gpu.txt, for DeBERTa; not measured on a GPU yet."
    )
    token_budget: NonNegativeInt = setting(0, "Tokens a reward model reads at once; 0 fits the device.")
    cache_gb: PositiveFloat = setting(8.0, "For key-value caches: sets how many prompts decode at once.")


METHODS: dict[str, Callable[[Settings], Method]] = {
    "ARGS": lambda s: Method(
        policy=s.policy,
        guide=s.full_reward_model,
        weight=s.args_weight,
        guide_eos=s.args_eos,
        greedy=True,
    ),
    "PARGS-G": lambda s: Method(
        policy=s.policy, guide=s.partial_reward_model, weight=s.pargs_g_weight, greedy=True
    ),
    "PARGS": lambda s: Method(policy=s.policy, guide=s.partial_reward_model, weight=s.pargs_weight),
    "BESTN": lambda s: Method(policy=s.policy, best_of=s.best_of, chooser=s.full_reward_model),
    "TOP-K": lambda s: Method(policy=s.policy),
    "GREEDY": lambda s: Method(policy=s.policy, greedy=True),
    "DPO": lambda s: Method(policy=s.dpo_policy),
    "PPO": lambda s: Method(policy=s.ppo_policy),
}


# Choosing a token


def top_candidates(
    logits: torch.Tensor, k: int, gap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens and their log-probabilities over the whole vocabulary, both [batch, k].

    Candidates come by falling probability, equal ones by rising id. Those more than `gap` nats below the
    first have the log-probability -inf: they are never chosen, and no guide is asked about them.
    """
    log_probs = logits.float().log_softmax(-1)  # [batch, vocabulary]
    # 1e-13 an id separates equal values and is below the distance of different ones.
    by_id = torch.arange(log_probs.shape[-1], device=log_probs.device, dtype=torch.float64) * 1e-13
    candidates = (log_probs.double() - by_id).topk(min(k, log_probs.shape[-1])).indices
    log_probs = log_probs.gather(1, candidates)
    if gap is not None:
        log_probs = log_probs.masked_fill(log_probs < log_probs[:, :1] - gap, -torch.inf)
    return candidates, log_probs


def choose(scores: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Which candidate of each row, [batch]: the first best, or by inverse CDF of softmax(scores).

    `scores` is [batch, k] in float64, `uniforms` [batch] or None for greedy.
    """
    if uniforms is None:
        return scores.argmax(-1)
    cdf = scores.softmax(-1).cumsum(-1)
    # The last candidate that can be chosen has the rest.
    return (cdf[:, :-1] <= uniforms[:, None]).sum(-1).minimum((scores > -torch.inf).sum(-1).clamp(min=1) - 1)


def uniform(seed: int, method: str, prompt: str, sample: int, step: int) -> float:
    """The random number in [0, 1) of one step, the same wherever and beside whatever it is drawn."""
    key = json.dumps([seed, method, prompt, sample, step]).encode()
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def draw_uniforms(
    responses: list[Response], name: str, step: int, seed: int, device: torch.device
) -> torch.Tensor:
    """One number for each response, [batch]."""
    drawn = [uniform(seed, name, response.prompt, response.sample, step) for response in responses]
    return torch.tensor(drawn, dtype=torch.float64, device=device)


# Decoding


def read_prompts(
    policy: Policy, responses: list[Response], samples: int
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Read each prompt once for all its samples: logits [batch, vocabulary], mask [batch, longest], cache."""
    prompt_ids = [response.prompt_ids for response in responses[::samples]]
    input_ids, mask = left_pad(prompt_ids, policy.model.device)  # both [prompts, longest]
    past_key_values = DynamicCache(config=policy.model.config)
    logits = next_logits(policy, input_ids, mask, positions(mask), past_key_values)
    if samples > 1:
        past_key_values.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    return logits, mask, past_key_values


@torch.inference_mode()
def decode_wave(
    name: str,
    method: Method,
    policy: Policy,
    guide: RereadingGuide | CachedGuide | None,
    responses: list[Response],
    settings: Settings,
) -> Iterator[list[Response]]:
    """Write the responses together, in place; the samples of a prompt stand side by side.

    Yields after each step the responses that ended with it; they leave the batch at once.
    """
    logits, mask, past_key_values = read_prompts(policy, responses, method.best_of)
    device = logits.device
    if guide:
        guide.begin(responses)

    for step in range(settings.max_new_tokens):
        candidates, log_probs = top_candidates(logits, settings.k, settings.candidate_gap)  # both [batch, k]
        kept = log_probs > -torch.inf
        asked = kept & (kept.sum(1, keepdim=True) > 1)  # one candidate needs no reward
        about = asked if settings.candidate_gap else None  # all: nothing to look up on the device
        rewards = guide.score(responses, candidates, about) if guide else torch.zeros_like(log_probs)
        scores = log_probs.double() + method.weight * rewards.double().where(asked, 0)

        uniforms = None if method.greedy else draw_uniforms(responses, name, step, settings.seed, device)
        choice = choose(scores, uniforms)[:, None]  # [batch, 1]
        tokens = candidates.gather(1, choice)
        if guide and settings.trace:
            keep_trace(policy, responses, candidates, log_probs, rewards, choice)

        # log pi may be -inf, a reward that was asked for may not.
        usable = (rewards.isfinite() | ~asked).all(1, keepdim=True) & ~scores.isnan().any(1, keepdim=True)
        taken = torch.cat([tokens, usable, kept.sum(1, keepdim=True)], 1)
        ended = append_tokens(policy, responses, taken, settings.max_new_tokens)
        yield [response for response, ends in zip(responses, ended, strict=True) if ends]

        going_on = [at for at, ends in enumerate(ended) if not ends]
        if not going_on:
            return
        if len(going_on) < len(responses):
            responses = [responses[at] for at in going_on]
            index = torch.tensor(going_on, device=device)
            tokens, mask = tokens[index], mask[index]
            # The layers of a spread policy lie on several devices; an index on the host suits all.
            past_key_values.batch_select_indices(index.cpu() if settings.device_map else index)
            if guide:
                guide.keep(going_on)

        position_ids = mask.sum(1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        logits = next_logits(policy, tokens, mask, position_ids, past_key_values)


def next_logits(
    policy: Policy,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: Cache,
) -> torch.Tensor:
    """Logits after the last token, [batch, vocabulary]; the cache takes the tokens in."""
    return policy.model(
        input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


@dataclass
class Decoded:
    """The responses of one method: all of them, and those that this launch wrote."""

    policy: Policy
    responses: list[Response]  # the samples of a prompt side by side
    written: list[Response]


def decode_method(
    name: str, prompts: list[str], template: str, settings: Settings, progress: Progress | None = None
) -> Decoded:
    """Write one method's responses; what `progress` has kept is not written again, what ends is added."""
    method, limit = METHODS[name](settings), settings.max_new_tokens
    policy = get_policy(method.policy, settings)
    responses = begin_responses(policy, prompts, template, method.best_of, limit, name)
    unwritten = progress.fill_in(responses, method.best_of) if progress else responses

    guide, token_bytes = None, cache_bytes(policy.model)
    if method.guide:
        reward_model = get_reward_model(method.guide, settings)
        guide = choose_guide(reward_model, policy, template, limit, settings.k, unwritten, method.guide_eos)
        token_bytes += cache_bytes(reward_model.model) * isinstance(guide, CachedGuide)

    num_ended = len(responses) - len(unwritten)
    waves = cut_into_waves(unwritten, method.best_of, limit, token_bytes, settings.cache_gb)
    with progress_bar(None, f"{name:<7}", "token", total=len(responses) * limit) as bar:
        try:
            for wave in waves:
                num_writing = len(wave)
                steps = decode_wave(name, method, policy, guide, wave, settings)
                for step, ended in enumerate(steps, start=1):
                    if progress:
                        progress.add_responses(ended)
                    # A response that ends early saves the tokens it could still have had.
                    num_writing, num_ended = num_writing - len(ended), num_ended + len(ended)
                    bar.update(num_ended * limit + num_writing * step - bar.n)
        except torch.OutOfMemoryError:
            fail("the GPU's memory is full; --cache_gb says how many prompts decode at once: lower it")
    return Decoded(policy, responses, unwritten)


def evaluator_of(settings: Settings) -> str:
    return settings.evaluation_reward_model or settings.full_reward_model


def run_method(
    name: str, prompts: list[str], template: str, settings: Settings, progress: Progress | None = None
) -> tuple[list[Generation], list[list[dict]], Cost]:
    """Decode and score one method: its rows, their traces, and what the decoding cost.

    Every process does its share of the prompts, and all get the whole, in order.
    """
    method, reserved = METHODS[name](settings), settings.max_new_tokens + 1
    get_policy(method.policy, settings)  # loading is not decoding
    asked = [get_reward_model(model, settings) for model in {method.guide, method.chooser} if model]
    for reward_model in asked:
        reward_model.calls = reward_model.tokens_read = 0
    device = join_processes().device
    reset_peak(device)
    started = time.perf_counter()

    decoded = decode_method(name, split(prompts), template, settings, progress)
    responses, tokenizer = decoded.responses, decoded.policy.tokenizer
    if method.chooser:
        chooser = get_reward_model(method.chooser, settings)
        responses = pick_best(responses, method.best_of, chooser, tokenizer, template, reserved)
    cost = Cost(
        responses=len(decoded.written),
        seconds=time.perf_counter() - started,
        tokens=sum(len(response.ids) for response in decoded.written),
        reward_calls=sum(reward_model.calls for reward_model in asked),
        reward_tokens=sum(reward_model.tokens_read for reward_model in asked),
        steps=sum(len(response.written_ids) for response in decoded.written),
        candidates=sum(response.num_candidates for response in decoded.written),
        peak_gb=peak_gb(device),
    )

    evaluator = get_evaluator(evaluator_of(settings), settings)
    scored = score_responses(responses, evaluator, tokenizer, template, reserved, progress, name)
    steps = [response.steps for response in responses]
    return gather(scored), gather(steps), Cost.together(gather([cost]))


# The run


def name_methods(asked: list[str]) -> list[str]:
    """Those of METHODS that were asked for, in whatever case; all of them if none was."""
    known = {name.lower(): name for name in METHODS}
    folded = [name.lower().replace("_", "-") for name in asked]
    if unknown := [name for name, key in zip(asked, folded, strict=True) if key not in known]:
        fail(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown)}")
    return list(dict.fromkeys(known[key] for key in folded)) or list(METHODS)


def check_settings(settings: Settings) -> None:
    if settings.device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fail("--device_map spreads a policy over all GPUs: start one process, without a launcher")
    check_writable(Path(settings.output_dir))


def dtype_name(settings: Settings) -> str:
    """The precision that policies and guides decode in on this device."""
    return str(choose_dtype(settings.dtype, join_processes().device)).removeprefix("torch.")


def describe_methods(
    methods: dict[str, Method], models: dict[str, str | None], template: str, settings: Settings
) -> dict[str, MethodRecord]:
    """The record of each method, as it is before it costs anything."""
    evaluator, origin = evaluator_of(settings), Origin.of(settings, describe_device())
    return {
        name: MethodRecord(
            method=method,
            k=settings.k,
            candidate_gap=settings.candidate_gap,
            max_new_tokens=settings.max_new_tokens,
            reference_policy=settings.policy,
            evaluator=evaluator,
            cost=Cost(responses=0, seconds=0, tokens=0, reward_calls=0, reward_tokens=0),
            seed=settings.seed,
            dtype=dtype_name(settings),
            fast_attention=settings.fast_attention,
            template=template,
            models={model: models[model] for model in (*method.models, evaluator)},
            origin=origin,
        )
        for name, method in methods.items()
    }


def finish_method(
    name: str, record: MethodRecord, work: Work, prompts: list[str], settings: Settings, traced: bool
) -> None:
    """Decode and score what is left of a method, and write the whole of it."""
    directory, template = Path(settings.output_dir), str(record.template)
    scoring = [record.evaluator, record.models[str(record.evaluator)], settings.fast_attention]
    progress = Progress(name, [record.recipe, traced], scoring, directory)

    kept, steps = work.kept, work.steps
    if kept and not work.scored:
        evaluator = get_evaluator(str(record.evaluator), settings)
        tokenizer, reserved = load_tokenizer(record.method.policy), record.max_new_tokens + 1
        kept = score_again(kept, evaluator, tokenizer, template, reserved, progress, name)
    if work.new:
        generations, new_steps, cost = run_method(name, work.new, template, settings, progress)
        kept = kept + generations
        steps = steps | (dict(zip(work.new, new_steps, strict=True)) if traced else {})
        record = record.model_copy(update={"cost": cost})
        if is_main():
            print(f"{name}: {cost.describe()}")

    if is_main():
        if not work.new:  # what it cost to decode, and where, is known
            theirs = known_methods(directory)[name]
            record = record.model_copy(update={"cost": theirs.cost, "origin": theirs.origin})
        by_prompt = {row.prompt: row for row in kept}
        asked = set(prompts)
        rows = [by_prompt[prompt] for prompt in prompts] + [row for row in kept if row.prompt not in asked]
        save_method(name, rows, steps, record, list(METHODS), directory)
    progress.drop()


def update_records(records: dict[str, MethodRecord], directory: Path) -> None:
    """Set what changes no response of a method that is done: the policy of KL, a greedy one's seed."""
    known = known_methods(directory)
    for name, record in records.items():
        free = {"reference_policy": record.reference_policy, "seed": record.seed}
        known[name] = known[name].model_copy(update=free)
    write_methods(known, directory)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    names, directory = name_methods(settings.methods), Path(settings.output_dir)
    check_settings(settings)
    join_processes()
    prompts, references, template = load_prompts(
        settings.dataset, settings.prompts, settings.num_prompts, settings.prompt_seed, settings.policy
    )
    methods = {name: METHODS[name](settings) for name in names}
    models = check_models(methods, evaluator_of(settings), vars(settings))
    records = describe_methods(methods, models, template, settings)
    if is_main():
        if any(method.policy == settings.policy for method in methods.values()):
            warn_of_unused_separator(settings.policy, load_tokenizer(settings.policy), template)
        if settings.overwrite:
            drop_results(names, directory)

    traced = {name for name, method in methods.items() if settings.trace and method.guide}
    work = find_work(records, traced, prompts, directory)
    left = [name for name in names if not work[name].is_done]
    for _, of_policy in groupby(left, key=lambda name: methods[name].policy):
        for name in of_policy:
            finish_method(name, records[name], work[name], prompts, settings, name in traced)
        load_policy.cache_clear()  # the one policy goes before the other comes

    evaluator = get_evaluator(evaluator_of(settings), settings)
    rewards = score_references(evaluator, prompts, references, template, settings.max_new_tokens + 1)
    if is_main():
        update_records(records, directory)
        save_references(prompts, references, rewards, directory)
        alike = ("k", "candidate_gap", "max_new_tokens", "seed")
        shared = {key: getattr(settings, key) for key in alike} | {"dtype": dtype_name(settings)}
        shared |= {"template": template, "evaluator": evaluator_of(settings)}
        shared |= {"reference_policy": settings.policy, "models": models}
        table, left_out = collect_rewards(list(METHODS), prompts, rewards, shared, directory)
        save_rewards(table.to_csv(index=False), directory)
        report(table, left, left_out, directory)


def report(table: pd.DataFrame, written: list[str], left_out: dict[str, str], directory: Path) -> None:
    if written:
        print(f"\nwrote {', '.join(str(generation_path(name, directory)) for name in written)}")
    print(f"wrote {directory / REWARDS}: {len(table)} prompts, {count_processes()}; mean rewards:")
    print(table.drop(columns="prompt").mean().round(4).to_string())
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if left_out:
        given = shlex.join(sys.argv[1:])
        flags = shlex.split(re.sub(rf"--overwrite(=\S+|\s+(?i:{'|'.join(TRUTH_VALUES)})\b)?", "", given))
        command = shlex.join(["python", os.path.relpath(sys.argv[0]), *flags, "--methods", *left_out])
        print(f"to decode them so: {command}")
    next_step("Evaluation/show_result.py", *([] if directory == Path() else [str(directory)]))


if __name__ == "__main__":
    run_script(main, "the same command (without --overwrite) goes on from what is finished")
