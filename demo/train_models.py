"""Train the demo's stand-ins for the hub's models, on a CPU, in fp32.

  summariser           a GPT-2 of 2 layers, supervised on posts and summaries good and bad
  full-reward-model    a DeBERTa-v3 of 2 layers, Bradley-Terry on whole summaries (TRL's RewardTrainer)
  causal-reward-model  the summariser with a reward head, the same, read out at the EOS, on pairs of its own
  rl-summariser        the summariser after RLOO (TRL's RLOOTrainer) on the full reward model
All are trained on stories of the training split, more of them than run.sh's data set holds; scores are on
validation stories. No test post is read.

    python demo/train_models.py [--output_dir demo/models]
"""

import copy
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from make_posts import draw_comparison
from quality import true_quality
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from pargs.cli import parse_settings, run_script
from pargs.encoding import encode_texts
from pargs.models import RewardModel, load_reward_model
from pargs.prefixes import SIDES, encode_with_prefixes
from pargs.scoring import Continuation, encode_continuations, score_pairs

MODELS = {
    "summariser": AutoModelForCausalLM,
    "full-reward-model": AutoModelForSequenceClassification,
    "causal-reward-model": AutoModelForSequenceClassification,
    "rl-summariser": AutoModelForCausalLM,
}
PROMPT = "POST: {post}\nTL;DR:"
RATES = {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "warmup_steps": 100}
ON_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}


Loaded = tuple[Any, PreTrainedTokenizerBase]  # a model and its tokenizer


@dataclass
class Settings:
    output_dir: Path = field(
        default=Path(__file__).parent / "models", metadata={"help": "Where the models go."}
    )
    train: list[str] = field(
        default_factory=lambda: list(MODELS), metadata={"help": "Which models to train."}
    )
    summariser_pairs: int = field(
        default=16000, metadata={"help": "Pairs that the summariser is trained on."}
    )
    reward_pairs: int = field(default=16000, metadata={"help": "Pairs that each reward model is trained on."})
    validation_pairs: int = field(default=400, metadata={"help": "Pairs to measure on."})
    vocabulary: int = field(default=1536, metadata={"help": "Tokens of either tokenizer."})
    layers: int = field(default=2, metadata={"help": "Layers of every model."})
    width: int = field(default=128, metadata={"help": "Hidden size of every model."})
    heads: int = field(default=4, metadata={"help": "Attention heads of every model."})
    repeat_posts: int = field(
        default=6000, metadata={"help": "Posts that it is trained to repeat before that."}
    )
    encoder_pairs: int = field(default=16000, metadata={"help": "Pairs that its encoder is pretrained on."})
    reward_epochs: float = field(default=1.0, metadata={"help": "Epochs of its Bradley-Terry training."})
    causal_epochs: float = field(default=2.0, metadata={"help": "Epochs of the causal one's."})
    rl_steps: int = field(default=12, metadata={"help": "Optimiser steps of RLOO."})
    rl_posts: int = field(default=500, metadata={"help": "Posts that RLOO draws its prompts from."})
    rl_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of RLOO."})
    rl_beta: float = field(
        default=0.02, metadata={"help": "Weight of the KL divergence from the summariser."}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads."})
    seed: int = field(default=1, metadata={"help": "Seed of the stories and of all training."})


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def draw_rows(split: str, count: int, seed: int) -> list[dict]:
    """Comparisons as {prompt, chosen, rejected, facts}. Here no label is turned around."""
    rng = random.Random(f"models {split} {seed}")
    rows = []
    for index in tqdm(range(count), desc=f"{split} stories", disable=None):
        row, facts = draw_comparison(rng, split, index, label_noise=0.0)
        texts = [summary["text"] for summary in row["summaries"]]
        post = row["info"]["post"]
        prompt = PROMPT.format(post=post)
        chosen, rejected = texts[row["choice"]], texts[1 - row["choice"]]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "post": post, "facts": facts})

    return rows


def all_text(rows: list[dict]) -> list[str]:
    return [row["prompt"] + row[side] for row in rows for side in SIDES]


