"""One self-contained page to read the generations of a run, each method's summary of a post side by side.

Reads   baseline_results.csv, generation_*.json and, where they are there, the references in
        summarize_from_feedback/, average_reward.csv, every figure (*.png) and trace_*.jsonl of the run.
Writes  generations.html: no network, no other files; open it in a browser.

    python Evaluation/show_generations.py
"""

import base64
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from run_files import Run, parse_runs, read_references, read_run, read_steps
from statistics_table import readable_table

from pargs.cli import fail, is_main, run_script, setting
from pargs.files import check_writable, write_text
from pargs.runs import REFERENCE, Step

REPORT = "python Evaluation/show_result.py"
TEXT_FIELDS = ("baseline", "evaluator_was")  # of the result table; the others are numbers


@dataclass
class Settings:
    output: str | None = setting(None, "The page to write; if not given, generations.html in the run.")
    dataset: str = setting("summarize_from_feedback", "Dataset with the reference summaries.")


def parse_command_line() -> tuple[Settings, Path]:
    settings, runs = parse_runs(Settings, __doc__, "The run directory; the current one by default.")
    if len(runs) > 1:
        fail(f"a page shows one run, not {len(runs)}: {' '.join(runs)}")
    return settings, Path(runs[0])


def collect_prompts(run: Run, methods: list[str], references: dict[str, list[str]]) -> list[dict]:
    """Per test prompt: the post, and in the order of `methods` its rewards, responses and footnotes."""
    prompts = []
    for key, rewards in run.rewards.iterrows():
        prompt, copy = key
        responses, footnotes = [], []
        for method in methods:
            response, footnote = None, ""
            if method == REFERENCE and prompt in references:
                responses_of_prompt = references[prompt]
                response = responses_of_prompt[min(copy, len(responses_of_prompt) - 1)]
            elif method in run.responses:
                row = run.responses[method].loc[key]
                if not pd.isna(row["result"]):
                    response, footnote = row["result"], describe_end(row)
            responses.append(response)
            footnotes.append(footnote)

        known = [rewards[method] if pd.notna(rewards.get(method)) else None for method in methods]
        prompts.append({"prompt": prompt, "rewards": known, "responses": responses, "footnotes": footnotes})
    return prompts


def describe_end(row: pd.Series) -> str:
    cut = ", cut off at the limit" if row["finish_reason"] == "length" else ""
    return f"{row['num_tokens']:.0f} tokens{cut}"


def collect_traces(run: Run, methods: list[str]) -> dict[str, list[list[dict] | None]]:
    """Per method with a trace, the steps of each prompt, numbers rounded to what is shown."""
    traces = {}
    for method in methods:
        if steps := read_steps(run, method):
            found = [steps.get(key) for key in run.rewards.index]
            traces[method] = [each and [rounded_step(step) for step in each] for each in found]
    return traces


def rounded_step(step: Step) -> dict:
    numbers = {"log_probs": step.log_probs, "rewards": step.rewards}
    rounded = {name: [finite(value) for value in values] for name, values in numbers.items()}
    return {"tokens": step.tokens, "chosen": step.chosen, **rounded}


def collect_rules(run: Run, methods: Iterable[str]) -> dict[str, dict]:
    """How each of the methods weighs a reward and picks a token; an older run does not say."""
    known = {method: run.methods[method].method for method in methods if method in run.methods}
    return {name: {"weight": method.weight, "greedy": method.greedy} for name, method in known.items()}


def finite(value: float | None) -> float | None:
    """Rounded for the page; JSON knows no NaN."""
    return None if value is None or not math.isfinite(value) else round(value, 3)


def report_command(directory: Path) -> str:
    return shlex.join(REPORT.split() + [str(directory)] * (directory != Path()))


def collect_table(directory: Path) -> dict | None:
    path, again = directory / "average_reward.csv", report_command(directory)
    if not path.exists():
        return None
    try:
        summary = pd.read_csv(path).set_index("method")
        summary = summary.astype({column: float for column in summary if column not in TEXT_FIELDS})
    except (OSError, ValueError, KeyError) as error:
        fail(f"cannot read {path} ({error}); make it again with `{again}`")
    if summary.empty or not {"baseline", "n", "runs", "mean"} <= set(summary):
        fail(f"{path} is no table of results; make it again with `{again}`")
    shown = readable_table(summary)
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
    """The page: template, script and data in one file."""
    folder = Path(__file__).parent
    template = (folder / "page_template.html").read_text(encoding="utf-8")
    script = (folder / "page_script.js").read_text(encoding="utf-8")
    head, rest = template.split("@DATA@")
    return head + embed_json(data) + rest.replace("@SCRIPT@", script)


def main() -> None:
    settings, directory = parse_command_line()
    if not is_main():
        return  # under a launcher one process is enough
    output = Path(settings.output) if settings.output else directory / "generations.html"
    check_writable(output.parent)

    run = read_run(directory)
    references = read_references(run, settings.dataset)
    if not references:
        run.note(f"no references: {settings.dataset}/ is not there")
    table = collect_table(directory)
    if table is None:
        run.note(f"no result table and figure: make them with `{report_command(directory)}`")

    methods = [str(method) for method in run.rewards if method != REFERENCE] + [REFERENCE]
    traces = collect_traces(run, methods)
    page = fill_template(
        {
            "run": directory.resolve().name,
            "methods": methods,
            "reference": REFERENCE,
            "prompts": collect_prompts(run, methods, references),
            "traces": traces,
            "rules": collect_rules(run, traces),
            "table": table,
            "figures": collect_figures(directory),
            "notes": run.notes,
        }
    )
    write_text(output, page)

    for note in run.notes:
        print(f"- {note}")
    traced = f", with the candidates of {', '.join(traces)}" if traces else ""
    print(f"wrote {output}: {len(run.rewards)} prompts, {len(methods) - 1} methods{traced}")
    print("next: open it in a browser")


if __name__ == "__main__":
    run_script(main, "the same command starts again")
