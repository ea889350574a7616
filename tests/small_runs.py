"""Small run directories for the tests of stage 5, and its scripts run in them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from pargs.runs import Cost, Method, MethodRecord, generation_path, trace_path, write_methods

TEMPLATE = "POST: {post}\nTL;DR:"
PROMPTS = [TEMPLATE.format(post=f"post {number}") for number in range(4)]
NO_COST = Cost(responses=0, seconds=0, tokens=0, reward_calls=0, reward_tokens=0)
CSV = "baseline_results.csv"

Steps = list[dict]


def write_rewards(directory: Path, prompts: list[str] = PROMPTS, **rewards: list) -> Path:
    """A run with the columns given; `PARGS_G` stands for PARGS-G."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {name.replace("_", "-"): values for name, values in rewards.items()}
    pd.DataFrame({"prompt": prompts} | columns).to_csv(directory / CSV, index=False)
    return directory


def write_generations(
    directory: Path, method: str, texts: list[str], prompts: list[str] = PROMPTS, **changes: object
) -> None:
    """A method's generation file; its rows have the fields of `changes`, a list of which is one each."""
    rows = []
    for at, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        row = {"prompt": prompt, "result": text, "reward": 0.0}
        row |= {"num_tokens": len(text.split()), "finish_reason": "length"}
        rows.append(row | {name: v[at] if isinstance(v, list) else v for name, v in changes.items()})
    generation_path(method, directory).write_text(json.dumps(rows))


def trace_step(*candidates: tuple[str, float | None, float | None], chosen: int) -> dict:
    """A step of a trace, from its candidates' tokens, log-probabilities and rewards."""
    tokens, log_probs, rewards = zip(*candidates, strict=True)
    return {"tokens": tokens, "log_probs": log_probs, "rewards": rewards, "chosen": chosen}


def write_trace(directory: Path, method: str, steps: list[Steps], prompts: list[str] = PROMPTS) -> None:
    lines = [json.dumps({"prompt": p, "steps": s}) + "\n" for p, s in zip(prompts, steps, strict=True)]
    trace_path(method, directory).write_text("".join(lines))


def write_records(
    directory: Path,
    reference_policy: object,
    k: int = 2,
    max_new_tokens: int = 8,
    evaluator: str | None = None,
    seed: int | None = None,
    costs: dict[str, Cost] | None = None,
    candidate_gap: float | None = None,
    **methods: Method,
) -> None:
    """methods.json; `PARGS_G` stands for PARGS-G."""
    records = {
        name.replace("_", "-"): MethodRecord(
            method=method,
            k=k,
            candidate_gap=candidate_gap,
            max_new_tokens=max_new_tokens,
            reference_policy=str(reference_policy),
            evaluator=evaluator,
            seed=seed,
            cost=(costs or {}).get(name, NO_COST),
        )
        for name, method in methods.items()
    }
    write_methods(records, directory)


def write_dataset(directory: Path, **splits: list[dict]) -> None:
    """summarize_from_feedback/ with the rows of each split, and its notes."""
    folder = directory / "summarize_from_feedback"
    DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()}).save_to_disk(str(folder))
    (folder / "processing.json").write_text(json.dumps({"template": TEMPLATE}))


def write_references(directory: Path, references: list[str], prompts: list[str] = PROMPTS) -> None:
    pairs = zip(prompts, references, strict=False)
    write_dataset(directory, test=[{"prompt": prompt, "reference": text} for prompt, text in pairs])


def run_script(module: ModuleType, directory: Path, *arguments: object) -> None:
    """A script's `main` with these arguments, in this directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()


def refuse(module: ModuleType, directory: Path, capsys, *arguments: object) -> str:
    """What the script says when it refuses: one error, exit code 2, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script(module, directory, *arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(re.findall("^error: ", said, re.MULTILINE)) == 1, said
    assert "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    return said


def overwrite(pattern: str, edit: Callable[[bytes], bytes] | str) -> Callable[[Path], None]:
    """A way to spoil a run: the one file that matches gets other bytes, or this text."""

    def spoil(directory: Path) -> None:
        path = next(iter(directory.glob(pattern)), directory / pattern)
        path.write_bytes(edit.encode() if isinstance(edit, str) else edit(path.read_bytes()))

    return spoil


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def read_page(directory: Path) -> dict:
    """The data in a run's page."""
    page = (directory / "generations.html").read_text(encoding="utf-8")
    return json.loads(page[page.index('id="data">') + len('id="data">') : page.index("</script>")])
