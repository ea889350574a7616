"""Turn any preference dataset into this project's splits: your own pairs, or a dataset of the hub.

Reads   `source`: JSON lines, CSV or parquet, a folder, or a dataset of the hub. Its rows hold a prompt and
        two answers (texts, or lists of messages), or two answers that begin with the same prompt:
        conversations, or dialogues `Human: ... Assistant: ...`.
Writes  summarize_from_feedback/, where every later stage looks: splits `train` and `validation` with
        `prompt`, `chosen`, `rejected`, and `test` with `prompt` and `reference`, the chosen answer; with a
        chat template also `turns`, from which prompts are encoded. processing.json keeps the settings, and
        how many rows were dropped for which reason.

No prompt is in two splits; dialogues are told apart by their first human turn.

    python DataProcess/preference_data_process.py --source pairs.csv
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Annotated, Any

from dataset_files import save_dataset, workspace
from datasets import Dataset, DatasetDict, Features, List, Value
from jinja2 import TemplateError
from preference_rows import DIALOGUE, Layout, Preference, read_cell, read_preference
from pydantic import Field, NonNegativeInt
from sources import UnusableRow, read_rows
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template

from pargs.chat import ANSWER, chat_prompt
from pargs.cli import changed_flags, fail, is_main, next_step, parse_settings, run_script, setting
from pargs.encoding import check_chat_ids
from pargs.models import load_tokenizer
from pargs.prefixes import SIDES
from pargs.processes import hide_bars_in_logs

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass
class Settings:
    source: str = field(metadata={"help": "Preferences: .jsonl, .csv or .parquet, a folder, or a hub name."})
    config: str | None = setting(None, "Configuration of a hub dataset.")
    split: str = setting("train", "Split of a dataset or folder; it is split anew.")
    prompt_column: str | None = setting(
        None, "Column of the prompt; prompt where there is one, else both answers begin with the prompt."
    )
    chosen_column: str = setting("chosen", "Column of the preferred answer.")
    rejected_column: str = setting("rejected", "Column of the other answer.")
    separator: str | None = setting(
        None, "What ends the prompt where two texts begin with it; known of dialogues. \\n is a line break."
    )

    template: str = setting(
        "{prompt}", "The prompt as models read it: {prompt} and words; \\n is a line break."
    )
    chat_template_of: str | None = setting(None, "The policy whose chat template is used instead.")
    validation_share: Share = setting(0.1, "Part of the prompts for validation.")
    test_share: Share = setting(0.1, "Part of the prompts for the test.")
    max_characters: NonNegativeInt = setting(
        0, "Longest prompt with its longer answer, in characters; longer rows are dropped. 0: any."
    )
    seed: NonNegativeInt = setting(42, "Which prompts are in which split.")
    output: str = setting("summarize_from_feedback", "Folder to write.")


PROMPT = {"prompt": Value("string")}
TURNS = {
    "turns": List(
        {
            "role": Value("string"),
            "content": Value("string"),
            "before": Value("string"),
            "special_ids": List(Value("int32")),
        }
    )
}
ANSWERS = {side: Value("string") for side in SIDES}
REFERENCE = {"reference": Value("string")}
# A row as it is written, or alone `dropped`, why it is of no use.
Format = Callable[[Preference], dict[str, Any]]


def find_layout(rows: Sequence[dict], settings: Settings) -> Layout:
    """What the first row with an answer says of all."""
    prompt = settings.prompt_column
    if prompt is None and not settings.separator and "prompt" in rows[0]:
        prompt = "prompt"
    chosen, rejected = settings.chosen_column, settings.rejected_column
    at = next((at for at, row in enumerate(rows) if read_cell(row, chosen, at)), 0)
    cells = [read_cell(rows[at], column, at) for column in (chosen, rejected)]
    if prompt:
        read_cell(rows[at], prompt, at)
    if isinstance(cells[0], list):
        return Layout(prompt, chosen, rejected, conversational=True)
    if prompt:
        return Layout(prompt, chosen, rejected)

    separator = (settings.separator or "").replace("\\n", "\n")
    if not separator and all(isinstance(cell, str) and DIALOGUE in cell for cell in cells):
        separator = DIALOGUE
    if not separator:
        raise UnusableRow(
            f"row {at} holds two answers and no prompt: expected a column of prompts (--prompt_column), or "
            f"texts that begin with the prompt and what ends it (--separator; {DIALOGUE!r} is found)"
        )
    return Layout(None, chosen, rejected, separator=separator)


def format_as_text(preference: Preference, template: str) -> dict[str, Any]:
    """The prompt in the template, and the answers with the one space before them that a policy writes."""
    prompt = template.replace("{prompt}", preference.prompt)
    space = "" if prompt[-1].isspace() else " "
    return {"prompt": prompt, "chosen": space + preference.chosen, "rejected": space + preference.rejected}


def format_as_chat(preference: Preference, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The prompt in the chat template, with its turns, and the answers as they stand behind it."""
    messages, mark = preference.messages, "\ue000"
    answer = [ANSWER | {"content": mark}]
    try:
        prompt = chat_prompt(tokenizer, messages)
        rendered = apply_chat_template({"prompt": messages, "chosen": answer, "rejected": answer}, tokenizer)
    except TemplateError:
        return {"dropped": "refused by the chat template"}
    if prompt is None or prompt != rendered["prompt"]:
        return {"dropped": "altered by the chat template"}
    before = rendered["chosen"].partition(mark)[0]  # a space, of some templates
    sides = {side: before + getattr(preference, side) for side in SIDES}
    return {"prompt": str(prompt), "turns": prompt.turns} | sides


