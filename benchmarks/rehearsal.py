"""The paper's size, rehearsed: every command of the README on models of the real size, with little to do.

Reads   the README's commands, the demo's posts and tokenizers.
Writes  two tables, to standard output: what each stage took here, and the memory that it is expected to take
        on a GPU at the README's batch sizes. docs/benchmarks.md keeps what was run.

The models are those that the README names, GPT2-large and DeBERTa-v3-large, with random weights, in folders
that stand for the hub's names; two are an fp16 `pytorch_model.bin`, as on the hub. Flags that cut the work
are put behind the README's own. What the stages write means nothing; that they run, and in which memory, is
the result. Memory is the most that a stage's process held of the host's, not of a GPU's.

    python benchmarks/rehearsal.py                      # 20 GB of memory and of disk
    python benchmarks/rehearsal.py --layers 2           # a quick one
    python benchmarks/rehearsal.py --expected_only
"""

import os
import re
import shlex
import subprocess
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
import transformers
from paper_configs import paper_configs
from pydantic import NonNegativeInt, PositiveInt
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from pargs.cli import fail, parse_settings, setting, warn
from pargs.processes import hide_bars_in_logs, progress_bar

ROOT = Path(__file__).parents[1]
DEMO_MODELS = ROOT / "demo/models"
POLICY, RLHF_POLICY = "vistagi/gpt2-large-tldr-sum", "vistagi/gpt2-large-tldr-sum-rlhf"
REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large"

STAGES = {
    "DataProcess": "1 data",
    "partial_reward_training": "2 partial reward model",
    "DPO_training": "3 DPO",
    "PARGS_decode": "4 decoding",
    "Evaluation": "5 evaluation",
}
# What `run.sh paper` runs beside the README's block; all behind the script is shown as put there.
ALSO = (
    f"Evaluation/show_result.py --policy {POLICY}",
    "Evaluation/prefix_accuracy.py",
    "Evaluation/show_generations.py",
)

# Defaults of stages 4 and 5: what the README's bare commands take.
CACHE_BYTES = 8e9  # --cache_gb of PARGS_baselines.py
TOKEN_BUDGETS = {
    "more than 60 GB": 262144,
    "32 to 60 GB": 131072,
    "less": 65536,
}  # fit_budget of run_models.py, by the GPU's memory
NUM_PROMPTS, NEW_TOKENS = 100, 64
LIKELIHOOD_BATCH = 8  # --batch_size of show_result.py
ACCURACY_BUDGET = 4096  # --token_budget of prefix_accuracy.py

HALF, FULL = 2, 4  # bytes of a number in fp16 or bf16, and in fp32


@dataclass
class Settings:
    layers: NonNegativeInt = setting(0, "Layers of each model; 0 for the real depth.")
    steps: PositiveInt = setting(2, "Updates of each training, of 2 steps of one pair each.")
    num_prompts: PositiveInt = setting(2, "Prompts to decode.")
    max_new_tokens: PositiveInt = setting(4, "Tokens of each response.")
    k: PositiveInt = setting(3, "Candidates a step, and samples of best-of-n.")
    directory: str | None = setting(None, "Where to work, in a temporary folder that is removed.")
    expected_only: bool = setting(False, "Run nothing: only what is expected on a GPU.")


@dataclass
class Command:
    script: str
    arguments: list[str]
    changes: list[str]  # put behind the arguments: of two equal flags the last counts

    def shown(self) -> dict[str, str]:
        folder, name = self.script.split("/")
        return {"stage": STAGES[folder], "script": name, "put behind its flags": " ".join(self.changes)}


@dataclass
class Expected:
    """Bytes on a GPU where a stage holds most, by what they are for."""

    stage: str
    what: str
    weights: float
    gradients: float = 0
    optimizer: float = 0
    caches: float = 0
    activations: float = 0


# Models and data


