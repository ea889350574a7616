"""Train the partial reward model: Bradley-Terry on every prefix pair.

Reads   summarize_from_feedback_partial/ and the reward model to start from.
Writes  partial_reward_modeling_tldr/: model, tokenizer, a model card (README.md) and the log of the training
        (training_log.jsonl); checkpoints while it trains.

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
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config, get_quantization_config

from pargs.cli import changed_flags, fail, next_step, run_script, setting
from pargs.files import MAKE_PREFIXES, check_writable, read_dataset
from pargs.model_card import Training
from pargs.models import (
    check_causal_reward_model,
    check_one_label,
    is_reward_model,
    load_config,
    load_tokenizer,
    warn_of_pickle,
)
from pargs.prefixes import PairFrame
from pargs.training import (
    WholeCheckpoints,
    checkpoint_to_resume,
    evaluate_at_end,
    model_kwargs,
    parse_settings,
    save_trained,
    settle_checkpointing,
    settle_hub,
    settle_logging,
    settle_precision,
    start_tracking,
    starting,
)

PAIRS = "summarize_from_feedback"  # what the next stages read


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
    model: torch.nn.Module

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # TRL would tokenise the text and append an EOS to every unfinished prefix

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        quarters, same = inputs.pop("quarters"), inputs.pop("same")  # [entries, 1]
        loss, outputs = cast(
            tuple[torch.Tensor, Any], super().compute_loss(model, inputs, return_outputs=True)
        )
        for name in ("accuracy", "margin", "mean_reward"):
            self.next_log()[name].pop()  # TRL's average over the batch
        chosen, rejected = outputs.logits.chunk(2)  # [entries, 1]
        self.log_entries(chosen, rejected, quarters, same)
        return (loss, outputs) if return_outputs else loss

    def entry_losses(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        losses = -torch.nn.functional.logsigmoid(chosen - rejected)
        if self.args.center_rewards_coefficient is not None:
            losses = losses + self.args.center_rewards_coefficient * (chosen + rejected) ** 2
        return losses

    def next_log(self) -> dict[str, list[float]]:
        """What TRL logs next: the average of each list."""
        return self._metrics["train" if self.model.training else "eval"]

    def log_entries(
        self, chosen: torch.Tensor, rejected: torch.Tensor, quarters: torch.Tensor, same: torch.Tensor
    ) -> None:
        """Log the rewards of a batch, with one number an entry, so that averages are over entries.

        All are [rows, entries of a row]; a quarter of -1 is no entry. Where both sides have the `same` prefix
        there is nothing to rank: such entries count in the loss, and in no accuracy.
        """
        entries = torch.stack([chosen.detach().float(), rejected.detach().float(), quarters, same], dim=-1)
        entries = self.accelerator.pad_across_processes(entries, dim=1, pad_index=-1)
        # Several processes repeat held-out rows to fill their last batch: those do not count again.
        gather = self.accelerator.gather if self.model.training else self.accelerator.gather_for_metrics
        entries = cast(torch.Tensor, gather(entries)).flatten(0, 1)  # [all entries, 4]
        chosen, rejected, quarters, same = entries[entries[:, 2] >= 0].unbind(dim=1)

        correct, ranked = (chosen > rejected).float(), same == 0
        averages = {
            "accuracy": correct[ranked],
            "margin": chosen - rejected,
            "mean_reward": (chosen + rejected) / 2,
        }
        metrics = self.next_log()
        if not self.model.training:
            averages["loss"] = self.entry_losses(chosen, rejected)
            for quarter in range(4):
                averages[f"accuracy_quarter_{quarter + 1}"] = correct[ranked & (quarters == quarter)]
            for name, count in {"ranked": ranked.sum(), "same_prefix": (~ranked).sum()}.items():
                metrics[name] = [sum(metrics[name]) + count.item()]

        for name, numbers in averages.items():
            metrics[name] += numbers.tolist()
            if not metrics[name]:
                del metrics[name]  # TRL would divide by no entries


class AllPrefixRewardTrainer(PrefixRewardTrainer):
    """The same loss for a causal model: one pass over comparisons, averaged over the entries of an update."""

    loss_is_scaled_for_ga = True  # or the trainer would divide by the number of micro-batches once more

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an update, and how many entries they hold."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.count_entries(batches)

    def count_entries(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """How many entries all processes have in these batches."""
        entries = sum(int((batch["quarters"] >= 0).sum()) for batch in batches)
        return cast(torch.Tensor, self.accelerator.reduce(torch.tensor(entries, device=self.args.device)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_entries = self.count_entries([inputs]) if num_items_in_batch is None else num_items_in_batch
        read_out = inputs.pop("read_out")  # [2 * batch, longest], -1 where there is no entry
        quarters, same = inputs.pop("quarters"), inputs.pop("same")  # [batch, longest]
        with token_rewards(self.accelerator.unwrap_model(model)) as at_tokens:
            model(**inputs, use_cache=False)
        # In fp32, also where the model is in bf16: the loss would be rounded to three digits.
        rewards = at_tokens[0].float().squeeze(-1).gather(1, read_out.clamp(min=0))  # [2 * batch, longest]
        chosen, rejected = rewards.chunk(2)  # [batch, longest]
        self.log_entries(chosen, rejected, quarters, same)

        # What processes return is averaged over them, whatever their numbers of entries.
        losses = self.entry_losses(chosen, rejected)[quarters >= 0]  # [entries]
        loss = losses.sum() * self.accelerator.num_processes / num_entries
        outputs = SequenceClassifierOutput(logits=rewards[read_out >= 0].unsqueeze(-1))  # [2 * entries, 1]
        return (loss, outputs) if return_outputs else loss


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
    # What lies here first, then what may have to come from the hub.
    train_data, held_out, notes = load_entries(settings)
    if settings.max_length != notes["max_length"]:
        fail(
            f"{settings.dataset!r} was made with --max_length {notes['max_length']}, "
            f"not {settings.max_length}; make it anew with `{MAKE_PREFIXES}`"
        )

    name = settings.model_name_or_path
    config = load_config(name, "name a model with --model_name_or_path", settings.model_revision)
    if any("SequenceClassification" in kind for kind in config.architectures or []):
        check_one_label(name, config)
    settle_checkpointing(settings, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None))
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


def held_out_figures(trainer: RewardTrainer) -> tuple[list[str], dict[str, list[str]], str]:
    """How the model ranks held-out prefixes, before and after training, by quarter; and of how many pairs."""
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    if not evaluations:
        return [], {}, ""
    before, after = evaluations[0], evaluations[-1]
    names = ["accuracy", *(f"accuracy_quarter_{quarter}" for quarter in range(1, 5)), "loss"]
    figures = {
        name.replace("_", " "): [f"{log.get(f'eval_{name}', float('nan')):.3f}" for log in (before, after)]
        for name in names
    }
    counts = (int(after[f"eval_{name}"]) for name in ("ranked", "same_prefix"))
    note = "accuracy is that of {} pairs; in {} more both prefixes are the same".format(*counts)
    return [f"step {log['step']}" for log in (before, after)], figures, note


def describe(trainer: RewardTrainer, settings: Settings, stated: dict[str, Any]) -> Training:
    """What the card says of this training."""
    columns, figures, note = held_out_figures(trainer)
    rows = "comparisons, every prefix" if isinstance(trainer, AllPrefixRewardTrainer) else "prefix pairs"
    return Training(
        summary="A reward model of unfinished responses: Bradley-Terry on pairs of prefixes.",
        library="transformers",
        settings=stated,
        data=f"`{settings.dataset}`: {len(cast(Dataset, trainer.train_dataset)):,} {rows}",
        held_out_columns=columns,
        held_out=figures,
        held_out_note=f"On prefix pairs of validation comparisons; {note}." if note else "",
    )


def report(trainer: RewardTrainer, settings: Settings) -> None:
    """Print the held-out figures, and what can be done with the model."""
    print(f"\nwrote {settings.output_dir}/ (processes: {trainer.accelerator.num_processes})")
    columns, figures, note = held_out_figures(trainer)
    if figures:
        print(f"  {'held-out prefix pairs':<21}", *(f"{column:>11}" for column in columns))
        for name, values in figures.items():
            print(f"  {name:<21}", *(f"{value:>11}" for value in values))
        print(f"  {note}")

    flags = changed_flags(partial_reward_model=(settings.output_dir, Settings.output_dir))
    methods = ["--methods", "PARGS-G", "PARGS"]
    start = load_config(settings.model_name_or_path, "", settings.model_revision or "main")
    if is_reward_model(start):  # else it is a policy
        flags += changed_flags(full_reward_model=(settings.model_name_or_path, Settings.model_name_or_path))
        methods.insert(1, "ARGS")
    if Path(PAIRS).is_dir():
        next_step("DPO_training/GPT2_large_DPO_tldr.py")
        next_step("PARGS_decode/PARGS_baselines.py", *methods, *flags, said="or, without the DPO baseline")
    else:
        dataset = ("--dataset", "DATASET")  # what the first script wrote, wherever that is
        next_step("PARGS_decode/PARGS_baselines.py", *methods, *flags, *dataset)


def main() -> None:
    settings, stated = parse_settings(Settings, __doc__)
    settings.remove_unused_columns = False
    check_writable(Path(settings.output_dir))
    settle_logging(settings)
    settle_hub(settings)
    checkpoint = checkpoint_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    settings.eval_on_start = settings.eval_on_start and settings.eval_strategy != "no" and checkpoint is None

    trainer = make_trainer(settings)
    start_tracking(settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    if settings.eval_strategy != "no":
        evaluate_at_end(trainer)

    merge = partial(merge_adapter, settings=settings) if settings.use_peft else None
    save_trained(trainer, "config.json", describe(trainer, settings, stated), finish=merge)
    if trainer.is_world_process_zero():
        report(trainer, settings)


if __name__ == "__main__":
    run_script(main, "the same command with --resume_from_checkpoint True goes on from the last checkpoint")
