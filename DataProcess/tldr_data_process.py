"""Turn the TL;DR comparisons into preference pairs, and the TL;DR test posts into prompts.

Reads   the dataset `comparisons` (a hub name or a local folder) and the dataset `test_posts`.
Writes  summarize_from_feedback/: splits `train` and `validation` with TRL's columns `prompt`, `chosen`,
        `rejected`, and split `test` with `prompt` and `reference`; processing.json keeps the template.

Every prompt of the project is formatted here and nowhere else, so the policy, the reward models and DPO
are asked with the same text.

    python DataProcess/tldr_data_process.py
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from dataset_files import save_dataset, workspace
from datasets import Dataset, DatasetDict
from sources import UnusableRow, is_text_or_none, load_source

from pargs.cli import changed_flags, fail, is_main, next_step, parse_settings, run_script, setting
from pargs.encoding import TEMPLATE_FIELDS, read_fields, template_words
from pargs.processes import hide_bars_in_logs


@dataclass
class Settings:
    comparisons: str = setting("openai/summarize_from_feedback", "Pairwise comparisons: hub name or folder.")
    comparisons_config: str = setting("comparisons", "Its configuration.")
    test_posts: str = setting("CarperAI/openai_summarize_tldr", "Test posts: hub name or folder.")
    # The SFT model's own prompt format is not documented beyond a `<sep>` in its tokenizer. Special tokens
    # written here are live; spelt in a post or a title they are text.
    template: str = setting(
        "POST: {post}\\nTL;DR:",
        "The prompt: {post}, and {subreddit} and {title} if wanted; \\n is a line break.",
    )
    output: str = setting("summarize_from_feedback", "Folder to write.")


def preference_from_comparison(row: dict, index: int, split: str, template: str) -> dict[str, str]:
    """One comparison as prompt, chosen and rejected; `dropped` says why a row is of no use, else "".

    Raises:
        UnusableRow: a field is missing or `choice` is neither 0 nor 1; the message names the row.
    """
    try:
        values = {name: row["info"][name] for name in fields_of(template)}
        summaries = [summary["text"] for summary in row["summaries"]]
        choice = row["choice"]
    except (KeyError, TypeError) as error:
        raise UnusableRow(f"row {index} of split {split!r} has no usable field {error}") from None

    if not isinstance(choice, int) or choice not in (0, 1):
        raise UnusableRow(f"row {index} of split {split!r}: `choice` is {choice!r}, not 0 or 1")
    if len(summaries) != 2:
        raise UnusableRow(f"row {index} of split {split!r}: {len(summaries)} summaries, not 2")

    if not all(map(is_text_or_none, (*values.values(), *summaries))):
        raise UnusableRow(f"row {index} of split {split!r}: the {', '.join(values)} or a summary is not text")

    chosen, rejected = ((summaries[at] or "").strip() for at in (choice, 1 - choice))
    prompt, dropped = format_prompt(values, template)
    if not dropped and not (chosen and rejected):
        dropped = "empty summary"
    if not dropped and chosen == rejected:
        dropped = "identical summaries"
    if dropped:
        return {"prompt": "", "chosen": "", "rejected": "", "dropped": dropped}
    return {
        "prompt": prompt,
        "chosen": format_response(chosen, template),
        "rejected": format_response(rejected, template),
        "dropped": "",
    }


def prompt_from_test_post(row: dict, index: int, template: str) -> dict[str, str]:
    """One test row (`prompt`: subreddit, title and post; `label`: the reference) as prompt and reference.

    Raises:
        UnusableRow: the row has no post between `POST:` and `TL;DR:`, or a field is missing.
    """
    try:
        prompt, reference = row["prompt"], row["label"]
    except (KeyError, TypeError) as error:
        raise UnusableRow(f"row {index} of the test posts has no usable field {error}") from None

    if not isinstance(prompt, str) or not is_text_or_none(prompt) or not is_text_or_none(reference):
        raise UnusableRow(f"row {index} of the test posts: `prompt` or `label` is not text")

    start, end = re.search(r"^POST:|\nPOST:", prompt), prompt.rstrip().removesuffix("\nTL;DR:")
    if start is None or start.end() > len(end) or end == prompt.rstrip():
        raise UnusableRow(f"row {index} of the test posts holds no text between `POST:` and `TL;DR:`")

    before, _, title = f"\n{prompt[: start.start()]}".partition("\nTITLE:")
    subreddit = before.partition("\nSUBREDDIT:")[2].strip().removeprefix("r/")
    found = {"subreddit": subreddit, "title": title, "post": end[start.end() :]}

    formatted, dropped = format_prompt({name: found[name] for name in fields_of(template)}, template)
    if not dropped and not (reference or "").strip():
        dropped = "empty summary"
    if dropped:
        return {"prompt": "", "reference": "", "dropped": dropped}
    return {"prompt": formatted, "reference": format_response(reference, template), "dropped": ""}


def fields_of(template: str) -> list[str]:
    """The names of a template's fields, in its order."""
    return re.findall(r"\{([\w -]+)\}", template)


