"""Load policies and reward models; what is missing, damaged or of the wrong kind ends in one line."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from pargs.cli import fail, warn
from pargs.encoding import encode_prompts, start_ids
from pargs.files import MAKE_PAIRS
from pargs.prefixes import PairFrame, make_frame

# What the files of a model raise where they are missing, cut short, foreign, or need a package.
MODEL_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    EOFError,
    SafetensorError,
    UnpicklingError,
)


@dataclass
class Policy:
    """A causal language model, and what it takes to decode with it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    eos_ids: set[int]
    max_length: int  # tokens it can read


@dataclass
class RewardModel:
    """A sequence classifier with one output, what it takes to ask it, and how much it was asked."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    frame: PairFrame
    causal: bool  # decoder-only: one EOS ends a finished response, a prefix has none
    max_length: int  # tokens it can read
    token_budget: int  # tokens it reads at once; halved when memory runs out
    calls: int = 0  # rewards it was asked for
    tokens_read: int = 0  # without padding

    @property
    def has_segments(self) -> bool:
        return not self.causal and "token_type_ids" in self.tokenizer.model_input_names

    def shares_ids_with(self, policy_tokenizer: PreTrainedTokenizerFast) -> bool:
        """Whether it reads the policy's ids as they are, never re-encoded text."""
        return self.causal and self.tokenizer.get_vocab() == policy_tokenizer.get_vocab()


