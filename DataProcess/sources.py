"""Rows of a dataset: from the hub, a local folder or a file; what cannot be loaded ends in one message."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.csv.csv import CsvConfig
from httpx import HTTPError
from yaml import YAMLError

from pargs.cli import fail
from pargs.files import DATASET_ERRORS

# What `load_dataset` raises: its own, the hub client's, and those of the files and the card that it reads.
SOURCE_ERRORS = (*DATASET_ERRORS, DatasetsError, HTTPError, YAMLError, RuntimeError, ImportError)


class UnusableRow(ValueError):
    """A row that has not the fields it should have; the message names it."""


def load_source(name: str, config: str | None, cache_dir: str) -> DatasetDict:
    """Load a dataset, or the parquet copy that the hub keeps of one that only has a loading script.

    A folder is read into `cache_dir`: the user's cache tells folders apart by their names alone, and would
    give one run's rows to another, or the rows as they were before the files changed.
    """
    where: dict[str, Any] = {"cache_dir": cache_dir} if Path(name).is_dir() else {}
    try:
        if where and isinstance(load_dataset_builder(name, config, **where).config, CsvConfig):
            where |= {"keep_default_na": False, "na_values": [""]}  # an answer may well read "NA"
        return load_dataset(name, config, **where)
    except SOURCE_ERRORS as error:
        # "Dataset scripts are no longer supported" is a RuntimeError, an unknown configuration a ValueError.
        if config is None or not isinstance(error, RuntimeError | ValueError):
            fail_to_load(name, error)
        first_error = error

    try:
        return load_dataset(name, data_dir=config, revision="refs/convert/parquet", **where)
    except SOURCE_ERRORS as error:
        fail_to_load(name, first_error, f"; and no parquet copy of configuration {config!r}: {reason(error)}")


def read_rows(name: str, config: str | None, split: str, cache_dir: str) -> Dataset | list[dict]:
    """The rows of a file (JSON lines, CSV or parquet; the first two also as .gz), or of a dataset's split."""
    if not Path(name).is_file():
        if not Path(name).exists() and Path(name).suffix in (".jsonl", ".json", ".csv", ".parquet", ".gz"):
            fail(f"there is no file {name!r}")
        return read_split(name, config, split, cache_dir)
    kind = "".join(Path(name).suffixes).removesuffix(".gz").rpartition(".")[2].lower()
    try:
        if kind in ("jsonl", "json"):
            return read_json_lines(name)
        if kind == "csv":
            # As text: an answer may well read "NA" or "42".
            table = pd.read_csv(name, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            if not isinstance(table.index, pd.RangeIndex):
                fail(f"cannot load {name!r}: its rows have more cells than its first line names")
            return table.to_dict("records")
        if kind == "parquet":
            return Dataset.from_parquet(name, cache_dir=cache_dir)
    except (*SOURCE_ERRORS, EOFError, zlib.error) as error:  # the last two of a damaged .gz
        fail_to_load(name, error)
    fail(f"cannot load {name!r}: a file ends in .jsonl, .json, .csv or .parquet, and perhaps .gz")


def read_split(name: str, config: str | None, split: str, cache_dir: str) -> Dataset:
    if Path(name, "dataset_dict.json").exists():
        try:
            splits = load_from_disk(name)
        except SOURCE_ERRORS as error:
            fail_to_load(name, error)
    else:
        splits = load_source(name, config, cache_dir)
    if split not in splits:
        fail(f"{name!r} has no split {split!r}; it has {sorted(splits)}: name one with --split")
    return splits[split]


def read_json_lines(name: str) -> list[dict]:
    rows = []
    with (gzip.open if name.endswith(".gz") else open)(name, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                fail(f"{name}, line {number} is not JSON ({error}); each line holds one row, an object")
            if row is not None and not isinstance(row, dict):
                fail(f"{name}, line {number} is not a JSON object; each line holds one row")
            rows += [] if row is None else [row]
    return rows


def fail_to_load(name: str, error: Exception, also: str = "") -> NoReturn:
    hint = "" if Path(name).exists() else "; a folder of a dataset's name here is read in place of the hub's"
    fail(f"cannot load {name!r}: {reason(error)}{also}{hint}")


def reason(error: Exception) -> str:
    """What `datasets` wraps in a general message, without the schemas it may print."""
    return " ".join(str(error.__cause__ or error).split())[:300]


def is_text_or_none(value: object) -> bool:
    """Text that can be written as UTF-8: half a surrogate pair cannot."""
    if isinstance(value, str):
        return value.isascii() or value.encode(errors="replace").decode() == value
    return value is None
