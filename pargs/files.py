"""Files that one stage leaves for another: datasets with their notes, and reports written all or nothing."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from datasets import Dataset, DatasetDict, load_from_disk

from pargs.cli import fail

NOTES = "processing.json"
MAKE_PAIRS = "python DataProcess/tldr_data_process.py"
MAKE_OWN_PAIRS = "python DataProcess/preference_data_process.py --source FILE"
MAKE_PREFIXES = "python DataProcess/tldr_data_process_partial.py"
TRAIN_PARTIAL = "python partial_reward_training/tldr_partial_reward_model.py"
TRAIN_DPO = "python DPO_training/GPT2_large_DPO_tldr.py"
DECODE = "python PARGS_decode/PARGS_baselines.py"

# What `datasets` and Arrow raise on files that are missing, cut short or foreign.
DATASET_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)


def read_dataset(
    path: str | Path, columns: Mapping[str, Collection[str]], made_by: str, text: bool = True
) -> tuple[DatasetDict, dict]:
    """Load a dataset of stage 1, with the notes that it left in `processing.json`.

    Exits, naming `made_by` as the command to run, where the dataset is missing or unreadable, or one of
    `columns` (split -> names) is missing or damaged, or (where they are to be `text`) no text throughout.
    """
    try:
        dataset = load_from_disk(str(path))
    except DATASET_ERRORS as error:
        fail_to_read(path, error, made_by)
    for split, names in columns.items():
        if not isinstance(dataset, DatasetDict) or split not in dataset:
            fail_to_read(path, f"it has no split {split!r}", made_by)
        for name in names:
            if fault := column_fault(dataset[split], name, text):
                fail_to_read(path, f"column {name!r} of split {split!r} {fault}", made_by)
    return dataset, read_notes(path, made_by)


def column_fault(rows: Dataset, name: str, text: bool) -> str | None:
    """Why a column cannot be read as whole cells (of `text`), or None."""
    if name not in rows.features:
        return "is missing"
    if text and getattr(rows.features[name], "dtype", None) not in ("string", "large_string"):
        return "is not text"
    column = rows.data[name]
    if column.null_count:
        return "has an empty cell"
    try:
        column.validate(full=True)  # a damaged file may still have the shape of one
    except (OSError, ValueError) as error:
        return f"is damaged: {error}"
    return None


def read_notes(path: str | Path, made_by: str) -> dict:
    """What stage 1 noted beside a dataset; without notes the template is "{post}", the prompt itself."""
    notes = Path(path, NOTES)
    try:
        found = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
        if not isinstance(found, dict) or not isinstance(found.get("template", ""), str):
            raise ValueError(f"{NOTES} is not what a data script writes")
    except (OSError, ValueError) as error:
        fail_to_read(path, error, made_by)
    return {"template": "{post}"} | found


def read_template(path: str | Path) -> str:
    """The template that a dataset's prompts were built from; "{post}" where it is not known."""
    return read_notes(path, MAKE_PAIRS)["template"]


def fail_to_read(path: str | Path, error: Exception | str, made_by: str) -> NoReturn:
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    own = f", or from your own pairs with `{MAKE_OWN_PAIRS}`" if made_by == MAKE_PAIRS else ""
    fail(f"cannot read the dataset {str(path)!r} ({reason}); make it with `{made_by}`{own}")


def check_writable(directory: Path) -> None:
    """Exit where nothing could be written: better now than after the work is done."""
    place = next(each for each in (directory, *directory.absolute().parents) if os.path.exists(each))
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        fail(f"cannot write into {str(directory)!r}: {str(place)!r} is no directory that can be written")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file under a temporary name, then rename it: a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        fail(f"cannot write {str(path)!r}: {error}")
    finally:
        with suppress(OSError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8", newline="\n"))


def write_rows(path: Path, rows: Sequence[dict], head: str = "", tail: str = "") -> None:
    """A JSON list with a line for each row, which people and diffs can read."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"{head}[\n{lines}\n]{tail}\n")