def make_models(work: Path, layers: int) -> None:
    """The three models that the README's commands load, under the hub's names."""
    hide_bars_in_logs()
    torch.manual_seed(0)
    policy_config, reward_config = paper_configs(layers)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "summariser")
    policy_config.bos_token_id = policy_config.eos_token_id = tokenizer.eos_token_id
    policy: Any = AutoModelForCausalLM.from_config(policy_config)
    # Only ids that the tokenizer can spell come up as candidates.
    policy.transformer.wte.weight.data[len(tokenizer) :] = 0
    save(policy, tokenizer, policy_config.n_positions, work / RLHF_POLICY)
    save(policy.half(), tokenizer, policy_config.n_positions, work / POLICY, pickled=True)
    del policy

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODELS / "full-reward-model")
    reward_config.pad_token_id = tokenizer.pad_token_id
    reward_model: Any = AutoModelForSequenceClassification.from_config(reward_config)
    positions = reward_config.max_position_embeddings
    save(reward_model.half(), tokenizer, positions, work / REWARD_MODEL, pickled=True)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    positions: int,
    folder: Path,
    pickled: bool = False,
) -> None:
    """A model and its tokenizer; `pickled` writes the weights as transformers no longer does."""
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    if pickled:
        (folder / SAFE_WEIGHTS_NAME).unlink()
        torch.save(model.state_dict(), folder / WEIGHTS_NAME)


# The commands


def readme_commands(settings: Settings) -> list[Command]:
    """The README's block of commands, and what goes with it, each with what cuts its work."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    stages = readme.partition("## The five stages")[2].partition("\n## ")[0]
    work = small_work(settings)
    commands = []
    for line in re.findall(r"^python (.+)$", stages, re.MULTILINE):
        script, *arguments = shlex.split(line)
        commands.append(Command(script, arguments, work.get(Path(script).name, [])))
    for line in ALSO:
        script, *arguments = shlex.split(line)
        commands.append(Command(script, [], arguments + work.get(Path(script).name, [])))
    return commands


def small_work(settings: Settings) -> dict[str, list[str]]:
    """By script, the flags that leave it little to do."""
    training = "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"
    training += f" --max_steps {settings.steps}" + ("" if find_spec("wandb") else " --report_to none")
    decoding = f"--num_prompts {settings.num_prompts} --max_new_tokens {settings.max_new_tokens}"
    flags = {
        "tldr_data_process_partial.py": "--num_comparisons 8 --num_validation_comparisons 4",
        "tldr_partial_reward_model.py": f"{training} --per_device_eval_batch_size 1 --eval_entries 4",
        "GPT2_large_DPO_tldr.py": training,
        "PARGS_baselines.py": f"{decoding} --k {settings.k} --best_of {settings.k}",
        "GPT4_eval_tldr.py": "--dry_run",
        "prefix_accuracy.py": "--num_pairs 2 --num_examples 1",
    }
    return {script: shlex.split(line) for script, line in flags.items()}


def value_of(commands: list[Command], script: str, flag: str) -> int:
    """The number that the README gives a flag of a script."""
    (command,) = (command for command in commands if command.script.endswith(script))
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument(f"--{flag}", dest="value", type=int, required=True)
    return parser.parse_known_args(command.arguments)[0].value


# Measured here


def rehearse(commands: list[Command], work: Path, layers: int, num_prompts: int) -> list[dict]:
    """A row for each command, run in `work` one after the other."""
    # In a process of its own: what this one once held would count as held by those that it starts.
    maker = get_context("spawn").Process(target=make_models, args=(work, layers))
    maker.start()
    maker.join()
    if maker.exitcode:
        fail("the models could not be made")
    posts = f"--train_pairs 24 --validation_pairs 12 --test_posts {2 * num_prompts}"
    run(work, [str(ROOT / "demo/make_posts.py"), ".", *posts.split()])

    rows = []
    for command in progress_bar(commands, "commands", "command"):
        before = disk_use(work)
        seconds, gigabytes = run(work, [str(ROOT / command.script), *command.arguments, *command.changes])
        measured = {"s": seconds, "peak GB": gigabytes, "written GB": (disk_use(work) - before) / 1e9}
        rows.append(command.shown() | measured)
    return rows


def run(work: Path, command: list[str]) -> tuple[float, float]:
    """Run a script to its end: seconds, and the most memory that it held, in GB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    log, started = work / "log", time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this one child
    seconds, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)

    said = log.read_text(errors="replace")
    if process.returncode:
        print(said[-2000:], file=sys.stderr)
        fail(f"{command[0]} ended with {process.returncode}")
    for line in re.findall("^warning: (.+)", said, re.MULTILINE):
        warn(f"{Path(command[0]).name}: {line}")
    return seconds, usage.ru_maxrss * 1024 / 1e9  # Linux counts in kB


