"""The models of the study on real text: reward models on top of frozen layers, a policy, an evaluator.

A decoder-only reward model trains the top layers of its start alone. What the layers below say about the
data is the same for every model and every update, so it is computed once (`freeze`).
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import train_models
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from reward_models import train_full
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from pargs.encoding import encode_prompts, encode_responses
from pargs.files import read_template
from pargs.models import RewardModel
from pargs.prefixes import SIDES
from pargs.runs import GuideEos
from pargs.scoring import base_model, score_head

NUM_FROZEN = 20  # of SmolLM2-135M's 30 layers
PAIRS_PER_UPDATE = 8
ON_CPU = {"use_cpu": True, "bf16": True, "save_strategy": "no", "report_to": "none"}


# Reward models


@dataclass
class Question:
    """A prompt, the response that is better, and those that it is better than: the pairs of one sequence."""

    prompt_ids: list[int]
    responses: list[list[int]]  # the chosen one first

    def lay_out(self) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """The prompt once and all responses behind it, of which none sees another.

        Returns the ids, which tokens each may see [tokens, tokens], and where it stands in its own text
        [tokens].
        """
        ids, places = list(self.prompt_ids), list(range(len(self.prompt_ids)))
        sees = torch.ones(*[len(ids) + sum(map(len, self.responses))] * 2, dtype=torch.bool).tril()
        for response in self.responses:
            sees[len(ids) :, len(self.prompt_ids) : len(ids)] = False
            ids += response
            places += range(len(self.prompt_ids), len(self.prompt_ids) + len(response))
        return ids, sees, torch.tensor(places)

    def starts(self) -> list[int]:
        """The token before each response's first, as if all stood alone behind the prompt."""
        before = len(self.prompt_ids) - 1
        return [before + sum(map(len, self.responses[:at])) for at in range(len(self.responses))]

    def read_out(self, whole: bool) -> torch.Tensor:
        """Where the rewards of all pairs of prefixes stand, [2, entries]; of `whole` responses alone, if so.

        Past its end a response stays whole.
        """
        entries, (start, *others) = [], self.starts()
        for at, other in enumerate(others, start=1):
            sizes = len(self.responses[0]), len(self.responses[at])
            lengths = torch.tensor([max(sizes)]) if whole else torch.arange(1, max(sizes) + 1)
            both = (start + lengths.clamp(max=sizes[0]), other + lengths.clamp(max=sizes[1]))
            entries.append(torch.stack(both))
        return torch.cat(entries, dim=1)


def read_questions(dataset: Path, split: str) -> list[Question]:
    """The pairs of a prefix dataset that fit with all of their prefixes, those of one prompt together."""
    pairs: Any = load_from_disk(str(dataset / "pairs"))[split]
    questions: dict[tuple, Question] = {}
    for pair in pairs:
        chosen, rejected = (pair[f"{side}_ids"] for side in SIDES)
        if len(pair["lengths"]) == max(len(chosen), len(rejected)):
            key = (tuple(pair["prompt_ids"]), tuple(chosen))
            questions.setdefault(key, Question(pair["prompt_ids"], [chosen])).responses.append(rejected)
    return list(questions.values())


@torch.inference_mode()
def freeze(dataset: Path, start: Path, output: Path) -> None:
    """What the lowest layers say at each token of the training questions, [tokens, hidden] each, in bf16."""
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16).model
    model.layers, model.norm = model.layers[:NUM_FROZEN], torch.nn.Identity()
    hidden = {}
    for at, question in enumerate(read_questions(dataset, "train")):
        ids, sees, places = question.lay_out()
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": sees[None, None]}
        hidden[str(at)] = model(**inputs, position_ids=places[None], use_cache=False).last_hidden_state[0]
    save_file(hidden, output.with_suffix(".tmp"))
    os.rename(output.with_suffix(".tmp"), output)


@dataclass
class TopCollator:
    """Batches of questions: what the frozen layers say, and where rewards are read.

    `read_out` is [2, batch, entries], chosen and rejected, -1 where there is no entry.
    """

    hidden: dict[str, torch.Tensor]
    whole: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(self.hidden[example["at"]]) for example in examples)
        masks, positions, read_out = [], [], []
        for example in examples:
            ids, sees, places = example["question"].lay_out()
            # Padding sees itself, or its softmax would be over nothing.
            mask = torch.eye(longest, dtype=torch.bool)
            mask[: len(ids), : len(ids)] = sees
            masks.append(mask)
            positions.append(places)
            read_out.append(example["question"].read_out(self.whole).T)
        entries = pad_sequence(read_out, batch_first=True, padding_value=-1)  # [batch, entries, 2]
        embeds = [self.hidden[example["at"]].float() for example in examples]
        return {
            "inputs_embeds": pad_sequence(embeds, batch_first=True),
            "attention_mask": torch.stack(masks)[:, None],
            "position_ids": pad_sequence(positions, batch_first=True),
            "read_out": entries.permute(2, 0, 1),
        }


class TopTrainer(Trainer):
    """Bradley-Terry on the prefixes of whole comparisons, averaged over those of a batch, as in stage 2."""

    model: Any

    def compute_loss(self, model: Any, inputs, return_outputs=False, num_items_in_batch=None):
        read_out = inputs.pop("read_out")  # [2, batch, entries]
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        at_tokens = model.score(hidden).float().squeeze(-1)  # [batch, tokens]
        chosen, rejected = (at_tokens.gather(1, at.clamp(min=0)) for at in read_out)  # [batch, entries]
        losses = -torch.nn.functional.logsigmoid(chosen - rejected)[read_out[0] >= 0]
        return (losses.mean(), at_tokens) if return_outputs else losses.mean()


