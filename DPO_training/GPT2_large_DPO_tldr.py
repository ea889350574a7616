"""Train the DPO baseline: a LoRA adapter on the SFT model.

Reads   summarize_from_feedback/ and the SFT model.
Writes  GPT2_large_tldr_DPO/: the adapter, the tokenizer, a model card (README.md) and the log of the training
        (training_log.jsonl); checkpoints while it trains.

No response is cut and no pair is lost: a prompt that does not fit loses its beginning.

    python DPO_training/GPT2_large_DPO_tldr.py
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from pargs.chat import with_turns
from pargs.cli import changed_flags, fail, next_step, run_script, setting
from pargs.encoding import encode_prompts, encode_responses, eos_id, start_ids
from pargs.files import MAKE_PAIRS, check_writable, read_dataset
from pargs.model_card import Training
from pargs.models import (
    check_eos,
    is_causal,
    load_config,
    load_tokenizer,
    warn_of_pickle,
    warn_of_unused_separator,
)
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


@dataclass
class Settings(DPOConfig, ModelConfig):
    """The settings below, and every other flag of TRL's DPOConfig and ModelConfig."""

    model_name_or_path: str = setting("vistagi/gpt2-large-tldr-sum", "The SFT model: reference and start.")
    dataset: str = setting("summarize_from_feedback", "Preference pairs to read.")
    output_dir: str = setting("GPT2_large_tldr_DPO", "Folder to write.")

    per_device_train_batch_size: PositiveInt = setting(2, "Pairs a step and device.")
    gradient_accumulation_steps: PositiveInt = setting(16, "Steps before an update.")
    learning_rate: NonNegativeFloat = setting(5e-5, "Peak learning rate.")
    optim: str = setting("rmsprop", "Optimizer.")
    beta: NonNegativeFloat = setting(0.1, "How near DPO stays to the reference policy.")
    max_length: PositiveInt | None = setting(512, "Prompt, response and EOS, in tokens.")
    max_prompt_length: PositiveInt = setting(512, "Longer prompts lose their beginning.")

    use_peft: bool = setting(True, "Train a LoRA adapter, not the whole model.")
    lora_r: PositiveInt = setting(16, "Rank of the adapter.")
    lora_alpha: PositiveInt = setting(16, "Scale of the adapter.")

    eval_comparisons: NonNegativeInt = setting(
        256, "Validation comparisons to evaluate on, at the end at least; 0 means none."
    )
    # TRL averages over batches: of one comparison each, all count alike.
    per_device_eval_batch_size: PositiveInt = setting(1, "Comparisons an evaluation step.")
    logging_steps: PositiveFloat = setting(10, "Updates between log lines.")
    logging_first_step: bool = setting(True, "Log the first update, too.")
    report_to: None | str | list[str] = setting("wandb", "Tracker, or none.")
    save_total_limit: PositiveInt | None = setting(2, "Checkpoints to keep.")
    remove_unused_columns: bool = setting(False, "As TRL has it.")

    def __post_init__(self):
        settle_precision(self)
        ModelConfig.__post_init__(self)
        DPOConfig.__post_init__(self)


