"""Train the partial reward model: Bradley-Terry on every prefix pair.

Reads   summarize_from_feedback_partial/ and the reward model to start from.
Writes  partial_reward_modeling_tldr/: model and tokenizer, and checkpoints while it trains.

An encoder reads one entry (a pair of prefixes) at a time. A causal model scores every prefix of a response
in one pass, so it is trained on whole comparisons: the same loss, averaged over the same entries.

    python partial_reward_training/tldr_partial_reward_model.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from prefix_entries import EntryCollator, PairCollator, expand_entries, sample_by_quarter
from training_setup import (
    WholeCheckpoints,
    check_weights,
    check_writable,
    checkpoint_to_resume,
    fail,
    log_offline_without_login,
    model_kwargs,
    move_into_place,
    one_message,
    parse_settings,
    read_dataset,
    read_tokenizer,
    save_beside,
    settle_precision,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config


@dataclass
class Settings(RewardConfig, ModelConfig):
    """The settings below, and every other flag of TRL's RewardConfig and ModelConfig."""

    model_name_or_path: str = field(
        default="OpenAssistant/reward-model-deberta-v3-large",
        metadata={"help": "The full-sequence reward model to start from (or any sequence classifier)."},
    )
    dataset: str = field(default="summarize_from_feedback_partial", metadata={"help": "Prefix dataset."})
    output_dir: str = field(default="partial_reward_modeling_tldr", metadata={"help": "Folder to write."})

    per_device_train_batch_size: int = field(default=16, metadata={"help": "Prefix pairs a step and device."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Steps before an update."})
    num_train_epochs: float = field(default=1, metadata={"help": "Passes over the entries."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Trade speed for memory."})
    max_length: int | None = field(default=512, metadata={"help": "Longest input, as in the dataset."})

    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(default=200, metadata={"help": "Updates between evaluations."})
    eval_on_start: bool = field(default=True, metadata={"help": "Evaluate the model as it came, too."})
    eval_comparisons: int = field(default=128, metadata={"help": "Validation comparisons to evaluate on."})
    eval_entries: int = field(
        default=1024,
        metadata={"help": "Their entries, as many from each quarter; a causal model is evaluated on all."},
    )
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Prefix pairs an evaluation step."})

    logging_steps: float = field(default=10, metadata={"help": "Updates between log lines."})
    report_to: str = field(default="wandb", metadata={"help": "Tracker, or none."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    lora_task_type: str = field(default="SEQ_CLS", metadata={"help": "A reward model is a classifier."})
    # Segment ids travel in columns that TRL does not know.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off here."})

    def __post_init__(self):
        settle_precision(self)
        ModelConfig.__post_init__(self)
        RewardConfig.__post_init__(self)


class PrefixRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's reward trainer on entries that are model inputs already, with accuracy by quarter."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # TRL would tokenise the text and append an EOS to every unfinished prefix

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        quarters = inputs.pop("quarters")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)

        if not self.model.training:
            chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
            self._count_by_quarter((chosen > rejected).float(), quarters)
        return (loss, outputs) if return_outputs else loss

    def _count_by_quarter(self, correct: torch.Tensor, quarters: torch.Tensor) -> None:
        """Log the ranking of each entry: `correct` and `quarters` are [entries]."""
        counts = torch.zeros(4, 2, device=correct.device)
        counts[:, 0].index_add_(0, quarters, correct)
        counts[:, 1].index_add_(0, quarters, torch.ones_like(correct))
        counts = self.accelerator.reduce(counts).long().tolist()

        # The trainer averages a list, so one number an entry gives the accuracy over entries.
        self._metrics["eval"]["accuracy"].pop()
        for quarter, (right, total) in enumerate(counts, start=1):
            ranked = [1.0] * right + [0.0] * (total - right)
            self._metrics["eval"]["accuracy"] += ranked
            if ranked:
                self._metrics["eval"][f"accuracy_quarter_{quarter}"] += ranked


class AllPrefixRewardTrainer(PrefixRewardTrainer):
    """The same loss for a causal model: one pass over comparisons, averaged over their entries."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        read_out = inputs.pop("read_out")  # [2 * batch, longest], -1 where there is no entry
        quarters = inputs.pop("quarters")  # [entries]
        with token_rewards(self.accelerator.unwrap_model(model)) as at_tokens:
            model(**inputs, use_cache=False)
        by_length = at_tokens[0].squeeze(-1).gather(1, read_out.clamp(min=0))  # [2 * batch, longest]
        rewards = by_length[read_out >= 0]  # [2 * entries]
        chosen, rejected = rewards.chunk(2)
        losses = -torch.nn.functional.logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (chosen + rejected) ** 2

        # Processes have different numbers of entries, and what they return is averaged over processes.
        correct, margins = (chosen > rejected).float(), (chosen - rejected).detach()
        sums = torch.stack([torch.ones_like(margins).sum(), correct.sum(), margins.sum()])
        entries, right, margin = self.accelerator.reduce(sums)
        loss = losses.sum() * self.accelerator.num_processes / entries

        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["accuracy"].append((right / entries).item())
        metrics["margin"].append((margin / entries).item())
        if not self.model.training:
            self._count_by_quarter(correct, quarters)
        return (loss, SequenceClassifierOutput(logits=rewards.unsqueeze(-1))) if return_outputs else loss


@contextmanager
def token_rewards(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what the score head says at every position, [batch, length, 1], of the passes inside."""
    rewards: list[torch.Tensor] = []
    hook = find_score_head(model).register_forward_hook(lambda *call: rewards.append(call[2]))
    try:
        yield rewards
    finally:
        hook.remove()


def find_score_head(model: torch.nn.Module) -> torch.nn.Module:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = getattr(base, "score", None)
    if head is None:
        fail(f"{type(base).__name__} has no `score` head over all tokens, so it cannot train in one pass")
    return head


def check_reward_model(name: str, revision: str) -> None:
    """Exit where `name` is no model, or a classifier that gives more than one number."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        fail(f"cannot load {name!r}: {error}; name a model with --model_name_or_path")

    is_classifier = any("SequenceClassification" in kind for kind in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        fail(f"{name!r} has {config.num_labels} labels; a reward model has one")
    check_weights(name, revision)


def load_tokenizer(settings: Settings, made_for: str) -> PreTrainedTokenizerBase:
    """The reward model's tokenizer, which must be the one that the entries were made with."""
    tokenizer = read_tokenizer(settings.model_name_or_path, settings.model_revision)
    if made_for != settings.model_name_or_path:
        other = read_tokenizer(made_for)
        if other.get_vocab() != tokenizer.get_vocab():
            fail(
                f"{settings.dataset!r} holds ids of {made_for!r}; make it anew with `python DataProcess/"
                f"tldr_data_process_partial.py --reward_model {settings.model_name_or_path}`"
            )

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_entries(settings: Settings) -> tuple[Dataset, Dataset, dict]:
    """Training and evaluation entries (of a causal model: comparisons), and how they were made."""
    made_by = "python DataProcess/tldr_data_process_partial.py"
    entries, how = read_dataset(settings.dataset, made_by, columns={"pair", "length"})
    pairs, _ = read_dataset(
        f"{settings.dataset}/pairs", made_by, columns={"prompt_ids", "chosen_ids", "rejected_ids"}
    )
    if "frame" not in how:
        fail(f"{settings.dataset!r} is no prefix dataset; make it with `{made_by}`")

    if how["causal"]:
        # In memory: `datasets` would leave cache files in the artifact it reads.
        whole = pairs.filter(lambda lengths: len(lengths) > 0, input_columns="lengths", keep_in_memory=True)
        held_out = whole["validation"].shuffle(seed=settings.seed, keep_in_memory=True)
        return whole["train"], held_out.select(range(min(settings.eval_comparisons, len(held_out)))), how

    held_out = sample_by_quarter(
        entries["validation"],
        pairs["validation"],
        settings.eval_comparisons,
        settings.eval_entries,
        settings.seed,
    )
    # `save_to_disk` keeps the table alone, so the view that expands it is put on here.
    return (
        entries["train"].with_transform(partial(expand_entries, pairs=pairs["train"], frame=how["frame"])),
        held_out.with_transform(partial(expand_entries, pairs=pairs["validation"], frame=how["frame"])),
        how,
    )


def make_trainer(settings: Settings) -> RewardTrainer:
    train, held_out, how = load_entries(settings)
    if settings.max_length != how["max_length"]:
        fail(
            f"{settings.dataset!r} was made with --max_length {how['max_length']}, "
            f"not {settings.max_length}; "
            "make it anew with `python DataProcess/tldr_data_process_partial.py`"
        )
    tokenizer = load_tokenizer(settings, how["reward_model"])

    settings.model_init_kwargs = model_kwargs(settings)
    if how["causal"]:
        trainer_class, collator = (
            AllPrefixRewardTrainer,
            PairCollator(tokenizer.pad_token_id, how["frame"]["start"]),
        )
    else:
        trainer_class, collator = PrefixRewardTrainer, EntryCollator(tokenizer, how["segment_ids"])

    with one_message(f"train {settings.model_name_or_path!r} with these settings"):
        return trainer_class(
            model=settings.model_name_or_path,
            args=settings,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(settings),
            quantization_config=get_quantization_config(settings),
        )


def save_reward_model(trainer: RewardTrainer, settings: Settings) -> None:
    """Write the whole model (adapter merged) and its tokenizer beside the checkpoints."""
    written = save_beside(trainer)
    if not trainer.is_world_process_zero():
        return

    if settings.use_peft:
        base = AutoModelForSequenceClassification.from_pretrained(
            settings.model_name_or_path, num_labels=1, dtype=torch.float32, revision=settings.model_revision
        )
        merged = PeftModel.from_pretrained(base, str(written)).merge_and_unload()
        for adapter in written.glob("adapter_*"):
            adapter.unlink()
        merged.config.pad_token_id = trainer.processing_class.pad_token_id
        merged.save_pretrained(written)
    move_into_place(written, Path(settings.output_dir), marker="config.json")


def report(trainer: RewardTrainer, settings: Settings) -> None:
    """Print how the model ranks held-out prefixes, before and after training, by quarter."""
    print(f"\nwrote {settings.output_dir}/ (processes: {trainer.accelerator.num_processes})")
    evaluations = [log for log in trainer.state.log_history if "eval_accuracy" in log]
    if evaluations and settings.eval_strategy != "no":
        before, after = evaluations[0], evaluations[-1]
        rows = ["accuracy", *(f"accuracy_quarter_{quarter}" for quarter in range(1, 5)), "loss"]
        print(f"  held-out prefix pairs  step {before['step']:>6}  step {after['step']:>6}")
        for row in rows:
            values = (f"{log.get(f'eval_{row}', float('nan')):11.3f}" for log in (before, after))
            print(f"  {row.replace('_', ' '):<21}", *values)
    print("next: python DPO_training/GPT2_large_DPO_tldr.py")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__.splitlines()[0])
    settings.remove_unused_columns = False
    check_reward_model(settings.model_name_or_path, settings.model_revision)
    checkpoint = checkpoint_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    settings.eval_on_start = settings.eval_on_start and checkpoint is None
    log_offline_without_login(settings.report_to)

    trainer = make_trainer(settings)
    check_writable(settings.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    if settings.eval_strategy != "no":
        trainer.evaluate()

    with one_message(f"write {settings.output_dir!r}"):
        save_reward_model(trainer, settings)
    PartialState().wait_for_everyone()
    if trainer.is_world_process_zero():
        report(trainer, settings)


if __name__ == "__main__":
    main()