def train_bpe_tokenizer(texts: list[str], vocabulary: int) -> GPT2Tokenizer:
    """A byte-level BPE tokenizer with GPT-2's one special token and, like GPT-2's, no padding token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=256)


def train_unigram_tokenizer(texts: list[str], vocabulary: int) -> DebertaV2Tokenizer:
    """A unigram tokenizer with DeBERTa-v3's special tokens: [CLS] A [SEP] B [SEP].

    Its pieces are the most frequent words and marks, with their log frequencies, above all single characters.
    """
    pieces = Counter(piece for text in texts for piece in re.findall(r"▁?(?:\w+|[^\w▁])", as_pieces(text)))
    total = sum(pieces.values())
    special = [(token, 0.0) for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")]
    letters = dict.fromkeys(["▁", *map(chr, range(33, 127))], math.log(1 / total) - 10)
    frequent = pieces.most_common(vocabulary - len(special) - len(letters))
    scores = letters | {piece: math.log(count / total) for piece, count in frequent}
    return DebertaV2Tokenizer(vocab=[*special, *scores.items()], unk_id=3, model_max_length=512)


def as_pieces(text: str) -> str:
    """Spaces as DeBERTa's normaliser writes them: one mark for each run, and one before the text."""
    return "▁" + re.sub(r"\s+", "▁", text.strip())


def train_summariser(settings: Settings, rows: list[dict], work: Path) -> Loaded:
    tokenizer = train_bpe_tokenizer(all_text(rows), settings.vocabulary)
    eos: Any = tokenizer.eos_token_id
    policy = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=settings.layers,
            n_embd=settings.width,
            n_head=settings.heads,
            n_positions=256,
            initializer_range=settings.width**-0.5,  # 0.02 suits wide models
            bos_token_id=eos,
            eos_token_id=eos,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            dtype="float32",
        )
    )

    # Repeating posts first: from summaries alone a small model takes long to learn to copy. Then both
    # summaries of every post, good and bad: what the policy imitates is their mixture.
    repeats = [{"prompt": row["prompt"], "completion": f" {row['post']}"} for row in rows]
    summaries = [{"prompt": row["prompt"], "completion": row[side]} for row in rows for side in SIDES]
    for name, pairs in (("repeats", repeats[: settings.repeat_posts]), ("summaries", summaries)):
        config = SFTConfig(
            output_dir=str(work / name),
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            completion_only_loss=True,
            max_length=256,
            logging_steps=50,
            seed=settings.seed,
            **ON_CPU,
        )
        # TRL gives the tokenizer it trains with a padding token: it works on a copy.
        data = Dataset.from_list(pairs)
        SFTTrainer(policy, config, train_dataset=data, processing_class=copy.deepcopy(tokenizer)).train()

    return policy, tokenizer


