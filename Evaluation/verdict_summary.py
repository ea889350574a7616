"""What the verdicts on two methods add up to: win, tie and loss, and how far the judge goes by position."""

from collections import Counter
from typing import Any

from judge import Verdict

from pargs.statistics import proportion

LABELS = {
    "win": "A wins",
    "tie": "tie",
    "loss": "A loses",
    "win_without_ties": "A wins, ties left out",
    "orders_disagree": "orders disagree (a tie)",
    "first_shown_preferred": "prefers the first shown",
}


def preferred(verdict: Verdict) -> str:
    """What one verdict says: "A", "B" or "tie"."""
    difference = verdict.score_a - verdict.score_b
    return "A" if difference > 0 else "B" if difference < 0 else "tie"


def summarise(judged: list[tuple[str, Verdict, Verdict]]) -> dict[str, Any]:
    """Count what the verdicts say. `judged`: per pair its prompt, the verdict with A first, the one with B.

    A pair whose two verdicts disagree is a tie. Position bias is the share of the verdicts with a
    preference that prefer the summary shown first: as every pair is shown both ways round, it is a half
    where there is no bias.
    """
    outcomes = []
    disagree = first_preferred = decided = 0
    for prompt, ab, ba in judged:
        when_a_first, when_b_first = preferred(ab), preferred(ba)
        agreed = when_a_first if when_a_first == when_b_first else "tie"
        outcomes.append({"prompt": prompt, "outcome": {"A": "win", "B": "loss", "tie": "tie"}[agreed]})

        disagree += when_a_first != when_b_first
        first_preferred += (when_a_first == "A") + (when_b_first == "B")
        decided += (when_a_first != "tie") + (when_b_first != "tie")

    pairs = len(judged)
    count = Counter(row["outcome"] for row in outcomes)
    verdicts = [verdict for _, ab, ba in judged for verdict in (ab, ba)]
    return {
        "pairs": pairs,
        "win": proportion(count["win"], pairs),
        "tie": proportion(count["tie"], pairs),
        "loss": proportion(count["loss"], pairs),
        "win_without_ties": proportion(count["win"], count["win"] + count["loss"]),
        "orders_disagree": proportion(disagree, pairs),
        "first_shown_preferred": proportion(first_preferred, decided),
        "mean_score_a": sum(verdict.score_a for verdict in verdicts) / len(verdicts),
        "mean_score_b": sum(verdict.score_b for verdict in verdicts) / len(verdicts),
        "served_models": sorted({verdict.served_model for verdict in verdicts}),
        "input_tokens": sum(verdict.input_tokens for verdict in verdicts),
        "output_tokens": sum(verdict.output_tokens for verdict in verdicts),
        "outcomes": outcomes,
    }


def print_summary(summary: dict) -> None:
    print(f"\nA = {summary['file_a']}, B = {summary['file_b']}")
    print(f"{summary['pairs']} pairs, judged in both orders by {', '.join(summary['served_models'])}")
    for name, label in LABELS.items():
        share = summary[name]
        line = f"  {label:<24} {share['count']:>4} of {share['of']:<4}"
        if share["of"]:
            line += " {rate:6.1%}  95% Wilson interval {low:.1%} to {high:.1%}".format(**share)
        print(line)

    print(f"  mean score               A {summary['mean_score_a']:.2f}, B {summary['mean_score_b']:.2f}")
    print("  (without position bias, half of the verdicts with a preference prefer the first shown)")
    if summary["unjudged"]:
        print(
            f"  left out for want of a verdict: {len(summary['unjudged'])} pairs, named in the summary file"
        )
