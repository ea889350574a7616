"""How fast guided decoding is: the plain loop and the fast path, side by side in one process.

Reads   for --models demo the models in demo/; for --models paper nothing: GPT2-large and DeBERTa-v3-large
        are configurations with random weights, prompts are as long as those of TL;DR.
Writes  a table, to standard output; docs/benchmarks.md keeps those that were measured.

Nothing ends a response early, so all have one length. The plain loop (tests/reference.py: one prompt, one
candidate, no cache) runs on the first few prompts and is scaled. Scoring and writing the finished responses
are left out of both. FLOP are 2 x weights x tokens, without attention, embeddings and padding: the share of
the matmul peak, which is measured in the same run, is a lower bound.

    python benchmarks/decode_speed.py
    python benchmarks/decode_speed.py --models paper --num_prompts 10 100
"""

import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    GPT2Config,
    GPT2ForSequenceClassification,
    HfArgumentParser,
    PreTrainedModel,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("PARGS_decode", "tests", "demo")]

import PARGS_baselines as decoding  # noqa: E402
from fast_attention import use_fast_attention  # noqa: E402
from make_posts import draw_test_post  # noqa: E402
from pair_frame import causal_frame, pair_frame  # noqa: E402
from policy_loading import Policy, load_policy  # noqa: E402
from reference import assert_same_tokens, reference_response  # noqa: E402
from reward_scoring import (  # noqa: E402
    CachedGuide,
    RereadingGuide,
    RewardModel,
    encode_prompts,
    load_reward_model,
)

TEMPLATE = "POST: {post}\nTL;DR:"


@dataclass
class Settings:
    models: str = field(
        default="demo", metadata={"help": "Which models and prompt lengths.", "choices": ["demo", "paper"]}
    )
    guides: list[str] = field(
        default_factory=lambda: ["encoder", "causal", "none"],
        metadata={"help": "Reward models to measure with; none is plain TOP-K sampling."},
    )
    num_prompts: list[int] = field(
        default_factory=lambda: [1, 10, 100], metadata={"help": "Prompts to decode, one table row each."}
    )
    reference_prompts: int = field(
        default=2, metadata={"help": "Prompts that the plain loop decodes; 0 leaves it out."}
    )
    new_tokens: int = field(default=32, metadata={"help": "Tokens of each response."})
    k: int = field(default=10, metadata={"help": "Candidates a step."})
    dtype: str = field(default="auto", metadata={"help": "As in PARGS_baselines.py."})
    fast_attention: bool = field(default=True, metadata={"help": "As in PARGS_baselines.py."})
    token_budget: int = field(default=0, metadata={"help": "As in PARGS_baselines.py."})
    cache_gb: float = field(default=8.0, metadata={"help": "As in PARGS_baselines.py."})


@dataclass
class Measured:
    seconds: float
    gigabytes: float
    policy_tokens: int
    reward_tokens: int


# Models and prompts


def demo_models(dtype: torch.dtype, device: torch.device, budget: int) -> tuple[Policy, dict]:
    """The demo's policy and encoder, and a causal model of the policy's size."""
    policy = load_policy(str(ROOT / "demo/models/summariser"), dtype, device)
    name = str(ROOT / "demo/models/full-reward-model")
    encoder = load_reward_model(name, dtype, device, budget, fast_attention=False)
    config = GPT2Config.from_pretrained(ROOT / "demo/models/summariser", num_labels=1)
    return policy, {"encoder": encoder, "causal": causal_reward_model(policy, config, budget)}


def paper_models(dtype: torch.dtype, device: torch.device, budget: int) -> tuple[Policy, dict]:
    """The paper's sizes with random weights; the tokenizers are the demo's, of fewer ids."""
    gpt2 = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "vocab_size": 50257}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/models/summariser")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(GPT2Config(**gpt2), dtype=dtype).eval()
        # Only ids that the tokenizer can spell come up as candidates.
        model.transformer.wte.weight.data[len(tokenizer) :] = 0
        deberta = DebertaV2Config(
            vocab_size=128100,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            type_vocab_size=0,
            relative_attention=True,
            position_buckets=256,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            pooler_hidden_size=1024,
            pooler_hidden_act="gelu",
            num_labels=1,
        )
        encoder = AutoModelForSequenceClassification.from_config(deberta, dtype=dtype).eval()

    policy = Policy(model, tokenizer, set(), 1024)
    words = AutoTokenizer.from_pretrained(ROOT / "demo/models/full-reward-model")
    encoder = RewardModel("encoder", encoder, words, pair_frame(words), False, 512, budget)
    return policy, {
        "encoder": encoder,
        "causal": causal_reward_model(policy, GPT2Config(**gpt2, num_labels=1), budget),
    }


