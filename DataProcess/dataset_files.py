"""What both data scripts do with files: fail in one message, read a dataset, write all of one or nothing."""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import DatasetDict, load_from_disk
from script_settings import fail

SIDECAR = "processing.json"


def read_dataset(path: str, columns: dict[str, list[str]], made_by: str) -> tuple[DatasetDict, dict]:
    """Load a dataset that an earlier script saved, with the notes it left in `processing.json`.

    Exits with code 2, naming `made_by` as the command to run, where the dataset is missing or unreadable, or
    one of `columns` (split -> names) is not there, not text, or has a null in it.
    """
    restore(Path(path).resolve())
    try:
        dataset = load_from_disk(path)
        sidecar = Path(path, SIDECAR)
        notes = json.loads(sidecar.read_text()) if sidecar.exists() else {}
        if not isinstance(notes, dict) or not isinstance(notes.get("template", ""), str):
            raise ValueError(f"{SIDECAR} is not what a data script writes")

        for split, names in columns.items():
            rows = dataset[split].data
            for name in names:
                if getattr(dataset[split].features[name], "dtype", None) not in ("string", "large_string"):
                    raise ValueError(f"column {name!r} of split {split!r} is not text")
                if rows[name].null_count:
                    raise ValueError(f"column {name!r} of split {split!r} has an empty cell")
                rows[name].validate(full=True)  # a damaged file may still have the shape of one
    except Exception as error:  # missing, truncated and foreign files raise a dozen different types
        fail(f"cannot read the dataset {path!r} ({type(error).__name__}: {error}); make it with `{made_by}`")
    return dataset, notes


@contextmanager
def workspace(path: str) -> Iterator[Path]:
    """A folder beside `path` for everything that is written before the dataset is whole; removed at the end.

    Whatever cannot be written ends in one message and exit code 2.
    """
    target = Path(path).resolve()
    work = workspace_of(target)
    if target.exists() and not Path(target, "dataset_dict.json").exists() and not is_empty_folder(target):
        fail(f"cannot write {path!r}: it exists and is no dataset, and would be replaced")

    try:
        restore(target)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        yield work
    except OSError as error:
        fail(f"cannot write {path!r}: {error}")
    finally:
        restore(target)
        shutil.rmtree(work, ignore_errors=True)


def save_dataset(parts: dict[str, DatasetDict], notes: dict, path: str) -> None:
    """Write `parts` (sub-folder -> dataset, "." for the top one) and `notes` to `path`, all or nothing.

    Stands in a `workspace(path)`. A kill at any moment leaves the old dataset under the name, or the new one.
    """
    target = Path(path).resolve()
    beside, old = workspace_of(target) / "dataset", workspace_of(target) / "old"
    for folder, dataset in parts.items():
        dataset.save_to_disk(beside / folder)
    (beside / SIDECAR).write_text(json.dumps(notes, indent=1))

    if not target.exists():
        os.replace(beside, target)
    elif not exchange(beside, target):
        os.replace(target, old)  # a kill after this one is mended by `restore`
        os.replace(beside, target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or its file system cannot (macOS, NFS)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return (
        renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0
    )


def restore(target: Path) -> None:
    """Put the old dataset back under its name after a kill between the two renames of `save_dataset`."""
    old = workspace_of(target) / "old"
    if old.exists() and not target.exists():
        os.replace(old, target)


def workspace_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
