"""Train the partial reward model: Bradley-Terry on every prefix pair.

Reads   summarize_from_feedback_partial/ and the reward model to start from.
Writes  partial_reward_modeling_tldr/: model and tokenizer, and checkpoints while it trains.

An encoder reads one entry (a pair of prefixes) at a time. A causal model scores every prefix of a response
in one pass, so it is trained on whole comparisons: the same loss, averaged over the same entries.

    python partial_reward_training/tldr_partial_reward_model.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from prefix_entries import EntryCollator, PairCollator, expand_entries, sample_by_quarter
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

from pargs.cli import fail, setting
from pargs.files import MAKE_PREFIXES, check_writable, read_dataset
from pargs.models import (
    check_causal_reward_model,
    check_one_label,
    load_config,
    load_tokenizer,
    warn_of_pickle,
)
from pargs.prefixes import PairFrame
from pargs.training import (
    WholeCheckpoints,
    checkpoint_to_resume,
    model_kwargs,
    parse_settings,
    save_trained,
    settle_logging,
    settle_precision,
    starting,
)


@dataclass
class Settings(RewardConfig, ModelConfig):
    """The settings below, and every other flag of TRL's RewardConfig and ModelConfig."""

    model_name_or_path: str = setting(
        "OpenAssistant/reward-model-deberta-v3-large",
        "The full-sequence reward model to start from (or any sequence classifier).",
    )
    dataset: str = setting("summarize_from_feedback_partial", "Prefix dataset.")
    output_dir: str = setting("partial_reward_modeling_tldr", "Folder to write.")

    per_device_train_batch_size: PositiveInt = setting(16, "Prefix pairs a step and device.")
    gradient_accumulation_steps: PositiveInt = setting(16, "Steps before an update.")
    num_train_epochs: PositiveFloat = setting(1, "Passes over the entries.")
    learning_rate: NonNegativeFloat = setting(5e-6, "Peak learning rate.")
    optim: str = setting("adamw_torch", "Optimizer.")
    gradient_checkpointing: bool = setting(True, "Trade speed for memory.")
    max_length: PositiveInt | None = setting(512, "Longest input, as in the dataset.")

    eval_strategy: str = setting("steps", "When to evaluate.")
    eval_steps: PositiveFloat | None = setting(200, "Updates between evaluations.")
    eval_on_start: bool = setting(True, "Evaluate the model as it came, too.")
    eval_comparisons: PositiveInt = setting(128, "Validation comparisons to evaluate on.")
    eval_entries: PositiveInt = setting(
        1024, "Their entries, as many from each quarter; a causal model is evaluated on all."
    )
    per_device_eval_batch_size: PositiveInt = setting(16, "Prefix pairs an evaluation step.")

    logging_steps: PositiveFloat = setting(10, "Updates between log lines.")
    report_to: None | str | list[str] = setting("wandb", "Tracker, or none.")
    save_total_limit: PositiveInt | None = setting(2, "Checkpoints to keep.")
    lora_task_type: str = setting("SEQ_CLS", "A reward model is a classifier.")
    # Segment ids travel in columns that TRL does not know.
    remove_unused_columns: bool = setting(False, "Must stay off here.")

    def __post_init__(self):
        settle_precision(self)
        ModelConfig.__post_init__(self)
        RewardConfig.__post_init__(self)


class PrefixRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's reward trainer on entries that are model inputs already, with accuracy by quarter."""

    args: Settings

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # TRL would tokenise the text and append an EOS to every unfinished prefix

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        quarters = inputs.pop("quarters")
        loss, outputs = cast(
            tuple[torch.Tensor, Any], super().compute_loss(model, inputs, return_outputs=True)
        )

        if not model.training:
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

        metrics = self._metrics["train" if model.training else "eval"]
        metrics["accuracy"].append((right / entries).item())
        metrics["margin"].append((margin / entries).item())
        if not model.training:
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
    return base.get_submodule("score")


