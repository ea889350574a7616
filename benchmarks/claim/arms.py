"""The arms of the study: one way to decode all test prompts each, and what came of it, prompt by prompt.

An arm is a row of METHODS, decoded by stage 4's own loop. Its result holds, for each prompt, the response and

  tokens   how many the policy wrote, an EOS included; `eos`, whether one ended it
  log_p    its log-probability under the summariser; `log_q`, under the arm itself (greedy: 0)
  quality  its true quality
  own      the guide's reward of the finished text
  reward   that of the shipped reward model of the other kind, which guided nobody
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PARGS_baselines as decoding
from datasets import load_from_disk
from final_rewards import finished_responses
from policy_likelihood import Pair, response_log_probs
from prefix_accuracy import PERCENTAGES, prefix_lengths
from prompts import load_prompts
from quality import true_quality
from responses import Response
from run_models import get_policy, get_reward_model
from sampled_kl import trace_log_probs
from true_quality import facts_of_prompts, read_facts

from pargs.encoding import decode_texts, encode_prompts, eos_id
from pargs.files import write_text
from pargs.models import RewardModel
from pargs.prefixes import SIDES, EncodedResponse
from pargs.runs import GuideEos, Method, Step
from pargs.scoring import encode_continuations, score_pairs

DEMO_MODELS = Path(__file__).parents[2] / "demo/models"
POLICY = str(DEMO_MODELS / "summariser")
EVALUATORS = {
    "encoder": str(DEMO_MODELS / "full-reward-model"),
    "causal": str(DEMO_MODELS / "causal-reward-model"),
}
SEEDS = (1, 2, 3)  # of training
NUM_PAIRS = (500, 1000, 2000, 4000)
ENCODER_KINDS = ("encoder-full", "encoder-partial", "encoder-partial-few")
MAX_NEW_TOKENS = 48
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NUM_SAMPLES = (1, 2, 4, 8, 16, 32)
SAMPLING_SEEDS = (11, 12)


@dataclass(frozen=True)
class Arm:
    """A method, and what of the run's settings it is decoded with."""

    label: str  # the guide's kind and how it is read: "full open"
    guide: str | None
    weight: float
    guide_eos: GuideEos = "finished"
    greedy: bool = True
    k: int = 10
    training_seed: int = 0
    sampling_seed: int = SAMPLING_SEEDS[0]

    @property
    def method(self) -> Method:
        return Method(
            policy=POLICY,
            guide=self.guide,
            weight=self.weight,
            guide_eos=self.guide_eos,
            greedy=self.greedy,
        )


# Which arms there are

READINGS: dict[str, tuple[str, GuideEos]] = {  # label: the reward model, and where it reads an EOS
    "full open": ("full", "finished"),
    "full closed": ("full", "always"),
    "full bare": ("full", "never"),
    "last": ("last", "never"),
    "partial": ("partial", "finished"),
    "partial from full": ("partial-from-full", "finished"),
}
SAMPLED = ("full open", "full closed", "partial")


def causal_arms(models: Path, seed: int) -> dict[str, list[Arm]]:
    """The arms of a training seed's decoder-only guides, in parts that make one file each."""

    def arm(label: str, weight: float = 1.0, folder: str = "", **changes: Any) -> Arm:
        kind, guide_eos = READINGS[label]
        guide = str(models / f"{folder or kind}-s{seed}")
        return Arm(label, guide, weight, guide_eos, training_seed=seed, **changes)

    sampled = {
        f"sampled-{sampling_seed}": [
            arm(label, weight, greedy=False, sampling_seed=sampling_seed)
            for label in SAMPLED
            for weight in WEIGHTS
        ]
        for sampling_seed in SAMPLING_SEEDS
    }
    fewer = [
        arm(label, folder=f"{READINGS[label][0]}-{count}") for label in SAMPLED for count in NUM_PAIRS[:-1]
    ]
    return {
        "greedy": [arm(label, weight) for label in READINGS for weight in WEIGHTS],
        **sampled,
        "k": [arm(label, k=k) for label in SAMPLED for k in (3, 30)],
        "pairs": fewer,
    }


def encoder_arms(models: Path, seed: int) -> dict[str, list[Arm]]:
    """The arms of a training seed's encoders: every seed at the paper's weights, one of them at more."""

    def arm(kind: str, weight: float = 1.0, **changes: Any) -> Arm:
        return Arm(
            encoder_label(kind), str(models / f"{kind}-s{seed}"), weight, training_seed=seed, **changes
        )

    parts = {
        "greedy": [arm(kind) for kind in ENCODER_KINDS],
        "sampled": [
            arm("encoder-partial", 2.0, greedy=False, sampling_seed=sampling_seed)
            for sampling_seed in SAMPLING_SEEDS
        ],
    }
    if seed == 1:
        parts["weights"] = [arm(kind, weight) for kind in ENCODER_KINDS[:2] for weight in (0.5, 4.0)]
    return parts


