"""Measure the paper's claim in the demo's world: what prefix training does, when, and by how much.

Reads   the models in demo/models.
Writes  in --output_dir: data, reward models of every kind and seed, and, of each piece of the study, a JSON;
        then the tables and figures of docs/claim.md, to --docs_dir.

The pieces run side by side, --workers at a time, one thread each; the same command goes on where it was
stopped. Reward models are trained on training posts; the test posts are decoded once, and nothing is chosen
by what comes out, except the one response that is shown token by token.

    PYTHONPATH=PARGS_decode:Evaluation:demo python benchmarks/claim/study.py
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arms import (
    ENCODER_KINDS,
    NUM_PAIRS,
    SEEDS,
    causal_arms,
    choose_best,
    decode_arms,
    decode_unguided,
    encoder_arms,
    rank_prefixes,
)
from candidates import follow_example, judge_candidates, judge_joints
from claim_figures import report
from datasets import load_from_disk
from pydantic import PositiveInt
from reward_models import pretrain_encoder, train_full
from tqdm import tqdm
from train_models import RATES

from pargs.cli import fail, parse_settings, setting
from pargs.files import write_text

ROOT = Path(__file__).parents[2]
DEMO_MODELS = ROOT / "demo/models"
CAUSAL_KINDS = ("full", "last", "partial", "partial-from-full")
# All lengths of so many comparisons; or so many lengths of more.
ENCODER_COMPARISONS, ENCODER_LENGTHS = 300, 4


@dataclass
class Settings:
    output_dir: str = setting("runs/claim", "Where data, models and results go.")
    docs_dir: str = setting("docs/claim", "Where tables and figures go.")
    workers: PositiveInt = setting(2, "Pieces that run side by side.")


@dataclass(frozen=True)
class Piece:
    """One part of the study: done where `output` exists, possible where all of `needs` do."""

    output: Path
    work: Callable[..., Any]
    arguments: tuple
    needs: tuple[Path, ...] = ()


# Data and reward models


def run_stage(script: str, directory: Path, *arguments: Any) -> None:
    """Run a script of this repository in a directory; its output is shown only where it fails."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def make_data(data: Path) -> None:
    """Posts, comparisons, and the prefix datasets that reward models are trained on."""
    data.mkdir(parents=True, exist_ok=True)
    run_stage("demo/make_posts.py", data, ".")
    run_stage("DataProcess/tldr_data_process.py", data)

    prefixes, encoder = "DataProcess/tldr_data_process_partial.py", DEMO_MODELS / "full-reward-model"
    for count in NUM_PAIRS:
        flags = ["--num_comparisons", count, "--output", f"causal-{count}"]
        run_stage(prefixes, data, "--reward_model", DEMO_MODELS / "summariser", *flags)

    def of_encoder(name: str, count: int, lengths: int) -> None:
        flags = ["--num_comparisons", count, "--lengths_per_comparison", lengths, "--output", name]
        run_stage(prefixes, data, "--reward_model", encoder, *flags)

    of_encoder("encoder-full", 0, 1)  # its comparisons alone are read
    of_encoder("encoder-partial", ENCODER_COMPARISONS, 0)
    num_entries = len(load_from_disk(str(data / "encoder-partial"))["train"])
    of_encoder("encoder-partial-few", num_entries // ENCODER_LENGTHS, ENCODER_LENGTHS)
    (data / "done").touch()


def train_partial(dataset: Path, start: Path, output: Path, seed: int, rates: dict[str, Any]) -> None:
    """Stage 2."""
    flags = [
        *("--dataset", dataset, "--model_name_or_path", start, "--output_dir", output.with_suffix(".tmp")),
        *("--seed", seed, "--gradient_accumulation_steps", 1, "--gradient_checkpointing", False),
        *("--eval_strategy", "no", "--eval_on_start", False, "--save_strategy", "no", "--report_to", "none"),
        *(part for name, value in rates.items() for part in (f"--{name}", value)),
    ]
    run_stage("partial_reward_training/tldr_partial_reward_model.py", output.parent, *flags)
    os.rename(output.with_suffix(".tmp"), output)


# The pieces


def plan(out: Path) -> list[Piece]:
    """All pieces of the study, in an order in which they can be done one after another."""
    data, models, results = out / "data", out / "models", out / "results"
    policy, body = DEMO_MODELS / "summariser", out / "models/encoder-body"
    same = RATES | {"num_train_epochs": 2, "learning_rate": 3e-4}
    gentle = {"num_train_epochs": 1, "learning_rate": 1e-4, "per_device_train_batch_size": 32}
    strong = same | {"learning_rate": 1e-3}

    def model(kind: str, seed: int) -> Path:
        return models / f"{kind}-s{seed}"

    pieces = [Piece(data / "done", make_data, (data,))]
    made = (data / "done",)

    # Decoder-only: the same pairs, updates and rates for all that start from the policy.
    for seed in SEEDS:
        whole = data / f"causal-{NUM_PAIRS[-1]}"
        full, partial, from_full = (model(kind, seed) for kind in ("full", "partial", "partial-from-full"))
        pieces += [
            Piece(full, train_full, (whole, policy, full, seed, same), made),
            Piece(partial, train_partial, (whole, policy, partial, seed, same), made),
            Piece(
                model("last", seed), train_full, (whole, policy, model("last", seed), seed, same, False), made
            ),
            Piece(from_full, train_partial, (whole, full, from_full, seed, same), (full,)),
        ]
        for count in NUM_PAIRS[:-1]:
            few = data / f"causal-{count}"
            for kind, train in (("full", train_full), ("partial", train_partial)):
                folder = model(f"{kind}-{count}", seed)
                pieces.append(Piece(folder, train, (few, policy, folder, seed, same), made))

    pieces.append(Piece(results / "unguided.json", decode_unguided, (data, results / "unguided.json"), made))
    for seed in SEEDS:
        needs = tuple(model(kind, seed) for kind in CAUSAL_KINDS)
        needs += tuple(model(f"{kind}-{n}", seed) for kind in ("full", "partial") for n in NUM_PAIRS[:-1])
        for name, arms in causal_arms(models, seed).items():
            output = results / f"causal-{name}-s{seed}.json"
            pieces.append(Piece(output, decode_arms, (data, arms, "encoder", output), needs))
        output, choosers = results / f"best-causal-s{seed}.json", ("full", "partial")
        arguments = (data, models, choosers, seed, output)
        pieces.append(Piece(output, choose_best, arguments, (*needs, results / "unguided.json")))
        output = results / f"prefixes-causal-s{seed}.json"
        pieces.append(Piece(output, rank_prefixes, (data, models, CAUSAL_KINDS, seed, output), needs))
    needs = tuple(model(kind, seed) for kind in CAUSAL_KINDS for seed in SEEDS)
    for name, judge in (("candidates", judge_candidates), ("joints", judge_joints)):
        output = results / f"{name}.json"
        pieces.append(Piece(output, judge, (data, models, output), needs))
    output = results / "example.json"
    needs = (results / "causal-greedy-s1.json",)
    pieces.append(Piece(output, follow_example, (data, models, results, output), needs))

    # Encoder: one body, which has learned to read but has seen no preference.
    pieces.append(Piece(body, pretrain_encoder, (body,), made))
    for seed in SEEDS:
        full = model("encoder-full", seed)
        pieces.append(Piece(full, train_full, (data / "encoder-full", body, full, seed, strong), (body,)))
        for kind in ENCODER_KINDS[1:]:
            folder = model(kind, seed)
            arguments = (data / kind, full, folder, seed, gentle)
            pieces.append(Piece(folder, train_partial, arguments, (full,)))
    for seed in SEEDS:
        needs = tuple(model(kind, seed) for kind in ENCODER_KINDS)
        output = results / f"best-encoder-s{seed}.json"
        arguments = (data, models, ENCODER_KINDS[:1], seed, output)
        pieces.append(Piece(output, choose_best, arguments, (*needs, results / "unguided.json")))
        output = results / f"prefixes-encoder-s{seed}.json"
        pieces.append(Piece(output, rank_prefixes, (data, models, ENCODER_KINDS, seed, output), needs))
    for seed in SEEDS:
        needs = tuple(model(kind, seed) for kind in ENCODER_KINDS)
        for name, arms in encoder_arms(models, seed).items():
            output = results / f"encoder-{name}-s{seed}.json"
            pieces.append(Piece(output, decode_arms, (data, arms, "causal", output), needs))
    return pieces


def run_piece(piece: Piece) -> float:
    """Do a piece in a process of its own; returns its seconds."""
    started = time.perf_counter()
    piece.output.parent.mkdir(parents=True, exist_ok=True)
    piece.work(*piece.arguments)
    return time.perf_counter() - started


def use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def run_pieces(pieces: list[Piece], workers: int, log: Path) -> None:
    """Do what is not done yet, `workers` pieces at a time, each as soon as it is possible."""
    # Also of the stages that pieces start. A GPU would train some reward models in bf16 and others not.
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    left = [piece for piece in pieces if not piece.output.exists()]
    seconds = json.loads(log.read_text()) if log.exists() else {}
    running: dict[Future[float], Piece] = {}
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, use_one_thread) as pool,
        tqdm(total=len(left), unit="piece") as bar,
    ):
        while left or running:
            possible = [piece for piece in left if all(path.exists() for path in piece.needs)]
            for piece in possible[: workers - len(running)]:
                left.remove(piece)
                running[pool.submit(run_piece, piece)] = piece
            if not running:
                missing = sorted({str(path) for piece in left for path in piece.needs if not path.exists()})
                fail(f"no piece makes {', '.join(missing)}")
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                piece = running.pop(future)
                seconds[piece.output.name] = round(future.result(), 1)
                write_text(log, json.dumps(seconds, indent=1))
                bar.set_postfix_str(piece.output.name)
                bar.update()


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    out = Path(settings.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run_pieces(plan(out), settings.workers, out / "seconds.json")
    report(out, Path(settings.docs_dir))


if __name__ == "__main__":
    main()
