"""Stages 2 and 3: the Bradley-Terry loss, one pass over all prefixes, evaluation by quarter, DPO's inputs."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import GPT2_large_DPO_tldr
import pytest
import tldr_data_process_partial
import tldr_partial_reward_model
import torch
from conftest import ROOT, assert_one_error, make_posts, save
from datasets import load_from_disk
from huggingface_hub import HfApi, ModelCard, RepoUrl
from peft import PeftModel
from prefix_entries import EntryCollator, PairCollator, expand_entries, quarter_of, sample_by_quarter
from test_data import TEMPLATE, refuse, run_main, write_pairs
from tldr_partial_reward_model import Settings, make_trainer
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MPNetConfig,
    MPNetForSequenceClassification,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    TrainerCallback,
)

from pargs import training
from pargs.files import read_notes
from pargs.prefixes import PairFrame
from pargs.training import rename_old_flags, settle_logging

QUIET = ("--report_to", "none", "--save_strategy", "no", "--gradient_checkpointing", "False")
PREFIXES = "summarize_from_feedback_partial"


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def read_card(folder: Path, base: str) -> ModelCard:
    """The card beside a model, which names its base, and what and where it was trained with."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == folder.name and card.data.base_model is None  # no name of the hub
    assert "None" not in card.text.split("## Settings")[0] and f"**Base model:** `{base}`" in card.text
    seconds = next(log["train_runtime"] for log in read_log(folder) if "train_runtime" in log)
    assert f"**Seconds of training:** {seconds:.0f} " in card.text and "**Device:** 1 process, " in card.text
    assert f"torch {torch.__version__}" in card.text and "trl " in card.text
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert f"pargs, commit {head.stdout.strip() or 'unknown'}" in card.text
    return card


def write_posts(count: int = 12) -> None:
    """Preference pairs of a small world of posts."""
    write_pairs(
        [
            {"prompt": TEMPLATE.format(post=post), "chosen": f" {good}", "rejected": f" {bad}"}
            for post, good, bad in make_posts(count, 3)
        ]
    )


def make_prefix_data(monkeypatch, reward_model: str, count: int = 12) -> None:
    write_posts(count)
    run_main(tldr_data_process_partial, monkeypatch, "--reward_model", reward_model, "--num_comparisons", "0")