def encoder_label(kind: str) -> str:
    """E.g. "encoder-partial-few": "partial few"."""
    return kind.removeprefix("encoder-").replace("-", " ")


# Decoding and judging


def make_settings(data: Path, **changes: Any) -> decoding.Settings:
    return decoding.Settings(
        policy=POLICY,
        dataset=str(data / "summarize_from_feedback"),
        num_prompts=0,
        max_new_tokens=MAX_NEW_TOKENS,
        **changes,
    )


def decode_arms(data: Path, arms: list[Arm], evaluator: str, output: Path) -> None:
    """Decode every arm and write what came of it."""
    results = []
    for arm in arms:
        settings = make_settings(data, k=arm.k, seed=arm.sampling_seed, trace=not arm.greedy)
        prompts, _, template = load_prompts(settings.dataset, None, 0, settings.seed)
        name = f"{arm.label}, w = {arm.weight:g}"
        decoding.METHODS[name] = lambda _, arm=arm: arm.method
        responses = decoding.decode_method(name, prompts, template, settings).responses
        results.append(asdict(arm) | judge(responses, arm, evaluator, settings, data, template))
    write_text(output, json.dumps(results))


def judge(
    responses: list[Response],
    arm: Arm,
    evaluator: str,
    settings: decoding.Settings,
    data: Path,
    template: str,
) -> dict[str, list]:
    """What the module's docstring lists, a list over prompts each."""
    policy = get_policy(POLICY, settings)
    likelihood = response_log_probs(
        policy, [Pair(each.prompt_ids, each.written_ids) for each in responses], arm.k, 64, arm.label
    )
    log_q = [0.0 if arm.greedy else float(within.sum()) for _, within in likelihood]
    if arm.guide and not arm.greedy:
        traces = [[Step(**step) for step in response.steps] for response in responses]
        log_q = [trace_log_probs(steps, arm.method)[1] for steps in traces]

    texts = texts_of(responses, settings)
    facts = facts_of_prompts(
        read_facts(data / "demo_facts.json"), [response.prompt for response in responses]
    )
    result = {
        "text": texts,
        "tokens": [len(response.written_ids) for response in responses],
        "eos": [response.finish_reason == "eos" for response in responses],
        "log_p": [round(float(log_p.sum()), 4) for log_p, _ in likelihood],
        "log_q": [round(value, 4) for value in log_q],
        "quality": [
            round(true_quality(text, known)["total"], 4) for text, known in zip(texts, facts, strict=True)
        ],
        "reward": rewards_of(EVALUATORS[evaluator], responses, settings, template),
    }
    if arm.guide:
        result["own"] = rewards_of(arm.guide, responses, settings, template, arm.guide_eos != "never")
    return result


def texts_of(responses: list[Response], settings: decoding.Settings) -> list[str]:
    tokenizer = get_policy(POLICY, settings).tokenizer
    return decode_texts(tokenizer, [response.ids for response in responses])


def rewards_of(
    name: str, responses: list[Response], settings: decoding.Settings, template: str, eos: bool = True
) -> list[float]:
    """A reward model's rewards of the responses as finished ones; without `eos`, as it was trained."""
    reward_model, tokenizer = get_reward_model(name, settings), get_policy(POLICY, settings).tokenizer
    prompts = [response.prompt for response in responses]
    continuations = finished_responses(responses, reward_model, tokenizer)
    for continuation in continuations:
        continuation.finished = eos
    encoded = encode_continuations(reward_model, prompts, continuations)
    prompt_ids = encode_prompts(reward_model.tokenizer, prompts, template)
    rewards = score_pairs(reward_model, prompt_ids, encoded, MAX_NEW_TOKENS + 1)
    return [round(reward, 4) for reward in rewards.tolist()]


def decode_unguided(data: Path, output: Path) -> None:
    """Greedy decoding and top-k samples without a reward; and 32 samples a prompt, for the best of n."""
    results = []
    greedy, sample = Arm("greedy", None, 0.0), Arm("top-k", None, 0.0, greedy=False)
    for arm, count in ((greedy, 1), (sample, NUM_SAMPLES[-1])):
        for sampling_seed in SAMPLING_SEEDS if count > 1 else SAMPLING_SEEDS[:1]:
            settings = make_settings(data, seed=sampling_seed, cache_gb=1.0)
            prompts, _, template = load_prompts(settings.dataset, None, 0, settings.seed)
            method = Method(
                policy=POLICY, greedy=arm.greedy, best_of=count, chooser="any" if count > 1 else None
            )
            decoding.METHODS[arm.label] = lambda _, method=method: method
            responses = decoding.decode_method(arm.label, prompts, template, settings).responses
            row = asdict(arm) | {"sampling_seed": sampling_seed, "samples": count}
            row |= judge(responses, arm, "encoder", settings, data, template)
            row["causal_reward"] = rewards_of(EVALUATORS["causal"], responses, settings, template)
            row["ids"] = [response.ids for response in responses]
            results.append(row)
    write_text(output, json.dumps(results))


