"""Measure the paper's claim on real text: small pretrained models, human preferences, human summaries.

Reads   a policy, an encoder and three sources of real text, each a hub name or a local folder.
Writes  in --output_dir: pair datasets, reward models of every kind and seed, decoded runs, and a JSON of each
        piece; then the tables and figures of docs/claim.md, to --docs_dir.

Three questions are put to a reward model, each by pairs of responses to one prompt:

  relevance  a post's human summary against another post's; the truth is known
  hh         which answer of a dialogue a human preferred
  judged     which summary of a post a human preferred; only if asked for with --tasks

For each, a model of whole responses (`full`) and one of all prefixes (`partial`) are trained on the same
pairs with the same updates, seed by seed; held-out posts are decoded with those of relevance. The same
command goes on where it was stopped; nothing is chosen by what comes out.

    PYTHONPATH=DataProcess:PARGS_decode:Evaluation:demo python benchmarks/claim/real_text.py
"""

import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from arms import prefix_lengths
from datasets import Dataset, DatasetDict, load_from_disk
from prefix_accuracy import PERCENTAGES
from pydantic import PositiveInt
from real_figures import report
from real_models import freeze, prefix_rewards, read_questions, train_evaluator, train_top, tune_policy
from sources import load_source
from study import Piece, run_pieces, run_stage
from tldr_data_process import format_prompt, format_response

from pargs.cli import fail, parse_settings, setting
from pargs.encoding import encode_texts
from pargs.files import NOTES, read_template, write_text
from pargs.models import load_reward_model
from pargs.prefixes import SIDES
from pargs.scoring import score_pairs

TRAINING_SEEDS = (1, 2, 3)
SAMPLING_SEEDS = (11, 12)
RATE = 5e-5
EPOCHS = {"relevance": 1, "judged": 2, "hh": 2}
LONGEST = {"hh": 256}  # tokens of a prompt and a response, else 512
NUM_POSTS = {"test": 50, "validation": 100, "train": 400, "evaluator": 240}
OTHERS = {"train": 3, "validation": 4, "evaluator": 5}  # other posts' summaries for each post
MOST_PAIRS = 4000  # to train on: the frozen outputs of all of a hub's dataset fit nowhere
NEW_TOKENS = 48
GAPS: tuple[float | None, ...] = (None, 3.0, 2.0)
NUM_OTHER_POSTS = 9  # that a response is held against


@dataclass
class Settings:
    policy: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", "Policy, and start of its guides.")
    encoder: str = setting("sentence-transformers/all-MiniLM-L6-v2", "Start of the evaluator.")
    comparisons: str = setting("openai/summarize_from_feedback", "Judged summaries.")
    test_posts: str = setting("CarperAI/openai_summarize_tldr", "Posts with human summaries.")
    dialogues: str = setting("Anthropic/hh-rlhf", "Judged answers.")
    tasks: list[str] = setting(["relevance", "hh"], "Questions to put; only relevance decodes posts.")
    output_dir: str = setting("runs/real_text", "Where data, models and results go.")
    docs_dir: str = setting("docs/claim", "Where tables and figures go.")
    workers: PositiveInt = setting(2, "Pieces that run side by side, one thread each.")


# Data


def make_judged(comparisons: str, test_posts: str, data: Path) -> None:
    """Stage 1: `judged` has the comparisons, and the test posts with their references."""
    sources = ("--comparisons", comparisons, "--test_posts", test_posts)
    run_stage("DataProcess/tldr_data_process.py", data.parent, *sources, "--output", data)