@contextmanager
def loading(what: str, hint: str = "") -> Iterator[None]:
    """Exit with one line where a library cannot load what is loaded inside; its warnings are not shown."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except MODEL_ERRORS as error:
        fail(f"cannot load {what}: {why(error).rstrip('. ')}" + (f"; {hint}" if hint else ""))
    finally:
        logging.set_verbosity(verbosity)


def why(error: BaseException) -> str:
    """What is wrong with a model's files; torch's own words on a pickle say how to run it all the same."""
    if isinstance(error, UnpicklingError):
        return "its pickle is damaged or holds more than weights, that is, code"
    return str(error) or type(error).__name__


def load_config(name: str, hint: str, revision: str = "main") -> PreTrainedConfig:
    with loading(repr(name), hint):
        return AutoConfig.from_pretrained(name, revision=revision)


def load_tokenizer(name: str, hint: str = "", revision: str = "main") -> PreTrainedTokenizerFast:
    """The tokenizer of a model; exits where it has no fast one, which knows each token's place in a text."""
    with loading(f"the tokenizer of {name!r}", hint):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if not tokenizer.is_fast:
        fail(f"{name!r} has no fast tokenizer, which is needed here")
    return tokenizer


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a model is decoder-only, so that a token's output does not depend on what follows."""
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that a model can read, from its positions and its tokenizer (which may not know: 1e30)."""
    names = ("max_position_embeddings", "max_seq_len")
    positions = next(filter(None, (getattr(config, name, None) for name in names)), sys.maxsize)
    if not is_causal(config):
        positions -= unused_positions(config)
    return min(positions, int(min(tokenizer.model_max_length, sys.maxsize)))


def unused_positions(config: PreTrainedConfig) -> int:
    """Positions that RoBERTa and its kin never give to a token: theirs begin behind the padding's id."""
    with torch.device("meta"):  # the shapes alone
        model = AutoModel.from_config(config)
    tables = {
        name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)
    }
    reserved = [table.padding_idx for name, table in tables.items() if "position" in name]
    return max((padding_id + 1 for padding_id in reserved if padding_id is not None), default=0)


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint was saved as a sequence classifier, with a head."""
    return any("SequenceClassification" in kind for kind in config.architectures or [])


def check_one_label(name: str, config: PreTrainedConfig) -> None:
    if config.num_labels != 1:
        fail(f"{name!r} has {config.num_labels} labels; a reward model has one")


def check_eos(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {name!r} has no EOS, which ends a response of a decoder-only model")


def check_causal_reward_model(name: str, model: object, tokenizer: PreTrainedTokenizerFast) -> None:
    check_eos(name, tokenizer)
    if not hasattr(model, "score"):
        fail(f"{name!r} ({type(model).__name__}) has no `score` head over all tokens")


def load_reward_model(
    name: str, dtype: torch.dtype, device: torch.device | str, token_budget: int, hint: str = ""
) -> RewardModel:
    """Load a trained reward model; exits where it is missing, has no trained head or not one output."""
    config = load_config(name, hint)
    tokenizer = load_tokenizer(name, hint)
    if not is_reward_model(config):
        fail(f"{name!r} is no trained reward model: it is a {(config.architectures or ['nameless'])[0]}")
    check_one_label(name, config)

    what = f"the weights of the reward model {name!r}"
    model, found = load_weights(AutoModelForSequenceClassification, name, what, hint, dtype=dtype)
    if found["missing_keys"]:
        fail(f"{name!r} is no trained reward model: it has no weights for {sorted(found['missing_keys'])}")
    causal = is_causal(config)
    if causal:
        check_causal_reward_model(name, model, tokenizer)

    return RewardModel(
        name,
        copy_weights(model).to(device).eval(),
        tokenizer,
        frame=make_frame(tokenizer, causal),
        causal=causal,
        max_length=longest_input(config, tokenizer),
        token_budget=token_budget,
    )


def load_weights(
    kind: Any, name: str, what: str, hint: str = "", **options: Any
) -> tuple[Any, dict[str, set[str]]]:
    """A model of the automatic class `kind`, and which of its weights were missing or unexpected."""
    warn_of_pickle(name)
    with loading(what, hint):
        return kind.from_pretrained(name, output_loading_info=True, **options)


@lru_cache(maxsize=1)
def load_policy(
    name: str, dtype: torch.dtype, device: torch.device | str, device_map: str | None = None
) -> Policy:
    """Load a language model, or an adapter merged into its base; exits where a file is not usable.

    `device_map` spreads it over all devices instead of `device`. The last policy is kept.
    """
    tokenizer = load_tokenizer(name)
    spread: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if Path(name, "adapter_config.json").exists():
        with loading(f"the policy {name!r}"):
            base = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
        # Merged in full precision, so that nothing of a small update is rounded away.
        model = load_language_model(base, torch.float32, spread)
        with loading(f"the policy {name!r}"):
            adapted = PeftModel.from_pretrained(model, name)
        check_adapter(adapted, name)
        model = adapted.merge_and_unload().to(dtype)
    else:
        model = load_language_model(name, dtype, spread)

    eos = model.generation_config.eos_token_id
    ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    eos_ids = {token for token in ends if isinstance(token, int)}  # either may be None
    if not device_map:
        model = copy_weights(model).to(device)
    check_decodes(name, model)
    return Policy(name, model.eval(), tokenizer, eos_ids, longest_input(model.config, tokenizer))


def encode_for_policy(
    policy: Policy, prompts: list[str], template: str, max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """Ids of each prompt as the policy reads it, and how many of them lost their beginning to fit.

    Room is kept for `max_new_tokens`; exits where that leaves none for a prompt.
    """
    start, room = start_ids(policy.tokenizer), policy.max_length - max_new_tokens
    room -= len(start)
    if room <= 0:
        fail(f"{policy.name!r} reads {policy.max_length} tokens: no prompt fits beside --max_new_tokens")
    encoded = encode_prompts(policy.tokenizer, prompts, template)
    return [start + ids[-room:] for ids in encoded], sum(len(ids) > room for ids in encoded)


def warn_of_unused_separator(name: str, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """A policy whose tokenizer was given a separator was probably tuned on prompts that hold it."""
    for token in tokenizer.get_added_vocab():
        if token.strip("<>[]|").lower() == "sep" and token not in template:
            warn(
                f"the tokenizer of {name!r} has a {token!r}, which the prompt template does not use: "
                f"look at the model card for its prompt, and give it to `{MAKE_PAIRS} --template`"
            )


def load_language_model(name: str, dtype: torch.dtype, spread: dict[str, Any]) -> Any:
    """A causal language model, all of whose weights are in its files; what is there beside them is said."""
    what = f"the policy {name!r}"
    model, found = load_weights(AutoModelForCausalLM, name, what, dtype=dtype, **spread)
    if found["missing_keys"]:
        fail(f"{name!r} is no whole policy: it has no weights for {first_few(found['missing_keys'])}")
    if found["unexpected_keys"]:
        warn(f"{name!r} has weights that no language model uses: {first_few(found['unexpected_keys'])}")
    return model


@torch.inference_mode()
def check_decodes(name: str, model: Any) -> None:
    """Exit where a model cannot write token by token, each from a key-value cache of those before."""
    kind, config = type(model).__name__, model.config
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        fail(f"{name!r} ({kind}) reads a text in both directions: it is no policy")
    if model._is_stateful:
        fail(f"{name!r} ({kind}) keeps a state and no key-value cache, which decoding needs")

    cache, ids = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with loading(f"the policy {name!r}", "decoding needs a key-value cache"):
        for at in range(2):
            mask, position = ids.new_ones(1, at + 1), ids + at
            model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            if cache.get_seq_length() <= at:
                fail(f"{name!r} ({kind}) keeps no key-value cache, which decoding needs")


def first_few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def check_adapter(adapted: PeftModel, name: str) -> None:
    """An adapter of another model leaves layers out, or has some too many; PEFT would only warn."""
    saved, expected = load_peft_weights(name, device="cpu"), get_peft_model_state_dict(adapted)
    if saved.keys() != expected.keys():
        base = adapted.peft_config["default"].base_model_name_or_path
        fail(
            f"cannot load the policy {name!r}: its adapter was not trained on {base!r}: "
            f"{len(saved.keys() ^ expected.keys())} weights differ"
        )


def copy_weights(model: Any) -> Any:
    """Move the weights from the file that they are mapped from into aligned memory, in place.

    On a CPU, where the map happens to lie decides the last bits of every product; they differed by launch.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def warn_of_pickle(name: str, revision: str = "main") -> None:
    """Say once that a checkpoint has no safetensors; torch then reads its pickle with `weights_only=True`."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # transformers would ask a server to convert it
    quiet = {
        "revision": revision,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    has_pickle = False
    with suppress(OSError):  # whoever loads it says what is wrong
        safe, pickled = (
            any(cached_file(name, file, **quiet) for file in files)
            for files in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
        )
        has_pickle = pickled and not safe
    if has_pickle:
        warn(f"{name!r} has no safetensors; of its pickle only weights are read")
