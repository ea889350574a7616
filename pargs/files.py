"""Files that one stage leaves for another: datasets with their notes, and reports written all or nothing."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from datasets import Dataset, DatasetDict, load_from_disk

from pargs.cli import fail

NOTES = "processing.json"
MAKE_PAIRS = "python DataProcess/tldr_data_process.py"
MAKE_PREFIXES = "python DataProcess/tldr_data_process_partial.py"
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
        for split, names in columns.items():
            for name in names:
                check_column(dataset[split], split, name, text)
    except DATASET_ERRORS as error:
        fail_to_read(path, error, made_by)
    return dataset, read_notes(path, made_by)


def check_column(rows: Dataset, split: str, name: str, text: bool) -> None:
    """Raises ValueError where a column is missing, damaged or not `text`, or has an empty cell."""
    if name not in rows.features:
        raise ValueError(f"split {split!r} has no column {name!r}")
    if text and getattr(rows.features[name], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"column {name!r} of split {split!r} is not text")
    if rows.data[name].null_count:
        raise ValueError(f"column {name!r} of split {split!r} has an empty cell")
    rows.data[name].validate(full=True)  # a damaged file may still have the shape of one


def read_notes(path: str | Path, made_by: str) -> dict:
    """What stage 1 noted beside a dataset; nothing where there are no notes."""
    notes = Path(path, NOTES)
    try:
        found = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
        if not isinstance(found, dict) or not isinstance(found.get("template", ""), str):
            raise ValueError(f"{NOTES} is not what a data script writes")
    except (OSError, ValueError) as error:
        fail_to_read(path, error, made_by)
    return found


def read_template(path: str | Path) -> str:
    """The template that a dataset's prompts were built from; "{post}" where it is not known."""
    return read_notes(path, MAKE_PAIRS).get("template", "{post}")


def fail_to_read(path: str | Path, error: Exception, made_by: str) -> NoReturn:
    fail(f"cannot read the dataset {str(path)!r} ({type(error).__name__}: {error}); make it with `{made_by}`")


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