def train_top(
    dataset: Path, frozen: Path, start: Path, kind: str, epochs: int, rate: float, seed: int, output: Path
) -> None:
    """A `full` or a `partial` reward model of the same pairs, with the same updates."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    reward_model: Any = AutoModelForSequenceClassification.from_pretrained(
        start, num_labels=1, dtype=torch.float32
    )
    lowest = reward_model.model.layers[:NUM_FROZEN]
    reward_model.model.layers = reward_model.model.layers[NUM_FROZEN:]
    reward_model.model.embed_tokens.requires_grad_(False)

    questions = read_questions(dataset, "train")
    examples: Any = [{"at": str(at), "question": question} for at, question in enumerate(questions)]
    most = max(len(question.responses) - 1 for question in questions)
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            work,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=max(1, round(PAIRS_PER_UPDATE / most)),
            warmup_steps=10,
            lr_scheduler_type="cosine",
            logging_steps=10,
            remove_unused_columns=False,
            seed=seed,
            **ON_CPU,
        )
        collator: Any = TopCollator(load_file(frozen), whole=kind == "full")
        TopTrainer(reward_model, arguments, collator, train_dataset=examples).train()

    reward_model.model.layers = torch.nn.ModuleList([*lowest, *reward_model.model.layers])
    train_models.save(reward_model, tokenizer, output)


def train_evaluator(dataset: Path, start: Path, output: Path, epochs: int, rate: float) -> None:
    """Of another family, on whole responses of pairs that no guide has seen."""
    rates = {"num_train_epochs": epochs, "learning_rate": rate, "per_device_train_batch_size": 16}
    train_full(dataset, start, output, 0, rates)


# Reading


@torch.inference_mode()
def prefix_rewards(
    reward_model: RewardModel, question: Question, lengths: list[list[int]]
) -> dict[GuideEos, Any]:
    """Rewards of prefixes of each response, of `lengths` tokens: as they are, and with an EOS behind each.

    One pass reads all of it: behind the question an EOS for each prefix, which sees that prefix alone.
    """
    ids, sees, places = question.lay_out()
    eos = question.responses[0][-1]
    open_at, closed_at, behind = [], [], []  # behind: the token that each further EOS follows
    for response, start, own_lengths in zip(question.responses, question.starts(), lengths, strict=True):
        whole = len(response)
        open_at.append([start + min(length, whole) for length in own_lengths])
        closed_at.append([])
        for length in own_lengths:
            ended = length >= whole - 1  # closed by the EOS that it has
            closed_at[-1].append(start + whole if ended else len(ids) + len(behind))
            behind += [] if ended else [start + length]

    total, further = len(ids) + len(behind), len(behind)
    with_further = torch.eye(total, dtype=torch.bool)
    with_further[: len(ids), : len(ids)] = sees
    with_further[len(ids) :, : len(ids)] = sees[behind]
    hidden = base_model(reward_model)(
        input_ids=torch.tensor([ids + [eos] * further]),
        attention_mask=with_further[None, None],
        position_ids=torch.cat([places, places[behind] + 1])[None],
        use_cache=False,
    ).last_hidden_state
    rewards = score_head(reward_model)(hidden).float().view(-1).tolist()
    readings: dict[GuideEos, list[list[int]]] = {"finished": open_at, "always": closed_at}
    return {reading: [[rewards[at] for at in row] for row in found] for reading, found in readings.items()}


# Policy


def tune_policy(dataset: Path, start: Path, output: Path, epochs: int, rate: float) -> None:
    """An adapter of the top layers on the references, merged."""
    set_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    policy = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    rows: Any = load_from_disk(str(dataset))["train"]
    references = dict(zip(rows["prompt"], rows["chosen"], strict=True))  # a post has several pairs
    prompts = encode_prompts(tokenizer, list(references), read_template(str(dataset)))
    responses = encode_responses(tokenizer, list(references), list(references.values()))
    examples = Dataset.from_list(
        [
            {
                "input_ids": prompt + [*response, tokenizer.eos_token_id],
                "completion_mask": [0] * len(prompt) + [1] * (len(response) + 1),
            }
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    with tempfile.TemporaryDirectory() as work:
        arguments = SFTConfig(
            work,
            num_train_epochs=epochs,
            learning_rate=rate,
            per_device_train_batch_size=PAIRS_PER_UPDATE // 2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            warmup_steps=5,
            lr_scheduler_type="cosine",
            logging_steps=10,
            max_length=None,
            completion_only_loss=True,
            **ON_CPU,
        )
        top = list(range(NUM_FROZEN, policy.config.num_hidden_layers))
        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapter = LoraConfig(r=32, lora_alpha=32, target_modules=linear, layers_to_transform=top)
        trainer: Any = SFTTrainer(
            policy, arguments, train_dataset=examples, processing_class=tokenizer, peft_config=adapter
        )
        trainer.train()
    train_models.save(trainer.model.merge_and_unload(), tokenizer, output)
    (output / "training.json").write_text(json.dumps(trainer.state.log_history))