def trainer_for(model: str, **changes):
    quiet = {"report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 4}
    return make_trainer(Settings(model_name_or_path=model, **quiet, **changes))


# The loss


@pytest.mark.parametrize("reward_name", ["bert", "deberta"])
def test_bradley_terry_loss_by_hand(here, monkeypatch, small_models, reward_name):
    """-log sigmoid of the reward difference, averaged over the entries of a batch."""
    make_prefix_data(monkeypatch, small_models[reward_name])
    trainer = trainer_for(small_models[reward_name])
    examples = [trainer.train_dataset[at] for at in (0, 3, 17, 40)]
    batch = trainer.data_collator(examples)
    assert batch["input_ids"].shape[0] == 8

    by_hand = []
    model = AutoModelForSequenceClassification.from_pretrained(small_models[reward_name]).eval()
    for example in examples:
        rewards = {}
        for side in ("chosen", "rejected"):
            inputs = {"input_ids": torch.tensor([example[f"{side}_input_ids"]])}
            if reward_name == "bert":
                inputs["token_type_ids"] = torch.tensor([example[f"{side}_token_type_ids"]])
            rewards[side] = model(**inputs).logits[0, 0]
        by_hand.append(torch.log1p(torch.exp(-(rewards["chosen"] - rewards["rejected"]))))

    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reward_name", ["gpt2-reward", "llama-reward"])
def test_one_pass_over_all_prefixes_is_the_average_over_entries(here, monkeypatch, small_models, reward_name):
    """Loss and gradients of whole comparisons equal those of their entries, each read by itself."""
    make_prefix_data(monkeypatch, small_models[reward_name])
    trainer = trainer_for(small_models[reward_name])
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    model = AutoModelForSequenceClassification.from_pretrained(small_models[reward_name]).eval()
    base = getattr(model, model.base_model_prefix)
    pairs = load_from_disk(f"{PREFIXES}/pairs")["train"]
    rows = load_from_disk(PREFIXES)["train"].filter(lambda pair: pair < 4, input_columns="pair")
    entries = expand_entries(rows[:], pairs, PairFrame(**read_notes(PREFIXES, "")["frame"]))
    losses = []
    for at in range(len(rows)):
        chosen, rejected = (
            model.score(base(torch.tensor([entries[f"{side}_input_ids"][at]])).last_hidden_state[0, -1])
            for side in ("chosen", "rejected")
        )
        losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
    average = torch.stack(losses).mean()
    average.backward()

    assert len(losses) > 40
    torch.testing.assert_close(loss, average, rtol=1e-4, atol=1e-5)
    gradients = dict(model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(
            parameter.grad, expected, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("reward_name", ["gpt2-reward", "llama-reward"])
def test_causal_loss_of_a_bf16_model_is_computed_in_fp32(here, monkeypatch, small_models, reward_name):
    """As under a GPU's default precision; more entries than bf16 can count."""
    make_prefix_data(monkeypatch, small_models[reward_name], count=30)
    trainer = trainer_for(small_models[reward_name])
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(30)])
    with torch.autocast("cpu", torch.bfloat16):
        loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)

    chosen, rejected = outputs.logits.double().squeeze(-1).chunk(2)
    assert torch.equal(chosen, chosen.bfloat16()) and len(chosen) > 300  # the head was in bf16
    margins = chosen - rejected
    torch.testing.assert_close(
        loss.double(), -torch.nn.functional.logsigmoid(margins).mean(), atol=1e-6, rtol=0
    )
    logged = trainer._metrics["train"]
    assert sum(logged["margin"]) / len(logged["margin"]) == pytest.approx(margins.mean().item(), abs=1e-6)
    assert len(logged["margin"]) == len(margins)


