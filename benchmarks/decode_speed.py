"""How fast guided decoding is: the plain loop and the fast path, side by side in one process.

Reads   for --models demo the models in demo/; for --models paper nothing: GPT2-large and DeBERTa-v3-large
        are configurations with random weights, prompts are as long as those of TL;DR.
Writes  a table, to standard output; docs/benchmarks.md keeps those that were measured.

Nothing ends a response early, so all have one length. The plain loop (tests/reference.py: one prompt, one
candidate, no cache) runs on the first few prompts and is scaled. Scoring and writing the finished responses
are left out of both. FLOP are 2 x weights x tokens, without attention, embeddings and padding: the share of
the matmul peak, which is measured in the same run, is a lower bound.

    PYTHONPATH=PARGS_decode:tests:demo python benchmarks/decode_speed.py
    PYTHONPATH=PARGS_decode:tests:demo python benchmarks/decode_speed.py --models paper --num_prompts 10 100
"""

import copy
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import PARGS_baselines as decoding
import torch
from fast_attention import use_fast_attention
from guides import CachedGuide, make_guide
from make_posts import draw_test_post
from paper_configs import paper_configs
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from reference import Reference, Step, assert_same_tokens
from responses import begin_responses, cache_bytes, cut_into_waves
from run_models import Precision, choose_dtype, fit_budget
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from pargs.cli import fail, parse_settings, setting
from pargs.models import Policy, RewardModel, load_policy, load_reward_model
from pargs.prefixes import make_frame
from pargs.processes import join_processes
from pargs.runs import Method

DEMO_MODELS = Path(__file__).parents[1] / "demo/models"
TEMPLATE = "POST: {post}\nTL;DR:"

T = TypeVar("T")


@dataclass
class Settings:
    models: Literal["demo", "paper"] = setting("demo", "Which models and prompt lengths.")
    guides: list[str] = setting(["encoder", "causal", "none"], "Reward models; none is plain TOP-K sampling.")
    num_prompts: list[PositiveInt] = setting([1, 10, 100], "Prompts to decode, one table row each.")
    reference_prompts: NonNegativeInt = setting(2, "Prompts that the plain loop decodes; 0 leaves it out.")
    new_tokens: PositiveInt = setting(32, "Tokens of each response.")
    k: PositiveInt = setting(10, "Candidates a step.")
    dtype: Precision = setting("auto", "As in PARGS_baselines.py.")
    fast_attention: bool = setting(False, "As in PARGS_baselines.py.")
    token_budget: NonNegativeInt = setting(0, "As in PARGS_baselines.py.")
    cache_gb: PositiveFloat = setting(8.0, "As in PARGS_baselines.py.")


@dataclass
class Measured:
    seconds: float
    gigabytes: float
    policy_tokens: int
    reward_tokens: int


# Models and prompts


def demo_models(
    dtype: torch.dtype, device: torch.device, budget: int
) -> tuple[Policy, dict[str, RewardModel]]:
    """The demo's policy and encoder, and a causal model of the policy's size."""
    policy = load_policy(str(DEMO_MODELS / "summariser"), dtype, device)
    encoder = load_reward_model(str(DEMO_MODELS / "full-reward-model"), dtype, device, budget)
    config = GPT2Config.from_pretrained(DEMO_MODELS / "summariser", num_labels=1)
    return policy, {"encoder": encoder, "causal": causal_reward_model(policy, config, budget)}


def paper_models(
    dtype: torch.dtype, device: torch.device, budget: int
) -> tuple[Policy, dict[str, RewardModel]]:
    """The paper's sizes with random weights; the tokenizers are the demo's, of fewer ids."""
    gpt2, deberta = paper_configs()
    causal = copy.deepcopy(gpt2)
    causal.num_labels = 1
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "summariser")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(gpt2, dtype=dtype).eval()
        # Only ids that the tokenizer can spell come up as candidates.
        model.transformer.wte.weight.data[len(tokenizer) :] = 0
        encoder = AutoModelForSequenceClassification.from_config(deberta, dtype=dtype).eval()

    policy = Policy("policy", model, tokenizer, set(), 1024)
    words = AutoTokenizer.from_pretrained(DEMO_MODELS / "full-reward-model")
    frame = make_frame(words, causal=False)
    return policy, {
        "encoder": RewardModel("encoder", encoder, words, frame, False, 512, budget),
        "causal": causal_reward_model(policy, causal, budget),
    }