def make_relevance(comparisons: str, judged: Path, output: Path) -> None:
    """Each post's human summary against those of other posts; test, held-out and training posts are apart."""
    posts = human_summaries(comparisons, judged)
    random.Random(0).shuffle(posts)
    groups, at = {}, 0
    for name, count in NUM_POSTS.items():
        groups[name], at = posts[at : at + count], at + count

    prompts, references = zip(*groups.pop("test"), strict=True)
    test = Dataset.from_dict({"prompt": prompts, "reference": references})
    pairs = {name: pair_posts(group, OTHERS[name]) for name, group in groups.items()}
    for folder, train in ((output.with_name("evaluator"), "evaluator"), (output, "train")):
        work = folder.with_suffix(".tmp")
        DatasetDict(train=pairs[train], validation=pairs["validation"], test=test).save_to_disk(str(work))
        shutil.copy(judged / NOTES, work)
        os.rename(work, folder)


def human_summaries(comparisons: str, judged: Path) -> list[tuple[str, str]]:
    """Prompt and human summary of the test posts, and of the judged posts one of whose summaries is human."""
    test: Any = load_from_disk(str(judged))["test"]
    found, template = dict(zip(test["prompt"], test["reference"], strict=True)), read_template(str(judged))
    with tempfile.TemporaryDirectory() as cache:
        source = load_source(comparisons, "comparisons", cache)
        for row in chain(source["train"], source["validation"]):
            human = [summary["text"] for summary in row["summaries"] if summary["policy"] == "ref"]
            prompt, dropped = format_prompt({"post": row["info"]["post"]}, template)
            if human and human[0].strip() and not dropped:
                found[prompt] = format_response(human[0], template)
    return list(found.items())


def pair_posts(posts: list[tuple[str, str]], others: int) -> Dataset:
    draw, rows = random.Random(0), []
    for at, (prompt, reference) in enumerate(posts):
        rest = [other for number, (_, other) in enumerate(posts) if number != at]
        rows += [
            {"prompt": prompt, "chosen": reference, "rejected": other} for other in draw.sample(rest, others)
        ]
    draw.shuffle(rows)
    return Dataset.from_list(rows)


def make_dialogues(dialogues: str, output: Path) -> None:
    script, shares = (
        "DataProcess/preference_data_process.py",
        ("--validation_share", 0.17, "--test_share", 0.02),
    )
    source = ("--source", dialogues, "--split", "test")
    run_stage(script, output.parent, *source, *shares, "--output", output)


def encode(dataset: Path, start: str, output: Path) -> None:
    """Stage 1's second script, with every pair that is short enough."""
    longest = LONGEST.get(dataset.name, 512)
    counts = ("--num_comparisons", MOST_PAIRS, "--num_validation_comparisons", 400, "--max_length", longest)
    script = "DataProcess/tldr_data_process_partial.py"
    run_stage(
        script, output.parent, "--dataset", dataset, "--reward_model", start, *counts, "--output", output
    )


# Ranking


def rank(reward_model: Path, dataset: Path, output: Path) -> None:
    """For each held-out pair, at each tenth and for both readings: is the chosen prefix's reward higher?

    `right` has a row a pair, None where both prefixes are the same; `prompts` says which pairs share one.
    """
    model = load_reward_model(str(reward_model), torch.bfloat16, "cpu", token_budget=4096)
    right: dict[str, list] = {"finished": [], "always": []}
    prompts, numbers = [], {}
    for question in read_questions(dataset, "validation"):
        number = numbers.setdefault(tuple(question.prompt_ids), len(numbers))
        chosen, *others = question.responses
        of_pairs = [prefix_lengths(max(len(chosen), len(other))) for other in others]
        lengths = [sum(of_pairs, []), *of_pairs]
        for reading, (of_chosen, *of_others) in prefix_rewards(model, question, lengths).items():
            for at, (other, ends) in enumerate(zip(others, of_pairs, strict=True)):
                own = of_chosen[at * len(ends) : (at + 1) * len(ends)]
                right[reading].append(
                    [
                        None if chosen[:end] == other[:end] else one > two
                        for end, one, two in zip(ends, own, of_others[at], strict=True)
                    ]
                )
        prompts += [number] * len(others)
    write_text(output, json.dumps({"percentages": list(PERCENTAGES), "prompts": prompts, "right": right}))


