"""What both data scripts do with files: fail in one message, read a dataset, write all of one or nothing."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from datasets import DatasetDict, load_from_disk

SIDECAR = "processing.json"


def fail(message: str) -> NoReturn:
    """Print one error line and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_dataset(path: str, made_by: str) -> tuple[DatasetDict, dict]:
    """Load a dataset that an earlier script saved, with the notes it left in `processing.json`.

    Exits with code 2 where the dataset is missing or unreadable, naming `made_by` as the command to run.
    """
    try:
        dataset = load_from_disk(path)
        sidecar = Path(path, SIDECAR)
        notes = json.loads(sidecar.read_text()) if sidecar.exists() else {}
    except Exception as error:  # missing, truncated and foreign files raise a dozen different types
        fail(f"cannot read the dataset {path!r} ({error}); make it with `{made_by}`")
    return dataset, notes


def save_dataset(parts: dict[str, DatasetDict], notes: dict, path: str) -> None:
    """Write `parts` (sub-folder -> dataset, "." for the top one) and `notes` to `path`, all or nothing.

    Everything is written beside `path` first and renamed into place at the end.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.writing")
    old = target.with_name(f".{target.name}.old")

    try:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder, dataset in parts.items():
            dataset.save_to_disk(beside / folder)
        (beside / SIDECAR).write_text(json.dumps(notes, indent=1))

        if target.exists():
            os.replace(target, old)
        os.replace(beside, target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        fail(f"cannot write {path!r}: {error}")