def causal_reward_model(policy: Policy, config: GPT2Config, budget: int) -> RewardModel:
    """The policy's size and ids with random weights."""
    torch.manual_seed(0)
    with torch.device(policy.model.device):
        model: Any = GPT2ForSequenceClassification(config)
        model = model.to(policy.model.dtype).eval()
    frame = make_frame(policy.tokenizer, causal=True)
    return RewardModel("causal", model, policy.tokenizer, frame, True, config.n_positions, budget)


def make_prompts(policy: Policy, count: int, models: str) -> list[str]:
    """Posts of the demo's kind; for the paper's models as many of them as make a TL;DR post's length."""
    rng = random.Random("benchmark")
    prompts = []
    for _ in range(count):
        post = draw_test_post(rng)[1]
        if models == "paper":
            length = min(max(rng.gauss(350, 80), 120), 420)  # in tokens
            ids = []
            while len(ids) < length:
                post += " " + draw_test_post(rng)[1]
                ids = policy.tokenizer(post)["input_ids"]
            post = str(policy.tokenizer.decode(ids[: int(length)]))
        prompts.append(TEMPLATE.replace("{post}", post))
    return prompts


# Measuring


@contextmanager
def counting_tokens(model: PreTrainedModel | None) -> Iterator[list[torch.Tensor]]:
    """Collect how many tokens, padding left out, each forward pass inside reads; none without a model."""
    counts: list[torch.Tensor] = []

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape == input_ids.shape:
            counts.append(mask.sum())
        else:
            counts.append(torch.tensor(input_ids.numel()))

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True) if model else None
    try:
        yield counts
    finally:
        if hook:
            hook.remove()


def measure(
    work: Callable[[], list[T]], policy: Policy, reward_model: RewardModel | None
) -> tuple[list[T], Measured]:
    """What `work` gives; its seconds, peak memory (of the GPU, or of the process) and tokens read."""
    device, guide = policy.model.device, reward_model.model if reward_model else None
    reset_peak_memory(device)
    with counting_tokens(policy.model) as policy_counts, counting_tokens(guide) as reward_counts:
        started = time.perf_counter()
        done = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    totals = [sum(int(count) for count in counts) for counts in (policy_counts, reward_counts)]
    return done, Measured(seconds, peak_memory(device), *totals)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """In GB, since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of several square products."""
    size, repeats = (8192, 20) if device.type == "cuda" else (2048, 5)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(repeats):
            _ = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - started))
    return best


def num_weights(model: PreTrainedModel) -> int:
    """Weights that each token is multiplied with: all but the embeddings, which are looked up."""
    embeddings = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    tied = {id(module.weight): module.weight.numel() for module in embeddings}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in tied)


# The two ways


def decode_fast(
    policy: Policy, reward_model: RewardModel | None, prompts: list[str], settings: Settings
) -> list[list[int]]:
    """Greedy guided responses, or sampled ones without a guide, by the path that PARGS_baselines.py takes."""
    limit = settings.new_tokens
    method = (
        Method(policy=policy.name, guide=reward_model.name, weight=1.0, greedy=True)
        if reward_model
        else Method(policy=policy.name)
    )
    guide = make_guide(reward_model, policy, TEMPLATE, limit) if reward_model else None
    token_bytes = cache_bytes(policy.model)
    if reward_model and isinstance(guide, CachedGuide):
        token_bytes += cache_bytes(reward_model.model)

    run = decoding.Settings(k=settings.k, max_new_tokens=limit)
    responses = begin_responses(policy, prompts, TEMPLATE, 1, limit, "benchmark")
    for wave in cut_into_waves(responses, 1, limit, token_bytes, settings.cache_gb):
        for _ in decoding.decode_wave("TOP-K", method, policy, guide, wave, run):
            pass
    return [response.ids for response in responses]


