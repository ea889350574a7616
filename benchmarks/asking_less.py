"""What a guided method would save by asking for fewer candidates, and what it would lose.

Reads   a run that was decoded with `--trace`: methods.json and trace_*.jsonl. Needs no models.
Writes  a table for each guided method, to standard output.

Two rules leave candidates out before the guide is asked: a gap g keeps those whose log-probability is within
g nats of the best, a mass p keeps one while the probability before it is below p. Where one is left, nothing
is asked. What a step loses is the total variation distance between the method's distributions over the
candidates with and without the rule; for a greedy method that is 1 where its token changes, else 0. Each step
is looked at behind the tokens that were really chosen: once a token changes, later steps differ. Means are
those of the prompts' means, with 95% bootstrap intervals over prompts.

    python benchmarks/asking_less.py --run runs/demo
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field, FiniteFloat, PositiveFloat, PositiveInt
from scipy.special import softmax

from pargs.cli import fail, parse_settings, setting
from pargs.files import DECODE
from pargs.runs import METHODS_FILE, Method, Trace, read_methods, read_traces, trace_path
from pargs.statistics import bootstrap_interval

Mass = Annotated[float, Field(gt=0, lt=1)]
Rule = Callable[[np.ndarray], np.ndarray]  # from log-probabilities to which are kept, both [steps, k]


@dataclass
class Settings:
    run: str = setting(".", "The run's directory.")
    gaps: list[PositiveFloat] = setting([1.0, 2.0, 3.0, 4.0], "Gaps g, in nats.")
    masses: list[Mass] = setting([0.8, 0.9, 0.99], "Masses p.")
    weight: FiniteFloat | None = setting(None, "Another w than the run's, along the run's own tokens.")
    resamples: PositiveInt = setting(10_000, "Bootstrap resamples.")
    seed: int = setting(0, "Of the bootstrap.")


@dataclass
class Steps:
    """All steps of one method."""

    prompts: np.ndarray  # [steps], the number of the prompt
    log_probs: np.ndarray  # [steps, k], the highest first
    rewards: np.ndarray  # [steps, k]
    chosen: np.ndarray  # [steps]


def collect_steps(traces: list[Trace], name: str) -> Steps:
    steps = [(at, step) for at, trace in enumerate(traces) for step in trace.steps]
    if len({len(step.tokens) for _, step in steps}) != 1:
        fail(f"the trace of {name} has no steps, or not the same number of candidates at each")
    # What JSON cannot hold is null: a log-probability may be -inf, a reward is a number.
    log_probs = np.array([step.log_probs for _, step in steps], dtype=float)
    rewards = np.array([step.rewards for _, step in steps], dtype=float)
    if np.isnan(rewards).any():
        again = f"`{DECODE} --trace`, without --candidate_gap"
        fail(f"the trace of {name} has a candidate without a reward; make it again with {again}")
    return Steps(
        prompts=np.array([at for at, _ in steps]),
        log_probs=np.nan_to_num(log_probs, nan=-np.inf, neginf=-np.inf),
        rewards=rewards,
        chosen=np.array([step.chosen for _, step in steps]),
    )


def within_gap(log_probs: np.ndarray, gap: float) -> np.ndarray:
    return log_probs >= log_probs[:, :1] - gap


def within_mass(log_probs: np.ndarray, mass: float) -> np.ndarray:
    probs = np.exp(log_probs)
    return probs.cumsum(1) - probs < mass


def rules(settings: Settings) -> dict[str, Rule]:
    gaps = {f"gap {gap:g}": partial(within_gap, gap=gap) for gap in settings.gaps}
    return gaps | {f"mass {mass:g}": partial(within_mass, mass=mass) for mass in settings.masses}


def choose_again(steps: Steps, method: Method, weight: float | None) -> np.ndarray:
    """The method's distribution over the candidates of each step, [steps, k]; a greedy one's is 0 or 1."""
    scores = steps.log_probs + (method.weight if weight is None else weight) * steps.rewards
    if not method.greedy:
        return softmax(scores, axis=1)
    best = steps.chosen if weight is None else scores.argmax(1)
    return np.eye(scores.shape[1])[best]


def mean_of_prompts(values: np.ndarray, steps: Steps, settings: Settings) -> tuple[float, float, float]:
    """The mean over prompts of their steps' means, and its interval."""
    means = pd.Series(values).groupby(steps.prompts).mean().to_numpy()
    return float(means.mean()), *bootstrap_interval(means, settings.resamples, settings.seed)