def causal_reward_model(policy: Policy, config: GPT2Config, budget: int) -> RewardModel:
    """The policy's size and ids with random weights."""
    torch.manual_seed(0)
    with torch.device(policy.model.device):
        model = GPT2ForSequenceClassification(config).to(policy.model.dtype).eval()
    frame = causal_frame(policy.tokenizer)
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
            post = policy.tokenizer.decode(ids[: int(length)])
        prompts.append(TEMPLATE.replace("{post}", post))
    return prompts


# Measuring


@contextmanager
def counting_tokens(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect how many tokens, padding left out, each forward pass inside reads."""
    counts: list[torch.Tensor] = []

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        padded = mask is not None and mask.shape == input_ids.shape
        counts.append(mask.sum() if padded else torch.tensor(input_ids.numel()))

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def measure(work: Callable[[], None], policy: Policy, reward_model: RewardModel | None) -> Measured:
    """Seconds, peak memory (of the GPU, or of the process) and tokens read by `work`."""
    device = policy.model.device
    reset_peak_memory(device)
    judge = reward_model.model if reward_model else torch.nn.Identity()
    started = time.perf_counter()
    with counting_tokens(policy.model) as policy_counts:
        if reward_model:
            with counting_tokens(judge) as reward_counts:
                work()
        else:
            reward_counts = []
            work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    totals = [sum(count.item() for count in counts) for counts in (policy_counts, reward_counts)]
    return Measured(seconds, peak_memory(device), *totals)


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
            matrix @ matrix
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
    how = decoding.Settings(k=settings.k, max_new_tokens=settings.new_tokens, cache_gb=settings.cache_gb)
    method, guide = ("ARGS", make_guide(reward_model, policy, how)) if reward_model else ("TOP-K", None)
    encoded = encode_prompts(policy.tokenizer, prompts, TEMPLATE)
    rows = [decoding.Row(prompt, ids, 0) for prompt, ids in zip(prompts, encoded, strict=True)]
    for wave in decoding.waves(rows, 1, policy, guide, how):
        for _ in decoding.decode_wave(policy, wave, 1, how, method, guide):
            pass
    return [row.ids for row in rows]


def make_guide(
    reward_model: RewardModel, policy: Policy, how: decoding.Settings
) -> RereadingGuide | CachedGuide:
    reserved = how.max_new_tokens + 1
    if reward_model.causal:
        return CachedGuide(reward_model, policy.eos_ids, TEMPLATE, reserved)
    return RereadingGuide(reward_model, policy.tokenizer, policy.eos_ids, TEMPLATE, reserved)


def decode_plainly(
    policy: Policy, reward_model: RewardModel | None, prompts: list[str], settings: Settings
) -> list[list]:
    guided = {}
    if reward_model:
        guided = {
            "reward_model": reward_model.model,
            "reward_tokenizer": reward_model.tokenizer,
            "causal": reward_model.causal,
            "weight": 1.0,
        }

    responses = []
    for prompt in prompts:

        def uniforms(step: int, prompt: str = prompt) -> float:
            return decoding.uniform(decoding.Settings.seed, "TOP-K", prompt, 0, step)

        sampled = {} if reward_model else {"uniforms": uniforms}
        responses.append(
            reference_response(
                policy.model,
                policy.tokenizer,
                prompt,
                settings.k,
                settings.new_tokens,
                eos=None,
                **guided,
                **sampled,
            )
        )
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
        measured = measure(
            lambda: plain.extend(decode_plainly(policy, reward_model, few, settings)), policy, reward_model
        )
        seconds = measured.seconds / len(few)
        table.append(row("plain loop", len(few), measured, seconds))

    for count in settings.num_prompts:
        written: list[list[int]] = []
        measured = measure(
            lambda count=count, written=written: written.extend(
                decode_fast(policy, reward_model, prompts[:count], settings)
            ),
            policy,
            reward_model,
        )
        table.append(row("fast path", count, measured, seconds))
        print(f"{name}: {count} prompts in {measured.seconds:.1f} s", file=sys.stderr)

    if plain and policy.model.dtype == torch.float32:
        compared = sum(
            assert_same_tokens(steps, ids, None, finished=False)
            for steps, ids in zip(plain, written, strict=False)
        )
        print(f"{name}: {compared} tokens of the plain loop compared, the fast path wrote the same")
    return table


def main() -> None:
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    (settings,) = parser.parse_args_into_dataclasses()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = decoding.choose_dtype(settings.dtype, device)
    budget = decoding.choose_token_budget(settings, device)

    make_models = {"demo": demo_models, "paper": paper_models}[settings.models]
    policy, reward_models = make_models(dtype, device, budget)
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