def decode_plainly(
    policy: Policy, reward_model: RewardModel | None, prompts: list[str], settings: Settings
) -> list[list[Step]]:
    """The same responses by the plain loop."""
    plain = Reference(policy.model, policy.tokenizer)
    if reward_model:
        plain.reward_model, plain.reward_tokenizer = reward_model.model, reward_model.tokenizer
        plain.causal = reward_model.causal

    responses = []
    for prompt in prompts:

        def uniforms(step: int, prompt: str = prompt) -> float:
            return decoding.uniform(decoding.Settings.seed, "TOP-K", prompt, 0, step)

        weight, drawn = (1.0, None) if reward_model else (0.0, uniforms)
        responses.append(plain.write(prompt, settings.k, settings.new_tokens, weight, drawn))
    return responses


# The table


def measure_guide(
    name: str,
    policy: Policy,
    reward_model: RewardModel | None,
    prompts: list[str],
    peak: float,
    settings: Settings,
) -> list[dict]:
    def row(path: str, count: int, measured: Measured, reference: float | None) -> dict:
        tokens = count * settings.new_tokens
        flop = 2 * num_weights(policy.model) * measured.policy_tokens
        if reward_model:
            flop += 2 * num_weights(reward_model.model) * measured.reward_tokens
        return {
            "reward model": name,
            "path": path,
            "prompts": count,
            "s": measured.seconds,
            "s/prompt": measured.seconds / count,
            "tokens/s": tokens / measured.seconds,
            "reward tokens/s": measured.reward_tokens / measured.seconds,
            "GFLOP/s": flop / measured.seconds / 1e9,
            "of peak": f"{flop / measured.seconds / peak:.0%}",
            "peak GB": measured.gigabytes,
            "x plain": reference / (measured.seconds / count) if reference else float("nan"),
        }

    table, seconds, plain = [], None, []
    if settings.reference_prompts:
        few = prompts[: settings.reference_prompts]
        work = partial(decode_plainly, policy, reward_model, few, settings)
        plain, measured = measure(work, policy, reward_model)
        seconds = measured.seconds / len(few)
        table.append(row("plain loop", len(few), measured, seconds))

    written = []
    for count in settings.num_prompts:
        work = partial(decode_fast, policy, reward_model, prompts[:count], settings)
        written, measured = measure(work, policy, reward_model)
        table.append(row("fast path", count, measured, seconds))
        print(f"{name}: {count} prompts in {measured.seconds:.1f} s", file=sys.stderr)

    if plain and policy.model.dtype == torch.float32:
        pairs = zip(plain, written, strict=False)
        compared = sum(assert_same_tokens(steps, ids) for steps, ids in pairs)
        print(f"{name}: {compared} tokens of the plain loop compared, the fast path wrote the same")
    return table


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    device = join_processes().device
    dtype, budget = choose_dtype(settings.dtype, device), settings.token_budget or fit_budget(device)
    make_models = {"demo": demo_models, "paper": paper_models}[settings.models]
    policy, reward_models = make_models(dtype, device, budget)
    if unknown := {*settings.guides} - {*reward_models, "none"}:
        fail(f"--guides knows {', '.join(reward_models)} and none, not {', '.join(sorted(unknown))}")
    used = use_fast_attention(reward_models["encoder"].model) if settings.fast_attention else None
    policy.eos_ids.clear()
    prompts = make_prompts(policy, max(*settings.num_prompts, settings.reference_prompts), settings.models)
    peak = matmul_peak(dtype, device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    lengths = [len(policy.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    print(
        f"{settings.models} models, {dtype}, {hardware} ({platform.machine()}), torch {torch.__version__}; "
        f"matmul peak {peak / 1e9:.0f} GFLOP/s; prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{settings.new_tokens} new ones, k = {settings.k}; attention: {used or 'eager'}"
    )

    table = []
    for name in settings.guides:
        reward_model = reward_models.get(name)
        decode_fast(policy, reward_model, prompts[:2], settings)  # the first pass compiles and allocates
        table += measure_guide(name, policy, reward_model, prompts, peak, settings)
    measured = pd.DataFrame(table).dropna(axis="columns", how="all")  # no ratio without the plain loop
    print(measured.to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