def train_encoder(
    settings: Settings, config: DebertaV2Config, tokenizer: DebertaV2Tokenizer, rows: list[dict], work: Path
) -> PreTrainedModel:
    """Pretrain DeBERTa to tell which pieces of a summary are in its post.

    Like DeBERTa-v3's own pretraining it has an answer for every token. What it teaches, to compare the two
    texts, takes many times as many pairs to learn from one preference each.
    """
    examples = []
    for row in rows[: settings.encoder_pairs]:
        pair = tokenizer(row["prompt"], row["rejected"])
        ids, start = pair["input_ids"], pair["token_type_ids"].index(1)
        post = set(ids[:start])
        labels = [-100] * start + [int(piece in post) for piece in ids[start:]]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    two_labels = copy.deepcopy(config)
    two_labels.num_labels = 2
    model = DebertaV2ForTokenClassification(two_labels)
    arguments = TrainingArguments(
        output_dir=str(work / "encoder"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        logging_steps=50,
        seed=settings.seed,
        **ON_CPU,
    )
    collator = DataCollatorForTokenClassification(tokenizer)
    Trainer(model, arguments, data_collator=collator, train_dataset=Dataset.from_list(examples)).train()
    return model.deberta


def train_reward_model(settings: Settings, rows: list[dict], validation: list[dict], work: Path) -> Loaded:
    tokenizer = train_unigram_tokenizer(all_text(rows), settings.vocabulary)
    of_v3: dict[str, Any] = {
        "position_buckets": 64,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=settings.layers,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        num_attention_heads=settings.heads,
        max_position_embeddings=512,
        relative_attention=True,
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        initializer_range=settings.width**-0.5,  # 0.02 suits wide models
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        dtype="float32",
        **of_v3,
    )
    reward_model: Any = DebertaV2ForSequenceClassification(config)
    reward_model.deberta = train_encoder(settings, config, tokenizer, rows, work)

    # TRL would append EOS to text and encode no pairs: it is handed the ids that the pair encoding gives.
    def encode(some: list[dict]) -> Dataset:
        prompts = [row["prompt"] for row in some]
        sides = {side: tokenizer(prompts, [row[side] for row in some])["input_ids"] for side in SIDES}
        return Dataset.from_dict({f"{side}_ids": ids for side, ids in sides.items()})

    rates = RATES | {"num_train_epochs": settings.reward_epochs, "learning_rate": 1e-3}
    fit_whole_responses(reward_model, tokenizer, encode(rows), encode(validation), work, settings.seed, rates)
    return reward_model, tokenizer


def fit_whole_responses(
    reward_model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    validation: Dataset | None,
    work: Path,
    seed: int,
    rates: dict[str, Any],
) -> None:
    """Bradley-Terry on inputs that are encoded already, `chosen_ids` and `rejected_ids`, in place.

    `rates` are epochs, learning rate, batch size and schedule, as RewardConfig names them.
    """
    config = RewardConfig(
        output_dir=str(work / "reward"),
        max_length=512,
        logging_steps=50,
        eval_strategy="epoch" if validation else "no",
        seed=seed,
        **ON_CPU,
        **rates,
    )
    trainer = RewardTrainer(
        reward_model, config, train_dataset=pairs, eval_dataset=validation, processing_class=tokenizer
    )
    trainer.train()


def train_causal_reward_model(
    policy: Path, rows: list[dict], validation: list[dict], work: Path, seed: int, rates: dict[str, Any]
) -> Loaded:
    """A reward head on the policy, read at the EOS that ends a whole response."""
    tokenizer = AutoTokenizer.from_pretrained(policy)

    def encode(some: list[dict]) -> Dataset:
        prompts = [row["prompt"] for row in some]
        prompt_ids, ids = encode_texts(tokenizer, prompts), {}
        for side in SIDES:
            responses = encode_with_prefixes(tokenizer, prompts, [row[side] for row in some], causal=True)
            pairs = zip(prompt_ids, responses, strict=True)
            ids[f"{side}_ids"] = [prompt + response.ids for prompt, response in pairs]
        return Dataset.from_dict(ids)

    reward_model, padding = start_reward_model(policy, eos=True)
    fit_whole_responses(reward_model, padding, encode(rows), encode(validation), work, seed, rates)
    return reward_model, tokenizer


def start_reward_model(start: Path, eos: bool) -> Loaded:
    """A model with a reward head, and the tokenizer that pads for it while it trains.

    A decoder-only classifier is read at the last token that is no padding: where that is an EOS, padding has
    to be another token.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    reward_model: Any = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype=torch.float32
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1) if eos else tokenizer.eos_token
        reward_model.config.pad_token_id = tokenizer.pad_token_id
    return reward_model, tokenizer


def load_reward(out: Path, name: str) -> RewardModel:
    hint = f"make it with: python demo/train_models.py --train {name}"
    return load_reward_model(str(out / name), torch.float32, "cpu", token_budget=4096, hint=hint)


def score(reward_model: RewardModel, prompts: list[str], responses: list[str]) -> list[float]:
    """Rewards of finished responses."""
    prompt_ids = encode_texts(reward_model.tokenizer, prompts)
    finished = [Continuation(response, finished=True) for response in responses]
    response_ids = encode_continuations(reward_model, prompts, finished)
    return score_pairs(reward_model, prompt_ids, response_ids, reserved=0).tolist()


def train_rl_summariser(
    settings: Settings, summariser: Loaded, reward_model: RewardModel, rows: list[dict], work: Path
) -> Loaded:
    policy, tokenizer = summariser

    def reward_of(prompts: list, completions: list, **_: Any) -> Any:
        return score(reward_model, prompts, completions)

    config = RLOOConfig(
        output_dir=str(work / "rl"),
        max_steps=settings.rl_steps,
        per_device_train_batch_size=64,
        num_generations=4,
        max_completion_length=64,
        learning_rate=settings.rl_learning_rate,
        lr_scheduler_type="constant",
        beta=settings.rl_beta,
        temperature=1.0,
        logging_steps=10,
        seed=settings.seed,
        **ON_CPU,
    )
    # RLOO pads, so its tokenizer needs a padding token; the shipped one has none.
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    RLOOTrainer(policy, reward_of, config, train_dataset=prompts, processing_class=padding).train()
    return policy, tokenizer


@torch.no_grad()
def write(summariser: Loaded, prompts: list[str], **how: Any) -> list[str]:
    """A response to each prompt, at most 64 tokens."""
    policy, tokenizer = summariser
    responses = []
    for prompt in tqdm(prompts, desc="responses", disable=None):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = policy.generate(**inputs, **how, max_new_tokens=64, pad_token_id=tokenizer.eos_token_id)
        responses.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return responses


def report_policy(name: str, responses: list[str], rewards: list[float], rows: list[dict]) -> None:
    """Print what the policy's responses score, and some of them."""
    qualities = pd.DataFrame(
        true_quality(text, row["facts"]) for text, row in zip(responses, rows, strict=True)
    )
    print(f"\n{name}, on each of {len(rows)} validation posts: reward {np.mean(rewards):.2f}")
    print(qualities.agg(["mean", "std"]).round(3).to_string())
    for row, text, total in list(zip(rows, responses, qualities["total"], strict=True))[:8]:
        print(f"  {total:.2f} {text.strip()}   [{row['chosen'].strip()}]")


def report_reward_model(name: str, margins: np.ndarray, gaps: np.ndarray) -> None:
    """Print held-out accuracy, overall and by how far apart the true qualities of a pair are."""
    print(f"\n{name}: accuracy {np.mean(margins > 0):.3f} on {len(margins)} validation pairs")
    for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1)):
        within = (gaps > low) & (gaps <= high)
        print(f"  true qualities {low} to {high} apart: {np.mean(margins[within] > 0):.3f} of {within.sum()}")


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save model and tokenizer under a temporary name, then put them in place of what is there."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if tokenizer.pad_token is None:  # TRL has given the model one
        model.config.pad_token_id = None
        if model.can_generate():
            model.generation_config.pad_token_id = None

    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load(out: Path, name: str) -> Loaded:
    if not (out / name).is_dir():
        fail(f"{out / name} is missing; make it with: python demo/train_models.py --train {name}")

    model = MODELS[name].from_pretrained(out / name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(out / name)


def report(validation: list[dict], out: Path) -> None:
    """Measure the models that are there on validation stories."""
    prompts = [row["prompt"] for row in validation]
    quality = {side: [true_quality(row[side], row["facts"])["total"] for row in validation] for side in SIDES}
    gaps = np.subtract(quality["chosen"], quality["rejected"])
    there = [name for name in MODELS if (out / name).is_dir()]
    for name in there:
        if MODELS[name] is AutoModelForSequenceClassification:
            reward_model = load_reward(out, name)
            sides = [score(reward_model, prompts, [row[side] for row in validation]) for side in SIDES]
            report_reward_model(name, np.subtract(sides[0], sides[1]), gaps)

    if "full-reward-model" not in there:
        return
    reward_model = load_reward(out, "full-reward-model")
    ways = {"greedy": {"do_sample": False}, "one top-k sample": {"do_sample": True, "top_k": 10}}
    for name in there:
        for way, how in ways.items() if MODELS[name] is AutoModelForCausalLM else ():
            set_seed(0)
            responses = write(load(out, name), prompts, **how)
            rewards = score(reward_model, prompts, responses)
            report_policy(f"{name}, {way}", responses, rewards, validation)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    unknown = set(settings.train) - set(MODELS)
    if unknown:
        fail(f"--train knows {', '.join(MODELS)}, not {', '.join(sorted(unknown))}")

    out = Path(settings.output_dir)
    torch.set_num_threads(settings.threads)
    rows = draw_rows("train", max(settings.summariser_pairs, settings.reward_pairs), settings.seed)
    validation = draw_rows("validation", settings.validation_pairs, settings.seed)
    # What one reward model mistakes the other should not: it has seen other pairs.
    own_rows = []
    if "causal-reward-model" in settings.train:
        own_rows = draw_rows("train", settings.reward_pairs, settings.seed + 1)

    # Each model starts from the seed, so that training one alone gives what training all gives.
    with tempfile.TemporaryDirectory() as work:
        if "summariser" in settings.train:
            set_seed(settings.seed)
            save(
                *train_summariser(settings, rows[: settings.summariser_pairs], Path(work)), out / "summariser"
            )

        if "full-reward-model" in settings.train:
            set_seed(settings.seed)
            trained = train_reward_model(settings, rows[: settings.reward_pairs], validation, Path(work))
            save(*trained, out / "full-reward-model")

        if "causal-reward-model" in settings.train:
            set_seed(settings.seed)
            rates = RATES | {"num_train_epochs": settings.causal_epochs, "learning_rate": 3e-4}
            trained = train_causal_reward_model(
                out / "summariser", own_rows, validation, Path(work), settings.seed, rates
            )
            save(*trained, out / "causal-reward-model")

        if "rl-summariser" in settings.train:
            set_seed(settings.seed)
            trained = train_rl_summariser(
                settings,
                load(out, "summariser"),
                load_reward(out, "full-reward-model"),
                rows[: settings.rl_posts],
                Path(work),
            )
            save(*trained, out / "rl-summariser")

    report(validation, out)


if __name__ == "__main__":
    run_script(main, "the same command starts again")
