"""Write a dataset all or nothing: beside its name, then in its place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DatasetDict

from pargs.cli import fail
from pargs.files import NOTES


@contextmanager
def workspace(path: str) -> Iterator[Path]:
    """A folder beside `path` for everything that is written before the dataset is whole; removed at the end.

    Whatever cannot be written ends in one message.
    """
    target, work = Path(path).resolve(), workspace_of(path)
    is_empty_folder = target.is_dir() and not any(target.iterdir())
    if target.exists() and not (target / "dataset_dict.json").exists() and not is_empty_folder:
        fail(f"cannot write {path!r}: it exists and is no dataset, and would be replaced")

    try:
        recover(path)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        yield work
    except OSError as error:
        fail(f"cannot write {path!r}: {error}")
    finally:
        recover(path)
        shutil.rmtree(work, ignore_errors=True)


def save_dataset(parts: dict[str, DatasetDict], notes: dict, path: str) -> None:
    """Write `parts` (sub-folder -> dataset, "." for the top one) and `notes` to `path`.

    Stands in a `workspace(path)`. A kill at any moment leaves the old dataset or the new one, between the two
    renames for `recover` to find.
    """
    target, beside, old = Path(path).resolve(), workspace_of(path) / "new", workspace_of(path) / "old"
    for folder, dataset in parts.items():
        dataset.save_to_disk(beside / folder)
    (beside / NOTES).write_text(json.dumps(notes, indent=1), encoding="utf-8")

    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)


def recover(path: str) -> None:
    """Put the old dataset back under its name after a kill between the two renames of `save_dataset`."""
    target, old = Path(path).resolve(), workspace_of(path) / "old"
    if old.exists() and not target.exists():
        os.replace(old, target)


def workspace_of(path: str) -> Path:
    target = Path(path).resolve()
    return target.with_name(f".{target.name}.writing")
