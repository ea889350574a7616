"""Do guides know a good candidate from a bad one? Candidates of one step, each with what comes of it.

On validation posts: a summary is cut, and each of the top k tokens there is a candidate. Its value is the
mean true quality of the summaries that the policy samples from there on (an EOS ends it: that summary's own
quality). A guide is right about two candidates if it scores the one of higher value higher. That is what
guiding asks of it; ranking the prefixes of two summaries is another question.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PARGS_baselines as decoding
import torch
from arms import MAX_NEW_TOKENS, POLICY, READINGS, SEEDS, make_settings
from guides import choose_guide
from prompts import load_prompts
from quality import true_quality
from responses import Response
from run_models import get_policy, get_reward_model
from true_quality import facts_of_prompts, read_facts

from pargs.encoding import decode_texts
from pargs.files import read_dataset, write_text
from pargs.models import Policy
from pargs.runs import Method

NUM_POSTS, STATES_A_POST, ROLLOUTS = 150, 2, 16
NEAR = 4.0  # nats below the most probable candidate: further down a guide seldom changes what is taken
GOING_ON, ENDING = ("and", "yes"), (".", ",", "?")


def judge_candidates(data: Path, models: Path, output: Path) -> None:
    """At random places of summaries that the policy samples: most of them are not where it matters."""
    settings = make_settings(data, seed=21, cache_gb=0.5)
    policy, prompts, template = read_validation(data, settings)
    decoding.METHODS["states"] = lambda _: Method(policy=POLICY)
    sampled = decoding.decode_method("states", prompts[:NUM_POSTS], template, settings).responses
    rng = random.Random(0)
    cuts = [sorted(rng.sample(range(len(each.ids)), min(STATES_A_POST, len(each.ids)))) for each in sampled]
    states = [cut_response(each, cut) for each, own in zip(sampled, cuts, strict=True) for cut in own]
    write_text(output, json.dumps(judge_states(data, models, policy, states, template, settings)))


def judge_joints(data: Path, models: Path, output: Path) -> None:
    """Where the policy's greedy summary could go on or come to an end: both are among the candidates.

    At most two places of a post, the first ones.
    """
    settings = make_settings(data, seed=23, cache_gb=0.5)
    policy, prompts, template = read_validation(data, settings)
    decoding.METHODS["greedy path"] = lambda _: Method(policy=POLICY, greedy=True)
    written = decoding.decode_method("greedy path", prompts, template, settings).responses
    states = []
    for response in written:
        all_cuts = [cut_response(response, cut) for cut in range(len(response.written_ids))]
        proposed = zip(all_cuts, *propose(policy, all_cuts, settings.k), strict=True)
        states += [state for state, ids, log_probs in proposed if is_joint(policy, ids, log_probs)][:2]
    write_text(output, json.dumps(judge_states(data, models, policy, states, template, settings)))


def is_joint(policy: Policy, candidates: list[int], log_probs: list[float]) -> bool:
    """Whether a word that goes on and a mark that ends the clause are both likely."""
    near = [token for token, value in zip(candidates, log_probs, strict=True) if value > log_probs[0] - NEAR]
    words = [word.strip() for word in decode_each(policy, near)]
    ends = any(word in ENDING for word in words) or any(token in policy.eos_ids for token in near)
    return ends and any(word in GOING_ON for word in words)


def read_validation(data: Path, settings: decoding.Settings) -> tuple[Policy, list[str], str]:
    dataset, notes = read_dataset(settings.dataset, {"validation": ["prompt"]}, "")
    prompts = list(dict.fromkeys(dataset["validation"]["prompt"]))
    return get_policy(POLICY, settings), prompts, notes["template"]


def cut_response(response: Response, length: int) -> Response:
    return Response(response.prompt, response.prompt_ids, 0, response.ids[:length])


def judge_states(
    data: Path,
    models: Path,
    policy: Policy,
    states: list[Response],
    template: str,
    settings: decoding.Settings,
) -> dict[str, Any]:
    """For each state: the candidates' log-probabilities, values, and every guide's rewards of them."""
    candidates, log_probs = propose(policy, states, settings.k)
    facts = facts_of_prompts(read_facts(data / "demo_facts.json"), [state.prompt for state in states])
    rewards = {
        label: {
            seed: ask_each(models / f"{kind}-s{seed}", label, policy, states, candidates, template, settings)
            for seed in SEEDS
        }
        for label, (kind, _) in READINGS.items()
    }
    prompts = list(dict.fromkeys(state.prompt for state in states))
    return {
        "prefix": decode_texts(policy.tokenizer, [state.ids for state in states]),
        "post": [prompts.index(state.prompt) for state in states],
        "candidates": [decode_each(policy, ids) for ids in candidates],
        "ends": [[token in policy.eos_ids for token in ids] for ids in candidates],
        "log_probs": log_probs,
        "values": roll_out(policy, states, candidates, facts, settings),
        "rewards": rewards,
    }


def ask_each(
    folder: Path,
    label: str,
    policy: Policy,
    states: list[Response],
    candidates: list[list[int]],
    template: str,
    settings: decoding.Settings,
) -> list[list[float]]:
    """A guide's rewards of each state's candidates, read as `label` says, [states, k]."""
    reward_model, guide_eos = get_reward_model(str(folder), settings), READINGS[label][1]
    rewards = []
    for state, ids in zip(states, candidates, strict=True):
        guide = choose_guide(reward_model, policy, template, MAX_NEW_TOKENS, settings.k, [], guide_eos)
        guide.begin([state])
        rewards.append(guide.score([state], torch.tensor([ids]))[0].tolist())
    return rewards


def decode_each(policy: Policy, ids: list[int]) -> list[str]:
    return policy.tokenizer.batch_decode([[token] for token in ids])


def propose(policy: Policy, states: list[Response], k: int) -> tuple[list[list[int]], list[list[float]]]:
    """The top k of each state and their log-probabilities, [states, k] both."""
    candidates, log_probs = [], []
    with torch.inference_mode():
        for state in states:
            logits = policy.model(torch.tensor([state.prompt_ids + state.ids])).logits[:, -1]
            ids, values = decoding.top_candidates(logits, k)
            candidates += ids.tolist()
            log_probs += values.tolist()
    return candidates, log_probs


def roll_out(
    policy: Policy,
    states: list[Response],
    candidates: list[list[int]],
    facts: list[dict],
    settings: decoding.Settings,
) -> list[list[float]]:
    """Each candidate's value, [states, k].

    The rollouts of a state's candidates draw the same random numbers: their differences are less noisy.
    """
    method = Method(policy=POLICY, best_of=ROLLOUTS, chooser="any")
    values = []
    for at, (state, ids, known) in enumerate(zip(states, candidates, facts, strict=True)):
        room = MAX_NEW_TOKENS - len(state.ids) - 1
        writing = [
            Response(state.prompt, [*state.prompt_ids, *state.ids, token], at * ROLLOUTS + sample)
            for token in ids
            if token not in policy.eos_ids and room
            for sample in range(ROLLOUTS)
        ]
        if writing:
            limited = replace(settings, max_new_tokens=room)
            for _ in decoding.decode_wave("rollouts", method, policy, None, writing, limited):
                pass
        rest = iter(writing)
        own = []
        for token in ids:
            ends = token in policy.eos_ids
            written = [state.ids if ends else [*state.ids, token]]
            if not ends and room:
                written = [[*state.ids, token, *next(rest).ids] for _ in range(ROLLOUTS)]
            texts = decode_texts(policy.tokenizer, written)
            own.append(float(np.mean([true_quality(text, known)["total"] for text in texts])))
        values.append(own)
    return values


# One response, token by token


def follow_example(data: Path, models: Path, results: Path, output: Path) -> None:
    """Along the response of one test prompt, as the full model guides it: every candidate of every step, its
    value, and what three guides say of it.

    The prompt is the first on which the partial model's response is better by a third of the scale or more.
    """
    arms = json.loads((results / "causal-greedy-s1.json").read_text())
    quality = {arm["label"]: np.array(arm["quality"]) for arm in arms if arm["weight"] == 1.0}
    at = int(np.argmax(quality["partial"] - quality["full open"] >= 1 / 3))

    settings = make_settings(data, seed=22, cache_gb=0.5)
    policy = get_policy(POLICY, settings)
    prompts, _, template = load_prompts(settings.dataset, None, 0, settings.seed)
    decoding.METHODS["example"] = lambda _: Method(
        policy=POLICY, guide=str(models / "full-s1"), weight=1.0, greedy=True
    )
    (written,) = decoding.decode_method("example", prompts[at : at + 1], template, settings).responses
    states = [cut_response(written, cut) for cut in range(len(written.written_ids))]
    candidates, log_probs = propose(policy, states, settings.k)
    facts = facts_of_prompts(read_facts(data / "demo_facts.json"), [state.prompt for state in states])
    rewards = {
        label: ask_each(
            models / f"{READINGS[label][0]}-s1", label, policy, states, candidates, template, settings
        )
        for label in ("full open", "full closed", "partial")
    }
    result = {
        "prompt": written.prompt,
        "prompt_index": at,
        "responses": {arm["label"]: arm["text"][at] for arm in arms if arm["weight"] == 1.0},
        "qualities": {label: float(values[at]) for label, values in quality.items()},
        "tokens": decode_each(policy, written.written_ids),
        "candidates": [decode_each(policy, ids) for ids in candidates],
        "chosen": [ids.index(token) for ids, token in zip(candidates, written.written_ids, strict=True)],
        "ends": [[token in policy.eos_ids for token in ids] for ids in candidates],
        "log_probs": log_probs,
        "values": roll_out(policy, states, candidates, facts, settings),
        "rewards": rewards,
    }
    write_text(output, json.dumps(result))
