"""Decode the test prompts with every method: ARGS, PARGS-G, PARGS, BESTN, TOP-K, DPO and PPO.

Reads   summarize_from_feedback/ (split `test`), the policies and the reward models.
Writes  generation_{args,pargs,pargs_g,bestn,top_k,dpo,ppo}.json and baseline_results.csv, which holds the
        evaluation reward model's score of each finished response; with --trace also trace_*.jsonl.

At each token the policy proposes its top k; guided methods add w times the reward of each continuation to
its log-probability and take the best, or sample. All prompts decode together, yet what is written for one
does not depend on the others: its random numbers belong to (seed, method, prompt, sample, step) alone.
What is finished is kept as it goes: the same command goes on after a run that was killed.

    python PARGS_decode/PARGS_baselines.py
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import load_from_disk
from peft import PeftConfig
from policy_loading import Policy, load_policy
from progress import Progress, digest, drop_progress
from reward_scoring import (
    CachedGuide,
    RereadingGuide,
    RewardModel,
    Written,
    can_cache,
    encode_written,
    fit_pair,
    left_pad,
    load_reward_model,
    positions,
    score_pairs,
)
from script_settings import fail, is_main, parse_settings
from text_encoding import decode_texts, encode_prompts, start_ids
from tqdm import tqdm
from transformers import (
    AutoConfig,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


@dataclass
class Settings:
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Which to run, e.g. --methods ARGS PARGS-G."},
    )

    policy: str = field(
        default="vistagi/gpt2-large-tldr-sum", metadata={"help": "The reference policy (SFT model)."}
    )
    full_reward_model: str = field(
        default="OpenAssistant/reward-model-deberta-v3-large",
        metadata={"help": "Trained on full sequences: guides ARGS, picks for BESTN."},
    )
    partial_reward_model: str = field(
        default="partial_reward_modeling_tldr", metadata={"help": "Trained on prefixes: guides PARGS."}
    )
    evaluation_reward_model: str | None = field(
        default=None, metadata={"help": "Scores the finished responses; the full reward model if not given."}
    )
    dpo_policy: str = field(default="GPT2_large_tldr_DPO", metadata={"help": "The DPO adapter or model."})
    ppo_policy: str = field(default="vistagi/gpt2-large-tldr-sum-rlhf", metadata={"help": "The RLHF model."})

    dataset: str = field(default="summarize_from_feedback", metadata={"help": "Where the test prompts are."})
    prompts: str | None = field(
        default=None,
        metadata={"help": 'Own prompts instead: a file of lines {"prompt": ..., "reference": ...}.'},
    )
    num_prompts: int = field(default=100, metadata={"help": "Test prompts to decode; 0 for all."})

    k: int = field(default=10, metadata={"help": "Tokens that the policy proposes at each step."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest response in tokens."})
    args_weight: float = field(default=1.0, metadata={"help": "w of ARGS in log pi + w * r."})
    pargs_g_weight: float = field(default=1.0, metadata={"help": "w of PARGS-G."})
    pargs_weight: float = field(default=2.0, metadata={"help": "w of PARGS."})
    best_of: int = field(default=10, metadata={"help": "Samples that BESTN chooses from."})
    seed: int = field(default=42, metadata={"help": "Which test prompts, and all sampling."})

    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Decode these methods anew. Results of other settings here are deleted, of all methods."
        },
    )
    trace: bool = field(default=False, metadata={"help": "Keep every step's candidates and rewards."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the models; auto is float16 on a GPU and float32 on a CPU.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={"help": "auto spreads a policy that is too large for one GPU over all of them."},
    )
    fast_attention: bool = field(
        default=True,
        metadata={"help": "The fused attention of requirements-gpu.txt, for DeBERTa, if installed."},
    )
    token_budget: int = field(
        default=0, metadata={"help": "Tokens that a reward model reads at once; 0 fits it to the device."}
    )
    cache_gb: float = field(
        default=8.0,
        metadata={"help": "Memory for key-value caches, which sets how many prompts decode at once."},
    )


@dataclass(frozen=True)
class Method:
    """A method as a choice of policy, guide, weight and how a token is picked; names are of settings."""

    policy: str
    guide: str | None = None
    weight: str | None = None
    greedy: bool = False
    best_of: str | None = None


METHODS = {
    "ARGS": Method("policy", guide="full_reward_model", weight="args_weight", greedy=True),
    "PARGS-G": Method("policy", guide="partial_reward_model", weight="pargs_g_weight", greedy=True),
    "PARGS": Method("policy", guide="partial_reward_model", weight="pargs_weight"),
    "BESTN": Method("policy", best_of="best_of"),
    "TOP-K": Method("policy"),
    "DPO": Method("dpo_policy"),
    "PPO": Method("ppo_policy"),
}

MADE_BY = {
    "partial_reward_model": "make it with `python partial_reward_training/tldr_partial_reward_model.py`, "
    "or name one with --partial_reward_model",
    "dpo_policy": "make it with `python DPO_training/GPT2_large_DPO_tldr.py`, or name one with --dpo_policy",
}


@dataclass
class Row:
    """One response being written: the `sample`-th of a prompt."""

    prompt: str
    prompt_ids: list[int]
    sample: int
    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    steps: list[dict] = field(default_factory=list)


# Loading


def check_settings(settings: Settings) -> None:
    unknown = [method for method in settings.methods if method not in METHODS]
    if unknown or not settings.methods:
        fail(f"--methods knows {', '.join(METHODS)}, not {', '.join(unknown) or 'nothing'}")
    if settings.device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fail("--device_map spreads a policy over all GPUs: start one process, without a launcher")
    for name, least in (("k", 1), ("max_new_tokens", 1), ("best_of", 1), ("num_prompts", 0)):
        if getattr(settings, name) < least:
            fail(f"--{name} must be at least {least}, not {getattr(settings, name)}")


def check_models(settings: Settings) -> dict[str, str | None]:
    """Every model that the methods need is there: better said now than after hours of decoding.

    Returns for each role (a setting's name) what tells its model from a later one of the same name.
    """
    identities = {}
    for role in dict.fromkeys(role for method in settings.methods for role in roles_of(method)):
        name = getattr(settings, role) or settings.full_reward_model
        hint = MADE_BY.get(role, f"name another with --{role}")
        is_output = role in MADE_BY and name == getattr(Settings, role)
        if (is_output or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
            fail(f"there is no folder {name!r}; {hint}")
        try:
            config = (
                PeftConfig if Path(name, "adapter_config.json").exists() else AutoConfig
            ).from_pretrained(name)
        except Exception as error:
            fail(f"cannot load {name!r}: {str(error).rstrip('. ')}; {hint}")

        vocabulary = getattr(config, "vocab_size", settings.k)
        if role.endswith("policy") and settings.k > vocabulary:
            fail(f"--k {settings.k} is more than the {vocabulary} tokens that {name!r} knows")
        identities[role] = folder_digest(name) or getattr(config, "_commit_hash", None)
        base = folder_digest(getattr(config, "base_model_name_or_path", None) or "")
        if base:  # of an adapter
            identities[role] += base
    return identities


def roles_of(method: str) -> list[str]:
    """The settings that name the models which a method needs."""
    how = METHODS[method]
    chooser = "full_reward_model" if how.best_of else None
    return [role for role in (how.policy, how.guide, chooser, "evaluation_reward_model") if role]


def folder_digest(name: str) -> str | None:
    """A digest of a model's folder, of whose large files blocks are read; None for a hub name."""
    if not name or not Path(name).is_dir():
        return None
    seen = blake2b(digest_size=8)
    for path in sorted(Path(name).iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json"):
            continue
        size = path.stat().st_size
        seen.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // 64)):
                file.seek(start)
                seen.update(file.read(4096))
    return seen.hexdigest()


def load_prompts(settings: Settings) -> tuple[list[str], list[str | None], str]:
    """Prompts, their references (None where there is none) and the template they were built from."""
    sidecar = Path(settings.dataset, "processing.json")
    try:
        template = json.loads(sidecar.read_text())["template"] if sidecar.exists() else "{post}"
        if settings.prompts:
            return *read_own_prompts(settings.prompts), template
        test = load_from_disk(settings.dataset)["test"]
        prompts, references = test["prompt"], test["reference"]
    except Exception as error:
        fail(
            f"cannot read split 'test' of {settings.dataset!r} ({error}); "
            "make it with `python DataProcess/tldr_data_process.py`"
        )

    if settings.num_prompts:
        # In memory: `datasets` would leave a cache file in the artifact it reads.
        chosen = test.shuffle(seed=settings.seed, keep_in_memory=True)
        chosen = chosen.select(range(min(settings.num_prompts, len(test))))
        prompts, references = chosen["prompt"], chosen["reference"]
    return list(prompts), list(references), template


def read_own_prompts(path: str) -> tuple[list[str], list[str | None]]:
    """Read lines {"prompt": ..., "reference": ...}; the reference may be left out."""
    prompts, references = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the prompts {path!r}: {error}")

    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, reference = row["prompt"], row.get("reference")
            f"{prompt}{reference}".encode()  # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fail(f'{path}, line {number} is not a JSON object with a "prompt" ({error!r})')
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(reference, str | None):
            fail(f'{path}, line {number}: "prompt" must be text, and "reference" text or absent')
        prompts.append(prompt)
        references.append(reference)

    if not prompts:
        fail(f"{path} holds no prompts")
    return prompts, references


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def choose_token_budget(settings: Settings, device: torch.device) -> int:
    """Tokens a reward model reads at once: what a CPU's caches like, or what fits beside two models."""
    if settings.token_budget:
        return settings.token_budget
    if device.type != "cuda":
        return 1024
    return 65536 if torch.cuda.get_device_properties(device).total_memory < 40e9 else 262144


# Choosing a token


def uniform(seed: int, method: str, prompt: str, sample: int, step: int) -> float:
    """The random number in [0, 1) of one step, the same wherever and beside whatever it is drawn."""
    key = json.dumps([seed, method, prompt, sample, step]).encode()
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 11) * 2.0**-53


def top_candidates(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens and their log-probabilities over the whole vocabulary, both [batch, k].

    Candidates come by falling probability, equal ones by rising id.
    """
    log_probs = logits.float().log_softmax(-1)  # [batch, vocabulary]
    # 1e-13 an id separates equal values and is below the distance of different ones.
    by_id = torch.arange(log_probs.shape[-1], device=log_probs.device, dtype=torch.float64) * 1e-13
    candidates = (log_probs.double() - by_id).topk(min(k, log_probs.shape[-1])).indices
    return candidates, log_probs.gather(1, candidates)


def choose(scores: torch.Tensor, uniforms: torch.Tensor | None) -> torch.Tensor:
    """Which candidate of each row, [batch]: the first best, or by inverse CDF of softmax(scores).

    `scores` is [batch, k] in float64, `uniforms` [batch] or None for greedy. A row with a NaN gives -1.
    """
    if uniforms is None:
        choice = scores.argmax(-1)
    else:
        cdf = scores.softmax(-1).cumsum(-1)
        choice = (cdf <= uniforms[:, None]).sum(-1).clamp(max=scores.shape[-1] - 1)
    return choice.masked_fill(scores.isnan().any(-1), -1)


# Decoding


@torch.inference_mode()
def decode_wave(
    policy: Policy,
    rows: list[Row],
    samples: int,
    settings: Settings,
    method: str,
    guide: RereadingGuide | CachedGuide | None,
) -> Iterator[list[Row]]:
    """Write the responses of `rows` together, in place; the rows of a prompt's samples stand side by side.

    Yields after each step the rows that ended with it; they leave the batch at once. A step waits for the
    device once, where the tokens chosen in the step before and the new candidates are fetched together.
    """
    how, device = METHODS[method], policy.model.device
    weight = getattr(settings, how.weight) if how.weight else 0.0

    firsts = rows[::samples]
    input_ids, mask = (tensor.to(device) for tensor in left_pad([row.prompt_ids for row in firsts]))
    past_key_values = DynamicCache(config=policy.model.config)
    logits = forward(policy, input_ids, mask, positions(mask), past_key_values)
    if samples > 1:
        past_key_values.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    if guide:
        guide.begin([row.prompt for row in rows])

    chosen = None  # [batch], the tokens of the step before, not yet on the host
    for step in range(settings.max_new_tokens):
        candidates, log_probs = top_candidates(logits, settings.k)
        fetched = candidates if chosen is None else torch.cat([candidates, chosen[:, None]], dim=1)
        fetched = fetched.tolist()

        if chosen is not None:
            ended = {at for at, row in enumerate(rows) if append_token(policy, row, fetched[at].pop())}
            yield [rows[at] for at in sorted(ended)]
            kept = [at for at in range(len(rows)) if at not in ended]
            if not kept:
                return
            if ended:
                rows, fetched = [rows[at] for at in kept], [fetched[at] for at in kept]
                index = torch.tensor(kept, device=device)
                candidates, log_probs, mask = candidates[index], log_probs[index], mask[index]
                # The layers of a spread policy lie on several devices; an index on the host suits all.
                past_key_values.batch_select_indices(index.cpu() if settings.device_map else index)
                if guide:
                    guide.keep(kept)

        scores = log_probs.double()
        if guide:
            rewards = guide.score([row.ids for row in rows], fetched, candidates)
            scores = scores + weight * rewards.double()
            # log pi may be -inf, a reward may not.
            scores = scores.masked_fill(~rewards.isfinite(), torch.nan)

        uniforms = None
        if not how.greedy:
            drawn = [uniform(settings.seed, method, row.prompt, row.sample, step) for row in rows]
            uniforms = torch.tensor(drawn, dtype=torch.float64, device=device)
        choice = choose(scores, uniforms)
        chosen = candidates.gather(1, choice.clamp(min=0)[:, None]).squeeze(1).masked_fill(choice < 0, -1)

        if settings.trace and guide:
            keep_trace(policy, rows, fetched, log_probs, rewards, choice)
        if step < settings.max_new_tokens - 1:
            seen = mask.sum(1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = forward(policy, chosen.clamp(min=0)[:, None], mask, seen, past_key_values)

    for row, token in zip(rows, chosen.tolist(), strict=True):
        append_token(policy, row, token)
    yield rows


def forward(
    policy: Policy,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: DynamicCache,
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


def append_token(policy: Policy, row: Row, token: int) -> bool:
    """Take the token in; True where it ends the response (an EOS is not part of it)."""
    if token < 0:
        fail(f"a NaN or infinite reward or log-probability came up after the prompt {row.prompt[:200]!r}")
    if token in policy.eos_ids:
        row.finish_reason = "eos"
        return True
    row.ids.append(token)
    return False


def keep_trace(
    policy: Policy,
    rows: list[Row],
    candidates: list[list[int]],
    log_probs: torch.Tensor,
    rewards: torch.Tensor,
    choice: torch.Tensor,
) -> None:
    columns = zip(rows, candidates, log_probs.tolist(), rewards.tolist(), choice.tolist(), strict=True)
    for row, ids, row_log_probs, row_rewards, chosen in columns:
        row.steps.append(
            {
                "tokens": [policy.tokenizer.decode([token]) for token in ids],
                "log_probs": [round(value, 4) for value in row_log_probs],
                "rewards": [round(value, 4) for value in row_rewards],
                "chosen": chosen,
            }
        )


def waves(
    rows: list[Row], samples: int, policy: Policy, guide: object, settings: Settings
) -> Iterator[list[Row]]:
    """Cut rows into waves whose caches fit into `cache_gb`, similar prompt lengths together."""
    groups = [rows[at : at + samples] for at in range(0, len(rows), samples)]
    groups.sort(key=lambda group: len(group[0].prompt_ids), reverse=True)
    token_bytes = cache_bytes(policy.model)
    if isinstance(guide, CachedGuide):
        token_bytes += cache_bytes(guide.reward_model.model)

    while groups:
        row_bytes = token_bytes * (len(groups[0][0].prompt_ids) + settings.max_new_tokens)
        count = max(1, int(settings.cache_gb * 1e9 / (row_bytes * samples)))
        yield [row for group in groups[:count] for row in group]
        groups = groups[count:]


def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token takes in a model's key-value cache."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_size * model.dtype.itemsize


def decode_method(
    method: str, prompts: list[str], template: str, settings: Settings, progress: Progress | None = None
) -> tuple[list[Row], PreTrainedTokenizerBase]:
    """All responses of one method, `samples` of each prompt side by side, and the policy's tokenizer.

    What `progress` has found is taken over, and what ends is added to it.
    """
    how, device = METHODS[method], PartialState().device
    dtype = choose_dtype(settings.dtype, device)
    name = getattr(settings, how.policy)
    policy = load_policy(name, dtype, device, settings.device_map)

    samples = num_samples(method, settings)
    start, room = start_ids(policy.tokenizer), policy.max_length - settings.max_new_tokens
    if room <= len(start):
        fail(f"{name!r} reads {policy.max_length} tokens: no prompt fits beside --max_new_tokens")
    encoded = encode_prompts(policy.tokenizer, prompts, template)
    cut = sum(gather_object([sum(len(start) + len(ids) > room for ids in encoded)]))
    if cut and is_main():
        print(f"{method}: {cut} prompts are longer than {name!r} can read and lose their beginning")
    encoded = [start + ids[-(room - len(start)) :] for ids in encoded]
    rows = [
        Row(prompt, ids, sample)
        for prompt, ids in zip(prompts, encoded, strict=True)
        for sample in range(samples)
    ]

    unwritten = take_over(rows, samples, progress) if progress else rows
    kept, total = map(sum, zip(*gather_object([(len(rows) - len(unwritten), len(rows))]), strict=True))
    if kept and is_main():
        print(f"{method}: {kept} of {total} responses kept from an earlier run")

    guide = make_guide(how, policy, template, settings) if how.guide and unwritten else None
    most, ended = settings.max_new_tokens, len(rows) - len(unwritten)
    with tqdm(total=len(rows) * most, desc=f"{method:<7}", unit="token", disable=not is_main()) as bar:
        for wave in waves(unwritten, samples, policy, guide, settings):
            writing = len(wave)
            ended_rows = decode_wave(policy, wave, samples, settings, method, guide)
            for step, done in enumerate(name_what_is_full(ended_rows), start=1):
                if progress:
                    progress.add([record_of(row) for row in done])
                # A row that ends early saves the tokens it could still have had.
                writing, ended = writing - len(done), ended + len(done)
                bar.update(ended * most + writing * step - bar.n)
    return rows, policy.tokenizer


def name_what_is_full(steps: Iterator[list[Row]]) -> Iterator[list[Row]]:
    """The same steps; a GPU whose memory is full ends in a message."""
    try:
        yield from steps
    except torch.cuda.OutOfMemoryError:
        fail("the GPU's memory is full; --cache_gb says how many prompts decode at once: lower it")


def num_samples(method: str, settings: Settings) -> int:
    best_of = METHODS[method].best_of
    return getattr(settings, best_of) if best_of else 1


def record_of(row: Row) -> dict:
    kept = {"ids": row.ids, "finish_reason": row.finish_reason, "steps": row.steps}
    return {"prompt": digest(row.prompt), "sample": row.sample, **kept}


def take_over(rows: list[Row], samples: int, progress: Progress) -> list[Row]:
    """Fill in the responses that were finished before; returns the rows of prompts that are not whole."""
    found = {(r["prompt"], r["sample"]): r for r in progress.found if "ids" in r}
    unwritten = []
    for at in range(0, len(rows), samples):
        group = rows[at : at + samples]
        records = [found.get((digest(row.prompt), row.sample)) for row in group]
        if None in records:
            unwritten += group
            continue
        for row, record in zip(group, records, strict=True):
            row.ids, row.finish_reason, row.steps = record["ids"], record["finish_reason"], record["steps"]
    return unwritten


def make_guide(
    how: Method, policy: Policy, template: str, settings: Settings
) -> RereadingGuide | CachedGuide:
    reward_model = get_reward_model(how.guide, settings)
    reserved = settings.max_new_tokens + 1
    if reward_model.max_length - reward_model.frame.num_special <= reserved:
        length = reward_model.max_length
        fail(f"{reward_model.name!r} reads {length} tokens: no prompt fits beside --max_new_tokens")
    if can_cache(reward_model, policy.tokenizer):
        return CachedGuide(reward_model, policy.eos_ids, template, reserved)
    return RereadingGuide(reward_model, policy.tokenizer, policy.eos_ids, template, reserved)


def get_reward_model(role: str, settings: Settings) -> RewardModel:
    """The reward model that the setting `role` names."""
    name = getattr(settings, role) or settings.full_reward_model
    device = PartialState().device
    return cached_reward_model(
        name,
        choose_dtype(settings.dtype, device),
        device,
        choose_token_budget(settings, device),
        settings.fast_attention,
    )


# The guide and the evaluator at most: models are loaded when they are needed and let go again.
cached_reward_model = lru_cache(maxsize=2)(load_reward_model)


# Scoring and writing


def pick_best(
    rows: list[Row], samples: int, tokenizer: PreTrainedTokenizerBase, template: str, settings: Settings
) -> list[Row]:
    """Of each prompt's samples the one that the full reward model likes best, the first of equals."""
    reward_model = get_reward_model("full_reward_model", settings)
    prompts = [row.prompt for row in rows]
    written = finished_responses(rows, reward_model, tokenizer)
    rewards = score_pairs(
        reward_model,
        encode_prompts(reward_model.tokenizer, prompts, template),
        encode_written(reward_model, prompts, written),
        reserved=settings.max_new_tokens + 1,
    )
    for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
        check_reward(reward, prompt, reward_model)
    best = rewards.view(len(rows) // samples, samples).argmax(1).tolist()
    return [rows[group * samples + sample] for group, sample in enumerate(best)]


def finished_responses(
    rows: list[Row], reward_model: RewardModel, tokenizer: PreTrainedTokenizerBase
) -> list[Written]:
    """What is delivered counts as finished, whatever ended it."""
    keep_ids = reward_model.shares_ids_with(tokenizer)
    texts = decode_texts(tokenizer, [row.ids for row in rows])
    return [Written(text, True, row.ids if keep_ids else None) for row, text in zip(rows, texts, strict=True)]


def check_reward(reward: float, prompt: str, reward_model: RewardModel) -> None:
    if not math.isfinite(reward):
        fail(f"{reward_model.name!r} gives a reward of {reward} after the prompt {prompt[:200]!r}")


def evaluate(
    reward_model: RewardModel,
    prompts: list[str],
    written: list[Written],
    template: str,
    reserved: int,
    progress: Progress | None = None,
    title: str = "responses",
) -> list[float]:
    """Rewards of finished responses to 4 decimals, one at a time so that none depends on its batch."""
    prompt_ids = encode_prompts(reward_model.tokenizer, prompts, template)
    response_ids = encode_written(reward_model, prompts, written)
    found = {r["pair"]: r["reward"] for r in progress.found if "reward" in r} if progress else {}
    report_cut(reward_model, prompt_ids, response_ids, reserved, title)

    rewards = []
    pairs = zip(prompts, written, prompt_ids, response_ids, strict=True)
    for prompt, response, *pair in tqdm(pairs, f"{title:<7} scores", len(prompts), disable=not is_main()):
        key = digest([prompt, response.text])
        reward = found.get(key)
        if reward is None:
            reward = round(score_pairs(reward_model, *([ids] for ids in pair), reserved).item(), 4)
            check_reward(reward, prompt, reward_model)
            if progress:
                progress.add([{"pair": key, "reward": reward}])
        rewards.append(reward)
    return rewards


def report_cut(
    reward_model: RewardModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    reserved: int,
    title: str,
) -> None:
    """Say how many pairs, of all processes, a reward model could not read whole."""
    pairs = zip(prompts, responses, strict=True)
    cut = sum(fit_pair(reward_model, *pair, reserved) != pair for pair in pairs)
    cut = sum(gather_object([cut]))
    if cut and is_main():
        print(f"{title}: {cut} pairs are longer than {reward_model.name!r} can read and were cut")


def run_method(
    method: str, prompts: list[str], template: str, settings: Settings, progress: Progress | None = None
) -> list[dict]:
    """Decode and score one method; every process does its share and all get the whole, in order."""
    mine = share(len(prompts))
    rows, tokenizer = decode_method(method, [prompts[at] for at in mine], template, settings, progress)

    if METHODS[method].best_of:
        rows = pick_best(rows, num_samples(method, settings), tokenizer, template, settings)
    reward_model = get_reward_model("evaluation_reward_model", settings)
    written = finished_responses(rows, reward_model, tokenizer)
    reserved = settings.max_new_tokens + 1
    rewards = evaluate(
        reward_model, [row.prompt for row in rows], written, template, reserved, progress, method
    )

    results = [
        {
            "prompt": row.prompt,
            "result": response.text,
            "reward": reward,
            "num_tokens": len(row.ids),
            "finish_reason": row.finish_reason,
            "steps": row.steps,
        }
        for row, response, reward in zip(rows, written, rewards, strict=True)
    ]
    return gather_in_order(mine, results)


def share(count: int) -> range:
    """Which of `count` prompts this process works on."""
    return range(PartialState().process_index, count, PartialState().num_processes)


def gather_in_order(mine: range, results: list) -> list:
    """What all processes made of their shares, in the order of the prompts."""
    gathered = dict(gather_object(list(zip(mine, results, strict=True))))
    return [gathered[at] for at in range(len(gathered))]


def score_references(
    prompts: list[str], references: list[str | None], template: str, settings: Settings
) -> list[float | None]:
    """Rewards of the human references, None where there is none."""
    mine = share(len(prompts))
    given = [at for at in mine if references[at] is not None]
    rewards = evaluate(
        get_reward_model("evaluation_reward_model", settings),
        [prompts[at] for at in given],
        [Written(references[at], True) for at in given],
        template,
        settings.max_new_tokens + 1,
        title="reference",
    )
    scored = dict(zip(given, rewards, strict=True))
    return gather_in_order(mine, [scored.get(at) for at in mine])


def file_stem(method: str) -> str:
    return method.lower().replace("-", "_")


def write_whole(path: str, text: str) -> None:
    """Write beside `path`, then rename: a file is there whole or not at all."""
    beside = Path(f".{path}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        fail(f"cannot write {path!r}: {error}")


def trace_path(method: str) -> Path:
    return Path(f"trace_{file_stem(method)}.jsonl")


def save_method(method: str, results: list[dict], traced: bool) -> None:
    """Write the results last: a method with results is a finished one."""
    if traced:
        lines = (
            json.dumps({"prompt": r["prompt"], "steps": r["steps"]}, ensure_ascii=False) for r in results
        )
        write_whole(str(trace_path(method)), "".join(line + "\n" for line in lines))

    rows = [{key: value for key, value in result.items() if key != "steps"} for result in results]
    write_whole(f"generation_{file_stem(method)}.json", json.dumps(rows, indent=1, ensure_ascii=False))


def read_method(method: str, prompts: list[str]) -> list[dict] | None:
    """The results of `method` in this directory; None where there are none for these prompts."""
    try:
        rows = json.loads(Path(f"generation_{file_stem(method)}.json").read_text(encoding="utf-8"))
        return rows if [row["prompt"] for row in rows] == prompts else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_done(method: str, prompts: list[str], settings: Settings) -> bool:
    """Whether an earlier run of these settings, which the directory is claimed for, finished the method."""
    lacks_trace = settings.trace and METHODS[method].guide and not trace_path(method).exists()
    return not lacks_trace and read_method(method, prompts) is not None


def methods_left(prompts: list[str], settings: Settings) -> list[str]:
    """The methods that are not done, as the main process sees it: machines need not share a disk."""
    left = []
    for method in settings.methods if is_main() else ():
        if not is_done(method, prompts, settings):
            left.append(method)
        else:
            print(f"{method}: done before, see generation_{file_stem(method)}.json")
    return broadcast_object_list([left])[0]


def collect_rewards(prompts: list[str], references: list[float | None]) -> pd.DataFrame:
    """One row a prompt; a column for each method whose results are here, and the references'."""
    table = pd.DataFrame({"prompt": prompts})
    for method in METHODS:
        results = read_method(method, prompts)
        if results is not None:
            table[method] = [row["reward"] for row in results]
    table["reference"] = references
    return table


def claim_directory(settings: Settings, prompts: list[str], models: dict[str, str | None]) -> None:
    """Refuse to mix two experiments in one directory: the settings of the first are kept beside its files.

    `models` are the identities of the models to be used; a model that was retrained is another setting.
    """
    ours = settings_that_matter(settings)
    ours["prompts_digest"] = digest(prompts)
    path = Path("decoding_settings.json")
    files = [*Path().glob("generation_*.json*"), *Path().glob("trace_*.jsonl"), Path("baseline_results.csv")]

    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        known = theirs.pop("models", {})
    except (OSError, ValueError, AttributeError):
        theirs, known = {}, {}  # none that can be read, so whatever lies here is not known to be ours
    changes = [
        f"{key} (was {theirs.get(key)!r}, is {ours[key]!r})" for key in ours if theirs.get(key) != ours[key]
    ]
    changes += [
        f"the model of --{role} (it was trained anew or replaced)"
        for role in models.keys() & known.keys()
        if models[role] != known[role]
    ]

    if settings.overwrite:
        dropped = [file for file in files if changes or file.name in result_files(settings)]
        for file in dropped:
            file.unlink(missing_ok=True)
        if changes and any(file.suffix == ".json" for file in dropped):
            print(f"removed the results of other settings: {', '.join(changes)}")
        known = {} if changes else known
    elif changes and any(file.exists() for file in files):
        fail(
            f"this directory holds results of {'other' if theirs else 'unknown'} settings: "
            f"{', '.join(changes)}; use another directory, or --overwrite, which deletes them all"
        )
    write_whole(str(path), json.dumps({**ours, "models": known | models}, indent=1, ensure_ascii=False))


def settings_that_matter(settings: Settings) -> dict:
    """Those that decide what is written for a prompt."""
    free = ("methods", "trace", "device_map", "token_budget", "cache_gb", "overwrite")
    return {key: value for key, value in asdict(settings).items() if key not in free}


def experiment_of(method: str, prompts: list[str], models: dict, settings: Settings) -> str:
    """What kept responses of a method must agree in to be gone on from; the main process's view."""
    device = PartialState().device
    what = [
        settings_that_matter(settings) | {"dtype": str(choose_dtype(settings.dtype, device))},
        settings.trace and METHODS[method].guide,
        prompts,
        [models[role] for role in roles_of(method)],
    ]
    return broadcast_object_list([digest(what)])[0]


def result_files(settings: Settings) -> set[str]:
    """What the methods of this run leave behind, finished or not."""
    names = {"baseline_results.csv"}
    for method in settings.methods:
        stem = file_stem(method)
        names |= {f"generation_{stem}.json", trace_path(method).name}
        names |= {path.name for path in Path().glob(f"generation_{stem}.progress-*.jsonl")}
    return names


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_settings(settings)
    if not is_main():
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    # Said outright, or processes without a GPU would not find each other.
    # A process that has done its share waits for the others, however long.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    prompts, references, template = load_prompts(settings)
    models = check_models(settings)
    if is_main():
        claim_directory(settings, prompts, models)

    left = methods_left(prompts, settings)
    for method in set(settings.methods) - set(left):
        drop_progress(f"generation_{file_stem(method)}")
    for earlier, method in zip([None, *left], left, strict=False):
        if earlier and METHODS[earlier].policy != METHODS[method].policy:
            load_policy.cache_clear()  # the one policy goes before the other comes
        experiment = experiment_of(method, prompts, models, settings)
        progress = Progress(f"generation_{file_stem(method)}", experiment)
        results = run_method(method, prompts, template, settings, progress)
        if is_main():
            save_method(method, results, settings.trace and METHODS[method].guide is not None)
        progress.drop()

    rewards = score_references(prompts, references, template, settings)
    if is_main():
        table = collect_rewards(prompts, rewards)
        write_whole("baseline_results.csv", table.to_csv(index=False))

        if left:
            print(f"\nwrote {', '.join(f'generation_{file_stem(method)}.json' for method in left)}")
        shares = f"{PartialState().num_processes} process" + "es" * (PartialState().num_processes > 1)
        print(f"wrote baseline_results.csv: {len(prompts)} prompts, {shares}; mean rewards:")
        print(table.drop(columns="prompt").mean().round(4).to_string())
        print("next: python Evaluation/show_result.py")


if __name__ == "__main__":
    main()
