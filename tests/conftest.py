"""Small real models and a small world of posts, made once per test session."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import preference_data_process
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
STAGES = ("DataProcess", "partial_reward_training", "DPO_training", "PARGS_decode", "Evaluation")
Outcome = tuple[int, str]  # a script's exit status, and what it printed, both streams together

CHAT_TEMPLATE = (  # like SmolLM2's
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WHO = ["my sister", "my boss", "our neighbour", "my old friend", "the landlord", "my wife"]
WHAT = [
    "sold my bike",
    "lost the keys",
    "shouts all night",
    "wants money back",
    "moved to Köln",
    "ate my café lunch",
]
ASK = ["what should I do?", "am I wrong?", "how do I say no?", "is that normal?"]


def make_posts(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(post, good summary, bad summary) triples."""
    rng = random.Random(seed)
    posts = []
    for _ in range(count):
        who, what, ask = rng.choice(WHO), rng.choice(WHAT), rng.choice(ASK)
        detail = " ".join(rng.choice(WHO) + " " + rng.choice(WHAT) + "." for _ in range(rng.randint(1, 3)))
        post = f"So {who} {what}. {detail} {ask.capitalize()}"
        posts.append(
            (post, f"{who} {what}, {ask}", f"{rng.choice(WHO)} {rng.choice(WHAT)} and so on and so on")
        )
    return posts


def comparison(post: str | None, good: str, bad: str, choice: int) -> dict:
    """A row in the schema of the hub's `comparisons`."""
    texts = [bad, good] if choice else [good, bad]
    return {
        "info": {"id": "x", "post": post, "title": "t", "subreddit": "s", "site": None, "article": None},
        "summaries": [{"text": text, "policy": "p", "note": None} for text in texts],
        "choice": choice,
        "worker": "w",
        "batch": "b",
        "split": "s",
        "extra": {"confidence": None},
    }


def write_hub_data(directory: Path, train: list[dict], validation: list[dict], test: list[dict]) -> None:
    """Lay out the two datasets under their hub names."""
    folder = directory / "openai/summarize_from_feedback"
    folder.mkdir(parents=True)
    for split, rows in (("train", train), ("validation", validation)):
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: comparisons\n  data_files:\n"
        "  - split: train\n    path: train.parquet\n"
        "  - split: validation\n    path: validation.parquet\n---\n"
    )
    folder = directory / "CarperAI/openai_summarize_tldr"
    folder.mkdir(parents=True)
    Dataset.from_list(test).to_parquet(folder / "test.parquet")


def hub_rows(count: int, seed: int) -> list[dict]:
    return [comparison(*post, choice=at % 2) for at, post in enumerate(make_posts(count, seed))]


def hub_test_rows(count: int, seed: int) -> list[dict]:
    return [
        {"prompt": f"SUBREDDIT: r/x\nTITLE: t\nPOST: {post}\nTL;DR:", "label": good}
        for post, good, _ in make_posts(count, seed)
    ]


def write_prompts(path: Path, prompts: list[str], references: list[str] | None = None) -> None:
    """A file of own prompts for decoding."""
    rows = [{"prompt": prompt, "reference": None} for prompt in prompts]
    for row, reference in zip(rows, references or (), strict=False):
        row["reference"] = reference
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def assert_one_error(status: int, output: str, *said: str) -> None:
    """A script has ended with code 2 and one line that says what is wrong."""
    errors = [line for line in output.replace("\r", "\n").split("\n") if "error:" in line]
    assert status == 2, output
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in output, output
    for text in said:
        assert text in errors[0]


