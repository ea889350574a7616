"""Load a policy: a causal language model, or an adapter and its base merged."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict, load_peft_weights
from reward_scoring import copy_weights, longest_input, warn_of_pickle, why
from script_settings import fail
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: set[int]
    max_length: int


@lru_cache(maxsize=1)
def load_policy(name: str, dtype: torch.dtype, device: torch.device, device_map: str | None = None) -> Policy:
    """Load onto `device`, or spread over all devices by `device_map`; exits where a file is not usable."""
    spread = {"device_map": device_map} if device_map else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if Path(name, "adapter_config.json").exists():
            # Merged in full precision, so that nothing of a small update is rounded away.
            adapted = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32, **spread)
            check_adapter(adapted, name)
            model = adapted.merge_and_unload().to(dtype)
        else:
            warn_of_pickle(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **spread)
    except Exception as error:
        fail(f"cannot load the policy {name!r}: {why(error)}")
    if not tokenizer.is_fast:
        fail(f"the policy {name!r} has no fast tokenizer, which decoding needs")

    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    if not device_map:
        model = copy_weights(model).to(device)
    return Policy(model.eval(), tokenizer, eos_ids - {None}, longest_input(model.config, tokenizer))


def check_adapter(adapted: PeftModel, name: str) -> None:
    """An adapter of another model leaves layers out, or has some too many; PEFT would only warn."""
    saved, expected = load_peft_weights(name, device="cpu"), get_peft_model_state_dict(adapted)
    if saved.keys() != expected.keys():
        base = adapted.peft_config["default"].base_model_name_or_path
        raise ValueError(
            f"its adapter was not trained on {base!r}: {len(saved.keys() ^ expected.keys())} weights differ"
        )