def format_prompt(values: dict[str, str | None], template: str) -> tuple[str, str]:
    """The prompt of `values`, in the order of the template's fields; and why the row is of no use, or ""."""
    texts = {name: (value or "").strip() for name, value in values.items()}
    missing = [name for name, text in texts.items() if not text]
    if missing:
        return "", f"no {missing[-1]}"

    words = template_words(template)
    prompt = words[0] + "".join(chain.from_iterable(zip(texts.values(), words[1:], strict=True)))
    # A value that spells the words behind it: the template's special tokens would be looked for inside of it.
    if read_fields(prompt, template) != tuple(texts.values()):
        return "", "ambiguous prompt"
    return prompt, ""


def format_response(summary: str, template: str) -> str:
    """The summary with the one space before it that a policy writes after the template."""
    return summary.strip() if template[-1].isspace() else " " + summary.strip()


def keep_useful(rows: Dataset, split: str) -> tuple[Dataset, dict[str, int]]:
    """Drop the rows that carry a reason in `dropped`, and count the reasons."""
    reasons = rows["dropped"][:]
    counts = Counter(filter(None, reasons))
    kept = [at for at, reason in enumerate(reasons) if not reason]
    if not kept:
        fail(f"no row of split {split!r} is of use; dropped: {dict(counts)}")
    return rows.select(kept).remove_columns("dropped"), dict(counts)


def process_splits(
    settings: Settings, template: str, work: Path
) -> tuple[DatasetDict, dict[str, dict[str, int]]]:
    """The three splits, and how many rows of each were dropped for which reason."""
    comparisons = load_source(settings.comparisons, settings.comparisons_config, str(work))
    test_posts = load_source(settings.test_posts, None, str(work))

    sources = {
        "train": (settings.comparisons, comparisons, partial(preference_from_comparison, split="train")),
        "validation": (
            settings.comparisons,
            comparisons,
            partial(preference_from_comparison, split="validation"),
        ),
        "test": (settings.test_posts, test_posts, prompt_from_test_post),
    }
    for split, (name, source, _) in sources.items():
        if split not in source:
            fail(f"{name!r} has no split {split!r}; it has {sorted(source)}")

    processed, dropped = DatasetDict(), {}
    for split, (_, source, convert) in sources.items():
        rows = source[split].map(
            convert,
            with_indices=True,
            fn_kwargs={"template": template},
            remove_columns=source[split].column_names,
            cache_file_name=str(work / f"{split}.arrow"),
            desc=f"{split}: formatting",
        )
        processed[split], dropped[split] = keep_useful(rows, split)
    return processed, dropped


def check_template(template: str) -> None:
    fields, known = fields_of(template), " ".join(f"{{{name}}}" for name in TEMPLATE_FIELDS)
    for name in fields:
        if name not in TEMPLATE_FIELDS:
            fail(f"--template holds the unknown field {{{name}}}; there are {known}")
        if name != "post" and fields.count(name) > 1:
            fail(f"--template must hold {{{name}}} at most once, not {template!r}")
    if fields.count("post") != 1:
        fail(f"--template must hold {{post}} exactly once, not {template!r}")
    if not all(template_words(template)[1:-1]):
        fail(f"--template must hold something between two fields, not {template!r}")


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if not is_main():
        return  # under a launcher one process is enough
    hide_bars_in_logs()

    template = settings.template.replace("\\n", "\n")
    check_template(template)

    with workspace(settings.output) as work:
        try:
            processed, dropped = process_splits(settings, template, work)
        except UnusableRow as error:
            fail(f"{error} (the first row is row 0)")
        save_dataset({".": processed}, {"template": template, "dropped": dropped}, settings.output)

    print(f"\nwrote {settings.output}/")
    for split, rows in processed.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped[split].items()) or "none"
        print(f"  {split:<10} {len(rows):>7} rows (dropped: {reasons})")
    flags = changed_flags(dataset=(settings.output, Settings.output))
    next_step("DataProcess/tldr_data_process_partial.py", *flags)


if __name__ == "__main__":
    run_script(main, "the same command starts again; a dataset that was here is as it was")
