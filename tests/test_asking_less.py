"""benchmarks/asking_less.py: what a rule saves and loses, by hand."""

import math
import re
import runpy
from pathlib import Path

import pytest
from conftest import ROOT
from small_runs import PROMPTS, trace_step, write_records, write_trace

from pargs.runs import Method

METHODS = {
    "ARGS": Method(policy="p", guide="r", weight=1.0, greedy=True),
    "PARGS": Method(policy="p", guide="r", weight=2.0),
}


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["asking_less.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "benchmarks/asking_less.py"), run_name="__main__")


def cells(printed: str, method: str, rule: str) -> list[float]:
    """The numbers in a rule's row of a method's table, without its name."""
    row = re.search(rf"\| {rule} .*", printed[printed.index(f"{method}: ") :])
    assert row, printed
    return [float(number) for number in re.findall(r"[-\d.]+", row.group().partition(rule)[2])]


def write_run(directory: Path) -> Path:
    """Two steps behind one prompt, one behind another; probabilities 0.6, 0.3 and 0.05 each time."""
    log_probs = [math.log(0.6), math.log(0.3), math.log(0.05)]

    def step(rewards: list[float], chosen: int) -> dict:
        return trace_step(*zip("abc", log_probs, rewards, strict=True), chosen=chosen)

    steps = [[step([0.0, 0.0, 3.0], 2), step([0.0, 0.0, 0.0], 0)], [step([0.0, 2.0, 0.0], 1)]]
    for name in METHODS:
        write_trace(directory, name, steps, PROMPTS[:2])
    write_records(directory, "p", k=3, **METHODS)
    return directory


def test_what_a_rule_saves_and_loses_is_that_of_hand_made_steps(tmp_path, monkeypatch, capsys):
    run_script(monkeypatch, "--run", write_run(tmp_path))
    printed = capsys.readouterr().out
    # Gap 1 keeps two of three; one of two tokens changes behind one prompt, none behind the other.
    kept, asked, low, high, fewer, nothing, change, *_ = cells(printed, "ARGS", "gap 1")
    assert (kept, asked, low, high, fewer, nothing, change) == (2, 2, 2, 2, 1.5, 0, 25)
    # The mass before the second candidate is 0.6, before the third 0.9.
    assert cells(printed, "ARGS", "mass 0.8")[0] == 2 and cells(printed, "ARGS", "mass 0.99")[0] == 3
    assert cells(printed, "ARGS", "gap 4")[6] == 0
    # What a sample loses is the probability of what is left out: weights e^(log pi + 2 r).
    lost = [0.05 * math.exp(6) / (0.9 + 0.05 * math.exp(6)), 0.05 / 0.95, 0.05 / (0.65 + 0.3 * math.exp(4))]
    expected = (lost[0] + lost[1]) / 2 / 2 + lost[2] / 2
    assert cells(printed, "PARGS", "gap 1")[6] == pytest.approx(expected, abs=1e-4)
    assert "at most 2.48 nats" in printed

    # Half the top's probability and less is 0.69 nats and more below it: nothing is left to ask.
    run_script(monkeypatch, "--run", tmp_path, "--gaps", 0.5, "--weight", 0)
    printed = capsys.readouterr().out
    assert cells(printed, "ARGS", "gap 0.5")[:5] == [1, 0, 0, 0, 100], printed
    assert cells(printed, "ARGS", "gap 0.5")[5] == 0


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "has no guided method with a trace"), (["--masses", 1.5], "less than 1")]
)
def test_a_run_without_a_trace_and_a_mass_above_one_are_refused(
    arguments, said, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, "--run", tmp_path, *arguments)
    assert stopped.value.code == 2 and re.fullmatch(rf"error: .*{said}.*\n", capsys.readouterr().err)