@pytest.fixture
def call_main(monkeypatch, capsys) -> Callable[..., Outcome]:
    """`call_main(module, *arguments)` runs a script's main in this process, with that command line."""

    def call(module: ModuleType, *arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as stopped:
            status = stopped.code
        return status, "".join(capsys.readouterr())

    return call


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def process(here, call_main) -> Callable[..., DatasetDict]:
    """`process(source, ...)`: the splits that stage 1 makes of any preference dataset."""

    shares = ("--validation_share", 0.2, "--test_share", 0.2)

    def run(source: str, *flags: object) -> DatasetDict:
        status, output = call_main(preference_data_process, "--source", source, *shares, *flags)
        assert status == 0, output
        assert [path for path in here.iterdir() if path.name.startswith(".")] == []
        return load_from_disk("summarize_from_feedback")

    return run


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [text for post in make_posts(300, 0) for text in post] + ["POST: \nTL;DR:"] * 20


@pytest.fixture(scope="session")
def tokenizers(corpus, tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    """Two byte-level BPEs, one with a chat template; a WordPiece and a unigram, which have pair encodings."""
    quiet = {"show_progress": False}

    def train_bpe(special: list[str]) -> Tokenizer:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=alphabet, **quiet
        )
        bpe.train_from_iterator(corpus, trainer)
        return bpe

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, **quiet)
    wordpiece.train_from_iterator(corpus, trainer)
    path = tmp_path_factory.mktemp("wordpiece")
    wordpiece.model.save(str(path))

    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="[UNK]", **quiet)
    unigram.train_from_iterator(corpus, trainer)
    unigram.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, unigram.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )

    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return {
        "bpe": PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(["<|endoftext|>", "<sep>"]),
            eos_token="<|endoftext|>",
            sep_token="<sep>",
            model_max_length=256,
        ),
        "chat": PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            unk_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
            model_max_length=256,
        ),
        "wordpiece": BertTokenizerFast(vocab=str(path / "vocab.txt"), model_max_length=256),
        "unigram": PreTrainedTokenizerFast(tokenizer_object=unigram, **roles, model_max_length=256),
    }


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, path: Path) -> str:
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def small_models(tokenizers, tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models with random weights, loud enough that candidates' scores differ."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bpe, wordpiece, unigram = (tokenizers[name] for name in ("bpe", "wordpiece", "unigram"))
    eos, loud = bpe.eos_token_id, {"initializer_range": 0.3}
    causal = {**loud, "vocab_size": len(bpe), "bos_token_id": eos, "eos_token_id": eos}
    gpt2 = {**causal, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
    }
    llama = {**causal, **shape, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": eos}
    words = tokenizers["chat"]
    chat = {**llama, "bos_token_id": words.bos_token_id, "pad_token_id": words.eos_token_id}
    chat |= {"vocab_size": len(words), "eos_token_id": [words.eos_token_id, words.unk_token_id]}
    encoder = {**loud, **shape, "num_attention_heads": 2, "num_labels": 1}
    deberta = {
        **encoder,
        "relative_attention": True,
        "position_buckets": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pad_token_id": unigram.pad_token_id,
    }
    made = {
        "gpt2": (GPT2LMHeadModel, GPT2Config(**gpt2), bpe),
        "llama": (LlamaForCausalLM, LlamaConfig(**llama), bpe),
        "bert": (BertForSequenceClassification, BertConfig(vocab_size=len(wordpiece), **encoder), wordpiece),
        "deberta": (
            DebertaV2ForSequenceClassification,
            DebertaV2Config(vocab_size=len(unigram), **deberta),
            unigram,
        ),
        "gpt2-reward": (
            GPT2ForSequenceClassification,
            GPT2Config(**gpt2, num_labels=1, pad_token_id=eos),
            bpe,
        ),
        "llama-reward": (LlamaForSequenceClassification, LlamaConfig(**llama, num_labels=1), bpe),
        "chat": (LlamaForCausalLM, LlamaConfig(**chat), tokenizers["chat"]),
        "chat-reward": (
            LlamaForSequenceClassification,
            LlamaConfig(**chat, num_labels=1),
            tokenizers["chat"],
        ),
    }
    return {name: save(kind(config), words, root / name) for name, (kind, config, words) in made.items()}


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return [f"POST: {post}\nTL;DR:" for post, _, _ in make_posts(7, 5)]


def copy_run_sh(directory: Path, python: str) -> None:
    """run.sh, and in its environment a shell script that stands in for python."""
    for name in ("run.sh", "environment.sh", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, directory)
    stand_in = directory / ".venv/bin/python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
