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
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from dataset_files import save_dataset, workspace
from datasets import Dataset, DatasetDict, load_dataset
from script_settings import fail, is_main, parse_settings


@dataclass
class Settings:
    comparisons: str = field(
        default="openai/summarize_from_feedback",
        metadata={"help": "Pairwise comparisons: hub name or folder."},
    )
    comparisons_config: str = field(default="comparisons", metadata={"help": "Its configuration."})
    test_posts: str = field(
        default="CarperAI/openai_summarize_tldr", metadata={"help": "Test posts: hub name or folder."}
    )
    # The SFT model's own prompt format is not documented beyond a `<sep>` in its tokenizer; this is the
    # format of the paper's code. Special tokens written here are live; spelt in a post they are text.
    template: str = field(
        default="POST: {post}\\nTL;DR:",
        metadata={"help": "The prompt, built around {post}; \\n is a line break."},
    )
    output: str = field(default="summarize_from_feedback", metadata={"help": "Folder to write."})


def load_source(name: str, config: str | None, cache_dir: str) -> DatasetDict:
    """Load a dataset, or the parquet copy that the hub keeps of one that only has a loading script.

    A folder is read into `cache_dir`: the user's cache tells folders apart by their names alone, and would
    give one run's rows to another, or the rows as they were before the files changed.
    """
    where = {"cache_dir": cache_dir} if Path(name).is_dir() else {}
    try:
        return load_dataset(name, config, **where)
    except Exception as error:
        # "Dataset scripts are no longer supported" is a RuntimeError, an unknown configuration a ValueError.
        if config is None or not isinstance(error, RuntimeError | ValueError):
            fail_to_load(name, error)
        first_error = error

    try:
        return load_dataset(name, data_dir=config, revision="refs/convert/parquet", **where)
    except Exception as error:
        fail_to_load(name, first_error, f"; and no parquet copy of configuration {config!r}: {reason(error)}")


def fail_to_load(name: str, error: Exception, also: str = "") -> NoReturn:
    hint = "" if Path(name).is_dir() else "; a folder of a dataset's name here is read in place of the hub's"
    fail(f"cannot load {name!r}: {reason(error)}{also}{hint}")


def reason(error: Exception) -> str:
    """What `datasets` wraps in a general message, without the schemas it may print."""
    return " ".join(str(error.__cause__ or error).split())[:300]


def preference_from_comparison(row: dict, index: int, split: str, template: str) -> dict[str, str]:
    """One comparison as prompt, chosen and rejected; `dropped` says why a row is of no use, else "".

    Raises:
        ValueError: a field is missing or `choice` is neither 0 nor 1; the message names the row.
    """
    try:
        post = row["info"]["post"]
        summaries = [summary["text"] for summary in row["summaries"]]
        choice = row["choice"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"row {index} of split {split!r} has no usable field {error}") from None

    if not isinstance(choice, int) or choice not in (0, 1):
        raise ValueError(f"row {index} of split {split!r}: `choice` is {choice!r}, not 0 or 1")
    if len(summaries) != 2:
        raise ValueError(f"row {index} of split {split!r}: {len(summaries)} summaries, not 2")

    if not all(map(is_text_or_none, (post, *summaries))):
        raise ValueError(f"row {index} of split {split!r}: the post or a summary is not text")

    chosen, rejected = summaries[choice], summaries[1 - choice]
    if not (post or "").strip():
        dropped = "no post"
    elif not (chosen or "").strip() or not (rejected or "").strip():
        dropped = "empty summary"
    elif chosen.strip() == rejected.strip():
        dropped = "identical summaries"
    else:
        return {
            "prompt": format_prompt(post, template),
            "chosen": format_response(chosen, template),
            "rejected": format_response(rejected, template),
            "dropped": "",
        }
    return {"prompt": "", "chosen": "", "rejected": "", "dropped": dropped}


def prompt_from_test_post(row: dict, index: int, template: str) -> dict[str, str]:
    """One test row (`prompt`: subreddit, title and post; `label`: the reference) as prompt and reference.

    Raises:
        ValueError: the row has no post between `POST:` and `TL;DR:`, or a field is missing.
    """
    try:
        prompt, reference = row["prompt"], row["label"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"row {index} of the test posts has no usable field {error}") from None

    if not isinstance(prompt, str) or not is_text_or_none(prompt) or not is_text_or_none(reference):
        raise ValueError(f"row {index} of the test posts: `prompt` or `label` is not text")

    start, end = re.search(r"^POST:|\nPOST:", prompt), prompt.rstrip().removesuffix("\nTL;DR:")
    if start is None or start.end() > len(end) or end == prompt.rstrip():
        raise ValueError(f"row {index} of the test posts holds no text between `POST:` and `TL;DR:`")

    post = end[start.end() :]
    if not post.strip():
        return {"prompt": "", "reference": "", "dropped": "no post"}
    if not (reference or "").strip():
        return {"prompt": "", "reference": "", "dropped": "empty summary"}

    reference = format_response(reference, template)
    return {"prompt": format_prompt(post, template), "reference": reference, "dropped": ""}


def is_text_or_none(value: object) -> bool:
    """Text that can be written as UTF-8: half a surrogate pair cannot."""
    if isinstance(value, str):
        return value.isascii() or value.encode(errors="replace").decode() == value
    return value is None


def format_prompt(post: str, template: str) -> str:
    return template.replace("{post}", post.strip())


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

    for source, name, splits in (
        (comparisons, settings.comparisons, ("train", "validation")),
        (test_posts, settings.test_posts, ("test",)),
    ):
        for split in splits:
            if split not in source:
                fail(f"{name!r} has no split {split!r}; it has {sorted(source)}")

    processed, dropped = DatasetDict(), {}
    for split in ("train", "validation", "test"):
        if split == "test":
            source, convert, kwargs = test_posts[split], prompt_from_test_post, {}
        else:
            source, convert, kwargs = comparisons[split], preference_from_comparison, {"split": split}

        rows = source.map(
            convert,
            with_indices=True,
            fn_kwargs={"template": template, **kwargs},
            remove_columns=source.column_names,
            cache_file_name=str(work / f"{split}.arrow"),
            desc=f"{split}: formatting",
        )
        processed[split], dropped[split] = keep_useful(rows, split)
    return processed, dropped


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if not is_main():
        return  # under a launcher one process is enough

    template = settings.template.replace("\\n", "\n")
    if template.count("{post}") != 1:
        fail(f"--template must hold {{post}} exactly once, not {settings.template!r}")

    with workspace(settings.output) as work:
        try:
            processed, dropped = process_splits(settings, template, work)
        except ValueError as error:
            fail(str(error))
        save_dataset({".": processed}, {"template": template, "dropped": dropped}, settings.output)

    print(f"\nwrote {settings.output}/")
    for split, rows in processed.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped[split].items()) or "none"
        print(f"  {split:<10} {len(rows):>7} rows (dropped: {reasons})")
    print("next: python DataProcess/tldr_data_process_partial.py")


if __name__ == "__main__":
    main()
