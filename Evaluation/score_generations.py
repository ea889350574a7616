"""Score what the methods of a run wrote by any reward model: a column beside the table's own rewards.

Reads   the reward model; of each run baseline_results.csv, methods.json, generation_*.json, references.json.
Writes  scores_NAME.json into each run, NAME being the last part of the model's name or --name. show_result.py
        shows a column for each such file: the guide and one that guided nobody, side by side.

The rewards are those that decoding would give with this evaluation reward model, to the last digit. What is
scored already is not asked for again.

    python Evaluation/score_generations.py --reward_model partial_reward_modeling_tldr
    python Evaluation/score_generations.py runs/seed*/ --reward_model ORG/NAME --name independent
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from policy_likelihood import is_here
from run_files import Run, Score, Scores, find_template, parse_runs, read_references, read_run, read_scores
from sampled_kl import locate_model

from pargs.cli import fail, is_main, next_step, run_script, setting
from pargs.files import check_writable, write_rows
from pargs.models import RewardModel, load_reward_model, load_tokenizer
from pargs.origin import Origin, identify
from pargs.processes import describe_device, gather, join_processes, split
from pargs.runs import REFERENCE, Generation, generation_path, read_generations
from pargs.scoring import Continuation, score_finished

Answer = tuple[str, Continuation]  # a prompt and what was written for it


@dataclass
class Settings:
    reward_model: str = setting("partial_reward_modeling_tldr", "The reward model to ask.")
    name: str | None = setting(None, "Of the column; if not given, the last part of the model's name.")
    dataset: str = setting("summarize_from_feedback", "Dataset with the reference summaries.")


def name_column(settings: Settings) -> str:
    name = settings.name or Path(settings.reward_model).resolve().name
    if not name or "/" in name:
        fail(f"--name {name!r} is to be part of a file name")
    return name


def collect_answers(run: Run, reward_model: RewardModel, dataset: str) -> dict[str, list[Answer]]:
    """What each method wrote for the prompts of the run's table, and the references."""
    # Chat prompts stand in the table as text; what was written for them keeps their turns.
    prompts: dict[str, str] = {prompt: prompt for prompt in run.rewards.index.get_level_values("prompt")}
    answers = {}
    for method in run.responses:
        rows = [
            row for row in read_generations(generation_path(method, run.directory)) if row.prompt in prompts
        ]
        keep_ids = reads_ids(run, method, rows, reward_model)
        prompts |= {row.prompt: row.asked for row in rows}
        answers[method] = [(row.asked, Continuation.written(row, keep_ids)) for row in rows]
    references = read_references(run, dataset)
    answers[REFERENCE] = [
        (asked, Continuation(references[prompt][0], True))
        for prompt, asked in prompts.items()
        if prompt in references
    ]
    return answers


def reads_ids(run: Run, method: str, rows: list[Generation], reward_model: RewardModel) -> bool:
    """Whether the reward model reads the ids that the method's policy wrote, as in decoding."""
    record = run.methods.get(method)
    if not reward_model.causal or record is None or any(row.ids is None for row in rows):
        return False
    policy = locate_model(record.method.policy, run.directory)
    if not is_here(policy):
        run.note(f"{method}: its policy, {record.method.policy!r}, is not here; its text is encoded again")
        return False
    return reward_model.shares_ids_with(load_tokenizer(policy))


def score_run(
    run: Run, reward_model: RewardModel, known: dict[tuple[str, str, str], float], settings: Settings
) -> list[Score]:
    """The reward of every answer of a run; of those that are not known every process scores its share."""
    records = [run.methods[method] for method in map(str, run.rewards) if method in run.methods]
    limits = [record.max_new_tokens for record in records]
    template = find_template(run, records, settings.dataset)
    scores = []
    for method, answers in collect_answers(run, reward_model, settings.dataset).items():
        unknown = [answer for answer in answers if (method, answer[0], answer[1].text) not in known]
        own = split(unknown)
        prompts, continuations = [prompt for prompt, _ in own], [continuation for _, continuation in own]
        reserved = max(limits, default=0) + 1
        rewards = gather(score_finished(reward_model, prompts, continuations, template, reserved, method))
        asked = zip(unknown, rewards, strict=True)
        found = known | {(method, prompt, answer.text): reward for (prompt, answer), reward in asked}
        scores += [
            Score(method=method, prompt=prompt, result=answer.text, reward=found[method, prompt, answer.text])
            for prompt, answer in answers
        ]
    return scores


def save_scores(path: Path, scores: Scores) -> None:
    head = json.dumps(scores.model_dump(exclude={"scores"}), ensure_ascii=False)
    rows = [score.model_dump() for score in scores.scores]
    write_rows(path, rows, head=f'{head[:-1]}, "scores": ', tail="}")


def main() -> None:
    settings, directories = parse_runs(Settings, __doc__, "Run directories; the current one by default.")
    join_processes()
    name = name_column(settings)
    runs = [read_run(Path(directory)) for directory in directories]
    for run in runs:
        check_writable(run.directory)

    device, hint = join_processes().device, "name another with --reward_model"
    model = settings.reward_model
    # Responses are read one at a time, whatever the budget.
    reward_model = load_reward_model(model, torch.float32, device, token_budget=1, hint=hint)
    identity = identify(model, reward_model.model.config)
    for run in runs:
        path = run.directory / f"scores_{name}.json"
        earlier = read_scores(path) if path.exists() else None
        if earlier and earlier.reward_model != model:
            fail(f"{path} holds the scores of {earlier.reward_model!r}; name another column with --name")
        known = earlier.rewards() if earlier and earlier.identity == identity else {}
        scores = score_run(run, reward_model, known, settings)
        if not is_main():
            continue
        kept = sum((score.method, score.prompt, score.result) in known for score in scores)
        origin = earlier.origin if earlier and kept == len(scores) else Origin.of(settings, describe_device())
        save_scores(path, Scores(reward_model=model, identity=identity, origin=origin, scores=scores))
        for note in run.notes:
            print(f"- {note}")
        print(f"wrote {path}: {len(scores)} rewards, {kept} of them known before")
    if is_main():
        several = [*directories, "--sweep"] if len(directories) > 1 else directories
        next_step("Evaluation/show_result.py", *(several if directories != ["."] else []))


if __name__ == "__main__":
    run_script(main, "the same command starts again")