def disk_use(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


# Expected on a GPU


def expect_stages(commands: list[Command]) -> list[Expected]:
    """The stages that load models, at the README's batch sizes, the real depth and the longest inputs."""
    policy, reward_model = paper_configs(layers=0)
    reward, dpo = "tldr_partial_reward_model.py", "GPT2_large_DPO_tldr.py"
    pairs = {script: value_of(commands, script, "per_device_train_batch_size") for script in (reward, dpo)}
    lengths = {script: value_of(commands, script, "max_length") for script in (reward, dpo)}
    longest = lengths[reward]
    return [
        expect_reward_training(reward_model, 2 * pairs[reward], longest),
        expect_dpo(policy, 2 * pairs[dpo], lengths[dpo], value_of(commands, dpo, "lora_r")),
        *(
            expect_decoding(policy, reward_model, size, budget, longest)
            for size, budget in TOKEN_BUDGETS.items()
        ),
        expect_likelihood(policy, longest),
        expect_prefix_accuracy(reward_model, longest),
    ]


def num_parameters(kind: Any, config: GPT2Config | DebertaV2Config) -> int:
    with torch.device("meta"):  # the shapes alone
        return kind.from_config(config).num_parameters()


def expect_reward_training(config: DebertaV2Config, sequences: int, length: int) -> Expected:
    """Stage 2 under bf16 autocast: weights, gradients and both moments of Adam are fp32, 16 bytes a weight.

    So says accelerate's `estimate-memory`, too (4 x the model), which leaves activations out.
    """
    weights = num_parameters(AutoModelForSequenceClassification, config)
    tokens, hidden, inner = sequences * length, config.hidden_size, config.intermediate_size

    # Checkpointing keeps what enters each layer, and what the embeddings' norm read and gave; in fp32, as
    # autocast has layer norms.
    kept = (config.num_hidden_layers + 2) * tokens * hidden * FULL
    # One layer is computed again. In half precision: what enters q, k and v (3 x hidden), these (3), the
    # scaled keys, the context twice, the attention's output, what enters the MLP, and both sides of its GELU;
    # for each sequence the keys and queries of the positions. In fp32: two sums and two norms.
    layer = tokens * (11 * hidden * HALF + 4 * hidden * FULL + 2 * inner * HALF)
    layer += sequences * 2 * (2 * config.position_buckets) * hidden * HALF
    # For each head, query and key, eager attention holds in fp32 the softmax, what entered it and a gradient.
    scores = sequences * config.num_attention_heads * length**2 * 3 * FULL
    # When all of that is gone, Adam's step has a temporary as large as the weights: torch documents it for
    # the "foreach" form, the default on a GPU.
    return Expected(
        "2 partial reward model",
        f"{sequences} sequences of {length} tokens",
        weights=weights * FULL,
        gradients=weights * FULL,
        optimizer=2 * weights * FULL,
        activations=max(kept + layer + scores, weights * FULL),
    )


def expect_dpo(config: GPT2Config, sequences: int, length: int, rank: int) -> Expected:
    """Stage 3 under fp16 autocast: fp32 weights; gradients and RMSprop's average are the adapter's."""
    weights = num_parameters(AutoModelForCausalLM, config)
    tokens, hidden, inner = sequences * length, config.n_embd, 4 * config.n_embd
    # PEFT adapts GPT-2's `c_attn`, from hidden to q, k and v.
    adapter = config.n_layer * rank * (hidden + 3 * hidden)

    # TRL checkpoints unless it is told not to. Residual stream and norms are fp32.
    kept = (config.n_layer + 2) * tokens * hidden * FULL
    # One block, computed again. In half precision: what enters the adapter, q, k, v and the context
    # (5 x hidden); in fp32 the second norm's input and its gradient. GPT-2's GELU is a chain of products in
    # which `pow` makes autocast go on in fp32: six numbers at its backward, and one in half precision.
    block = tokens * (5 * hidden * HALF + 2 * hidden * FULL + inner * (6 * FULL + HALF))
    # Autocast's copies of the block's frozen weights, 12 x hidden^2, wait for the backward.
    block += 12 * hidden**2 * HALF
    # TRL projects onto the vocabulary in tiles of 32,768 entries and never holds all logits.
    tile = (tokens + hidden) * 32768 * HALF
    return Expected(
        "3 DPO",
        f"{sequences} sequences of {length} tokens",
        weights=(weights + adapter) * FULL,
        gradients=adapter * FULL,
        optimizer=adapter * FULL,
        activations=kept + max(block, tile),
    )


def expect_decoding(
    policy: GPT2Config, reward_model: DebertaV2Config, size: str, budget: int, length: int
) -> Expected:
    """Stage 4: policy and guide in fp16, the evaluator in fp32, caches, and the guide reading what it may."""
    of_policy = num_parameters(AutoModelForCausalLM, policy)
    of_rewards = num_parameters(AutoModelForSequenceClassification, reward_model)
    # Keys and values of each layer; more prompts than fit wait. Best-of-n has ten times as many responses.
    needed = NUM_PROMPTS * (length + NEW_TOKENS) * 2 * policy.n_layer * policy.n_embd * HALF
    return Expected(
        f"4 decoding, on a GPU of {size}",
        f"{NUM_PROMPTS} prompts; {budget:,} tokens of {length} at once",
        weights=of_policy * HALF + of_rewards * (HALF + FULL),
        caches=min(needed, CACHE_BYTES),
        activations=scoring_bytes(reward_model, budget, length, HALF),
    )


def scoring_bytes(config: DebertaV2Config, tokens: int, length: int, width: int) -> int:
    """Activations of a DeBERTa that reads `tokens` in sequences of `length`, in numbers of `width` bytes."""
    hidden = config.hidden_size
    # transformers' DeBERTa keeps what every layer puts out until the pass ends.
    kept = (config.num_hidden_layers + 1) * tokens * hidden
    # In the last layer: q, k, v, the scaled keys; for each sequence the keys and queries of the positions.
    projected = 4 * tokens * hidden + tokens // length * 2 * (2 * config.position_buckets) * hidden
    # For each head, query and key: the content's score, the position's part by key and by query, the latter
    # scaled, and their sum.
    scores = 5 * tokens * config.num_attention_heads * length
    return (kept + projected + scores) * width


def expect_likelihood(config: GPT2Config, length: int) -> Expected:
    """Stage 5, `show_result.py --policy`: the logits of whole texts in fp32."""
    tokens = LIKELIHOOD_BATCH * (length + NEW_TOKENS)
    return Expected(
        "5 show_result.py --policy",
        f"{LIKELIHOOD_BATCH} sequences of {length + NEW_TOKENS} tokens",
        weights=num_parameters(AutoModelForCausalLM, config) * FULL,
        activations=tokens * (config.vocab_size + config.n_embd) * FULL,
    )


def expect_prefix_accuracy(config: DebertaV2Config, length: int) -> Expected:
    """Stage 5, `prefix_accuracy.py`: both reward models in fp32."""
    return Expected(
        "5 prefix_accuracy.py",
        f"{ACCURACY_BUDGET:,} tokens of {length} at once",
        weights=2 * num_parameters(AutoModelForSequenceClassification, config) * FULL,
        activations=scoring_bytes(config, ACCURACY_BUDGET, length, FULL),
    )


# The tables


def expected_table(stages: list[Expected]) -> pd.DataFrame:
    """In GB."""
    rows = []
    for stage in stages:
        parts = {name: value / 1e9 for name, value in vars(stage).items() if isinstance(value, int | float)}
        rows.append({"stage": stage.stage, "reads": stage.what} | parts | {"together": sum(parts.values())})
    return pd.DataFrame(rows)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    commands = readme_commands(settings)
    if settings.directory and not Path(settings.directory).is_dir():
        fail(f"--directory {settings.directory!r} is no folder")
    if not settings.expected_only:
        with TemporaryDirectory(dir=settings.directory) as work:
            rows = rehearse(commands, Path(work), settings.layers, settings.num_prompts)
        depths = [config.num_hidden_layers for config in paper_configs(settings.layers)]
        print(
            f"GPT2-large of {depths[0]} layers, DeBERTa-v3-large of {depths[1]}; {torch.get_num_threads()} "
            f"threads, torch {torch.__version__}, transformers {transformers.__version__}\n"
        )
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1f"), end="\n\n")
    print("Expected on a GPU, not measured; GB, without the CUDA context (about 0.5) and fragmentation:\n")
    print(expected_table(expect_stages(commands)).to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    main()