def check_evaluator(evaluator: Path, dataset: Path, output: Path) -> None:
    """How the evaluator ranks the held-out pairs of whole responses."""
    model = load_reward_model(str(evaluator), torch.float32, "cpu", token_budget=4096)
    pairs: Any = load_from_disk(str(dataset / "pairs"))["validation"]
    rewards = [score_pairs(model, pairs["prompt_ids"], pairs[f"{side}_ids"], 0) for side in SIDES]
    write_text(output, json.dumps((rewards[0] > rewards[1]).tolist()))


# Decoding


def decode(run: Path, policy: Path, data: Path, evaluator: Path, *flags: Any) -> None:
    """Stage 4 on the test posts, in a directory that appears when all of it is done."""
    work = run.with_suffix(".tmp")
    work.mkdir(parents=True, exist_ok=True)
    models = ("--policy", policy, "--evaluation_reward_model", evaluator, "--dataset", data)
    # bfloat16, for the time of a CPU; the rewards that are reported are in fp32.
    limits = ("--num_prompts", 0, "--max_new_tokens", NEW_TOKENS, "--dtype", "bfloat16")
    run_stage("PARGS_decode/PARGS_baselines.py", work, *models, *limits, *flags)
    os.rename(work, run)


def hold_against_others(run: Path, evaluator: Path, data: Path, output: Path) -> None:
    """For each response: does the evaluator prefer it for its own post to each of 9 others?"""
    model = load_reward_model(str(evaluator), torch.float32, "cpu", token_budget=4096)
    prompts, draw = load_from_disk(str(data))["test"]["prompt"], random.Random(0)
    others = {
        prompt: draw.sample([other for other in prompts if other != prompt], NUM_OTHER_POSTS)
        for prompt in prompts
    }
    results = {}
    for path in sorted(run.glob("generation_*.json")):
        rows = json.loads(path.read_text())
        asked = [(post, row["result"]) for row in rows for post in (row["prompt"], *others[row["prompt"]])]
        rewards = score_texts(model, asked).view(len(rows), 1 + NUM_OTHER_POSTS)
        results[path.stem] = (rewards[:, :1] > rewards[:, 1:]).all(1).tolist()
    write_text(output, json.dumps(results))


def score_texts(model: Any, asked: list[tuple[str, str]]) -> torch.Tensor:
    prompt_ids, response_ids = (
        encode_texts(model.tokenizer, list(texts)) for texts in zip(*asked, strict=True)
    )
    return score_pairs(model, prompt_ids, response_ids, NEW_TOKENS + 1)


# The pieces


def plan(settings: Settings) -> list[Piece]:
    out = Path(settings.output_dir).resolve()
    data, models, results, runs = (out / name for name in ("data", "models", "results", "runs"))
    policy_start, encoder_start = here(settings.policy), here(settings.encoder)
    comparisons, test_posts = here(settings.comparisons), here(settings.test_posts)

    pieces = [
        Piece(data / "judged", make_judged, (comparisons, test_posts, data / "judged")),
        Piece(
            data / "relevance",
            make_relevance,
            (comparisons, data / "judged", data / "relevance"),
            (data / "judged",),
        ),
    ]
    for task in settings.tasks:
        if task == "hh":
            pieces.append(Piece(data / task, make_dialogues, (here(settings.dialogues), data / task)))
        encoded, frozen = data / f"{task}-encoded", data / f"{task}-frozen.safetensors"
        pieces.append(Piece(encoded, encode, (data / task, policy_start, encoded), (data / task,)))
        pieces.append(Piece(frozen, freeze, (encoded, policy_start, frozen), (encoded,)))
        for seed in TRAINING_SEEDS:
            for kind in ("full", "partial"):
                model = models / f"{task}-{kind}-s{seed}"
                how = (policy_start, kind, EPOCHS[task], RATE, seed, model)
                pieces.append(Piece(model, train_top, (encoded, frozen, *how), (frozen,)))
                output = results / f"{model.name}.json"
                pieces.append(Piece(output, rank, (model, encoded, output), (model,)))
        if task == "relevance":
            pieces += decoding_pieces(data, models, results, runs, policy_start, encoder_start)
    return pieces