class WholeResponseDPOTrainer(WholeCheckpoints, DPOTrainer):
    """TRL's DPO trainer on pairs that are encoded already: TRL would drop long prompts and cut responses."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


def load_policy_config(name: str, revision: str) -> PreTrainedConfig:
    """The configuration of a decoder-only language model; exits where `name` is none."""
    config = load_config(name, "name a model with --model_name_or_path", revision)
    kinds = config.architectures or []
    if not is_causal(config) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] not in kinds:
        fail(f"{name!r} is a {' '.join(kinds) or '?'}; a policy is a causal language model")
    return config


def encode_preferences(
    batch: Mapping[str, list],
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    max_length: int,
    max_prompt_length: int,
) -> dict[str, list[list[int]]]:
    """Encode pairs as the policy meets them: the prompt's ids, then each response's, then EOS.

    A prompt keeps its last min(`max_prompt_length`, `max_length` - the longer response with its EOS) tokens.
    """
    start, prompts = start_ids(tokenizer), with_turns(batch["prompt"], batch.get("turns"))
    encoded = {"prompt_ids": encode_prompts(tokenizer, prompts, template)}
    for side in ("chosen", "rejected"):
        responses = encode_responses(tokenizer, prompts, batch[side])
        encoded[f"{side}_ids"] = [[*ids, eos_id(tokenizer)] for ids in responses]

    for row, prompt_ids in enumerate(encoded["prompt_ids"]):
        longer = max(len(encoded["chosen_ids"][row]), len(encoded["rejected_ids"][row]))
        # At least one token: the first token of a response needs something to follow.
        room = max(1, min(max_prompt_length, max_length - longer) - len(start))
        encoded["prompt_ids"][row] = start + prompt_ids[-room:]
    return encoded


def make_trainer(settings: Settings) -> DPOTrainer:
    # What lies here first, then what may have to come from the hub.
    evaluates = settings.eval_comparisons > 0 and Path(settings.dataset, "validation").is_dir()
    splits = ["train"] + ["validation"] * evaluates
    columns = dict.fromkeys(splits, ["prompt", "chosen", "rejected"])
    dataset, notes = read_dataset(settings.dataset, columns, MAKE_PAIRS)
    if "validation" in splits:
        held_out = dataset["validation"].shuffle(seed=settings.seed, keep_in_memory=True)
        count, processes = (
            min(settings.eval_comparisons, len(held_out)),
            int(os.environ.get("WORLD_SIZE", "1")),
        )
        # No comparison is repeated to give every process one.
        dataset["validation"] = held_out.select(range(count - count % processes or count))

    name = settings.model_name_or_path
    config = load_policy_config(name, settings.model_revision)
    settle_checkpointing(settings, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    tokenizer = load_tokenizer(name, revision=settings.model_revision)
    check_eos(name, tokenizer)
    template = notes["template"]
    warn_of_unused_separator(name, tokenizer, template)

    encoded = {
        split: dataset[split].map(
            encode_preferences,
            batched=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "template": template,
                "max_length": settings.max_length or sys.maxsize,
                "max_prompt_length": settings.max_prompt_length,
            },
            remove_columns=dataset[split].column_names,
            keep_in_memory=True,  # `datasets` would leave a cache file in the artifact it reads
            desc=f"{split}: encoding",
        )
        for split in splits
    }

    settings.max_length = None  # the rows fit now, and TRL's collator would cut a response longer than this
    settings.model_init_kwargs = model_kwargs(settings)
    warn_of_pickle(name, settings.model_revision)
    with starting(name):
        return WholeResponseDPOTrainer(
            model=name,
            args=settings,
            train_dataset=encoded["train"],
            eval_dataset=encoded.get("validation") or None,  # none of none
            processing_class=tokenizer,
            peft_config=get_peft_config(settings),
            quantization_config=get_quantization_config(settings),
        )


def held_out_figures(trainer: DPOTrainer) -> dict[str, float]:
    """Accuracy and loss on held-out comparisons after training; none where there was no evaluation."""
    last = next((log for log in trainer.state.log_history[::-1] if "eval_loss" in log), None)
    return {"accuracy": last["eval_rewards/accuracies"], "loss": last["eval_loss"]} if last else {}


def describe(trainer: DPOTrainer, settings: Settings, stated: dict[str, Any]) -> Training:
    """What the card says of this training."""
    figures = {name: [f"{value:.3f}"] for name, value in held_out_figures(trainer).items()}
    held_out = len(cast(Dataset, trainer.eval_dataset)) if figures else 0
    return Training(
        summary="A LoRA adapter of a language model, trained with DPO on pairs of responses.",
        library="peft",
        settings=stated,
        data=f"`{settings.dataset}`: {len(cast(Dataset, trainer.train_dataset)):,} comparisons",
        held_out_columns=["after training"],
        held_out=figures,
        held_out_note=f"Accuracy: how often the chosen response of {held_out} validation comparisons has the "
        "higher implicit reward. Before training the policy is the reference, and every such reward is 0.",
    )


def report(trainer: DPOTrainer, settings: Settings) -> None:
    print(f"\nwrote {settings.output_dir}/ (processes: {trainer.accelerator.num_processes})")
    print(f"  an adapter of {settings.model_name_or_path}")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for name, log in zip(("first", "last"), (*logs[:1], *logs[-1:]), strict=False):
        print(f"  {name:<5} log: loss {log['loss']:.3f}, accuracy {log['rewards/accuracies']:.3f}")
    if figures := held_out_figures(trainer):
        print("  held-out:  loss {loss:.3f}, accuracy {accuracy:.3f}".format(**figures))

    flags = changed_flags(
        policy=(settings.model_name_or_path, Settings.model_name_or_path),
        dpo_policy=(settings.output_dir, Settings.output_dir),
        dataset=(settings.dataset, Settings.dataset),
    )
    next_step("PARGS_decode/PARGS_baselines.py", *flags)


def main() -> None:
    settings, stated = parse_settings(Settings, __doc__)
    if not settings.use_peft:
        fail("this stage saves a LoRA adapter: --use_peft must stay on")
    check_writable(Path(settings.output_dir))
    settle_logging(settings)
    settle_hub(settings)
    checkpoint = checkpoint_to_resume(settings.resume_from_checkpoint, settings.output_dir)

    trainer = make_trainer(settings)
    start_tracking(settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is not None:
        evaluate_at_end(trainer)
    save_trained(trainer, "adapter_config.json", describe(trainer, settings, stated))
    if trainer.is_world_process_zero():
        report(trainer, settings)


if __name__ == "__main__":
    run_script(main, "the same command with --resume_from_checkpoint True goes on from the last checkpoint")