def gradients_of_an_update(model: str, rows: list[int], batch: int) -> dict[str, torch.Tensor]:
    """Gradients of the first update, in micro-batches of `batch` comparisons; and the loss that is logged."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": len(rows) // batch}
    settings |= {"max_grad_norm": 0, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    quiet = {"report_to": "none", "gradient_checkpointing": False, "logging_steps": 1}
    trainer = make_trainer(Settings(model_name_or_path=model, **quiet, **settings))
    trainer.train_dataset = trainer.train_dataset.select(rows)
    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **others):
            found.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    trainer.add_callback(Look())
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    return {**found, **{name: torch.tensor(log[name]) for name in ("loss", "accuracy", "margin")}}


def test_causal_update_is_the_average_over_the_entries_of_its_micro_batches(here, monkeypatch, small_models):
    """A comparison of 16 entries and one of 51: as one batch, and as two that are accumulated."""
    rows = [
        {"prompt": "POST: a\nTL;DR:", "chosen": f" {'x' * (count - 2)}", "rejected": " no"}
        for count in (16, 51)
    ]
    write_pairs(rows)
    flags = ("--reward_model", small_models["gpt2-reward"], "--num_comparisons", "0")
    run_main(tldr_data_process_partial, monkeypatch, *flags)
    counts = [len(lengths) for lengths in load_from_disk(f"{PREFIXES}/pairs")["train"]["lengths"]]
    assert counts == [16, 51]

    whole = gradients_of_an_update(small_models["gpt2-reward"], [0, 1], batch=2)
    parts = gradients_of_an_update(small_models["gpt2-reward"], [0, 1], batch=1)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def test_batches_are_padded_on_the_right_with_masks(here, monkeypatch, small_models):
    make_prefix_data(monkeypatch, small_models["bert"])
    trainer = trainer_for(small_models["bert"])
    examples = [trainer.train_dataset[at] for at in range(5)]
    batch = EntryCollator(trainer.processing_class, segment_ids=True)(examples)
    rows = [example[f"{side}_input_ids"] for side in ("chosen", "rejected") for example in examples]
    for row, ids, mask, segments in zip(
        rows, batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], strict=True
    ):
        assert ids[: len(row)].tolist() == row and mask.sum() == len(row) and mask[: len(row)].all()
        assert (ids[len(row) :] == trainer.processing_class.pad_token_id).all()
        assert segments[: len(row)].sum() > 0
    assert "token_type_ids" not in EntryCollator(trainer.processing_class, segment_ids=False)(examples)


def test_read_out_positions_of_whole_comparisons():
    collate = PairCollator(pad_token_id=0, start=[9])
    batch = collate(
        [
            {"prompt_ids": [5, 6], "chosen_ids": [1, 2], "rejected_ids": [1, 2, 3, 4], "lengths": [1, 2, 3]},
            {"prompt_ids": [5], "chosen_ids": [1], "rejected_ids": [7], "lengths": [1]},
        ]
    )
    assert batch["input_ids"].tolist() == [
        [9, 5, 6, 1, 2, 0],
        [9, 5, 1, 0, 0, 0],
        [9, 5, 6, 1, 2, 3],  # the fourth token is in no entry
        [9, 5, 7, 0, 0, 0],
    ]
    assert batch["read_out"].tolist() == [[3, 4, 4], [2, -1, -1], [3, 4, 5], [2, -1, -1]]
    assert batch["quarters"].tolist() == [[0, 1, 2], [3, -1, -1]]
    assert batch["same"].tolist() == [[True, True, False], [False, False, False]]


# Evaluation by quarter


def test_quarters_of_a_response():
    assert [quarter_of(length, 8) for length in range(1, 9)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [quarter_of(length, 3) for length in (1, 2, 3)] == [1, 2, 3]
    assert quarter_of(1, 1) == 3


def test_evaluation_entries_are_stratified(here, monkeypatch, small_models):
    make_prefix_data(monkeypatch, small_models["bert"], count=30)
    entries, pairs = (load_from_disk(folder)["train"] for folder in (PREFIXES, f"{PREFIXES}/pairs"))
    chosen = sample_by_quarter(entries, pairs, num_comparisons=8, num_entries=40, seed=0)
    longest = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
    quarters = [quarter_of(row["length"], longest[row["pair"]]) for row in chosen]
    assert [quarters.count(quarter) for quarter in range(4)] == [10] * 4
    assert len(set(chosen["pair"])) <= 8
    assert len({(row["pair"], row["length"]) for row in chosen}) == 40


@pytest.mark.parametrize("reward_name", ["bert", "gpt2-reward"])
def test_reported_accuracy_is_that_of_the_entries(here, monkeypatch, small_models, reward_name):
    """Each entry by itself; those in which both sides are the same input count in the loss alone."""
    make_prefix_data(monkeypatch, small_models[reward_name])
    trainer = trainer_for(small_models[reward_name], eval_entries=48, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()

    margins, ranked = [], {quarter: [] for quarter in range(4)}
    trainer.model.eval()
    for at in range(len(trainer.eval_dataset)):
        batch = trainer.data_collator([trainer.eval_dataset[at]])
        quarters, ends = batch["quarters"][0].tolist(), batch.get("read_out", torch.full((2, 1), 1000))
        both = [
            [ids[: end + 1].tolist() for end in row]
            for ids, row in zip(batch["input_ids"], ends, strict=True)
        ]
        with torch.no_grad():
            _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        for quarter, margin, *sides in zip(quarters, (chosen - rejected).tolist(), *both, strict=True):
            margins.append(margin)
            if sides[0] != sides[1]:
                ranked[quarter].append(margin > 0)

    for quarter, right in ranked.items():
        assert metrics[f"eval_accuracy_quarter_{quarter + 1}"] == pytest.approx(sum(right) / len(right))
    right = [entry for quarter in ranked.values() for entry in quarter]
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["eval_ranked"] == len(right)
    assert metrics["eval_same_prefix"] == len(margins) - len(right) > 3
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# The scripts


@pytest.mark.slow
@pytest.mark.parametrize("reward_name", ["deberta", "gpt2-reward"])
@pytest.mark.parametrize("lora", [False, True])
def test_partial_reward_model_learns_and_is_saved_whole(
    here, monkeypatch, small_models, capsys, reward_name, lora
):
    make_prefix_data(monkeypatch, small_models[reward_name])
    flags = [*QUIET, "--model_name_or_path", small_models[reward_name], "--learning_rate", "3e-3"]
    flags += ["--eval_entries", "32", "--per_device_train_batch_size", "8"]
    flags += ["--gradient_accumulation_steps", "1", "--max_steps", "12"]
    flags += ["--logging_steps", "4", "--seed", "7"]
    if lora:
        flags += ["--use_peft", "--lora_r", "4"]
    start = f" --model_name_or_path {small_models[reward_name]}\n"
    assert f"tldr_partial_reward_model.py{start}" in capsys.readouterr().out  # what follows stage 1
    run_main(tldr_partial_reward_model, monkeypatch, *flags)

    folder = here / "partial_reward_modeling_tldr"
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    assert not [*folder.glob("*.bin"), *folder.glob("adapter*"), *folder.glob(".writing")]
    saved, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and saved.config.num_labels == 1
    assert saved.dtype == torch.float32

    before = dict(
        AutoModelForSequenceClassification.from_pretrained(small_models[reward_name]).named_parameters()
    )
    moved = [(parameter - before[name]).abs().max() for name, parameter in saved.named_parameters()]
    assert max(moved) > 1e-3
    shown = capsys.readouterr()
    assert "accuracy quarter 4" in shown.out and "step 12\n" in shown.out
    assert "\r" not in shown.err  # no progress bars where there is no terminal

    lines = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == [f"step {at:>5} of 12" for at in (0, 4, 8, 12, 12)]
    number = r"\d+\.\d{3}"
    assert re.fullmatch(rf"step +4 .*: loss {number}, accuracy {number}, learning rate [\d.]+e-03", lines[1])
    assert re.fullmatch(rf"step +12 .*: held-out loss {number}, accuracy {number}", lines[-1])
    assert "{" not in shown.out
    assert "or, without the DPO baseline: python " in shown.out
    assert f" --full_reward_model {small_models[reward_name]}\n" in shown.out  # no other model than the usual

    logs = read_log(folder)
    before, after = (log for log in logs if "eval_loss" in log)
    card = read_card(folder, small_models[reward_name])
    assert card.data.library_name == "transformers"
    for name in ("accuracy", "accuracy_quarter_1", "loss"):
        row = f"| {name.replace('_', ' ')} | {before[f'eval_{name}']:.3f} | {after[f'eval_{name}']:.3f} |"
        assert row in card.text
    assert "| `seed` | `7` |" in card.text and "| `max_steps` | `12` |" in card.text
    assert "adam_beta1" not in card.text  # as TRL has it
    assert "`summarize_from_feedback_partial`: " in card.text and "| step 0 | step 12 |" in card.text


def test_two_labels_wrong_tokenizer_and_missing_data_are_refused(
    here, monkeypatch, small_models, call_main, tmp_path_factory
):
    def refusal(model: str) -> str:
        return refuse(call_main, tldr_partial_reward_model, "--model_name_or_path", model, *QUIET)

    assert "make it with `python DataProcess/tldr_data_process_partial.py`" in refusal(small_models["bert"])
    make_prefix_data(monkeypatch, small_models["bert"])
    assert f"--reward_model {small_models['deberta']}`" in refusal(small_models["deberta"])

    two = tmp_path_factory.mktemp("two")
    AutoModelForSequenceClassification.from_pretrained(
        small_models["bert"], num_labels=2, ignore_mismatched_sizes=True
    ).save_pretrained(two)
    assert "has 2 labels" in refusal(str(two))


def test_a_model_without_gradient_checkpointing_is_trained_without(
    here, monkeypatch, tokenizers, tmp_path_factory, capsys
):
    """Both trainers switch it off with one warning; it is on by default."""
    unigram, bpe = tokenizers["unigram"], tokenizers["bpe"]
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    encoder = {**shape, "pad_token_id": unigram.pad_token_id, "num_labels": 1, "vocab_size": len(unigram)}
    encoders = [
        AlbertForSequenceClassification(AlbertConfig(**encoder, embedding_size=16)),
        MPNetForSequenceClassification(MPNetConfig(**encoder)),
    ]
    one_step = {"report_to": "none", "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    one_step |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    for model in encoders:
        folder = save(model, unigram, tmp_path_factory.mktemp("encoder"))
        make_prefix_data(monkeypatch, folder)
        capsys.readouterr()
        make_trainer(Settings(folder, **one_step, eval_on_start=False)).train()
        said = f"warning: --gradient_checkpointing is switched off: {type(model).__name__} has none\n"
        assert capsys.readouterr().err.count(said) == 1

    policy = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=len(bpe), n_embd=16, n_layer=1, n_head=2))
    folder = save(policy, bpe, tmp_path_factory.mktemp("policy"))
    write_posts()
    settings = GPT2_large_DPO_tldr.Settings(folder, **one_step, lora_target_modules=["c_attn", "c_proj"])
    GPT2_large_DPO_tldr.make_trainer(settings).train()
    said = "warning: --gradient_checkpointing is switched off: OpenAIGPTLMHeadModel has none\n"
    assert capsys.readouterr().err.count(said) == 1


def test_a_model_is_uploaded_once_and_whole(here, monkeypatch, small_models):
    """After its files are in place, with a login alone; nothing of a checkpoint goes with it."""
    make_prefix_data(monkeypatch, small_models["deberta"])
    uploads = []

    def upload(folder_path: Path, **options) -> None:
        uploads.append((sorted(path.name for path in folder_path.iterdir()), options))

    monkeypatch.setattr(training, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/it"))
    flags = ["--model_name_or_path", small_models["deberta"], "--max_steps", "1", "--save_steps", "1"]
    flags += ["--gradient_accumulation_steps", "1", "--report_to", "none", "--eval_strategy", "no"]
    flags += ["--use_peft", "--push_to_hub", "--hub_token", "hf_secret"]
    run_main(tldr_partial_reward_model, monkeypatch, *flags)
    ((files, options),) = uploads
    assert {"README.md", "training_log.jsonl", "model.safetensors", "config.json"} <= set(files)
    assert not [name for name in files if name.startswith(("adapter", "."))]
    assert options["repo_id"] == "me/it" and options["token"] == "hf_secret"
    assert {"checkpoint-*", ".*"} == set(options["ignore_patterns"])
    assert "hf_secret" not in (here / "partial_reward_modeling_tldr/README.md").read_text()


@pytest.mark.parametrize("module", [tldr_partial_reward_model, GPT2_large_DPO_tldr])
def test_a_scripts_own_settings_come_first_in_its_help(call_main, module):
    status, said = call_main(module, "--help")
    flags = re.findall(r"^  --(\w+)", said, flags=re.MULTILINE)
    own = [name for name in flags if name in module.Settings.__annotations__]
    assert status == 0 and flags[:3] == ["model_name_or_path", "dataset", "output_dir"]
    assert said.count("\n  --dataset DATASET ") == 1 and "--weight_decay" in said
    assert own == list(module.Settings.__annotations__)
    assert flags.index("report_to") < flags.index("weight_decay")


def test_settings_can_be_read_from_a_file(here, monkeypatch):
    Path("settings.yaml").write_text("learning_rate: 3e-4\neval_entries: 12\n")
    monkeypatch.setattr(sys, "argv", ["train", "--config=settings.yaml", "--eval_entries", "8"])
    settings, stated = training.parse_settings(Settings, None)
    assert (settings.learning_rate, settings.eval_entries) == (3e-4, 8)
    assert stated["learning_rate"] == 3e-4 and stated["report_to"] == "wandb"
    assert [*stated] == [name for name in stated if name in Settings.__annotations__]


def test_old_flags_and_unsupported_precision(capsys, monkeypatch):
    renamed = rename_old_flags(
        ["--evaluation_strategy=steps", "--no_remove_unused_columns", "--fp16", "--max_length", "5"]
    )
    expected = ["--eval_strategy=steps", "--remove_unused_columns=False", "--fp16", "--max_length", "5"]
    assert renamed == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings(fp16=True, load_in_4bit=True)
    assert not settings.fp16 and not settings.bf16 and not settings.load_in_4bit
    said = capsys.readouterr().err
    assert "--evaluation_strategy became --eval_strategy" in said and "--fp16 needs a GPU" in said
    assert Settings().bf16 is False  # on a CPU, and never left to TRL's default


def test_wandb_is_needed_only_where_it_reports(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.delenv("WANDB_MODE", raising=False)
    runpy.run_path(training.__file__)
    settle_logging(Settings(report_to="none"))
    with pytest.raises(SystemExit) as stopped:
        settle_logging(Settings(report_to="wandb"))
    assert_one_error(stopped.value.code, capsys.readouterr().err, "--report_to none trains without it")


# DPO


def test_dpo_prompts_lose_their_beginning_and_responses_nothing(tokenizers):
    tokenizer = tokenizers["bpe"]
    eos = tokenizer.eos_token_id
    row = {
        "prompt": ["POST: my sister sold my bike and the landlord shouts all night\nTL;DR:"],
        "chosen": [" my sister sold my bike"],
        "rejected": [" no"],
    }
    prompt = tokenizer(row["prompt"][0])["input_ids"]
    chosen, rejected = (tokenizer(row[side][0])["input_ids"] + [eos] for side in ("chosen", "rejected"))

    def encode(max_length, max_prompt_length):
        encoded = GPT2_large_DPO_tldr.encode_preferences(
            row, tokenizer, TEMPLATE, max_length, max_prompt_length
        )
        assert encoded["chosen_ids"] == [chosen] and encoded["rejected_ids"] == [rejected]
        return encoded["prompt_ids"][0]

    assert encode(512, 512) == prompt
    assert encode(len(chosen) + 5, 512) == prompt[-5:]
    assert encode(512, 7) == prompt[-7:]
    assert encode(len(chosen), 512) == prompt[-1:]


@pytest.mark.slow
def test_dpo_adapter_is_saved_and_loads(here, monkeypatch, small_models, capsys):
    write_posts()
    run_main(
        GPT2_large_DPO_tldr,
        monkeypatch,
        *QUIET,
        *("--model_name_or_path", small_models["gpt2"], "--max_steps", "3", "--max_length", "60"),
        *("--gradient_accumulation_steps", "1", "--learning_rate", "1e-2", "--logging_steps", "1"),
    )
    folder = here / "GPT2_large_tldr_DPO"
    assert (folder / "adapter_model.safetensors").exists() and not [*folder.glob("*.bin")]

    ids = torch.tensor([[5, 6, 7]])
    adapted = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(small_models["gpt2"]).eval()
    assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-3
    said = capsys.readouterr().out
    assert "wrote GPT2_large_tldr_DPO/" in said
    assert re.search(r"next: python .*/PARGS_decode/PARGS_baselines.py --policy \S+/gpt2\n", said)

    held_out = read_log(folder)[-1]
    figures = held_out["eval_rewards/accuracies"], held_out["eval_loss"]
    assert "held-out:  loss {1:.3f}, accuracy {0:.3f}".format(*figures) in said
    card = read_card(folder, small_models["gpt2"])
    assert card.data.library_name == "peft" and "12 comparisons" in card.text
    assert "| accuracy | {:.3f} |\n| loss | {:.3f} |".format(*figures) in card.text
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)


def test_dpo_batches_hold_whole_responses(here, monkeypatch, small_models, capsys):
    write_posts()
    settings = GPT2_large_DPO_tldr.Settings(
        model_name_or_path=small_models["gpt2"], report_to="none", max_length=60, use_peft=True
    )
    trainer = GPT2_large_DPO_tldr.make_trainer(settings)
    assert capsys.readouterr().err.count("has a '<sep>', which the prompt template does not use") == 1
    tokenizer = AutoTokenizer.from_pretrained(small_models["gpt2"])
    rows = load_from_disk("summarize_from_feedback")["train"]
    assert len(trainer.train_dataset) == len(rows)  # no row is lost

    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(len(rows))])
    for side, half in (("chosen", 0), ("rejected", len(rows))):
        for at, row in enumerate(rows):
            ids = batch["input_ids"][half + at][batch["completion_mask"][half + at].bool()].tolist()
            assert ids == tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id]