def choose_best(data: Path, models: Path, kinds: tuple[str, ...], seed: int, output: Path) -> None:
    """The best of the first n samples of each prompt, for every n, by each reward model."""
    results = []
    for samples in json.loads((output.parent / "unguided.json").read_text()):
        if samples["samples"] == 1:
            continue
        settings = make_settings(data)
        prompts, _, template = load_prompts(settings.dataset, None, 0, settings.seed)
        count = samples["samples"]
        responses = [
            Response(prompts[at // count], [], at % count, ids) for at, ids in enumerate(samples["ids"])
        ]
        for kind in kinds:
            own = np.array(rewards_of(str(models / f"{kind}-s{seed}"), responses, settings, template))
            by_prompt = own.reshape(-1, count)
            for n in NUM_SAMPLES:
                best = by_prompt[:, :n].argmax(1) + count * np.arange(len(prompts))
                chosen = {
                    name: [samples[name][at] for at in best]
                    for name in ("quality", "reward", "causal_reward", "tokens", "eos", "log_p", "log_q")
                }
                row = {"label": f"best of n by {kind}", "n": n, "training_seed": seed}
                row |= {"sampling_seed": samples["sampling_seed"], "own": own[best].tolist()}
                results.append(row | chosen)
    write_text(output, json.dumps(results))


# Ranking prefixes


def rank_prefixes(data: Path, models: Path, kinds: tuple[str, ...], seed: int, output: Path) -> None:
    """Whether each guide ranks the prefixes of held-out pairs, at each tenth of the longer response.

    `right` has a row a pair; None where both prefixes are the same.
    """
    results, causal = [], not kinds[0].startswith("encoder")
    pairs: Any = load_from_disk(str(data / ("causal-4000" if causal else "encoder-full") / "pairs"))
    settings = make_settings(data)
    readings = {label: reading for label, reading in READINGS.items() if reading[0] in kinds}
    for kind in kinds if not causal else ():
        readings[encoder_label(kind)] = kind, "finished"
    for label, (kind, guide_eos) in readings.items():
        reward_model = get_reward_model(str(models / f"{kind}-s{seed}"), settings)
        right = rank_pairs(reward_model, list(pairs["validation"]), guide_eos)
        results.append({"label": label, "training_seed": seed, "causal": causal, "right": right})
    write_text(output, json.dumps(results))


def rank_pairs(reward_model: RewardModel, pairs: list[dict], guide_eos: GuideEos) -> list[list[bool | None]]:
    """For each pair, at each of PERCENTAGES: whether the chosen prefix has the higher reward."""
    asked: dict[str, list] = {"prompts": [], "prefixes": []}
    for pair in pairs:
        sides = [
            EncodedResponse(
                pair[f"{side}_ids"], {each["length"]: each["ids"] for each in pair[f"{side}_reencoded"]}
            )
            for side in SIDES
        ]
        longest = max(len(side.ids) for side in sides)
        for length in prefix_lengths(longest):
            for side in sides:
                prefix = side.prefix(length)
                asked["prompts"].append(pair["prompt_ids"])
                asked["prefixes"].append(read_as(reward_model, prefix, guide_eos))

    rewards = score_pairs(reward_model, asked["prompts"], asked["prefixes"], 0).view(-1, 2).tolist()
    prefixes = asked["prefixes"]
    right = [
        None if prefixes[2 * at] == prefixes[2 * at + 1] else chosen > rejected
        for at, (chosen, rejected) in enumerate(rewards)
    ]
    step = len(PERCENTAGES)
    return [right[at : at + step] for at in range(0, len(right), step)]


def read_as(reward_model: RewardModel, prefix: list[int], guide_eos: GuideEos) -> list[int]:
    """The ids of a prefix with an EOS where a decoder-only guide reads one."""
    if not reward_model.causal or guide_eos == "finished":
        return prefix
    eos = eos_id(reward_model.tokenizer)
    own = prefix[:-1] if prefix[-1] == eos else prefix
    return [*own, eos] if guide_eos == "always" else own
