"""The models of a run: loaded when they are needed, in a precision and with a budget that fit the device."""

import resource
import sys
from functools import lru_cache
from typing import Literal, Protocol

import torch
from fast_attention import use_fast_attention

from pargs.cli import is_main
from pargs.models import Policy, RewardModel, load_policy, load_reward_model
from pargs.processes import join_processes

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class LoadSettings(Protocol):
    """What of the decoding settings says how models are loaded."""

    @property
    def dtype(self) -> Precision: ...
    @property
    def device_map(self) -> str | None: ...
    @property
    def fast_attention(self) -> bool: ...
    @property
    def token_budget(self) -> int: ...


def get_policy(name: str, settings: LoadSettings) -> Policy:
    """The policy, loaded if it is not the last one that was."""
    device = join_processes().device
    return load_policy(name, choose_dtype(settings.dtype, device), device, settings.device_map)


def get_reward_model(name: str, settings: LoadSettings, dtype: torch.dtype | None = None) -> RewardModel:
    """The reward model, loaded if it is not among the last two: the guide and the evaluator."""
    device = join_processes().device
    dtype = dtype or choose_dtype(settings.dtype, device)
    token_budget = settings.token_budget or fit_budget(device)
    return load_for_decoding(name, dtype, device, token_budget, settings.fast_attention)


def get_evaluator(name: str, settings: LoadSettings) -> RewardModel:
    """The reward model whose rewards are reported: in full precision, whatever guides."""
    return get_reward_model(name, settings, torch.float32)


@lru_cache(maxsize=2)
def load_for_decoding(
    name: str, dtype: torch.dtype, device: torch.device, token_budget: int, fast_attention: bool
) -> RewardModel:
    """Load a reward model, with fast attention where that is wanted and gives the same rewards."""
    reward_model = load_reward_model(name, dtype, device, token_budget)
    used = use_fast_attention(reward_model.model) if fast_attention else None
    if used and is_main():
        print(f"{name}: {used}", file=sys.stderr)
    return reward_model


def choose_dtype(name: Precision, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def reset_peak(device: torch.device) -> None:
    """Begin to measure `peak_gb` anew, where that can be done: on a GPU."""
    if device.type == "cuda":
        for at in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(at)


def peak_gb(device: torch.device) -> float:
    """Most memory that this process took, in GB: on all GPUs together, since `reset_peak`."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(at) for at in range(torch.cuda.device_count())) / 1e9
    # On a CPU it is the peak of the process so far, whichever method took it; Linux counts in kB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def fit_budget(device: torch.device) -> int:
    """Tokens a reward model reads at once: what a CPU's caches like, or what fits beside two models."""
    if device.type != "cuda":
        return 1024
    memory = torch.cuda.get_device_properties(device).total_memory
    # Of DeBERTa-v3-large in fp16 these take 38, 19 and 10 GB (docs/benchmarks.md).
    return 262144 if memory > 60e9 else 131072 if memory > 32e9 else 65536
