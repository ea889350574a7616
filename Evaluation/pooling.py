"""Which runs may be pooled in one table, and how a sweep stands in one: side by side where runs differ."""

from collections import defaultdict
from pathlib import Path

import pandas as pd
from run_files import Run
from sampled_kl import locate_model

from pargs.cli import fail
from pargs.runs import METHODS_FILE, REFERENCE

ALIKE_IN_A_SWEEP = ("evaluator", "template")  # else the rewards would not be of one kind
Facts = dict[str, tuple[object, str]]  # by name: what is compared, and what is shown


def facts_of(run: Run, method: str) -> Facts:
    """All that a method's record says of how it decoded and was scored, but for the seed."""
    record = run.methods[method]
    named = record.method.model_dump(exclude={"policy", "guide", "chooser"})
    named |= record.model_dump(include={"k", "max_new_tokens", "template", "dtype", "fast_attention"})
    # Where a record says None of these, it is older than they are; of the gap it says that there is none.
    facts: Facts = {name: (value, str(value)) for name, value in named.items() if value is not None}
    facts["candidate_gap"] = (record.candidate_gap, str(record.candidate_gap or "none"))
    own = record.method
    models = {"policy": own.policy, "guide": own.guide, "chooser": own.chooser, "evaluator": record.evaluator}
    for role, name in models.items():
        if name:
            identity = record.models.get(name)
            shown = Path(name).name + (f"@{identity[:8]}" if identity else "")
            facts[role] = (identity or locate_model(name, run.directory), shown)
    return facts


def differences(runs: dict[str, Run]) -> dict[str, dict[str, dict[str, str]]]:
    """By method and fact, what it is in each run; of those facts that are not the same in all."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for method in dict.fromkeys(method for run in runs.values() for method in run.rewards):
        facts = {name: facts_of(run, method) for name, run in runs.items() if method in run.methods}
        facts = {name: own for name, own in facts.items() if method in runs[name].rewards}
        names = dict.fromkeys(fact for own in facts.values() for fact in own)
        found[method] = {
            fact: {name: own[fact][1] for name, own in facts.items() if fact in own}
            for fact in names
            if len({own[fact][0] for own in facts.values() if fact in own}) > 1
        }
    return found


def check_alike(runs: dict[str, Run], sweep: bool = False) -> None:
    """Exit, naming all of it, where runs differ in settings, models or prompts, which a sweep may in most."""
    of_rows, of_tables = defaultdict(list), defaultdict(list)  # what a sweep may differ in, and what not
    different = differences(runs)
    for method, facts in different.items():
        for fact, values in facts.items():
            said = ", ".join(f"{value} in {name}" for name, value in values.items())
            (of_tables if fact in ALIKE_IN_A_SWEEP else of_rows)[f"{fact}: {said}"].append(method)
    rows, tables = (
        [f"{reason} ({', '.join(methods)})" for reason, methods in reasons.items()]
        for reasons in (of_rows, of_tables)
    )
    tables += other_scorers(runs) + other_prompts(runs)
    found = tables if sweep else rows + tables
    if not (found or sweep):
        found = same_samples(runs)
    if not found:
        return

    ways = "" if sweep or tables else "--sweep gives each setting a row of its own, "
    if any("evaluator" in facts for facts in different.values()):
        again = "decode again with one --evaluation_reward_model (what is written is only scored anew)"
        ways = f"rewards of two models are not of one scale: {again}; "
    fail(f"these runs differ in {'; '.join(found)}. {ways}--pool_anyway pools them all the same")


def other_scorers(runs: dict[str, Run]) -> list[str]:
    """Scores of one name that two reward models gave."""
    found = []
    for scorer in dict.fromkeys(scorer for run in runs.values() for scorer in run.scores):
        asked = {name: run.scores[scorer] for name, run in runs.items() if scorer in run.scores}
        if len({scores.identity or scores.reward_model for scores in asked.values()}) > 1:
            said = ", ".join(f"{scores.reward_model} in {name}" for name, scores in asked.items())
            found.append(f"the reward model of the scores {scorer!r}: {said}")
    return found


def other_prompts(runs: dict[str, Run]) -> list[str]:
    """Runs with other prompts than the first."""
    first, *others = runs.values()
    prompts, found = set(first.rewards.index), []
    for run in others:
        if set(run.rewards.index) != prompts:
            common = len(prompts & set(run.rewards.index))
            found.append(f"prompts: {run.directory} has {common} of the {len(prompts)} of {first.directory}")
    return found


def same_samples(runs: dict[str, Run]) -> list[str]:
    """Runs that are no second sample of the same prompts, as their seed is the same."""
    seen: dict[tuple[str, int], str] = {}
    for name, run in runs.items():
        for method in run.rewards:
            record = run.methods.get(method)
            if record is None or record.seed is None or record.method.greedy:
                continue
            if other := seen.get((method, record.seed)):
                return [f"nothing that is drawn: {method} has the seed {record.seed} in {other} and {name}"]
            seen[method, record.seed] = name
    return []


def note_unknown(runs: dict[str, Run]) -> None:
    """Note the methods of which no record says whether they may be pooled."""
    for run in runs.values():
        unknown = [str(method) for method in run.rewards if method not in (*run.methods, REFERENCE)]
        if unknown:
            run.note(f"{METHODS_FILE} does not say what {', '.join(unknown)} was: pooled all the same")


def seed_of(run: Run, method: str) -> int:
    """The seed of a method's samples; what draws none stands beside those of the run that do."""
    in_table = [run.methods[other] for other in map(str, run.rewards) if other in run.methods]
    own = [run.methods[method]] if method in run.methods else []
    sampled = [record for record in in_table if not record.method.greedy]
    records = own if own and not own[0].method.greedy else [*sampled, *own, *in_table]
    seeds = [record.seed for record in records if record.seed is not None]
    if not seeds or (method != REFERENCE and method not in run.methods):
        fail(f"{run.directory / METHODS_FILE} does not say with what {method} was decoded: a sweep needs it")
    return seeds[0]


def label_sweep(runs: dict[str, Run]) -> tuple[dict[str, Run], pd.DataFrame]:
    """The runs with a method of its own for each setting, and their rewards by (seed, prompt, copy).

    E.g. "ARGS (weight 0.5)", named by what differs between the runs. The same method with the same seed
    stands in several runs of a sweep over another method's weight: it counts once.
    """
    varying = differences(runs)
    labelled, columns = {}, defaultdict(dict)
    for name, run in runs.items():
        names, repeated = {}, []  # of this run: own name by label
        for method in map(str, run.rewards):
            own = [f"{fact} {values[name]}" for fact, values in varying[method].items() if name in values]
            label, seed = f"{method} ({', '.join(own)})" if own else method, seed_of(run, method)
            if seed in columns[label]:
                repeated += [label] * (method != REFERENCE)
                continue
            columns[label][seed] = run.rewards[method]
            names[label] = method
        if repeated:
            run.note(f"{', '.join(repeated)}: in another run with the same seed, too; counted once")
        labelled[name] = Run(
            run.directory,
            run.rewards[list(names.values())].set_axis(list(names), axis="columns"),
            {label: run.methods[own] for label, own in names.items() if own in run.methods},
            {label: run.responses[own] for label, own in names.items() if own in run.responses},
            run.scores,
            names,
            run.notes,
        )
    methods = list(varying)
    order = sorted(columns, key=lambda label: methods.index(label.partition(" (")[0]))
    order.sort(key=lambda label: label == REFERENCE)
    pooled = {label: pd.concat(columns[label], names=["run"]) for label in order}
    return labelled, pd.DataFrame(pooled)[order]