def measure_rule(
    keep: Rule, steps: Steps, distribution: np.ndarray, greedy: bool, settings: Settings
) -> dict[str, str]:
    """One row of the table."""
    kept = keep(steps.log_probs)
    num_kept = kept.sum(1)
    asked = np.where(num_kept > 1, num_kept, 0)
    lost = (distribution * ~kept).sum(1)  # the rest of the mass is shared out among those kept

    mean, low, high = mean_of_prompts(asked, steps, settings)
    loss, loss_low, loss_high = mean_of_prompts(lost, steps, settings)
    row = {
        "kept a step": f"{mean_of_prompts(num_kept, steps, settings)[0]:.2f}",
        "asked a step": f"{mean:.2f} ({low:.2f} to {high:.2f})",
        "fewer reads": f"{kept.shape[1] / mean:.2f} x" if mean else "all",
        "steps that ask nothing": f"{mean_of_prompts(num_kept == 1, steps, settings)[0]:.1%}",
    }
    if greedy:
        return row | {"tokens that change": f"{loss:.2%} ({loss_low:.2%} to {loss_high:.2%})"}
    return row | {
        "distance, mean": f"{loss:.4f} ({loss_low:.4f} to {loss_high:.4f})",
        "distance, 95%": f"{np.quantile(lost, 0.95):.3f}",
    }


def describe(name: str, method: Method, steps: Steps, distribution: np.ndarray, weight: float | None) -> str:
    """What the method is, how far its choices lie below the top, and how far rewards lie apart."""
    chosen = distribution.argmax(1) if method.greedy else steps.chosen
    below = steps.log_probs[:, 0] - steps.log_probs[np.arange(len(chosen)), chosen]
    apart = np.ptp(steps.rewards, axis=1)
    used = method.weight if weight is None else weight
    return (
        f"{name}: {'greedy' if method.greedy else 'sampled'}, w = {used:g}, "
        f"{len(np.unique(steps.prompts))} prompts, {len(chosen)} steps of {steps.rewards.shape[1]} candidates"
        f".\nA chosen token lay below the most probable by at most {below.max():.2f} nats (99% of them: "
        f"{np.quantile(below, 0.99):.2f}; {(below == 0).mean():.1%} were the most probable). Rewards of a "
        f"step's candidates lie {apart.mean():.2f} apart (95%: {np.quantile(apart, 0.95):.2f})."
    )


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    directory = Path(settings.run)
    guided = {name: each.method for name, each in read_methods(directory).items() if each.method.guide}
    traces = {name: read_traces(trace_path(name, directory)) for name in guided}
    if not any(traces.values()):
        fail(
            f"{directory / METHODS_FILE} has no guided method with a trace; make one with `{DECODE} --trace`"
        )

    for name, method in guided.items():
        if not traces[name]:
            print(f"{name}: no trace\n")
            continue
        steps = collect_steps(traces[name], name)
        distribution = choose_again(steps, method, settings.weight)
        rows = {
            rule: measure_rule(keep, steps, distribution, method.greedy, settings)
            for rule, keep in rules(settings).items()
        }
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("rule")
        print(f"{describe(name, method, steps, distribution, settings.weight)}\n")
        print(f"{table.to_markdown(disable_numparse=True)}\n")


if __name__ == "__main__":
    main()
