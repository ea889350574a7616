"""The result table against hand computations, from small files written here."""

import json
import os
import shutil
import subprocess
import sys
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import show_generations
import show_result
import torch
from conftest import ROOT, save
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from policy_likelihood import Pair, encode_texts_again, response_log_probs
from response_measures import distinct_n, rouge_l
from run_files import index_by_prompt, read_run
from sampled_kl import trace_log_probs
from small_runs import (
    CSV,
    PROMPTS,
    read_page,
    refuse,
    run_script,
    trace_step,
    write_generations,
    write_records,
    write_references,
    write_rewards,
    write_trace,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pargs.figures import GREY, PALETTE
from pargs.files import write_whole
from pargs.models import Policy, encode_for_policy, load_policy
from pargs.runs import Cost, Method, Step, read_methods, write_methods
from pargs.statistics import bootstrap_interval

OUTPUTS = {f"average_reward.{kind}" for kind in ("csv", "md", "tex", "png", "pdf")}
NUMBERS = [1, 2, 3, 4]
STEPS = [
    trace_step(("a", -1.0, 0.0), ("b", -2.0, 1.0), chosen=1),
    trace_step(("c", -0.5, 0.5), ("d", -3.0, 0.5), chosen=0),
]


def log_q_of_steps(weight: float) -> float:
    """log q of STEPS: their scores are (-1, -2 + w) and (-0.5 + w/2, -3 + w/2)."""
    return -log(1 + exp(1 - weight)) - log(1 + exp(-2.5))


LOG_P = -2.5  # of STEPS, under the policy that proposed them


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that the script made; they are not saved, which takes most of its time."""
    figures: list[Figure] = []
    monkeypatch.setattr(show_result, "save_figure", lambda figure, path: figures.append(figure))
    return figures


@pytest.fixture
def report(tmp_path, capsys, drawn):
    """Run the script in `tmp_path`; returns its table and what it printed."""

    def run(*arguments: object) -> tuple[pd.DataFrame, str]:
        run_script(show_result, tmp_path, *arguments, "--output_dir", ".")
        return pd.read_csv(tmp_path / "average_reward.csv", index_col="method"), capsys.readouterr().out

    return run


# Statistics


def test_statistics_by_hand(tmp_path, report):
    write_rewards(tmp_path, ARGS=NUMBERS, PARGS=[2, 2, 5, 3], reference=[0, 0, 0, 8])
    table, printed = report()

    args = table.loc["ARGS"]
    assert (args["n"], args["mean"]) == (4, 2.5)
    assert args["standard_error"] == pytest.approx(sqrt(5 / 3) / 2)  # squares 2.25 + .25 + .25 + 2.25, over 3
    # Of the 256 resamples 5 have a mean of at most 1.25 (2.0%) and 15 of at most 1.5 (5.9%); symmetric above.
    assert (args["interval_low"], args["interval_high"]) == (1.5, 3.5)
    assert np.isnan(args["difference"]) and np.isnan(args["win_rate"])

    pargs = table.loc["PARGS"]
    assert pargs["difference"] == 0.5  # (1 + 0 + 2 - 1) / 4
    assert pargs["win_rate"] == 0.625  # two wins, a tie, a loss
    # The differences are those four rewards less 2, so their resamples are as well.
    assert (pargs["difference_low"], pargs["difference_high"]) == (-0.5, 1.5)
    assert table.loc["reference", "win_rate"] == 0.25
    assert list(table["baseline"].unique()) == ["ARGS"]
    assert "2.500 ± 0.645" in printed and "+0.500 [-0.500, +1.500]" in printed


def test_baseline_of_choice_and_by_default(tmp_path, report):
    write_rewards(tmp_path, DPO=[1, 1, 1, 1], PPO=[3, 3, 3, 2])
    assert report()[0].loc["PPO", "difference"] == 1.75
    table, printed = report("--baseline", "PPO")
    assert table.loc["DPO", "difference"] == -1.75 and "vs PPO" in printed


def test_the_seed_decides_the_bootstrap():
    values = np.random.default_rng(0).normal(size=40)
    first, again, other = (bootstrap_interval(values, 200, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert np.isnan(bootstrap_interval(values[:1], 200, 1)).all()


def test_missing_rewards_are_named_and_not_averaged(tmp_path, report):
    write_rewards(tmp_path, ARGS=NUMBERS, PARGS=[2, None, "nan", 7], DPO=[None] * 4)
    write_records(tmp_path, "base", ARGS=Method(policy="base"), PPO=Method(policy="other"))
    table, printed = report()
    assert (table.loc["PARGS", "n"], table.loc["PARGS", "mean"]) == (2, 4.5)
    assert table.loc["PARGS", "difference"] == 2  # (2 - 1 + 7 - 4) / 2: rows that both have
    assert table.loc["DPO", "n"] == 0 and np.isnan(table.loc["DPO", "mean"])
    assert "PARGS has no reward in 2 of 4 rows (row 2, 3)" in printed
    assert "DPO has no reward in 4 of 4 rows" in printed
    assert "not in baseline_results.csv: PPO" in printed
    assert "PARGS has no generation_pargs.json" in printed


def test_runs_are_pooled_by_prompt_with_their_spread(tmp_path, report):
    write_rewards(tmp_path / "seed1", ARGS=NUMBERS, PARGS=[2, 4, 4, 6])
    write_rewards(tmp_path / "seed2", ARGS=NUMBERS, PARGS=[4, 4, 6, 6])
    table, printed = report("seed1/", "seed2")

    # A method that repeats itself is no more certain for it.
    alone, _ = report("seed1")
    columns = ["n", "mean", "standard_error", "interval_low", "interval_high"]
    assert list(table.loc["ARGS", columns]) == list(alone.loc["ARGS", columns])
    assert (table.loc["ARGS", "runs"], table.loc["ARGS", "run_std"]) == (2, 0)

    # Prompts average to 3, 4, 5, 6; runs to 4 and 5.
    assert table.loc["PARGS", "mean"] == 4.5
    assert table.loc["PARGS", "standard_error"] == pytest.approx(sqrt(5 / 3) / 2)
    assert table.loc["PARGS", "run_std"] == pytest.approx(sqrt(0.5))
    assert table.loc["PARGS", "difference"] == 2
    assert "2 runs pooled" in printed and "SD of runs" in printed
    assert "SD of runs" not in (tmp_path / "average_reward.md").read_text()  # that of the single run


def test_runs_with_other_prompts_and_methods(tmp_path, report):
    write_rewards(tmp_path / "a", ARGS=NUMBERS, PARGS=[2, 2, 2, 2])
    write_rewards(tmp_path / "b", ["new 1", "new 2"], ARGS=[5, 9])
    table, printed = report("a", "b", "--pool_anyway")
    assert (table.loc["ARGS", "n"], table.loc["ARGS", "mean"]) == (6, 4)
    assert (table.loc["PARGS", "n"], table.loc["PARGS", "runs"]) == (4, 1)
    assert table.loc["PARGS", "difference"] == -0.5
    assert "b: not in baseline_results.csv: PARGS" in printed


def test_equal_prompts_count_once(tmp_path, report, drawn):
    """Decoded four times in a run, a prompt is no more certain than once."""
    texts, pargs = ["a b", "a", "b", "c"], [2, 2, 5, 3]
    for name, copies in (("once", 1), ("often", 4)):
        prompts = PROMPTS * copies
        write_rewards(tmp_path / name, prompts, ARGS=NUMBERS * copies, PARGS=pargs * copies)
        write_generations(tmp_path / name, "ARGS", texts * copies, prompts)
    once, printed = report("once")
    assert "folded" not in printed
    often, printed = report("often")
    assert "12 of 16 rows were folded" in printed
    assert "12 of 16 rows were folded" in (tmp_path / "average_reward.md").read_text()
    pd.testing.assert_frame_equal(once, often)
    assert [len(dots.get_offsets()) for dots in drawn[1].axes[0].collections] == [4, 4]

    # With its mean: the first prompt has 1 and 5, and 3 and 3, so it counts 3 to 3.
    mixed = [PROMPTS[0], *PROMPTS[:3]]
    write_rewards(tmp_path / "mixed", mixed, ARGS=[1, 5, 2, 7], PARGS=[3, 3, 2, 10])
    table, printed = report("mixed")
    assert (table.loc["ARGS", "n"], table.loc["ARGS", "mean"]) == (3, 4)
    assert table.loc["ARGS", "standard_error"] == pytest.approx(sqrt(7 / 3))  # of 3, 2 and 7
    assert table.loc["PARGS", "difference"] == 1  # (0 + 0 + 3) / 3
    assert table.loc["PARGS", "win_rate"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert "1 of 4 rows were folded" in printed

    table, printed = report("once", "mixed", "--pool_anyway")
    assert "1 of 8 rows were folded" in printed
    assert table.loc["ARGS", "run_std"] == pytest.approx(sqrt(1.125))  # of 2.5 and 4


# Texts


def test_length_diversity_and_overlap(tmp_path, report):
    write_rewards(tmp_path, ARGS=NUMBERS, reference=[1, 1, 1, 1])
    write_generations(tmp_path, "ARGS", ["The cat sat", "a b a", "a b", "!"], num_tokens=[3, 5, 2, 10])
    write_references(tmp_path, ["the cats ran away", "x", "a b"])
    table, printed = report()
    assert table.loc["ARGS", "mean_tokens"] == 5
    assert table.loc["ARGS", "distinct_1"] == pytest.approx(5 / 8)  # the cat sat a b, of 3 + 3 + 2 words
    assert table.loc["ARGS", "distinct_2"] == pytest.approx(4 / 5)  # (a, b) comes twice
    # 4/7 (2 words in common of 3 and of 4), 0 and 1; the fourth prompt has no reference.
    assert table.loc["ARGS", "rouge_l"] == pytest.approx((4 / 7 + 0 + 1) / 3)
    assert "no reference for 1 of 4 responses" in printed


def test_distinct_n_and_rouge_l_by_hand():
    assert distinct_n(["a b a", "A, b!"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "A, b!"], 2) == pytest.approx(2 / 3)
    assert np.isnan(distinct_n(["word"], 2))
    the_better_reference = rouge_l(["one two three"], [["three", "one three"]])
    assert the_better_reference == [pytest.approx(0.8)]


def test_responses_are_matched_by_prompt_not_by_place(tmp_path, report):
    odd = ["NA", 'quote " and,\r\nbreak', "twice", "twice"]
    write_rewards(tmp_path, odd, ARGS=NUMBERS)
    texts, order = ["text 0", "text 1", "text 2", "text 3"], [odd[at] for at in (3, 1, 0, 2)]
    write_generations(tmp_path, "ARGS", texts, order)
    assert list(read_run(tmp_path).responses["ARGS"]["result"]) == ["text 2", "text 1", "text 0", "text 3"]

    write_generations(tmp_path, "ARGS", texts[:3], [order[0], *order[2:]])
    _, printed = report()
    assert "generation_args.json has no response for 1 of 4 rows (row 2) of baseline_results.csv" in printed


# What the records say


def test_who_marked_each_method(tmp_path, report):
    """A path of the run's directory, one from here and one from the root may be the same model."""
    (tmp_path / "run/full").mkdir(parents=True)
    (tmp_path / "partial").mkdir()
    methods = {
        "ARGS": Method(policy="base", guide=str(tmp_path / "run/full"), weight=1),
        "PARGS": Method(policy="base", guide="partial", weight=1),
        "BESTN": Method(policy="base", best_of=3, chooser="./full/"),
        "TOP_K": Method(policy="base"),
    }

    def marks(*runs: str) -> dict[str, str]:
        table, printed = report(*runs, "--pool_anyway")
        assert "Scored by: what the model" in printed
        rows = [line.split("|") for line in (tmp_path / "average_reward.md").read_text().splitlines()]
        at = [cell.strip() for cell in rows[0]].index("Scored by")
        shown = {row[1].strip(): row[at].strip() for row in rows[2:] if len(row) > at}
        assert shown.pop("reference") == "–" and pd.isna(table.loc["reference", "evaluator_was"])
        assert shown == table["evaluator_was"].drop("reference").fillna("–").to_dict()
        return shown

    for name in ("run", "other"):
        write_rewards(tmp_path / name, **dict.fromkeys(methods, NUMBERS), reference=NUMBERS)
    write_records(tmp_path / "run", "base", evaluator="full", **methods)
    another = {name.replace("_", "-"): "another model" for name in methods}
    by_full = another | {"ARGS": "its guide", "BESTN": "its chooser"}
    assert marks("run") == by_full
    shutil.copy(tmp_path / "average_reward.csv", tmp_path / "run")
    run_script(show_generations, tmp_path / "run")
    page = read_page(tmp_path / "run")["table"]
    column = [row[page["columns"].index("Scored by")] for row in page["rows"]]
    assert column == ["its guide", "another model", "its chooser", "another model", "–"]

    write_records(tmp_path / "other", "base", evaluator=str(tmp_path / "partial"), **methods)
    assert marks("other") == another | {"PARGS": "its guide"}
    assert marks("run", "other") == dict.fromkeys(another, "mixed") | {"TOP-K": "another model"}
    write_records(tmp_path / "other", "base", evaluator=str(tmp_path / "run/full"), **methods)
    assert marks("run", "other") == by_full | {"BESTN": "mixed"}  # the other run has no ./full/

    write_records(tmp_path / "other", "base", **methods)  # an older record does not say it
    assert marks("run", "other") == dict.fromkeys(another, "mixed")
    table, printed = report("other")
    assert "evaluator_was" not in table and "Scored by" not in printed


def test_costs_by_hand(tmp_path, report):
    def cost(responses: int, seconds: float, tokens: int, calls: int) -> Cost:
        return Cost(responses=responses, seconds=seconds, tokens=tokens, reward_calls=calls, reward_tokens=0)

    methods = {
        "ARGS": Method(policy="base", guide="full", weight=1),
        "BESTN": Method(policy="base", best_of=3, chooser="full"),
        "TOP_K": Method(policy="base"),
        "DPO": Method(policy="tuned"),
    }
    costs = {
        "ARGS": cost(2, 3.0, 10, 120),  # a launch that went on with an earlier one and wrote two of four
        "BESTN": cost(12, 2.0, 60, 12),  # of 60 tokens written 20 are delivered
        "TOP_K": cost(4, 0.5, 20, 0),
        "DPO": cost(0, 0.0, 0, 0),  # whose last launch found everything written
    }
    columns = ["reward_calls_per_token", "seconds_per_prompt"]
    for name in ("a", "b"):
        write_rewards(tmp_path / name, **dict.fromkeys(methods, NUMBERS), reference=NUMBERS)
        write_generations(tmp_path / name, "BESTN", ["w x y z u"] * 4)
        write_records(tmp_path / name, "base", costs=costs, **methods)
    table, printed = report("a")
    assert list(table.loc["ARGS", columns]) == [12, 1.5]
    assert list(table.loc["BESTN", columns]) == [pytest.approx(12 / 20), 0.5]
    assert list(table.loc["TOP-K", columns]) == [0, 0.125]
    assert table.loc[["DPO", "reference"], columns].isna().all(axis=None)
    assert "per token delivered; Seconds / prompt" in printed
    (row,) = [
        line for line in (tmp_path / "average_reward.tex").read_text().splitlines() if "BESTN &" in line
    ]
    assert row.endswith(r"& 0.60 & 0.5 \\")

    # Pooled: the mean of the runs that have a cost. Samples of an earlier launch were chosen among as well.
    costs["BESTN"], costs["TOP_K"] = cost(9, 2.0, 45, 12), cost(4, 1.5, 20, 0)
    write_records(tmp_path / "b", "base", costs=costs, **methods)
    table, printed = report("a", "b")
    assert list(table.loc["TOP-K", columns]) == [0, 0.25]
    assert list(table.loc["BESTN", columns]) == [pytest.approx(0.6), 0.5]
    assert "b: no cost of BESTN: its last launch wrote other responses than these" in printed

    (tmp_path / "b/methods.json").unlink()
    table, printed = report("b")
    assert not {*columns} & {*table} and "Seconds / prompt" not in printed


# Several runs


def write_sweep(directory: Path, drawn: tuple[float, ...] = (1.0, 3.0), evaluator: str = "judge") -> None:
    """Two weights of ARGS by two seeds; PARGS is the same for either weight, and better with seed 2."""
    for weight in drawn:
        for seed in (1, 2):
            run = directory / f"w{weight:.0f}-s{seed}"
            write_rewards(run, ARGS=[weight + at for at in range(4)], PARGS=[seed] * 4, reference=[9] * 4)
            methods = {
                "ARGS": Method(policy="base", guide="full", weight=weight, greedy=True),
                "PARGS": Method(policy="base", guide="partial", weight=2.0),
            }
            write_records(run, "base", evaluator=evaluator, seed=seed, **methods)


def test_runs_of_other_settings_are_not_pooled(tmp_path, report, capsys):
    """But those that differ in the seed of the sampling are; what differs is said by name."""
    write_sweep(tmp_path)
    table, _ = report("w1-s1", "w1-s2")
    assert table.loc["PARGS", "run_std"] == pytest.approx(sqrt(0.5)) and table.loc["ARGS", "run_std"] == 0

    said = refuse(show_result, tmp_path, capsys, "w1-s1", "w3-s1")
    assert "differ in weight: 1.0 in w1-s1, 3.0 in w3-s1 (ARGS). --sweep" in said and "PARGS" not in said
    assert report("w1-s1", "w3-s1", "--pool_anyway")[0].loc["ARGS", "mean"] == 3.5

    write_sweep(tmp_path / "other", evaluator="other judge")
    write_records(tmp_path / "w1-s2", "base", seed=2, max_new_tokens=4, ARGS=Method(policy="tuned"))
    said = refuse(show_result, tmp_path, capsys, "w1-s1", "w1-s2", "other/w1-s1")
    for change in (
        "max_new_tokens: 8 in w1-s1, 4 in w1-s2",
        "evaluator: judge in w1-s1, other judge in other",
    ):
        assert change in said
    write_rewards(tmp_path / "few", PROMPTS[:3], ARGS=[1, 2, 3])
    assert "prompts: few has 3 of the 4 of w1-s1" in refuse(show_result, tmp_path, capsys, "w1-s1", "few")


def test_a_sweep_is_one_table(tmp_path, report, capsys):
    """A row for each weight, pooled over seeds; what a weight does not change counts once a seed."""
    write_sweep(tmp_path)
    names = ["w1-s1", "w1-s2", "w3-s1", "w3-s2"]
    table, printed = report(*names, "--sweep")
    assert list(table.index) == ["ARGS (weight 1.0)", "ARGS (weight 3.0)", "PARGS", "reference"]
    assert list(table["runs"]) == [2, 2, 2, 2] and list(table["mean"]) == [2.5, 4.5, 1.5, 9]
    assert table.loc["ARGS (weight 3.0)", "difference"] == 2
    assert table.loc["PARGS", "run_std"] == pytest.approx(sqrt(0.5))
    assert "w3-s2: PARGS: in another run with the same seed, too; counted once" in printed

    write_sweep(tmp_path, drawn=(3.0,), evaluator="other judge")
    assert "evaluator: judge in w1-s1" in refuse(show_result, tmp_path, capsys, *names, "--sweep")
    (tmp_path / "w1-s1/methods.json").unlink()
    assert "does not say with what ARGS" in refuse(show_result, tmp_path, capsys, *names[:2], "--sweep")


def test_rewards_of_two_models_and_the_same_samples_are_no_second_run(tmp_path, report, capsys):
    write_sweep(tmp_path)
    write_sweep(tmp_path / "other", evaluator="other judge")
    said = refuse(show_result, tmp_path, capsys, "w1-s1", "other/w1-s2")
    assert "decode again with one --evaluation_reward_model" in said and "--sweep" not in said

    shutil.copytree(tmp_path / "w1-s1", tmp_path / "again")
    said = refuse(show_result, tmp_path, capsys, "w1-s1", "again")
    assert "differ in nothing that is drawn: PARGS has the seed 1 in w1-s1 and again" in said


def test_methods_of_other_seeds_are_compared_by_the_means_of_their_prompts(tmp_path, report):
    """In a sweep the baseline may have other seeds: the difference is that of the means in the table."""
    write_sweep(tmp_path)
    for weight, seed in ((5.0, 3), (1.0, 1)):
        run = tmp_path / f"w{weight:.0f}-s{seed}"
        write_rewards(run, PARGS=[weight, 1, 2, 6], reference=[9] * 4)
        write_records(
            run, "base", evaluator="judge", seed=seed, PARGS=Method(policy="base", guide="p", weight=weight)
        )
    table, printed = report("w5-s3", "w1-s1", "w1-s2", "--sweep", "--baseline", "PARGS (weight 5.0, guide p)")
    row = table.drop(index=["PARGS (weight 5.0, guide p)", "reference"]).dropna(subset="difference")
    assert len(row) and "too few" not in printed
    assert list(row["difference"]) == list(row["mean"] - table.loc["PARGS (weight 5.0, guide p)", "mean"])


def test_runs_with_and_without_a_gap_are_two_settings(tmp_path, report, capsys):
    for name, gap, reward in (("all", None, 1.0), ("near", 3.0, 2.0)):
        write_rewards(tmp_path / name, ARGS=[reward] * 4)
        method = Method(policy="base", guide="full", weight=1.0, greedy=True)
        write_records(tmp_path / name, "base", seed=1, candidate_gap=gap, ARGS=method)
    said = refuse(show_result, tmp_path, capsys, "all", "near")
    assert "differ in candidate_gap: none in all, 3.0 in near (ARGS)" in said
    table, printed = report("all", "near", "--sweep")
    assert "candidate gap none, 3.0." in printed
    assert dict(table["mean"]) == {"ARGS (candidate_gap none)": 1, "ARGS (candidate_gap 3.0)": 2}


def test_in_a_sweep_a_greedy_method_stands_beside_the_samples_of_its_run(tmp_path, report):
    """Whatever seed it was recorded with: it draws nothing."""
    for weight in (1.0, 3.0):
        run = tmp_path / f"w{weight:.0f}"
        write_rewards(run, ARGS=[1, 2, 3, 4], PARGS=[weight, 2, 3, 4])
        methods = {"ARGS": Method(policy="base", guide="full", weight=1.0, greedy=True)}
        write_records(run, "base", seed=1, **methods)
        (args,) = read_methods(run).items()
        write_records(run, "base", seed=2, PARGS=Method(policy="base", guide="partial", weight=weight))
        write_methods(dict([args]) | read_methods(run), run)
    table, _ = report("w1", "w3", "--sweep")
    assert list(table.index) == ["ARGS", "PARGS (weight 1.0)", "PARGS (weight 3.0)"]
    assert list(table["difference"][1:]) == [0, 0.5]


# What is written


def test_reports_go_into_the_run_that_they_are_of(tmp_path, capsys):
    """Of several runs here, or where --output_dir says; the page follows, also where it was told to."""
    for run in "ab":
        write_rewards(tmp_path / run, ARGS=[1, 2, 3, 4], PARGS=[2, 3, 3, 5])
    run_script(show_result, tmp_path, "a")
    run_script(show_generations, tmp_path, "a")
    assert {*names_of(tmp_path / "a")} >= {"average_reward.md", "results.json", "generations.html"}
    assert names_of(tmp_path) == ["a", "b"]
    run_script(show_generations, tmp_path, "b")
    assert "make them with `python Evaluation/show_result.py b`" in capsys.readouterr().out
    run_script(show_result, tmp_path, "a", "b")
    assert "average_reward.md" in names_of(tmp_path) and "average_reward.md" not in names_of(tmp_path / "b")


def names_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_table_as_data(tmp_path, report):
    write_sweep(tmp_path)
    table, printed = report("w1-s1", "w1-s2")
    data = json.loads((tmp_path / "results.json").read_text())
    assert {method: row["mean"] for method, row in data["results"].items()} == table["mean"].to_dict()
    assert data["results"]["ARGS"]["difference"] is None
    assert data["runs"]["w1-s2"]["PARGS"]["seed"] == 2
    assert data["origin"]["settings"]["resamples"] == 9999 and data["origin"]["versions"]["pandas"]
    assert "Rewards by judge; k = 2; at most 8 new tokens; w: ARGS 1, PARGS 2." in data["caption"]
    sentence = "PARGS and ARGS are not told apart by the reward: the difference is -1.000 [-2.000, +0.000]"
    assert sentence in data["in_words"][0] and data["in_words"][0] in printed
    assert "reference is 6.500 [5.500, 7.500] above ARGS in reward." in data["in_words"]


def test_one_row_has_no_intervals(tmp_path, report):
    write_rewards(tmp_path, PROMPTS[:1], ARGS=[1.5], PARGS=[2.0])
    _, printed = report()
    markdown = (tmp_path / "average_reward.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert rows[2].count(" 1.500 |") == rows[3].count(" +0.500 |") == 1
    assert not [part for part in ("nan", "–]", "±") if part in "".join(rows)]
    assert "PARGS and ARGS: too few prompts to compare." in printed


def test_own_references_are_those_of_the_run(tmp_path, report):
    """Written by decoding; where the dataset has more for a prompt, all of them count."""
    write_rewards(tmp_path, ARGS=NUMBERS, reference=NUMBERS)
    write_generations(tmp_path, "ARGS", ["a b", "c d", "e f", "g h"])
    write_references(tmp_path, ["a b", "x"], PROMPTS[1:3])
    own = ["a b", "a b", None, None]
    rows = [{"prompt": p, "reference": r, "reward": r and 1.0} for p, r in zip(PROMPTS, own, strict=True)]
    (tmp_path / "references.json").write_text(json.dumps(rows))
    table, _ = report()
    assert table.loc["ARGS", "rouge_l"] == pytest.approx((1 + 0 + 0) / 3)
    run_script(show_generations, tmp_path)
    page = read_page(tmp_path)
    at = page["methods"].index("reference")
    assert [each["responses"][at] for each in page["prompts"]] == ["a b", "a b", "x", None]


def test_what_is_written(tmp_path):
    write_rewards(tmp_path, ARGS=NUMBERS, MY_OWN=[2, 3, 4, 5], PARGS=[1, None, 2, 2])
    (tmp_path / CSV).write_text((tmp_path / CSV).read_text().replace("MY-OWN", "my_own & co"))
    run_script(show_result, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS | {CSV, "results.json"}
    assert (tmp_path / "average_reward.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "average_reward.pdf").read_bytes().startswith(b"%PDF")
    markdown = (tmp_path / "average_reward.md").read_text(encoding="utf-8")
    assert "| PARGS" in markdown and "PARGS has no reward in 1 of 4 rows (row 2)" in markdown
    latex = (tmp_path / "average_reward.tex").read_text(encoding="utf-8")
    assert r"my\_own \& co & 4 & 3.500 ± 0.645 & [2.500, 4.500]" in latex and r"95\% interval" in latex
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert body[0].startswith(r"\begin{tabular}") and body[-1] == r"\end{tabular}"

    first = {name: (tmp_path / name).read_bytes() for name in OUTPUTS}
    run_script(show_result, tmp_path)
    assert first == {name: (tmp_path / name).read_bytes() for name in OUTPUTS}


def test_a_failed_write_leaves_what_was_there(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("old")

    def write_half(path: Path) -> None:
        path.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(SystemExit) as stopped:
        write_whole(tmp_path / "table.csv", write_half)
    assert stopped.value.code == 2
    assert (tmp_path / "table.csv").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert "disk full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "args"], "--baseline args: not in baseline_results.csv, which has ARGS"),
        (["--resamples", "0"], "--resamples should be greater than"),
        (["--seed", "-1"], "--seed should be greater than"),
        (["--no_such_flag", "1"], "unknown arguments: --no_such_flag"),
        ([".", "./"], "a run directory is named twice"),
        (["--policy", "no/such/policy"], "cannot load the tokenizer of 'no/such/policy'"),
    ],
)
def test_clear_errors(tmp_path, capsys, arguments, message):
    write_rewards(tmp_path, ARGS=NUMBERS)
    write_generations(tmp_path, "ARGS", ["a", "b", "c", "d"])
    assert message in refuse(show_result, tmp_path, capsys, *arguments)


@pytest.mark.slow
def test_no_flags_no_network_and_nothing_in_the_source_tree(tmp_path):
    write_rewards(tmp_path, ARGS=NUMBERS, PARGS=[2, 2, 5, 3])
    write_generations(tmp_path, "ARGS", ["a b", "c", "d", "e"])
    before = {path for path in (ROOT / "Evaluation").iterdir() if path.name != "__pycache__"}
    # Any name on the network resolves to a proxy that is not there.
    environment = os.environ | {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, ROOT / "Evaluation/show_result.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote average_reward.csv" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= OUTPUTS
    assert before == {path for path in (ROOT / "Evaluation").iterdir() if path.name != "__pycache__"}


# Likelihood


def pairs_of(
    policy: Policy, texts: list[str], prompts: list[str] = PROMPTS, reason="length", template="{post}"
) -> list[Pair]:
    """Prompts and texts as a policy reads them that wrote no ids of theirs."""
    rows = pd.DataFrame({"prompt": prompts, "result": texts, "finish_reason": reason})
    return encode_texts_again(policy, index_by_prompt(rows), template, max_new_tokens=8)


def log_probs_one_by_one(
    policy: Policy, prompt_ids: list[int], ids: list[int], k: int = 1, gap: float = np.inf
) -> np.ndarray:
    """Both log-probabilities of each token, [2, response]: no batch, no padding, one forward pass a token."""
    found = []
    for at, token in enumerate(ids):
        with torch.inference_mode():
            logits = policy.model(torch.tensor([prompt_ids + ids[:at]])).logits[0, -1]
        probabilities = logits.double().softmax(-1)
        top = probabilities.topk(k)
        near = top.values >= top.values[0] * np.exp(-gap)
        in_top = probabilities[token] / top.values[near].sum() * (token in top.indices[near].tolist())
        found.append([float(probabilities[token].log()), float(in_top.log())])
    return np.array(found).T


def log_p_of_texts(name: str, texts: list[str]) -> list[np.ndarray]:
    policy = load_policy(name, torch.float32, "cpu")
    return [log_probs_one_by_one(policy, *pair[:2])[0] for pair in pairs_of(policy, texts)]


def test_log_probs_of_a_padded_batch(small_models):
    policy = load_policy(small_models["gpt2"], torch.float32, "cpu")
    prompts = ["POST: short\nTL;DR:", "POST: rather longer than that\nTL;DR:", *PROMPTS[:2]]
    pairs = pairs_of(policy, [" a response", " b", " too long" * 200, ""], prompts)
    pairs[0] = pairs_of(policy, [" a response"], prompts[:1], "eos")[0]
    eos = policy.tokenizer.eos_token_id
    assert pairs[0].response_ids[-1] == eos and pairs[1].response_ids[-1] != eos

    results = response_log_probs(policy, pairs, k=40, batch_size=3, label="")
    for at in (0, 1):
        expected = log_probs_one_by_one(policy, *pairs[at][:2], k=40)
        np.testing.assert_allclose(results[at], expected, rtol=1e-4)
    assert np.isinf(results[0][1]).any() and np.isfinite(results[0][1]).any()  # both kinds were compared
    near = response_log_probs(policy, pairs[:2], k=40, batch_size=3, label="", gap=2.0)
    for at in (0, 1):
        expected = log_probs_one_by_one(policy, *pairs[at][:2], k=40, gap=2.0)
        np.testing.assert_allclose(near[at], expected, rtol=1e-4)
    assert any((near[at][1] != results[at][1]).any() for at in (0, 1))
    assert len(results[2][0]) == len(results[3][0]) == 0


def test_only_special_tokens_of_the_template_are_live(small_models):
    policy = load_policy(small_models["gpt2"], torch.float32, "cpu")
    eos = policy.tokenizer.eos_token_id
    ((prompt_ids, response_ids, _),) = pairs_of(policy, [" <|endoftext|>"], ["a<|endoftext|>b"], "eos")
    assert eos not in prompt_ids
    assert response_ids.count(eos) == 1 and response_ids[-1] == eos

    template = "{post}<|endoftext|>TL;DR:"
    ((prompt_ids, *_),) = pairs_of(policy, [" c"], ["a<|endoftext|>b<|endoftext|>TL;DR:"], template=template)
    assert prompt_ids.count(eos) == 1


def make_policy(tokenizer: PreTrainedTokenizerFast, folder: Path, eos_ids: list[int], seed: int = 0) -> str:
    """A small GPT-2 of 64 tokens' reach that may end with any of these ids."""
    torch.manual_seed(seed)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
    model.generation_config.eos_token_id = eos_ids
    return save(model, tokenizer, folder)


def write_run(directory: Path, policy: Policy, prompts: list[str], k: int = 5, limit: int = 8) -> list:
    """What TOP-K and BESTN of a policy leave: the third, the second, ... candidate; the last token is an EOS.

    Returns, per prompt, the ids of the prompt as they were read, and those of the response.
    """
    prompt_ids, _ = encode_for_policy(policy, prompts, "{post}", limit)
    written = []
    for own in prompt_ids:
        ids: list[int] = []
        for rank in (2, 1, 0, 1):
            with torch.inference_mode():
                logits = policy.model(torch.tensor([own + ids])).logits[0, -1]
            ids.append(int(logits.topk(k).indices[rank]))
        written.append(ids)
    texts = [" it is not the text that counts"] * len(prompts)
    write_rewards(directory, prompts, TOP_K=range(len(prompts)), BESTN=range(len(prompts)))
    for method in ("TOP-K", "BESTN"):
        write_generations(directory, method, texts, prompts, ids=written, finish_reason="eos", num_tokens=3)
    methods = {
        "TOP_K": Method(policy=policy.name),
        "BESTN": Method(policy=policy.name, best_of=3, chooser="full"),
    }
    write_records(directory, policy.name, k=k, max_new_tokens=limit, **methods)
    return list(zip(prompt_ids, written, strict=True))


def expected_row(policy: Policy, written: list, k: int = 5) -> tuple[float, float]:
    """Log-likelihood per token, and the KL of top-k sampling."""
    both = [log_probs_one_by_one(policy, *pair, k=k) for pair in written]
    return np.mean([log_p.mean() for log_p, _ in both]), np.mean([(q - p).sum() for p, q in both])


@pytest.mark.parametrize("words", ["bpe", "unigram"])
def test_the_ids_that_were_written_are_scored(tmp_path, report, tokenizers, words):
    """Whichever EOS ended a response, and whatever tokens its text would be encoded as."""
    tokenizer = tokenizers[words]
    before = load_policy(make_policy(tokenizer, tmp_path / "before", [1]), torch.float32, "cpu")
    ends = {ids[-1] for _, ids in write_run(tmp_path / "run", before, PROMPTS)}
    policy = load_policy(make_policy(tokenizer, tmp_path / "policy", [1, *ends]), torch.float32, "cpu")
    written = write_run(tmp_path / "run", policy, PROMPTS)
    assert all(ids[-1] in policy.eos_ids - {tokenizer.eos_token_id} for _, ids in written)

    table, printed = report("run", "--policy", policy.name)
    likelihood, kl = expected_row(policy, written)
    assert table.loc["TOP-K", "log_likelihood_per_token"] == pytest.approx(likelihood, rel=1e-4)
    assert table.loc["TOP-K", "sampled_kl"] == pytest.approx(kl, rel=1e-4) and kl > 0
    assert "encoded again" not in printed and "no value" not in printed

    # Another policy with the same vocabulary reads the same ids.
    other = load_policy(make_policy(tokenizer, tmp_path / "other", [1], seed=1), torch.float32, "cpu")
    table, printed = report("run", "--policy", other.name)
    likelihood, _ = expected_row(other, written)
    assert table.loc["TOP-K", "log_likelihood_per_token"] == pytest.approx(likelihood, rel=1e-4)
    kl = [
        log_probs_one_by_one(policy, *pair, k=5)[1].sum() - log_probs_one_by_one(other, *pair)[0].sum()
        for pair in written
    ]
    assert table.loc["TOP-K", "sampled_kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert "encoded again" not in printed and "no value" not in printed


def test_text_is_encoded_again_where_the_ids_say_nothing(tmp_path, report, tokenizers, small_models):
    policy = load_policy(make_policy(tokenizers["bpe"], tmp_path / "policy", [5, 9]), torch.float32, "cpu")
    write_run(tmp_path / "run", policy, PROMPTS)
    texts = [" ab", " abc", " b", " cab"]

    # It ended, with one of three: of the tokenizer, 5 and 9.
    assert policy.eos_ids == {0, 5, 9}
    expected = []
    for prompt_ids, ids, any_eos in pairs_of(policy, texts, reason="eos"):
        assert any_eos
        log_p = log_probs_one_by_one(policy, prompt_ids, ids[:-1])[0]
        ends = [log_probs_one_by_one(policy, prompt_ids, [*ids[:-1], eos])[0][-1] for eos in (0, 5, 9)]
        expected.append(np.mean([*log_p, np.logaddexp.reduce(ends)]))

    for method in ("TOP-K", "BESTN"):
        write_generations(tmp_path / "run", method, texts, finish_reason="eos")
    table, printed = report("run", "--policy", policy.name)
    assert table.loc["TOP-K", "log_likelihood_per_token"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert "TOP-K, BESTN: policies score the text, encoded again, for their files hold no ids" in printed

    written = write_run(tmp_path / "run", policy, PROMPTS)
    foreign = load_policy(make_policy(tokenizers["unigram"], tmp_path / "foreign", [1]), torch.float32, "cpu")
    _, printed = report("run", "--policy", foreign.name)
    assert f"for '{foreign.name}' has another vocabulary than the policy that wrote them" in printed
    (tmp_path / "run/methods.json").unlink()
    _, printed = report("run", "--policy", policy.name)
    assert "for methods.json does not say whose ids they are" in printed

    write_run(tmp_path / "run", policy, PROMPTS)
    ids = [[*own[:-1], 10**6] for _, own in written]
    write_generations(tmp_path / "run", "TOP-K", texts, ids=ids)
    with pytest.raises(SystemExit):
        report("run", "--policy", policy.name)


def test_a_prompt_is_read_as_decoding_cut_it(tmp_path, report, tokenizers):
    policy = load_policy(make_policy(tokenizers["bpe"], tmp_path / "policy", [0]), torch.float32, "cpu")
    prompts = ["POST: " + "my boss lost the keys " * 20 + at for at in "abcd"]
    written = write_run(tmp_path / "run", policy, prompts, limit=30)
    assert {len(prompt_ids) for prompt_ids, _ in written} == {64 - 30}
    table, printed = report("run", "--policy", policy.name)
    likelihood, kl = expected_row(policy, written)
    assert table.loc["TOP-K", "log_likelihood_per_token"] == pytest.approx(likelihood, rel=1e-4)
    assert table.loc["TOP-K", "sampled_kl"] == pytest.approx(kl, rel=1e-4)
    assert "no value" not in printed


# KL, by what methods.json says of each method


def test_kl_from_traces_by_hand(tmp_path, report):
    write_rewards(tmp_path, ARGS=NUMBERS, PARGS=NUMBERS, PARGS_DPO=NUMBERS, TOP_K=NUMBERS, BESTN=NUMBERS)
    write_records(
        tmp_path,
        "base",
        ARGS=Method(policy="base", guide="full", weight=1, greedy=True),
        PARGS=Method(policy="base", guide="partial", weight=2),
        PARGS_DPO=Method(policy="tuned", guide="partial", weight=2),
        TOP_K=Method(policy="base"),
        BESTN=Method(policy="base", best_of=4, chooser="full"),
    )
    for method in ("ARGS", "PARGS", "PARGS-DPO", "TOP-K", "BESTN"):
        write_generations(tmp_path, method, ["b c"] * 4)
    for method in ("ARGS", "PARGS", "PARGS-DPO"):
        write_trace(tmp_path, method, [STEPS] * 3, PROMPTS[:3])
    table, printed = report()
    assert table.loc["ARGS", "sampled_kl"] == -LOG_P  # greedy: - log p of what was chosen
    assert table.loc["PARGS", "sampled_kl"] == pytest.approx(log_q_of_steps(2.0) - LOG_P)
    assert "PARGS: KL: no value for 1 of 4 responses" in printed

    # A trace on another policy holds no log p of the reference policy.
    assert table.loc[["PARGS-DPO", "TOP-K", "BESTN"], "sampled_kl"].isna().all()
    assert "no KL for PARGS-DPO, TOP-K: it takes --policy" in printed
    assert "no KL for BESTN: the best of several samples" in printed


def test_what_a_gap_left_out_has_no_part_in_kl():
    left = Step(tokens=["a", "b", "c"], log_probs=[-1, -2, None], rewards=[0.5, 1, None], chosen=1)
    sure = Step(tokens=["a", "b", "c"], log_probs=[-0.5, None, None], rewards=[None] * 3, chosen=0)
    log_p, log_q = trace_log_probs([left, sure], Method(policy="p", guide="r", weight=2))
    assert log_p == -2.5 and log_q == pytest.approx(np.log(0.5))  # both scores of the first are 0


def test_a_run_without_records_has_its_table_and_page_but_no_kl(tmp_path, report):
    write_rewards(tmp_path, ARGS=NUMBERS)
    write_generations(tmp_path, "ARGS", ["b c"] * 4)
    write_trace(tmp_path, "ARGS", [STEPS] * 4)
    table, printed = report()
    assert table.loc["ARGS", "mean"] == 2.5 and "sampled_kl" not in table
    said = "no KL for ARGS: methods.json does not say what it was; `python PARGS_decode/PARGS_baselines.py`"
    assert said in printed and said in (tmp_path / "average_reward.md").read_text()
    run_script(show_generations, tmp_path)
    assert "ARGS" in read_page(tmp_path)["traces"]


def test_kl_reads_the_weight_and_the_k_of_the_run(tmp_path, report, tokenizers):
    """Run by run: on the same steps 1.5 nats with w = 2 and 3.0 with w = 10; and k = 5 is not k = 2."""
    policy = load_policy(make_policy(tokenizers["bpe"], tmp_path / "policy", [0]), torch.float32, "cpu")
    steps = [trace_step(("a", -3.05, 0.845), ("b", -0.05, 0.0), chosen=0)]
    found = []
    for weight, k in ((2.0, 5), (10.0, 3)):
        written = write_run(tmp_path / "run", policy, PROMPTS, k=k)
        write_rewards(tmp_path / "run", PARGS=NUMBERS, TOP_K=NUMBERS)
        write_generations(tmp_path / "run", "PARGS", ["a"] * 4, ids=[own for _, own in written])
        write_trace(tmp_path / "run", "PARGS", [steps] * 4)
        methods = {"TOP_K": Method(policy=policy.name)}
        methods["PARGS"] = Method(policy=policy.name, guide="partial", weight=weight)
        write_records(tmp_path / "run", policy.name, k=k, **methods)
        table, _ = report("run", "--policy", policy.name)
        assert table.loc["TOP-K", "sampled_kl"] == pytest.approx(
            expected_row(policy, written, k)[1], rel=1e-4
        )
        found.append(round(table.loc["PARGS", "sampled_kl"], 1))
    assert found == [1.5, 3.0]  # 3.05 - log(1 + exp(3 - 0.845 w))


def test_pooled_runs_are_measured_by_their_own_records(tmp_path, report):
    for name, weight in (("a", 1.0), ("b", 3.0)):
        directory = write_rewards(tmp_path / name, PARGS=NUMBERS)
        write_generations(directory, "PARGS", ["b c"] * 4)
        write_trace(directory, "PARGS", [STEPS] * 4)
        write_records(directory, "base", PARGS=Method(policy="base", guide="partial", weight=weight))
    table, _ = report("a", "b", "--pool_anyway")
    expected = (log_q_of_steps(1.0) + log_q_of_steps(3.0)) / 2 - LOG_P
    assert table.loc["PARGS", "sampled_kl"] == pytest.approx(expected)


def test_likelihood_and_kl_under_a_policy(tmp_path, report, small_models):
    base, tuned, texts = small_models["gpt2"], small_models["llama"], [" ab", " abc", " b", " cab"]
    methods = {
        "ARGS": Method(policy=base, guide="full", weight=1, greedy=True),
        "TOP_K": Method(policy=base),
        "DPO": Method(policy="tuned"),
        "BESTN": Method(policy=base, best_of=4, chooser="full"),
        "PARGS": Method(policy=base, guide="partial", weight=1),
    }
    write_rewards(tmp_path / "run", **dict.fromkeys(methods, NUMBERS))
    shutil.copytree(tuned, tmp_path / "run/tuned")  # a relative path is of the run's directory
    for method in methods:
        write_generations(tmp_path / "run", method.replace("_", "-"), texts)
    write_records(tmp_path / "run", base, k=420, **methods)  # the whole vocabulary: no truncation
    table, printed = report("run", "--policy", base)

    reference, other = log_p_of_texts(base, texts), log_p_of_texts(tuned, texts)
    per_token = np.mean([each.mean() for each in reference])
    assert list(table["log_likelihood_per_token"]) == pytest.approx([per_token] * 5, rel=1e-4)
    kl = table["sampled_kl"]
    assert kl["ARGS"] == pytest.approx(np.mean([-each.sum() for each in reference]), rel=1e-4)
    assert kl["TOP-K"] == pytest.approx(0, abs=1e-3)
    difference = np.mean([b.sum() - a.sum() for a, b in zip(reference, other, strict=True)])
    assert kl["DPO"] == pytest.approx(difference, rel=1e-3)
    assert np.isnan(kl["BESTN"]) and "run: no KL for BESTN" in printed
    assert (
        np.isnan(kl["PARGS"]) and "run: no KL for PARGS: it takes the trace that `--trace` keeps" in printed
    )

    shutil.rmtree(tmp_path / "run/tuned")  # what can still be measured is
    table, printed = report("run", "--policy", base)
    assert np.isnan(table.loc["DPO", "sampled_kl"]) and table.loc["ARGS", "sampled_kl"] == kl["ARGS"]
    assert "run: no KL for DPO: its policy, 'tuned', is not here" in printed

    # A text outside the top-k was not sampled with these tokens: named, not averaged.
    write_records(tmp_path / "run", base, k=1, **methods)
    _, printed = report("run", "--policy", base)
    assert "TOP-K: KL: no value for 4 of 4 responses" in printed


def test_a_method_that_nobody_knows_is_in_table_kl_figure_and_page(tmp_path, report, small_models, drawn):
    """Its row in stage 4's table is all it takes: here, what that row leaves in the run's directory."""
    base, tuned, name = small_models["gpt2"], small_models["llama"], "NOVEL-2"
    methods = {"ARGS": Method(policy=base, guide="full", weight=1, greedy=True)}
    methods[name] = Method(policy=tuned, guide="partial", weight=2)
    write_rewards(tmp_path, **dict.fromkeys(methods, NUMBERS), reference=NUMBERS)
    write_records(tmp_path, base, **methods)
    texts = [" ab", " abc", " b", " cab"]
    for method in methods:
        write_generations(tmp_path, method, texts)
        write_trace(tmp_path, method, [STEPS] * 4)

    table, printed = report("--policy", base)
    assert f"{name}  " in printed and table.loc[name, "mean_tokens"] == 1
    log_p = np.mean([each.sum() for each in log_p_of_texts(base, texts)])  # not the trace's, which is tuned's
    assert table.loc[name, "sampled_kl"] == pytest.approx(log_q_of_steps(2.0) - log_p, rel=1e-4)
    assert table.loc["ARGS", "sampled_kl"] == -LOG_P

    left = drawn[0].axes[0]
    assert [label.get_text() for label in left.get_yticklabels()][1] == f"{name}  (n=4)"
    colours = [to_hex(points.get_facecolor()[0]) for points in left.collections]
    assert colours == [*PALETTE[:2], GREY]  # by place; the reference is grey

    run_script(show_generations, tmp_path)
    page = read_page(tmp_path)
    assert page["methods"] == ["ARGS", name, "reference"]
    assert [step["tokens"] for step in page["traces"][name][0]] == [["a", "b"], ["c", "d"]]
    assert page["prompts"][2]["responses"][1] == " b" and page["table"]["rows"][1][0] == name


def test_a_step_has_candidates_of_one_length():
    with pytest.raises(ValueError, match="of one length"):
        Step(tokens=["a"], log_probs=[], rewards=[1.0], chosen=0)
    with pytest.raises(ValueError, match="of one length"):
        Step(tokens=["a"], log_probs=[-1.0], rewards=[1.0], chosen=1)