def format_rows(
    rows: Sequence[dict], layout: Layout, format_row: Format, max_characters: int
) -> tuple[dict[str, list[dict]], Counter[str]]:
    """The useful rows by their first human turn, and how many were dropped for which reason."""
    kept: dict[str, list[dict]] = {}
    dropped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        preference = read_preference(row, index, layout)
        made = {"dropped": preference.dropped} if preference.dropped else format_row(preference)
        if "dropped" not in made and max_characters:
            length = len(made["prompt"]) + max(len(made[side]) for side in SIDES)
            made |= {"dropped": "too long"} if length > max_characters else {}
        if "dropped" in made:
            dropped[made["dropped"]] += 1
        else:
            kept.setdefault(preference.question, []).append(made)
    return kept, dropped


def split_by_question(
    kept: dict[str, list[dict]], settings: Settings, dropped: Counter[str]
) -> dict[str, list[dict]]:
    """Rows of each split; which one a question is in does not depend on the order of the rows."""
    if len(kept) < 3:
        fail(
            f"{settings.source!r} has {len(kept)} prompts of use, and three splits need one each; "
            f"dropped: {dict(dropped)}"
        )
    order = sorted(
        kept, key=lambda question: blake2b(json.dumps([settings.seed, question]).encode()).digest()
    )
    num_test, num_validation = (
        max(1, round(share * len(order))) for share in (settings.test_share, settings.validation_share)
    )
    if num_test + num_validation >= len(order):
        fail("--validation_share and --test_share leave no prompt to train on")
    questions = {
        "train": order[num_test + num_validation :],
        "validation": order[num_test : num_test + num_validation],
        "test": order[:num_test],
    }
    splits = {split: [row for each in own for row in kept[each]] for split, own in questions.items()}

    tests: dict[str, dict] = {}
    for row in splits["test"]:
        tests.setdefault(row["prompt"], row | {"reference": row["chosen"]})
    dropped["further rows of a test prompt"] = len(splits["test"]) - len(tests)
    return splits | {"test": list(tests.values())}


def make_datasets(splits: dict[str, list[dict]], chat: bool) -> DatasetDict:
    prompt = PROMPT | (TURNS if chat else {})
    datasets = DatasetDict()
    for split, rows in splits.items():
        features = prompt | (REFERENCE if split == "test" else ANSWERS)
        named = [{name: row[name] for name in features} for row in rows]
        datasets[split] = Dataset.from_list(named, features=Features(features))
    return datasets


def choose_format(settings: Settings) -> Format:
    if settings.chat_template_of is None:
        return partial(format_as_text, template=settings.template)
    if settings.template != "{prompt}":
        fail("--template and --chat_template_of are two ways to write a prompt: choose one")
    tokenizer = load_tokenizer(settings.chat_template_of, "name another with --chat_template_of")
    if not tokenizer.chat_template:
        fail(f"the tokenizer of {settings.chat_template_of!r} has no chat template; --template writes text")
    check_chat_ids(settings.chat_template_of, tokenizer)
    return partial(format_as_chat, tokenizer=tokenizer)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if not is_main():
        return  # under a launcher one process is enough
    hide_bars_in_logs()

    settings.template = settings.template.replace("\\n", "\n")
    if settings.template.count("{prompt}") != 1:
        fail(f"--template must hold {{prompt}} exactly once, not {settings.template!r}")
    format_row = choose_format(settings)

    with workspace(settings.output) as work:
        rows = read_rows(settings.source, settings.config, settings.split, str(work))
        if not len(rows):
            fail(f"{settings.source!r} holds no rows")
        try:
            layout = find_layout(rows, settings)
            kept, dropped = format_rows(rows, layout, format_row, settings.max_characters)
        except UnusableRow as error:
            fail(f"{settings.source!r}, {error} (the first row is row 0)")
        splits = make_datasets(split_by_question(kept, settings, dropped), bool(settings.chat_template_of))

        dropped = {reason: count for reason, count in dropped.items() if count}
        # Later stages call what fills a template's one field the post.
        template = settings.template.replace("{prompt}", "{post}")
        notes = {"template": template, "dropped": dropped, "settings": asdict(settings)}
        save_dataset({".": splits}, notes, settings.output)

    print(f"\nwrote {settings.output}/ from {len(rows)} rows")
    for split, rows in splits.items():
        print(f"  {split:<10} {len(rows):>7} rows")
    print(f"  dropped: {', '.join(f'{count} {reason}' for reason, count in dropped.items()) or 'none'}")
    flags = changed_flags(dataset=(settings.output, Settings.output))
    next_step("DataProcess/tldr_data_process_partial.py", *flags)


if __name__ == "__main__":
    run_script(main, "the same command starts again; a dataset that was here is as it was")
