"""Train the DPO baseline: a LoRA adapter on the SFT model.

Reads   summarize_from_feedback/ and the SFT model.
Writes  GPT2_large_tldr_DPO/: the adapter and the tokenizer, and checkpoints while it trains.

No response is cut and no pair is lost: a prompt that does not fit loses its beginning.

    python DPO_training/GPT2_large_DPO_tldr.py
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from text_encoding import encode_prompts, encode_responses, start_ids
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
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config


@dataclass
class Settings(DPOConfig, ModelConfig):
    """The settings below, and every other flag of TRL's DPOConfig and ModelConfig."""

    model_name_or_path: str = field(
        default="vistagi/gpt2-large-tldr-sum", metadata={"help": "The SFT model: reference and start."}
    )
    dataset: str = field(default="summarize_from_feedback", metadata={"help": "Preference pairs to read."})
    output_dir: str = field(default="GPT2_large_tldr_DPO", metadata={"help": "Folder to write."})

    per_device_train_batch_size: int = field(default=2, metadata={"help": "Pairs a step and device."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Steps before an update."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    optim: str = field(default="rmsprop", metadata={"help": "Optimizer."})
    beta: float = field(default=0.1, metadata={"help": "How near DPO stays to the reference policy."})
    max_length: int | None = field(default=512, metadata={"help": "Prompt, response and EOS, in tokens."})
    max_prompt_length: int = field(default=512, metadata={"help": "Longer prompts lose their beginning."})

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter, not the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})

    logging_steps: float = field(default=10, metadata={"help": "Updates between log lines."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first update, too."})
    report_to: str = field(default="wandb", metadata={"help": "Tracker, or none."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "As TRL has it."})

    def __post_init__(self):
        settle_precision(self)
        ModelConfig.__post_init__(self)
        DPOConfig.__post_init__(self)


class WholeResponseDPOTrainer(WholeCheckpoints, DPOTrainer):
    """TRL's DPO trainer on pairs that are encoded already: TRL would drop long prompts and cut responses."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


def check_settings(settings: Settings) -> None:
    if not settings.use_peft:
        fail("this stage saves a LoRA adapter: --use_peft must stay on")
    if settings.max_length is None or settings.max_length < 2 or settings.max_prompt_length < 1:
        fail("--max_length must be at least 2 and --max_prompt_length at least 1")
    check_policy(settings.model_name_or_path, settings.model_revision)


def check_policy(name: str, revision: str) -> None:
    """Exit where `name` is no decoder-only language model."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:
        fail(f"cannot load {name!r}: {error}; name a model with --model_name_or_path")

    if not set(config.architectures or []) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        fail(f"{name!r} is a {' '.join(config.architectures or ['?'])}; a policy is a causal language model")
    check_weights(name, revision)


def encode_preferences(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    max_prompt_length: int,
) -> dict[str, list[list[int]]]:
    """Encode pairs as the policy meets them: the prompt's ids, then each response's, then EOS.

    A prompt keeps its last min(`max_prompt_length`, `max_length` - the longer response with its EOS) tokens.
    """
    start = start_ids(tokenizer)
    encoded = {"prompt_ids": encode_prompts(tokenizer, batch["prompt"], template)}
    for side in ("chosen", "rejected"):
        responses = encode_responses(tokenizer, batch["prompt"], batch[side])
        encoded[f"{side}_ids"] = [ids + [tokenizer.eos_token_id] for ids in responses]

    for row, prompt_ids in enumerate(encoded["prompt_ids"]):
        longer = max(len(encoded["chosen_ids"][row]), len(encoded["rejected_ids"][row]))
        # At least one token: the first token of a response needs something to follow.
        room = max(1, min(max_prompt_length, max_length - longer) - len(start))
        encoded["prompt_ids"][row] = start + prompt_ids[-room:]
    return encoded


def make_trainer(settings: Settings) -> DPOTrainer:
    names = ["train"] + ["validation"] * (settings.eval_strategy != "no")
    dataset, notes = read_dataset(
        settings.dataset,
        made_by="python DataProcess/tldr_data_process.py",
        columns={"prompt", "chosen", "rejected"},
        splits=names,
    )
    tokenizer = read_tokenizer(settings.model_name_or_path, settings.model_revision)
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {settings.model_name_or_path!r} has no EOS, which ends a response")

    splits = {
        name: dataset[name].map(
            encode_preferences,
            batched=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "template": notes.get("template", "{post}"),
                "max_length": settings.max_length,
                "max_prompt_length": settings.max_prompt_length,
            },
            remove_columns=dataset[name].column_names,
            keep_in_memory=True,  # `datasets` would leave a cache file in the artifact it reads
            desc=f"{name}: encoding",
        )
        for name in names
    }

    settings.max_length = None  # the rows fit now, and TRL's collator would cut a response longer than this
    settings.model_init_kwargs = model_kwargs(settings)
    with one_message(f"train {settings.model_name_or_path!r} with these settings"):
        return WholeResponseDPOTrainer(
            model=settings.model_name_or_path,
            args=settings,
            train_dataset=splits["train"],
            eval_dataset=splits.get("validation"),
            processing_class=tokenizer,
            peft_config=get_peft_config(settings),
            quantization_config=get_quantization_config(settings),
        )


def save_adapter(trainer: DPOTrainer, output_dir: Path) -> None:
    written = save_beside(trainer)
    if trainer.is_world_process_zero():
        move_into_place(written, output_dir, marker="adapter_config.json")


def main() -> None:
    settings = parse_settings(Settings, description=__doc__.splitlines()[0])
    check_settings(settings)
    checkpoint = checkpoint_to_resume(settings.resume_from_checkpoint, settings.output_dir)
    log_offline_without_login(settings.report_to)

    trainer = make_trainer(settings)
    check_writable(settings.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)

    with one_message(f"write {settings.output_dir!r}"):
        save_adapter(trainer, Path(settings.output_dir))
    PartialState().wait_for_everyone()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        print(f"\nwrote {settings.output_dir}/ (processes: {trainer.accelerator.num_processes})")
        print(f"  an adapter of {settings.model_name_or_path}")
        for name, log in zip(("first", "last"), (*logs[:1], *logs[-1:]), strict=False):
            print(f"  {name:<5} log: loss {log['loss']:.3f}, accuracy {log['rewards/accuracies']:.3f}")
        print("next: python PARGS_decode/PARGS_baselines.py")


if __name__ == "__main__":
    main()
