"""Tiny models of many families with random weights, loaded as a user's are, against the plain loop.

A family writes the reference's tokens, or stands in REFUSED with what the run says of it.
"""

from dataclasses import replace
from pathlib import Path

import PARGS_baselines
import pytest
import torch
from conftest import save
from guides import CachedGuide, RereadingGuide
from reference import Reference
from run_models import get_policy
from test_decoding import compare_with_reference, decode, make_settings
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 256, "initializer_range": 0.3, "num_labels": 1}
GROUPED = {"num_key_value_heads": 2}
SMALL_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 16}  # shorter than any prompt

# What a config says beside SHAPE; a name behind a colon tells apart two models of one family.
CAUSAL = {
    "gpt2": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": SMALL_HEADS,
    "mistral": GROUPED | WINDOW,
    "gemma": SMALL_HEADS,
    "gemma2": SMALL_HEADS | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": SMALL_HEADS | WINDOW | {"query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "phi3:sliding": WINDOW,
    "stablelm": {"num_key_value_heads": 4},
    "olmo2": {},
    "gpt_neox": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "mpt": {"max_seq_len": 256},
    "falcon": {},
    "falcon:alibi": {"alibi": True},
    "cohere": {"logit_scale": 1.0},
    "granite": {},
}
REWARD_MODELS = [
    name for name in CAUSAL if name.split(":")[0] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
]
SLIDING = ("mistral", "gemma2", "gemma3_text", "phi3:sliding")  # says so: never asked with a cache
FAULTS = {  # what the comparison with reading afresh finds
    "gpt_neo": "its rewards are",
    "mpt": "its rewards are",
    "bloom": "too many values to unpack",
    "falcon:alibi": "too many values to unpack",
}
REFUSED = {
    "mamba": "keeps a state and no key-value cache",
    "openai-gpt": "keeps no key-value cache",
    "minimax": "uses cache of its own",
    "bert": "reads a text in both directions",
}
ENCODERS = {
    "roberta": "wordpiece",
    "xlm-roberta": "unigram",
    "modernbert": "wordpiece",
    "electra": "wordpiece",
    "distilbert": "wordpiece",
    "albert": "unigram",
    "deberta": "unigram",
    "mpnet": "wordpiece",
    "longformer": "wordpiece",
    "bart": "wordpiece",
}
HAVE_SEGMENTS = ("electra", "albert", "deberta")


def save_new(kind: type, family: str, own: dict, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    """A folder with a new model of a family, loud enough that candidates' scores differ."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(":")[0], vocab_size=len(tokenizer), **SHAPE | own)
    return save(kind.from_config(config), tokenizer, path)


def save_causal(kind: type, family: str, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    return save_new(kind, family, ids | CAUSAL.get(family, {}), tokenizer, path)


def with_frame(tokenizer: PreTrainedTokenizerFast, segments: bool) -> PreTrainedTokenizerFast:
    """The tokenizer with BERT's frame and segment ids, or RoBERTa's: two separators and no segment ids."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1" if segments else "[CLS] $A [SEP] [SEP] $B [SEP]"
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, special)
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    names = ["input_ids", "attention_mask", *["token_type_ids"] * segments]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **roles, model_input_names=names, model_max_length=200
    )


def assert_guided(plain: Reference, prompts: list[str], settings: PARGS_baselines.Settings) -> None:
    """PARGS writes the reference's tokens, and the reward model tells candidates apart."""
    rewards = {round(plain.reward(prompts[0], [token]), 3) for token in range(40, 60)}
    assert len(rewards) > 5
    assert compare_with_reference("PARGS", prompts, settings, plain) > 2 * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_a_policy_writes_the_reference_tokens(family, small_models, tokenizers, prompts, tmp_path):
    folders = small_models | {"new": save_causal(AutoModelForCausalLM, family, tokenizers["bpe"], tmp_path)}
    settings = make_settings(folders, "new", "bert", max_new_tokens=8, pargs_weight=10.0)
    plain = Reference.load(folders["new"], folders["bert"], causal=False)
    assert_guided(plain, prompts[:3], settings)

    # Also when rows leave the batch: the first response ends with what it has written fourth.
    assert len({len(response.prompt_ids) for response in decode("TOP-K", prompts[:4], settings)}) > 2
    eos = decode("TOP-K", prompts[:1], settings)[0].ids[3]
    get_policy(settings.policy, settings).eos_ids = {eos}
    compared = compare_with_reference("TOP-K", prompts[:4], settings, plain, {eos})
    assert 8 <= compared < 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("family", REWARD_MODELS)
def test_a_causal_reward_model_guides_as_the_reference(
    family, small_models, tokenizers, prompts, tmp_path, monkeypatch, capsys
):
    kind = AutoModelForSequenceClassification
    folders = small_models | {"new": save_causal(kind, family, tokenizers["bpe"], tmp_path)}
    policy = "llama" if family == "gpt2" else "gpt2"
    choose_guide, guides = PARGS_baselines.choose_guide, []
    monkeypatch.setattr(
        PARGS_baselines, "choose_guide", lambda *asked: guides.append(choose_guide(*asked)) or guides[-1]
    )
    settings = make_settings(folders, policy, "new", max_new_tokens=8, pargs_weight=10.0)
    assert_guided(Reference.load(folders[policy], folders["new"], causal=True), prompts[:3], settings)

    assert type(guides[0]) is (RereadingGuide if family in (*SLIDING, *FAULTS) else CachedGuide)
    warnings = [line for line in capsys.readouterr().err.split("\n") if line.startswith("warning:")]
    assert len(warnings) == (family in FAULTS)
    assert all(f"cannot use a key-value cache ({FAULTS[family]}" in line for line in warnings)

    # A fault is told from rounding where that is coarse.
    decode("PARGS", prompts[:3], replace(settings, dtype="bfloat16"))
    assert type(guides[1]) is type(guides[0])


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_guides_as_the_reference(family, small_models, tokenizers, prompts, tmp_path):
    words = with_frame(tokenizers[ENCODERS[family]], family in HAVE_SEGMENTS)
    own = {"pad_token_id": words.pad_token_id, "bos_token_id": words.cls_token_id}
    own |= {"eos_token_id": words.sep_token_id, "sep_token_id": words.sep_token_id}
    own |= {"attention_window": 16} if family == "longformer" else {}
    own |= {"type_vocab_size": 2} if family in HAVE_SEGMENTS else {}
    kind = AutoModelForSequenceClassification
    folders = small_models | {"new": save_new(kind, family, own, words, tmp_path)}
    settings = make_settings(folders, "gpt2", "new", max_new_tokens=8, pargs_weight=10.0)
    assert_guided(Reference.load(folders["gpt2"], folders["new"], causal=False), prompts[:3], settings)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_decode_is_refused(family, tokenizers, tmp_path, capsys):
    folder = save_causal(AutoModelForCausalLM, family, tokenizers["bpe"], tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        decode("TOP-K", ["POST: a"], make_settings({"new": folder}, "new", "new"))
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2
    assert line.startswith("error: ") and repr(folder) in line
    assert REFUSED[family] in line