def decoding_pieces(
    data: Path, models: Path, results: Path, runs: Path, policy_start: str, encoder_start: str
) -> list[Piece]:
    """The policy, the evaluator, and the test posts decoded with the guides of relevance."""
    tuned, evaluator, posts = models / "policy", models / "evaluator", data / "relevance"
    for_evaluator = data / "evaluator"
    encoded = for_evaluator.with_name("evaluator-encoded")
    held_out = results / "evaluator.json"
    pieces = [
        Piece(tuned, tune_policy, (posts, policy_start, tuned, 1, 5e-4), (posts,)),
        Piece(encoded, encode, (for_evaluator, encoder_start, encoded), (posts,)),
        Piece(evaluator, train_evaluator, (encoded, encoder_start, evaluator, 1, 1e-4), (encoded,)),
        Piece(held_out, check_evaluator, (evaluator, encoded, held_out), (evaluator,)),
    ]

    def run(name: str, *flags: Any, needs: tuple[Path, ...] = ()) -> None:
        output = results / f"relevant-{name}.json"
        arguments = (runs / name, tuned, posts, evaluator, *flags)
        pieces.append(Piece(runs / name, decode, arguments, (tuned, evaluator, *needs)))
        pieces.append(
            Piece(output, hold_against_others, (runs / name, evaluator, posts, output), (runs / name,))
        )

    for seed in SAMPLING_SEEDS:
        run(f"unguided-{seed}", "--methods", "TOP-K", "GREEDY", "--seed", seed)
    for seed in TRAINING_SEEDS:
        full, partial = (models / f"relevance-{kind}-s{seed}" for kind in ("full", "partial"))
        guides = ("--full_reward_model", full, "--partial_reward_model", partial, "--trace")
        run(f"greedy-s{seed}", *guides, "--methods", "ARGS", "PARGS-G", needs=(full, partial))
        # In bfloat16 cached rewards of closed prefixes are too far off: stage 4 would read each afresh.
        closed = ("--methods", "ARGS", "--args_eos", "always", "--dtype", "float32")
        run(f"closed-s{seed}", *guides, *closed, needs=(full, partial))
        for sampling_seed in SAMPLING_SEEDS:
            sampled = ("--methods", "PARGS", "--seed", sampling_seed)
            run(f"sampled-s{seed}-{sampling_seed}", *guides, *sampled, needs=(full, partial))

    # What truncation alone does to samples, for docs/benchmarks.md: one seed of each.
    full, partial = (models / f"relevance-{kind}-s1" for kind in ("full", "partial"))
    guides = ("--full_reward_model", full, "--partial_reward_model", partial)
    sampled = ("--methods", "TOP-K", "PARGS", "BESTN", "--best_of", 4, "--seed", SAMPLING_SEEDS[0])
    for gap in GAPS:
        rule = ("--candidate_gap", gap) if gap else ()
        run(f"gap-{gap:g}" if gap else "gap-none", *guides, *sampled, *rule, needs=(full, partial))
    return pieces


def here(name: str) -> str:
    """A local folder by its whole path, for stages run elsewhere; a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if unknown := [task for task in settings.tasks if task not in EPOCHS]:
        fail(f"--tasks knows {', '.join(EPOCHS)}, not {', '.join(unknown)}")
    out = Path(settings.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run_pieces(plan(settings), settings.workers, out / "seconds.json")
    report(out, Path(settings.docs_dir))


if __name__ == "__main__":
    main()
