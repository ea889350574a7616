"""Tiny models of many families with random weights, loaded as a user's are, against the plain loop.

Each one writes the reference's tokens, or stands in REFUSED with what the run says of it.
"""

from pathlib import Path

import guides
import PARGS_baselines
import pytest
import torch
from conftest import make_posts, save
from guides import CachedGuide, RereadingGuide
from reference import Reference
from test_decoding import compare_with_reference, decode, make_settings
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

pytestmark = pytest.mark.slow

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 256, "initializer_range": 0.3, "num_labels": 1}
WINDOW = {"sliding_window": 16}  # shorter than any prompt
GROUPED = {"num_key_value_heads": 2}

# What a config needs beside SHAPE; behind a name's colon stands what tells it from its family.
CAUSAL = {
    "gpt2": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {"head_dim": 8} | GROUPED,
    "mistral": WINDOW | GROUPED,
    "gemma": {"head_dim": 8} | GROUPED,
    "gemma2": {"head_dim": 8} | WINDOW | GROUPED,
    "gemma3_text": {"head_dim": 8, "sliding_window_pattern": 2} | WINDOW | GROUPED,
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
HAVE_HEADS = [name for name in CAUSAL if name.split(":")[0] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]
SLIDING = ("mistral", "gemma2", "gemma3_text", "phi3:sliding")  # never asked with a cache
UNCACHED = ("gpt_neo", "mpt", "bloom", "falcon:alibi")  # asked once, and seen to be wrong

ENCODERS = {
    "roberta": {},
    "xlm-roberta": {},
    "modernbert": {},
    "electra": {},
    "distilbert": {},
    "albert": {},
    "deberta": {},
    "mpnet": {},
    "longformer": {"attention_window": 16},
    "bart": {},
}
REFUSED: dict[str, str] = {}


@pytest.fixture
def folders(small_models):
    return dict(small_models)

@pytest.mark.parametrize("family", CAUSAL)
def test_policies(family, tokenizers, folders, tmp_path):
    bpe = tokenizers["bpe"]
    torch.manual_seed(0)
    ids = {"vocab_size": len(bpe), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), bpe.eos_token_id)}
    config = AutoConfig.for_model(family.split(":")[0], **SHAPE | ids | CAUSAL[family])
    folders["new"] = save(AutoModelForCausalLM.from_config(config), bpe, tmp_path / "new")
    prompts = [f"POST: {post}\nTL;DR:" for post, _, _ in make_posts(3, 5)]
    plain = Reference.load(folders["new"], folders["bert"], False)
    print([len(bpe(p)["input_ids"]) for p in prompts])
    for method in ("TOP-K", "PARGS"):
        settings = make_settings(folders, "new", "bert", max_new_tokens=8)
        print(method, compare_with_reference(method, prompts, settings, plain))


@pytest.mark.parametrize("family", HAVE_HEADS)
def test_causal(family, tokenizers, folders, tmp_path, monkeypatch, capsys):
    bpe = tokenizers["bpe"]
    torch.manual_seed(0)
    ids = {"vocab_size": len(bpe), **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), bpe.eos_token_id)}
    config = AutoConfig.for_model(family.split(":")[0], **SHAPE | ids | CAUSAL[family])
    folders["new"] = save(AutoModelForSequenceClassification.from_config(config), bpe, tmp_path / "new")
    prompts = [f"POST: {post}\nTL;DR:" for post, _, _ in make_posts(3, 5)]
    plain = Reference.load(folders["llama"], folders["new"], True)
    chosen = []
    def spy(*a, f=PARGS_baselines.choose_guide):
        chosen.append(f(*a)); return chosen[-1]
    monkeypatch.setattr(PARGS_baselines, "choose_guide", spy)
    settings = make_settings(folders, "llama", "new", max_new_tokens=8)
    capsys.readouterr()
    out = []
    for method in ("PARGS", "ARGS"):
        out.append(compare_with_reference(method, prompts, settings, plain))
    print("RESULT", family, out, [type(c).__name__ for c in chosen], capsys.readouterr().err)


ROB = ("roberta","xlm-roberta","mpnet","longformer","bart","distilbert","modernbert")
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, tokenizers, folders, tmp_path):
    words = tokenizers["wordpiece"]
    if family in ROB:
        backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]",
          special_tokens=[("[CLS]", words.cls_token_id), ("[SEP]", words.sep_token_id)])
        roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
        words = PreTrainedTokenizerFast(tokenizer_object=backend, **roles, model_max_length=200, model_input_names=["input_ids","attention_mask"])
    torch.manual_seed(0)
    ids = {"vocab_size": len(words), "pad_token_id": words.pad_token_id, "bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id, "sep_token_id": words.sep_token_id, "cls_token_id": words.cls_token_id}
    config = AutoConfig.for_model(family.split(":")[0], **SHAPE | ids | ENCODERS[family])
    print(config)
    folders["new"] = save(AutoModelForSequenceClassification.from_config(config), words, tmp_path / "new")
    prompts = [f"POST: {post}\nTL;DR:" for post, _, _ in make_posts(3, 5)]
    plain = Reference.load(folders["gpt2"], folders["new"], False)
    settings = make_settings(folders, "gpt2", "new", max_new_tokens=8)
    for method in ("PARGS", "ARGS"):
        print(method, compare_with_reference(method, prompts, settings, plain))
