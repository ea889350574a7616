"""One self-contained page to read the generations of a run, each method's summary of a post side by side.

Reads   baseline_results.csv, generation_*.json and, where they are there, the references in
        summarize_from_feedback/, average_reward.csv, every figure (*.png) and trace_*.jsonl of the run.
Writes  generations.html: no network, no other files; open it in a browser.

    python Evaluation/show_generations.py
"""

import base64
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from command_line import fail, parse_command_line
from run_files import REFERENCE, Run, check_writable, read_references, read_run, read_trace, write_whole
from statistics_table import readable_table

GUIDED = ("ARGS", "PARGS-G", "PARGS")


@dataclass
class Settings:
    output: str = field(default="generations.html", metadata={"help": "The page to write."})
    dataset: str = field(
        default="summarize_from_feedback", metadata={"help": "Dataset with the reference summaries."}
    )


def collect_prompts(run: Run, methods: list[str], references: dict[str, list[str]]) -> list[dict]:
    """Per test prompt: the post, and in the order of `methods` its rewards, responses and footnotes."""
    prompts = []
    for key, rewards in run.rewards.iterrows():
        prompt, copy = key
        targets = references.get(prompt)
        responses, feet = [], []
        for method in methods:
            row = run.responses[method].loc[key] if method in run.responses else None
            if method == REFERENCE:
                responses.append(targets[min(copy, len(targets) - 1)] if targets else None)
                feet.append("")
            elif row is None or pd.isna(row["result"]):
                responses.append(None)
                feet.append("")
            else:
                responses.append(row["result"])
                feet.append(footnote(row))

        known = [
            None if method not in rewards or pd.isna(rewards[method]) else rewards[method]
            for method in methods
        ]
        prompts.append({"prompt": prompt, "rewards": known, "responses": responses, "feet": feet})
    return prompts


def footnote(row: pd.Series) -> str:
    parts = [] if pd.isna(row["num_tokens"]) else [f"{row['num_tokens']:.0f} tokens"]
    if row["finish_reason"] == "length":
        parts.append("cut off at the limit")
    return ", ".join(parts)


def collect_traces(run: Run, methods: list[str]) -> dict[str, list[list[dict] | None]]:
    """Per guided method with a trace, the steps of each prompt, numbers rounded to what is shown."""
    traces = {}
    for method in GUIDED:
        steps = read_trace(run.directory, method) if method in methods else {}
        if steps:
            found = [steps.get(key) for key in run.rewards.index]
            traces[method] = [each and [rounded_step(step) for step in each] for each in found]
    return traces


def rounded_step(step: dict) -> dict:
    numbers = {name: [finite(value) for value in step[name]] for name in ("log_probs", "rewards")}
    return {"tokens": step["tokens"], "chosen": step["chosen"], **numbers}


def finite(value: float) -> float | None:
    """Rounded for the page; JSON knows no NaN."""
    return round(value, 3) if math.isfinite(value) else None


def collect_table(directory: Path) -> dict | None:
    path = directory / "average_reward.csv"
    if not path.exists():
        return None
    try:
        shown = readable_table(pd.read_csv(path).set_index("method"))
    except (KeyError, IndexError, ValueError, TypeError, OSError) as error:
        fail(f"cannot read {path} ({error!r}); make it again with `python Evaluation/show_result.py`")
    return {"columns": list(shown), "rows": shown.values.tolist()}


def collect_figures(directory: Path) -> list[dict]:
    """Every PNG of the run, the average reward first."""
    found = [path for path in directory.glob("*.png") if path.is_file()]
    figures = []
    for path in sorted(found, key=lambda path: (path.stem != "average_reward", path.name)):
        try:
            content = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            fail(f"cannot read {path}: {error}")
        figures.append({"name": path.stem, "source": f"data:image/png;base64,{content}"})
    return figures


def embed_json(data: dict) -> str:
    """JSON that no HTML parser can take for markup, whatever the texts in it spell."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII, so U+2028 is escaped as well
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fill_template(data: dict) -> str:
    """The page: template, script and data in one file. The policy in it allows this script and no other."""
    folder = Path(__file__).parent
    template = (folder / "page_template.html").read_text(encoding="utf-8")
    script = (folder / "page_script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    head, rest = template.replace("@SCRIPT_HASH@", f"sha256-{digest}").split("@DATA@")
    return head + embed_json(data) + rest.replace("@SCRIPT@", script)


def main() -> None:
    settings, directories = parse_command_line(
        Settings, __doc__, "The run directory; the current one by default."
    )
    if len(directories) > 1:
        fail(f"a page shows one run, not {len(directories)}: {' '.join(directories)}")
    check_writable(Path(settings.output).parent)

    run = read_run(directories[0])
    references = read_references(run.directory, settings.dataset)
    if not references:
        run.notes.append(f"no references: {settings.dataset}/ is not there")
    table = collect_table(run.directory)
    if table is None:
        run.notes.append("no result table and figure: make them with `python Evaluation/show_result.py`")

    methods = [method for method in run.rewards if method != REFERENCE] + [REFERENCE]
    traces = collect_traces(run, methods)
    page = fill_template(
        {
            "run": run.directory.resolve().name,
            "methods": methods,
            "reference": REFERENCE,
            "prompts": collect_prompts(run, methods, references),
            "traces": traces,
            "table": table,
            "figures": collect_figures(run.directory),
            "notes": run.notes,
        }
    )
    write_whole(Path(settings.output), lambda path: path.write_text(page, encoding="utf-8", newline="\n"))

    for note in run.notes:
        print(f"- {note}")
    traced = f", with the candidates of {', '.join(traces)}" if traces else ""
    print(f"wrote {settings.output}: {len(run.rewards)} prompts, {len(methods) - 1} methods{traced}")
    print("next: open it in a browser")


if __name__ == "__main__":
    main()