def load_entries(settings: Settings) -> tuple[Dataset, Dataset, dict]:
    """Training and evaluation entries (of a causal model: comparisons), and the notes of stage 1."""
    both = ("train", "validation")
    columns = [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_reencoded",
        "rejected_reencoded",
        "lengths",
    ]
    entries, notes = read_dataset(
        settings.dataset, dict.fromkeys(both, ["pair", "length"]), MAKE_PREFIXES, text=False
    )
    pairs, _ = read_dataset(
        f"{settings.dataset}/pairs", dict.fromkeys(both, columns), MAKE_PREFIXES, text=False
    )
    if "frame" not in notes:
        fail(f"{settings.dataset!r} is no prefix dataset; make it with `{MAKE_PREFIXES}`")

    if notes["causal"]:
        # In memory: `datasets` would leave cache files in the artifact it reads.
        whole = pairs.filter(lambda lengths: len(lengths) > 0, input_columns="lengths", keep_in_memory=True)
        held_out = whole["validation"].shuffle(seed=settings.seed, keep_in_memory=True)
        return whole["train"], held_out.select(range(min(settings.eval_comparisons, len(held_out)))), notes

    held_out = sample_by_quarter(
        entries["validation"],
        pairs["validation"],
        settings.eval_comparisons,
        settings.eval_entries,
        settings.seed,
    )
    # `save_to_disk` keeps the table alone, so the view that expands it is put on here.
    frame = PairFrame(**notes["frame"])
    return (
        entries["train"].with_transform(partial(expand_entries, pairs=pairs["train"], frame=frame)),
        held_out.with_transform(partial(expand_entries, pairs=pairs["validation"], frame=frame)),
        notes,
    )


def load_entries_tokenizer(settings: Settings, made_for: str) -> PreTrainedTokenizerFast:
    """The reward model's tokenizer, which must be the one that the entries were made with."""
    tokenizer = load_tokenizer(settings.model_name_or_path, revision=settings.model_revision)
    same_model = made_for == settings.model_name_or_path
    if not same_model and load_tokenizer(made_for).get_vocab() != tokenizer.get_vocab():
        fail(
            f"{settings.dataset!r} holds ids of {made_for!r}; make it anew with "
            f"`{MAKE_PREFIXES} --reward_model {settings.model_name_or_path}`"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make_trainer(settings: Settings) -> RewardTrainer:
    name = settings.model_name_or_path
    config = load_config(name, "name a model with --model_name_or_path", settings.model_revision)
    if any("SequenceClassification" in kind for kind in config.architectures or []):
        check_one_label(name, config)

    train_data, held_out, notes = load_entries(settings)
    if settings.max_length != notes["max_length"]:
        fail(
            f"{settings.dataset!r} was made with --max_length {notes['max_length']}, "
            f"not {settings.max_length}; make it anew with `{MAKE_PREFIXES}`"
        )
    tokenizer = load_entries_tokenizer(settings, notes["reward_model"])
    if notes["causal"]:
        trainer_class = AllPrefixRewardTrainer
        collator = PairCollator(cast(int, tokenizer.pad_token_id), notes["frame"]["start"])
    else:
        trainer_class, collator = PrefixRewardTrainer, EntryCollator(tokenizer, notes["segment_ids"])

    warn_of_pickle(name, settings.model_revision)
    settings.model_init_kwargs = model_kwargs(settings)
    with starting(name):
        trainer = trainer_class(
            model=name,
            args=settings,
            data_collator=collator,
            train_dataset=train_data,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(settings),
            quantization_config=get_quantization_config(settings),
        )
    if notes["causal"]:
        check_causal_reward_model(name, trainer.model, tokenizer)
    return trainer


def merge_adapter(folder: Path, settings: Settings) -> None:
    """Replace the adapter in `folder` by the whole model."""
    base = AutoModelForSequenceClassification.from_pretrained(
        settings.model_name_or_path, num_labels=1, dtype=torch.float32, revision=settings.model_revision
    )
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    for file in folder.glob("adapter_*"):
        file.unlink()
    merged.config.pad_token_id = load_tokenizer(str(folder)).pad_token_id
    merged.save_pretrained(folder)


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
    settings = parse_settings(Settings, __doc__)
    settings.remove_unused_columns = False
    check_writable(Path(settings.output_dir))
    settle_logging(settings)
    checkpoint = checkpoint_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    settings.eval_on_start = settings.eval_on_start and checkpoint is None

    trainer = make_trainer(settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    if settings.eval_strategy != "no":
        trainer.evaluate()

    merge = partial(merge_adapter, settings=settings) if settings.use_peft else None
    save_trained(trainer, marker="config.json", finish=merge)
    if trainer.is_world_process_zero():
        report(trainer, settings)


if __name__ == "__main__":
    main()
